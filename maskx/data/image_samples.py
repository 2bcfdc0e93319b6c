"""From records to the samples of whole-image models: image labels and label maps."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskx.core.images import warp_image, warp_label_map
from maskx.data.images import read_image
from maskx.data.label_maps import semantic_label_map

ReadLabelMap = Callable[[Mapping[str, Any]], np.ndarray]


def read_image_sample(record: Mapping[str, Any]) -> dict[str, Any]:
    """Read the image of a record for inference.

    Returns:
        ``image``: (3, H, W) uint8 RGB; ``height``, ``width`` in pixels; ``image_id``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no readable image, or its size is not the record's.
    """
    height, width = record["height"], record["width"]
    image = read_image(record["file_name"], height, width, record["image_id"])
    pixels = np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))
    return {
        "image": torch.from_numpy(pixels),
        "height": height,
        "width": width,
        "image_id": record["image_id"],
    }


class ImageMapper:
    """Reads the image of a record, its image labels and, if asked for, its label map.

    Args:
        num_classes: number of classes K, without the background.
        size: training images and their label maps are warped to squares of this side in pixels, so
            that they make a batch; None leaves them as they are.
        flip: mirror half of the training samples.
        label_maps: give training samples ``sem_seg``, their label map. Without it no mask and no
            label map is opened or decoded, so nothing of them can reach a loss: that is learning
            from tags.
        read_label_map: maps a record to its (H, W) label map, in place of
            :func:`maskx.data.label_maps.semantic_label_map`.

    Raises:
        ValueError: the size is below 1.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        size: int | None,
        flip: bool = True,
        label_maps: bool,
        read_label_map: ReadLabelMap | None = None,
    ) -> None:
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1 pixel, or None, got {size}.")
        self.num_classes = num_classes
        self.size = size
        self.flip = flip
        self.label_maps = label_maps
        self.read_label_map = read_label_map

    def read_image(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Read the image of a record for inference; it is never warped.

        Returns:
            ``image``: (3, H, W) uint8 RGB; ``height``, ``width`` of the file in pixels;
            ``image_id``; ``image_labels``: the class indices known to be present, perhaps none.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no readable image, its size is not the record's, or an image
                label is no class index.
        """
        image_labels = list(record.get("image_labels", ()))
        unknown = [label for label in image_labels if not 0 <= label < self.num_classes]
        if unknown:
            raise ValueError(
                f"Image {record['image_id']!r} has the image labels {unknown}. Allowed: class "
                f"indices 0 to {self.num_classes - 1}. Is it a record of another class list?"
            )
        return read_image_sample(record) | {"image_labels": image_labels}

    def __call__(
        self, record: Mapping[str, Any], random_state: np.random.RandomState
    ) -> dict[str, Any]:
        """Make a training sample.

        Returns:
            What :meth:`read_image` returns, with ``image`` warped to (3, ``size``, ``size``), and
            with ``sem_seg``, the label map, of the same size, int64, if label maps are asked for.

        Raises:
            FileNotFoundError: the image or its label map is missing.
            ValueError: one of them does not fit the record.
        """
        sample = self.read_image(record)
        if self.label_maps:
            sample["sem_seg"] = self._label_map(record)
        if self.size is not None:
            sample["image"] = warp_image(sample["image"], self.size)
            if self.label_maps:
                sample["sem_seg"] = warp_label_map(sample["sem_seg"], self.size)
        if self.flip and random_state.randint(2):
            for key in sample.keys() & {"image", "sem_seg"}:
                sample[key] = sample[key].flip(-1)
        return sample

    def _label_map(self, record: Mapping[str, Any]) -> Tensor:
        if self.read_label_map is None:
            label_map = semantic_label_map(record, self.num_classes)
        else:
            label_map = self.read_label_map(record)
        if label_map.shape != (record["height"], record["width"]):
            raise ValueError(
                f"The label map of image {record['image_id']!r} has shape {label_map.shape}, its "
                f"image has height {record['height']} and width {record['width']}. They must be "
                "equal."
            )
        return torch.from_numpy(label_map.astype(np.int64))
