"""One of two CPU processes that train together; on rank 1 there is no mask.

test_roi_heads.py calls ``run`` for rank 0 and runs ``two_processes.py 1 <port>`` beside it.
"""

import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from maskx.detectron2 import get_cfg

CONFIG = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "MaskX")
TINY = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.NORM", "GN", "MODEL.PIXEL_STD", [58.0, 58.0, 58.0]),
    *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 24),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 4, "MODEL.ROI_HEADS.NUM_CLASSES", 4),
)


def make_batch(rank, has_objects):
    instances = Instances((64, 64))
    count = 2 if has_objects else 0
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 60]])[:count])
    instances.gt_classes = torch.arange(count)
    instances.gt_has_mask = torch.full((count,), rank == 0)
    instances.gt_masks = BitMasks(torch.rand(count, 64, 64) > 0.5)
    return [{"image": torch.rand(3, 64, 64) * 255, "instances": instances}]


def run(rank, port):
    address, timeout = f"tcp://127.0.0.1:{port}", timedelta(seconds=180)
    dist.init_process_group("gloo", address, timeout, rank=rank, world_size=2)
    try:
        take_steps(rank)
    finally:
        dist.destroy_process_group()


def take_steps(rank):
    cfg = get_cfg()
    cfg.merge_from_file(
        os.path.join(CONFIG, "voc2nonvoc", "e2e", "clsbox_2_layer_mlp_R_50_FPN_1x.yaml")
    )
    cfg.merge_from_list(list(TINY))
    torch.manual_seed(0)
    model = build_model(cfg).train()
    # As Detectron2 wraps it: without find_unused_parameters a missing gradient is a hang.
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(rank)
    with EventStorage():
        for has_objects in (True, rank == 0):  # in the second step rank 1 sees no object at all
            losses = parallel(make_batch(rank, has_objects))
            assert (losses["loss_mask"] > 0) == (rank == 0)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            own = torch.cat([p.detach().flatten() for p in model.parameters()])
            others = [torch.empty_like(own) for _ in range(2)]
            dist.all_gather(others, own)
            assert torch.isfinite(own).all()
            assert torch.equal(*others)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(int(sys.argv[1]), int(sys.argv[2]))
    # Threads of gloo may abort the interpreter while it ends.
    os._exit(0)
