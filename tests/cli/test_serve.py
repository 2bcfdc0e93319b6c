"""The local page: its answers, its limits and what it refuses."""

import contextlib
import io
import json
import re
import shutil
import socket
import threading
import urllib.request
import webbrowser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("flask", reason="the extra `serve` is not installed")

import maskx
from maskx.cli.main import main
from maskx.cli.web.app import make_app
from maskx.data.masks import PastedMasks, decode_segmentation, encode_masks
from maskx.engine.results import Prediction
from maskx.supervision import split_one_side

NAMES = ("cat", "dog")


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
        mask_prob = torch.full((len(boxes), 4, 4), 0.9)
        return PastedMasks(mask_prob, torch.tensor(boxes), image.shape[:2])


@pytest.fixture
def answers():
    return Answers()


def open_app(answers, **options):
    app = make_app(answers, "runs/half", max_bytes=50_000, max_pixels=40 * 30, **options)
    return app.test_client()


@pytest.fixture
def client(answers):
    return open_app(answers)


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
    key = upload(client, png(), name="a/photo.png").get_json()["id"]
    # Dragged from the lower right, and beyond the image.
    asked = {"id": key, "box": [40, 12, 20, 2], "name": "cat"}
    objects = client.post("/mask", json=asked).get_json()["objects"]
    assert [o["name"] for o in objects] == ["cat", "dog"]
    assert objects[0]["box"] == [20, 2, 24, 12]
    file = json.loads(client.get(f"/coco/{key}?threshold=0.7").data)
    assert file["images"] == [{"id": 1, "file_name": "photo.png", "height": 20, "width": 24}]
    assert [c["name"] for c in file["categories"]] == ["cat", "dog"]
    (annotation,) = file["annotations"]  # the dog's score is below the threshold
    assert annotation["category_id"] == 1
    assert annotation["area"] == 40
    assert decode_segmentation(annotation["segmentation"], 20, 24)[2:12, 20:].all()
    assert annotation["segmentation_source"] == "maskx:half"  # as of `maskx complete`
    assert annotation["segmentation_quality"] == pytest.approx(0.9)
    all_of_it = json.loads(client.get(f"/coco/{key}").data)
    assert [a["id"] for a in all_of_it["annotations"]] == [1, 2]


TRIANGLE = [[1.0, 1.0, 9.25, 1.0, 1.0, 9.125]]


def half_labelled(**image):
    """A file of two images: in the first a cat with a mask, a dog and a horse without."""
    names = {5: "cat", 7: "dog", 9: "horse"}
    boxes = {5: [1, 1, 8.25, 8.125], 7: [10, 4, 6, 8], 9: [2, 12, 9, 6]}
    annotations = [
        {"id": 10 + id_, "image_id": "a", "category_id": id_, "bbox": box, "iscrowd": 0}
        for id_, box in boxes.items()
    ]
    annotations[0] |= {"segmentation": TRIANGLE, "note": "by hand"}
    own = {"id": "a", "file_name": "photos\\photo.png", "height": 20, "width": 24, **image}
    other = {"id": "b", "file_name": "other.png", "height": 20, "width": 24}
    return {
        "info": {"year": 2026},
        "images": [other, own],
        "annotations": [*annotations, {**annotations[1], "id": 99, "image_id": "b"}],
        "categories": [{"id": id_, "name": name} for id_, name in names.items()],
    }


def attach(client, key, content, name="train.json"):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    data = {"id": key, "annotations": (io.BytesIO(content), name)}
    return client.post("/annotations", data=data)


def test_boxes_of_a_file_get_masks_and_the_rest_of_it_stays(client):
    key = upload(client, png()).get_json()["id"]
    client.post("/mask", json={"id": key, "box": [20, 2, 24, 12], "name": "dog"})
    answer = attach(client, key, half_labelled()).get_json()
    assert answer["unknown"] == ["horse"]
    shown = [(o["name"], o["needs_mask"], o["score"]) for o in answer["objects"]]
    given = [("cat", False, None), ("dog", True, None), ("horse", True, None)]
    assert shown == [*given, ("dog", False, None), ("dog", False, pytest.approx(0.6))]
    assert area(answer["objects"][0]["polygons"]) == pytest.approx(32, abs=12)

    objects = client.post("/mask", json={"id": key, "object": 1}).get_json()["objects"]
    assert [o["needs_mask"] for o in objects] == [False, False, True, False, False]
    assert area(objects[1]["polygons"]) == 48
    file, given = json.loads(client.get(f"/coco/{key}?threshold=0.5").data), half_labelled()
    cat, dog, horse, drawn, found = file["annotations"]
    assert (cat, horse) == (given["annotations"][0], given["annotations"][2])
    assert {key: dog[key] for key in given["annotations"][1]} == given["annotations"][1]
    assert (dog["area"], dog["segmentation_source"]) == (48, "maskx:half")
    assert file["images"] == given["images"][1:]
    assert (file["categories"], file["info"]) == (given["categories"], given["info"])
    assert [(a["id"], a["image_id"], a["category_id"]) for a in (drawn, found)] == [
        (20, "a", 7),
        (21, "a", 7),
    ]
    assert "segmentation_source" in drawn
    assert (found["segmentation_source"], found["segmentation_quality"]) == ("maskx:half", 0.6)
    assert found["score"] == pytest.approx(0.6)


def test_another_file_takes_the_place_of_the_first(client):
    key = upload(client, png()).get_json()["id"]
    attach(client, key, half_labelled())
    other = half_labelled() | {"annotations": half_labelled()["annotations"][:1]}
    objects = attach(client, key, other).get_json()["objects"]
    assert [o["name"] for o in objects] == ["cat", "dog"]


def test_categories_of_the_model_join_those_of_the_file(client):
    key = upload(client, png()).get_json()["id"]
    of_cats = half_labelled()
    of_cats |= {"annotations": of_cats["annotations"][:1], "categories": of_cats["categories"][:1]}
    attach(client, key, of_cats)
    file = client.get(f"/coco/{key}").get_json()
    assert file["categories"] == [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}]
    assert [a["category_id"] for a in file["annotations"]] == [5, 6]
    assert len(client.get(f"/coco/{key}?threshold=0.9").get_json()["categories"]) == 1


def test_a_file_of_another_format_and_of_one_image_by_another_name(client):
    key = upload(client, png()).get_json()["id"]
    shape = {"label": "cat", "points": [[2, 3], [9, 11]], "shape_type": "rectangle"}
    labelme = {"imagePath": "x.jpg", "imageHeight": 20, "imageWidth": 24, "shapes": [shape]}
    (given, _) = attach(client, key, labelme, "photo.json").get_json()["objects"]
    assert (given["name"], given["box"], given["needs_mask"]) == ("cat", [2, 3, 9, 11], True)
    cvat = (
        b'<annotations><image name="x.jpg" width="24" height="20">'
        b'<box label="dog" xtl="2" ytl="3" xbr="9" ybr="11"/></image></annotations>'
    )
    (given, _) = attach(client, key, cvat, "photo.XML").get_json()["objects"]
    assert (given["name"], given["needs_mask"]) == ("dog", True)


def test_a_file_with_mistakes_is_refused_or_with_skip_bad_taken_and_they_are_counted(answers):
    content = half_labelled()
    content["annotations"][1]["bbox"] = [10, 4, -6, 8]
    strict, lenient = (open_app(answers, strict=strict) for strict in (True, False))
    refused = attach(strict, upload(strict, png()).get_json()["id"], content)
    assert refused.status_code == 400
    assert re.search(r"train\.json: has 1 bad annotation.*--skip-bad", refused.get_json()["error"])
    taken = attach(lenient, upload(lenient, png()).get_json()["id"], content).get_json()
    assert [o["name"] for o in taken["objects"] if o["score"] is None] == ["cat", "horse"]
    (warning,) = taken["warnings"]
    assert re.search(r"^train\.json: 1 bad entries .*left out.*'dog'", warning)
    key = upload(lenient, png()).get_json()["id"]
    assert attach(lenient, key, half_labelled()).get_json()["warnings"] == []


def _without_category():
    content = half_labelled()
    content["annotations"][0]["category_id"] = 77
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            half_labelled(file_name="c.png"),
            r"train\.json has no image 'photo\.png' among its 2: 'oth",
        ),
        (half_labelled(width=48), r"train\.json says .* 48 x 20 pixels, .* photograph has 24 x 20"),
        (b"%PDF-1.7", r"^train\.json: is not (valid JSON|UTF-8)"),
        ({"images": []}, r"^train\.json: lacks the list 'annotations'"),
        (_without_category(), r"^train\.json: annotation 15 has category_id 77, which is not in"),
        ({"imagePath": "x.jpg", "shapes": []}, r"^train\.json: image x\.jpg does not exist"),
        (b"x" * 200_000, r"larger than .*--max-megabytes"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_the_photograph_stays(client, content, message):
    key = upload(client, png()).get_json()["id"]
    answer = attach(client, key, content)
    assert answer.status_code in (400, 413)
    assert re.search(message, answer.get_json()["error"])
    assert client.get(f"/coco/{key}").get_json()["images"][0]["file_name"] == "photo.png"


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
    assert "no longer held" in attach(client, "none", half_labelled()).get_json()["error"]
    assert "No image came" in client.post("/predict").get_json()["error"]
    assert "no longer held" in client.get("/coco/none").get_json()["error"]
    key = upload(client, png()).get_json()["id"]
    for box, name, message in [
        ([30, 2, 40, 8], "cat", "no pixel in the image of 24 x 20"),
        ([1, 2, 3], "cat", "four numbers"),
        ([0, 0, 10**400, 9], "cat", "four numbers"),
        ([1, 2, 8, 8], "horse", "does not know 'horse'. It knows 'cat', 'dog'"),
    ]:
        answer = client.post("/mask", json={"id": key, "box": box, "name": name})
        assert answer.status_code == 400
        assert message in answer.get_json()["error"]
    assert "No file came" in client.post("/annotations", data={"id": key}).get_json()["error"]
    attach(client, key, half_labelled())
    for number, message in [
        (0, "Object 0, 'cat', needs no mask"),
        (2, "does not know 'horse'"),
        (3, "The object is 3. Allowed: the number of one of the 3 objects"),
        ("1", "The object is '1'"),
    ]:
        answer = client.post("/mask", json={"id": key, "object": number})
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


class Concepts(Answers):
    """Finds the concepts that it is asked for, as ConceptMask does: without boxes."""

    system = SimpleNamespace(title="Concepts", box_masks=None, takes_concepts=True)
    run = SimpleNamespace(split=None)

    def __call__(self, image, concepts=()):
        mask = np.zeros((len(concepts), *image.shape[:2]), bool)
        mask[:, 5:15, 5:15] = True
        return Prediction(
            tuple(concepts),
            segmentations=encode_masks(mask),
            scores=np.linspace(0.9, 0.6, len(concepts)),
            class_indices=np.arange(len(concepts)),
            image=image,
        )


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = (
        shutil.which("chromium") or shutil.which("google-chrome"),
        shutil.which("chromedriver"),
    )
    if None in programs:
        pytest.skip("the page is tested where chromium and chromedriver are installed")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size=1200,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


class Page:
    """The page in a browser, as a person uses it. Places are pixels of the photograph."""

    def __init__(self, driver, folder):
        self.driver, self.folder = driver, folder

    def part(self, name):
        return self.driver.find_element("id", name)

    def text(self, name):
        return self.part(name).text

    def until(self, condition):
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 10, poll_frequency=0.02).until(lambda _: condition())

    def give(self, *files):
        paths = []
        for name, content in files:
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            (self.folder / name).write_bytes(content)
            paths.append(str(self.folder / name))
        self.part("file").send_keys("\n".join(paths))
        self.until_idle()

    def until_idle(self):
        self.until(
            lambda: (
                "busy" not in self.driver.find_element("tag name", "body").get_attribute("class")
            )
        )

    def rows(self, kind="row"):
        return [row.text.split("\n") for row in self.driver.find_elements("class name", kind)]

    def marked(self):
        return self.rows("marked")

    def picture(self):
        return self.driver.execute_script("return document.getElementById('canvas').toDataURL()")

    def drag(self, start, end, kind="mouse"):
        """Press at a place, go to another and let go."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        canvas = self.part("canvas")
        actions = ActionBuilder(self.driver, mouse=PointerInput(kind, kind), duration=10)
        for x, y in (start, end):
            scale = canvas.size["width"] / 24
            offset = round((x - 12) * scale), round((y - 10) * scale)  # from the centre
            actions.pointer_action.move_to(canvas, *offset)
            if (x, y) == start:
                actions.pointer_action.pointer_down()
        actions.pointer_action.pointer_up()
        actions.perform()
        self.until_idle()

    def click(self, place, kind="mouse"):
        self.drag(place, place, kind)

    def download(self):
        with urllib.request.urlopen(self.part("download").get_attribute("href")) as answer:
            return json.load(answer)


@pytest.fixture
def open_page(browser, tmp_path):
    """Serve a model and open its page; at the end nothing may have failed in the browser."""
    from werkzeug.serving import make_server

    with contextlib.ExitStack() as stack:

        def open_it(model):
            app = make_app(model, "runs/half", max_bytes=50_000, max_pixels=40 * 30)
            server = make_server("127.0.0.1", 0, app, threaded=True)
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            browser.get(f"http://127.0.0.1:{server.server_port}/")
            page = Page(browser, tmp_path)
            page.until(lambda: page.text("title") == model.system.title)
            return page

        yield open_it
        errors = [entry["message"] for entry in browser.get_log("browser")]
        # A refused question is an answer that the page shows; the browser notes it all the same.
        assert [error for error in errors if "status of 400" not in error] == []


@pytest.fixture
def page(open_page):
    return open_page(Answers())


def test_the_page_shows_a_photograph_with_what_reaches_the_threshold(page):
    assert "Green categories" in page.text("about")
    page.give(("photo.png", png()))
    assert page.rows() == [["dog", "0.60"]]
    with_mask = page.picture()
    page.driver.execute_script(
        "const slider = document.getElementById('threshold');"
        "slider.value = 0.7; slider.dispatchEvent(new Event('input'));"
    )
    assert page.rows() == []
    assert page.part("none").is_displayed()
    assert page.picture() != with_mask
    assert page.download()["annotations"] == []


@pytest.mark.parametrize("kind", ["mouse", "touch"])
def test_on_the_page_a_dragged_box_gets_a_mask(page, kind):
    page.give(("photo.png", png()))
    before = page.picture()
    page.drag((20, 12), (23, 2), kind)
    assert page.rows() == [["cat", "quality 0.90"], ["dog", "0.60"]]
    assert page.picture() != before
    x, y, width, height = page.download()["annotations"][0]["bbox"]
    assert (x, y, x + width, y + height) == pytest.approx((20, 2, 23, 12), abs=0.1)


@pytest.mark.parametrize("kind", ["mouse", "touch"])
def test_on_the_page_a_click_gives_a_dashed_box_its_mask(page, kind):
    page.give(("photo.png", png()), ("train.json", half_labelled()))
    found = ["dog", "0.60"]
    assert page.rows() == [["cat"], ["dog", "box, no mask"], ["horse", "box, no mask"], found]
    assert "train.json: 2 of its objects here have a box and no mask" in page.text("note")
    assert "does not know horse" in page.text("note")
    before = page.picture()
    page.click((13, 7), kind)  # also in the dog that was found
    assert page.rows() == [["cat"], ["dog", "quality 0.90"], ["horse", "box, no mask"], found]
    assert page.picture() != before
    assert ["segmentation" in a for a in page.download()["annotations"]] == [
        True,
        True,
        False,
        True,
    ]
    page.click((4, 15), kind)
    assert "does not know 'horse'" in page.text("error")


def test_on_the_page_a_click_marks_the_smallest_object_and_enter_asks_for_its_mask(page):
    page.give(("photo.png", png()), ("train.json", half_labelled()))
    page.click((7, 6))  # in the cat, and in the dog that was found, which is larger
    assert page.marked() == [["cat"]]
    page.click((17, 15))
    assert page.marked() == [["dog", "0.60"]]
    page.click((22, 18))
    assert page.marked() == []
    page.driver.find_elements("class name", "row")[1].send_keys("\n")
    page.until_idle()
    assert page.marked() == [["dog", "quality 0.90"]]
    assert page.driver.switch_to.active_element.text == "dog\nquality 0.90"


def test_the_page_says_what_it_cannot_take(page):
    page.give(("train.json", half_labelled()))
    assert page.text("error") == "Give the photograph first, or both together."
    page.give(("notes.pdf", b"%PDF-1.7"))
    assert page.text("error") == "The browser cannot read notes.pdf as an image."
    page.give(("photo.png", png()), ("other.json", half_labelled(width=48)))
    assert "other.json says" in page.text("error")
    assert page.rows() == [["dog", "0.60"]]  # the photograph is there
    page.give(("a.png", png()), ("b.png", png()))
    assert "one photograph at a time" in page.text("error")


def test_concepts_are_found_on_the_page(open_page):
    page = open_page(Concepts())
    assert not page.part("box-part").is_displayed()
    page.part("concepts").send_keys("red car, tree")
    page.give(("photo.png", png()))
    assert page.rows() == [["red car", "0.90"], ["tree", "0.60"]]
    page.part("concepts").clear()
    page.part("concepts").send_keys("bird\n")
    page.until_idle()
    assert page.rows() == [["bird", "0.90"]]
    page.click((10, 10))
    assert page.marked() == [["bird", "0.90"]]
    assert [c["name"] for c in page.download()["categories"]] == ["bird"]
