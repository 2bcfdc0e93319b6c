import copy
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskx.data.coco import load_coco
from maskx.data.prepare.coco_subsets import (
    COCO60_IMAGES,
    Coco60Summary,
    select_coco60,
    write_coco60,
)
from maskx.data.vocabularies import COCO_THING_CLASSES, VOC_CLASSES_IN_COCO

SCRIPT = Path(__file__).parents[3] / "datasets" / "prepare.py"
OTHERS = [name for name in COCO_THING_CLASSES if name not in VOC_CLASSES_IN_COCO]


def make_coco(seed=0, num_images=40):
    """Images with 0 to 3 objects; category ids have gaps, as those of COCO."""
    random = np.random.default_rng(seed)
    names = random.permutation(COCO_THING_CLASSES).tolist()
    dataset = {
        "info": {"year": 2014},
        "images": [
            {"id": 3 * i + 1, "file_name": f"{i}.jpg", "height": 20, "width": 30}
            for i in range(num_images)
        ],
        "categories": [{"id": 2 * i + 5, "name": name} for i, name in enumerate(names)],
        "annotations": [],
    }
    for image in dataset["images"]:
        for _ in range(random.integers(0, 4)):
            dataset["annotations"].append(
                {
                    "id": len(dataset["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": dataset["categories"][random.integers(80)]["id"],
                    "bbox": [1, 2, 3, 4],
                    "segmentation": [[1, 2, 4, 2, 4, 6, 1, 6]],
                    "iscrowd": 0,
                }
            )
    return dataset


def reference(dataset):
    """Ids of images with only the other 60 classes, with VOC's, with nothing."""
    name_of = {category["id"]: category["name"] for category in dataset["categories"]}
    kept, with_voc, empty = [], [], []
    for image in dataset["images"]:
        found = []
        for annotation in dataset["annotations"]:
            if annotation["image_id"] == image["id"]:
                found.append(name_of[annotation["category_id"]])
        if not found:
            empty.append(image["id"])
        elif any(name in VOC_CLASSES_IN_COCO for name in found):
            with_voc.append(image["id"])
        else:
            kept.append(image["id"])
    return kept, with_voc, empty


@pytest.fixture
def write(tmp_path):
    def write(dataset):
        (tmp_path / "in").mkdir(exist_ok=True)
        path = tmp_path / "in" / "instances.json"
        path.write_text(json.dumps(dataset))
        return path, tmp_path / "out" / "coco60.json"

    return write


@given(seed=st.integers(0, 10_000))
def test_images_with_the_other_classes_only_are_kept(seed):
    dataset = make_coco(seed)
    before = copy.deepcopy(dataset)
    chosen = select_coco60(dataset)
    kept, _, _ = reference(dataset)
    assert [image["id"] for image in chosen["images"]] == kept
    assert chosen["annotations"] == [a for a in dataset["annotations"] if a["image_id"] in kept]
    assert chosen["categories"] == [c for c in dataset["categories"] if c["name"] in OTHERS]
    assert len(chosen["categories"]) == 60
    assert chosen["info"] == {"year": 2014}
    assert dataset == before


def test_the_file_is_what_was_chosen_and_everything_is_counted(write):
    dataset = make_coco(3)
    path, output = write(dataset)
    summary = write_coco60(path, output)
    assert json.loads(output.read_text()) == select_coco60(dataset)
    kept, with_voc, empty = map(len, reference(dataset))
    assert (summary.num_images, summary.num_with_voc, summary.num_without_annotation) == (
        kept,
        with_voc,
        empty,
    )
    assert min(kept, with_voc, empty) > 0
    assert summary.num_read == 40
    data = load_coco(output, output.parent, check_images=False)
    assert sorted(data.class_names) == sorted(OTHERS)
    names = [data.class_names[a["class_index"]] for r in data.records for a in r["annotations"]]
    assert summary.annotations == Counter(names)
    assert not list(output.parent.glob("*.partial"))


def test_a_crowd_of_a_voc_class_counts_as_containing_it():
    dataset = make_coco()
    image_id = reference(dataset)[0][0]
    person = next(c["id"] for c in dataset["categories"] if c["name"] == "person")
    crowd = {"id": 999, "image_id": image_id, "category_id": person, "bbox": [0, 0, 1, 1]}
    dataset["annotations"].append(crowd | {"iscrowd": 1})
    assert image_id not in [image["id"] for image in select_coco60(dataset)["images"]]


def test_label_maps_are_refused_as_their_labels_would_be_of_other_classes(write):
    dataset = make_coco()
    dataset["images"][2]["label_map_file_name"] = "maps/7.png"
    path, output = write(dataset)
    with pytest.raises(ValueError, match=r"instances\.json: image 7 has label_map_.* Remove this"):
        write_coco60(path, output)
    assert not output.exists()


def test_a_file_without_the_classes_of_voc_is_refused(write):
    dataset = make_coco()
    for category in dataset["categories"]:
        if category["name"] in ("tv", "couch"):
            category["name"] += " set"
    path, output = write(dataset)
    with pytest.raises(ValueError, match=r"instances\.json: 2 of the 20 .*: couch, tv\."):
        write_coco60(path, output)
    assert not output.exists()


def test_a_file_of_which_nothing_is_left_is_refused(write):
    dataset = make_coco()
    person = next(c["id"] for c in dataset["categories"] if c["name"] == "person")
    for annotation in dataset["annotations"]:
        annotation["category_id"] = person
    path, output = write(dataset)
    with pytest.raises(ValueError, match=r"instances\.json: .* so none is left"):
        write_coco60(path, output)


def test_the_file_read_is_not_replaced(write):
    path, _ = write(make_coco())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Name another output"):
        write_coco60(path, path.parent / ".." / "in" / path.name)
    assert path.read_bytes() == before


def test_the_summary_sets_the_number_of_the_paper_beside():
    annotations = Counter({"zebra": 5, "clock": 2})
    summary = Coco60Summary(82783, 60000, 5340, COCO60_IMAGES, annotations)
    text = str(summary)
    assert "17443 of 82783 images contain no class of VOC" in text
    assert "The TransferNet paper has 17443, and so has this file." in text
    assert "Left out: 60000 images with a class of VOC, 5340 in which nothing" in text
    assert text.endswith("Most annotations: zebra (5), clock (2).")
    other = str(replace(summary, num_images=17400))
    assert "this file, of as many images as train2014, has -43." in other
    part = str(replace(summary, num_read=100, num_images=20))
    assert "probably from train2014; that has 82783 images, this file 100, so" in part


def test_real_images(shared_data, tmp_path):
    path = sorted((shared_data / "coco_mini" / "annotations").glob("instances_*.json"))[0]
    summary = write_coco60(path, tmp_path / "coco60.json")
    dataset = json.loads(path.read_text())
    kept, with_voc, empty = map(len, reference(dataset))
    assert (summary.num_images, summary.num_with_voc, summary.num_without_annotation) == (
        kept,
        with_voc,
        empty,
    )
    load_coco(tmp_path / "coco60.json", tmp_path, check_images=False)


def run_script(*arguments):
    command = [sys.executable, str(SCRIPT), "coco60", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_script_writes_the_file_and_names_a_missing_one(tmp_path):
    folder = tmp_path / "coco" / "annotations"
    folder.mkdir(parents=True)
    finished = run_script("--root", tmp_path)
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"error: {folder / 'instances_train2014.json'}: there is no")
    (folder / "instances_train2014.json").write_text(json.dumps(make_coco()))
    finished = run_script("--root", tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "The TransferNet paper has 17443" in finished.stdout
    assert (folder / "instances_coco60_train2014.json").is_file()
    (tmp_path / "other").mkdir()
    other = (folder / "instances_train2014.json").rename(tmp_path / "other" / "train.json")
    finished = run_script("--json", other)
    assert finished.returncode == 0, finished.stderr
    assert (other.parent / "instances_coco60_train2014.json").is_file()
