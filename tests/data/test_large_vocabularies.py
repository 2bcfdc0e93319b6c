import csv
import subprocess
import sys
from pathlib import Path

import pytest

from maskx.data.large_vocabularies import (
    LARVSEG_SPLITS,
    ade20k_150_classes,
    ade20k_847_classes,
    base_and_novel,
    coco_stuff_classes,
    imagenet_synsets,
)
from maskx.data.vocabularies import COCO_THING_CLASSES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "maskx" / "data" / "vocabulary_files"


@pytest.fixture
def vocab(shared_data):
    return shared_data / "vocab"


def names_of(classes):
    return [entry.name for entry in classes]


def test_coco_stuff_has_171_ids_of_which_the_things_are_coco_s():
    classes = coco_stuff_classes()
    ids = [entry.category_id for entry in classes]
    assert len(classes) == len(set(names_of(classes))) == 171
    assert ids == sorted(set(ids))
    assert (ids[0], ids[-1]) == (1, 182)
    assert tuple(names_of(classes)[:80]) == COCO_THING_CLASSES
    assert [i for i in range(1, 183) if i not in ids] == [
        12,
        26,
        29,
        30,
        45,
        66,
        68,
        69,
        71,
        83,
        91,
    ]


def test_renaming_leaves_160_names():
    renamed = [entry.renamed for entry in coco_stuff_classes()]
    assert len(set(renamed)) == 160
    tied = {name: renamed.count(name) for name in renamed if renamed.count(name) > 1}
    assert tied == {"wall": 7, "floor": 5, "ceiling": 2}
    changed = {e.name: e.renamed for e in coco_stuff_classes() if e.name != e.renamed}
    not_cut = {old: new for old, new in changed.items() if old.partition("-")[0] != new}
    assert not_cut == {
        "wine glass": "glass",
        "tv": "television receiver",
        "dirt": "dirt track",
        "window-blind": "blind",
        "window-other": "windowpane",
    }


def test_names_of_ade20k_are_unique():
    assert len(set(names_of(ade20k_150_classes()))) == 150
    assert [entry.value for entry in ade20k_150_classes()] == [*range(1, 151)]
    full = ade20k_847_classes()
    assert len(set(names_of(full))) == len({entry.value for entry in full}) == 847
    assert all(entry.name in entry.synonyms for entry in ade20k_150_classes())
    others = [entry.name for entry in full if entry.name not in entry.synonyms]
    assert others == ["boxing ring", "sport basket", "smoothing iron"]
    firsts = [entry.synonyms[0] for entry in full]
    renamed = [entry.synonyms[0] for entry in full if entry.name != entry.synonyms[0]]
    assert len(renamed) == 14
    assert all(firsts.count(name) > 1 for name in set(renamed) - {"glass", "ring", "iron"})


@pytest.mark.parametrize("split", LARVSEG_SPLITS)
def test_splits_are_partitions_by_their_rule(split):
    base, novel = base_and_novel(split)
    data_set, rule = split.split("_")
    classes = ade20k_150_classes() if data_set == "ade150" else ade20k_847_classes()
    expected = []
    for entry in classes:
        spelled = entry.name if data_set == "ade150" else "-".join(entry.name.split())
        for stuff in coco_stuff_classes():
            other = stuff.name.split("-")[0] if rule == "raw" else stuff.renamed
            if spelled == other:
                expected.append(entry.name)
                break
    assert list(base) == expected
    assert sorted(base + novel) == sorted(names_of(classes))


def test_the_rules_differ_in_few_names():
    raw, renamed = (set(base_and_novel(f"ade150_{rule}")[0]) for rule in ("raw", "renamed"))
    names = {"blind", "glass", "dirt track", "television receiver", "windowpane"}
    assert renamed - raw == names
    assert raw <= renamed
    raw, renamed = (set(base_and_novel(f"ade847_{rule}")[0]) for rule in ("raw", "renamed"))
    assert renamed - raw == {"windowpane", "blind"}
    shared = {entry.renamed for entry in coco_stuff_classes()} & {*names_of(ade20k_847_classes())}
    assert shared - renamed == {
        "dirt track",
        "parking meter",
        "television receiver",
        "traffic light",
    }


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match=r"no base/novel split 'ade150'\. Allowed: ade150_raw, "):
        base_and_novel("ade150")


def test_synsets_have_names():
    synsets = imagenet_synsets()
    assert len(synsets) == 21844
    assert synsets["n01440764"] == ("tench", "Tinca tinca")
    assert all(names and all(names) for names in synsets.values())


def test_the_files_agree_with_those_they_were_made_from(vocab):
    lines = (vocab / "cocostuff" / "labels.txt").read_text().splitlines()
    published = dict(line.split(": ", 1) for line in lines)
    for entry in coco_stuff_classes():
        assert published[str(entry.category_id)] == entry.name
    with (vocab / "ade" / "object150_info.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, entry in zip(rows, ade20k_150_classes(), strict=True):
        assert int(row["Idx"]) == entry.value
        assert sorted(row["Name"].split(";")) == sorted(" ".join(entry.synonyms).split(" "))
    lines = (vocab / "timm" / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    assert {s: ", ".join(names) for s, names in imagenet_synsets().items()} == dict(
        line.split("\t") for line in lines
    )
    known = (vocab / "timm" / "imagenet22k_synsets.txt").read_text().split()
    assert set(known) <= set(imagenet_synsets())


def test_the_847_names_are_nearly_those_of_another_list(vocab):
    lines = (vocab / "fcclip" / "ade20k_847_with_prompt_eng.txt").read_text().splitlines()[1:]
    firsts = [line.split(":", 1)[1].split(",")[0] for line in lines]
    pairs = zip(firsts, ade20k_847_classes(), strict=True)
    differing = [(first, e.synonyms[0]) for first, e in pairs if first != e.synonyms[0]]
    assert differing == [  # that list words seven of them for a language model
        ("house exterior", "house"),
        ("pedestal", "base"),
        ("palm tree", "palm"),
        ("crt screen", "screen"),
        ("projection screen", "screen"),
        ("exhaust hood", "hood"),
        ("ceiling fan", "fan"),
    ]


def test_the_files_are_small_attributed_and_part_of_the_package():
    files = sorted(path for path in FOLDER.iterdir() if path.name != "README.md")
    assert sum(path.stat().st_size for path in files) < 2_000_000
    readme = (FOLDER / "README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in files)
    assert "data/vocabulary_files/*" in (ROOT / "setup.py").read_text()


def test_reading_them_loads_neither_torch_nor_opencv():
    code = (
        "import maskx.data.large_vocabularies as m, sys; m.imagenet_synsets(); print(*sys.modules)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not {"torch", "cv2", "PIL"} & set(finished.stdout.split())
