import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maskx.core.extra_state import EXTRA_STATE, pack_state
from maskx.systems.maskx_rcnn.mask_head import (
    MLP_BRANCHES,
    PREDICTORS,
    MaskMLP,
    MaskXHead,
    class_logits,
    crop_mask_targets,
    mask_loss,
)
from maskx.systems.maskx_rcnn.weight_transfer import DetectorWeights

K, D, C, P = 5, 6, 8, 4

# Each trunk with the smallest size of the RoI features that the tests use it with.
TRUNK_SIZES = (("conv", P), ("residual", P), ("hourglass", 7))


def make_detector(requires_grad=False):
    generator = torch.Generator().manual_seed(1)
    cls = torch.randn(K, D, generator=generator)
    box = torch.randn(K, 4 * D, generator=generator)
    return DetectorWeights(cls.requires_grad_(requires_grad), box.requires_grad_(requires_grad))


def make_head(**changes):
    torch.manual_seed(0)
    arguments = {
        "in_channels": 3,
        "num_classes": K,
        "pool_size": P,
        "channels": C,
        "num_convs": 2,
        "detector_channels": D,
    }
    return MaskXHead(**(arguments | changes))


def k_channel_logits(head, roi_features, detector):
    """The K-channel form of Eq. 1, written out: w_seg of every class, then a 1x1 convolution."""
    x = roi_features
    for k in range(2):
        conv = getattr(head, f"mask_fcn{k + 1}")
        x = F.relu(F.conv2d(x, conv.weight, conv.bias, padding=1))
    x = F.relu(F.conv_transpose2d(x, head.deconv.weight, head.deconv.bias, stride=2))
    first, last = head.predictor.layers[0], head.predictor.layers[2]
    rows = []
    for k in range(K):
        hidden = first.weight @ torch.cat([detector.cls[k], detector.box[k]]) + first.bias
        hidden = torch.where(hidden > 0, hidden, 0.1 * hidden)
        rows.append(last.weight @ hidden + last.bias)
    w_seg = torch.stack(rows)
    return F.conv2d(x, w_seg[:, :, None, None]), x


def test_gathered_logits_equal_the_k_channel_form():
    head, detector = make_head(), make_detector()
    roi_features = torch.randn(7, 3, P, P)
    class_indices = torch.tensor([0, 4, 4, 2, 1, 3, 0])

    full, _ = k_channel_logits(head, roi_features, detector)

    expected = full[torch.arange(7), class_indices]
    torch.testing.assert_close(head(roi_features, class_indices, detector), expected)


def test_gathered_gradients_equal_those_of_the_k_channel_form():
    head = make_head(stop_gradient=False)
    other = copy.deepcopy(head)
    detector, other_detector = make_detector(True), make_detector(True)
    roi_features, class_indices = torch.randn(4, 3, P, P), torch.tensor([1, 1, 4, 0])
    targets = torch.rand(4, 2 * P, 2 * P) > 0.5

    mask_loss(head(roi_features, class_indices, detector), targets).backward()
    full, _ = k_channel_logits(other, roi_features, other_detector)
    chosen = full[torch.arange(4), class_indices]
    F.binary_cross_entropy_with_logits(chosen, targets.float()).backward()

    for parameter, expected in zip(head.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
    for weight, expected in zip(detector, other_detector, strict=True):
        torch.testing.assert_close(weight.grad, expected.grad)


@pytest.mark.parametrize("branch", ["single_fc", "bottleneck"])
def test_mlp_logits_are_added(branch):
    head, detector = make_head(mlp=branch), make_detector()
    for parameter in head.mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    roi_features, class_indices = torch.randn(3, 3, P, P), torch.tensor([2, 0, 2])

    full, features = k_channel_logits(head, roi_features, detector)
    fcn = full[torch.arange(3), class_indices]
    if branch == "bottleneck":
        reduce = head.mlp.reduce
        features = F.relu(
            torch.einsum("rchw,oc->rohw", features, reduce.weight[:, :, 0, 0])
            + reduce.bias[:, None, None]
        )
    rows = [head.mlp.fc.weight @ f.flatten() + head.mlp.fc.bias for f in features]
    expected = fcn + torch.stack(rows).reshape(3, 2 * P, 2 * P)

    torch.testing.assert_close(head(roi_features, class_indices, detector), expected)


def test_paper_size_parameter_counts():
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(MaskMLP(256, 28, "bottleneck")) == 256 * 8 + 8 + 8 * 784 * 784 + 784
    head = MaskXHead(in_channels=256, num_classes=80, detector_channels=1024)
    assert count(head.predictor) == 5120 * 256 + 256 + 256 * 256 + 256
    with torch.device("meta"):
        assert count(MaskMLP(256, 28, "single_fc")) == 256 * 784 * 784 + 784


def test_class_agnostic_ignores_the_class_and_class_specific_equals_a_convolution():
    roi_features, class_indices = torch.randn(4, C, 8, 8), torch.tensor([0, 1, 2, 4])
    agnostic = make_head(predictor="class_agnostic").predictor
    torch.testing.assert_close(
        agnostic(roi_features, class_indices),
        agnostic(roi_features, class_indices.flip(0)),
    )
    specific = make_head(predictor="class_specific").predictor
    torch.nn.init.normal_(specific.bias)
    full = F.conv2d(roi_features, specific.weight, specific.bias)
    torch.testing.assert_close(
        specific(roi_features, class_indices), full[torch.arange(4), class_indices]
    )


@pytest.mark.parametrize("num_classes", [1, 4000])
def test_activations_do_not_grow_with_the_number_of_classes(num_classes):
    head = make_head(num_classes=num_classes)
    detector = DetectorWeights(torch.randn(num_classes, D), torch.randn(num_classes, 4 * D))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, id):
        head(torch.randn(2, 3, P, P), torch.zeros(2, dtype=torch.long), detector).sum()
    # The largest tensors the backward pass keeps: features, convolution and T weights.
    assert max(sizes) <= max(2 * C * (2 * P) ** 2, C * C * 9, 5 * D * C)


@pytest.mark.parametrize(("trunk", "size"), TRUNK_SIZES)
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("mlp", MLP_BRANCHES)
@pytest.mark.parametrize("num_rois", [0, 1, 3])
def test_every_parameter_gets_a_gradient_even_without_rois(predictor, mlp, num_rois, trunk, size):
    head = make_head(predictor=predictor, mlp=mlp, trunk=trunk, pool_size=size)
    class_indices = torch.zeros(num_rois, dtype=torch.long)
    logits = head(torch.randn(num_rois, 3, size, size), class_indices, make_detector())
    assert logits.shape == (num_rois, 2 * size, 2 * size)
    loss = mask_loss(logits, torch.ones(num_rois, 2 * size, 2 * size))
    loss.backward()
    assert loss.requires_grad
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    if num_rois == 0:
        assert loss.item() == 0
        assert all(p.grad.abs().sum() == 0 for p in head.parameters())


def test_mask_loss_by_hand():
    logits = torch.tensor([[[0.0, 2.0], [-1.0, 3.0]]])
    targets = torch.tensor([[[True, True], [False, False]]])
    expected = (
        math.log(2) + math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(3))
    ) / 4
    assert mask_loss(logits, targets).item() == pytest.approx(expected, rel=1e-6)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 5), st.integers(0, 2**16))
def test_mask_loss_is_the_mean_over_rois(num_rois, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rois, 3, 3, generator=generator)
    targets = torch.rand(num_rois, 3, 3, generator=generator) > 0.5
    parts = [mask_loss(logits[i : i + 1], targets[i : i + 1]) for i in range(num_rois)]
    torch.testing.assert_close(mask_loss(logits, targets), torch.stack(parts).mean())
    order = torch.randperm(num_rois, generator=generator)
    torch.testing.assert_close(mask_loss(logits[order], targets[order]), mask_loss(logits, targets))


def test_class_logits_of_a_batch_equal_those_of_its_rois():
    features, weights = torch.randn(5, C, 4, 6), torch.randn(5, C)
    expected = [torch.tensordot(w, f, dims=1) for f, w in zip(features, weights, strict=True)]
    torch.testing.assert_close(class_logits(features, weights), torch.stack(expected))


def test_crop_mask_targets_of_whole_pixels():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[1, 2:4, 4:8] = True
    boxes = torch.tensor([[4.0, 0.0, 8.0, 4.0], [0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 8.0]])
    crops = crop_mask_targets(masks, boxes, torch.tensor([1, 1, 0]), 4)
    assert crops.dtype == torch.bool
    expected = torch.zeros(3, 4, 4, dtype=torch.bool)
    expected[0, 2:] = True  # the box is 4 pixels wide: one target pixel per image pixel
    expected[1, 1, 2:] = True  # two image pixels per target pixel
    assert torch.equal(crops, expected)


def test_crop_mask_targets_of_no_box():
    crops = crop_mask_targets(
        torch.ones(1, 8, 8), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 4
    )
    assert crops.shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"predictor": "fcn"}, "mask predictor must be one of 'transfer'"),
        ({"mlp": "3_layer"}, "MLP branch must be one of 'none'"),
        ({"transfer_inputs": "glove"}, "transfer inputs must be one of"),
        ({"trunk": "resnet"}, "mask trunk must be one of 'conv', 'residual', 'hourglass', got"),
        ({"trunk": "residual", "num_convs": 3}, "num_convs must be even and at least 2, got 3"),
        ({"trunk": "hourglass"}, "pool_size must be at least 7, got 4"),
        ({"transfer_layers": 4}, "transfer layers must be one of 1, 2, 3, got 4"),
        ({"transfer_activation": "gelu"}, "'leaky_relu', 'relu', got 'gelu'"),
        ({"detector_channels": None}, "needs the argument detector_channels"),
        ({"transfer_inputs": "vectors"}, "needs the argument class_vectors"),
        ({"predictor": "class_specific", "num_classes": None}, "needs the argument num_classes"),
        ({"transfer_inputs": "randn", "num_classes": None}, "needs the argument num_classes"),
        (
            {"transfer_inputs": "vectors", "class_vectors": torch.ones(4, 3)},
            "class_vectors has 4 rows for 5 classes",
        ),
    ],
)
def test_bad_arguments_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        make_head(**changes)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"predictor": "class_agnostic"}, "predictor class_agnostic"),
        ({"transfer_layers": 3}, "transfer_layers 3"),
        ({"transfer_inputs": "cls"}, "transfer_inputs cls"),
        ({"num_classes": K + 1}, "num_classes 6"),
        ({"channels": 2 * C}, "channels 16"),
        ({"trunk": "residual"}, "trunk residual[^$]*this model: trunk conv"),
        ({"mlp": "bottleneck"}, "mlp bottleneck"),
    ],
)
def test_a_checkpoint_of_another_head_is_refused(changes, word):
    checkpoint = make_head(**changes).state_dict()
    with pytest.raises(ValueError, match=f"made by another mask head[^$]*checkpoint: .*{word}"):
        make_head().eval().load_state_dict(checkpoint)


@pytest.mark.parametrize(("trunk", "size"), TRUNK_SIZES)
def test_checkpoints_of_every_trunk_load(trunk, size):
    trained, head = (make_head(trunk=trunk, pool_size=size) for _ in range(2))
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
    head.eval().load_state_dict(trained.state_dict())
    rois, class_indices = torch.randn(2, 3, size, size), torch.tensor([0, 3])
    expected = trained(rois, class_indices, make_detector())
    torch.testing.assert_close(head(rois, class_indices, make_detector()), expected)


def test_fine_tuning_on_another_number_of_classes_keeps_the_transfer():
    trained, head = make_head(num_classes=K + 3), make_head()
    torch.nn.init.normal_(trained.predictor.layers[0].weight)
    head.train().load_state_dict(trained.state_dict())
    assert torch.equal(head.predictor.layers[0].weight, trained.predictor.layers[0].weight)
    assert torch.equal(head.get_extra_state(), make_head().get_extra_state())
    head.eval().load_state_dict(make_head().state_dict())


def test_without_learned_classes_a_checkpoint_fits_any_class_list():
    trained, head = (make_head(transfer_inputs="cls", num_classes=None) for _ in range(2))
    head.eval().load_state_dict(trained.state_dict())
    head.load_state_dict(make_head(transfer_inputs="cls").state_dict())
    with pytest.raises(ValueError, match=r"checkpoint: .*num_classes any"):
        make_head(transfer_inputs="cls").eval().load_state_dict(trained.state_dict())


def test_a_foreign_checkpoint_without_architecture_loads():
    head = make_head(predictor="class_specific")
    checkpoint = {k: v for k, v in head.state_dict().items() if k != EXTRA_STATE}
    make_head(predictor="class_specific").eval().load_state_dict(checkpoint)


def test_norm_layers_replace_the_bias():
    head = make_head(norm=lambda channels: torch.nn.GroupNorm(2, channels))
    names = {name for name, _ in head.named_parameters()}
    assert {"mask_fcn1.norm.weight", "mask_fcn2.norm.bias"} <= names
    assert "mask_fcn1.bias" not in names
    head(torch.randn(2, 3, P, P), torch.tensor([0, 1]), make_detector())


@pytest.mark.parametrize(("trunk", "size"), TRUNK_SIZES)
def test_autocast_trains_in_bfloat16(trunk, size):
    head = make_head(mlp="bottleneck", trunk=trunk, pool_size=size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(torch.randn(2, 3, size, size), torch.tensor([0, 1]), make_detector())
        loss = mask_loss(logits, torch.ones(2, 2 * size, 2 * size, dtype=torch.bool))
    assert logits.dtype == torch.bfloat16
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


@pytest.mark.parametrize(("trunk", "size"), TRUNK_SIZES)
def test_export_with_a_dynamic_number_of_rois_equals_eager(trunk, size):
    head, detector = make_head(trunk=trunk, pool_size=size).eval(), make_detector()
    rois, indices = torch.randn(3, 3, size, size), torch.tensor([0, 1, 2])
    dynamic = {0: torch.export.Dim("rois", min=2, max=100)}
    exported = torch.export.export(
        head,
        (rois, indices, detector),
        dynamic_shapes=(dynamic, dynamic, DetectorWeights(None, None)),
    )
    rois, indices = torch.randn(6, 3, size, size), torch.tensor([4, 4, 0, 2, 3, 1])
    torch.testing.assert_close(
        exported.module()(rois, indices, detector), head(rois, indices, detector)
    )


def test_a_checkpoint_of_another_version_is_refused():
    head = MaskXHead(in_channels=4, num_classes=3, channels=4, predictor="class_agnostic")
    state = head.state_dict() | {EXTRA_STATE: pack_state({}, version=1)}
    with pytest.raises(ValueError, match=r"a mask head in form 1, but this version of maskx reads"):
        head.load_state_dict(state)
