"""One of two CPU processes that train together; on rank 1 there is no mask."""

import os

import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from settings import TINY_DETECTOR, pairs
from two_ranks import mean_gradient, train_together

from maskx.core.global_mean import means_per_process
from maskx.detectron2 import get_cfg

# Few layers: what rounding makes of a gradient grows with them.
SHALLOW = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
CONFIG = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "MaskX")


def make_batch(rank, has_objects):
    instances = Instances((64, 64))
    count = 2 if has_objects else 0
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 60]])[:count])
    instances.gt_classes = torch.arange(count)
    instances.gt_has_mask = torch.full((count,), rank == 0)
    instances.gt_masks = BitMasks(torch.rand(count, 64, 64) > 0.5)
    return [{"image": torch.rand(3, 64, 64) * 255, "instances": instances}]


def make_model(*opts):
    cfg = get_cfg()
    cfg.merge_from_file(
        os.path.join(CONFIG, "voc2nonvoc", "e2e", "clsbox_2_layer_mlp_R_50_FPN_1x.yaml")
    )
    cfg.merge_from_list([*pairs(TINY_DETECTOR | SHALLOW), *opts])
    torch.manual_seed(0)
    return build_model(cfg).train()


def compare_with_one_process(rank):
    """The mask loss of 2 and of 0 masks has the gradient that one process has of both images."""
    model = make_model("MODEL.MASKX.GT_BOXES_ONLY", True)
    parameters = list(model.roi_heads.mask_head.parameters())
    batches = []
    for index in range(2):
        torch.manual_seed(index)
        batches.append(make_batch(index, has_objects=True))
    with EventStorage():
        found = mean_gradient(model(batches[rank])["loss_mask"], parameters)
        with means_per_process():
            loss = model([*batches[0], *batches[1]])["loss_mask"]
            expected = mean_gradient(loss, parameters)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def take_steps(rank):
    model = make_model()

    def check(losses):
        assert (losses["loss_mask"] > 0) == (rank == 0)

    torch.manual_seed(rank)
    with EventStorage():
        # In the second step rank 1 sees no object at all.
        train_together(model, [make_batch(rank, x) for x in (True, rank == 0)], check)


def work(rank):
    compare_with_one_process(rank)
    take_steps(rank)
