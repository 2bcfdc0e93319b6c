"""The local page: its answers, its limits and what it refuses."""

import io
import json
import re
import socket
import webbrowser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("flask", reason="the extra `serve` is not installed")

import maskx
from maskx.cli.main import main
from maskx.cli.web.app import make_app
from maskx.data.masks import decode_segmentation, encode_masks
from maskx.engine.results import Prediction
from maskx.supervision import split_one_side

NAMES = ("cat", "dog")


class Encoded:
    """Masks of given boxes, as far as the page uses them."""

    def __init__(self, masks):
        self.masks = masks

    def encode(self):
        return encode_masks(self.masks)


class Answers:
    """Finds a ring that is a dog, and fills given boxes."""

    class_names = NAMES
    run = SimpleNamespace(split=split_one_side("half", NAMES, with_masks=("cat",)))
    system = SimpleNamespace(title="A system", box_masks=True, takes_concepts=True)

    def __init__(self):
        self.asked = []

    def __call__(self, image, **asked):
        self.asked.append(asked)
        ring = np.zeros(image.shape[:2], bool)
        ring[4:16, 6:18] = True
        ring[8:12, 10:14] = False
        return Prediction(
            NAMES,
            boxes=np.array([[6.0, 4.0, 18.0, 16.0]]),
            segmentations=encode_masks(ring[None]),
            scores=np.array([0.6]),
            class_indices=np.array([1]),
            image=image,
        )

    def masks_of_boxes(self, image, boxes, names):
        if names[0] not in NAMES:
            raise ValueError(f"The model does not know {names[0]}. It knows cat, dog.")
        mask = np.zeros(image.shape[:2], bool)
        x0, y0, x1, y1 = (int(value) for value in boxes[0])
        mask[y0:y1, x0:x1] = True
        return Encoded(mask[None])


@pytest.fixture
def answers():
    return Answers()


@pytest.fixture
def client(answers):
    return make_app(answers, max_bytes=50_000, max_pixels=40 * 30).test_client()


def png(width=24, height=20, **kwargs):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(file, "PNG", **kwargs)
    return file.getvalue()


def upload(client, content, name="photo.png", **form):
    return client.post("/predict", data={"image": (io.BytesIO(content), name), **form})


def area(polygons, size=(20, 24)):
    """Of polygons by the even-odd rule, as the browser fills them."""
    from PIL import ImageChops, ImageDraw

    total = Image.new("1", size[::-1])
    for polygon in polygons:
        one = Image.new("1", size[::-1])
        ImageDraw.Draw(one).polygon(polygon, fill=1)
        total = ImageChops.logical_xor(total, one)
    return int(np.array(total).sum())


def test_the_page_comes_with_what_the_model_is(client):
    page = client.get("/")
    assert page.status_code == 200
    assert b"Drop a photograph" in page.data
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    model = client.get("/model").get_json()
    assert model["class_names"] == ["cat", "dog"]
    assert model["without_masks"] == ["dog"]
    assert model["takes_boxes"]


def test_a_photograph_gets_objects_with_polygons_and_holes(client, answers):
    answer = upload(client, png(), concepts="red car, cat,,").get_json()
    assert (answer["width"], answer["height"]) == (24, 20)
    (found,) = answer["objects"]
    assert found["name"] == "dog"
    assert found["score"] == pytest.approx(0.6)
    assert found["box"] == [6, 4, 18, 16]
    outer, inner = sorted(found["polygons"], key=lambda polygon: area([polygon]), reverse=True)
    assert area([outer]) == 144
    assert area([inner]) < 40  # the hole
    assert answers.asked == [{"concepts": ["red car", "cat"]}]


def test_a_given_box_gets_a_mask_and_is_in_the_download(client):
    key = upload(client, png()).get_json()["id"]
    # Dragged from the lower right, and beyond the image.
    asked = {"id": key, "box": [40, 12, 20, 2], "name": "cat"}
    objects = client.post("/mask", json=asked).get_json()["objects"]
    assert [o["name"] for o in objects] == ["dog", "cat"]
    assert objects[1]["box"] == [20, 2, 24, 12]
    file = json.loads(client.get(f"/coco/{key}?threshold=0.7&name=a/photo.png").data)
    assert file["images"] == [{"id": 1, "file_name": "photo.png", "height": 20, "width": 24}]
    assert [c["name"] for c in file["categories"]] == ["cat", "dog"]
    (annotation,) = file["annotations"]  # the dog's score is below the threshold
    assert annotation["category_id"] == 1
    assert annotation["area"] == 40
    assert decode_segmentation(annotation["segmentation"], 20, 24)[2:12, 20:].all()
    all_of_it = json.loads(client.get(f"/coco/{key}").data)
    assert [a["id"] for a in all_of_it["annotations"]] == [1, 2]


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"%PDF-1.7 no image", 400, r"'photo.png' is no image.*JPEG, PNG"),
        (png(41, 30), 400, r"41 x 30 pixels.*--max-megapixels"),
        (png()[:60], 400, r"'photo.png' is (damaged|no image)"),
        (b"x" * 200_000, 413, "larger than"),
    ],
)
def test_what_is_no_small_image_is_refused(client, content, status, message):
    answer = upload(client, content)
    assert answer.status_code == status
    assert re.search(message, answer.get_json()["error"])


def test_other_wrong_questions_are_refused_by_name(client):
    assert "No image came" in client.post("/predict").get_json()["error"]
    assert "no longer held" in client.get("/coco/none").get_json()["error"]
    key = upload(client, png()).get_json()["id"]
    for box, name, message in [
        ([30, 2, 40, 8], "cat", "no pixel in the image of 24 x 20"),
        ([1, 2, 3], "cat", "four numbers"),
        ([0, 0, 10**400, 9], "cat", "four numbers"),
        ([1, 2, 8, 8], "horse", "does not know horse"),
    ]:
        answer = client.post("/mask", json={"id": key, "box": box, "name": name})
        assert answer.status_code == 400
        assert message in answer.get_json()["error"]
    for _ in range(8):
        upload(client, png())
    assert "no longer held" in client.get(f"/coco/{key}").get_json()["error"]


@pytest.mark.parametrize(
    "question", [[1], "x", {"id": [1], "name": "cat"}, {"id": "1"}, {"id": "1", "name": [2]}]
)
def test_what_is_no_question_about_a_box_is_refused(client, question):
    answer = client.post("/mask", json=question)
    assert answer.status_code == 400
    assert re.search(r"question is .*Allowed: an object with 'id'", answer.get_json()["error"])


@pytest.fixture
def served(answers, monkeypatch):
    """Ask an application as `maskx serve` makes it for a host, without a port to listen on."""
    monkeypatch.setattr(maskx, "open_run", lambda folder, device: answers, raising=False)
    made = []

    def make_server(host, port, app, **_):
        made.append(app.test_client())
        return SimpleNamespace(server_port=port, serve_forever=lambda: None)

    monkeypatch.setattr("werkzeug.serving.make_server", make_server)

    def serve(host):
        main(["serve", "run", "--host", host])
        return made[-1]

    return serve


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1", "127.0.0.5"])
def test_another_site_cannot_give_its_name_the_address_of_this_machine(served, capsys, address):
    client = served(address)
    own = f"[{address}]" if ":" in address else address
    assert f"http://{own}:8000/" in capsys.readouterr().out
    for host in ("localhost", "localhost:9000", "127.0.0.1:8000", "[::1]:8000", "[::1]", own):
        assert client.get("/model", headers={"Host": host}).status_code == 200, host
    for host in ("rebound.example", "rebound.example:8000", "localhost.rebound.example"):
        answer = client.get("/model", headers={"Host": host})
        assert answer.status_code == 403
        assert re.search(r"name 'rebound|'localhost\.reb", answer.get_json()["error"])
        assert re.search(r"Allowed: .*127\.0\.0\.1.*--host", answer.get_json()["error"])


def test_on_a_network_the_page_answers_under_any_name(served, capsys):
    client = served("0.0.0.0")
    assert "there is no password" in capsys.readouterr().out
    assert client.get("/model", headers={"Host": "desk.example:8000"}).status_code == 200


def test_a_folder_without_a_run_ends_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*run\.json"):
        main(["serve", str(tmp_path)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "-1"], "--port is -1. Allowed: 0, for a free one, to 65535"),
        (["--port", "70000"], "--port is 70000. Allowed"),
        (["--port", "0", "--max-megabytes", "nan"], "--max-megabytes is nan. Allowed: a number"),
        (["--port", "0", "--max-megabytes", "0"], "--max-megabytes is 0.0. Allowed: a number"),
        (["--port", "0", "--max-megapixels", "inf"], "--max-megapixels is inf. Allowed: a number"),
        (["--port", "0", "--max-megapixels", "-3"], "--max-megapixels is -3.0. Allowed: a number"),
        (["--port", "0", "--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 0"),
        (["--port", "0", "--host", "http://localhost"], "--host http://localhost --port 0 cannot"),
    ],
)
def test_mistakes_in_the_options_end_in_one_line(answers, monkeypatch, options, words):
    monkeypatch.setattr(maskx, "open_run", lambda folder, device: answers, raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "run", *options])
    assert ended.value.code.startswith(f"error: {words}")
    assert "\n" not in ended.value.code


def test_a_port_in_use_is_named(answers, monkeypatch):
    monkeypatch.setattr(maskx, "open_run", lambda folder, device: answers, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"--port {port} is in use"):
            main(["serve", "run", "--port", str(port)])


def test_without_a_browser_the_address_is_said(answers, monkeypatch, capsys):
    monkeypatch.setattr(maskx, "open_run", lambda folder, device: answers, raising=False)
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    monkeypatch.setattr(
        "werkzeug.serving.make_server",
        lambda *_, **__: SimpleNamespace(server_port=8123, serve_forever=lambda: None),
    )
    assert main(["serve", "run", "--open"]) == 0
    assert "No browser was found. Open http://127.0.0.1:8123/ yourself" in capsys.readouterr().out
