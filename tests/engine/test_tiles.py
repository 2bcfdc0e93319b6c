"""Tiles, with "models" that find colours, so that what is in the image is known."""

import cv2
import numpy as np
import pytest

from maskx.data.masks import encode_masks
from maskx.engine.results import Prediction
from maskx.engine.tiles import predict_tiles

SIDE = 96


def find_shapes(images):
    """Find the connected shapes of each channel; the smaller, the surer.

    Like a network, it does not see shapes that are small in a large image.
    """
    assert len({image.shape for image in images}) == 1
    found = []
    for image in images:
        masks, classes = [], []
        for index in range(3):
            count, labels = cv2.connectedComponents((image[:, :, index] > 0).astype(np.uint8))
            masks += [labels == label for label in range(1, count)]
            classes += [index] * (count - 1)
        least = 0 if max(image.shape) <= SIDE else 1000
        classes = [c for c, mask in zip(classes, masks, strict=True) if mask.sum() > least]
        masks = [mask for mask in masks if mask.sum() > least]
        boxes = [cv2.boundingRect(mask.astype(np.uint8)) for mask in masks]
        boxes = np.array(boxes, float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.append(
            Prediction(
                ("red", "green", "blue"),
                boxes=boxes,
                segmentations=encode_masks(np.array(masks).reshape(-1, *image.shape[:2])),
                scores=np.array([1 / (1 + mask.sum() / 1000) for mask in masks]),
                class_indices=np.array(classes, int),
                image=image,
            )
        )
    return found


@pytest.fixture
def picture():
    image = np.zeros((210, 333, 3), np.uint8)
    for channel, (y1, y2, x1, x2) in (
        *((0, (10, 24, x, x + 18)) for x in range(3, 320, 30)),  # some on every seam
        (0, (40, 210, 20, 40)),  # longer than a tile, down to the last row
        (1, (60, 130, 55, 230)),  # larger than a tile
        (2, (70, 90, 70, 90)),  # another class in front of it
        (1, (150, 154, 200, 204)),
    ):
        image[y1:y2, x1:x2, channel] = 255
    cv2.circle(image, (280, 160), 17, (0, 0, 255), -1)
    return image


@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_object_is_found_once_and_whole(picture, batch_size):
    found = predict_tiles(find_shapes, picture, SIDE, batch_size=batch_size)
    expected = []
    for index in range(3):
        count, labels = cv2.connectedComponents((picture[:, :, index] > 0).astype(np.uint8))
        expected += [(index, labels == label) for label in range(1, count)]
    assert len(found.class_indices) == len(expected) == 16
    for index, mask in expected:
        (same,) = [
            row
            for row, own in enumerate(found.masks)
            if (own == mask).all() and found.class_indices[row] == index
        ]
        x1, y1, width, height = cv2.boundingRect(mask.astype(np.uint8))
        assert found.boxes[same].tolist() == [x1, y1, x1 + width, y1 + height]
    assert (np.diff(found.scores) <= 0).all()
    assert found.image is picture
    (whole,) = find_shapes([picture])  # which is why tiles are for
    assert len(whole.class_indices) == 2


def test_an_image_without_objects():
    found = predict_tiles(find_shapes, np.zeros((200, 100, 3), np.uint8), SIDE)
    assert found.boxes.shape == (0, 4)
    assert found.segmentations == []


def test_of_a_label_map_the_middle_of_each_tile_is_taken():
    sizes = []

    def label(images):
        sizes.extend(image.shape[:2] for image in images)
        maps = [image[:, :, 0].astype(np.int64) for image in images]
        for each in maps:  # at its border a tile knows nothing
            each[:10], each[-10:], each[:, :10], each[:, -10:] = 0, 0, 0, 0
        return [Prediction(("a",) * 9, label_map=each) for each in maps]

    image = np.random.RandomState(0).randint(1, 10, (250, 140, 3), dtype=np.uint8)
    found = predict_tiles(label, image, SIDE).label_map
    assert (found[10:-10, 10:-10] == image[10:-10, 10:-10, 0]).all()
    assert (found[:10] == 0).all()
    assert set(sizes) == {(SIDE, SIDE)}
    sizes.clear()
    predict_tiles(label, image, 250)
    assert sizes == [(250, 140)]
