import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from maskx.data.coco import load_coco
from maskx.data.label_maps import semantic_label_map
from maskx.data.prepare.ccp import prepare_ccp

TOOL = Path(__file__).parents[3] / "datasets" / "prepare.py"
LISTS = {"pixel_train": ["0001", "0004"], "pixel_val": ["0003"], "image_level": ["1006"]}


@pytest.fixture
def ccp(tmp_path):
    """Four photos; the masks have one row of each class from 0 on."""
    folder = tmp_path / "ccp"
    for name in ("photos", "masks"):
        (folder / name).mkdir(parents=True)
    for name, numbers in LISTS.items():
        (folder / f"{name}.txt").write_text("\n".join(numbers) + "\n")
        for index, number in enumerate(numbers):
            cv2.imwrite(str(folder / "photos" / f"{number}.jpg"), np.zeros((4, 6, 3), np.uint8))
            if name != "image_level":
                mask = np.minimum(np.arange(4), index + 1).astype(np.uint8)[:, None].repeat(6, 1)
                cv2.imwrite(str(folder / "masks" / f"{number}.png"), mask)
    (folder / "classes.json").write_text('{"classes": ["null", "bag", "hat", "tie"]}')
    (folder / "image_level_tags.json").write_text('{"1006": [0, 3, 1]}')
    return folder


def test_masks_and_tags_become_one_class_list(ccp, tmp_path):
    summary = prepare_ccp(ccp, tmp_path / "out")
    assert summary.num_images == {"train": 2, "val": 1, "tags": 1, "mixed": 3}
    assert summary.num_masks == {"train": 2, "val": 1, "tags": 0, "mixed": 2}
    assert "ccp_mixed.json         3       2" in str(summary)
    data = load_coco(tmp_path / "out" / "ccp_mixed.json", ccp / "photos")
    assert data.class_names == ("bag", "hat", "tie")
    assert [r["image_id"] for r in data.records] == [1, 4, 1006]
    assert [r["image_labels"] for r in data.records] == [[0], [0, 1], [0, 2]]
    assert [r["supervision"] for r in data.records] == ["mask", "mask", "image"]
    assert semantic_label_map(data.records[1], 3)[:, 0].tolist() == [0, 1, 2, 2]


def test_the_command(ccp, tmp_path):
    command = [sys.executable, str(TOOL), "ccp", "--root", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert len(list((ccp / "annotations").iterdir())) == 4
    (ccp / "photos" / "0003.jpg").unlink()
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "0003.jpg: there is no such image, but it is listed" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("classes.json", "[1]", "holds no JSON object"),
        ("classes.json", "{", "is not valid JSON"),
        ("classes.json", '{"classes": ["bag", "null"]}', "'null' first"),
        ("image_level_tags.json", "{}", "photo 1006 has None. Allowed: a list of numbers"),
        ("image_level_tags.json", '{"1006": [4]}', r"photo 1006 has \[4\]"),
        ("pixel_val.txt", "0001", "photo 0001 is listed more than once"),
        ("pixel_val.txt", "a photo", "'a' is no number of a photo"),
        ("pixel_val.txt", "", "is empty"),
        ("masks/0001.png", "text", "cannot be read as PNG"),
        ("photos/0001.jpg", "text", "cannot be read as image"),
    ],
)
def test_bad_files_are_named(ccp, tmp_path, name, content, words):
    (ccp / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        prepare_ccp(ccp, tmp_path / "out")


def test_missing_files_are_named(ccp, tmp_path):
    (ccp / "classes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"classes.json: there is no such file of CCP"):
        prepare_ccp(ccp, tmp_path / "out")


def test_real_photos(shared_data, tmp_path):
    summary = prepare_ccp(shared_data / "ccp", tmp_path)
    assert len(summary.class_names) == 58
    assert summary.num_images == {"train": 300, "val": 150, "tags": 450, "mixed": 750}
    classes = json.loads((shared_data / "ccp" / "classes_in_masks.json").read_text())
    for record in load_coco(tmp_path / "ccp_train.json", shared_data / "ccp" / "photos").records:
        expected = classes[f"{record['image_id']:04d}"]
        assert [label + 1 for label in record["image_labels"]] == [c for c in expected if c]
