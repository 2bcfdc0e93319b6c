import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transfer_pairs import (
    IMAGE_SIZE,
    NO_PAIRS,
    PAIR_IMAGES,
    PAIR_LABELS,
    make_images,
    share_of_losses_left,
)

from maskx.core.backbones import VGG16, SmallResNet
from maskx.systems.transfernet.baselines import BaselineNet, DecoupledNet, ScoreMapClassifier
from maskx.systems.transfernet.decoder import TransposedDecoder, UnpoolingDecoder
from maskx.systems.transfernet.network import mask_loss

D, L, IGNORE = 12, 4, 255


def make_encoder():
    """Random encoder whose running statistics are those of the images, as after training."""
    encoder = SmallResNet(widths=(4, 6, 8, D))
    for _ in range(30):
        encoder(make_images())
    return encoder


def make_net(kind, **changes):
    torch.manual_seed(0)
    arguments = {
        "in_feature": "layer4",
        "in_channels": D,
        "num_classes": L,
        "decoder": TransposedDecoder(stride=8, widths=(6, 5, 4, 3)),
        "classifier_channels": 9,
    }
    if kind == "baseline fc":
        arguments["feature_size"] = (4, 6)
    baseline = DecoupledNet if kind == "decoupled" else BaselineNet
    if kind == "decoupled":
        arguments["bridge_channels"] = 8
    return baseline(make_encoder(), **(arguments | changes))


KINDS = ("baseline", "baseline fc", "decoupled")


def make_targets():
    return torch.randint(0, 2, (3, *IMAGE_SIZE), generator=torch.Generator().manual_seed(2))


def make_classifier():
    torch.manual_seed(0)
    classifier = ScoreMapClassifier(in_channels=D, num_classes=L, hidden_channels=9)
    for parameter in classifier.parameters():
        nn.init.normal_(parameter)
    return classifier.double()


def test_score_maps_average_to_the_logits_and_equal_a_full_convolution():
    classifier = make_classifier()
    features = torch.randn(2, D, 3, 5, dtype=torch.float64)
    logits, hidden = classifier(features)
    maps = classifier.score_maps(hidden, PAIR_IMAGES, PAIR_LABELS)
    torch.testing.assert_close(maps.mean(dim=(1, 2)), logits[PAIR_IMAGES, PAIR_LABELS])
    weight = classifier.score.weight[:, :, None, None]
    every = F.conv2d(classifier.hidden(features).relu(), weight, classifier.score.bias)
    torch.testing.assert_close(maps, every[PAIR_IMAGES, PAIR_LABELS])


def test_score_gradients_equal_autograd_and_differ_between_positions():
    classifier = make_classifier()
    features = torch.randn(2, D, 3, 5, dtype=torch.float64, requires_grad=True)
    logits, hidden = classifier(features)
    with torch.inference_mode():
        found = classifier.score_gradients(hidden, PAIR_IMAGES, PAIR_LABELS)
    for pair, (image, label) in enumerate(zip(PAIR_IMAGES, PAIR_LABELS, strict=True)):
        (expected,) = torch.autograd.grad(logits[image, label], features, retain_graph=True)
        torch.testing.assert_close(found[pair], expected[image])
    assert (found.std(dim=(2, 3)) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_masks_have_the_size_of_the_image_and_equal_pairs_on_their_own(kind):
    net = make_net(kind).eval()
    images = make_images()
    outputs = net(images, PAIR_IMAGES, PAIR_LABELS)
    assert outputs.class_logits.shape == (2, L)
    assert outputs.mask_logits.shape == (3, 2, *IMAGE_SIZE)
    wanted = torch.tensor([False, True, True])
    some = net(images, PAIR_IMAGES, PAIR_LABELS, wanted)
    torch.testing.assert_close(some.mask_logits, outputs.mask_logits[wanted])
    alone = net(images[1:], torch.tensor([0]), torch.tensor([3]))
    torch.testing.assert_close(alone.mask_logits, outputs.mask_logits[2:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_depends_on_the_label(kind):
    net = make_net(kind).eval()
    nn.init.normal_(net.classifier.score.weight)
    nn.init.normal_(net.decoder.predictor.weight)
    outputs = net(make_images(), torch.tensor([1, 1]), torch.tensor([0, 3]))
    assert (outputs.mask_logits[0] - outputs.mask_logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["baseline", "decoupled"])
def test_any_size_of_image_works(kind):
    images = make_images(size=(41, 64))
    outputs = make_net(kind)(images, PAIR_IMAGES, PAIR_LABELS)
    assert outputs.mask_logits.shape == (3, 2, 41, 64)


def test_unpooling_decoder_works_with_the_baselines():
    for baseline in (BaselineNet, DecoupledNet):
        torch.manual_seed(0)
        net = baseline(
            VGG16(),
            in_feature="conv5_3",
            in_channels=512,
            num_classes=L,
            decoder=UnpoolingDecoder(),
            classifier_channels=8,
        )
        with torch.no_grad():
            outputs = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
        assert outputs.mask_logits.shape == (3, 2, *IMAGE_SIZE)


def test_losses_by_hand():
    net = make_net("baseline")
    outputs = net(make_images(3), PAIR_IMAGES, PAIR_LABELS)
    losses = net.losses(outputs, PAIR_IMAGES, PAIR_LABELS, make_targets())
    # the third image has no pair: nothing is known of its labels
    expected = 0
    for logits, labels in zip(outputs.class_logits[:2].tolist(), ({2}, {0, 3}), strict=True):
        for label, logit in enumerate(logits):
            sign = 1 if label in labels else -1
            expected += math.log1p(math.exp(-sign * logit)) / (2 * L)
    assert losses["loss_labels"].item() == pytest.approx(expected, rel=1e-5)
    expected = 2 * mask_loss(outputs.mask_logits, make_targets())
    torch.testing.assert_close(losses["loss_masks"], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("freeze_encoder", [True, False])
def test_masks_train_the_decoder_and_labels_the_classifier(kind, freeze_encoder):
    net = make_net(kind, freeze_encoder=freeze_encoder).train()
    outputs = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
    losses = net.losses(outputs, PAIR_IMAGES, PAIR_LABELS, make_targets())
    losses["loss_masks"].backward()
    got = {name.partition(".")[0] for name, p in net.named_parameters() if p.grad is not None}
    assert not got & {"encoder", "classifier"}
    net.zero_grad()
    losses["loss_labels"].backward()
    got = {name.partition(".")[0] for name, p in net.named_parameters() if p.grad is not None}
    assert got == {"classifier"} | (set() if freeze_encoder else {"encoder"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["no masks", "no pairs"])
def test_a_batch_without_supervision_gives_zero_with_graph_through_every_parameter(kind, case):
    net = make_net(kind)
    pair_images, pair_labels = (
        (NO_PAIRS, NO_PAIRS) if case == "no pairs" else (PAIR_IMAGES, PAIR_LABELS)
    )
    targets = torch.full((len(pair_images), *IMAGE_SIZE), IGNORE)
    outputs = net(make_images(), pair_images, pair_labels)
    losses = net.losses(outputs, pair_images, pair_labels, targets)
    assert losses["loss_masks"].item() == 0
    assert (losses["loss_labels"].item() == 0) == (case == "no pairs")
    sum(losses.values()).backward()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    assert all(parameter.grad.isfinite().all() for parameter in trained)


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_a_mask_and_the_labels(kind):
    net = make_net(kind)
    shares = share_of_losses_left(net, steps=50)
    assert all(share < 0.8 for share in shares.values())


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_gives_about_the_same(kind):
    """Gradients of a mean over positions, and squares of large features, leave float16."""
    net = make_net(kind)
    net.encoder.register_forward_hook(lambda *args: {"layer4": args[-1]["layer4"] * 100})
    nn.init.normal_(net.decoder.predictor.weight)
    expected = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
    with torch.autocast("cpu", dtype=torch.float16):
        found = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
        losses = net.losses(found, PAIR_IMAGES, PAIR_LABELS, make_targets())
    assert expected.mask_logits.std() > 0.05
    atol = 0.05 * expected.mask_logits.std().item()
    torch.testing.assert_close(
        found.mask_logits.float(), expected.mask_logits, rtol=0.05, atol=atol
    )
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def test_baseline_of_one_size_refuses_another():
    net = make_net("baseline fc")
    with pytest.raises(ValueError, match=r"feature map of 6 x 6 positions. Allowed: 4 x 6"):
        net(make_images(size=(48, 48)), PAIR_IMAGES, PAIR_LABELS)
    other = make_net("baseline fc", feature_size=(6, 4))
    with pytest.raises(ValueError, match=r"maps of 6 x 4 positions, but the checkpoint for 4 x 6"):
        other.load_state_dict(net.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_stage_trains_the_classification_network_on_the_labels_of_the_target(kind):
    """Appendix B: the decoder stays what the source has made of it."""
    net = make_net(kind, freeze_encoder=False, train_stage="target", stage_classes=[1, 3]).train()
    outputs = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
    assert outputs.mask_logits is None
    losses = net.losses(outputs, PAIR_IMAGES, PAIR_LABELS, None)
    labels = torch.zeros_like(outputs.class_logits)
    labels[PAIR_IMAGES, PAIR_LABELS] = 1
    columns = (outputs.class_logits[:, [1, 3]], labels[:, [1, 3]])
    expected = F.binary_cross_entropy_with_logits(*columns)
    assert list(losses) == ["loss_labels"]
    torch.testing.assert_close(losses["loss_labels"], expected)
    losses["loss_labels"].backward()
    for name, parameter in net.named_parameters():
        is_trained = name.startswith(("encoder.", "classifier."))
        assert parameter.requires_grad == is_trained, name
        assert (parameter.grad is not None) == is_trained, name
    others = [0, 2, *range(4, outputs.class_logits.shape[1])]
    assert not net.classifier.score.weight.grad[others].any()
    assert net.eval()(make_images(), PAIR_IMAGES, PAIR_LABELS).mask_logits is not None


def test_there_are_two_stages():
    with pytest.raises(
        ValueError, match=r"train_stage of a baseline must be one of 'source', 'tar"
    ):
        make_net("baseline", train_stage="joint")
