import pytest

from maskx.torchvision import concept_mask_chain, quickstart_concept_mask
from maskx.torchvision.studies import StudyOptions, run_study
from maskx.torchvision.study_concept_mask import SETTINGS


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart_concept_mask, "CONCEPT_SCENES", 24)
    monkeypatch.setattr(quickstart_concept_mask, "TAG_SCENES", 400)
    monkeypatch.setattr(quickstart_concept_mask, "VAL_SCENES", 3)
    monkeypatch.setattr(quickstart_concept_mask, "SCENE_SIZE", 64)
    return {
        "output": tmp_path / "study",
        "system": "concept_mask",
        "settings": tuple(SETTINGS),
        "seeds": (0,),
        "iterations": 2,
        "stage2_iterations": 2,
        "batch_size": 2,
        "device": "cpu",
    }


def test_settings_share_the_stages_that_do_not_differ(tiny, monkeypatch):
    trained = []
    original = concept_mask_chain.train

    def train(model, *args, **kwargs):
        trained.append(kwargs["output_dir"].name)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(concept_mask_chain, "train", train)
    lines = []
    rows = run_study(StudyOptions(**tiny), lines.append)
    assert [row["setting"] for row in rows] == list(SETTINGS)
    assert trained == [
        "embedding",
        "embedding_final_relu",
        "refinement",
        "refinement_no_negatives",
        "segmentation",
        "segmentation_one_size",
    ]
    by_setting = {row["setting"]: row for row in rows}
    assert "pointing_boxed" in by_setting["refined"]
    assert "iou_box" not in by_setting["refined"]
    assert set(by_setting["segmentation"]) == {
        "setting",
        *(f"iou_{level}" for level in ("mask", "box", "image", "unseen")),
    }
    # Blending and what makes masks change no weight, but numbers.
    for other in ("no_blending", "thresholded_attention"):
        assert by_setting["segmentation"] != by_setting[other] | {"setting": "segmentation"}
    assert "| finetuned above original: pointing, boxed |" in lines[-1]
    assert run_study(StudyOptions(**tiny), lines.append) == rows
    assert len(trained) == 6


def test_an_unknown_setting_is_refused(tiny):
    with pytest.raises(ValueError, match=r"Setting 'deeplab' is not known.*refined_no_negatives"):
        run_study(StudyOptions(**tiny | {"settings": ("deeplab",)}), print)
