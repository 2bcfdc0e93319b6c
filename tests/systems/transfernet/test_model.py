import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maskx.core.backbones import SmallResNet
from maskx.core.image_classifier import ImageClassifier
from maskx.core.sample_models import SampleClassifier
from maskx.data import dense_crf
from maskx.engine.predictor import rgb_sample
from maskx.systems.transfernet.model import METHODS, TransferNetModel, build_network

K = 4
# A baseline does not have the stage that is the default.
STAGES = {name: {"stage": "source"} for name in ("baseline", "decoupled")}
PIXELS = {"pixel_mean": [128.0] * 3, "pixel_std": [58.0] * 3}


class Model(TransferNetModel):
    """Keeps what it logs."""

    def log(self, name, value):
        self.logged[name] = float(value)


def make_classifier():
    backbone = SmallResNet(widths=(4, 4, 6, 8))
    return ImageClassifier(backbone, in_feature="layer4", in_channels=8, num_classes=K)


def make_model(size=32, options=(), **arguments):
    torch.manual_seed(0)
    network = build_network(
        SmallResNet(widths=(4, 4, 6, 8)),
        in_feature="layer4",
        in_channels=8,
        stride=8,
        size=size,
        num_classes=K,
        stage_classes=None,
        num_factors=8,
        hidden_channels=8,
        **STAGES.get(dict(options).get("method"), {}) | dict(options),
    )
    model = Model(network, make_classifier(), size=size, **PIXELS | arguments)
    model.has_classifier.fill_(True)
    return model


def make_sample(labels, *, mask=False, size=(32, 32), seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample = {"image": torch.randint(256, (3, *size), generator=generator).byte()}
    sample["image_labels"] = labels
    if mask:
        sample["sem_seg"] = torch.zeros(size, dtype=torch.int64)
        for row, label in enumerate(labels):
            sample["sem_seg"][4 * row : 4 * row + 4] = label + 1
        sample["sem_seg"][-2:] = 255
    return sample


def losses_of(model, samples):
    model.logged = {}
    return model.train()(samples), model.logged


def normalised(sample):
    return (sample["image"].float() - 128) / 58


def test_losses_are_those_of_the_plain_network():
    model = make_model()
    samples = [make_sample([2, 0], mask=True), make_sample([1, 3], seed=1)]
    losses, logged = losses_of(model, samples)
    images = torch.stack([normalised(sample) for sample in samples])
    pairs = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 0, 1, 3])
    outputs = model.network.train()(images, *pairs)
    log_prob = outputs.class_logits.log_softmax(1)
    assert losses["loss_labels"].item() == pytest.approx(
        -log_prob[torch.arange(4), pairs[1]].mean().item(), rel=1e-5
    )
    truth = samples[0]["sem_seg"]
    known = truth != 255
    total = 0.0
    for pair, label in enumerate((2, 0)):
        log_prob = outputs.mask_logits[pair].log_softmax(0)
        chosen = torch.where(truth == label + 1, log_prob[1], log_prob[0])
        total += -chosen[known].sum().item()
    expected = 2.0 * total / (2 * known.sum().item())
    assert losses["loss_masks"].item() == pytest.approx(expected, rel=1e-5)
    assert logged["images_without_labels"] == 0
    assert 0.9 < logged["attention_entropy"] <= 1


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_one_side_or_without_labels_reach_all_trained_weights(method):
    model = make_model(options={"method": method})
    for samples, has_labels, has_masks in (
        ([make_sample([1]), make_sample([0, 3])], True, False),
        ([make_sample([2, 0], mask=True)], True, True),
        ([make_sample([2], mask=True), make_sample([])], True, True),
        ([make_sample([]), make_sample([])], False, False),
        ([make_sample([], mask=True)], False, False),
        ([], False, False),
    ):
        losses, logged = losses_of(model, samples)
        assert (losses["loss_labels"] > 0) == has_labels
        assert (losses["loss_masks"] > 0) == has_masks
        assert logged["images_without_labels"] == sum(
            not sample["image_labels"] for sample in samples
        )
        model.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == name.startswith("network.") - (
                name.startswith("network.encoder.")
            ), name
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_target_masks_change_nothing_unless_they_are_given(method):
    model = make_model(options={"method": method})
    model.network.decoder.predictor.weight.data.normal_(std=3)
    source, target = make_sample([2], mask=True), make_sample([1], seed=1)
    without, _ = losses_of(model, [source, target])
    given, _ = losses_of(model, [source, target | {"sem_seg": source["sem_seg"]}])
    assert torch.equal(without["loss_labels"], given["loss_labels"])
    assert not torch.equal(without["loss_masks"], given["loss_masks"])


def reference_masks(model, image, labels):
    """Masks of one image as section 5 of the reference code merges them, a label at a time."""
    square = (model.size, model.size)
    image = ((image.float() - 128) / 58)[None]
    resized = F.interpolate(image, square, mode="bilinear", antialias=True)
    masks = []
    for label in labels:
        outputs = model.network(resized, torch.tensor([0]), torch.tensor([label]))
        background, foreground = outputs.mask_logits[0].softmax(0)
        prob = foreground / (foreground + background / 2)
        prob = F.interpolate(prob[None, None], image.shape[2:], mode="bilinear", antialias=True)
        masks.append(prob[0, 0])
    return torch.stack(masks)


def reference_label_map(masks, labels):
    """The most probable label where it is more probable than the background, pixel by pixel."""
    label_map = torch.zeros(masks.shape[1:], dtype=torch.int64)
    for y, x in np.ndindex(*label_map.shape):
        best = max(range(len(labels)), key=lambda i: masks[i, y, x].item())
        if masks[best, y, x] > 0.5:
            label_map[y, x] = labels[best] + 1
    return label_map


def shift_masks(model, sample):
    """Make half of the pixels foreground: with random weights none or all of them are."""
    with torch.no_grad():
        predictor = model.network.decoder.predictor
        predictor.weight.normal_(std=3, generator=torch.Generator().manual_seed(1))
        predictor.bias.zero_()
        (result,) = model([sample])
        predictor.bias[0] = result["masks_prob"].median().logit()


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "side"), [((32, 32), 32), ((21, 37), 32), ((40, 18), 32), ((30, 30), 35)]
)
def test_masks_are_those_of_the_plain_network_label_by_label(size, side):
    """Also of sizes that the stride does not divide, and of images that are not square."""
    model = make_model(side, gt_labels=True).eval()
    samples = [make_sample([3, 1], size=size), make_sample([0], size=size[::-1], seed=1)]
    shift_masks(model, samples[0])
    for sample, result in zip(samples, model(samples), strict=True):
        labels = sorted(sample["image_labels"])
        masks = reference_masks(model, sample["image"], labels)
        assert result["image_labels"].tolist() == labels
        torch.testing.assert_close(result["masks_prob"], masks, atol=1e-5, rtol=1e-4)
        assert result["sem_seg"].dtype == torch.int64
        assert torch.equal(result["sem_seg"], reference_label_map(result["masks_prob"], labels))
        assert result["attention"].shape[0] == result["densified"].shape[0] == len(labels)
    assert 0.2 < (model(samples[:1])[0]["sem_seg"] > 0).float().mean() < 0.9


@torch.no_grad()
def test_outputs_have_the_size_of_the_file():
    model = make_model(gt_labels=True).eval()
    small = make_sample([1], size=(20, 30))
    shift_masks(model, small)
    (result,) = model([small | {"height": 40, "width": 60}])
    assert result["sem_seg"].shape == result["masks_prob"].shape[1:] == (40, 60)
    (plain,) = model([small])
    enlarged = F.interpolate(plain["masks_prob"][None], (40, 60), mode="bilinear")[0]
    assert (enlarged - result["masks_prob"]).abs().mean() < 0.02


def set_classifier(model, logits):
    """Make the classifier predict the same logits for every image."""
    with torch.no_grad():
        model.classifier.classifier.weight.zero_()
        model.classifier.classifier.bias.copy_(torch.tensor(logits))


@torch.no_grad()
def test_labels_come_from_the_classifier_the_candidates_or_the_truth():
    model = make_model().eval()
    set_classifier(model, [3.0, 0.3, 2.0, -1.0])  # 0.95, 0.57, 0.88, 0.27

    def labels(**sample):
        (result,) = model([make_sample([3]) | sample])
        return result["image_labels"].tolist(), result.get("image_labels_prob")

    assert labels()[0] == [0, 2]
    assert labels(candidate_labels=[1, 2, 3])[0] == [2]
    assert labels(candidate_labels=[1, 3])[0] == [1]  # none has 0.6: the most probable
    torch.testing.assert_close(labels()[1], torch.tensor([3.0, 0.3, 2.0, -1.0]).sigmoid())
    model.gt_labels = True
    assert labels() == ([3], None)
    assert labels(image_labels=[])[0] == []
    both = model([make_sample([3]), {"image": make_sample([])["image"]}])
    assert [result["image_labels"].tolist() for result in both] == [[3], [0, 2]]
    # Nobody gave the labels of a photograph; as none, it would show nothing.
    (photograph,) = model([rgb_sample(np.zeros((32, 32, 3), np.uint8))])
    assert photograph["image_labels"].tolist() == [0, 2]


@torch.no_grad()
def test_an_image_without_labels_is_background():
    (result,) = make_model(gt_labels=True).eval()([make_sample([], size=(9, 7))])
    assert torch.equal(result["sem_seg"], torch.zeros(9, 7, dtype=torch.int64))
    assert result["masks_prob"].shape == (0, 9, 7)
    assert make_model().eval()([]) == []


def test_the_classifier_is_never_trained():
    model = make_model()
    before = {n: p.clone() for n, p in model.classifier.state_dict().items()}
    losses_of(model, [make_sample([2, 0], mask=True)])
    assert not model.classifier.training
    assert not any(p.requires_grad for p in model.classifier.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.classifier.state_dict().items())


@torch.no_grad()
def test_the_crf_says_where_and_the_network_which_label():
    pytest.importorskip("pydensecrf", reason="the extra `crf` is not installed")
    model = make_model(gt_labels=True).eval()
    sample = make_sample([3, 1], size=(24, 32))
    shift_masks(model, sample)
    (plain,) = model([sample])
    model.crf = True
    (result,) = model([sample])
    assert torch.equal(result["masks_prob"], plain["masks_prob"])
    pixels = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())
    scores = []
    for prob in plain["masks_prob"].numpy():
        refined = dense_crf.refine(pixels, np.stack([1 - prob, prob]), dense_crf.TRANSFERNET)
        scores.append(prob * (refined[1] > refined[0]))
    scores = np.stack(scores)
    expected = np.where(scores.max(0) > 0, np.array([2, 4])[scores.argmax(0)], 0)
    assert np.array_equal(result["sem_seg"].numpy(), expected)
    assert not torch.equal(result["sem_seg"], plain["sem_seg"])


def test_a_crf_that_is_not_installed_is_missed_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[crf\]'"):
        make_model(crf=True)


def test_labels_that_an_image_does_not_have_count_as_absent():
    """Also source labels on a target image, of which nobody knows, and whoever may be candidate."""
    torch.manual_seed(0)
    model = SampleClassifier(make_classifier(), size=32)
    samples = [make_sample([0]), make_sample([1], seed=1) | {"candidate_labels": [1, 3]}]
    loss = model.train()(samples)["loss_labels"]
    logits = model.classifier(model.preprocess(samples))
    labels = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]])
    expected = F.binary_cross_entropy_with_logits(logits, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_classifier_becomes_the_encoder_and_chooses_labels():
    model = make_model()
    model.has_classifier.fill_(False)
    with pytest.raises(
        ValueError, match=r"no trained classifier.*CLASSIFIER_WEIGHTS\), or set gt_l"
    ):
        model.eval()([make_sample([1])])
    source = SampleClassifier(make_classifier(), size=32)
    model.start_from(source.state_dict(), "It")
    assert model.has_classifier
    for own, theirs in (
        (model.classifier, source.classifier),
        (model.network.encoder, source.classifier.backbone),
    ):
        for name, value in own.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name])
    lacking = source.state_dict()
    del lacking["classifier.backbone.layer1.0.conv1.weight"]
    lacking["classifier.classifier.bias"] = torch.zeros(5)
    words = r"It lacks 2 of the \d+ weights of the classifier, or .*layer1\.0\.conv1.*Give a check"
    with pytest.raises(ValueError, match=words):
        model.start_from(lacking, "It")


def test_checkpoints_hold_what_the_weights_do_not_say():
    names = ("a", "b", "c", "d")
    state = make_model(class_names=names).state_dict()
    without = make_model()
    without.load_state_dict(state)
    assert without.class_names == names
    with pytest.raises(ValueError, match=r"Class 1 is 'b' in the checkpoint, but 'x' by the data"):
        make_model(class_names=("a", "x", "c", "d")).load_state_dict(state)
    with pytest.raises(ValueError, match=r"of feature_scale 1\.0, but this model of 0\.004"):
        make_model(options={"feature_scale": 0.004}).load_state_dict(state, strict=False)
    with pytest.raises(ValueError, match=r"of method 'TransferNet', but this model of 'BaselineN"):
        make_model(options={"method": "baseline"}).load_state_dict(state, strict=False)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (
            [{"image": torch.zeros(3, 32, 32)}],
            r"no 'image_labels'\. Make samples with TransferMapper",
        ),
        ([make_sample([4])], r"image 0 of the batch has image_labels \[4\]"),
        (
            [make_sample([1]) | {"sem_seg": torch.zeros(16, 16, dtype=torch.int64)}],
            r"label map of \(16, 16\), but .* trains on \(32, 32\).*size=32",
        ),
    ],
)
def test_bad_training_samples_are_named(samples, words):
    with pytest.raises(ValueError, match=words):
        make_model().train()(samples)


def test_a_true_label_outside_the_class_list_is_named():
    with pytest.raises(ValueError, match=r"image_labels \[7\]"):
        make_model(gt_labels=True).eval()([make_sample([7])])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "fcn"}, r"method of .* must be one of 'transfernet', 'baseline', 'decoupled'"),
        ({"attention": "mlp"}, r"attention .*must be one of 'factored', 'fc', got 'mlp'"),
        ({"decoder": "none"}, r"decoder .*must be one of 'transposed', 'unpooling'"),
        ({"decoder_input": "z"}, r"decoder_input must be one of"),
        ({"stage": "two"}, r"train_stage must be one of 'attention', 'joint'"),
        ({"decoder": "unpooling"}, r"'unpooling' needs all pooling switches of VGG-16"),
        ({"attention": "fc", "size": 36}, r"size is 36, but attention 'fc' needs a multiple of 8"),
        (
            {"method": "baseline", "freeze_attention": True},
            r"freeze_attention is True, but the method 'baseline' has no attention\. Set it to",
        ),
        (
            {"method": "decoupled", "stage": "attention"},
            r"train_stage of a baseline must be one of 'source', 'target', got 'attention'",
        ),
        (
            {"stage": "attention", "freeze_attention": True},
            r"freeze_attention leaves only the classifier",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(options, words):
    options = dict(options)
    with pytest.raises(ValueError, match=words):
        make_model(options.pop("size", 32), options)
