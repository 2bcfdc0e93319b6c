import json

import cv2
import pytest

import maskx.systems  # noqa: F401 - registers them
from maskx.cli.main import main
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.engine import quickstart
from maskx.engine.options import QuickstartOptions
from maskx.engine.predictor import open_run
from maskx.engine.runs import read_run
from maskx.engine.system import find_system
from maskx.systems.concept_mask import pipeline
from maskx.systems.concept_mask.evaluation import LEVELS


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "CONCEPT_SCENES", 30)
    monkeypatch.setattr(pipeline, "TAG_SCENES", 400)
    monkeypatch.setattr(pipeline, "VAL_SCENES", 6)
    monkeypatch.setattr(quickstart, "SCENE_SIZE", 64)
    monkeypatch.setattr(pipeline, "SCENE_SIZE", 64)
    return {"output": tmp_path / "out", "iterations": 2, "batch_size": 4, "image_size": 64}


def run(options, report=print, **changes):
    return find_system("concept_mask").pipeline(QuickstartOptions(**options | changes), report)


def test_generated_data_to_metrics_and_picture_and_again_when_resumed(tiny):
    lines = []
    first = run(tiny, lines.append)
    written = json.loads((tiny["output"] / "metrics.json").read_text())
    assert written["system"] == "concept_mask"
    for key in ("levels", "original"):
        assert list(written[key]) == list(LEVELS)
    for found in written["levels"].values():
        if found is not None:
            assert {"pointing", "soft_iou", "iou", "precision", "recall"} < set(found)
            assert all(0 <= value <= 1 for name, value in found.items() if name != "num_concepts")
    assert written["levels"]["image"]["num_concepts"] > 10
    steps = {"embedding", "refinement", "segmentation", "fitting", "evaluation", "picture"}
    assert set(written["step_seconds"]) == steps
    assert cv2.imread(str(tiny["output"] / "predictions.png")).shape[1] == 5 * 256
    assert "27 training images with tags of 66 concepts" in "\n".join(lines)
    run_file = read_run(tiny["output"])
    assert (run_file.system, len(run_file.class_names)) == ("concept_mask", 66)
    assert run_file.folder == tiny["output"] / "segmentation"
    photo = tiny["output"] / "scenes" / "val" / "images" / "000000.png"
    words = ["predict", str(tiny["output"]), str(photo), "--output", str(tiny["output"] / "found")]
    assert main([*words, "--device", "cpu", "--concepts", "grass", "crescent"]) == 0
    results = json.loads((tiny["output"] / "found" / "predictions.json").read_text())
    names = {category["id"]: category["name"] for category in results["categories"]}
    written_names = [names[each["category_id"]] for each in results["annotations"]]
    found = open_run(tiny["output"], "cpu")(photo, concepts=["grass", "crescent"])
    assert found.names == ["grass", "crescent"]  # of the table, and unseen
    # All that have a pixel, however sure it is of them.
    has_mask = found.masks.any((1, 2)).tolist()
    assert written_names == [n for n, has in zip(found.names, has_mask, strict=True) if has]
    assert found.masks.shape == (2, 64, 64)
    # Each stage says of itself what it is, and is opened alone.
    assert run_file.settings["network"]["attention_sizes"] == [32, 64]
    for stage, folder in enumerate(("embedding", "refinement", "segmentation"), start=1):
        about = read_run(tiny["output"] / folder)
        assert about.settings["training"]["iterations"] == 2
        assert ("start" in about.started_from) == (stage > 1)
        opened = open_run(tiny["output"] / folder, "cpu")
        assert opened.model.stage == stage
        assert opened(photo, concepts=["grass", "crescent"]).masks.shape == (2, 64, 64)
    again = run(tiny, resume=True)
    for key in ("levels", "concepts", "fitted", "existence"):
        assert str(first[key]) == str(again[key])


def test_own_files_have_tags_and_boxes_of_all_and_masks_of_some(tmp_path, tiny):
    json_file = generate_scenes(
        tmp_path / "data", count=12, size=64, num_categories=8, seed=1, style="large"
    )
    data = (str(json_file), str(tmp_path / "data"))
    names = [category["name"] for category in json.loads(json_file.read_text())["categories"]]
    (tmp_path / "masked.txt").write_text("\n".join(names[:4]))
    files = {"coco_train": data, "coco_val": data, "masks_for": str(tmp_path / "masked.txt")}
    found = run(tiny, **files)
    assert set(found["split"]["masked"]) <= set(names[:4])
    assert found["split"]["boxed"] == found["split"]["vocabulary"]
    assert found["levels"]["mask"] is not None
    assert found["levels"]["image"] is None
    assert found["fitted"]["theta_image"] is None
    with pytest.raises(ValueError, match="names 'person', which is not among the 8 categories"):
        run(tiny, **files | {"masks_for": None})


def test_own_files_at_three_levels(tmp_path, tiny):
    """Masks of two, boxes of two more, tags of the others and of words that no box has."""
    folder = tmp_path / "data"
    json_file = generate_scenes(folder, count=12, size=64, num_categories=8, seed=1, style="large")
    content = json.loads(json_file.read_text())
    names = [category["name"] for category in content["categories"]]
    (tmp_path / "split.json").write_text(json.dumps({"boxed": names[:4], "masked": names[:2]}))
    lines = []
    for number, image in enumerate(content["images"]):
        shown = {a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]}
        tags = [c["name"] for c in content["categories"] if c["id"] in shown]
        tags.append(("sunny", "cloudy")[number % 2])
        lines.append(json.dumps({"file_name": image["file_name"], "tags": tags}))
    (tmp_path / "tags.jsonl").write_text("\n".join(lines))
    data = (str(json_file), str(folder))
    own = {"coco_train": data, "coco_val": data, "concept_split": str(tmp_path / "split.json")}
    for tags in (None, (str(tmp_path / "tags.jsonl"), str(folder))):
        found = run(tiny, **own, tags=tags)
        split = found["split"]
        assert (split["masked"], split["boxed"]) == (names[:2], names[:4])
        assert ("sunny" in split["vocabulary"]) == (tags is not None)
        assert found["num_images"]["tagged"] >= 11
        for level, count in (("mask", 2), ("box", 2)):
            assert found["levels"][level]["num_concepts"] == count
        assert found["levels"]["image"]["num_concepts"] > 0
        assert found["fitted"]["theta_image"] > 0
    origins = read_run(tiny["output"]).started_from
    assert {"annotations", "concept_split", "tags", "word table"} < set(origins)


def test_real_photographs(shared_data, tiny, tmp_path):
    """The whole way on COCO images: tags and boxes of all categories, masks of those of VOC."""
    coco = shared_data / "coco_mini"
    files = {}
    for part, count in (("train", 40), ("val", 10)):
        name = f"instances_{part}2017.json"
        content = json.loads((coco / "annotations" / name).read_text())
        content["images"] = content["images"][:count]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        (tmp_path / name).write_text(json.dumps(content))
        files[f"coco_{part}"] = (str(tmp_path / name), str(coco / f"{part}2017"))
    found = run(tiny, **files)
    split = found["split"]
    assert split["boxed"] == split["vocabulary"]
    assert len(split["vocabulary"]) + len(split["unseen"]) == 80
    with_masks = resolve_split("coco_voc", split["vocabulary"] + split["unseen"]).with_masks
    assert set(split["masked"]) == set(with_masks) & set(split["vocabulary"])
    for level in ("mask", "box"):
        assert found["levels"][level]["num_concepts"] > 0
    assert found["levels"]["image"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu"}, "Device must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ({"masks_for": "all"}, "masks_for has no meaning for generated scenes with concepts"),
        ({"tags": ("a", "b")}, "tags has no meaning for generated scenes with concepts"),
        (
            {"tags": ("a", "b"), "coco_train": ("c", "d")},
            "tags needs a concept_split, which says what has boxes",
        ),
        (
            {"concept_split": "a", "masks_for": "b", "coco_train": ("c", "d")},
            "masks_for and concept_split both say what has masks",
        ),
        ({"threshold": "zero"}, "threshold has no meaning for the system concept_mask"),
        ({"backbone": "resnet5"}, "There is no backbone 'resnet5'"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_named(tiny, options, words):
    with pytest.raises(ValueError, match=words):
        run(tiny, **options)
