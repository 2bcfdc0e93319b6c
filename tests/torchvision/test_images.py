import copy

import cv2
import numpy as np
import pytest
import torch

import maskx.data.images
import maskx.data.label_maps
from maskx.core.images import warp_image
from maskx.data.images import ImageMapper, read_image_sample
from maskx.data.label_maps import semantic_label_map, write_label_map
from maskx.engine.batches import training_batches

K = 8


def state(seed=0):
    return np.random.RandomState(seed)


@pytest.fixture
def voc_like(tmp_path):
    """A record of 30 x 20 pixels whose label map is a file with an ignored border."""
    label_map = np.full((20, 30), 255, np.uint8)
    label_map[2:18, 2:28] = 0
    label_map[5:15, 4:12] = 3
    write_label_map(tmp_path / "map.png", label_map, num_classes=K)
    pixels = np.repeat(np.where(label_map == 3, 200, 40).astype(np.uint8)[:, :, None], 3, axis=2)
    cv2.imwrite(str(tmp_path / "image.png"), pixels)
    return {
        "file_name": str(tmp_path / "image.png"),
        "label_map_file_name": str(tmp_path / "map.png"),
        "height": 20,
        "width": 30,
        "image_id": "one",
        "image_labels": [2],
        "annotations": [],
    }


def test_learning_from_tags_never_touches_a_mask(scenes, voc_like, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a mask or label map was read")

    for module in (maskx.data.label_maps,):
        monkeypatch.setattr(module, "decode_segmentation", refuse)
    monkeypatch.setattr(maskx.data.label_maps, "read_label_map", refuse)
    monkeypatch.setattr(maskx.data.images, "semantic_label_map", refuse)
    mapper = ImageMapper(K, size=32, label_maps=False, read_label_map=refuse)
    scene = copy.deepcopy(scenes.records[0])
    for annotation in scene["annotations"]:
        annotation["segmentation"] = "decoding this would fail"
    gone = voc_like | {"label_map_file_name": "there is no such file"}
    for record in (scene, voc_like, gone):
        assert "sem_seg" not in mapper(record, state())
        assert "sem_seg" not in mapper.read_image(record)
    with pytest.raises(AssertionError, match="was read"):
        ImageMapper(K, size=32, label_maps=True)(voc_like, state())


def test_samples_hold_image_labels_and_the_size_of_the_file(voc_like):
    sample = ImageMapper(K, size=24, label_maps=True)(voc_like, state())
    assert sample["image"].shape == (3, 24, 24)
    assert sample["image"].dtype == torch.uint8
    assert sample["sem_seg"].shape == (24, 24)
    assert sample["sem_seg"].dtype == torch.int64
    assert {key: sample[key] for key in ("height", "width", "image_id", "image_labels")} == {
        "height": 20,
        "width": 30,
        "image_id": "one",
        "image_labels": [2],
    }


def test_images_for_inference_are_as_in_the_file(voc_like):
    sample = ImageMapper(K, size=24, label_maps=True).read_image(voc_like)
    plain = read_image_sample(voc_like)
    assert torch.equal(sample["image"], plain["image"])
    assert set(sample) == {*plain, "image_labels"}


def test_without_a_size_nothing_is_warped(scenes):
    record = scenes.records[0]
    sample = ImageMapper(K, size=None, flip=False, label_maps=True)(record, state())
    assert np.array_equal(sample["sem_seg"].numpy(), semantic_label_map(record, K))
    assert torch.equal(sample["image"], read_image_sample(record)["image"])


def test_label_maps_are_warped_to_the_nearest_pixel(voc_like):
    sample = ImageMapper(K, size=12, flip=False, label_maps=True)(voc_like, state())
    truth = semantic_label_map(voc_like, K)
    for row in range(12):
        for column in range(12):
            y, x = int((row + 0.5) * 20 / 12), int((column + 0.5) * 30 / 12)
            assert sample["sem_seg"][row, column] == truth[y, x], (row, column)


def test_image_and_label_map_stay_aligned(voc_like):
    # The object alone is bright, so its outline in the warped image is that of its label.
    for size in (12, 45):
        for seed in range(4):
            sample = ImageMapper(K, size=size, label_maps=True)(voc_like, state(seed))
            bright = sample["image"][0] > 120
            # All but pixels that the edge crosses.
            assert (bright ^ (sample["sem_seg"] == 3)).float().mean() < 0.02


def test_flip_mirrors_image_and_label_map_together(voc_like):
    plain = ImageMapper(K, size=24, flip=False, label_maps=True)(voc_like, state())
    mapper = ImageMapper(K, size=24, label_maps=True)
    flipped = 0
    for seed in range(20):
        sample = mapper(voc_like, state(seed))
        is_flipped = not torch.equal(sample["image"], plain["image"])
        flipped += is_flipped
        for key in ("image", "sem_seg"):
            expected = plain[key].flip(-1) if is_flipped else plain[key]
            assert torch.equal(sample[key], expected)
    assert 4 <= flipped <= 16
    tags = ImageMapper(K, size=24, label_maps=False)
    assert torch.equal(tags(voc_like, state(3))["image"], mapper(voc_like, state(3))["image"])


def test_bytes_and_floats_are_warped_alike():
    image = torch.randint(0, 256, (3, 40, 50), generator=torch.Generator().manual_seed(0)).byte()
    for size in (20, 41, 90):
        warped = warp_image(image, size)
        assert warped.dtype == torch.uint8
        assert (warped.float() - warp_image(image.float(), size)).abs().max() <= 1
    # Fine texture averages out instead of being picked from: without it all would be 0.
    stripes = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(3, 32, 8)
    assert (warp_image(stripes, 8)[:, 1:-1, 1:-1] - 0.25).abs().max() < 0.05
    assert warp_image(stripes, 32) is stripes


def test_images_without_labels_are_samples_too(voc_like):
    sample = ImageMapper(K, size=24, label_maps=True)(voc_like | {"image_labels": []}, state())
    assert sample["image_labels"] == []


def test_label_maps_may_come_from_elsewhere(voc_like):
    elsewhere = np.full((20, 30), 7, np.uint8)
    mapper = ImageMapper(K, size=None, label_maps=True, read_label_map=lambda record: elsewhere)
    assert (mapper(voc_like, state())["sem_seg"] == 7).all()
    mapper.read_label_map = lambda record: elsewhere.T
    with pytest.raises(ValueError, match=r"image 'one' has shape \(30, 20\), its image has height"):
        mapper(voc_like, state())


def test_large_labels_survive(voc_like):
    many = np.full((20, 30), 65535, np.int32)
    many[:10] = 21_841
    mapper = ImageMapper(
        21_841, size=11, flip=False, label_maps=True, read_label_map=lambda record: many
    )
    assert set(mapper(voc_like, state())["sem_seg"].unique().tolist()) == {21_841, 65535}


def test_batches_are_made_with_workers_too(scenes):
    mapper = ImageMapper(K, size=24, label_maps=True)
    options = {"batch_size": 3, "seed": 1, "start": 0, "stop": 3}
    alone = list(training_batches(scenes.records, mapper, **options))
    others = list(training_batches(scenes.records, mapper, num_workers=1, **options))
    for batch, same in zip(alone, others, strict=True):
        for sample, other in zip(batch, same, strict=True):
            assert sample["image_id"] == other["image_id"]
            assert torch.equal(sample["image"], other["image"])
            assert torch.equal(sample["sem_seg"], other["sem_seg"])


def test_errors_name_what_is_wrong(voc_like):
    with pytest.raises(ValueError, match="size must be at least 1 pixel, or None, got 0"):
        ImageMapper(K, size=0, label_maps=False)
    mapper = ImageMapper(2, size=24, label_maps=False)
    with pytest.raises(ValueError, match=r"'one' has the image labels \[2\].*indices 0 to 1"):
        mapper(voc_like, state())
    with pytest.raises(FileNotFoundError, match=r"Image 'none\.png' \(id one\)"):
        ImageMapper(K, size=24, label_maps=False)(voc_like | {"file_name": "none.png"}, state())
