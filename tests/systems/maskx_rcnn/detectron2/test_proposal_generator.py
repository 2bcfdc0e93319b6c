import json

import pytest
import torch
from detectron2.utils.events import EventStorage
from settings import pairs

from maskx.detectron2 import Trainer, register_coco

MASKX_RPN = ("MODEL.PROPOSAL_GENERATOR.NAME", "MaskXRPN")


def incomplete(sample):
    """Say that only some classes of the image are annotated."""
    instances = sample["instances"]
    instances.gt_boxes_complete = torch.zeros(len(instances), dtype=torch.bool)
    return sample


def losses_of(model, batch):
    torch.manual_seed(0)
    with EventStorage():
        return model(batch)


def test_with_complete_boxes_the_losses_are_those_of_detectron2(make_model, make_sample):
    batch = [make_sample([True, False]), make_sample([], seed=1)]
    plain = make_model()
    ours = make_model(*MASKX_RPN)
    ours.load_state_dict(plain.state_dict())
    expected, found = losses_of(plain, batch), losses_of(ours, batch)
    assert set(found) == set(expected)
    for name, loss in expected.items():
        assert torch.equal(found[name], loss), name


@pytest.mark.parametrize("has_mask", [[True, True], []])
def test_an_incomplete_image_adds_nothing_to_the_losses_of_the_detector(
    make_model, make_sample, has_mask
):
    """The losses are those of the other image alone, whatever the incomplete one shows."""
    model = make_model(*MASKX_RPN, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 400)
    # With everything sampled, there is no chance in the losses.
    model.proposal_generator.batch_size_per_image = 10**6
    alone = losses_of(model, [make_sample([False, False])])
    batch = [make_sample([False, False]), incomplete(make_sample(has_mask, seed=3))]
    joint = losses_of(model, batch)
    for name in ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"):
        assert alone[name] > 0
        torch.testing.assert_close(joint[name], alone[name], rtol=1e-4, atol=0)
    assert alone["loss_mask"] == 0
    assert (joint["loss_mask"] > 0) == any(has_mask)


def test_a_batch_of_incomplete_images_keeps_every_parameter_in_the_graph(make_model, make_sample):
    model = make_model(*MASKX_RPN)
    losses = losses_of(model, [incomplete(make_sample([True])), incomplete(make_sample([]))])
    assert losses["loss_mask"] > 0
    for name in ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"):
        assert losses[name] == 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_other_modules_are_refused_for_incomplete_boxes(make_cfg, scenes):
    names = [c["name"] for c in json.loads(scenes[0].read_text())["categories"]]
    register_coco("incomplete", *scenes, class_names=[*names, "without annotations"])
    data = pairs(
        {
            "DATASETS.TRAIN": ("incomplete",),
            "DATASETS.TEST": ("incomplete",),
            "MODEL.ROI_HEADS.NUM_CLASSES": 5,
            "DATASETS.MASKX.SPLIT": "all",
        }
    )
    with pytest.raises(ValueError, match=r"annotates 4 of 5 classes.*Set it to MaskXRPN"):
        Trainer(make_cfg(*data))
    without_masks = ("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.MASK_ON", False)
    with pytest.raises(ValueError, match=r"ROI_HEADS.NAME StandardROIHeads .*it to MaskXROIHeads"):
        Trainer(make_cfg(*data, *MASKX_RPN, *without_masks))
    Trainer(make_cfg(*data, *MASKX_RPN))
