"""Trained models from run folders, asked image by image."""

import dataclasses
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from maskx.core.text import listed
from maskx.data.images import as_sample_image, read_rgb
from maskx.data.masks import PastedMasks
from maskx.engine.results import Prediction
from maskx.engine.runs import Run, read_run
from maskx.engine.system import System, find_system
from maskx.engine.training import select_device

# By host the module whose `open_model` opens a run, where that is no matter of the system.
_HOSTS = {"pip": None, "detectron2": "maskx.detectron2.runs"}

Sample = dict[str, Any]


class Predictor:
    """A trained model that is asked image by image; see :func:`open_run`."""

    def __init__(
        self, run: Run, system: System, model: nn.Module, prepare: Callable[[np.ndarray], Sample]
    ) -> None:
        self.run, self.system, self.model, self.prepare = run, system, model, prepare
        self.class_names = run.class_names

    def __call__(
        self,
        image: str | os.PathLike[str] | np.ndarray,
        order: Literal["RGB", "BGR"] = "RGB",
        **asked: Any,
    ) -> Prediction:
        """Predict an image.

        Args:
            order: of the channels of an array; OpenCV reads BGR. A file has an order of its own.
            **asked: what else the system is told of the image, such as the ``concepts`` that
                ConceptMask is to look for or the ``image_labels`` that TransferNet knows.
        """
        return self.many([image], order, **asked)[0]

    def many(
        self,
        images: Sequence[str | os.PathLike[str] | np.ndarray],
        order: Literal["RGB", "BGR"] = "RGB",
        *,
        threshold: float = 0.0,
        **asked: Any,
    ) -> list[Prediction]:
        """Predict several images at once, which must fit into memory; see a call.

        Images of one shape give what they give one by one, up to rounding.

        Args:
            threshold: least score of an instance. Masks of others are not made, which in a large
                image is most of the time.
        """
        pixels = [_pixels(image, order) for image in images]
        with torch.inference_mode():
            results = self.model([self.prepare(each) | asked for each in pixels])
        predictions = []
        for result, each in zip(results, pixels, strict=True):
            found = self.system.prediction(_above(result, threshold), self.class_names)
            found = dataclasses.replace(found, image=each, split=self.run.split)
            predictions.append(found.above(threshold))
        return predictions

    def masks_of_boxes(
        self,
        image: str | os.PathLike[str] | np.ndarray,
        boxes: Sequence[Sequence[float]] | np.ndarray,
        names: Sequence[str],
        order: Literal["RGB", "BGR"] = "RGB",
    ) -> PastedMasks:
        """Segment objects whose boxes are known.

        Args:
            image: as of a call.
            boxes: (R, 4) XYXY in pixels.
            names: class name of each.
            order: as of a call.

        Returns:
            R masks of (H, W); ``mask_prob`` are the probabilities in their boxes.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the image cannot be read, a name is none of the model's classes, or the
                model makes no masks of given boxes.
        """
        if self.system.box_masks is None:
            raise ValueError(
                f"{self.system.title} makes label maps of images, not masks of given boxes. Give "
                "a run of Mask^X R-CNN."
            )
        index_of = {name: index for index, name in enumerate(self.class_names)}
        unknown = sorted(set(names) - index_of.keys())
        if unknown:
            raise ValueError(
                f"The model does not know {listed(unknown)}. It knows {listed(self.class_names)}."
            )
        sample = self.prepare(_pixels(image, order))
        corners = torch.as_tensor(np.asarray(boxes), dtype=torch.float32).reshape(-1, 4)
        classes = torch.tensor([index_of[name] for name in names], dtype=torch.int64)
        with torch.inference_mode():
            return self.system.box_masks(self.model, sample, corners, classes)

    def similarities(
        self,
        image: str | os.PathLike[str] | np.ndarray,
        points: Sequence[tuple[int, int]],
        order: Literal["RGB", "BGR"] = "RGB",
    ) -> np.ndarray:
        """Say how alike every position of an image is to some of its pixels, for the model.

        These are the maps that the papers show: rows of the Gram matrix of TransferNet, response
        maps of LarvSeg. :func:`maskx.evaluation.figures.draw_similarities` draws them.

        Args:
            image: as of a call.
            points: P pixels (x, y).
            order: as of a call.

        Returns:
            (P, h, w) float32, at the resolution of the features.

        Raises:
            ValueError: a point is outside the image, or the system has no such maps.
        """
        if self.system.similarity is None:
            raise ValueError(
                f"{self.system.title} has no maps of what is alike. Give a run of TransferNet or "
                "LarvSeg."
            )
        maps = self.system.similarity(self.model, self.prepare(_pixels(image, order)), points)
        return maps.float().cpu().numpy()


def open_run(folder: str | os.PathLike[str], device: str = "auto") -> Predictor:
    """Open the trained model of a run folder, of any system and either host.

    Raises:
        FileNotFoundError: there is no run in the folder, or a file that the model needs is gone.
        ImportError: it was trained with a host that is not installed.
        ValueError: the run is of another version, or its weights are damaged.
    """
    run = read_run(folder)
    try:
        system = find_system(run.system)
    except ValueError as error:
        raise ValueError(f"'{run.folder}' holds a run of another system. {error}") from error
    if run.host not in _HOSTS:
        raise ValueError(
            f"'{run.folder}' holds a run of the host {run.host!r}. Allowed: {', '.join(_HOSTS)}."
        )
    chosen = select_device(device)
    module = _HOSTS[run.host]
    if module is not None:
        model, prepare = importlib.import_module(module).open_model(run, chosen)
    elif system.open is None:
        raise ValueError(f"'{run.folder}': the system {run.system!r} cannot be opened.")
    else:
        try:
            model = system.open(run, chosen)
        except KeyError as error:
            raise ValueError(
                f"'{run.folder}': the settings in run.json lack {error}. Restore the file; or it "
                f"was made by another version, {run.version}: use that one, or train anew."
            ) from error
        prepare = getattr(model, "prepare", rgb_sample)
    if system.prediction is None:
        raise ValueError(f"'{run.folder}': the system {run.system!r} makes no predictions.")
    return Predictor(run, system, model.eval(), prepare)


def rgb_sample(image: np.ndarray, resize: Callable[[Tensor], Tensor] | None = None) -> Sample:
    """Make the sample of an (H, W, 3) uint8 RGB image, in its order.

    Args:
        resize: see :func:`maskx.data.images.as_sample_image`.
    """
    height, width = image.shape[:2]
    pixels = as_sample_image(image, resize)
    return {"image": pixels, "height": height, "width": width, "image_id": 0}


def _above(result: Mapping[str, Any], threshold: float) -> Mapping[str, Any]:
    """Leave out instances of a low score before their masks are pasted, on either host."""
    instances = result.get("instances")
    if threshold <= 0 or instances is None:
        return result
    is_plain = isinstance(instances, Mapping)
    kept = (instances["scores"] if is_plain else instances.scores) >= threshold
    if is_plain:
        return {**result, "instances": {key: value[kept] for key, value in instances.items()}}
    return {**result, "instances": instances[kept]}


def _pixels(image: str | os.PathLike[str] | np.ndarray, order: str) -> np.ndarray:
    """Read a file, or check an array; (H, W, 3) uint8 RGB."""
    if isinstance(image, str | os.PathLike):
        return read_rgb(image)
    return _checked(np.asarray(image), order)


def _checked(image: np.ndarray, order: str) -> np.ndarray:
    if order not in ("RGB", "BGR"):
        raise ValueError(f"order is {order!r}. Allowed: 'RGB', 'BGR'.")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"The image has shape {image.shape} and dtype {image.dtype}. Allowed: (height, width, "
            "3) of uint8."
        )
    return np.ascontiguousarray(image if order == "RGB" else image[:, :, ::-1])
