"""Torchvision's host: images of which labels alone are known teach the detector's classes."""

import numpy as np
import pytest
import torch

from maskx.data.coco import with_labels_only
from maskx.systems.maskx_rcnn.samples import InstanceMapper


def losses_of(model, samples):
    torch.manual_seed(0)  # the sampling of proposals
    return model.train()(samples)


@pytest.fixture
def make_samples(scenes, split):
    def make(*kinds):
        mapper = InstanceMapper(split.indices_with_masks, flip=False)
        records = zip(scenes.records, kinds, strict=False)
        return [
            mapper(r if kind == "boxes" else with_labels_only(r), np.random.RandomState(0))
            for r, kind in records
        ]

    return make


def reached(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {
        name.removeprefix("detector.")
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }


def test_tags_teach_the_classifier_and_what_is_below_it_alone(make_detector, make_samples):
    model = make_detector(tag_loss_weight=0.1)
    samples = make_samples("tags", "tags")
    assert all(
        len(sample["tags"]) and not len(sample["instances"]["gt_boxes"]) for sample in samples
    )
    losses = losses_of(model, samples)
    assert losses.pop("loss_tags") > 0
    assert all(value == 0 for value in losses.values())
    names = reached(model, losses_of(model, samples)["loss_tags"])
    assert "roi_heads.box_predictor.cls_score.weight" in names
    assert any(name.startswith("backbone.") for name in names)
    for part in ("rpn.", "roi_heads.box_predictor.bbox_pred", "roi_heads.mask_head."):
        assert not any(name.startswith(part) for name in names)


def test_images_with_boxes_lose_nothing_beside_images_with_tags(make_detector, make_samples):
    plain, tagged = make_detector(), make_detector(tag_loss_weight=0.1)
    samples = make_samples("boxes", "boxes")
    expected, losses = losses_of(plain, samples), losses_of(tagged, samples)
    assert losses.pop("loss_tags") == 0
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_masks_boxes_and_tags_teach_in_one_batch(make_detector, make_samples):
    losses = losses_of(make_detector(tag_loss_weight=0.1), make_samples("boxes", "tags"))
    assert all(value > 0 for value in losses.values())
    assert {"loss_mask", "loss_box_reg", "loss_classifier", "loss_tags"} <= losses.keys()


def test_without_the_loss_images_with_tags_teach_nothing(make_detector, make_samples):
    """They are no background, though they have no box."""
    losses = losses_of(make_detector(), make_samples("tags", "tags"))
    assert all(value == 0 for value in losses.values())
