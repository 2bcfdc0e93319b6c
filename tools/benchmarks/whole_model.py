"""What tools/benchmark.py measures with Detectron2: a training step of the whole model.

Mask^X R-CNN without the MLP branch against Detectron2's own Mask R-CNN, whose mask head computes
the logits of every class. :func:`benchmarks.mask_head.count_predictor` counts what that means.
"""

from collections.abc import Callable
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from benchmarks.mask_head import count_predictor
from benchmarks.measure import Case, num_parameters
from maskx.detectron2.config import get_cfg

__all__ = ["benchmark_cfg", "make_batch", "model_cases"]

# Objects in a row of the grid, and how much of its cell an object's box takes. Ground-truth boxes
# join the proposals, so these 144 alone fill the 128 places for foreground RoIs of an image.
_GRID, _EXTENT = 12, 0.9


def benchmark_cfg(config_file: Path, *, num_classes: int, device: torch.device) -> CfgNode:
    """Read a configuration of Mask^X R-CNN for random weights.

    Args:
        config_file: the recipe.
        num_classes: K.
        device: where to run.
    """
    cfg = get_cfg()
    cfg.merge_from_file(str(config_file))
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.PIXEL_STD = [58.0, 58.0, 58.0]  # there are no ImageNet weights that expect 1
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.DEVICE = str(device)
    return cfg


def model_cases(
    cfg: CfgNode, *, image_size: int, training: bool = True, amp: bool = False
) -> list[Case]:
    """Make steps of Detectron2's Mask R-CNN, the reference, and of Mask^X R-CNN.

    The two have the same weights but for the mask predictor, see the same image, and sample the
    same RoIs. All classes have masks, so both mask heads get the same RoIs.

    Args:
        cfg: of Mask^X R-CNN.
        image_size: height and width of the image in pixels.
        training: or inference, in which every model has 100 detections with masks.
        amp: whether in half precision where PyTorch's autocast says so.
    """
    cfg = cfg.clone()
    if not training:
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    reference_cfg = cfg.clone()
    reference_cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    reference_cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    reference_cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    torch.manual_seed(0)
    reference, model = build_model(reference_cfg), build_model(cfg)
    _copy_shared_weights(reference, model)

    batch = make_batch(image_size, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return [
        Case(
            name,
            _step(built.train(training), batch, amp=amp),
            num_parameters(built),
            {
                "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
                "image_size": image_size,
                "training": training,
                "amp": amp,
                "detectron2": detectron2.__version__,
                **_count(cfg, gathered=built is model),
            },
        )
        for name, built in (("Detectron2 Mask R-CNN", reference), ("Mask^X R-CNN", model))
    ]


def make_batch(image_size: int, num_classes: int) -> list[dict]:
    """Make one image of noise with a 12 x 12 grid of objects, all of which have masks.

    Args:
        image_size: height and width in pixels.
        num_classes: K; the objects have successive classes.
    """
    cell = image_size / _GRID
    index = torch.arange(_GRID**2)
    corner = torch.stack([index % _GRID, index // _GRID], dim=1) * cell
    boxes = torch.cat([corner, corner + _EXTENT * cell], dim=1)
    # A diamond that touches its box on every side.
    (x0, y0, x1, y1), (x, y) = boxes.T, ((boxes[:, :2] + boxes[:, 2:]) / 2).T
    polygons = torch.stack([x, y0, x1, y, x, y1, x0, y], dim=1).double().numpy()

    instances = Instances((image_size, image_size))
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = index % num_classes
    instances.gt_masks = PolygonMasks([[polygon] for polygon in polygons])
    instances.gt_has_mask = torch.ones(len(boxes), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, image_size, image_size), generator=generator).float()
    return [{"image": image, "height": image_size, "width": image_size, "instances": instances}]


def _count(cfg: CfgNode, *, gathered: bool) -> dict[str, int]:
    heads, mask_head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_MASK_HEAD
    return count_predictor(
        num_rois=int(heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION),
        num_classes=heads.NUM_CLASSES,
        gathered=gathered,
        transfer=gathered,
        channels=mask_head.CONV_DIM,
        mask_size=2 * mask_head.POOLER_RESOLUTION,
        input_channels=5 * cfg.MODEL.ROI_BOX_HEAD.FC_DIM,
    )


def _copy_shared_weights(source: nn.Module, target: nn.Module) -> None:
    found = target.load_state_dict(source.state_dict(), strict=False)
    differing = {*found.missing_keys, *found.unexpected_keys}
    assert all(key.startswith("roi_heads.mask_head.") for key in differing), differing


def _step(model: nn.Module, batch: list[dict], *, amp: bool) -> Callable[[], object]:
    device = model.device.type

    def train() -> dict:
        torch.manual_seed(0)  # RoIs are sampled at random
        with EventStorage(), torch.autocast(device, enabled=amp):
            losses = model(batch)
        sum(losses.values()).backward()
        model.zero_grad()
        return {name: loss.item() for name, loss in losses.items()}

    def infer() -> list:
        with torch.inference_mode(), torch.autocast(device, enabled=amp):
            return model(batch)

    return train if model.training else infer
