import json

import numpy as np
import pytest
from photos import frozen_options
from studies.larvseg import METHODS
from studies.options import StudyOptions
from studies.run import run_study

from maskx.data.images import read_rgb
from maskx.engine import quickstart, training_chain


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "SPARSE_SCENES", 24)
    monkeypatch.setattr(quickstart, "VAL_SCENES", 4)
    monkeypatch.setattr(quickstart, "SCENE_SIZE", 64)
    return {
        "output": tmp_path / "study",
        "system": "larvseg",
        "settings": tuple(METHODS),
        "seeds": (0,),
        "iterations": 2,
        "stage2_iterations": 2,
        "batch_size": 2,
        "device": "cpu",
    }


def test_all_methods_start_from_one_backbone_and_only_supervised_sees_novel_masks(
    tiny, monkeypatch
):
    trained, classes, starts = [], {}, set()
    original = training_chain.train

    def train(model, batches, *args, **kwargs):
        folder = kwargs["output_dir"]
        trained.append(f"{folder.parent.name}/{folder.name}")
        run = kwargs["run"]
        classes[trained[-1]] = len(run.settings["scored"]["masks"])
        starts.add(run.started_from["start"].sha256 if "start" in run.started_from else None)
        return original(model, batches, *args, **kwargs)

    monkeypatch.setattr(training_chain, "train", train)
    lines = []
    rows = run_study(StudyOptions(**tiny), lines.append)
    assert [row["setting"] for row in rows] == list(METHODS)
    assert all(row.keys() == {"setting", "novel", "base", "all"} for row in rows)
    shared = [f"shared/{name}" for name in METHODS if name != "supervised"]
    assert trained == ["shared/start", *shared, "supervised/baseline"]
    # The ground is five classes of its own; half of the twelve others have masks.
    assert [classes[name] for name in (*shared, "supervised/baseline")] == [11, 11, 11, 11, 11, 17]
    assert len(starts - {None}) == 1
    assert "| cross-image above single-image attention |" in lines[-1]
    assert run_study(StudyOptions(**tiny), lines.append) == rows
    assert len(trained) == 7


def test_a_setting_names_its_weight_and_scenes_in_which_classes_occur_together(tiny, monkeypatch):
    weights = {}
    original = training_chain.train

    def train(model, batches, *args, **kwargs):
        settings = kwargs["run"].settings
        weights[kwargs["output_dir"]] = settings["image weight"], settings["attentive weight"]
        return original(model, batches, *args, **kwargs)

    monkeypatch.setattr(training_chain, "train", train)
    settings = ("larvseg_w0.5", "together/larvseg", "together/baseline_w3")
    run_study(StudyOptions(**tiny | {"settings": settings}), print)
    seed = tiny["output"] / "seed_0"
    assert weights == {
        seed / "shared/start": (0.1, 1.0),
        seed / "shared_attentive_weight_0.5/larvseg": (0.1, 0.5),
        seed / "together/shared/start": (0.1, 1.0),
        seed / "together/shared/larvseg": (0.1, 1.0),
        seed / "together/shared_image_weight_3/baseline": (3.0, 1.0),
    }
    # A setting is shown on its own scenes, under their truth.
    truths = [read_rgb(seed / name / "truth/row.png") for name in (".", "together")]
    assert not np.array_equal(*truths)
    sheet = read_rgb(tiny["output"] / "contact_sheet.png")
    assert len(sheet) == 5 * (256 + 34)  # two of them, three settings, with their titles
    assert np.array_equal(sheet[2 * 290 + 34 : 3 * 290, : truths[1].shape[1]], truths[1])
    scenes = (seed / "together/scenes/train/annotations.json").read_text()
    assert json.loads(scenes)["info"]["style"] == "together"


def test_an_unknown_setting_is_refused(tiny):
    with pytest.raises(ValueError, match=r"Setting 'deeplab' is not known.*larvseg_single_image"):
        run_study(StudyOptions(**tiny | {"settings": ("deeplab",)}), print)


def test_scenes_in_pairs_are_refused_with_own_data(tiny):
    own = {"coco_train": ("a.json", "a"), "coco_val": ("a.json", "a")}
    with pytest.raises(ValueError, match=r"'together/larvseg' is of generated scenes"):
        run_study(StudyOptions(**tiny | own | {"settings": ("together/larvseg",)}), print)


def test_a_frozen_backbone_computes_its_features_once_for_all_settings(tiny, tmp_path):
    own = frozen_options(tmp_path, masks_for="random_2_0", with_masks=4)
    settings = ("baseline", "baseline_w1", "larvseg", "larvseg_w1", "supervised")
    rows = run_study(StudyOptions(**tiny | own | {"settings": settings}), print)
    assert [row["setting"] for row in rows] == list(settings)
    seed = tiny["output"] / "seed_0"
    assert {path.relative_to(seed).parts[0] for path in seed.rglob("features")} == {"shared"}
    assert not list(seed.rglob("start"))  # its backbone learns nothing
    with pytest.raises(ValueError, match="frozen keeps the backbone as it is"):
        run_study(StudyOptions(**tiny | own | {"pretrained": False}), print)
