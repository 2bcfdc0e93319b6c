import json
import sys
from pathlib import Path

import numpy as np
import pytest
from photos import make_photos, make_weights
from studies import class_patterns as study_class_patterns
from studies.class_patterns import STUDY
from studies.options import StudyOptions
from studies.run import run_study

from maskx.data.coco import load_coco
from maskx.data.images import read_rgb
from maskx.data.label_maps import read_label_map, semantic_label_map
from maskx.engine import quickstart, training_chain
from maskx.engine.runs import read_run

LAYERS = ("C41", "C42", "C43")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "SPARSE_SCENES", 6)
    monkeypatch.setattr(quickstart, "VAL_SCENES", 4)
    monkeypatch.setattr(quickstart, "SCENE_SIZE", 64)
    style = {"style": "sparse", "num_categories": 4}
    monkeypatch.setattr(quickstart, "SPARSE_STYLE", style)
    monkeypatch.setattr(study_class_patterns, "_FEW_IMAGES", 1)
    monkeypatch.setattr(study_class_patterns, "_MANY_IMAGES", 4)
    monkeypatch.setattr(study_class_patterns, "_MORE_SCENES", 14)
    return {
        "output": tmp_path / "study",
        "system": "class_patterns",
        "seeds": (0,),
        "iterations": 2,
        "stage2_iterations": 1,
        "batch_size": 2,
        "device": "cpu",
    }


def test_every_kind_of_setting_is_measured_and_a_seed_shares_its_classifier(tiny, monkeypatch):
    settings = (
        "proxy/zero_ignore",
        "proxy/otsu_ignore",
        "train/C43_zero_ignore",
        "train/C41_otsu_standardised",
        "cosine",
    )
    trained = []
    original = training_chain.train

    def train(*args, output_dir, **options):
        trained.append(output_dir.name)
        return original(*args, output_dir=output_dir, **options)

    monkeypatch.setattr(training_chain, "train", train)
    lines = []
    rows = run_study(StudyOptions(**tiny, settings=settings), lines.append)
    by_setting = {row["setting"]: row for row in rows}
    proxy = {f"{name}_{layer}" for name in ("proxy", "decided", "undecided") for layer in LAYERS}
    for setting in settings[:2]:
        assert by_setting[setting].keys() == {"setting", *proxy}
    for setting in settings[2:4]:
        assert by_setting[setting].keys() == {"setting", "trained", "retrained"}
    assert trained == ["classifier", *["segmenter", "retrained"] * 2]

    cosines = {f"{name}_{layer}" for name in ("cosine", "lowest_cosine") for layer in LAYERS}
    assert by_setting["cosine"].keys() == {"setting", *cosines}
    for layer in LAYERS:
        found = by_setting["cosine"]
        mean, lowest = found[f"cosine_{layer}"][0], found[f"lowest_cosine_{layer}"][0]
        assert 0 <= lowest <= mean < 0.9999  # other images, other patterns
    text = "\n".join(lines)
    assert "| `proxy/otsu_ignore` |" in text
    assert "| proxy masks of C41, ignore: otsu above zero |" in text
    assert "CRF" not in "".join(line for line in lines if "ordering" in line)

    before = len(lines)
    assert run_study(StudyOptions(**tiny, settings=settings), lines.append) == rows
    assert len(trained) == 5
    assert len(lines) == before + 2  # the tables


def test_networks_learn_from_the_masks_that_the_setting_names(tiny):
    settings = ("train/C43_zero_ignore", "train/C41_zero_ignore")
    run_study(StudyOptions(**tiny, settings=settings), print)
    for setting in settings:
        folder = tiny["output"] / "seed_0" / setting
        for name in ("segmenter", "retrained"):
            settings_of_run = read_run(folder / name).settings
            assert settings_of_run["training"]["iterations"] == 1
            assert settings_of_run["chain"]["proxy masks"] == f"{setting[6:9]}-zero-ignore"
    with pytest.raises(ValueError, match=r"was made with .*'segmenter_iterations': 1\}"):
        run_study(StudyOptions(**tiny | {"stage2_iterations": 2}, settings=settings), print)


@pytest.fixture
def own(tiny, tmp_path):
    """Options of own data, on a frozen backbone."""
    return tiny | {
        "coco_train": make_photos(tmp_path / "photos", count=6, with_masks=4),
        "coco_val": make_photos(tmp_path / "val", count=2, with_masks=4, seed=1),
        "image_size": 48,
        "backbone": "resnet10t",
        "pretrained": make_weights(tmp_path / "weights.pth"),
        "frozen": True,
    }


def test_own_data_is_compared_with_activation_maps_and_true_masks(own):
    settings = ("proxy/otsu_standardised", "cam", "train/C41_otsu_standardised", "train/cam")
    lines = []
    options = StudyOptions(**own, settings=(*settings, "oracle"))
    rows = {row["setting"]: row.keys() - {"setting"} for row in run_study(options, lines.append)}
    trained = {"trained", "retrained"}
    assert list(rows.values()) == [
        {"proxy_C41", "decided_C41", "undecided_C41"},  # the layers of this backbone
        {"cam"},
        trained,
        trained,
        {"trained"},
    ]
    for words in ("masks of patterns of C41 above those of CAM", "trained on true masks above"):
        assert f"| {words}" in lines[-1]
    seed = options.seed_folder(0)
    assert {path.relative_to(seed).parts[0] for path in seed.rglob("features")} == {"shared"}
    rows = ("truth", "train/C41_otsu_standardised", "train/cam", "oracle")
    drawn = {path.parent.relative_to(seed).as_posix() for path in seed.rglob("row.png")}
    assert drawn == set(rows)
    assert read_rgb(options.output / "contact_sheet.png").shape[0] == 4 * (256 + 34)
    chain = {s: read_run(seed / s / "segmenter").settings["chain"] for s in ("train/cam", "oracle")}
    assert chain["train/cam"]["proxy masks"] == "cam-zero-standardised"
    assert chain["oracle"]["proxy masks"] == "oracle"
    made = seed / "shared/proxy"
    for record in load_coco(*own["coco_train"]).records:
        if record["image_labels"]:
            (file,) = (made / "projections/cam").glob(f"*{record['image_id']}.npz")
            maps = np.load(file)["projections"]
            np.testing.assert_allclose(maps.min((1, 2)) >= -0.2 - 1e-6, True)
            assert set(np.round(maps.max((1, 2)), 4)) <= {np.float32(0.8), np.float32(-0.2)}
        (file,) = (made / "masks/oracle").glob(f"*{record['image_id']}.png")
        size = record["height"], record["width"]
        found = read_label_map(file, *size, num_classes=4, image_id=record["image_id"])
        np.testing.assert_array_equal(found, semantic_label_map(record, 4))


def test_what_needs_true_masks_is_refused_without_them(own):
    path = Path(own["coco_train"][0])
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation.pop("segmentation", None)
    path.write_text(json.dumps(content))
    for setting in ("proxy/zero_ignore", "cam", "oracle"):
        with pytest.raises(ValueError, match=rf"None of the 6 training .*'{setting}' needs"):
            run_study(StudyOptions(**own, settings=(setting,)), print)


def test_settings_and_measures_are_those_of_the_backbone_and_the_data(own):
    fields = STUDY.of_options(StudyOptions(**own | {"backbone": "vgg16"}))
    assert [name for name in fields["measures"] if name.startswith("proxy_")] == [
        "proxy_conv5_1",
        "proxy_conv5_2",
        "proxy_conv5_3",
    ]
    assert "train/conv5_3_otsu_standardised" in fields["settings"]
    assert "cosine" not in fields["settings"]
    with pytest.raises(ValueError, match="'cosine' is of generated scenes"):
        run_study(StudyOptions(**own, settings=("cosine",)), print)
    with pytest.raises(ValueError, match="masks_for has no meaning for a study of class_patterns"):
        run_study(StudyOptions(**own, masks_for="all"), print)


def test_an_interrupted_training_goes_on_with_the_same_classifier(tiny, monkeypatch):
    tiny["settings"] = ("train/C41_zero_ignore",)
    whole = run_study(StudyOptions(**tiny), print)
    again = StudyOptions(**tiny | {"output": tiny["output"].parent / "again"})

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(study_class_patterns.TagRun, "predict_training_images", stop)
        with pytest.raises(KeyboardInterrupt):
            run_study(again, print)
    assert run_study(again, print) == whole


def test_too_few_images_of_a_class_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(study_class_patterns, "_MANY_IMAGES", 19)
    match = r"Only \d+ of the 20 scenes of seed 0 show '.*', but patterns from 19 images"
    with pytest.raises(ValueError, match=match):
        run_study(StudyOptions(**tiny, settings=("cosine",)), print)


@pytest.mark.parametrize(
    "setting", ["proxy/otsu", "train/otsu_ignore", "train/C40_otsu_ignore", "cosine_crf", "proxy"]
)
def test_an_unknown_setting_is_refused(tiny, setting):
    with pytest.raises(ValueError, match=rf"Setting '{setting}' is not known.*LAYER C41, C42"):
        run_study(StudyOptions(**tiny, settings=(setting,)), print)


def test_without_the_crf_its_settings_are_left_out_or_refused(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(ImportError, match=r"maskx\[crf\]|\.\[crf\]"):
        run_study(StudyOptions(**tiny, settings=("proxy/zero_ignore_crf",)), print)
    assert not tiny["output"].exists()
    monkeypatch.setattr(
        study_class_patterns._SeedRuns, "run", lambda self, setting: {"trained": 1.0}
    )
    lines = []
    rows = run_study(StudyOptions(**tiny), lines.append)
    left_out = [setting for setting in STUDY.settings if setting.endswith("_crf")]
    assert len(left_out) == 4
    assert lines[0].startswith(f"Left out: {', '.join(left_out)}. ")
    kept = [setting for setting in STUDY.settings if setting not in left_out]
    assert [row["setting"] for row in rows] == kept


def test_the_crf_refines_the_masks_of_images_with_one_label(tiny):
    pytest.importorskip("pydensecrf", reason="the extra `crf` is not installed")
    lines = []
    settings = ("proxy/otsu_ignore", "proxy/otsu_ignore_crf")
    rows = run_study(StudyOptions(**tiny, settings=settings), lines.append)
    assert rows[0]["proxy_C41"] != rows[1]["proxy_C41"]
    assert "proxy masks of C41, otsu_ignore: CRF above none" in lines[-1]
