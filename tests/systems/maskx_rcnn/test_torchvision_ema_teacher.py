"""Torchvision's host: a moving average of the model makes masks of objects without one.

What it has in common with the box loss is in test_torchvision_box_loss.py.
"""

import copy

import numpy as np
import pytest
import torch

from maskx.engine.training import TrainingSettings, train
from maskx.systems.maskx_rcnn.samples import InstanceMapper, masks_of_boxes
from maskx.systems.maskx_rcnn.weak_losses import EMATeacher

TAUGHT = {"min_quality": 0.0}  # what random weights make is not good


def make_samples(scenes, classes_with_masks):
    mapper = InstanceMapper(classes_with_masks, flip=False)
    return [mapper(scenes.records[i], np.random.RandomState(0)) for i in (0, 1)]


def losses_of(model, samples):
    torch.manual_seed(0)  # the sampling of proposals
    return model.train()(samples)


@pytest.fixture
def recorded(monkeypatch):
    """What the losses of teachers were computed of."""
    seen, forward = [], EMATeacher.forward

    def record(self, mask_logits, teacher_logits, rois, boxes):
        seen.append((mask_logits, teacher_logits, rois, boxes))
        return forward(self, mask_logits, teacher_logits, rois, boxes)

    monkeypatch.setattr(EMATeacher, "forward", record)
    return seen


def test_the_teacher_sees_the_boxes_of_objects_without_a_mask(
    make_detector, scenes, split, recorded
):
    model = make_detector(gt_boxes_only=True, ema_teacher=TAUGHT, max_box_rois=2)
    samples = make_samples(scenes, split.indices_with_masks)
    assert losses_of(model, samples)["loss_mask_ema"] > 0
    ((_, teacher_logits, rois, boxes),) = recorded
    instances = [sample["instances"] for sample in samples]
    expected = torch.cat([x["gt_boxes"][~x["gt_has_mask"]][:2] for x in instances])
    assert torch.equal(boxes, expected)
    assert torch.equal(rois, boxes)
    assert not teacher_logits.requires_grad
    # At the first step the average is the model itself, in evaluation.
    expected = []
    for sample, x in zip(samples, instances, strict=True):
        chosen = (~x["gt_has_mask"]).nonzero()[:2, 0]
        boxes, classes = x["gt_boxes"][chosen], x["gt_classes"][chosen]
        expected.append(masks_of_boxes(model.eval(), sample, boxes, classes).mask_prob)
    torch.testing.assert_close(teacher_logits.sigmoid(), torch.cat(expected))


def test_of_proposals_the_teacher_sees_the_boxes_of_their_objects(
    make_detector, scenes, split, recorded
):
    model = make_detector(ema_teacher=TAUGHT)
    samples = make_samples(scenes, split.indices_with_masks)
    losses_of(model, samples)
    ((mask_logits, teacher_logits, rois, boxes),) = recorded
    assert len(mask_logits) == len(teacher_logits) == len(rois) == len(boxes) > 2
    only_boxes = torch.cat([s["instances"]["gt_boxes"] for s in samples])
    assert all((only_boxes == box).all(dim=1).any() for box in boxes)
    assert not torch.equal(rois, boxes)


def test_of_a_frozen_detector_the_mask_head_alone_is_averaged(make_detector, scenes, split):
    model = make_detector(freeze_detector=True, ema_teacher=TAUGHT)
    losses = losses_of(model, make_samples(scenes, split.indices_with_masks))
    assert set(losses) == {"loss_mask", "loss_mask_ema"}
    assert losses["loss_mask_ema"] > 0
    names = [n for n, _ in model.named_parameters() if ".ema_teacher." in n]
    assert names
    assert all(".mask_head." in name for name in names)


def test_the_teacher_lags_behind_the_model(make_detector, scenes, split, recorded):
    model = make_detector(gt_boxes_only=True, ema_teacher=TAUGHT | {"decay": 0.9})
    samples = make_samples(scenes, split.indices_with_masks)
    losses_of(model, samples)
    with torch.no_grad():
        for layer in ("backbone", "roi_heads.mask_head", "roi_heads.box_predictor"):
            for parameter in model.detector.get_submodule(layer).parameters():
                parameter *= 1.5
    losses_of(model, samples)
    (_, first, *_), (mask_logits, teacher_logits, *_) = recorded
    far = (mask_logits - first).abs().mean()
    assert 0 < (teacher_logits - first).abs().mean() < 0.5 * far


def test_a_copied_detector_has_a_teacher_of_its_own(make_detector, scenes, split):
    model = make_detector(ema_teacher=TAUGHT)
    copied = copy.deepcopy(model)
    samples = make_samples(scenes, split.indices_with_masks)
    losses_of(copied, samples)
    assert copied.detector.roi_heads.ema_teacher.average.n_averaged == 1
    assert model.detector.roi_heads.ema_teacher.average.n_averaged == 0
    with torch.no_grad():
        for parameter in copied.detector.backbone.parameters():
            parameter.zero_()
    averaged = copied.detector.roi_heads.ema_teacher.updated()["backbone"]
    weight = next(averaged.parameters())
    torch.testing.assert_close(weight, 0.999 * next(model.detector.backbone.parameters()))


@pytest.mark.parametrize("number", [0, -3])
def test_a_number_of_rois_below_1_is_refused(make_detector, number):
    with pytest.raises(ValueError, match=rf"MAX_BOX_ROIS.*{number}.*1 or more"):
        make_detector(ema_teacher={}, max_box_rois=number)


def test_an_interrupted_run_ends_with_the_same_bits(make_detector, scenes, split, tmp_path):
    settings = TrainingSettings(iterations=4, batch_size=2, learning_rate=0.01, checkpoint_every=1)
    samples = make_samples(scenes, split.indices_with_masks)

    def run(name, stop, resume=False):
        def batches(start, stop=stop):
            yield from [samples] * (min(stop, end) - start)

        end, model = stop, make_detector(ema_teacher=TAUGHT)
        train(model, batches, settings, output_dir=tmp_path / name, resume=resume)
        return model.state_dict()

    whole = run("whole", 4)
    run("parts", 2)
    resumed = run("parts", 4, resume=True)
    assert any(".ema_teacher.average.module.backbone." in name for name in whole)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
