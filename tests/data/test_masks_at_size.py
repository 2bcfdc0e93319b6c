import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api

from maskx.data.masks import (
    PastedMasks,
    decode_at_size,
    decode_segmentation,
    encode_each,
    encode_masks,
    run_lengths,
)

SIZE = (50, 70)


def disc(centre=(30.0, 20.0), radius=12.0, points=60):
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    xy = np.array(centre) + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return [xy.ravel().tolist()]


@pytest.mark.parametrize("form", ["polygons", "run lengths"])
@pytest.mark.parametrize("size", [SIZE, (25, 35), (100, 140), (10, 7)])
def test_a_mask_is_decoded_at_the_size_it_is_used(form, size):
    segmentation = disc()
    if form == "run lengths":
        segmentation = encode_masks(decode_segmentation(segmentation, *SIZE)[None])[0]
    mask = decode_at_size(segmentation, *SIZE, size)
    assert mask.shape == size
    assert mask.dtype == bool
    y, x = (np.arange(n) + 0.5 for n in size)
    y, x = y[:, None] * SIZE[0] / size[0], x[None] * SIZE[1] / size[1]
    distance = np.hypot(x - 30, y - 20)
    pixel = max(SIZE[0] / size[0], SIZE[1] / size[1])
    assert mask[distance < 12 - 1.5 * pixel].all()
    assert not mask[distance > 12 + 1.5 * pixel].any()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_large_mask_is_decoded_as_pycocotools_does(share):
    size = (2100, 2001)
    mask = np.random.RandomState(0).rand(21, 69) < share
    mask = np.repeat(np.repeat(mask, 100, axis=0), 29, axis=1)
    (encoded,) = encode_masks(mask[None])
    decoded = decode_segmentation(encoded, *size)
    assert decoded.dtype == bool
    np.testing.assert_array_equal(decoded, mask)
    np.testing.assert_array_equal(decoded, mask_api.decode(encoded))


def test_run_lengths_of_polygons_and_of_nothing():
    expected = mask_api.decode(mask_api.merge(mask_api.frPyObjects(disc(), *SIZE)))
    np.testing.assert_array_equal(mask_api.decode(run_lengths(disc(), *SIZE)), expected)
    assert mask_api.area(run_lengths([], *SIZE)) == 0
    assert run_lengths([], *SIZE)["size"] == list(SIZE)


def make_masks(count=6):
    generator = torch.Generator().manual_seed(0)
    prob = torch.rand(count, 14, 14, generator=generator)
    corners = torch.rand(count, 2, generator=generator) * 30
    boxes = torch.cat([corners, corners + 1 + torch.rand(count, 2, generator=generator) * 25], 1)
    return prob, boxes


def test_masks_are_pasted_as_grid_sample_does():
    prob, boxes = make_masks()
    masks = PastedMasks(prob, boxes, SIZE)
    y, x = (torch.arange(n) + 0.5 for n in SIZE)
    for mask, p, (x0, y0, x1, y1) in zip(masks, prob, boxes, strict=True):
        grid = torch.stack(
            torch.broadcast_tensors(
                (x[None] - x0) / (x1 - x0) * 2 - 1, (y[:, None] - y0) / (y1 - y0) * 2 - 1
            ),
            dim=-1,
        )
        expected = torch.nn.functional.grid_sample(p[None, None], grid[None], align_corners=False)
        assert mask.any()
        assert torch.equal(mask, expected[0, 0] >= 0.5)


def test_they_are_a_sequence_an_array_and_run_lengths():
    masks = PastedMasks(*make_masks(), SIZE)
    assert (len(masks), masks.shape) == (6, (6, *SIZE))
    assert torch.equal(torch.stack(list(masks)), masks.tensor)
    assert torch.equal(masks[2], masks.tensor[2])
    chosen = torch.tensor([False, True, False, False, True, True])
    assert torch.equal(masks[chosen].tensor, masks.tensor[chosen])
    assert torch.equal(masks[1:3].to("cpu").tensor, masks.tensor[1:3])
    np.testing.assert_array_equal(np.asarray(masks), masks.tensor.numpy())
    assert masks.encode() == encode_masks(masks.numpy()) == encode_each(masks.tensor)
    decoded = [decode_segmentation(rle, *SIZE) for rle in encode_each(masks)]
    np.testing.assert_array_equal(np.array(decoded), masks.numpy())
    none = masks[torch.zeros(6, dtype=torch.bool)]
    assert none.tensor.shape == (0, *SIZE)
    assert none.encode() == []


@pytest.mark.parametrize(
    "box",
    [(-20.0, -5.0, 200.0, 90.0), (60.0, 40.0, 95.0, 80.0), (5.0, 5.0, 5.0, 5.0), (90, 9, 99, 20)],
)
def test_boxes_of_any_place_and_size(box):
    (mask,) = PastedMasks(torch.ones(1, 7, 7), torch.tensor([box]), SIZE)
    x0, y0, x1, y1 = (round(float(v)) for v in box)
    inside = torch.zeros(SIZE, dtype=torch.bool)
    inside[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    assert (mask & ~inside).sum() == 0
    # Only what is next to the border of the box may be lost.
    assert (inside & ~mask).sum() <= 0.5 * inside.sum() ** 0.5 * 4
