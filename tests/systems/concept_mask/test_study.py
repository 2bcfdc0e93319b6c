import dataclasses
import json

import pytest
from photos import frozen_options
from studies import concept_mask as study_concept_mask
from studies.concept_mask import SETTINGS
from studies.options import StudyOptions
from studies.run import run_study

from maskx.engine import training_chain
from maskx.systems.concept_mask import pipeline
from maskx.systems.concept_mask.pipeline import QUICK


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "CONCEPT_SCENES", 24)
    monkeypatch.setattr(pipeline, "TAG_SCENES", 400)
    monkeypatch.setattr(pipeline, "VAL_SCENES", 3)
    monkeypatch.setattr(pipeline, "SCENE_SIZE", 64)
    narrow = dataclasses.replace(
        QUICK.network,
        hidden_channels=(16, 16),
        refinement_channels=16,
        encoder_widths=(4, 6, 8, 8),
        decoder_channels=(8, 8, 8, 8, 4),
    )
    monkeypatch.setattr(pipeline, "QUICK", dataclasses.replace(QUICK, network=narrow))
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
    original = training_chain.train

    def train(model, *args, **kwargs):
        trained.append(kwargs["output_dir"].name)
        assert args[1].iterations == args[1].batch_size == 2
        return original(model, *args, **kwargs)

    fitted, evaluated, found = [], {}, {}
    fit, evaluate = study_concept_mask.fit_concepts, study_concept_mask.evaluate_concepts

    def fit_concepts(model, test):
        fitted.append((model.attention_sizes, len(test.records)))
        return fit(model, test)

    def evaluate_concepts(model, test, *, kind, segment, description):
        setting = description.removesuffix(": evaluation")
        theta = model.theta_unseen.item() if model.stage == 3 else None
        evaluated[setting] = (model.stage, kind, segment, len(test.records), theta)
        found[setting] = evaluate(model, test, kind=kind, segment=segment)["concepts"].values()
        return {"concepts": dict(enumerate(found[setting]))}

    monkeypatch.setattr(training_chain, "train", train)
    monkeypatch.setattr(study_concept_mask, "fit_concepts", fit_concepts)
    monkeypatch.setattr(study_concept_mask, "evaluate_concepts", evaluate_concepts)
    lines = []
    rows = run_study(StudyOptions(**tiny), lines.append)
    assert [row["setting"] for row in rows] == list(SETTINGS)
    assert trained == [
        "embedding",
        "embedding_final_relu",
        "refinement",
        "refinement_discrimination_0",
        "refinement_discrimination_1",
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
    # Each model of stage 3 is fitted once, on a tenth of the training images.
    assert fitted == [((64, 128), 2), ((64, 64), 2)]
    theta = evaluated["segmentation"][-1]
    assert evaluated == {
        "original": (1, "own", False, 3, None),
        "original_final_relu": (1, "own", False, 3, None),
        "finetuned": (2, "initial", False, 3, None),
        "refined_no_negatives": (2, "own", False, 3, None),
        "refined": (2, "own", False, 3, None),
        "refined_weight_1": (2, "own", False, 3, None),
        "segmentation": (3, "blended", True, 3, theta),
        "one_size": (3, "blended", True, 3, evaluated["one_size"][-1]),
        "no_blending": (3, "own", True, 3, theta),
        "thresholded_attention": (3, "blended", False, 3, theta),
    }
    for setting, measure, levels in (
        ("refined", "pointing_boxed", ("mask", "box")),
        ("refined", "soft_iou_boxed", ("mask", "box")),
        ("refined", "soft_iou_image", ("image",)),
        ("segmentation", "iou_image", ("image",)),
    ):
        name = measure.rsplit("_", 1)[0]
        values = [each[name] for each in found[setting] if each["level"] in levels]
        assert by_setting[setting][measure] == [pytest.approx(sum(values) / len(values), abs=1e-4)]
    assert "| finetuned above original: pointing, boxed |" in lines[-1]
    assert run_study(StudyOptions(**tiny), lines.append) == rows
    assert len(trained) == 7


def test_an_unknown_setting_is_refused(tiny):
    with pytest.raises(ValueError, match=r"Setting 'deeplab' is not known.*refined_no_negatives"):
        run_study(StudyOptions(**tiny | {"settings": ("deeplab",)}), print)


@pytest.fixture
def own(tiny, tmp_path):
    return tiny | frozen_options(tmp_path, masks_for="drawn", count=10)


def test_own_data_on_one_frozen_backbone(own):
    """All is boxed at least, so no map is of tags alone or unseen; features are made once."""
    settings = ("original", "refined", "segmentation")
    rows = run_study(StudyOptions(**own | {"settings": settings}), print)
    maps, refined, masks = (row.keys() - {"setting"} for row in rows)
    assert maps == refined == {"pointing_boxed", "soft_iou_boxed"}
    assert masks == {"iou_mask", "iou_box"}
    seed = own["output"] / "seed_0"
    drawn = {path.parent.name for path in seed.rglob("row.png")}
    assert drawn == {"truth", "segmentation"}  # maps alone are no masks
    assert not (seed / "scenes").exists()
    run = json.loads((seed / "refined" / "result.json").read_text())["run"]
    assert (run["network"]["attention_sizes"], run["frozen"]) == ([24, 48], True)
    (features,) = (seed / "shared" / "features").iterdir()
    made = set(features.iterdir())
    run_study(StudyOptions(**own | {"settings": (*settings, "refined_no_negatives")}), print)
    assert set(features.iterdir()) == made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coco_train": None, "coco_val": None}, "masks_for has no meaning for generated scenes"),
        ({"pretrained": False}, "frozen keeps the backbone as it is"),
        ({"light": True}, "light has no meaning for a study of concept_mask"),
    ],
)
def test_options_that_do_not_go_together_are_refused(own, changes, words):
    with pytest.raises(ValueError, match=words):
        run_study(StudyOptions(**own | changes), print)
    assert not own["output"].exists()
