"""LarvSeg: both hosts have one model; what they build of their settings is the same."""

import json

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.modeling import build_model
from settings import pairs

from maskx.data.coco import load_coco
from maskx.data.images import read_image_sample
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.detectron2 import MaskXLarvSeg, Trainer, get_cfg, register_coco
from maskx.systems.larvseg.model import LarvSegModel
from maskx.systems.larvseg.pipeline import BANKS, LarvSegChain, LarvSegMethod, LarvSegSettings
from maskx.systems.larvseg.samples import JointMapper, joint_batches, sets_of_one_file

SIZE, SEED = 32, 3


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    json_file = generate_scenes(folder, count=8, size=64, num_categories=4, seed=0)
    content = json.loads(json_file.read_text())
    for image in content["images"]:  # as the files of users are
        del image["stuff_file_name"]
    json_file.write_text(json.dumps(content))
    return json_file, folder


@pytest.fixture
def cfg(scenes):
    """Masks of A and image labels of all, as of one file: every second image in each."""
    register_coco("parity_scenes", *scenes)
    register_coco("parity_scenes_again", *scenes)
    cfg = get_cfg()
    cfg.merge_from_list(
        pairs(
            {
                "MODEL.META_ARCHITECTURE": "MaskXLarvSeg",
                "MODEL.BACKBONE.NAME": "MaskXSmallResNet",
                "MODEL.DEVICE": "cpu",
                "INPUT.FORMAT": "RGB",
                "INPUT.MASKX.SIZE": SIZE,
                "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
                "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
                "DATASETS.TRAIN": ("parity_scenes", "parity_scenes_again"),
                "DATASETS.TEST": ("parity_scenes",),
                "DATASETS.MASKX.SPLIT": "scenes_half",
                "DATASETS.MASKX.JOINT.SUPERVISION": ("mask", "image"),
                "SEED": SEED,
                "DATALOADER.NUM_WORKERS": 0,
                "SOLVER.IMS_PER_BATCH": 2,
                "MODEL.MASKX.LARVSEG.BANK_SIZE": 2,
            }
        )
    )
    return cfg


@pytest.fixture
def chain(scenes, tmp_path):
    data = load_coco(*scenes)
    sets = sets_of_one_file(data, resolve_split("scenes_half", data.class_names), image_size=SIZE)
    settings = LarvSegSettings(image_size=SIZE, start_iterations=0, bank_size=2, seed=SEED)
    return LarvSegChain(sets, settings, output=tmp_path)


def test_they_are_one_class():
    for name in ("forward", "normalise", "preprocess", "state_dict", "get_extra_state"):
        assert getattr(MaskXLarvSeg, name) is getattr(LarvSegModel, name)


def test_they_build_the_same_and_load_each_other(cfg, chain):
    first, second = build_model(cfg), chain.new_model(LarvSegMethod())
    assert first.class_names == second.class_names
    state = second.state_dict()
    assert first.state_dict().keys() == state.keys()
    first.eval().load_state_dict(state)
    (sample,) = next(iter(Trainer.build_test_loader(cfg, "parity_scenes")))
    record = chain.sets.data_sets[0].records[0]
    own = read_image_sample(record)
    assert sample["image_id"] == record["image_id"]
    assert torch.equal(sample["image"], own["image"])
    expected = second.eval()([own])[0]
    for key, value in first([sample])[0].items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("bank", BANKS)
def test_they_make_the_same_samples_and_losses(cfg, chain, bank):
    """Of the same records: which records the data sets have is a matter of their registration."""
    cfg.MODEL.MASKX.LARVSEG.MEMORY = BANKS[bank]
    first, second = build_model(cfg), chain.new_model(LarvSegMethod(bank=bank))
    assert first.network.memory == second.network.memory == BANKS[bank]
    first.load_state_dict(second.state_dict())
    loader = Trainer.build_train_loader(cfg)
    batches = iter(loader)
    sets = loader.dataset.sets
    own = joint_batches(
        sets, JointMapper(sets), batch_size=2, seed=SEED, start=0, stop=4, num_workers=0
    )
    names = dict(zip(cfg.DATASETS.TRAIN, ("masks", "image labels"), strict=True))
    for batch, other in zip(batches, own, strict=False):
        for sample, expected in zip(batch, other, strict=True):
            assert sample.keys() == expected.keys()
            for key, value in expected.items():
                found = sample[key]
                assert torch.equal(found, value) if key in ("image", "sem_seg") else found == value
        other = [sample | {"data_set": names[sample["data_set"]]} for sample in other]
        losses, expected = first.train()(batch), second.train()(other)
        assert losses == expected
        tagged = "image_labels" in batch[0]
        if bank != "cross":  # which needs images seen before
            assert (losses["loss_attention"] > 0) == tagged
        assert sum(losses.values()) > 0
