import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from maskx.core.backbones import VGG16, SmallResNet
from maskx.core.image_classifier import ImageClassifier, LayerTaps, choose_labels, multi_hot
from maskx.core.losses import multi_label_loss


class FixedBackbone(nn.Module):
    """Returns the same feature map, whatever the images are; has no aliases, no shapes."""

    def __init__(self, feature):
        super().__init__()
        self.feature = feature
        self.inner = nn.Identity()
        self.split = nn.Identity()

    def forward(self, images):
        return self.split({"res5": self.inner(self.feature)})


def small_classifier(num_classes=5):
    torch.manual_seed(0)
    backbone = SmallResNet(widths=(4, 6, 8, 10))
    return ImageClassifier(
        backbone, in_feature="layer4", in_channels=10, num_classes=num_classes
    ).eval()


def test_logits_are_those_computed_by_hand():
    # Channel means are 2 and 10.
    feature = torch.tensor([[[[1.0, 3.0], [2.0, 2.0]], [[4.0, 8.0], [12.0, 16.0]]]])
    model = ImageClassifier(FixedBackbone(feature), in_feature="res5", in_channels=2, num_classes=2)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor([[1.0, 0.5], [-3.0, 0.0]]))
        model.classifier.bias.copy_(torch.tensor([0.25, 1.0]))
    assert model(torch.zeros(1, 3, 8, 8)).tolist() == [[7.25, -5.0]]
    maps = model.activation_maps(feature)
    assert maps.tolist() == [[[[3.0, 7.0], [8.0, 10.0]], [[-3.0, -9.0], [-6.0, -6.0]]]]


@pytest.mark.parametrize("size", [(64, 64), (41, 70)])
def test_activation_maps_add_up_to_the_logits(size):
    model = small_classifier()
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        maps = model.activation_maps(model.backbone(images)["layer4"])
        logits = model(images)
    assert maps.shape == (3, 5, -(-size[0] // 8), -(-size[1] // 8))
    torch.testing.assert_close(maps.mean(dim=(2, 3)) + model.classifier.bias, logits)


@pytest.mark.parametrize("labels", [[3], [4, 0], []])
def test_only_the_maps_that_are_asked_for_are_made(labels):
    model = small_classifier()
    features = torch.randn(2, 10, 4, 6)
    maps = model.activation_maps(features, labels)
    assert maps.shape == (2, len(labels), 4, 6)
    torch.testing.assert_close(maps, model.activation_maps(features)[:, labels])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"in_feature": "res5"},
            "one of layer1, layer2, layer3, layer4; got 'res5'",
        ),
        ({"in_channels": 12}, "must be the channels of 'layer4', 10; got 12"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)
def test_a_classifier_that_does_not_fit_its_backbone_is_refused(change, message):
    options = {"in_feature": "layer4", "in_channels": 10, "num_classes": 5, **change}
    with pytest.raises(ValueError, match=message):
        ImageClassifier(SmallResNet(widths=(4, 6, 8, 10)), **options)


def test_training_lowers_the_loss_and_reaches_every_parameter():
    model = small_classifier(num_classes=2).train()
    images = torch.randn(4, 3, 32, 32)
    labels = multi_hot([[0], [1], [0, 1], []], 2, "cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = multi_label_loss(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_loss_is_the_mean_over_images_and_classes():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 3.0]])
    labels = torch.tensor([[1, 0], [0, 1]])
    prob = [[1 / (1 + math.exp(-x)) for x in row] for row in logits.tolist()]
    expected = -(
        math.log(prob[0][0])
        + math.log(1 - prob[0][1])
        + math.log(1 - prob[1][0])
        + math.log(prob[1][1])
    )
    assert float(multi_label_loss(logits, labels)) == pytest.approx(expected / 4)


def test_an_empty_batch_has_a_zero_loss_with_a_graph():
    head = nn.Linear(3, 2)
    loss = multi_label_loss(head(torch.zeros(0, 3)), torch.zeros(0, 2))
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(head.weight.grad, torch.zeros(2, 3))


def test_labels_above_the_threshold_are_chosen_or_else_the_best():
    probs = torch.tensor([[0.7, 0.6, 0.1], [0.2, 0.1, 0.3], [0.59, 0.0, 0.58]])
    expected = [[True, True, False], [False, False, True], [True, False, False]]
    assert choose_labels(probs).tolist() == expected
    assert choose_labels(probs, 0.15)[1].tolist() == [True, False, True]
    assert choose_labels(torch.zeros(0, 3)).shape == (0, 3)


def test_a_threshold_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"threshold must be a probability in \[0, 1\], got 60"):
        choose_labels(torch.zeros(1, 2), 60)


@given(st.lists(st.lists(st.integers(0, 6), max_size=8), max_size=5))
def test_multi_hot_marks_each_label_once(image_labels):
    targets = multi_hot(image_labels, 7, "cpu")
    assert targets.dtype == torch.float32
    assert targets.shape == (len(image_labels), 7)
    expected = [[float(c in labels) for c in range(7)] for labels in image_labels]
    assert targets.tolist() == expected


def test_multi_hot_names_labels_outside_the_list():
    with pytest.raises(
        ValueError, match=r"image 1 of the batch has image_labels \[-1, 25\].*0 to 19"
    ):
        multi_hot([[3], [25, 4, -1, 25]], 20, "cpu")


def test_taps_keep_what_the_layers_put_out():
    model = small_classifier()
    backbone = model.backbone
    images = torch.randn(2, 3, 40, 56)
    with torch.no_grad(), LayerTaps(backbone, ("C41", "layer3", "C43")) as taps:
        model(images)
    with torch.no_grad():
        features = backbone(images)
        first_block = backbone.layer4[0](features["layer3"])
    assert set(taps.features) == {"C41", "layer3", "C43"}
    assert torch.equal(taps.features["C41"], first_block)
    assert torch.equal(taps.features["layer3"], features["layer3"])
    assert torch.equal(taps.features["C43"], features["layer4"])


def test_taps_see_a_convolution_of_vgg_before_its_relu():
    backbone = VGG16()
    with torch.no_grad(), LayerTaps(backbone, ("features.0", "conv1_1")) as taps:
        backbone(torch.randn(1, 3, 16, 16))
    assert taps.features["features.0"].min() < 0
    assert torch.equal(taps.features["features.0"].relu(), taps.features["conv1_1"])


def test_taps_do_not_cut_the_graph():
    model = small_classifier()
    with LayerTaps(model.backbone, ("C41",)) as taps:
        model(torch.randn(1, 3, 32, 32))
    taps.features["C41"].sum().backward()
    assert model.backbone.conv1.weight.grad is not None


def hooks(module):
    return sum(len(layer._forward_hooks) for layer in module.modules())


def test_taps_are_gone_after_use_also_after_an_exception():
    model = small_classifier()
    taps = LayerTaps(model.backbone, ("C41", "C42"))
    assert hooks(model) == 0
    with taps:
        assert hooks(model) == 2
        model(torch.randn(1, 3, 32, 32))
    assert hooks(model) == 0
    before = taps.features["C41"]
    model(torch.randn(1, 3, 32, 32))
    assert taps.features["C41"] is before
    with pytest.raises(RuntimeError, match="channels"), taps:
        model(torch.randn(1, 4, 32, 32))
    assert hooks(model) == 0
    assert taps.features == {}


def test_taps_work_on_any_module():
    backbone = FixedBackbone(torch.ones(1, 2, 3, 3))
    with LayerTaps(backbone, ("inner",)) as taps:
        backbone(None)
    assert torch.equal(taps.features["inner"], torch.ones(1, 2, 3, 3))


def test_an_unknown_layer_is_refused_with_those_that_exist():
    with pytest.raises(
        ValueError,
        match=r"no layer 'C44', 'res5'; it has C41, C42, C43, conv1, bn1, .*layer4\.2",
    ):
        LayerTaps(SmallResNet(), ("C41", "C44", "res5"))


def test_a_layer_that_puts_out_no_tensor_is_refused():
    backbone = FixedBackbone(torch.ones(1, 2, 3, 3))
    with (
        pytest.raises(ValueError, match="layer 'split' puts out a dict, not a tensor"),
        LayerTaps(backbone, ("split",)),
    ):
        backbone(None)
    assert hooks(backbone) == 0
