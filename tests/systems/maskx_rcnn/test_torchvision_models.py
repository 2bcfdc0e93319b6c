import copy

import numpy as np
import pytest
import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from maskx.engine.batches import training_batches
from maskx.engine.training import TrainingSettings, train
from maskx.systems.maskx_rcnn.mask_head import TRUNKS
from maskx.systems.maskx_rcnn.samples import InstanceMapper
from maskx.systems.maskx_rcnn.torchvision import (
    add_mask_branch,
    faster_rcnn,
    init_box_predictor,
    maskx_rcnn,
)

MASK_HEAD = "detector.roi_heads.mask_head."


@pytest.fixture
def batches(scenes, split):
    mapper = InstanceMapper(split.indices_with_masks)

    def make(start, stop):
        return training_batches(
            scenes.records, mapper, batch_size=2, seed=0, start=start, stop=stop
        )

    return make


@pytest.mark.parametrize("freeze_detector", [True, False])
def test_training_a_frozen_detector_changes_the_mask_head_only(
    make_detector, batches, tmp_path, freeze_detector
):
    model = make_detector(freeze_detector=freeze_detector)
    before = copy.deepcopy(model.state_dict())
    settings = TrainingSettings(iterations=2, batch_size=2, learning_rate=0.01)
    history = train(model, batches, settings, output_dir=tmp_path)

    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    learned = {n for n, _ in model.named_parameters() if n.startswith(MASK_HEAD)}
    elsewhere = {n for n in changed if not n.startswith(MASK_HEAD)}
    assert learned <= changed
    if freeze_detector:
        assert set(history[0]) == {"iteration", "loss_mask", "total"}
        assert not elsewhere
        assert all(p.grad is None for n, p in model.named_parameters() if n not in learned)
    else:  # shows that the test can fail
        assert any(n.endswith("running_mean") for n in elsewhere)
        assert any("box_predictor" in n for n in elsewhere)


def test_a_frozen_detector_stays_in_evaluation_mode_in_copies_as_well(make_detector):
    for model in (
        make_detector(freeze_detector=True),
        copy.deepcopy(make_detector(freeze_detector=True)),
    ):
        detector = model.train().detector
        assert detector.roi_heads.training
        assert detector.roi_heads.mask_head.predictor.training
        frozen = (detector.backbone, detector.rpn, detector.roi_heads.box_head)
        assert not any(m.training for part in frozen for m in part.modules())


def test_a_torchvision_detector_can_be_frozen_as_it_is(scenes):
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=9, min_size=64, max_size=64
    )
    model = add_mask_branch(detector, freeze_detector=True, channels=8, num_convs=1).train()
    targets = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        "labels": torch.tensor([3]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
        "has_masks": torch.tensor([True]),
    }
    losses = model([torch.rand(3, 64, 64)], [targets])
    assert set(losses) == {"loss_mask"}
    losses["loss_mask"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("roi_heads.mask_head."), name


def test_the_small_detector_is_the_one_of_the_small_mask_model(make_detector):
    torch.manual_seed(0)
    plain = faster_rcnn(9, min_size=64).state_dict()
    whole = make_detector().detector.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in plain.items())


def test_the_rows_that_transfer_reads_start_small_and_masks_are_pooled_as_boxes_are():
    heads = maskx_rcnn(9, detector={"min_size": 64}, channels=8).roi_heads
    for layer, std in (("cls_score", 0.01), ("bbox_pred", 0.001)):
        weight = getattr(heads.box_predictor, layer).weight
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    for name in ("featmap_names", "sampling_ratio", "canonical_scale", "canonical_level"):
        assert getattr(heads.mask_roi_pool, name) == getattr(heads.box_roi_pool, name)
    assert heads.mask_roi_pool.canonical_scale == 112  # not torchvision's 224


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_small_model_takes_every_trunk(trunk):
    model = maskx_rcnn(9, detector={"min_size": 64}, trunk=trunk, channels=8).eval()
    (detection,) = model([torch.rand(3, 64, 64)])
    assert detection["masks"].shape[1:] == (1, 64, 64)


def test_with_a_frozen_detector_only_objects_with_masks_are_sampled(make_detector, scenes, split):
    model = make_detector(freeze_detector=True).train()
    heads, seen = model.detector.roi_heads, []
    sample = type(heads).select_training_samples
    heads.select_training_samples = lambda p, t: seen.append(t) or sample(heads, p, t)
    mapper = InstanceMapper(split.indices_with_masks)
    samples = [mapper(record, np.random.RandomState(0)) for record in scenes.records[:4]]
    model(samples)
    masked = [s["instances"]["gt_classes"][s["instances"]["gt_has_mask"]] + 1 for s in samples]
    assert all(torch.equal(t["labels"], m) for t, m in zip(seen[0], masked, strict=True))
    num_objects = sum(len(s["instances"]["gt_classes"]) for s in samples)
    assert 0 < sum(map(len, masked)) < num_objects


def test_autocast_to_bfloat16_is_finite_and_near(make_detector, scenes, split):
    model = make_detector(mlp="bottleneck").train()
    mapper = InstanceMapper(split.indices_with_masks, flip=False)
    samples = [mapper(record, np.random.RandomState(0)) for record in scenes.records[:2]]
    losses = []
    for half in (False, True):
        torch.manual_seed(1)  # of the sampled proposals
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses.append(model(samples))
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name].float(), loss, rtol=0.1, atol=0.02)
    sum(losses[1].values()).backward()
    learned = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in learned)


def test_a_new_box_predictor_is_told_from_one_that_was_trained_or_initialised(caplog):
    def add(prepare):
        detector = fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None, weights_backbone=None, num_classes=9
        )
        prepare(detector)
        caplog.clear()
        add_mask_branch(detector, channels=8, num_convs=1)
        return caplog.text

    def train(detector):
        weight = detector.roi_heads.box_predictor.cls_score.weight
        torch.nn.init.normal_(weight, std=0.03)

    assert "init_box_predictor(detector) before training" in add(lambda detector: None)
    assert not add(init_box_predictor)
    assert not add(train)
