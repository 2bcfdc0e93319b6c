import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from maskx.core.image_classifier import ImageClassifier
from maskx.data import dense_crf
from maskx.detectron2 import MaskXSmallResNet, MaskXTransferClassifier, MaskXTransferNet
from maskx.systems.transfernet.attention import FactoredAttention
from maskx.systems.transfernet.decoder import TransposedDecoder
from maskx.systems.transfernet.network import TransferNet

METHODS = ("transfernet", "baseline", "decoupled")
KEYS = "MODEL.MASKX.TRANSFERNET."
PIXELS = {"pixel_mean": [128.0] * 3, "pixel_std": [58.0] * 3}


def make_model(**arguments):
    torch.manual_seed(0)
    encoder, backbone = (MaskXSmallResNet(widths=(4, 4, 6, 8)) for _ in range(2))
    network = TransferNet(
        encoder,
        in_feature="layer4",
        in_channels=8,
        num_classes=4,
        attention=FactoredAttention(in_channels=8, num_classes=4, num_factors=8),
        decoder=TransposedDecoder(stride=8),
        hidden_channels=8,
    )
    classifier = ImageClassifier(backbone, in_feature="layer4", in_channels=8, num_classes=4)
    model = MaskXTransferNet(
        network=network, classifier=classifier, **{"image_size": 32} | PIXELS | arguments
    )
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
    with EventStorage() as storage:
        losses = model.train()(samples)
    return losses, {name: value for name, (value, _) in storage.latest().items()}


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
    assert logged["maskx/images_without_labels"] == 0
    assert 0.9 < logged["maskx/attention_entropy"] <= 1


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_one_side_or_without_labels_reach_all_trained_weights(method, make_transfer_cfg):
    model = build_model(make_transfer_cfg(KEYS + "METHOD", method))
    for samples, has_labels, has_masks in (
        ([make_sample([1]), make_sample([0, 3])], True, False),
        ([make_sample([2, 0], mask=True)], True, True),
        ([make_sample([2], mask=True), make_sample([])], True, True),
        ([make_sample([]), make_sample([])], False, False),
        ([make_sample([], mask=True)], False, False),
    ):
        losses, logged = losses_of(model, samples)
        assert (losses["loss_labels"] > 0) == has_labels
        assert (losses["loss_masks"] > 0) == has_masks
        assert logged["maskx/images_without_labels"] == sum(
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


def test_an_encoder_that_is_not_frozen_learns_as_a_whole(make_transfer_cfg):
    """Also with an inner feature map: what comes after it is not there."""
    cfg = make_transfer_cfg(KEYS + "FREEZE_ENCODER", False, "MODEL.MASKX.IN_FEATURE", "layer3")
    model = build_model(cfg)
    losses, _ = losses_of(model, [make_sample([2, 0], mask=True), make_sample([1])])
    sum(losses.values()).backward()
    encoder = dict(model.network.encoder.named_parameters())
    assert encoder
    assert not any(name.startswith("layer4") for name in encoder)
    assert all(parameter.grad is not None for parameter in encoder.values())
    assert any(name.startswith("layer4") for name, _ in model.classifier.backbone.named_modules())


def test_the_stage_attention_has_no_masks(make_transfer_cfg):
    model = build_model(make_transfer_cfg(KEYS + "STAGE", "attention"))
    losses, _ = losses_of(model, [make_sample([2, 0], mask=True), make_sample([1])])
    assert set(losses) == {"loss_labels"}
    model.has_classifier.fill_(True)
    with torch.no_grad():
        (result,) = model.eval()([make_sample([])])
    assert set(result) == {"image_labels", "attention", "image_labels_prob"}


@pytest.mark.parametrize("method", METHODS)
def test_target_masks_change_nothing_unless_they_are_given(method, make_transfer_cfg):
    model = build_model(make_transfer_cfg(KEYS + "METHOD", method))
    source, target = make_sample([2], mask=True), make_sample([1], seed=1)
    without, _ = losses_of(model, [source, target])
    given, _ = losses_of(model, [source, target | {"sem_seg": source["sem_seg"]}])
    assert torch.equal(without["loss_labels"], given["loss_labels"])
    assert not torch.equal(without["loss_masks"], given["loss_masks"])


def reference_masks(model, image, labels):
    """Masks of one image by section 5 of the reference code, a label at a time."""
    height, width = image.shape[1:]
    side = max(height, width)
    square = torch.zeros(3, side, side)
    square[:, :height, :width] = (image.float() - 128) / 58
    size = model.size
    resized = F.interpolate(square[None], (size, size), mode="bilinear", antialias=True)
    masks = []
    for label in labels:
        outputs = model.network(resized, torch.tensor([0]), torch.tensor([label]))
        background, foreground = outputs.mask_logits[0].softmax(0)
        prob = foreground / (foreground + background / 2)
        prob = F.interpolate(prob[None, None], (side, side), mode="bilinear", antialias=True)
        masks.append(prob[0, 0, :height, :width])
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
    ("size", "image_size"), [((32, 32), 32), ((21, 37), 32), ((40, 18), 32), ((30, 30), 35)]
)
def test_masks_are_those_of_the_plain_network_label_by_label(size, image_size):
    """Also of sizes that the stride does not divide, and of images that are not square."""
    model = make_model(image_size=image_size, gt_labels=True).eval()
    samples = [make_sample([3, 1], size=size), make_sample([0], size=size[::-1], seed=1)]
    shift_masks(model, samples[0])
    for sample, result in zip(samples, model(samples), strict=True):
        labels = sample["image_labels"]
        masks = reference_masks(model, sample["image"], labels)
        assert result["image_labels"].tolist() == labels
        torch.testing.assert_close(result["masks_prob"], masks, atol=1e-5, rtol=1e-4)
        assert result["sem_seg"].dtype == torch.int64
        assert torch.equal(result["sem_seg"], reference_label_map(result["masks_prob"], labels))
        assert result["attention"].shape[0] == len(labels)
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


def test_without_a_trained_classifier_labels_are_asked_for(make_transfer_cfg):
    model = build_model(make_transfer_cfg()).eval()
    with pytest.raises(ValueError, match=r"no trained classifier.*CLASSIFIER_WEIGHTS, or set TE"):
        model([make_sample([1])])
    model.gt_labels = True
    with torch.no_grad():
        assert model([make_sample([1])])[0]["image_labels"].tolist() == [1]


@torch.no_grad()
def test_the_crf_says_where_and_the_network_which_label():
    pytest.importorskip("pydensecrf")
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
    expected = np.where(scores.max(0) > 0, np.array([4, 2])[scores.argmax(0)], 0)
    assert np.array_equal(result["sem_seg"].numpy(), expected)
    assert not torch.equal(result["sem_seg"], plain["sem_seg"])


def test_a_crf_that_is_not_installed_is_missed_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[crf\]'"):
        make_model(crf=True)


def save(model, path):
    torch.save({"model": model.state_dict(), "iteration": 3}, path)
    return str(path)


@pytest.fixture
def classifier_weights(make_transfer_cfg, tmp_path):
    cfg = make_transfer_cfg(file="quick_schedules/stage0_classifier_scenes_cpu.yaml")
    torch.manual_seed(5)
    return save(build_model(cfg), tmp_path / "classifier.pth")


@pytest.mark.parametrize("feature", ["", "layer3"])
def test_a_classifier_becomes_the_encoder_and_chooses_labels(
    make_transfer_cfg, classifier_weights, feature
):
    opts = (KEYS + "CLASSIFIER_WEIGHTS", classifier_weights, "MODEL.MASKX.IN_FEATURE", feature)
    model = build_model(make_transfer_cfg(*opts))
    state = torch.load(classifier_weights, weights_only=True)["model"]
    assert model.has_classifier
    for name, value in model.classifier.state_dict().items():
        assert torch.equal(value, state[f"classifier.{name}"])
    for name, value in model.network.encoder.state_dict().items():
        assert torch.equal(value, state[f"classifier.backbone.{name}"])


def test_a_classifier_is_not_read_where_other_weights_are(make_transfer_cfg, classifier_weights):
    opts = (KEYS + "CLASSIFIER_WEIGHTS", "gone.pth", "MODEL.WEIGHTS", classifier_weights)
    assert not build_model(make_transfer_cfg(*opts)).has_classifier


def test_a_classifier_that_lacks_weights_is_refused(make_transfer_cfg, classifier_weights):
    state = torch.load(classifier_weights, weights_only=True)
    opts = (KEYS + "CLASSIFIER_WEIGHTS", classifier_weights)
    words = r"lacks 2 of the \d+ weights of the classifier, or .*: classifier\.classifier\.weight"
    with pytest.raises(ValueError, match=words):
        build_model(make_transfer_cfg(*opts, "MODEL.MASKX.NUM_CLASSES", 5))
    del state["model"]["classifier.backbone.layer1.0.conv1.weight"]
    torch.save(state, classifier_weights)
    words = r"lacks 1 of .*classifier\.backbone\.layer1\.0\.conv1\.weight\. Give a checkpoint of Ma"
    with pytest.raises(ValueError, match=words):
        build_model(make_transfer_cfg(*opts))


@pytest.mark.parametrize("content", [b"", b"nothing", {"weights": 1}, 3])
def test_a_file_that_is_no_checkpoint_is_refused(make_transfer_cfg, tmp_path, content):
    path = tmp_path / "model.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"CLASSIFIER_WEIGHTS '.*model\.pth' cannot be read \(\w+"):
        build_model(make_transfer_cfg(KEYS + "CLASSIFIER_WEIGHTS", str(path)))


def test_labels_that_an_image_does_not_have_count_as_absent():
    """Also source labels on a target image, of which nobody knows, and whoever may be candidate."""
    torch.manual_seed(0)
    backbone = MaskXSmallResNet(widths=(4, 4, 6, 8))
    network = ImageClassifier(backbone, in_feature="layer4", in_channels=8, num_classes=4)
    model = MaskXTransferClassifier(classifier=network, size=32, **PIXELS)
    samples = [make_sample([0]), make_sample([1], seed=1) | {"candidate_labels": [1, 3]}]
    loss = model.train()(samples)["loss_labels"]
    logits = model.classifier(torch.stack([normalised(s) for s in samples]))
    labels = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]])
    expected = F.binary_cross_entropy_with_logits(logits, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([{"image": torch.zeros(3, 32, 32)}], r"no 'image_labels'\. Use MaskXTransferMapper"),
        ([make_sample([4])], r"image 0 of the batch has image_labels \[4\]"),
        ([make_sample([1]), make_sample([1], size=(32, 40))], r"different sizes: \(32, 32\), \(32"),
        (
            [make_sample([1]) | {"sem_seg": torch.zeros(16, 16, dtype=torch.int64)}],
            r"different sizes: \(16, 16\), \(32, 32\)",
        ),
    ],
)
def test_bad_training_samples_are_named(samples, words):
    with pytest.raises(ValueError, match=words), EventStorage():
        make_model().train()(samples)


def test_a_true_label_outside_the_class_list_is_named():
    with pytest.raises(ValueError, match=r"image_labels \[7\]"):
        make_model(gt_labels=True).eval()([make_sample([7])])


VGG = ("MODEL.BACKBONE.NAME", "MaskXVGG16", "MODEL.MASKX.BACKBONE.OUTPUT_STRIDE", 16)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        ((KEYS + "METHOD", "fcn"), r"METHOD must be one of 'transfernet', 'baseline', 'decoupled'"),
        ((KEYS + "ATTENTION", "mlp"), r"ATTENTION must be one of 'factored', 'fc', got 'mlp'"),
        ((KEYS + "DECODER", "none"), r"DECODER must be one of 'transposed', 'unpooling'"),
        ((KEYS + "DECODER_INPUT", "z"), r"decoder_input must be one of"),
        ((KEYS + "STAGE", "two"), r"train_stage must be one of 'attention', 'joint'"),
        ((KEYS + "DECODER", "unpooling"), r"'unpooling', which needs all pooling switches of"),
        ((*VGG[:3], 8, KEYS + "DECODER", "unpooling"), r"MaskXVGG16 with .*OUTPUT_STRIDE 16"),
        (
            (*VGG, KEYS + "DECODER", "unpooling", "INPUT.MASKX.SIZE", 40),
            r"SIZE is 40, but .*DECODER unpooling needs a multiple of 16.*Set it to 32",
        ),
        (
            (*VGG, KEYS + "DECODER", "unpooling", "MODEL.MASKX.IN_FEATURE", "conv4_3"),
            r"all pooling switches of .*IN_FEATURE conv5_3\. Set these, or DECODER transposed",
        ),
        (
            (KEYS + "ATTENTION", "fc", "INPUT.MASKX.SIZE", 36),
            r"SIZE is 36, but .*ATTENTION fc needs a multiple of 8",
        ),
        (
            (KEYS + "METHOD", "baseline", KEYS + "FREEZE_ATTENTION", True),
            r"FREEZE_ATTENTION is True, but METHOD 'baseline' has no attention\. Set it to False",
        ),
        (
            (KEYS + "METHOD", "decoupled", KEYS + "STAGE", "attention"),
            r"STAGE is 'attention', but METHOD 'decoupled' has no attention",
        ),
        (
            (KEYS + "STAGE", "attention", KEYS + "FREEZE_ATTENTION", True),
            r"freeze_attention leaves only the classifier",
        ),
        (("INPUT.MASKX.SIZE", 0), r"INPUT\.MASKX\.SIZE is 0"),
        (("MODEL.MASKX.IN_FEATURE", "layer9"), r"IN_FEATURE \(in_feature\) is 'layer9'"),
    ],
)
def test_keys_that_do_not_fit_are_named(make_transfer_cfg, opts, words):
    with pytest.raises(ValueError, match=words):
        build_model(make_transfer_cfg(*opts))


def test_any_backbone_of_detectron2_will_do(make_transfer_cfg):
    cfg = make_transfer_cfg(
        *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
        *("MODEL.RESNETS.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", 0),
        *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4"], "MODEL.MASKX.IN_FEATURE", "res3"),
    )
    model = build_model(cfg)
    losses, _ = losses_of(model, [make_sample([2, 0], mask=True), make_sample([1])])
    sum(losses.values()).backward()
    model.gt_labels = True
    with torch.no_grad():
        (result,) = model.eval()([make_sample([1], size=(20, 30))])
    assert result["sem_seg"].shape == (20, 30)
    assert result["attention"].shape == (1, 4, 4)


def test_an_fc_checkpoint_of_another_size_is_refused(make_transfer_cfg, tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer

    fc = (KEYS + "ATTENTION", "fc")
    path = save(build_model(make_transfer_cfg(*fc)), tmp_path / "fc.pth")
    model = build_model(make_transfer_cfg(*fc, "INPUT.MASKX.SIZE", 48))
    with pytest.raises(ValueError, match=r"made for feature maps of 6 x 6 positions, but .* 4 x 4"):
        DetectionCheckpointer(model).load(path)
