import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from studies import maskx as study_maskx
from studies.maskx import PAPER_SETTINGS, STUDY, WORDS, mask_branch, with_share_of_masks
from studies.options import StudyOptions
from studies.run import run_study

from maskx.data.images import read_rgb
from maskx.data.scenes.generator import generate_scenes
from maskx.engine import quickstart


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "TRAIN_SCENES", 6)
    monkeypatch.setattr(quickstart, "VAL_SCENES", 4)
    monkeypatch.setattr(quickstart, "SCENE_SIZE", 64)
    return {
        "output": tmp_path / "study",
        "settings": ("sw/baseline", "sw/cls_2_layer", "e2e/clsbox_2_layer"),
        "seeds": (0, 3),
        "iterations": 2,
        "stage2_iterations": 1,
        "batch_size": 2,
        "device": "cpu",
    }


def test_names_are_decoded_word_by_word():
    assert mask_branch("sw/clsbox_3_layer_relu_mlp") == {
        "freeze_detector": True,
        "predictor": "transfer",
        "transfer_inputs": "cls+box",
        "transfer_layers": 3,
        "transfer_activation": "relu",
        "mlp": "single_fc",
    }
    assert mask_branch("e2e/cls_2_layer_nostopgrad")["stop_gradient"] is False
    assert mask_branch("sw/box_1_layer")["transfer_inputs"] == "box"
    assert mask_branch("e2e/baseline")["freeze_detector"] is False


# Keys of a configuration and the arguments that they are here.
ARGUMENTS = {
    "MODEL.MASKX.FREEZE_DETECTOR": "freeze_detector",
    "MODEL.MASKX.PREDICTOR": "predictor",
    "MODEL.MASKX.MLP": "mlp",
    "MODEL.MASKX.TRUNK": "trunk",
    "MODEL.MASKX.GT_BOXES_ONLY": "gt_boxes_only",
    "MODEL.MASKX.TRANSFER.INPUTS": "transfer_inputs",
    "MODEL.MASKX.TRANSFER.LAYERS": "transfer_layers",
    "MODEL.MASKX.TRANSFER.ACTIVATION": "transfer_activation",
    "MODEL.MASKX.TRANSFER.STOP_GRADIENT": "stop_gradient",
    "MODEL.MASKX.TRANSFER.MIX": "transfer_mix",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": "num_convs",
}


def test_words_set_what_they_set_in_the_configs():
    page = Path(__file__).parents[3] / "configs" / "MaskX" / "README.md"
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", page.read_text("utf-8"), re.M)
    cells = {word: re.findall("`([^`]+)`", cell) for word, cell in rows}

    def arguments(word):
        found = {}
        for item in cells[word]:
            key, _, value = item.partition(" ")
            if not value:
                found |= arguments(key)
            elif key in ARGUMENTS:
                found[ARGUMENTS[key]] = value
        return found

    def as_text(values):
        return {key: str(value) for key, value in values.items()}

    shared = WORDS.keys() & cells.keys() - {"box_loss"}  # of several numbers
    assert WORDS.keys() - shared == {
        "box_loss",
        "dropout",
        "bottleneck",
        "gtboxes",
        "mix",
        "normalised",
        "residual",
        "hourglass",
    }
    assert {word: arguments(word) for word in shared} == {w: as_text(WORDS[w]) for w in shared}
    plus = as_text(mask_branch("sw/clsbox_2_layer_mix_hourglass_gtboxes"))
    assert plus == arguments("maskx_plus") | arguments("sw")


def test_every_setting_of_the_paper_builds():
    for setting in PAPER_SETTINGS:
        study_maskx.maskx_rcnn(5, detector={"min_size": 64}, **mask_branch(setting))


@pytest.mark.parametrize("setting", ["clsbox", "sw/clsbox2", "sw/", "sw/clsbox_", "both/baseline"])
def test_an_unknown_setting_is_refused(setting):
    with pytest.raises(ValueError, match=rf"Setting '{setting}' is not known.*hourglass"):
        mask_branch(setting)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sw/clsbox_cls_2_layer", "'cls' sets what an earlier word has set"),
        ("sw/clsbox_2_layer_3_layer", "'3_layer' sets what an earlier word has set"),
        (
            "e2e/2_layer_mlp",
            "does not say what predicts the masks. Add one of baseline, mask_rcnn, clsbox",
        ),
    ],
)
def test_a_setting_that_contradicts_itself_or_says_too_little_is_refused(setting, words):
    with pytest.raises(ValueError, match=rf"Setting '{setting}'.*{words}"):
        mask_branch(setting)


def test_without_matplotlib_nothing_is_begun(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        run_study(StudyOptions(**tiny), print)
    assert not tiny["output"].exists()


def test_a_study_runs_once_and_goes_on(tiny, monkeypatch):
    lines = []
    rows = run_study(StudyOptions(**tiny), lines.append)
    assert [row["setting"] for row in rows] == list(tiny["settings"])
    measures = [f"{name}_{group}" for name in ("mask_AP", "box_AP", "mask_IoU") for group in "AB"]
    assert all(len(row[measure]) == 2 for row in rows for measure in measures)
    assert "| `sw/cls_2_layer` |" in lines[-2]
    assert lines[-1].splitlines()[3].startswith("| 3.1: cls above class-agnostic |")
    study = json.loads((tiny["output"] / "study.json").read_text())
    assert (study["system"], study["seeds"], study["rows"]) == ("maskx", [0, 3], rows)
    assert (tiny["output"] / "study.png").stat().st_size > 5000

    result = tiny["output"] / "seed_3" / "sw" / "baseline" / "result.json"
    result.unlink()
    trained = []
    original = study_maskx.train

    def train(*args, **kwargs):
        trained.append(kwargs["description"])
        return original(*args, **kwargs)

    monkeypatch.setattr(study_maskx, "train", train)
    assert run_study(StudyOptions(**tiny), lines.append) == rows
    assert trained == ["seed 3 stage1", "seed 3 sw/baseline"]

    with pytest.raises(ValueError, match=r"result.json' was made with .*'iterations': 1,"):
        run_study(StudyOptions(**tiny | {"stage2_iterations": 2}), lines.append)


def test_second_stages_share_the_detector_of_the_first(tiny):
    run_study(StudyOptions(**tiny | {"seeds": (0,)}), lambda line: None)
    folder = tiny["output"] / "seed_0"
    states = [
        torch.load(folder / name / "checkpoint.pth", weights_only=True)["model"]
        for name in ("stage1", "sw/baseline", "sw/cls_2_layer", "e2e/clsbox_2_layer")
    ]
    detector, *second_stages, end_to_end = states
    for state in second_stages:
        assert all(torch.equal(tensor, state[name]) for name, tensor in detector.items())
    assert any(not torch.equal(tensor, end_to_end[name]) for name, tensor in detector.items())


def test_a_study_from_before_there_were_other_systems_is_read(tiny):
    options = tiny | {"settings": ("sw/baseline", "e2e/baseline"), "seeds": (0, 1)}
    options |= {"iterations": None, "stage2_iterations": None, "batch_size": None}
    runs = {
        "sw/baseline": {"iterations": 600, "batch_size": 8, "detector_iterations": 1200},
        "e2e/baseline": {"iterations": 1200, "batch_size": 8},
    }
    for seed in (0, 1):
        for setting, run in runs.items():
            result = {"mask_AP_A": 30.0, "mask_AP_B": 15.0 + seed}
            result |= {"box_AP_A": 50.0, "box_AP_B": 51.0, "mask_IoU_A": 70.0, "mask_IoU_B": 60.0}
            path = tiny["output"] / f"seed_{seed}" / setting / "result.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"run": run, "result": result}))
    (tiny["output"] / "study.json").write_text(json.dumps({"seeds": [0], "rows": []}))
    lines = []
    rows = run_study(StudyOptions(**options), lines.append)
    assert [row["mask_AP_B"] for row in rows] == [[15.0, 16.0]] * 2
    assert lines[-1].splitlines()[-1] == (
        "| `e2e/baseline` | 15.5 | 15.0 to 16.0 | 30.0 | 51.0 | 50.0 | 60.0 | 70.0 |"
    )
    assert not (tiny["output"] / "seed_0" / "scenes").exists()


def test_a_share_of_the_masks_is_part_of_a_larger_one():
    records = [
        {"annotations": [{"id": 4 * i + j, "segmentation": [], "bbox": []} for j in range(4)]}
        for i in range(10)
    ]

    def with_masks(share, seed=0):
        kept = with_share_of_masks(records, share, seed)
        annotations = [each for record in kept for each in record["annotations"]]
        assert [each["id"] for each in annotations] == list(range(40))
        assert all("bbox" in each for each in annotations)
        return {each["id"] for each in annotations if "segmentation" in each}

    assert [len(with_masks(share)) for share in (0.1, 0.25, 0.5)] == [4, 10, 20]
    assert with_masks(0.1) < with_masks(0.25) < with_masks(0.5)
    assert with_masks(0.5) != with_masks(0.5, seed=1)
    assert "segmentation" in records[0]["annotations"][0]


def test_the_orderings_are_of_settings_that_exist():
    for _, (better, _), (worse, _) in STUDY.orderings:
        assert {better, worse} <= set(PAPER_SETTINGS)


def test_own_data_with_every_source_of_masks(tiny, tmp_path, monkeypatch):
    """Oracle, GrabCut, vectors and a random split, on COCO files, two steps each."""
    sources = []
    for name, seed in (("train", 0), ("val", 1)):
        json_file = generate_scenes(tmp_path / name, count=4, size=64, num_categories=4, seed=seed)
        sources.append((str(json_file), str(json_file.parent)))
    names = [c["name"] for c in json.loads(Path(sources[0][0]).read_text())["categories"]]
    words = sorted({word for name in names for word in name.split()})
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("".join(f"{w} {i} 1 {i * i}\n" for i, w in enumerate(words)))
    settings = ("sw/glove_2_layer", "oracle/sw/mask_rcnn", "grabcut/e2e/mask_rcnn")
    settings += ("share_25/sw/clsbox_box_loss",)
    own = {"coco_train": sources[0], "coco_val": sources[1], "masks_for": "random_2_1"}
    options = StudyOptions(
        **(tiny | own | {"settings": settings, "seeds": (0,), "vectors": vectors})
    )
    rows = run_study(options, lambda line: None)
    assert [row["setting"] for row in rows] == list(settings)
    sheet = read_rgb(options.output / "contact_sheet.png")
    assert sheet.shape == (5 * (256 + 34), 4 * 256, 3)  # the truth and four settings
    grabcut = json.loads((options.seed_folder(0) / "grabcut.json").read_text())
    assert all(annotation["segmentation"] for annotation in grabcut["annotations"])
    with pytest.raises(ValueError, match=r"glove_2_layer' needs a file of word vectors"):
        run_study(dataclasses.replace(options, vectors=None), print)
    with pytest.raises(ValueError, match="masks_for has no meaning for a study of class_patterns"):
        run_study(dataclasses.replace(options, system="class_patterns", settings=None), print)
