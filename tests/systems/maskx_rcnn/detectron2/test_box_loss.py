"""Detectron2's host: objects without a mask teach the mask branch by their boxes."""

import pytest
import torch
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.utils.events import EventStorage
from torch import nn

from maskx.systems.maskx_rcnn.weak_losses import BoxMaskLoss


@ROI_MASK_HEAD_REGISTRY.register()
class HeadOfAnotherKind(nn.Module):
    """Takes what the RoI heads give, but computes no mask logits."""

    def __init__(self, cfg, input_shape):
        super().__init__()

    def forward(self, features, instances, detector):
        return {}


ON = ("MODEL.MASKX.BOX_LOSS.WEIGHT", 1.0)
# Both losses of objects without a mask; what random weights make is of no quality.
EACH_LOSS = pytest.mark.parametrize(
    ("name", "opts"),
    [
        ("loss_mask_box", ON),
        (
            "loss_mask_ema",
            ("MODEL.MASKX.EMA_TEACHER.WEIGHT", 1.0, "MODEL.MASKX.EMA_TEACHER.MIN_QUALITY", 0.0),
        ),
    ],
)
MIXED = ([True, False, False], [False, False])


def losses_of(model, batch):
    torch.manual_seed(0)  # proposals are sampled at random
    with EventStorage():
        return model(batch)


@pytest.mark.parametrize("gt_boxes_only", [False, True])
def test_the_loss_is_that_of_the_rois_without_a_mask(
    make_model, make_sample, monkeypatch, gt_boxes_only
):
    model = make_model(
        *ON, "MODEL.MASKX.MAX_BOX_ROIS", 2, "MODEL.MASKX.GT_BOXES_ONLY", gt_boxes_only
    )
    seen = {}
    forward = BoxMaskLoss.forward

    def record(self, mask_logits, rois, boxes, images):
        seen.update(logits=mask_logits, rois=rois, boxes=boxes, images=images)
        return forward(self, mask_logits, rois, boxes, images)

    monkeypatch.setattr(BoxMaskLoss, "forward", record)
    batch = [make_sample(has_mask) for has_mask in MIXED]
    losses = losses_of(model, batch)
    assert losses["loss_mask_box"] > 0
    assert len(seen["logits"]) == len(seen["boxes"]) == sum(map(len, seen["rois"]))
    assert all(0 < len(x) <= 2 for x in seen["rois"])
    start = 0
    for sample, rois in zip(batch, seen["rois"], strict=True):
        instances = sample["instances"]
        only_boxes = instances.gt_boxes.tensor[~instances.gt_has_mask.bool()]
        own = seen["boxes"][start : start + len(rois)]
        assert all((only_boxes == box).all(dim=1).any() for box in own)
        if gt_boxes_only:
            assert torch.equal(rois, own)
        start += len(rois)


def test_colours_are_those_of_the_image(make_model, make_sample, monkeypatch):
    """Whatever order and normalisation the host gives its model."""
    model = make_model(*ON)
    seen = []
    monkeypatch.setattr(
        "maskx.systems.maskx_rcnn.weak_losses.roi_colours",
        lambda images, boxes, size: (
            seen.append(images) or images.new_zeros(sum(map(len, boxes)), 3, size, size)
        ),
    )
    sample = make_sample([False, False])
    losses_of(model, [sample])
    rgb = sample["image"].flip(0) / 255  # samples are BGR
    height, width = rgb.shape[-2:]
    torch.testing.assert_close(seen[0][0, :, :height, :width], rgb, atol=1e-5, rtol=0)


@EACH_LOSS
@pytest.mark.parametrize("kind", ["masked", "no objects"])
def test_without_objects_to_learn_from_it_is_zero_with_a_graph(
    make_model, make_sample, kind, name, opts
):
    model = make_model(*opts)
    losses = losses_of(model, [make_sample([True, True] if kind == "masked" else [])])
    assert losses[name] == 0
    losses[name].backward()
    head = dict(model.roi_heads.mask_head.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.values())


@EACH_LOSS
def test_it_changes_no_other_loss_and_is_off_by_default(make_model, make_sample, name, opts):
    batch = [make_sample(has_mask) for has_mask in MIXED]
    plain, boxed = make_model(), make_model(*opts)
    boxed.load_state_dict(plain.state_dict(), strict=False)
    expected, losses = losses_of(plain, batch), losses_of(boxed, batch)
    assert set(losses) - set(expected) == {name}
    for other, value in expected.items():
        torch.testing.assert_close(losses[other], value)


def test_a_mask_head_without_a_box_loss_is_refused(make_model):
    with pytest.raises(ValueError, match=r"HeadOfAnotherKind.*BOX_LOSS\.WEIGHT 0"):
        make_model(*ON, "MODEL.ROI_MASK_HEAD.NAME", "HeadOfAnotherKind")
