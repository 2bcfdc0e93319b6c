"""Torchvision's host: objects without a mask teach the mask branch by their boxes."""

import copy

import numpy as np
import pytest
import torch

from maskx.systems.maskx_rcnn.samples import InstanceMapper
from maskx.systems.maskx_rcnn.weak_losses import BoxMaskLoss

# Both losses of objects without a mask; what random weights make is of no quality.
EACH_LOSS = pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("loss_mask_box", {"box_loss": {}}),
        ("loss_mask_ema", {"ema_teacher": {"min_quality": 0.0}}),
    ],
)


def make_samples(scenes, classes_with_masks, flip=False):
    mapper = InstanceMapper(classes_with_masks, flip=flip)
    return [mapper(scenes.records[i], np.random.RandomState(0)) for i in (0, 1)]


def losses_of(model, samples):
    torch.manual_seed(0)  # the sampling of proposals
    return model.train()(samples)


@pytest.mark.parametrize("gt_boxes_only", [False, True])
def test_the_loss_is_that_of_the_rois_without_a_mask(
    make_detector, scenes, split, monkeypatch, gt_boxes_only
):
    model = make_detector(gt_boxes_only=gt_boxes_only, box_loss={"weight": 2.0}, max_box_rois=3)
    seen = {}
    forward = BoxMaskLoss.forward

    def record(self, mask_logits, rois, boxes, images):
        seen.update(logits=mask_logits, rois=rois, boxes=boxes, images=images)
        return forward(self, mask_logits, rois, boxes, images)

    monkeypatch.setattr(BoxMaskLoss, "forward", record)
    samples = make_samples(scenes, split.indices_with_masks)
    losses = losses_of(model, samples)
    assert losses["loss_mask_box"] > 0
    assert len(seen["logits"]) == len(seen["boxes"]) == sum(map(len, seen["rois"]))
    assert all(len(x) <= 3 for x in seen["rois"])
    start = 0
    for sample, rois in zip(samples, seen["rois"], strict=True):
        instances = sample["instances"]
        only_boxes = instances["gt_boxes"][~instances["gt_has_mask"]]
        for box in seen["boxes"][start : start + len(rois)]:
            assert (only_boxes == box).all(dim=1).any()
        if gt_boxes_only:
            assert torch.equal(rois, seen["boxes"][start : start + len(rois)])
        start += len(rois)
    # Of the batch that the features are of, so that a box lies on its own pixels.
    pixels = seen["images"][0] * 0.25 + 0.5
    torch.testing.assert_close(pixels, samples[0]["image"] / 255, atol=1e-5, rtol=0)


@EACH_LOSS
def test_the_loss_changes_no_other_and_reaches_what_the_mask_loss_reaches(
    make_detector, scenes, split, name, branch
):
    samples = make_samples(scenes, split.indices_with_masks)
    plain, boxed = make_detector(), make_detector(**branch)
    expected, losses = losses_of(plain, samples), losses_of(boxed, samples)
    assert set(losses) - set(expected) == {name}
    for other, value in expected.items():
        torch.testing.assert_close(losses[other], value)

    def reached(loss):
        boxed.zero_grad()
        loss.backward(retain_graph=True)
        names = boxed.named_parameters()
        return {n for n, p in names if p.grad is not None and p.grad.abs().sum() > 0}

    # Weight transfer stops the gradient to the detector's weights, for this loss too.
    assert reached(losses[name]) == reached(losses["loss_mask"])
    assert not any("ema_teacher" in parameter for parameter in reached(losses[name]))


@EACH_LOSS
@pytest.mark.parametrize("kind", ["all masks", "no objects"])
def test_without_objects_to_learn_from_it_is_zero_with_a_graph(
    make_detector, scenes, kind, name, branch
):
    model = make_detector(**branch)
    samples = make_samples(scenes, range(len(scenes.class_names)))
    if kind == "no objects":
        for sample in samples:
            sample["instances"] = {k: v[:0] for k, v in sample["instances"].items()}
    losses = losses_of(model, samples)
    assert losses[name] == 0
    losses[name].backward()
    head = [p for n, p in model.named_parameters() if "roi_heads.mask_head." in n]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head)


def test_a_frozen_detector_learns_from_boxes_too(make_detector, scenes, split):
    model = make_detector(freeze_detector=True, box_loss={})
    losses = losses_of(model, make_samples(scenes, split.indices_with_masks))
    assert set(losses) == {"loss_mask", "loss_mask_box"}
    assert losses["loss_mask_box"] > 0


def test_masks_of_objects_without_masks_come_to_fill_their_boxes(make_detector, scenes):
    """All objects have boxes alone; what is predicted in their boxes grows to touch the sides."""
    model = make_detector(predictor="class_agnostic", gt_boxes_only=True, box_loss={})
    samples = make_samples(scenes, ())
    parameters = [p for n, p in model.named_parameters() if ".mask_head." in n]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    history = []
    for _ in range(30):
        loss = losses_of(model, samples)["loss_mask_box"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.6 * history[0]


def test_a_copied_detector_reads_its_own_images(make_detector, scenes, split):
    model = make_detector(box_loss={})
    copied = copy.deepcopy(model)
    samples = make_samples(scenes, split.indices_with_masks)
    found = losses_of(copied, samples)["loss_mask_box"]
    torch.testing.assert_close(found, losses_of(model, samples)["loss_mask_box"])


def test_heads_without_images_say_what_is_missing(make_detector, scenes, split):
    model = make_detector(box_loss={})
    model.detector.transform._forward_hooks.clear()
    with pytest.raises(ValueError, match="add_mask_branch"):
        losses_of(model, make_samples(scenes, split.indices_with_masks))
