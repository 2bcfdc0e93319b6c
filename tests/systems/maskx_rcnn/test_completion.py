"""A trained Mask^X R-CNN completes annotation files; see also tests/engine/test_completion.py."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import maskx
from maskx.data.images import read_rgb
from maskx.data.masks import decode_segmentation
from maskx.data.scenes.generator import generate_scenes
from maskx.engine.completion import CompletionOptions, complete
from maskx.engine.options import QuickstartOptions
from maskx.engine.runs import Run, read_run, write_run
from maskx.systems.maskx_rcnn.pipeline import quickstart_maskx


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Annotation files, in each folder that of its images; B has no masks in ``train``."""
    root = tmp_path_factory.mktemp("files")
    paths = {}
    for seed, name in enumerate(("train", "other")):
        path = generate_scenes(root / name, count=16, size=64, num_categories=4, seed=seed)
        content = json.loads(path.read_text())
        for image in content["images"]:
            image["file_name"] = image["file_name"].replace("images/", "images/" + name)
            del image["stuff_file_name"]
        for file in (root / name / "images").iterdir():
            file.rename(file.with_name(name + file.name))
        if name == "train":
            for annotation in content["annotations"]:
                if annotation["category_id"] in (3, 4):
                    del annotation["segmentation"]
        path.write_text(json.dumps(content))
        paths[name] = (str(path), str(path.parent))
    return paths


@pytest.fixture(scope="module")
def with_masks(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("split") / "with_masks.txt"
    names = [c["name"] for c in json.loads(Path(files["train"][0]).read_text())["categories"]]
    path.write_text("\n".join(names[:2]))
    return str(path)


@pytest.fixture(scope="module")
def run(files, with_masks, tmp_path_factory):
    """Run folder of a model that was hardly trained."""
    output = tmp_path_factory.mktemp("run") / "animals"
    quickstart_maskx(
        QuickstartOptions(
            output=output,
            iterations=2,
            batch_size=2,
            image_size=64,
            coco_train=files["train"],
            coco_val=files["other"],
            masks_for=with_masks,
            annotated_boxes=True,
            device="cpu",
        ),
        lambda line: None,
    )
    return output


@pytest.fixture
def options(files, run, tmp_path):
    return CompletionOptions(
        data=files["train"], output=tmp_path / "out.json", run=run, device="cpu"
    )


def annotations(path):
    return json.loads(Path(path).read_text())["annotations"]


def test_objects_get_the_masks_of_the_run_in_their_boxes(options, run):
    found = complete(options)
    todo = {a["id"]: a for a in annotations(options.data[0]) if "segmentation" not in a}
    made = {each.annotation_id: each for each in found.masks}
    assert made.keys() <= todo.keys()
    assert len(made) + found.reasons["the mask is empty"] == len(todo) > 10
    assert made
    predictor = maskx.open_run(run, device="cpu")
    assert read_run(run).settings["mask_branch"]["gt_boxes_only"]
    for each in list(made.values())[:3]:
        image = read_rgb(each.file_name)
        (mask,) = predictor.masks_of_boxes(image, [each.box], [each.class_name])
        x0, y0, x1, y1 = each.box
        inside = mask.numpy()[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
        got = decode_segmentation(each.found.segmentation, *image.shape[:2])
        assert got.sum() == inside.sum() == each.found.area
        assert 0 < each.quality == each.found.score <= 1
    sources = {a.get("segmentation_source") for a in annotations(options.output)}
    assert sources == {None, "maskx:animals"}


def test_masks_that_the_run_was_trained_on_say_nothing_of_its_quality(options, files, tmp_path):
    assert complete(options).known == []
    # Neither do those of another file with the same images.
    content = json.loads(Path(files["train"][0]).read_text())
    content["info"] = {"corrected": True}
    (tmp_path / "corrected.json").write_text(json.dumps(content))
    changed = replace(
        options, data=(str(tmp_path / "corrected.json"), files["train"][1]), overwrite=True
    )
    assert complete(changed).known == []
    found = complete(replace(options, calibrate=files["other"], overwrite=True))
    assert found.calibrated == ["maskx:animals"]
    ious = [each.iou for each in found.known]
    assert len(ious) >= 20
    assert found.masks[0].quality >= min(ious)
    assert found.masks[-1].quality <= max(ious)


def test_a_training_file_that_is_gone_is_said(options, run, files, tmp_path, caplog):
    content = read_run(run).as_json()
    content["started_from"]["annotations"] = {"sha256": "0" * 64, "path": "gone.json"}
    moved = tmp_path / "moved"
    moved.mkdir()
    write_run(moved, Run.from_json(content, "here"))
    weights = read_run(run).weights_file
    (moved / weights.name).write_bytes(weights.read_bytes())
    with caplog.at_level(logging.WARNING):
        found = complete(replace(options, run=moved))
    assert "trained on 'gone.json', which is gone" in caplog.text
    assert found.known


def test_run_and_teacher_agree_or_there_is_no_mask(options):
    alone = complete(options)
    both = replace(options, teacher="teachers:ellipses", overwrite=True)
    found = complete(both)
    assert {each.source for each in found.masks} <= {
        "maskx:animals+teachers:ellipses",
        "teachers:ellipses",  # where the run has none
    }
    segmentations = {each.annotation_id: each.found.segmentation for each in found.masks}
    for each in alone.masks:
        assert segmentations[each.annotation_id] == each.found.segmentation
    strict = complete(replace(both, agree=0.999))
    assert strict.masks == []
    assert strict.reasons["the sources agree by less than 0.999"] == len(alone.masks)
    assert len(complete(replace(both, agree=0.0)).masks) == len(alone.masks)


def test_categories_that_the_run_does_not_know_are_left_to_a_teacher(options, files, tmp_path):
    content = json.loads(Path(files["train"][0]).read_text())
    content["categories"][3]["name"] = "unicorn"
    (tmp_path / "unicorns.json").write_text(json.dumps(content))
    options = replace(options, data=(str(tmp_path / "unicorns.json"), files["train"][1]))
    found = complete(options)
    assert found.reasons["the run does not know 'unicorn'"] > 3
    assert found.failures == {}
    found = complete(replace(options, teacher="teachers:ellipses", overwrite=True))
    sources = {each.source for each in found.masks if each.class_name == "unicorn"}
    assert sources == {"teachers:ellipses"}


def test_what_a_predictor_of_boxes_refuses(run):
    predictor = maskx.open_run(run, device="cpu")
    image = np.zeros((64, 64, 3), np.uint8)
    assert predictor.masks_of_boxes(image, [], []).shape == (0, 64, 64)
    with pytest.raises(ValueError, match=r"The model does not know 'unicorn'\. It knows 'red"):
        predictor.masks_of_boxes(image, [[1, 1, 9, 9]], ["unicorn"])


@pytest.mark.parametrize("teacher", ["ellipses", "larger_than_the_box"])
def test_of_run_and_teacher_the_better_one_makes_the_masks(options, files, teacher):
    """By the masks that are known, be that the run or the teacher."""
    calibrated = replace(options, calibrate=files["other"], overwrite=True)
    run = complete(calibrated)
    alone = complete(replace(calibrated, run=None, teacher=f"teachers:{teacher}"))
    both = complete(replace(calibrated, teacher=f"teachers:{teacher}"))

    def ious(completion):
        return {each.annotation_id: each.iou for each in completion.known}

    common = ious(run).keys() & ious(alone).keys()
    assert len(common) >= 20
    sums = [sum(ious(each)[key] for key in common) for each in (run, alone)]
    better = run if sums[0] >= sums[1] else alone
    expected = {each.annotation_id: each.found.segmentation for each in better.masks}
    of_both = {e.annotation_id: e.found.segmentation for e in both.masks if "+" in e.source}
    assert of_both
    assert all(expected[key] == segmentation for key, segmentation in of_both.items())
    name = "maskx:animals" if better is run else f"teachers:{teacher}"
    assert all(each.source.startswith(name) for each in both.masks if "+" in each.source)
