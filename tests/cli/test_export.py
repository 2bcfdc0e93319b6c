"""`maskx export`: what is written, what is said, what is never overwritten."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from maskx.cli.main import main
from maskx.data.coco import load_coco
from maskx.data.formats.table import read_dataset, write_dataset
from maskx.data.label_maps import LABEL_MAP_KEYS
from maskx.data.masks import decode_segmentation

FORMATS = {
    "coco": "annotations.json",
    "cvat": "annotations/instances_default.json",
    "label-studio": "tasks.json",
    "labelme": "0.json",
    "voc": "Annotations/0.xml",
    "yolo": "labels/train/0.txt",
}


def ring():
    mask = np.zeros((20, 30), bool)
    mask[2:12, 3:13] = True
    mask[5:8, 6:9] = False
    rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [20, 30], "counts": rle["counts"].decode()}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A ring with a hole, a box alone, a crowd, a tag, a quality."""
    monkeypatch.chdir(tmp_path)
    Path("img").mkdir()
    Image.new("RGB", (30, 20)).save("img/0.png")
    one = {"image_id": 1, "iscrowd": 0, "category_id": 1}
    content = {
        "images": [
            {"id": 1, "file_name": "0.png", "height": 20, "width": 30, "image_labels": [1, 2]}
        ],
        "annotations": [
            {**one, "id": 1, "bbox": [3, 2, 10, 10], "segmentation": ring()},
            {**one, "id": 2, "bbox": [15, 5, 6, 7], "segmentation_quality": 0.5},
            {**one, "id": 3, "bbox": [1, 1, 9, 9], "iscrowd": 1},
        ],
        "categories": [{"id": 1, "name": "ring"}, {"id": 2, "name": "moon"}],
    }
    Path("ann.json").write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_written_and_checked(data, capsys, name):
    words = ["export", "ann.json", "img", "--format", name, "--output", "out", "--copy-images"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("Wrote out: 1 images, 3 objects, as ")
    assert (Path("out") / FORMATS[name]).is_file()
    images = {"labelme": "", "voc": "JPEGImages", "yolo": "images/train"}.get(name, "images")
    assert (Path("out") / images / "0.png").read_bytes() == Path("img/0.png").read_bytes()
    source = "out/tasks.json" if name == "label-studio" else "out"
    assert main(["check", source, str(Path("out") / images), "--html", "check.html"]) == 0
    checked = capsys.readouterr().out
    assert "No problems." in checked
    assert "  ring" in checked
    assert Path("check.html").read_text().count("base64,") == 1
    if name in ("labelme", "voc", "yolo"):  # which say where their images are
        assert main(["check", "out"]) == 0
        assert f"--coco-train out {Path('out') / images} " in capsys.readouterr().out


@pytest.fixture
def labels(data):
    """Of the label maps that the data has too."""
    Path("maps").mkdir()
    labels = np.zeros((20, 30), np.uint8)
    labels[2:12, 3:13], labels[15:] = 1, 2
    Image.fromarray(labels).save("maps/any name.png")
    data["images"][0] |= dict.fromkeys(LABEL_MAP_KEYS, "maps/any name.png")
    Path("ann.json").write_text(json.dumps(data))
    return labels


@pytest.mark.parametrize("copied", [True, False])
def test_label_maps_are_found_from_the_new_folder(labels, capsys, copied):
    words = ["export", "ann.json", "img", "--format", "coco", "--output", "deep/out"]
    assert main(words + ["--copy-images"] * copied) == 0
    if copied:
        Path("maps").rename("elsewhere")
        Path("deep").rename("moved")
    out = Path("moved/out" if copied else "deep/out")
    assert main(["check", str(out), "img"]) == 0
    assert "No problems." in capsys.readouterr().out
    (record,) = load_coco(out / "annotations.json", "img").records
    for key in ("label_map_file_name", "sem_seg_file_name"):
        assert np.array_equal(np.array(Image.open(record[key])), labels)


def test_label_maps_become_those_of_voc(labels, capsys):
    words = ["export", "ann.json", "img", "--format", "voc", "--output", "out", "--copy-images"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith("Wrote out: 1 images, 3 objects, 1 label maps, as voc.")
    assert "label maps (stuff_file_name), left out" in said
    assert "label_map_file_name" not in said
    with Image.open("out/SegmentationClass/0.png") as written:
        assert np.array_equal(np.array(written), labels)
        assert written.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert Path("out/ImageSets/Segmentation/default.txt").read_text() == "0\n"
    assert main(["check", "out"]) == 0
    assert "No problems." in capsys.readouterr().out
    assert main(["export", "out", "--format", "coco", "--output", "back", "--copy-images"]) == 0
    (record,) = load_coco("back/annotations.json", "back/images").records
    assert np.array_equal(np.array(Image.open(record["label_map_file_name"])), labels)


def test_voc_draws_as_unknown_where_a_class_may_be(data):
    data["images"][0]["image_labels"] = [1]
    Path("ann.json").write_text(json.dumps(data))
    main(["export", "ann.json", "img", "--format", "voc", "--output", "out"])
    expected = np.zeros((20, 30), np.uint8)
    expected[1:10, 1:10] = 255  # the crowd
    expected[5:12, 15:21] = 255  # the box alone
    expected[mask_api.decode(ring()) > 0] = 1
    assert np.array_equal(np.array(Image.open("out/SegmentationClass/0.png")), expected)


def test_voc_refuses_label_maps_of_too_many_classes(labels, data):
    data["categories"] += [{"id": i, "name": f"class {i}"} for i in range(3, 256)]
    Path("ann.json").write_text(json.dumps(data))
    Image.fromarray(labels.astype(np.uint16)).save("maps/any name.png")
    words = ["export", "ann.json", "img", "--format", "voc", "--output", "out"]
    with pytest.raises(SystemExit, match=r"label maps of 255 classes, and voc holds at most 254"):
        main(words)
    assert not Path("out").exists()
    for key in LABEL_MAP_KEYS:
        del data["images"][0][key]
    Path("ann.json").write_text(json.dumps(data))
    assert main(words) == 0
    lost = json.loads(Path("out/maskx_export.json").read_text())["lost"]
    assert lost["maps of more than 254 classes (SegmentationClass), left out"] == 1


@pytest.mark.parametrize("name", ["coco", "voc"])
def test_label_maps_that_cannot_be_used_are_named_before_anything_is_written(labels, capsys, name):
    words = ["export", "ann.json", "img", "--format", name, "--output", "out", "--copy-images"]
    file = Path("maps/any name.png")
    for content, problem in ((None, "does not exist"), (b"no PNG", "cannot be used: .*as PNG")):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(
            SystemExit, match=rf"label map maps.any name\.png {problem}.*--skip-bad"
        ):
            main(words)
        assert not Path("out").exists()
        assert main([*words, "--skip-bad"]) == 1
        text = capsys.readouterr()
        assert "Wrote out: 1 images, 3 objects" in text.out
        assert f"left out: {file}: " in text.err
        images = {"voc": "JPEGImages"}.get(name, "images")
        assert main(["check", "out", str(Path("out", images))]) == 0
        shutil.rmtree("out")
        capsys.readouterr()
    assert main(["export", "ann.json", "img", "--format", "yolo", "--output", "out"]) == 0


def test_label_maps_that_are_left_out_are_not_named(labels, capsys):
    assert main(["export", "ann.json", "--format", "cvat", "--output", "out"]) == 0
    assert "cvat: 1 label maps (label_map_file_name), left out." in capsys.readouterr().out
    assert main(["check", "out", "img"]) == 0
    assert "No problems." in capsys.readouterr().out


def test_what_yolo_cannot_hold_is_said(data, capsys):
    main(["export", "ann.json", "img", "--format", "yolo", "--output", "out"])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "The images belong into out/images/train; --copy-images copies them there.",
        "Not held by yolo: 1 boxes without a mask, left out: their images seem to lack them.",
        "Not held by yolo: 1 crowd regions, left out.",
        "Not held by yolo: 1 masks of several parts or with holes, joined to one outline.",
        "Not held by yolo: 1 tags, left out.",
        "Not held by yolo: 1 values of segmentation_quality, left out.",
    ]
    (line,) = Path("out/labels/train/0.txt").read_text().splitlines()
    numbers = np.array(line.split()[1:], float).reshape(-1, 2) * (30, 20)
    mask = mask_api.decode(mask_api.frPyObjects([numbers.ravel().tolist()], 20, 30))[..., 0]
    assert (mask == mask_api.decode(ring())).all()


def test_an_export_is_replaced_only_if_asked_for(data, capsys):
    words = ["export", "ann.json", "img", "--format", "yolo", "--output", "out"]
    main(words)
    with pytest.raises(SystemExit, match=r"out exists\. Name another folder, or add --overwrite"):
        main(words)
    other = ["export", "ann.json", "img", "--format", "labelme", "--output", "out"]
    Path("out/mine.txt").write_text("precious")
    assert main([*other, "--overwrite"]) == 0
    assert not Path("out/data.yaml").exists()
    assert not Path("out/labels/train/0.txt").exists()
    assert Path("out/0.json").is_file()
    assert Path("out/mine.txt").read_text() == "precious"


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_something_else_is_left_alone(data, overwrite):
    Path("out").mkdir()
    Path("out/data.yaml").write_text("precious")
    words = ["export", "ann.json", "--format", "yolo", "--output", "out"]
    with pytest.raises(SystemExit, match="error: out "):
        main(words + ["--overwrite"] * overwrite)
    assert Path("out/data.yaml").read_text() == "precious"


@pytest.fixture
def second_is_missing(data):
    data["images"].append({"id": 2, "file_name": "1.png", "height": 20, "width": 30})
    data["annotations"].append({**data["annotations"][1], "id": 4, "image_id": 2})
    Path("ann.json").write_text(json.dumps(data))


@pytest.mark.parametrize("name", ["labelme", "coco"])
def test_missing_images_are_named_before_anything_is_written(second_is_missing, capsys, name):
    words = ["export", "ann.json", "img", "--format", name, "--output", "out", "--copy-images"]
    with pytest.raises(SystemExit, match=r"1 of 2 files .* img.1\.png, .*--skip-bad"):
        main(words)
    assert not Path("out").exists()
    assert main([*words, "--skip-bad"]) == 1
    text = capsys.readouterr()
    assert "Wrote out: 1 images, 3 objects" in text.out
    assert f"left out: {Path('img/1.png')}: does not exist" in text.err
    assert main([*words[:-1], "--overwrite"]) == 0  # whose images stay where they are
    assert "2 images, 4 objects" in capsys.readouterr().out


def test_images_are_copied_from_where_tools_mean_them(data):
    data["images"][0]["file_name"] = "C:\\0.PNG"
    Path("ann.json").write_text(json.dumps(data))
    words = ["export", "ann.json", "img", "--format", "coco", "--output", "out", "--copy-images"]
    assert main(words) == 0
    assert json.loads(Path("out/annotations.json").read_text())["images"][0]["file_name"] == "0.png"
    assert Path("out/images/0.png").is_file()


@pytest.mark.parametrize("over", [True, False])
def test_an_interrupted_export_is_written_over(data, over):
    def interrupted(source, scratch):
        raise KeyboardInterrupt

    words = ["export", "ann.json", "img", "--output", "out", "--copy-images", "--format"]
    if over:
        main([*words, "labelme"])
    dataset = read_dataset("ann.json", "img")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.copyfile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(dataset, "out", "yolo", copy_images=True, overwrite=over)
    Path("out/mine.txt").write_text("precious")
    assert Path("out/labels/train/0.txt").is_file()
    with pytest.raises(SystemExit, match=r"out exists\. Name another folder, or add --overwrite"):
        main([*words, "labelme"])
    assert main([*words, "labelme", "--overwrite"]) == 0
    files = {path.name for path in Path("out").rglob("*") if path.is_file()}
    assert files == {"0.json", "0.png", "labels.txt", "mine.txt", "maskx_export.json"}


def test_bad_annotations_end_it_or_are_left_out(data, capsys):
    data["annotations"][1]["bbox"] = [1, 2]
    Path("ann.json").write_text(json.dumps(data))
    words = ["export", "ann.json", "--format", "coco", "--output", "out"]
    with pytest.raises(SystemExit, match=r"error: ann\.json.*box_malformed: 1"):
        main(words)
    assert not Path("out").exists()
    assert main([*words, "--skip-bad"]) == 0
    assert "2 objects" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["categories"][0].update(name="a\nb"), r"category 'a\\nb' has a name that"),
        (lambda c: c["images"][0].update(file_name="../0.png"), "would lie outside the folder"),
        (
            lambda c: c["images"].append({**c["images"][0], "id": 2, "file_name": "0.jpg"}),
            "Two images would share the file",
        ),
    ],
)
def test_names_that_no_file_can_have(data, change, words):
    change(data)
    Path("ann.json").write_text(json.dumps(data))
    with pytest.raises(SystemExit, match=words):
        main(["export", "ann.json", "img", "--format", "yolo", "--output", "out"])
    assert not Path("out").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_a_mask_may_be_of_any_form(data, name):
    """Run lengths that are not compressed, and the ways to say that there is none."""
    mask = np.zeros((20, 30), bool)
    mask[4:9, 2:6], mask[15:18, 20:25] = True, True
    runs = np.flatnonzero(np.diff(mask.T.ravel(), prepend=~mask[0, 0], append=~mask[-1, -1]))
    counts = np.diff(runs).tolist()
    one = data["annotations"][0]
    empty = {"bbox": [15, 5, 6, 7], "category_id": 2}
    data["annotations"] = [
        {**one, "bbox": [2, 4, 23, 14], "segmentation": {"size": [20, 30], "counts": counts}},
        {**one, **empty, "id": 2, "segmentation": [[]]},
        {**one, **empty, "id": 3, "segmentation": None},
    ]
    Path("ann.json").write_text(json.dumps(data))
    assert main(["export", "ann.json", "img", "--format", name, "--output", "out"]) == 0
    if name == "yolo":  # which says nothing of the sizes of images
        shutil.copytree("img", "out/images/train")
    first, *others = read_dataset("out", "out/images/train" if name == "yolo" else "img").content[
        "annotations"
    ]
    assert np.array_equal(decode_segmentation(first["segmentation"], 20, 30), mask)
    assert len(others) == (0 if name == "yolo" else 2)
    assert not any(other.get("segmentation") for other in others)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["images"][0].pop("file_name"), "lacks the key 'file_name'"),
        (lambda c: c["images"][0].update(label_map_file_name=7), "label_map_file_name 7. Allowed"),
        (lambda c: c["images"][0].update(file_name=""), "file_name ''. Allowed: a path"),
        (lambda c: c["annotations"][1].update(score=float("nan")), "Annotation 2 .* the score nan"),
        (lambda c: c["images"][0].update(image_labels=[9]), r"image_labels \[9\]"),
        (lambda c: c.update(images=[], annotations=[]), "has no images"),
        (lambda c: c.update(categories=[], annotations=[]), "has no categories"),
    ],
)
@pytest.mark.parametrize("name", ["coco", "voc"])
def test_what_no_format_can_be_made_of_is_named(data, change, words, name):
    change(data)
    Path("ann.json").write_text(json.dumps(data))
    with pytest.raises(SystemExit, match=words):
        main(["export", "ann.json", "img", "--format", name, "--output", "out"])
    assert not Path("out").exists()


def test_what_is_left_out_of_a_coco_file_is_said(data, caplog):
    data["annotations"][1]["category_id"] = 77
    Path("ann.json").write_text(json.dumps(data))
    words = ["export", "ann.json", "--format", "coco", "--output", "out", "--skip-bad"]
    assert main(words) == 0
    assert any("category_id 77" in message for message in caplog.messages)


def test_training_reads_every_format(data, capsys):
    """As far as to the settings, which are wrong on purpose; the data is converted before."""
    data["annotations"].pop()
    Path("ann.json").write_text(json.dumps(data))
    main(["export", "ann.json", "img", "--format", "labelme", "--output", "labelme"])
    words = ["train", "--coco-train", "labelme", "img", "--coco-val", "ann.json", "img"]
    words += ["--iterations", "0", "--output", "run", "--masks-for", "all"]
    with pytest.raises(SystemExit, match="iterations"):
        main(words)
    made = json.loads(Path("run/coco/coco_train.json").read_text())
    assert [a["bbox"] for a in made["annotations"]] == [[3, 2, 10, 10], [15, 5, 6, 7]]
    assert not Path("run/coco/coco_val.json").exists()
