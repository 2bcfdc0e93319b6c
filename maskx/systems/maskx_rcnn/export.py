"""The mask branch of a trained detector as a network: image, boxes and classes in, masks out."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from maskx.engine.model_export import Exportable, example_image
from maskx.systems.maskx_rcnn.mask_head import class_logits
from maskx.systems.maskx_rcnn.weight_transfer import WeightTransfer


class _FixedPredictor(nn.Module):
    """A mask predictor whose 1x1 weights, one row per class, are constants."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, features: Tensor, class_indices: Tensor, detector: None) -> Tensor:
        return class_logits(features, self.weights[class_indices])


class _BoxMasks(nn.Module):
    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        detector = model.detector
        heads, transform = detector.roi_heads, detector.transform
        self.backbone, self.pool = detector.backbone, heads.mask_roi_pool
        self.mask_head = copy.deepcopy(heads.mask_head)
        if isinstance(heads.mask_head.predictor, WeightTransfer):
            every_class = torch.arange(num_classes)
            with torch.no_grad():
                weights = WeightTransfer.forward(
                    heads.mask_head.predictor, every_class, heads.detector_weights()
                )
            self.mask_head.predictor = _FixedPredictor(weights)
        self.divisor = transform.size_divisible
        for name, values in (("mean", transform.image_mean), ("std", transform.image_std)):
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None])

    def forward(self, image: Tensor, boxes: Tensor, class_indices: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        padding = (0, -width % self.divisor, 0, -height % self.divisor)
        features = self.backbone(F.pad((image - self.mean) / self.std, padding))
        return self.mask_head(self._pooled(features, boxes), class_indices, None).sigmoid()

    def _pooled(self, features: dict[str, Tensor], boxes: Tensor) -> Tensor:
        """Pool each box from its level; from every level, of which one is then chosen.

        No number of boxes follows from another then.
        """
        pool = self.pool
        rois = F.pad(boxes, (1, 0))  # all of image 0
        levels = pool.map_levels([boxes])[:, None, None, None]
        pooled = None
        for level, (name, scale) in enumerate(zip(pool.featmap_names, pool.scales, strict=True)):
            found = roi_align(features[name], rois, pool.output_size, scale, pool.sampling_ratio)
            pooled = found if pooled is None else torch.where(levels == level, found, pooled)
        return pooled


def exportable(model: nn.Module, class_names: Sequence[str]) -> Exportable:
    """Describe the mask branch of a trained detector; it segments objects whose boxes are known.

    The weights that the transfer predicts of the detector's are constants in it.

    Args:
        model: a :class:`maskx.systems.maskx_rcnn.torchvision.SampleDetector` in evaluation mode.
        class_names: by class index.

    Raises:
        ValueError: the model makes no masks, or is Detectron2's.
    """
    if not hasattr(model, "detector"):
        raise ValueError(
            "The model cannot be exported: it is a detector of Detectron2, whose own "
            "tools/deploy/export_model.py exports such."
        )
    if not hasattr(model.detector.roi_heads, "mask_head"):
        raise ValueError(
            "The model cannot be exported: it finds boxes and makes no masks. Give a run whose "
            "model has a mask branch."
        )
    shorter, longer = model.sizes
    image = example_image()
    boxes = torch.tensor([[4.0, 5, 60, 50], [9, 7, 30, 70], [20, 10, 100, 40]])
    classes = torch.zeros(len(boxes), dtype=torch.int64)
    if model.detector.roi_heads.mask_roi_pool.scales is None:  # follow from the first image
        sample = {"image": image[0].to(torch.uint8), "height": 75, "width": 107}
        with torch.no_grad():
            model([sample | {"given_boxes": boxes, "given_classes": classes}])
    network = _BoxMasks(model, len(class_names)).eval()
    return Exportable(
        network=network,
        inputs={"image": image, "boxes": boxes, "class_indices": classes},
        dynamic={
            "image": {2: "height", 3: "width"},
            "boxes": {0: "boxes"},
            "class_indices": {0: "boxes"},
        },
        outputs={"masks": "(boxes, M, M) float32, probability in M x M cells of each box"},
        class_names=tuple(class_names),
        about={
            "boxes": "x0, y0, x1, y1 in pixels of the image as it is given",
            "image_size": f"resize images so that the shorter side has {shorter} pixels, but the "
            f"longer one {longer} at most",
        },
    )
