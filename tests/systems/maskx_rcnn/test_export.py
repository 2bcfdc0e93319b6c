"""The mask branch of a trained Mask^X R-CNN as a program that needs no maskx."""

import numpy as np
import pytest
import torch
from exported import export_or_skip, some_images

import maskx
from maskx.data.scenes.generator import generate_scenes
from maskx.engine.options import QuickstartOptions
from maskx.systems.maskx_rcnn.pipeline import quickstart_maskx

SIZES = ((64, 64), (64, 75), (97, 64), (128, 64))  # those that the model sees images at


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    file = generate_scenes(folder, count=8, size=64, num_categories=4, seed=0)
    options = QuickstartOptions(
        output=tmp_path_factory.mktemp("run") / "run",
        iterations=2,
        batch_size=2,
        image_size=64,
        coco_train=(str(file), str(folder)),
        coco_val=(str(file), str(folder)),
        device="cpu",
    )
    quickstart_maskx(options, lambda line: None)
    return options.output


@pytest.fixture
def predictor(run):
    return maskx.open_run(run, device="cpu")


def some_boxes(number, size, num_classes):
    """Boxes of all scales in an image, and their classes."""
    random = np.random.RandomState(number)
    corners = random.rand(number, 2, 2) * [size[1], size[0]]
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1) + 1], axis=1)
    return torch.tensor(boxes, dtype=torch.float32), torch.tensor(
        random.randint(num_classes, size=number), dtype=torch.int64
    )


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_the_program_predicts_what_the_run_does(run, predictor, tmp_path, ending, monkeypatch):
    with torch.no_grad():  # hardly trained masks are grey
        predictor.model.detector.roi_heads.mask_head.predictor.layers[-1].weight.mul_(200)
    monkeypatch.setattr(maskx, "open_run", lambda *args, **options: predictor)
    program, said = export_or_skip(run, tmp_path / f"model{ending}")
    names = predictor.class_names
    assert said["class_names"] == list(names)
    assert said["inputs"]["boxes"] == ["boxes", 4]
    assert "shorter side has 64 pixels, but the longer one 128" in said["about"]["image_size"]
    numbers = ((0, 1, 2), (1,), (5,), (100,))
    for (image, pixels), of_image in zip(some_images(SIZES), numbers, strict=True):
        for number in of_image:
            boxes, classes = some_boxes(number, image.shape[-2:], len(names))
            found = program(image, boxes, classes)
            found = found if isinstance(found, torch.Tensor) else found[0]
            asked = predictor.masks_of_boxes(pixels, boxes, [names[i] for i in classes])
            assert found.shape == (number, 28, 28)
            torch.testing.assert_close(found, asked.mask_prob, atol=1e-4, rtol=0)
    assert found.std(dim=0).mean() > 0.02  # so that boxes and classes make a difference


def test_a_detector_without_masks_is_refused(predictor):
    del predictor.model.detector.roi_heads.mask_head
    with pytest.raises(ValueError, match="cannot be exported: it finds boxes and makes no masks"):
        predictor.system.exportable(predictor.model, predictor.class_names)
