import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskx.data.coco import load_coco
from maskx.data.grabcut import box_pixels, grabcut_mask, grabcut_masks
from maskx.data.masks import decode_segmentation
from maskx.data.scenes.generator import render_scene

HEIGHT, WIDTH = 80, 100


@pytest.fixture
def disc():
    """A reddish disc on a bluish ground, both noisy; image and mask."""
    random = np.random.RandomState(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    mask = (x - 50) ** 2 + (y - 40) ** 2 < 20**2
    image = np.where(mask[..., None], (40, 60, 200), (180, 120, 60))
    return (image + random.randint(-15, 16, image.shape)).astype(np.uint8), mask


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def box_mask(x1, y1, x2, y2):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y1:y2, x1:x2] = True
    return mask


@pytest.fixture
def foreground(monkeypatch):
    """Replace OpenCV's GrabCut: ``foreground(n)`` makes n pixels of the box foreground."""

    def replace(count):
        def fake(window, labels, rectangle, *_):
            x, y, width, height = rectangle
            inside = np.full(width * height, cv2.GC_PR_BGD, np.uint8)
            inside[:count] = cv2.GC_PR_FGD
            labels[y : y + height, x : x + width] = inside.reshape(height, width)

        monkeypatch.setattr(cv2, "grabCut", fake)

    return replace


def test_a_disc_is_found(disc):
    image, truth = disc
    mask = grabcut_mask(image, [28, 18, 73, 63])
    assert mask.shape == (HEIGHT, WIDTH)
    assert mask.dtype == bool
    assert iou(mask, truth) > 0.95
    assert iou(box_mask(28, 18, 73, 63), truth) < 0.65  # what the box alone gives


def test_it_agrees_with_grabcut_on_the_whole_image(disc):
    image, _ = disc
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.setRNGSeed(0)
    cv2.grabCut(
        image,
        labels,
        (28, 18, 45, 45),
        np.zeros((1, 65)),
        np.zeros((1, 65)),
        5,
        cv2.GC_INIT_WITH_RECT,
    )
    whole = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    assert iou(grabcut_mask(image, [28, 18, 73, 63]), whole) > 0.98


def test_the_order_of_the_channels_and_the_layout_in_memory_do_not_matter(disc):
    image, truth = disc
    view = np.asfortranarray(image)[:, :, ::-1]
    assert iou(grabcut_mask(view, [28, 18, 73, 63]), truth) > 0.95


def test_a_box_that_leaves_the_image_is_clipped(disc):
    image, truth = disc
    image, truth = np.ascontiguousarray(image[:, 40:]), truth[:, 40:]
    inside = grabcut_mask(image, [0, 18, 33, 63])
    assert iou(inside, truth) > 0.9
    np.testing.assert_array_equal(grabcut_mask(image, [-7.5, 18, 33, 63]), inside)


def test_nothing_outside_of_the_box_is_foreground(disc):
    image, _ = disc
    box = (28, 18, 50, 40)  # cuts through the disc
    assert not (grabcut_mask(image, box) & ~box_mask(*box)).any()


def test_an_image_of_one_colour_gives_the_whole_box():
    image = np.full((HEIGHT, WIDTH, 3), 127, np.uint8)
    np.testing.assert_array_equal(grabcut_mask(image, [10, 20, 60, 50]), box_mask(10, 20, 60, 50))


def test_a_box_that_fills_the_image_gives_the_whole_image(disc):
    assert grabcut_mask(disc[0], [-1, 0, WIDTH, HEIGHT + 1]).all()
    assert grabcut_mask(disc[0][:1, :1], [0, 0, 1, 1]).all()


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([50.2, 40.1, 50.4, 60], (50, 40, 51, 60)),  # no pixel's centre
        ([50.6, 40, 50.8, 60], (51, 40, 52, 60)),
        ([WIDTH - 0.1, 10, WIDTH, 20], (WIDTH - 1, 10, WIDTH, 20)),
        ([3, HEIGHT - 0.2, 5, HEIGHT + 9], (3, HEIGHT - 1, 5, HEIGHT)),
    ],
)
def test_a_box_thinner_than_a_pixel_has_one(disc, box, expected):
    assert box_pixels(box, HEIGHT, WIDTH) == expected
    assert not (grabcut_mask(disc[0], box) & ~box_mask(*expected)).any()
    assert grabcut_mask(disc[0], box).any()


def test_pixels_of_a_box_are_those_whose_centre_it_contains():
    assert box_pixels([1.4, 2.6, 7.4, 8.6], HEIGHT, WIDTH) == (1, 3, 7, 9)


# A box of 20 x 10 pixels: 5 % are 10 of them, 95 % are 190.
@pytest.mark.parametrize(
    ("count", "whole"), [(0, True), (9, True), (10, False), (190, False), (191, True), (200, True)]
)
def test_too_little_or_too_much_foreground_gives_the_whole_box(disc, foreground, count, whole):
    foreground(count)
    mask = grabcut_mask(disc[0], [30, 40, 50, 50])
    assert mask.sum() == (200 if whole else count)
    assert mask[40:50, 30:50].sum() == mask.sum()


def test_five_iterations_on_the_box_and_half_of_it_around(disc, monkeypatch):
    calls = []
    monkeypatch.setattr(cv2, "grabCut", lambda *arguments: calls.append(arguments))
    grabcut_mask(disc[0], [30, 40, 60, 50])
    ((window, labels, rectangle, _, _, iterations, mode),) = calls
    # Half of the width, 15, on each side; above and below 10, the least, as half is only 5.
    np.testing.assert_array_equal(window, disc[0][30:60, 15:75])
    assert labels.shape == (30, 60)
    assert rectangle == (15, 10, 30, 10)
    assert (iterations, mode) == (5, cv2.GC_INIT_WITH_RECT)


def test_the_result_depends_on_the_arguments_alone(monkeypatch):
    image, box = render_scene(0, 2, size=128, num_categories=40).image, [42, 76, 67, 101]
    masks = [grabcut_mask(image, box) for _ in range(6)]
    assert all((mask == masks[0]).all() for mask in masks)

    # A scene on which that is not so by itself.
    monkeypatch.setattr(cv2, "setRNGSeed", lambda seed: None)
    masks = [grabcut_mask(image, box) for _ in range(6)]
    assert any((mask != masks[0]).any() for mask in masks)


def test_threads_give_the_masks_of_single_calls(disc):
    image, _ = disc
    boxes = [[28, 18, 73, 63], [0, 0, 60, 50], [-4, 30, 40.7, 90], [28, 18, 73, 63]]
    expected = [grabcut_mask(image, box) for box in boxes]
    for workers in (1, 3, None):
        np.testing.assert_array_equal(grabcut_masks(image, boxes, workers=workers), expected)
    assert grabcut_masks(image, []).shape == (0, HEIGHT, WIDTH)


@settings(max_examples=40, deadline=None)
@given(
    corner=st.tuples(st.floats(-5, 24), st.floats(-5, 14)),
    extent=st.tuples(st.floats(0.01, 40), st.floats(0.01, 40)),
    seed=st.integers(0, 5),
)
def test_any_box_that_meets_the_image_gives_a_mask_within(corner, extent, seed):
    height, width = 15, 25
    image = np.random.RandomState(seed).randint(0, 3, (height, width, 3)).astype(np.uint8)
    box = [*corner, corner[0] + extent[0], corner[1] + extent[1]]
    if box[2] <= 0 or box[3] <= 0:
        return
    x1, y1, x2, y2 = box_pixels(box, height, width)
    assert 0 <= x1 < x2 <= width
    assert 0 <= y1 < y2 <= height
    mask = grabcut_mask(image, box)
    fraction = mask[y1:y2, x1:x2].mean()
    assert mask.sum() == mask[y1:y2, x1:x2].sum()
    assert 0.05 <= fraction <= 0.95 or fraction == 1


@pytest.mark.parametrize(
    "box", [[100, 0, 120, 20], [5, 5, 5, 20], [5, 20, 9, 5], [0, float("nan"), 9, 9]]
)
def test_a_box_without_pixels_is_named(disc, box):
    with pytest.raises(ValueError, match=r"covers nothing of its image.*meets 100x80"):
        grabcut_mask(disc[0], box)


@pytest.mark.parametrize("image", [np.zeros((9, 9, 3)), np.zeros((9, 9), np.uint8)])
def test_an_image_of_another_form_is_named(image):
    with pytest.raises(ValueError, match=r"needs an image \(H, W, 3\) of uint8, got \(9, 9"):
        grabcut_mask(image, [1, 1, 5, 5])


def test_photographs(shared_data):
    """On real objects the masks are better than their boxes."""
    coco = shared_data / "coco_mini"
    data = load_coco(coco / "annotations" / "instances_val2017.json", coco / "val2017")
    of_cut, of_box = [], []
    for record in data.records[:6]:
        image = cv2.imread(record["file_name"])
        for annotation in record["annotations"][:1]:
            truth = decode_segmentation(annotation["segmentation"], *image.shape[:2])
            x1, y1, x2, y2 = box_pixels(annotation["bbox"], *image.shape[:2])
            box = np.zeros_like(truth)
            box[y1:y2, x1:x2] = True
            of_cut.append(iou(grabcut_mask(image, annotation["bbox"]), truth))
            of_box.append(iou(box, truth))
    assert np.mean(of_cut) > np.mean(of_box) + 0.02
