"""`maskx predict`, of instances and of label maps: what it writes, and what it refuses."""

import json
import re
import types

import cv2
import numpy as np
import pytest
from PIL import Image
from toy_model import OneWeight

from maskx.cli.main import main
from maskx.data.coco import load_coco
from maskx.data.label_maps import read_label_map
from maskx.data.masks import encode_masks
from maskx.engine.predict_files import find_inputs, predict_files
from maskx.engine.results import Prediction
from maskx.engine.runs import Run
from maskx.engine.system import System, register_system
from maskx.engine.training import TrainingSettings, load_weights, train
from maskx.evaluation.figures import COLOR_WITH_MASKS, COLOR_WITHOUT_MASKS
from maskx.supervision import split_one_side

NAMES = ("left", "right")


class Halves(OneWeight):
    """Finds an object in either half of an image, the right one with the score it is asked for."""

    def results(self, samples):
        return [{"size": (s["height"], s["width"])} for s in samples]


def open_halves(run, device):
    model = Halves().to(device)
    load_weights(model, run.weights_file)
    return model


def instances(result, class_names):
    height, width = result["size"]
    masks = np.zeros((2, height, width), bool)
    masks[0, :, : width // 2], masks[1, :, width // 2 :] = True, True
    return Prediction(
        tuple(class_names),
        boxes=np.array([[0, 0, width // 2, height], [width // 2, 0, width, height]], float),
        segmentations=encode_masks(masks),
        scores=np.array([0.9, 0.6]),
        class_indices=np.array([0, 1]),
    )


def label_map(result, class_names):
    labels = np.ones(result["size"], np.int64)
    labels[:, result["size"][1] // 2 :] = 2
    return Prediction(tuple(class_names), label_map=labels)


for name, prediction in (
    ("halves", instances),
    ("half_maps", label_map),
    ("asked_halves", instances),
):
    parts = {"open": open_halves, "prediction": prediction, "takes_concepts": "asked" in name}
    register_system(name, System(name, "Halves", lambda o, r: {}, **parts))


@pytest.fixture(params=["halves", "half_maps"])
def system(request):
    return request.param


@pytest.fixture
def make_run(tmp_path):
    def make(system, names=NAMES):
        folder = tmp_path / system
        split = split_one_side("split", names, with_masks=names[:1])
        run = Run(system=system, host="pip", class_names=names, settings={}, split=split)
        settings = TrainingSettings(iterations=1, batch_size=1, learning_rate=1e-3)
        train(Halves(), lambda start, stop: [[{}]], settings, output_dir=folder, run=run)
        return str(folder)

    return make


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, size in enumerate([(40, 60), (80, 50)]):
        cv2.imwrite(str(folder / f"{index}.png"), np.full((*size, 3), 90 + index, np.uint8))
    return folder


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for value in (50, 100, 150):
        writer.write(np.full((48, 64, 3), value, np.uint8))
    writer.release()
    return path


def test_a_folder_gives_pictures_and_one_coco_file(make_run, photos, tmp_path, system, capsys):
    output = tmp_path / "out"
    assert main(["predict", make_run(system), str(photos), "--output", str(output)]) == 0
    content = json.loads((output / "predictions.json").read_text())
    assert [(i["height"], i["width"]) for i in content["images"]] == [(40, 60), (80, 50)]
    assert [c["name"] for c in content["categories"]] == list(NAMES)
    assert {p.name for p in output.glob("*.png")} == {"0.png", "1.png"}
    data = load_coco(output / "predictions.json", "/")  # it is a data set of its own
    if system == "halves":
        assert [a["score"] for a in content["annotations"]] == [0.9, 0.6] * 2
        assert [a["area"] for a in content["annotations"]] == [1200, 1200, 2000, 2000]
        assert len(data.records[1]["annotations"]) == 2
        # Trained on, they do not count as drawn.
        (source,) = {a["segmentation_source"] for a in data.records[1]["annotations"]}
        assert source.startswith("maskx:")
        qualities = [a["segmentation_quality"] for a in data.records[1]["annotations"]]
        assert qualities == [0.9, 0.6]
        assert "2 images, 4 instances" in capsys.readouterr().out
    else:
        assert "2 images, 2 label maps: " in capsys.readouterr().out
        path = data.records[0]["label_map_file_name"]
        found = read_label_map(path, 40, 60, num_classes=2, image_id=1)
        assert np.unique(found[:, :30]).tolist() == [1]
        assert np.unique(found[:, 30:]).tolist() == [2]


def test_label_maps_are_exported_as_those_of_voc(make_run, photos, tmp_path):
    output, folder = tmp_path / "out", tmp_path / "voc"
    assert main(["predict", make_run("half_maps"), str(photos), "--output", str(output)]) == 0
    words = ["export", str(output / "predictions.json"), str(photos), "--copy-images"]
    assert main([*words, "--format", "voc", "--output", str(folder)]) == 0
    for name in ("0", "1"):
        with Image.open(folder / "SegmentationClass" / f"{name}.png") as found:
            written = Image.open(output / "label_maps" / f"{name}.png")
            assert np.array_equal(np.array(found), np.array(written))
    assert (folder / "labelmap.txt").read_text().splitlines()[2:] == [
        "left:128,0,0::",
        "right:0,128,0::",
    ]


def test_results_for_the_test_server_of_voc(make_run, photos, tmp_path):
    """Labels in VOC's order by the names of either list; all that VOC does not have is 0."""
    run = make_run("half_maps", names=("tv", "ladder"))
    output = tmp_path / "out"
    words = ["predict", run, str(photos), "--output", str(output), "--voc-results"]
    assert main(words) == 0
    folder = output / "results" / "VOC2012" / "Segmentation" / "comp6_test_cls"
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", "1.png"]
    with Image.open(folder / "0.png") as found:
        assert (found.mode, found.size) == ("P", (60, 40))
        assert found.getpalette()[3 * 20 : 3 * 21] == [0, 64, 128]
        labels = np.array(found)
    assert (labels[:, :30] == 20).all()  # tvmonitor
    assert not labels[:, 30:].any()
    for system, names, said in (
        (
            "half_maps",
            NAMES,
            "None of the 2 classes of the model is one of PASCAL VOC: 'left', 'ri",
        ),
        ("halves", ("person", "dog"), "but this run finds instances"),
    ):
        words[1] = make_run(system, names)
        with pytest.raises(SystemExit, match=said):
            main([*words, "--overwrite"])


def test_masks_of_a_are_green_and_those_of_b_red(make_run, photos, tmp_path):
    main(["predict", make_run("halves"), str(photos / "0.png"), "--output", str(tmp_path / "out")])
    picture = cv2.imread(str(tmp_path / "out" / "0.png"))[:, :, ::-1].astype(int)
    assert picture.shape == (266, 400, 3)  # of the shape of the image, with even sides
    for pixel, color in (
        (picture[200, 100], COLOR_WITH_MASKS),
        (picture[200, 300], COLOR_WITHOUT_MASKS),
    ):
        assert np.abs(pixel - (0.6 * 90 + 0.4 * np.array(color))).max() <= 2


def test_instances_below_the_threshold_are_left_out(make_run, photos, tmp_path, capsys):
    words = ["predict", make_run("halves"), str(photos), "--output", str(tmp_path / "out")]
    assert main([*words, "--threshold", "0.7", "--no-pictures"]) == 0
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [a["category_id"] for a in content["annotations"]] == [1, 1]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predictions.json"]
    assert "a lower --threshold" not in capsys.readouterr().out
    assert main([*words, "--threshold", "0.95", "--no-pictures", "--overwrite"]) == 0
    found = capsys.readouterr().out
    assert "2 images, 0 instances" in found
    assert "No instance has a score from 0.95 on; a lower --threshold shows others." in found


def test_a_video_becomes_a_video(make_run, video, tmp_path, system):
    output = tmp_path / "out"
    assert main(["predict", make_run(system), str(video), "--output", str(output)]) == 0
    capture = cv2.VideoCapture(str(output / "clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    assert capture.read()[1].shape == (300, 400, 3)
    images = json.loads((output / "predictions.json").read_text())["images"]
    assert [(i["file_name"], i["frame"]) for i in images] == [(str(video), n) for n in range(3)]


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(
    make_run, photos, video, tmp_path, capsys
):
    (photos / "text.jpg").write_text("no image")
    (photos / "empty.mp4").write_bytes(b"")
    output = tmp_path / "out"
    words = ["predict", make_run("halves"), str(photos), str(video), "--output", str(output)]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert re.search(r"left out: \S+text\.jpg: Image '\S+text\.jpg' cannot be read", said)
    assert re.search(r"left out: \S+empty\.mp4: '\S+' has no frames that can be read", said)
    assert len(json.loads((output / "predictions.json").read_text())["images"]) == 5
    assert {p.name for p in output.iterdir()} == {"0.png", "1.png", "clip.mp4", "predictions.json"}


def test_patterns_and_files_of_one_name(make_run, photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    cv2.imwrite(str(other / "0.png"), np.zeros((30, 30, 3), np.uint8))
    words = [str(photos / "*.png"), str(other / "0.png"), str(photos / "0.png")]
    main(["predict", make_run("halves"), *words, "--output", str(tmp_path / "out")])
    names = {p.name for p in (tmp_path / "out").glob("*.png")}
    assert names == {"0.png", "1.png", "0_2.png"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.jpg"], "'none.jpg' is no file and no folder"),
        (["{empty}"], "empty' is a folder without images or videos"),
        (["{photos}", "--concepts", "dog"], "--concepts has no meaning for Halves"),
        (["{photos}", "--threshold", "2"], r"threshold is 2\.0\. Allowed: 0 to 1"),
        (["{photos}", "--tile", "8"], "tile must be at least 32 pixels, got 8"),
        (["{photos}", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(make_run, photos, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    places = {"photos": photos, "empty": tmp_path / "empty"}
    words = [word.format(**places) for word in words]
    with pytest.raises(SystemExit) as ending:
        main(["predict", make_run("halves"), *words, "--output", str(tmp_path / "out")])
    assert re.search(message, str(ending.value.code))
    assert not (tmp_path / "out").exists()


def test_a_question_that_cannot_be_answered_leaves_no_folder(photos, tmp_path):
    def refuse(images, concepts, **_):
        raise ValueError(f"no word vector of {concepts}")

    system = types.SimpleNamespace(takes_concepts=True)
    predictor = types.SimpleNamespace(system=system, class_names=(), many=refuse)
    with pytest.raises(ValueError, match="no word vector of unicorn"):
        predict_files(
            predictor,
            find_inputs([str(photos)]),
            tmp_path / "out",
            source="maskx:run",
            asked={"concepts": "unicorn"},
        )
    assert not (tmp_path / "out").exists()


def test_concepts_are_of_whole_images(make_run, photos, tmp_path):
    words = ["predict", make_run("asked_halves"), str(photos), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="tile has no meaning for Halves"):
        main([*words, "--tile", "64"])


def test_a_folder_that_holds_files_is_not_written_into(make_run, photos, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    words = ["predict", make_run("halves"), str(photos), "--output", str(output)]
    with pytest.raises(SystemExit) as ending:
        main(words)
    assert "exists already. Add --overwrite" in str(ending.value.code)
    assert main([*words, "--overwrite"]) == 0
    assert (output / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("words", [["--batch-size", "3"], ["--tile", "32", "--batch-size", "2"]])
def test_several_at_a_time_and_tiles_give_what_one_by_one_gives(
    make_run, photos, video, tmp_path, words
):
    run = make_run("half_maps" if "--tile" not in words else "halves")
    for number in range(4):
        cv2.imwrite(str(photos / f"same{number}.png"), np.full((40, 60, 3), number, np.uint8))
    (photos / "same1_bad.png").write_text("no image")
    found = []
    for output, more in ((tmp_path / "one", words[:-2]), (tmp_path / "many", words)):
        inputs = [str(photos), str(video), *more]
        assert main(["predict", run, *inputs, "--output", str(output)]) == 1
        found.append(json.loads((output / "predictions.json").read_text()))
        assert len(list(output.glob("*.png"))) == 6
    assert found[0] == found[1]
    assert len(found[0]["images"]) == 9


class Camera:
    """Gives two frames, then the user presses Ctrl-C."""

    def __init__(self, source):
        assert source == 3
        self.left = 2

    def get(self, key):
        return 0.0

    def read(self):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return True, np.full((48, 64, 3), 90, np.uint8)

    def release(self):
        pass


def test_a_camera_is_filmed_until_ctrl_c(make_run, photos, tmp_path, monkeypatch):
    capture, output = cv2.VideoCapture, tmp_path / "out"
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    assert main(["predict", make_run("halves"), "3", "--output", str(output)]) == 0
    images = json.loads((output / "predictions.json").read_text())["images"]
    assert [(i["file_name"], i["frame"]) for i in images] == [("camera 3", 0), ("camera 3", 1)]
    assert capture(str(output / "camera_3.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 2


def test_a_camera_that_is_not_there_is_named(make_run, photos, tmp_path, capsys):
    words = ["predict", make_run("halves"), "77", str(photos), "--output", str(tmp_path / "out")]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "left out: camera 77: 'camera 77' has no frames that can be read" in said
    assert (tmp_path / "out" / "0.png").is_file()
