import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from maskx.data.coco import load_coco
from maskx.data.prepare.visual_genome import (
    SPLITS,
    prepare_visual_genome,
    prepare_visual_genome_concepts,
    word_names,
)
from maskx.data.tag_lists import read_tag_list
from maskx.data.vocabularies import COCO_THING_CLASSES

SCRIPT = Path(__file__).parents[3] / "datasets" / "prepare.py"
make_vg = runpy.run_path(str(Path(__file__).parents[2] / "support" / "visual_genome_files.py"))[
    "make_vg"
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Files of Visual Genome as its script writes them, and the objects they are made of."""
    root = tmp_path_factory.mktemp("root")
    images, objects, val_ids = make_vg(seed=3)
    # A synset that COCO's "orange" is not, and two senses of one word.
    for number, synset in enumerate(["orange.n.02"] * 3 + ["bank.n.01"] * 5 + ["bank.n.02"] * 4):
        item = {"x": 1, "y": 2, "w": 5, "h": 5, "object_id": 9000 + number, "synsets": [synset]}
        objects[number]["objects"].append(item)
    for name, content in [("image_data", images), ("objects", objects)]:
        (root / f"{name}.json").write_text(json.dumps(content))
    coco = {"images": [{"id": id_} for id_ in val_ids], "annotations": [], "categories": []}
    (root / "val.json").write_text(json.dumps(coco))
    prepare_visual_genome(
        root / "objects.json",
        root / "image_data.json",
        root / "val.json",
        root / "visual_genome" / "annotations",
        num_classes=130,
        num_test_images=20,
    )
    return root


def test_tags_and_boxes_have_the_same_words(root):
    folder = root / "visual_genome" / "annotations"
    summary = prepare_visual_genome_concepts(folder)
    for split in SPLITS:
        before = json.loads((folder / f"instances_vg3k_{split}.json").read_text())
        synset_of = {c["id"]: c["synset"] for c in before["categories"]}
        word_of = {c["id"]: c.get("coco") for c in before["categories"]}
        data = load_coco(folder / f"concepts_{split}_boxes.json", folder, check_images=False)
        tags = read_tag_list(folder / f"concepts_{split}_tags.jsonl")
        assert summary.splits[split] == (
            len(data.records),
            len(tags.indices),
            len(before["annotations"]),
            len(before["images"]) - len(data.records),
        )
        expected = {}
        for annotation in before["annotations"]:
            expected.setdefault(annotation["image_id"], set()).add(annotation["category_id"])
        file_name = {image["id"]: image["file_name"] for image in before["images"]}
        assert sorted(tags.image_ids) == sorted(file_name[image] for image in expected)
        for record in data.records:
            ids = expected[record["image_id"]]
            names = {data.class_names[i] for i in record["image_labels"]}
            position = tags.image_ids.index(file_name[record["image_id"]])
            assert {tags.names[i] for i in tags.tags_of(position)} == names
            assert len(names) == len(ids)
            assert {word_of[i] for i in ids if word_of[i]} <= names
            for id_ in ids:
                word = synset_of[id_].split(".")[0].replace("_", " ")
                assert names & {word_of[id_], word, synset_of[id_]}
    assert {"orange.n.02", "bank.n.02"} <= set(summary.kept_synsets)
    assert {"orange", "bank"} <= set(data.class_names)
    assert set(COCO_THING_CLASSES) <= set(data.class_names)
    assert any(left_out for *_, left_out in summary.splits.values())
    text = str(summary)
    assert text.splitlines()[0].split(maxsplit=4) == [
        "split",
        "images",
        "tags",
        "boxes",
        "left out",
    ]
    assert f"{len(summary.kept_synsets)} concepts keep their synset as name: " in text
    assert Counter(dict(summary.most_frequent)).most_common() == summary.most_frequent


def test_the_sense_with_most_boxes_takes_the_word():
    categories = [
        {"id": 1, "name": "bag.n.01", "synset": "bag.n.01"},
        {"id": 2, "name": "bag.n.04", "synset": "bag.n.04"},
        {"id": 3, "name": "suitcase", "synset": "bag.n.06", "coco": "suitcase"},
        {"id": 4, "name": "tv.n.01", "synset": "tv.n.01"},
        {"id": 5, "name": "street_light.n.01", "synset": "street_light.n.01"},
    ]
    counts = {1: 4, 2: 7, 3: 20, 4: 9, 5: 0}
    assert word_names(categories, counts) == {
        1: "bag.n.01",
        2: "bag",
        3: "suitcase",
        4: "tv.n.01",  # a class of COCO, though not among these
        5: "street light",
    }
    assert word_names(categories, dict.fromkeys(counts, 1))[1] == "bag"


def test_files_that_do_not_fit_are_named(tmp_path):
    def write(split, categories):
        path = tmp_path / f"instances_vg3k_{split}.json"
        image = {"id": 1, "file_name": "1.jpg", "height": 4, "width": 4}
        content = {"images": [image], "annotations": [], "categories": categories}
        path.write_text(json.dumps(content))

    with pytest.raises(FileNotFoundError, match=r"train\.json: .*prepare.py visual_genome first"):
        prepare_visual_genome_concepts(tmp_path)
    category = {"id": 1, "name": "dog", "synset": "dog.n.01"}
    for split in SPLITS:
        write(split, [category])
    write("val", [{"id": 1, "name": "dog"}])
    with pytest.raises(ValueError, match=r"val\.json: category 1 \('dog'\) has no synset"):
        prepare_visual_genome_concepts(tmp_path)
    write("val", [category, {"id": 2, "name": "cat", "synset": "cat.n.01"}])
    with pytest.raises(ValueError, match="'train' and 'val' have other categories"):
        prepare_visual_genome_concepts(tmp_path)


def test_the_command(root, tmp_path):
    command = [sys.executable, str(SCRIPT), "visual_genome_concepts", "--root"]
    finished = subprocess.run([*command, str(root)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "concepts keep their synset as name" in finished.stdout
    finished = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ")
