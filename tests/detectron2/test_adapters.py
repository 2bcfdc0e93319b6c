"""Order and random state of a training follow from its seed and the iteration."""

import functools
import itertools

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T

from maskx.detectron2 import Trainer
from maskx.detectron2.adapters import AspectGroupedBatches, PhotographInput, SeededMapper, in_format
from maskx.engine.batches import SeededBatches

IS_WIDE = [True, False, True, True, False, True, True]


@pytest.mark.parametrize(
    "batches",
    [
        functools.partial(SeededBatches, len(IS_WIDE)),
        functools.partial(AspectGroupedBatches, IS_WIDE),
    ],
)
def test_processes_together_see_what_one_would_see_from_any_start(batches):
    alone = list(batches(4, 3, 0, 9))
    assert all(len(batch) == 4 for batch in alone)
    assert list(batches(4, 3, 5, 9)) == alone[5:]
    parts = [list(batches(4, 3, 0, 9, rank=rank, num_processes=2)) for rank in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == alone
    with pytest.raises(ValueError, match=r"batch size is 4, which 3 processes .* multiples of 3"):
        batches(4, 3, 0, 9, num_processes=3)


def test_wide_and_high_images_are_apart_and_none_is_lost():
    batches = list(itertools.islice(AspectGroupedBatches(IS_WIDE, 2, 0, 0, 100), 100))
    assert all(len({IS_WIDE[index] for index, _ in batch}) == 1 for batch in batches)
    shown = np.bincount([index for batch in batches for index, _ in batch])
    assert shown.max() - shown.min() <= 2


def test_a_mapper_of_detectron2_draws_from_the_given_state_alone():
    mapper = SeededMapper(lambda record: {"drawn": np.random.rand(), "of": record})
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    samples = [mapper("a", np.random.RandomState(seed)) for seed in (1, 1, 2)]
    assert (np.random.get_state()[1] == before).all()
    assert samples[0] == samples[1] != samples[2]


def test_samples_have_the_channel_order_of_the_model():
    image = torch.arange(12).reshape(3, 2, 2)
    read = in_format(lambda record: {"image": image, "of": record}, "BGR")
    assert read(7)["of"] == 7
    assert torch.equal(read(7)["image"], image[[2, 1, 0]])
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT is 'L'.*RGB, BGR"):
        in_format(read, "L")


def test_a_resumed_detector_has_the_same_weights_to_the_bit(make_cfg, tiny_train, tmp_path):
    def train(output, max_iter, resume=False):
        keys = ("OUTPUT_DIR", str(tmp_path / output), "SOLVER.MAX_ITER", 4, "DATASETS.TEST", ())
        torch.manual_seed(0)  # as default_setup does
        trainer = Trainer(make_cfg(*keys, "SOLVER.CHECKPOINT_PERIOD", 2))
        trainer.resume_or_load(resume=resume)
        trainer.max_iter = max_iter
        trainer.train()
        return trainer.model.state_dict()

    whole = train("whole", 4)
    train("parts", 2)
    resumed = train("parts", 4, resume=True)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("size", "new"),
    [
        ((70, 90), (5, 6)),
        ((900, 90), (50, 5)),
        ((3001, 4000), (96, 128)),
        ((4003, 3000), (128, 96)),
    ],
)
def test_a_photograph_is_resized_to_detectron2s_pixels(size, new):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    resize = T.ResizeTransform(*size, *new)
    found = PhotographInput(image)
    found.transform(resize)
    expected = resize.apply_image(image)
    assert np.array_equal(found.image, expected)
    flipped = T.HFlipTransform(new[1])
    found.transform(flipped)
    assert np.array_equal(found.image, expected[:, ::-1])
