"""Targets of single images: boxes and masks follow the image through warp and flip."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskx.data.images import read_rgb
from maskx.data.masks import encode_masks
from maskx.systems.concept_mask.samples import (
    ConceptMapper,
    box_target,
    mask_target,
    read_sample,
)

HEIGHT, WIDTH = 20, 40


def record_of(annotations, height=HEIGHT, width=WIDTH):
    return {"image_id": 7, "height": height, "width": width, "annotations": annotations}


def boxed(class_index, box, iscrowd=0):
    return {"class_index": class_index, "bbox": box, "iscrowd": iscrowd}


def masked(class_index, mask):
    ys, xs = np.nonzero(mask)
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    return boxed(class_index, [float(v) for v in box]) | {
        "segmentation": encode_masks(mask[None])[0]
    }


def rectangle(x1, y1, x2, y2):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def draw(record, *, classes=range(10), size=10, flip=False, max_concepts=10, seed=0):
    return mask_target(
        record,
        masked=classes,
        size=size,
        flip=flip,
        max_concepts=max_concepts,
        random_state=np.random.RandomState(seed),
    )


# --- boxes ----------------------------------------------------------------------------------------


def test_boxes_are_warped_and_sorted_into_concepts():
    record = record_of(
        [
            boxed(5, [0.0, 0.0, 20.0, 10.0]),
            boxed(2, [10.0, 5.0, 40.0, 20.0], 1),
            boxed(5, [4, 4, 8, 8]),
        ]
    )
    concepts, boxes, rows = box_target(record, size=80, flip=False)
    assert concepts == [2, 5]
    assert rows.tolist() == [1, 0, 1]
    assert boxes.tolist() == [[0, 0, 40, 40], [20, 20, 80, 80], [8, 16, 16, 32]]
    assert (boxes.dtype, rows.dtype) == (np.float32, np.int64)
    _, flipped, rows = box_target(record, size=80, flip=True)
    assert flipped.tolist() == [[40, 0, 80, 40], [0, 20, 60, 80], [64, 16, 72, 32]]
    assert rows.tolist() == [1, 0, 1]


def test_an_image_without_boxes_gives_empty_arrays():
    concepts, boxes, rows = box_target(record_of([]), size=16, flip=True)
    assert (concepts, boxes.shape, rows.shape) == ([], (0, 4), (0,))
    assert (boxes.dtype, rows.dtype) == (np.float32, np.int64)


@given(st.data(), st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
@settings(max_examples=40)
def test_flipping_twice_is_doing_nothing_and_boxes_stay_inside(data, height, width, size):
    unit = st.floats(0, 1)
    corners = data.draw(st.lists(st.tuples(unit, unit, unit, unit), max_size=5))
    annotations = [
        boxed(i % 3, [min(a, b) * width, min(c, d) * height, max(a, b) * width, max(c, d) * height])
        for i, (a, b, c, d) in enumerate(corners)
    ]
    record = record_of(annotations, height, width)
    concepts, boxes, rows = box_target(record, size=size, flip=False)
    _, flipped, _ = box_target(record, size=size, flip=True)
    assert np.allclose(flipped[:, [2, 0]], size - boxes[:, [0, 2]], atol=1e-4)
    assert np.array_equal(flipped[:, [1, 3]], boxes[:, [1, 3]])
    assert (boxes >= 0).all()
    assert (boxes <= size).all()
    assert [concepts[row] for row in rows] == [i % 3 for i in range(len(corners))]


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_a_mask_is_the_union_of_all_instances_of_its_concept(flip):
    first, second = rectangle(0, 0, 8, 4), rectangle(20, 10, 40, 20)
    other = rectangle(6, 3, 14, 9)  # whose edges tell centres of pixels from their corners
    record = record_of([masked(6, first), masked(3, other), masked(6, second)])
    concepts, masks = draw(record, size=10, flip=flip)
    assert concepts == [3, 6]
    assert masks.dtype == bool
    # The centre of pixel (r, c) of the square is in pixel (2 r + 1, 4 c + 2) of the image.
    expected = np.stack([other, first | second])[:, 1::2, 2::4]
    assert np.array_equal(masks, expected[:, :, ::-1] if flip else expected)


def test_masks_and_boxes_of_an_image_meet():
    """Boxes and masks go through the same warp: the box of a mask is the warped box."""
    record = record_of([masked(0, rectangle(4, 4, 20, 16))])
    for flip in (False, True):
        _, masks = draw(record, size=80, flip=flip)
        _, boxes, _ = box_target(record, size=80, flip=flip)
        ys, xs = np.nonzero(masks[0])
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == boxes[0].tolist()


def test_masks_meet_the_image_as_opencv_warps_it():
    image = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask = rectangle(6, 3, 27, 17)
    image[mask] = 255
    for size in (30, 64):
        warped = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
        _, masks = draw(record_of([masked(0, mask)]), size=size)
        sure = (warped == 0) | (warped == 255)
        assert sure.mean() > 0.8
        assert np.array_equal(masks[0][sure], warped[sure] == 255)


def test_a_concept_with_an_instance_without_mask_is_left_out():
    record = record_of([masked(1, rectangle(0, 0, 9, 9)), boxed(1, [10.0, 0.0, 20.0, 9.0])])
    concepts, masks = draw(record)
    assert concepts == []
    assert (masks.shape, masks.dtype) == ((0, 10, 10), bool)


def test_only_masked_concepts_are_drawn():
    record = record_of([masked(1, rectangle(0, 0, 9, 9)), masked(2, rectangle(9, 9, 20, 20))])
    assert draw(record, classes={2})[0] == [2]


def test_a_mask_too_small_for_the_square_is_left_out_and_another_takes_its_place():
    tiny, large = rectangle(0, 0, 1, 1), rectangle(10, 5, 30, 15)
    record = record_of([masked(1, tiny), masked(2, large)])
    for seed in range(8):
        assert draw(record, size=10, max_concepts=1, seed=seed)[0] == [2]


def test_all_concepts_have_their_turn_when_there_are_too_many():
    record = record_of([masked(c, rectangle(4 * c, 0, 4 * c + 4, 20)) for c in range(6)])
    seen = set()
    for seed in range(20):
        concepts, masks = draw(record, max_concepts=2, seed=seed)
        assert len(concepts) == len(masks) == 2
        assert concepts == sorted(concepts)
        seen.update(concepts)
        again, same = draw(record, max_concepts=2, seed=seed)
        assert concepts == again
        assert np.array_equal(masks, same)
        for concept, mask in zip(concepts, masks, strict=True):
            assert np.array_equal(mask, draw(record, classes={concept})[1][0])
    assert seen == set(range(6))


def test_a_concept_that_has_no_masks_is_not_decoded():
    broken = masked(1, rectangle(0, 0, 9, 9)) | {"segmentation": {"size": [1, 1], "counts": "?"}}
    assert draw(record_of([broken, masked(2, rectangle(0, 0, 9, 9))]), classes={2})[0] == [2]


# --- samples --------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path):
    """An image of noise with boxes and masks of two concepts."""
    pixels = np.random.RandomState(0).randint(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    annotations = [masked(1, rectangle(4, 4, 20, 16)), masked(3, rectangle(24, 0, 36, 12))]
    extra = {"file_name": str(tmp_path / "a.png"), "image_labels": [1, 3, 5]}
    return record_of(annotations) | extra


@pytest.mark.parametrize("seed", range(4))
def test_boxes_and_masks_are_mirrored_with_their_image(record, seed):
    """Of one random state the same image, boxes and masks: all is drawn from it."""
    boxes, masks = (
        ConceptMapper(stage, size=40, masked=(1, 3))(record, np.random.RandomState(seed))
        for stage in (2, 3)
    )
    plain = ConceptMapper(2, size=40, flip=False)(record, np.random.RandomState(seed))["image"]
    is_flipped = not torch.equal(boxes["image"], plain)
    assert is_flipped == bool(np.random.RandomState(seed).randint(2))
    assert torch.equal(boxes["image"], plain.flip(-1) if is_flipped else plain)
    assert torch.equal(boxes["image"], masks["image"])
    assert boxes["concepts"] == masks["concepts"] == [1, 3]
    for row, mask in enumerate(masks["masks"].numpy()):
        ys, xs = np.nonzero(mask)
        box = boxes["boxes"][boxes["box_rows"] == row][0].tolist()
        assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_a_sample_has_what_its_stage_learns_from_and_no_more(record):
    shared = {"image", "height", "width", "image_id", "file_name"}
    targets = {1: {"image_labels"}, 2: {"concepts", "boxes", "box_rows"}, 3: {"concepts", "masks"}}
    before = str(record)
    for stage, keys in targets.items():
        mapper = ConceptMapper(stage, size=16, masked=(1, 3), max_concepts=1)
        sample = mapper(record, np.random.RandomState(0))
        assert set(sample) == shared | keys
        assert sample["image"].shape == (3, 16, 16)
        assert (sample["height"], sample["width"], sample["image_id"]) == (HEIGHT, WIDTH, 7)
        assert str(record) == before
    assert len(sample["concepts"]) == len(sample["masks"]) == 1


def test_images_of_stage_3_are_as_large_as_the_largest_attention_map_needs(record):
    mapper = ConceptMapper(3, size=16, attention_sizes=(24, 32), masked=(1,))
    sample = mapper(record, np.random.RandomState(0))
    assert sample["image"].shape == (3, 32, 32)
    assert sample["masks"].shape == (1, 16, 16)
    other = ConceptMapper(2, size=16, attention_sizes=(24, 32))(record, np.random.RandomState(0))
    assert other["image"].shape == (3, 16, 16)


def test_an_image_of_a_tag_list_has_the_size_of_its_file(record):
    bare = {key: record[key] for key in ("file_name", "image_id", "image_labels")}
    sample = read_sample(bare)
    assert (sample["height"], sample["width"]) == (HEIGHT, WIDTH)
    assert torch.equal(sample["image"], read_sample(record)["image"])
    rgb = torch.from_numpy(read_rgb(record["file_name"])).permute(2, 0, 1)
    assert torch.equal(sample["image"], rgb)
