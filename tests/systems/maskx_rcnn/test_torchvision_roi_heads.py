import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.models.detection import (
    fasterrcnn_mobilenet_v3_large_320_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)

from maskx.systems.maskx_rcnn.mask_head import MaskXHead, class_logits, crop_mask_targets, mask_loss
from maskx.systems.maskx_rcnn.samples import InstanceMapper
from maskx.systems.maskx_rcnn.torchvision import (
    add_mask_branch,
    faster_rcnn,
    maskx_rcnn,
)
from maskx.systems.maskx_rcnn.weight_transfer import WeightTransfer


def make_samples(scenes, classes_with_masks, indices=(0, 1)):
    mapper = InstanceMapper(classes_with_masks, flip=False)
    return [mapper(scenes.records[i], np.random.RandomState(0)) for i in indices]


def losses_of(model, samples, seed=0):
    torch.manual_seed(seed)  # the sampling of proposals
    return model.train()(samples)


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def mask_branch_names(model):
    return [n for n, _ in model.named_parameters() if ".mask_head." in n]


def test_the_box_branch_is_that_of_torchvision(make_detector, scenes, split):
    model = make_detector()
    plain = copy.deepcopy(model)
    heads = plain.detector.roi_heads
    # The base class's own forward: no mask branch of any kind.
    heads.forward = lambda *args: super(type(heads), heads).forward(*args)
    samples = make_samples(scenes, split.indices_with_masks)
    losses = losses_of(model, samples)
    expected = losses_of(plain, samples)
    assert set(losses) - set(expected) == {"loss_mask"}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_the_mask_loss_is_the_mean_over_masked_rois(make_detector, scenes, split):
    """Written out RoI by RoI, from the samples that the box branch used."""
    model = make_detector(mlp="bottleneck")
    heads = model.detector.roi_heads
    seen = {}
    select, pool = heads.select_training_samples, heads.mask_roi_pool.forward

    def record_samples(*args):
        seen["samples"] = select(*args)
        seen["targets"] = args[1]
        return seen["samples"]

    def record_pool(*args):
        seen["features"], seen["shapes"] = args[0], args[2]
        return pool(*args)

    heads.select_training_samples, heads.mask_roi_pool.forward = record_samples, record_pool
    loss = losses_of(model, make_samples(scenes, split.indices_with_masks))["loss_mask"]

    parts = []
    weights = heads.detector_weights()
    proposals, matched, labels, _ = seen["samples"]
    for image, target in enumerate(seen["targets"]):
        for box, row, label in zip(proposals[image], matched[image], labels[image], strict=True):
            if label == 0 or int(label) - 1 not in split.indices_with_masks:
                continue
            boxes = [box[None] if i == image else box[:0].reshape(0, 4) for i in range(2)]
            features = pool(seen["features"], boxes, seen["shapes"])
            logits = heads.mask_head(features, label[None] - 1, weights)
            parts.append(
                mask_loss(
                    logits,
                    crop_mask_targets(target["masks"], box[None], row[None], logits.shape[-1]),
                )
            )
    assert len(parts) > 3
    torch.testing.assert_close(loss, torch.stack(parts).mean())


def test_an_image_with_incomplete_boxes_trains_the_mask_branch_alone(make_detector, scenes, split):
    """What it has boxes of, or not, is nothing to the detector; its masks are learned from."""
    model = make_detector()
    complete, incomplete = make_samples(scenes, split.indices_with_masks)
    marked = InstanceMapper(split.indices_with_masks, flip=False)(
        scenes.records[1] | {"boxes_complete": False}, np.random.RandomState(0)
    )
    assert marked["instances"].keys() - incomplete["instances"].keys() == {"gt_boxes_complete"}
    fewer = copy.deepcopy(marked)
    fewer["instances"] = {key: value[:1] for key, value in fewer["instances"].items()}
    found, without = (losses_of(model, [complete, x]) for x in (marked, fewer))
    as_complete = losses_of(model, [complete, incomplete])
    for name in found.keys() - {"loss_mask"}:
        torch.testing.assert_close(found[name], without[name])
        assert not torch.isclose(found[name], as_complete[name], rtol=1e-3), name
    assert found["loss_mask"] > 0
    torch.testing.assert_close(found["loss_mask"], as_complete["loss_mask"], rtol=0.2, atol=0)

    alone = losses_of(model, [marked])
    assert alone["loss_mask"] > 0
    gradients = gradients_of(model, sum(alone.values()))
    for name, loss in alone.items():
        assert name == "loss_mask" or loss == 0, name
    for name, parameter in model.named_parameters():
        assert gradients[name] is not None or not parameter.requires_grad, name
    detector = faster_rcnn(len(scenes.class_names) + 1, min_size=64)
    losses = losses_of(type(model)(detector), [marked])
    assert all(loss == 0 and loss.requires_grad for loss in losses.values())


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("gt_boxes_only", [True, False])
def test_what_a_masked_batch_teaches(make_detector, scenes, split, stop_gradient, gt_boxes_only):
    model = make_detector(stop_gradient=stop_gradient, gt_boxes_only=gt_boxes_only)
    # At the start T sees near-zero rows; a gradient to them needs weights of some size.
    loss = losses_of(model, make_samples(scenes, split.indices_with_masks))["loss_mask"]
    assert loss > 0
    gradients = gradients_of(model, loss)
    for name in mask_branch_names(model):
        assert gradients[name].abs().sum() > 0, name
    assert gradients["detector.backbone.stem.0.weight"].abs().sum() > 0
    for name in ("cls_score.weight", "bbox_pred.weight"):
        gradient = gradients[f"detector.roi_heads.box_predictor.{name}"]
        if stop_gradient:
            assert gradient is None
        else:
            assert gradient.abs().sum() > 0
    assert gradients["detector.rpn.head.cls_logits.weight"] is None


@pytest.mark.parametrize("gt_boxes_only", [True, False])
@pytest.mark.parametrize("predictor", ["transfer", "class_agnostic", "class_specific"])
@pytest.mark.parametrize("batch", ["box_only", "empty", "half_empty"])
def test_batches_without_masks_give_a_zero_loss_with_graph(
    make_detector, scenes, predictor, batch, gt_boxes_only
):
    model = make_detector(predictor=predictor, mlp="bottleneck", gt_boxes_only=gt_boxes_only)
    samples = make_samples(scenes, ())
    for sample in samples[: {"box_only": 0, "half_empty": 1, "empty": 2}[batch]]:
        sample["instances"] = {k: v[:0] for k, v in sample["instances"].items()}
    losses = losses_of(model, samples)
    assert losses["loss_mask"].item() == 0
    gradients = gradients_of(model, sum(losses.values()))
    for name in mask_branch_names(model):
        assert gradients[name] is not None, name
        assert gradients[name].abs().sum() == 0, name


def test_gt_boxes_only_trains_on_the_boxes_of_the_masked_objects(make_detector, scenes, split):
    model = make_detector(gt_boxes_only=True)
    samples = make_samples(scenes, split.indices_with_masks)
    pooled = []
    pool = model.detector.roi_heads.mask_roi_pool.forward
    model.detector.roi_heads.mask_roi_pool.forward = lambda f, boxes, s: (
        pooled.extend(boxes) or pool(f, boxes, s)
    )
    losses_of(model, samples)
    for boxes, sample in zip(pooled, samples, strict=True):
        instances = sample["instances"]
        torch.testing.assert_close(boxes, instances["gt_boxes"][instances["gt_has_mask"]])


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**16))
def test_changing_a_mask_of_b_changes_nothing(make_detector, scenes, split, seed):
    random_state = np.random.RandomState(seed)
    model = make_detector()
    changed = copy.deepcopy(scenes.records[:2])
    for record in changed:
        for annotation in record["annotations"]:
            if annotation["class_index"] in split.indices_without_masks:
                corners = random_state.uniform(0, 64, 8).tolist()
                annotation["segmentation"] = [corners] if random_state.randint(2) else [[9.0] * 6]
    mapper = InstanceMapper(split.indices_with_masks)
    results = []
    for records in (scenes.records[:2], changed):
        samples = [mapper(r, np.random.RandomState(seed)) for r in records]
        losses = losses_of(model, samples)
        results.append((losses, gradients_of(model, sum(losses.values()))))
    (losses, gradients), (other_losses, other_gradients) = results
    for name, value in losses.items():
        assert torch.equal(value, other_losses[name])
    for name, value in gradients.items():
        assert torch.equal(value, other_gradients[name])


def test_background_is_row_zero(make_detector):
    heads = make_detector().detector.roi_heads
    predictor, weights = heads.box_predictor, heads.detector_weights()
    assert torch.equal(weights.cls, predictor.cls_score.weight[1:])
    assert torch.equal(weights.box[2], predictor.bbox_pred.weight[12:16].flatten())


def test_inference_takes_the_mask_of_the_predicted_class(make_detector, scenes):
    model = make_detector().eval()
    heads = model.detector.roi_heads
    heads.score_thresh = 0.0
    pooled = []
    pool = heads.mask_roi_pool.forward
    heads.mask_roi_pool.forward = lambda *args: pooled.append(pool(*args)) or pooled[-1]
    with torch.no_grad():
        (raw,), _ = heads_output(model, make_samples(scenes, (), (0,)))
        head = heads.mask_head
        features = pooled[0]
        for layer in ("mask_fcn1", "deconv", "deconv_relu"):
            features = getattr(head, layer)(features)
        w_seg = WeightTransfer.forward(head.predictor, raw["labels"] - 1, heads.detector_weights())
    expected = class_logits(features, w_seg).sigmoid()
    torch.testing.assert_close(raw["masks"][:, 0], expected)


def heads_output(model, samples):
    """Detections before they are pasted into the image."""
    detector = model.detector
    images, _ = detector.transform([s["image"].float() / 255 for s in samples])
    features = detector.backbone(images.tensors)
    proposals, _ = detector.rpn(images, features)
    return detector.roi_heads(features, proposals, images.image_sizes)


def test_masks_follow_changed_detector_weights(make_detector, scenes):
    model = make_detector().eval()
    heads = model.detector.roi_heads
    boxes, labels = torch.tensor([[4.0, 4.0, 40.0, 40.0]] * 3), torch.tensor([1, 2, 5])
    heads.postprocess_detections = lambda *args: ([boxes], [torch.ones(3)], [labels])
    samples = make_samples(scenes, (), (0,))
    with torch.no_grad():
        (before,), _ = heads_output(model, samples)
        heads.box_predictor.cls_score.weight[5] += 3.0
        (after,), _ = heads_output(model, samples)
    changed = (before["masks"] - after["masks"]).abs().flatten(1).max(dim=1).values
    assert (changed[:2] == 0).all()
    assert changed[2] > 1e-3


def test_no_detection_gives_empty_masks(make_detector, scenes):
    model = make_detector().eval()
    model.detector.roi_heads.score_thresh = 1.1
    with torch.no_grad():
        (output,) = model(make_samples(scenes, (), (0,)))
    assert output["instances"]["pred_masks"].shape == (0, 64, 64)


def test_a_mask_branch_on_torchvisions_own_detector():
    """As a user of torchvision's detectors would: any backbone, targets in torchvision's form."""
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96
    )
    model = add_mask_branch(detector, channels=8, num_convs=1)
    assert isinstance(model.roi_heads.mask_head, MaskXHead)
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0], [10.0, 20.0, 60.0, 60.0]]),
        "labels": torch.tensor([1, 3]),
        "masks": torch.ones(2, 64, 64, dtype=torch.uint8),
    }
    images = [torch.rand(3, 64, 64)]
    target["has_masks"] = torch.tensor([True, False])
    assert model.train()(images, [target])["loss_mask"] > 0
    box_only = {key: target[key] for key in ("boxes", "labels")}
    assert model(images, [box_only])["loss_mask"] == 0
    none_has = target | {"has_masks": torch.tensor([False, False])}
    assert model(images, [none_has])["loss_mask"] == 0
    with torch.no_grad():
        (output,) = model.eval()(images)
    assert output["masks"].shape[1:] == (1, 64, 64)


def test_flags_of_any_type_select_the_masked_boxes(make_detector, scenes, split):
    model = make_detector()
    samples = make_samples(scenes, split.indices_with_masks)
    expected = losses_of(model, samples)["loss_mask"]
    for sample in samples:
        sample["instances"]["gt_has_mask"] = sample["instances"]["gt_has_mask"].long()
    assert torch.equal(losses_of(model, samples)["loss_mask"], expected)


@pytest.mark.parametrize("key", ["gt_masks", "gt_has_mask"])
def test_a_row_per_box_is_required(make_detector, scenes, split, key):
    samples = make_samples(scenes, split.indices_with_masks)
    samples[1]["instances"][key] = samples[1]["instances"][key][:1]
    with pytest.raises(ValueError, match=r"Target 1 of the batch has \d boxes but 1 rows of"):
        losses_of(make_detector(), samples)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"has_masks": None}, r"Target 0 .* has masks but no has_masks.*Set has_masks"),
        ({"masks": None}, r"has_masks \[True\] but no masks\. Add masks"),
        ({"labels": torch.tensor([0])}, r"labels \[0\]\. Allowed: 1 to 8; 0 is the background"),
        ({"labels": torch.tensor([9])}, r"labels \[9\]\. Allowed: 1 to 8"),
    ],
)
def test_targets_that_contradict_themselves_are_refused(make_detector, change, words):
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]),
        "labels": torch.tensor([2]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
        "has_masks": torch.tensor([True]),
    } | change
    target = {key: value for key, value in target.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        make_detector().detector.train()([torch.rand(3, 64, 64)], [target])


@pytest.mark.parametrize("build", [maskrcnn_resnet50_fpn, retinanet_resnet50_fpn])
def test_only_a_faster_rcnn_takes_a_mask_branch(build):
    detector = build(weights=None, weights_backbone=None, num_classes=3)
    with pytest.raises(ValueError, match=f"Faster R-CNN, got {type(detector).__name__}"):
        add_mask_branch(detector)


def test_another_box_predictor_is_named():
    detector = faster_rcnn(9, min_size=64)
    detector.roi_heads.box_predictor = torch.nn.Sequential()
    with pytest.raises(
        ValueError, match=r"bbox_pred.weight .* but Sequential has none\. Use torchv"
    ):
        add_mask_branch(detector)


def test_resnet_builder_trains_a_step():
    detector = {"min_size": 64, "max_size": 64}
    model = maskx_rcnn(3, backbone="resnet18", detector=detector, channels=8, num_convs=1)
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]),
        "labels": torch.tensor([2]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
        "has_masks": torch.tensor([True]),
    }
    losses = model.train()([torch.rand(3, 64, 64)] * 2, [target] * 2)
    sum(losses.values()).backward()
    assert model.backbone.backbone.get_submodule("network.conv1").weight.grad.abs().sum() > 0
    std = model.roi_heads.box_predictor.bbox_pred.weight.std().item()
    assert std == pytest.approx(0.001, rel=0.05)


@pytest.mark.parametrize("trunk", ["residual", "hourglass"])
def test_builders_take_the_trunk_of_the_mask_head(make_detector, scenes, split, trunk):
    model = make_detector(trunk=trunk, num_convs=2)  # of maskx_rcnn, by add_mask_branch
    losses = losses_of(model, make_samples(scenes, split.indices_with_masks))
    gradients = gradients_of(model, sum(losses.values()))
    names = mask_branch_names(model)
    assert any(f"mask_{trunk}" in name for name in names)
    assert all(torch.isfinite(gradients[name]).all() for name in names)
    with torch.no_grad():
        (output,) = model.eval()(make_samples(scenes, (), (0,)))
    assert output["instances"]["pred_masks"].shape[1:] == (64, 64)
