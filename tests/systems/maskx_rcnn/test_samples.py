import copy

import numpy as np
import pytest
import torch

from maskx.core.seeds import step_seed
from maskx.data.image_samples import read_image_sample
from maskx.engine.batches import training_batches
from maskx.systems.maskx_rcnn.samples import InstanceMapper


def keys_of(batches):
    return [[(s["image_id"], s["image"].sum().item()) for s in batch] for batch in batches]


def test_masks_of_withheld_categories_are_never_decoded(scenes, split):
    record = copy.deepcopy(scenes.records[0])
    for annotation in record["annotations"]:
        if annotation["class_index"] in split.indices_without_masks:
            annotation["segmentation"] = "decoding this would fail"
    sample = InstanceMapper(split.indices_with_masks)(record, np.random.RandomState(0))
    instances = sample["instances"]
    expected = [int(c) in split.indices_with_masks for c in instances["gt_classes"]]
    assert instances["gt_has_mask"].tolist() == expected
    assert not instances["gt_masks"][~instances["gt_has_mask"]].any()
    assert instances["gt_masks"][instances["gt_has_mask"]].flatten(1).any(1).all()


def test_flip_moves_image_boxes_and_masks_together(scenes):
    everything = range(len(scenes.class_names))
    record = scenes.records[0]
    plain = InstanceMapper(everything, flip=False)(record, np.random.RandomState(0))
    mapper = InstanceMapper(everything)
    flipped = next(
        sample
        for seed in range(20)
        if not torch.equal(
            (sample := mapper(record, np.random.RandomState(seed)))["image"], plain["image"]
        )
    )
    assert torch.equal(flipped["image"].flip(-1), plain["image"])
    for box, mask in zip(
        flipped["instances"]["gt_boxes"], flipped["instances"]["gt_masks"], strict=True
    ):
        rows, columns = torch.where(mask)
        tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box.tolist() == [float(v) for v in tight]


def test_crowds_and_box_only_annotations(scenes):
    record = copy.deepcopy(scenes.records[0])
    record["annotations"] = [
        record["annotations"][0],
        {"id": 1, "bbox": [1.0, 2.0, 5.0, 9.0], "class_index": 3, "iscrowd": 0},
        {"id": 2, "bbox": [1.0, 2.0, 5.0, 9.0], "class_index": 3, "iscrowd": 1},
    ]
    sample = InstanceMapper(range(8), flip=False)(record, np.random.RandomState(0))
    assert sample["instances"]["gt_has_mask"].tolist() == [True, False]
    assert sample["instances"]["gt_boxes"][1].tolist() == [1.0, 2.0, 5.0, 9.0]


def test_an_image_without_annotations(scenes):
    record = scenes.records[0] | {"annotations": []}
    instances = InstanceMapper(())(record, np.random.RandomState(0))["instances"]
    assert instances["gt_boxes"].shape == (0, 4)
    assert instances["gt_masks"].shape == (0, 64, 64)
    assert instances["gt_classes"].dtype == torch.int64


def test_batches_depend_on_the_iteration_alone(scenes):
    def read(start, stop, **changes):
        options = {"batch_size": 3, "seed": 1} | changes
        return keys_of(
            training_batches(scenes.records, InstanceMapper(()), start=start, stop=stop, **options)
        )

    whole = read(0, 10)
    assert read(4, 10) == whole[4:]
    assert read(0, 10, num_workers=2) == whole
    assert read(0, 10, seed=2) != whole
    assert [len(batch) for batch in whole] == [3] * 10
    # 30 samples are 3 epochs of 8 and a part: every image once in each epoch.
    order = [image_id for batch in whole for image_id, _ in batch]
    for epoch in range(3):
        assert sorted(order[8 * epoch : 8 * epoch + 8]) == list(range(8))


def test_step_seeds_differ():
    seeds = {step_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400


def test_bad_images_are_named(scenes, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG half of it")
    record = scenes.records[0]
    with pytest.raises(ValueError, match=r"broken\.png' \(id 0\) cannot be read"):
        read_image_sample(record | {"file_name": str(broken)})
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read_image_sample(record | {"file_name": str(tmp_path / "none.png")})
    with pytest.raises(ValueError, match="is 64 x 64 pixels, but its annotations say 64 x 32"):
        read_image_sample(record | {"height": 32})


def test_each_sample_is_augmented_by_a_seed_of_its_own(scenes):
    batches = training_batches(
        scenes.records, InstanceMapper(()), batch_size=4, seed=0, start=0, stop=50
    ).batch_sampler
    seeds = [seed for batch in batches for _, seed in batch]
    assert len(set(seeds)) == len(seeds) == 200
