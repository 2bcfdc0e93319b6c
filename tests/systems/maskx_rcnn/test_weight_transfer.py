import copy
import itertools

import pytest
import torch

from maskx.systems.maskx_rcnn.weight_transfer import (
    TRANSFER_INPUTS,
    DetectorWeights,
    WeightTransfer,
    detector_weights,
)

K, D, C = 4, 3, 5


def make_transfer(**changes):
    torch.manual_seed(0)
    arguments = {
        "out_channels": C,
        "detector_channels": D,
        "num_classes": K,
        "class_vectors": torch.arange(K * 2.0).reshape(K, 2),
    }
    return WeightTransfer(**(arguments | changes))


def make_detector():
    torch.manual_seed(1)
    return DetectorWeights(
        torch.randn(K, D, requires_grad=True), torch.randn(K, 4 * D, requires_grad=True)
    )


def slow_transfer(transfer, row):
    """T of one class, layer by layer: no activation after the last layer (Eq. 1)."""
    linears = [m for m in transfer.layers if isinstance(m, torch.nn.Linear)]
    slope = 0.1 if any(isinstance(m, torch.nn.LeakyReLU) for m in transfer.layers) else 0.0
    for number, linear in enumerate(linears):
        out = (
            torch.stack(
                [sum(w * x for w, x in zip(line, row, strict=True)) for line in linear.weight]
            )
            + linear.bias
        )
        row = out if number == len(linears) - 1 else torch.where(out > 0, out, slope * out)
    return row


@pytest.mark.parametrize("inputs", TRANSFER_INPUTS)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("activation", ["leaky_relu", "relu"])
def test_numerics_against_a_slow_reference(inputs, num_layers, activation):
    transfer = make_transfer(inputs=inputs, num_layers=num_layers, activation=activation)
    detector = make_detector()
    expected_rows = {
        "cls": detector.cls,
        "box": detector.box,
        "cls+box": torch.cat([detector.cls, detector.box], dim=1),
        "vectors": torch.arange(K * 2.0).reshape(K, 2),
        "randn": transfer.class_vectors,
    }[inputs]
    class_indices = torch.tensor([3, 0, 3])
    expected = torch.stack([slow_transfer(transfer, expected_rows[k]) for k in class_indices])
    torch.testing.assert_close(transfer(class_indices, detector), expected)


def test_hidden_width_is_that_of_the_mask_head_and_biases_start_at_zero():
    transfer = WeightTransfer(detector_channels=1024, num_layers=3)
    shapes = [tuple(m.weight.shape) for m in transfer.layers if isinstance(m, torch.nn.Linear)]
    assert shapes == [(256, 5120), (256, 256), (256, 256)]
    assert all((m.bias == 0).all() for m in transfer.layers if isinstance(m, torch.nn.Linear))
    for layer in (transfer.layers[0], transfer.layers[2]):  # uniform up to sqrt(2 / fan-in)
        bound = (2 / layer.in_features) ** 0.5
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    slopes = [m.negative_slope for m in transfer.layers if isinstance(m, torch.nn.LeakyReLU)]
    assert slopes == [0.1, 0.1]


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_stop_gradient_decides_what_reaches_the_detector(stop_gradient):
    transfer, detector = make_transfer(stop_gradient=stop_gradient), make_detector()
    transfer(torch.tensor([1, 2]), detector).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in transfer.parameters())
    if stop_gradient:
        assert detector.cls.grad is None
        assert detector.box.grad is None
    else:
        for weight in detector:
            touched = weight.grad.abs().sum(dim=1) > 0
            assert touched.tolist() == [False, True, True, False]


def test_dropout_hides_numbers_of_a_row_in_training_alone():
    detector = DetectorWeights(torch.ones(K, 1000), None)
    transfer = make_transfer(
        inputs="cls", detector_channels=1000, num_layers=1, out_channels=1, dropout=0.8
    )
    torch.nn.init.ones_(transfer.layers[0].weight)
    classes = torch.tensor([2, 0, 2])
    assert transfer.eval()(classes, detector).flatten().tolist() == pytest.approx([1000] * 3)
    seen = transfer.train()(classes, detector).flatten() / 5  # what is left is 5 times as large
    assert seen[0] == seen[2] != seen[1]  # by class, the same for its RoIs
    assert all(100 < number < 300 for number in seen.tolist())
    with pytest.raises(ValueError, match=r"TRANSFER\.DROPOUT\) is 1\. Allowed: from 0 to below 1"):
        make_transfer(dropout=1)


def test_mask_weights_follow_the_detector_by_every_route():
    """Nothing is cached: in eval mode too, changed detector weights change the output at once."""
    predictor = torch.nn.Linear(D, K + 1)
    transfer = make_transfer(inputs="cls").eval()
    indices = torch.arange(K)

    def mask_weights():
        with torch.no_grad():
            return transfer(indices, detector_weights(predictor.weight, None, background_row=-1))

    seen = [mask_weights()]
    with torch.no_grad():
        predictor.weight[0, 0] += 1.0
    seen.append(mask_weights())
    predictor.load_state_dict(torch.nn.Linear(D, K + 1).state_dict())
    seen.append(mask_weights())
    predictor.weight.data = torch.randn(K + 1, D)
    seen.append(mask_weights())
    predictor.weight = torch.nn.Parameter(torch.randn(K + 1, D))
    seen.append(mask_weights())
    predictor = copy.deepcopy(predictor)
    predictor.weight.data.mul_(2)
    seen.append(mask_weights())
    transfer.load_state_dict({k: v + 0.1 for k, v in transfer.state_dict().items()})
    seen.append(mask_weights())
    for before, after in itertools.pairwise(seen):
        assert not torch.allclose(before, after)


def test_detector_rows_of_both_hosts_are_views_in_class_order():
    cls = torch.arange((K + 1) * D).reshape(K + 1, D).float()
    detectron2_box = torch.arange(4 * K * D).reshape(4 * K, D).float()
    weights = detector_weights(cls, detectron2_box, background_row=-1)
    assert torch.equal(weights.cls, cls[:-1])
    for k in range(K):
        assert torch.equal(weights.box[k], torch.cat(list(detectron2_box[4 * k : 4 * k + 4])))
    torchvision_box = torch.arange(4 * (K + 1) * D).reshape(4 * (K + 1), D).float()
    weights = detector_weights(cls, torchvision_box, background_row=0)
    assert torch.equal(weights.cls, cls[1:])
    assert torch.equal(weights.box[0], torchvision_box[4:8].flatten())
    assert weights.cls.untyped_storage().data_ptr() == cls.untyped_storage().data_ptr()
    assert weights.box.untyped_storage().data_ptr() == torchvision_box.untyped_storage().data_ptr()


def test_class_agnostic_box_regression_has_no_rows():
    weights = detector_weights(torch.zeros(K + 1, D), torch.zeros(4, D), background_row=-1)
    assert weights.box is None
    for inputs in ("box", "cls+box"):
        with pytest.raises(ValueError, match=r"is class-agnostic\. Make it class-specific"):
            make_transfer(inputs=inputs)(torch.tensor([0]), weights)
    make_transfer(inputs="cls")(torch.tensor([0]), weights)


def test_missing_detector_weights_are_named():
    with pytest.raises(ValueError, match="needs the weights of the box predictor"):
        make_transfer()(torch.tensor([0]))


def test_random_vectors_are_the_same_in_every_run_and_of_norm_one():
    first = make_transfer(inputs="randn").class_vectors
    torch.manual_seed(99)
    second = make_transfer(inputs="randn").class_vectors
    assert torch.equal(first, second)
    assert first.norm(dim=1).mean().item() == pytest.approx(0.055 * 300**0.5, rel=0.1)


def test_rows_of_length_one():
    """T does not depend on how long a row is, only on its direction."""
    plain, transfer, detector = make_transfer(), make_transfer(normalise=True), make_detector()
    classes = torch.tensor([2, 0, 2])
    rows = torch.cat([detector.cls, detector.box], dim=1).double()
    units = rows / (rows**2).sum(dim=1, keepdim=True).sqrt()
    found = transfer(classes, detector)
    torch.testing.assert_close(found, plain.layers(units.to(rows.dtype).float())[classes])
    longer = DetectorWeights(*(7 * each for each in detector))
    torch.testing.assert_close(transfer(classes, longer), found)
    still = DetectorWeights(*(torch.zeros_like(each) for each in detector))
    assert transfer(classes, still).isfinite().all()


def test_mixed_weights_of_classes_that_were_not_taught():
    """Means of the taught ones, by a softmax over cosines; all else is T."""
    plain, transfer, detector = make_transfer(), make_transfer(mix=0.05), make_detector()
    everything = torch.arange(K)
    rows = plain(everything, detector)
    torch.testing.assert_close(transfer.eval()(everything, detector), rows)  # none was taught
    taught = torch.tensor([2, 0, 2])
    torch.testing.assert_close(transfer.train()(taught, detector), rows[taught])
    found = transfer.eval()(torch.tensor([3, 0, 1, 2, 3]), detector)
    torch.testing.assert_close(found[[1, 3]], rows[[0, 2]])
    assert torch.equal(found[0], found[4])
    for row, index in ((found[0], 3), (found[2], 1)):
        cosines = [torch.cosine_similarity(rows[index], rows[known], dim=0) for known in (0, 2)]
        first, second = [(cosine / 0.05).exp() for cosine in cosines]
        expected = (first * rows[0] + second * rows[2]) / (first + second)
        torch.testing.assert_close(row, expected)
    restored = make_transfer(mix=0.05)
    restored.load_state_dict(transfer.state_dict())
    assert torch.equal(restored.eval()(everything, detector), transfer(everything, detector))


@pytest.mark.parametrize("mix", [-0.1, float("nan"), float("inf")])
def test_a_bad_temperature_of_mixing_is_refused(mix):
    with pytest.raises(ValueError, match=r"TRANSFER\.MIX.*Allowed: 0"):
        make_transfer(mix=mix)


def test_mixing_needs_a_class_list_that_stays():
    with pytest.raises(ValueError, match=r"classes of this model may change.*MIX\) 0"):
        make_transfer(mix=0.05, num_classes=None)
