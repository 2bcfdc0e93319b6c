import json
from pathlib import Path

import cv2
import numpy as np
import pytest

import maskx.systems
from maskx.data.coco import load_coco
from maskx.data.label_maps import label_map_of_instances, write_label_map
from maskx.data.scenes.generator import generate_scenes, scene_categories
from maskx.engine import quickstart
from maskx.engine.options import QuickstartOptions
from maskx.engine.system import find_system


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "SPARSE_SCENES", 24)
    monkeypatch.setattr(quickstart, "VAL_SCENES", 6)
    monkeypatch.setattr(quickstart, "SCENE_SIZE", 64)
    return {"output": tmp_path / "out", "iterations": 2, "batch_size": 4, "image_size": 64}


def run(options, report=print, **changes):
    return find_system("transfernet").pipeline(QuickstartOptions(**options | changes), report)


def test_generated_data_to_metrics_and_picture(tiny):
    lines = []
    run(tiny, lines.append)
    written = json.loads((tiny["output"] / "metrics.json").read_text())
    assert written["system"] == "transfernet"
    for group in ("target", "source", "all"):
        assert set(written["mIoU"][group]) == {"transfernet", "transfernet_gt", "baseline"}
        assert set(written["mIoU_gt_labels"][group]) == {"transfernet", "baseline"}
        truth = written["mIoU_gt_labels"][group]["transfernet"]
        assert written["mIoU"][group]["transfernet_gt"] == truth
    names = [category.name for category in scene_categories(12, "sparse")]
    for of_method in written["IoU"].values():
        assert list(of_method) == names
    assert set(written["split"]["A"]) == set(names[::2])
    assert set(written["split"]["B"]) == set(names[1::2])
    assert 0 < written["attention_entropy"] <= 1
    assert set(written["tag_mAP"]) == {"target", "source", "all"}
    assert sum(written["num_images"].values()) == 24
    steps = {"classifier", "attention", "transfernet", "baseline_source", "baseline", "evaluation"}
    assert set(written["step_seconds"]) == steps
    picture = cv2.imread(str(tiny["output"] / "predictions.png"))
    assert picture.shape[1] == 5 * 256
    text = "\n".join(lines)
    assert "6 source categories with masks, 6 target categories with tags" in text
    assert "| TransferNet, true labels |" in text
    assert "| BaselineNet, predicted labels |" in text
    predictor = maskx.open_run(tiny["output"], device="cpu")
    found = predictor(next((tiny["output"] / "scenes" / "val").rglob("*.png")))
    assert found.label_map.shape == (64, 64)
    assert set(found.names) <= set(names)


def test_a_resumed_run_ends_with_the_same_numbers(tiny):
    first = run(tiny, compare=True)
    assert set(first["mIoU"]["target"]) == {
        "transfernet",
        "transfernet_gt",
        "baseline",
        "decoupled",
    }
    again = run(tiny, compare=True, resume=True)
    for key in ("mIoU", "IoU", "tag_mAP", "attention_entropy"):
        assert str(first[key]) == str(again[key])


def make_coco(folder, **changes):
    json_file = generate_scenes(folder, count=16, size=64, num_categories=8, seed=1, style="sparse")
    content = json.loads(json_file.read_text()) | changes
    json_file.write_text(json.dumps(content))
    return str(json_file), str(folder)


def test_own_data_with_masks_for_named_categories(tmp_path, tiny, caplog):
    data = make_coco(tmp_path / "data")
    content = json.loads((tmp_path / "data" / "annotations.json").read_text())
    # An image without a label, and a file that says which categories have masks.
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3]
    content["images"][3].pop("image_labels", None)
    (tmp_path / "data" / "annotations.json").write_text(json.dumps(content))
    names = [category["name"] for category in content["categories"]]
    (tmp_path / "source.txt").write_text("\n".join(names[::2]))
    files = {"coco_train": data, "coco_val": data}
    found = run(tiny, **files, masks_for=str(tmp_path / "source.txt"))
    assert found["split"]["A"] == tuple(names[::2])
    assert found["num_images"]["unlabelled"] == 1
    assert "1 of 16 images have no label" in caplog.text
    with pytest.raises(ValueError, match="'all' leaves no target category: all 8 have masks"):
        run(tiny, **files, masks_for="all")
    (tmp_path / "source.txt").write_text("\n".join(names[1::2]))
    with pytest.raises(ValueError, match="has other categories with masks"):
        run(tiny, **files, masks_for=str(tmp_path / "source.txt"), resume=True)


def part_of(folder, name, keep, *, tags=False, label_maps=False):
    """Write a file of the categories ``keep`` alone, of 24 scenes."""
    json_file = generate_scenes(folder, count=24, size=64, num_categories=4, seed=3, style="sparse")
    records = load_coco(json_file, folder).records
    content = json.loads(json_file.read_text())
    ids = {category["id"] for category in content["categories"] if category["name"] in keep}
    content["categories"] = [c for c in content["categories"] if c["id"] in ids]
    own = [a for a in content["annotations"] if a["category_id"] in ids]
    others = {a["image_id"] for a in content["annotations"]} - {a["image_id"] for a in own}
    mixed = {a["image_id"] for a in content["annotations"] if a["category_id"] not in ids}
    images = [i for i in content["images"] if i["id"] not in others | mixed]
    for image in images:
        if tags:
            found = {a["category_id"] for a in own if a["image_id"] == image["id"]}
            image["image_labels"] = sorted(found)
        if label_maps:
            record = next(r for r in records if r["image_id"] == image["id"])
            label_map = label_map_of_instances(record, 4)
            new = np.searchsorted(sorted(ids), np.arange(5))
            label_map = np.where(label_map > 0, new[label_map] + 1, 0)
            image["label_map_file_name"] = f"map_{image['id']}.png"
            write_label_map(folder / image["label_map_file_name"], label_map, num_classes=len(ids))
    kept = {image["id"] for image in images}
    content["images"] = images
    content["annotations"] = [
        a for a in own if a["image_id"] in kept and not tags and not label_maps
    ]
    (folder / name).write_text(json.dumps(content))
    return str(folder / name), str(folder)


def test_source_and_target_of_two_files(tmp_path, tiny):
    """The labels of images that have none, but a label map, are those of the label map."""
    names = [category.name for category in scene_categories(4, "sparse")]
    files = {
        "coco_train": part_of(tmp_path / "scenes", "source.json", names[:2], label_maps=True),
        "target_train": part_of(tmp_path / "scenes", "target.json", names[2:], tags=True),
        "coco_val": part_of(tmp_path / "scenes", "val.json", names[2:], label_maps=True),
    }
    lines = []
    found = run(tiny, lines.append, **files, iterations=1)
    assert (found["split"]["A"], found["split"]["B"]) == (tuple(names[:2]), tuple(names[2:]))
    counts = found["num_images"]
    assert f"{counts['source']} source images, {counts['source']} with masks" in "\n".join(lines)
    assert counts["source"] > 2
    assert counts["target"] > 2
    assert set(found["tag_mAP"]) == {"target", "all"}
    values = [found[kind]["target"]["baseline"] for kind in ("mIoU", "mIoU_gt_labels")]
    assert 0 < values[1] <= 100
    target = Path(files["target_train"][0])
    changed = json.loads(target.read_text())
    ids = [image["id"] for image in changed["images"]]
    for image, new in zip(changed["images"], ids[1:] + ids[:1], strict=True):
        image["id"] = new  # as many images, each with the tags of another
    target.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"annotations 2 '.*target\.json' is not what the run"):
        run(tiny, **files, iterations=1, resume=True)
    with pytest.raises(ValueError, match=r"target_train is the file with tags beside coco_train"):
        run(tiny, **files, masks_for="all")
    overlapping = files | {"target_train": files["coco_train"]}
    with pytest.raises(ValueError, match=f"2 categories are source and target: {names[0]}"):
        run(tiny, **overlapping)


def test_source_and_target_that_overlap_are_named(tmp_path, tiny):
    data = make_coco(tmp_path / "data")
    names = [category.name for category in scene_categories(8, "sparse")]
    (tmp_path / "both.json").write_text(
        json.dumps({"with_masks": names[:5], "without_masks": names[4:]})
    )
    with pytest.raises(ValueError, match=f"'{names[4]}' stand on both sides"):
        run(tiny, coco_train=data, coco_val=data, masks_for=str(tmp_path / "both.json"))


def test_validation_images_without_masks_are_refused(tmp_path, tiny):
    train, val = make_coco(tmp_path / "train"), make_coco(tmp_path / "val")
    content = json.loads((tmp_path / "val" / "annotations.json").read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "val" / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"None of the 16 validation images of '.*val.*' has a m"):
        run(tiny, coco_train=train, coco_val=val, masks_for="scenes_half")
    assert not (tiny["output"] / "classifier").exists()


def test_real_photographs(shared_data, tiny, tmp_path):
    """The whole way on COCO images: 60 categories with masks, those of VOC with tags."""
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
    found = run(tiny, **files, masks_for="coco_nonvoc")
    assert len(found["split"]["A"]) == 60
    assert sum(found["num_images"].values()) == 40
    assert all(0 <= value <= 100 for value in found["mIoU"]["all"].values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu"}, "Device must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ({"backbone": "resnet5"}, r"no backbone 'resnet5'"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"batch_size": 3}, r"batch size is 3\. Allowed: even"),
        ({"masks_for": "coco_voc"}, "names 'person', which is not among the 12"),
        ({"threshold": "zero"}, "threshold has no meaning for the system transfernet"),
    ],
)
def test_options_out_of_range_are_named(tiny, options, words):
    with pytest.raises(ValueError, match=words):
        run(tiny, **options)
