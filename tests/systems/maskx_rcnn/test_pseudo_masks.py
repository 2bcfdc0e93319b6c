"""Masks that nobody drew teach as much as they are probably worth."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maskx.systems.maskx_rcnn.mask_head import mask_loss
from maskx.systems.maskx_rcnn.samples import InstanceMapper, pseudo_masks_line


def made_by_a_teacher(record, quality=0.25):
    """The record, all of whose masks nobody drew."""
    record = copy.deepcopy(record)
    for annotation in record["annotations"]:
        annotation |= {"segmentation_source": "grabcut", "segmentation_quality": quality}
    return record


def instances_of(record, classes_with_masks, **arguments):
    mapper = InstanceMapper(classes_with_masks, **arguments)
    return mapper(record, np.random.RandomState(0))["instances"]


@pytest.mark.parametrize(("pseudo_weight", "expected"), [("quality", 0.25), ("one", 1.0)])
def test_their_weight_is_their_quality_and_they_are_withheld_of_no_category(
    scenes, split, pseudo_weight, expected
):
    classes = split.indices_with_masks
    drawn = instances_of(scenes.records[0], classes)
    assert drawn["gt_mask_weight"].tolist() == [float(c in classes) for c in drawn["gt_classes"]]
    made = instances_of(made_by_a_teacher(scenes.records[0]), classes, pseudo_weight=pseudo_weight)
    assert made["gt_has_mask"].all()
    assert not drawn["gt_has_mask"].all()
    assert (made["gt_mask_weight"] == expected).all()
    assert made["gt_masks"].flatten(1).any(1).all()


def test_without_quality_they_are_no_masks(scenes):
    found = instances_of(made_by_a_teacher(scenes.records[0], 0.0), range(8))
    assert not found["gt_has_mask"].any()
    assert not found["gt_masks"].any()


def test_another_weight_is_refused():
    with pytest.raises(ValueError, match=r"pseudo_weight.*quality.*'half'"):
        InstanceMapper((), pseudo_weight="half")


def test_the_loss_is_the_weighted_sum_over_the_number_of_rois():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 4, generator=generator, requires_grad=True)
    targets = torch.rand(3, 4, 4, generator=generator) > 0.5
    weights = torch.tensor([1.0, 0.5, 0.0])
    loss = mask_loss(logits, targets, weights)
    each = [
        F.binary_cross_entropy_with_logits(x, t.float())
        for x, t in zip(logits, targets, strict=True)
    ]
    torch.testing.assert_close(loss, (each[0] + each[1] / 2) / 3)
    loss.backward()
    assert not logits.grad[2].any()
    none = mask_loss(logits[:0], targets[:0], weights[:0])
    assert none == 0
    assert none.requires_grad
    torch.testing.assert_close(mask_loss(logits, targets), sum(each) / 3)


def test_the_detector_weighs_them(make_detector, scenes):
    model = make_detector(gt_boxes_only=True).train()

    def loss_of(record):
        torch.manual_seed(0)
        sample = InstanceMapper(range(8), flip=False)(record, np.random.RandomState(0))
        return model([sample])["loss_mask"]

    drawn, made = loss_of(scenes.records[0]), loss_of(made_by_a_teacher(scenes.records[0], 0.25))
    torch.testing.assert_close(made, drawn / 4)


def test_what_made_them_is_said(scenes):
    assert pseudo_masks_line(scenes.records) is None
    records = [made_by_a_teacher(scenes.records[0], 0.5), scenes.records[1]]
    count = len(records[0]["annotations"])
    assert f"{count} by grabcut (mean quality 0.50)" in pseudo_masks_line(records)
