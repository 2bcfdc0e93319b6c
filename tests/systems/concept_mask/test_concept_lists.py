import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from maskx.core.word_table import WordTable, save_word_table
from maskx.data.coco import load_coco
from maskx.systems.concept_mask.concept_sets import (
    choose_concepts,
    concept_sets,
    format_concept_lists,
    read_concept_split,
    weak_lists,
)

SCRIPT = Path(__file__).parents[3] / "datasets" / "prepare.py"
VOCABULARY = ("apple", "big dog", "car", "person", "sky", "tv", "wheel")


def coco_file(path, boxes):
    """Write a file with boxes of the given names for each image."""
    names = sorted({name for image in boxes for name in image} | {"tv"})
    annotations = [
        {"image_id": image, "category_id": names.index(name) + 1, "bbox": [1, 1, 4, 4]}
        for image, shown in enumerate(boxes, start=1)
        for name in shown
    ]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
        annotation["segmentation"] = [[1, 1, 5, 1, 5, 5]]
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": 9, "width": 9}
            for i in range(1, len(boxes) + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def files(tmp_path):
    return {
        "boxes": [
            coco_file(tmp_path / "a.json", [["car", "car", "zeppelin"], ["wheel"], ["person"]]),
            coco_file(tmp_path / "b.json", [["big_dog", "wheel"], ["big_dog", "apple"], ["car"]]),
        ],
        "masks": coco_file(tmp_path / "masks.json", [["person"], ["person"]]),
    }


def test_rare_boxes_are_dropped_over_all_files_and_masks_never(files):
    split, summary = choose_concepts(VOCABULARY, **files, min_images=2)
    assert split.vocabulary == VOCABULARY
    assert split.masked == ("person", "tv")
    assert split.boxed == ("person", "tv", "big dog", "car", "wheel")
    assert split.unseen == ("zeppelin",)
    assert summary.box_images == {"person": 3, "big dog": 2, "car": 2, "wheel": 2, "apple": 1}
    assert summary.rare == {"apple": 1}
    assert summary.unknown == {"zeppelin": 1}
    text = format_concept_lists(split, summary)
    assert "7 concepts: 2 with masks, 5 with boxes." in text
    assert "Of these without a box in the files: 1, 'tv'." in text
    assert "Too rare for the list of boxes: 1, 'apple'." in text
    assert "Not in the vocabulary, listed as unseen: 1, 'zeppelin'." in text
    assert "apple" in choose_concepts(VOCABULARY, **files, min_images=1)[0].boxed


def test_spellings_of_a_name_in_one_file_are_one_concept(files, tmp_path):
    path = coco_file(tmp_path / "c.json", [["big_dog", "big dog"], ["big dog"], ["big_dog"]])
    _, summary = choose_concepts(VOCABULARY, boxes=[path], masks=files["masks"])
    assert summary.box_images["big dog"] == 3


def test_the_files_can_be_used_with_their_lists(files):
    split, _ = choose_concepts(VOCABULARY, **files, min_images=2)
    boxes = [load_coco(path, "", check_images=False) for path in files["boxes"]]
    first, second = (concept_sets(split, boxes=data).boxed for data in boxes)
    used = {a["class_index"] for record in (*first, *second) for a in record["annotations"]}
    assert {VOCABULARY[i] for i in used} == {"car", "wheel", "person", "big dog"}
    masks = load_coco(files["masks"], "", check_images=False)
    assert len(concept_sets(split, masks=masks).masked) == 2


def test_test_concepts_are_in_one_list_by_what_training_knows(files, tmp_path):
    split, _ = choose_concepts(VOCABULARY, **files, min_images=2)
    shown = ["person", "car", "sky", "yurt"]
    tests = coco_file(tmp_path / "test.json", [shown, [*shown, "wheel"], ["wheel", "apple"]])
    content = json.loads(tests.read_text())
    del content["annotations"][-2]["segmentation"]  # of the second wheel
    tests.write_text(json.dumps(content))
    lists = weak_lists(split, [tests], min_images=2)
    assert lists == {"weak_box": ("car",), "weak_image": ("sky",), "zero_shot": ("yurt",)}
    lists = weak_lists(split, [tests, files["boxes"][0]], min_images=1)
    assert lists["weak_box"] == ("car", "wheel")
    assert lists["weak_image"] == ("apple", "sky")
    assert lists["zero_shot"] == ("yurt", "zeppelin")


def test_bad_lists_are_named(files, tmp_path):
    with pytest.raises(ValueError, match=r"min_images is 0\. Allowed: at least 1"):
        choose_concepts(VOCABULARY, **files, min_images=0)
    with pytest.raises(ValueError, match=r"masks.json: 1 of 2 categories .* 5 concepts .*: 'tv'"):
        choose_concepts(("car", "person", "wheel", "apple", "sky"), **files)
    with pytest.raises(FileNotFoundError, match="no such annotation file"):
        choose_concepts(VOCABULARY, boxes=[tmp_path / "no.json"], masks=files["masks"])


def test_the_command(files, tmp_path, monkeypatch, capsys):
    def run(*command):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    words = tmp_path / "words.safetensors"
    ones = np.ones(len(VOCABULARY), np.float32)
    vectors = np.eye(len(VOCABULARY), dtype=np.float32)
    save_word_table(words, WordTable(VOCABULARY, vectors, ones, None, "test"))
    command = ["concept_split", "--root", str(tmp_path), "--words", str(words)]
    command += ["--masks", str(files["masks"]), "--min-images", "2"]
    boxes = ["--boxes", *map(str, files["boxes"])]
    assert "7 concepts: 2 with masks, 5 with boxes." in run(*command, *boxes)
    split = read_concept_split(tmp_path / "concepts" / "split.json", VOCABULARY)
    assert split == choose_concepts(VOCABULARY, **files, min_images=2)[0]
    tests = ["concept_tests", "--root", str(tmp_path), "--masks", *boxes[1:], "--min-images", "1"]
    assert "weak_image: 1 concepts: 'apple'." in run(*tests)
    assert list(json.loads((tmp_path / "concepts" / "test_lists.json").read_text())) == [
        "weak_box",
        "weak_image",
        "zero_shot",
    ]
    with pytest.raises(SystemExit, match=r"^error: ") as ended:
        run(*command)
    assert "train_boxes.json: there is no such annotation file" in ended.value.code
    assert "Traceback" not in ended.value.code
