"""Every system on a frozen backbone whose features are kept."""

import json

import pytest
from photos import make_photos, make_weights

import maskx.systems  # noqa: F401 - registers them
from maskx.engine.options import QuickstartOptions
from maskx.engine.system import find_system


@pytest.fixture
def run(tmp_path):
    """Runs a quick start of few steps in a folder; returns the losses of its trainings."""
    photos = make_photos(tmp_path / "photos", count=6)
    val = make_photos(tmp_path / "val", count=2, with_masks=4, seed=1)
    weights = make_weights(tmp_path / "weights.pth")

    def start(system, folder, **options):
        options = QuickstartOptions(
            tmp_path / folder,
            iterations=1,
            batch_size=2,
            coco_train=photos,
            coco_val=val,
            masks_for=None if system == "class_patterns" else "drawn",
            backbone="resnet10t",
            pretrained=weights,
            frozen=True,
            image_size=64,
            device="cpu",
            **options,
        )
        find_system(system).pipeline(options, lambda line: None)
        files = sorted((tmp_path / folder).glob("*/losses.csv"))
        return {file.parent.name: file.read_text() for file in files}

    return start


@pytest.mark.parametrize("system", ["class_patterns", "transfernet", "larvseg", "concept_mask"])
def test_kept_features_change_no_loss(system, run, tmp_path):
    kept = run(system, "kept")
    (features,) = (tmp_path / "kept" / "features").iterdir()
    assert len(list(features.glob("*.safetensors"))) >= 4
    assert "resnet10t" in json.loads((features / "features.json").read_text())["backbone"]
    assert run(system, "none", feature_cache=0) == kept
    assert not (tmp_path / "none" / "features").exists()
