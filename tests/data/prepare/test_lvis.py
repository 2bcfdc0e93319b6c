import json
import subprocess
import sys
from pathlib import Path

import pytest

from maskx.data.prepare.lvis import COCO_SYNSETS, prepare_lvis
from maskx.data.vocabularies import COCO_THING_CLASSES

SCRIPT = Path(__file__).parents[3] / "datasets" / "prepare.py"
COCO_URL = "http://images.cocodataset.org/{}"
SQUARE = [[2, 2, 8, 2, 8, 8, 2, 8]]


def lvis(**changes):
    """Two images of val2017 and one of train2017, in the form of LVIS v1."""
    names = ("bat_(animal)", "bat.n.01"), ("baseball_bat", "baseball_bat.n.01")
    names += ("Band_Aid", "band_aid.n.01"), ("cow", "beef.n.01")
    names += ("mouse_(animal_rodent)", "mouse.n.01"), ("mouse_(computer_equipment)", "mouse.n.04")
    names += ("crab_(animal)", "crab.n.01"), ("crab_(food)", "crab.n.05")
    categories = [
        {"id": n, "name": name, "synset": synset, "frequency": "rcf"[n % 3]}
        for n, (name, synset) in enumerate(names, start=1)
    ]
    images = [
        {
            "id": n,
            "coco_url": COCO_URL.format(path),
            "height": 10,
            "width": 12,
            "neg_category_ids": [4],
            "not_exhaustive_category_ids": [3] if n == 2 else [],
        }
        for n, path in ((1, "val2017/1.jpg"), (2, "val2017/2.jpg"), (3, "train2017/3.jpg"))
    ]
    annotations = [
        {"image_id": image, "category_id": category, "bbox": [2, 2, 6, 6], "area": 36.0}
        for image, category in ((1, 1), (1, 2), (1, 3), (2, 3), (2, 6), (3, 1), (2, 7))
    ]
    annotations = [
        a | {"id": n, "segmentation": SQUARE} for n, a in enumerate(annotations, start=1)
    ]
    return {"images": images, "annotations": annotations, "categories": categories} | changes


def write(folder, content):
    path = folder / "lvis_v1_val.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def read(path):
    return json.loads(path.read_text())


def test_both_files(tmp_path):
    source, whole, concepts = write(tmp_path, lvis()), tmp_path / "a.json", tmp_path / "b.json"
    text = str(prepare_lvis(source, whole, concepts=concepts))
    made = read(whole)
    names = ["bat", "baseball bat", "Band Aid", "cow", "mouse (animal rodent)", "mouse"]
    names += ["crab (animal)", "crab (food)"]
    assert [category["name"] for category in made["categories"]] == names
    assert made["images"][0]["file_name"] == "val2017/1.jpg"
    assert made["images"][0]["neg_category_ids"] == [4]
    assert len(made["annotations"]) == 7
    of_concepts = read(concepts)
    assert {c["id"] for c in of_concepts["categories"]} == {1, 3, 5, 7, 8}  # not COCO's
    assert [image["file_name"] for image in of_concepts["images"]] == [
        "val2017/1.jpg",
        "val2017/2.jpg",
    ]
    assert "neg_category_ids" not in of_concepts["images"][0]
    found = {
        (a["image_id"], a["category_id"]): "segmentation" in a for a in of_concepts["annotations"]
    }
    assert found == {(1, 1): True, (1, 3): True, (2, 3): False, (2, 7): True}
    assert "3 categories that COCO does not have; 1 objects without mask" in text
    assert "Names that are not unique: 'crab (animal)', 'crab (food)', 'mouse (animal" in text


def test_every_class_of_coco_has_a_synset_of_its_own():
    assert tuple(COCO_SYNSETS) == COCO_THING_CLASSES
    assert len(set(COCO_SYNSETS.values())) == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [{"id": 1, "height": 10, "width": 12}], "annotations": []}, "no coco_url and"),
        ({"annotations": lvis()["annotations"][1:2]}, "no image of COCO's val2017"),
    ],
)
def test_other_files_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare_lvis(
            write(tmp_path, lvis(**change)), tmp_path / "a.json", concepts=tmp_path / "b.json"
        )


def test_command(tmp_path):
    write(tmp_path / "lvis", lvis())
    command = [sys.executable, SCRIPT, "lvis", "--root", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "2 images of val2017" in result.stdout
    made = tmp_path / "lvis" / "annotations"
    assert {path.name for path in made.iterdir()} == {"lvis_v1_val.json", "concepts_val.json"}
