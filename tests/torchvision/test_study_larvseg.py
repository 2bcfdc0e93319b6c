import pytest
from studies.larvseg import METHODS
from studies.options import StudyOptions
from studies.run import run_study

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
    assert [classes[name] for name in (*shared, "supervised/baseline")] == [11, 11, 11, 11, 17]
    assert len(starts - {None}) == 1
    assert "| cross-image above single-image attention |" in lines[-1]
    assert run_study(StudyOptions(**tiny), lines.append) == rows
    assert len(trained) == 6


def test_an_unknown_setting_is_refused(tiny):
    with pytest.raises(ValueError, match=r"Setting 'deeplab' is not known.*larvseg_single_image"):
        run_study(StudyOptions(**tiny | {"settings": ("deeplab",)}), print)
