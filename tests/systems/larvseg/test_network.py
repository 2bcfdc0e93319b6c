import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskx.core.backbones import PyramidBackbone, SmallFPN, SmallResNet
from maskx.core.losses import label_pairs
from maskx.core.timm_backbones import TimmBackbone
from maskx.systems.larvseg import network as larvseg
from maskx.systems.larvseg.attention import attention_maps, pseudo_background, top_token_means
from maskx.systems.larvseg.network import (
    LarvSeg,
    attentive_loss,
    image_level_loss,
    segmentation_loss,
)


class Patches(nn.Module):
    """Backbone of one layer with stride 4."""

    def __init__(self, channels=6):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 4, stride=4)

    def forward(self, images):
        return {"last": self.conv(images)}


def make_network(num_classes=9, **options):
    torch.manual_seed(0)
    return LarvSeg(Patches(), in_feature="last", in_channels=6, num_classes=num_classes, **options)


def make_batch(num_labels=9):
    torch.manual_seed(1)
    images = torch.randn(2, 3, 16, 24)
    label_maps = torch.randint(0, num_labels, (2, 16, 24))
    label_maps[:, :5] = 255
    return images, label_maps


@pytest.mark.parametrize("logit_form", ["temperature", "layernorm"])
@pytest.mark.parametrize("single_label", [False, True])
def test_losses_are_those_of_the_parts_and_the_bank_is_filled_last(logit_form, single_label):
    network = make_network(
        logit_form=logit_form, warm_up=1, bank_size=3, top_tokens=4, image_weight=0.2
    )
    images, label_maps = make_batch(4)
    class_indices = torch.tensor([7, 2, 0, 5])
    labels = [[3, 0], [1]]
    network.bank.enqueue(torch.tensor([7, 2, 2, 0]), F.normalize(torch.randn(4, 6), dim=1))
    before = {name: value.clone() for name, value in network.bank.state_dict().items()}
    tokens = network(images)
    found = network.losses(
        tokens,
        class_indices=class_indices,
        label_maps=label_maps,
        image_labels=labels,
        single_label=single_label,
    )
    after = {name: value.clone() for name, value in network.bank.state_dict().items()}
    network.bank.load_state_dict(before)
    classifier, pairs = network.classifier, label_pairs(labels, 4)
    vectors = classifier.class_vectors(class_indices)
    factors = classifier.factors(tokens, vectors)
    classes = class_indices[pairs.classes]
    foreground = network.bank.class_means(classes)
    background = (
        pseudo_background(tokens, pairs, foreground, network.bank, class_indices)
        if single_label
        else None
    )
    seen = torch.tensor([True, False, True])  # class 5 has no image yet
    attention = attention_maps(tokens, pairs, foreground, seen, background)
    expected = {
        "loss_pixels": segmentation_loss(factors.dense(), label_maps, ignore=255),
        "loss_labels": 0.2 * image_level_loss(factors, pairs),
        "loss_attention": 0.1 * attentive_loss(factors, pairs, attention, seen),
    }
    torch.testing.assert_close(found, expected)
    network.bank.enqueue(classes, top_token_means(tokens, vectors, pairs, 4))
    for name, value in network.bank.state_dict().items():
        assert torch.equal(value, after[name])
    assert after["counts"].tolist() == [1, 0, 3, 0, 0, 1, 0, 2, 0]


def test_the_auxiliary_loss_starts_when_the_warm_up_is_over():
    network = make_network(bank_size=2)
    images, _ = make_batch()
    losses = [network.losses(network(images), image_labels=[[3], []]) for _ in range(3)]
    values = [each["loss_attention"].item() for each in losses]
    assert values[:2] == [0, 0]
    assert values[2] > 0


def test_the_single_image_form_needs_no_bank():
    network = make_network(memory="single_image", top_tokens=3)
    assert network.bank is None
    images, _ = make_batch()
    tokens = network(images)
    found = network.losses(tokens, image_labels=[[3, 1], [0]])["loss_attention"]
    pairs, vectors = label_pairs([[3, 1], [0]], 9), network.classifier.class_vectors()
    own, ready = top_token_means(tokens, vectors, pairs, 3), torch.ones(3, dtype=torch.bool)
    attention = attention_maps(tokens, pairs, own, ready)
    factors = network.classifier.factors(tokens, vectors)
    torch.testing.assert_close(found, 0.1 * attentive_loss(factors, pairs, attention, ready))


def test_regions_are_the_tokens_with_a_high_score():
    """The single-image design as the paper's text has it."""
    network = make_network(memory="score_map", pooling="normalised")
    assert network.bank is None
    tokens = network(make_batch()[0])
    found = network.losses(tokens, image_labels=[[3, 1], [0]])["loss_attention"]
    vectors = network.classifier.class_vectors()
    factors = network.classifier.factors(tokens, vectors)
    expected = []
    for image, label, others in ((0, 1, [3]), (0, 3, [1]), (1, 0, [])):
        scores = (vectors[label] @ tokens[image].flatten(1)).tolist()
        middle = (min(scores) + max(scores)) / 2
        region = [place for place, score in enumerate(scores) if score >= middle]
        assert 0 < len(region) < len(scores)
        logits = factors.dense()[image].flatten(1)[:, region].mean(dim=1)
        logits[others] = float("-inf")
        expected.append(F.cross_entropy(logits[None], torch.tensor([label])))
    torch.testing.assert_close(found, 0.1 * torch.stack(expected).mean())
    found.backward()
    assert all(parameter.grad.any() for parameter in network.parameters())


def test_attention_may_be_left_out_for_a_data_set():
    """Table 4 of the paper: its labels are learned without, and the bank does not see it."""
    network = make_network(warm_up=1)
    images, _ = make_batch()
    network.losses(network(images), image_labels=[[3], [1]])
    counts = network.bank.counts.clone()
    losses = network.losses(network(images), image_labels=[[3], [1]], attention=False)
    assert losses["loss_labels"] > 0
    assert losses["loss_attention"] == 0
    assert losses["loss_attention"].requires_grad
    assert torch.equal(network.bank.counts, counts)
    assert network.losses(network(images), image_labels=[[3], [1]])["loss_attention"] > 0


def test_the_baseline_has_no_auxiliary_loss():
    network = make_network(memory="none")
    images, label_maps = make_batch()
    losses = network.losses(network(images), label_maps=label_maps, image_labels=[[0], [2]])
    assert set(losses) == {"loss_pixels", "loss_labels"}


@pytest.mark.parametrize("logit_form", ["temperature", "layernorm"])
@pytest.mark.parametrize("num_images", [0, 2])
@pytest.mark.parametrize("supervision", ["nothing", "ignored pixels, no labels"])
def test_without_supervision_losses_are_zero_with_graph(logit_form, num_images, supervision):
    network = make_network(logit_form=logit_form)
    options = {}
    if supervision != "nothing":
        label_maps = torch.full((num_images, 16, 24), 255)
        options = {"label_maps": label_maps, "image_labels": [[]] * num_images}
    losses = network.losses(network(torch.randn(num_images, 3, 16, 24)), **options)
    for name in ("loss_pixels", "loss_labels", "loss_attention"):
        assert losses[name].item() == 0
        network.zero_grad()
        losses[name].backward(retain_graph=True)
        for parameter in network.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()
    assert not network.bank.counts.any()


def test_auxiliary_loss_trains_all_but_moves_through_no_attention():
    network = make_network(warm_up=1)
    images, _ = make_batch()
    for _ in range(2):
        losses = network.losses(network(images), image_labels=[[3], [1, 2]])
    losses["loss_attention"].backward()
    assert all(parameter.grad.any() for parameter in network.parameters())
    assert not any(buffer.requires_grad for buffer in network.buffers())


def test_sampled_classes_give_the_losses_of_a_smaller_vocabulary():
    network = make_network(sample_classes=2, warm_up=1)
    images, label_maps = make_batch(9)
    label_maps = torch.where(label_maps < 255, label_maps % 2 * 5, 255)  # labels 0 and 5
    tokens = network(images)
    generator = torch.Generator().manual_seed(0)
    found = network.losses(
        tokens, label_maps=label_maps, image_labels=[[5], [7, 0]], generator=generator
    )
    assert network.bank.counts.nonzero().flatten().tolist() == [0, 5, 7]
    random = torch.randperm(9, generator=torch.Generator().manual_seed(0))[:2].tolist()
    chosen = sorted({0, 5, 7, *random})
    assert len(chosen) > 3
    other = make_network(warm_up=1)
    position = torch.full((256,), 255)
    position[chosen] = torch.arange(len(chosen))
    expected = other.losses(
        tokens,
        class_indices=torch.tensor(chosen),
        label_maps=position[label_maps],
        image_labels=[[chosen.index(5)], [chosen.index(7), chosen.index(0)]],
    )
    torch.testing.assert_close(found, expected)


def test_a_pseudo_background_is_looked_for_among_all_classes_of_the_data_set(monkeypatch):
    network = make_network(sample_classes=1, warm_up=1)
    found = []

    def look(tokens, pairs, foreground, bank, class_indices):
        found.append(class_indices.tolist())
        return pseudo_background(tokens, pairs, foreground, bank, class_indices)

    monkeypatch.setattr(larvseg, "pseudo_background", look)
    images, _ = make_batch()
    network.losses(
        network(images),
        class_indices=torch.tensor([7, 2, 0, 5]),
        image_labels=[[3], [1]],
        single_label=True,
    )
    assert found == [[7, 2, 0, 5]]


def test_as_many_image_labels_as_images():
    network = make_network()
    with pytest.raises(ValueError, match="image_labels has 1 entries for 2 images"):
        network.losses(network(torch.randn(2, 3, 8, 8)), image_labels=[[0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "both"}, "memory of LarvSeg must be one of 'cross_image'"),
        ({"pooling": "max"}, "pooling of LarvSeg must be one of 'weighted'"),
        ({"top_tokens": 0}, "top_tokens must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_network(**options)


def test_an_unknown_feature_is_refused():
    network = LarvSeg(Patches(), in_feature="layer4", in_channels=6, num_classes=2)
    with pytest.raises(ValueError, match=r"Patches has no feature 'layer4'. Allowed: last"):
        network(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("make_backbone", "in_feature", "channels", "stride"),
    [
        (SmallFPN, "1", 64, 8),
        (lambda: SmallResNet(output_stride=8), "layer4", 128, 8),
        (
            lambda: PyramidBackbone(TimmBackbone("resnet50"), out_channels=512),
            "layer1",
            512,
            4,
        ),
    ],
    ids=["SmallFPN", "SmallResNet", "ResNet-50 with a pyramid"],
)
def test_a_step_trains_every_backbone(make_backbone, in_feature, channels, stride):
    torch.manual_seed(0)
    network = LarvSeg(
        make_backbone(), in_feature=in_feature, in_channels=channels, num_classes=5, warm_up=1
    )
    network.bank.enqueue(torch.tensor([3, 0]), torch.randn(2, channels))
    tokens = network(torch.randn(2, 3, 64, 64))
    assert tokens.shape == (2, channels, 64 // stride, 64 // stride)
    losses = network.losses(
        tokens, label_maps=torch.randint(0, 5, (2, 64, 64)), image_labels=[[3], [0, 3]]
    )
    assert all(loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    grads = [parameter.grad for parameter in network.classifier.parameters()]
    assert all(grad.any() for grad in grads)
    assert sum(p.grad is not None for p in network.backbone.parameters()) > 10
