"""Label maps as the test server of PASCAL VOC takes them (challenge comp6).

A PNG file of 8 bits per image with VOC's palette: 0 is the background, 1 to 20 are the classes in
VOC's order. There is no other value: what is not known is background.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maskx.core.text import listed
from maskx.data.label_maps import write_label_map
from maskx.data.vocabularies import VOC_CLASSES, VOC_TO_COCO

__all__ = ["VOC_RESULTS", "VocResults"]

VOC_RESULTS = Path("results", "VOC2012", "Segmentation", "comp6_test_cls")
"""Folder of the files in an archive for the server."""


class VocResults:
    """Writes label maps of a class list that has classes of VOC, by its names or by COCO's.

    Args:
        class_names: by class index. Classes that VOC does not have become background.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        labels = {VOC_TO_COCO[name]: label for label, name in enumerate(VOC_CLASSES, start=1)}
        labels |= {name: label for label, name in enumerate(VOC_CLASSES, start=1)}
        self._label_of = {i: labels[n] for i, n in enumerate(class_names) if n in labels}
        if not self._label_of:
            raise ValueError(
                f"None of the {len(class_names)} classes of the model is one of PASCAL VOC: "
                f"{listed(class_names)}. Results for its test server need some of "
                f"{listed(VOC_CLASSES, most=len(VOC_CLASSES))}."
            )

    @property
    def class_indices(self) -> list[int]:
        """Class indices of the classes of VOC."""
        return list(self._label_of)

    def write(self, folder: Path, stem: str, label_map: np.ndarray) -> Path:
        """Write the file of an image.

        Args:
            folder: where :data:`VOC_RESULTS` is made.
            stem: name of the image without its ending, such as "2008_000006".
            label_map: (H, W) integers, class index + 1; 0 and what is not known are background.
        """
        path = folder / VOC_RESULTS / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        of_voc = np.zeros(np.shape(label_map), np.uint8)
        for index, label in self._label_of.items():
            of_voc[label_map == index + 1] = label
        write_label_map(path, of_voc, num_classes=len(VOC_CLASSES))
        return path
