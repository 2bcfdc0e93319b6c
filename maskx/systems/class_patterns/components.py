"""The principal components of a class, of which the first is its pattern: a picture of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskx.core.image_classifier import LayerTaps
from maskx.data.images import read_rgb
from maskx.evaluation.figures import contact_sheet, draw_heat_map, plain_tile, save_png
from maskx.systems.class_patterns.patterns import discover_class_patterns, find_patterns
from maskx.systems.class_patterns.steps import ClassifierSource

_TILE_SIDE = 256


def draw_components(
    path: Path,
    source: ClassifierSource,
    records: Sequence[Mapping[str, Any]],
    label: int,
    layer: str,
    *,
    num_components: int = 3,
    num_images: int = 4,
    max_images: int = 800,
    batch_size: int = 16,
) -> list[float]:
    """Draw the projections of images of a class on its first principal components.

    The first is the class pattern, with its sign; the sign of the others has no meaning, and what
    is farthest out is positive. That the first explains far more of the variance than the next is
    what the paper's figure 3 shows.

    Args:
        path: PNG file to write.
        source: the classifier, of either host.
        records: tagged images.
        label: class index.
        layer: of :class:`maskx.core.image_classifier.LayerTaps`.
        num_images: that are drawn, the first of the class.
        max_images: whose features are read, the first of the class.

    Returns:
        Shares of the variance of all components, the largest first.

    Raises:
        ValueError: no image has the class, or its features do not vary.
    """
    chosen = [record for record in records if label in record["image_labels"]][:max_images]
    if not chosen:
        raise ValueError(f"None of the {len(records)} images has the class of index {label}.")

    def read(index: int) -> dict[str, Any]:
        labels = {"image_labels": chosen[index]["image_labels"], "labels_used": [label]}
        return source.read_image(chosen[index]) | labels

    preprocess = source.model.preprocess
    moments = discover_class_patterns(
        source.classifier,
        read,
        [layer],
        preprocess=preprocess,
        total=len(chosen),
        batch_size=batch_size,
    )[layer]
    patterns = find_patterns(moments)
    if not patterns.valid[label]:
        raise ValueError(
            f"The features of layer '{layer}' do not vary, so there are no components."
        )
    variances, vectors = torch.linalg.eigh(moments.covariance(label))
    shares = (variances.flip(0) / variances.sum()).clamp(min=0).tolist()
    directions = vectors.flip(1).T[:num_components]
    directions[0] = patterns.direction[label]
    tiles = []
    for record in chosen[:num_images]:
        with torch.no_grad(), LayerTaps(source.classifier.backbone, [layer]) as taps:
            source.classifier.backbone(preprocess([source.read_image(record)]))
        features = taps.features[layer][0].to(directions).permute(1, 2, 0)
        maps = (features - moments.mean[label]) @ directions.T
        image = read_rgb(record["file_name"])
        tiles.append(plain_tile(image, _TILE_SIDE))
        for number, values in enumerate(maps.permute(2, 0, 1).cpu().numpy()):
            is_flipped = number > 0 and -values.min() > values.max()
            shown = -values if is_flipped else values
            tiles.append(draw_heat_map(image, shown, symmetric=True, side=_TILE_SIDE))
    columns = [f"component {n} ({s:.0%})" for n, s in enumerate(shares[: len(directions)], start=1)]
    legend = (((220, 30, 30), "above the mean"), ((30, 60, 220), "below"))
    sheet = contact_sheet(
        tiles, columns=1 + len(columns), column_titles=["image", *columns], legend=legend
    )
    save_png(path, np.ascontiguousarray(sheet))
    return shares
