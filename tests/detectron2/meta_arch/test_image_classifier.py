import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image
from settings import pairs

from maskx.core.backbones import SmallResNet
from maskx.core.image_classifier import ImageClassifier, LayerTaps, choose_labels
from maskx.detectron2 import MaskXImageClassifier, MaskXSmallResNet

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def make_samples(sizes=((48, 48), (48, 48), (30, 70)), labels=((0, 2), (), (3,))):
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)}
        | {"height": size[0], "width": size[1], "image_id": i, "image_labels": list(c)}
        for i, (size, c) in enumerate(zip(sizes, labels, strict=True), start=1)
    ]


def normalise(image):
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (image - mean) / std


@pytest.fixture
def model(make_classifier_cfg):
    torch.manual_seed(0)
    return build_model(make_classifier_cfg())


def test_it_computes_what_the_plain_network_computes(model):
    plain = ImageClassifier(
        SmallResNet(output_stride=8), in_feature="layer4", in_channels=128, num_classes=4
    )
    plain.load_state_dict(model.classifier.state_dict())
    samples = make_samples()[:2]
    images = torch.stack([normalise(sample["image"]) for sample in samples])

    losses = model.train()(samples)
    targets = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]])
    logits = plain.train()(images)
    expected = -(targets * logits.sigmoid().log() + (1 - targets) * (-logits).sigmoid().log())
    assert list(losses) == ["loss_labels"]
    torch.testing.assert_close(losses["loss_labels"], expected.mean())
    losses["loss_labels"].backward()
    assert all(p.grad is not None for p in model.parameters())

    results = model.eval()(samples)
    probs = plain.eval()(images).sigmoid()  # its statistics have moved in the same way
    torch.testing.assert_close(torch.stack([r["image_labels_prob"] for r in results]), probs)


def test_the_labels_it_chooses_come_with_their_activation_maps(model):
    """The mean of a map and the bias are the logit; labels are those of choose_labels."""
    with torch.no_grad():
        model.classifier.classifier.bias.copy_(torch.tensor([1.0, 2, -1, 0]))
    samples = make_samples()
    results = model.eval()(samples)
    probs = torch.stack([result["image_labels_prob"] for result in results])
    for result, chosen in zip(results, choose_labels(probs), strict=True):
        labels = result["image_labels"]
        assert torch.equal(labels, chosen.nonzero()[:, 0])
        assert {0, 1} <= set(labels.tolist())
        assert result["activation_maps"].shape == (len(labels), 6, 6)
        logits = (
            result["activation_maps"].mean(dim=(1, 2)) + model.classifier.classifier.bias[labels]
        )
        torch.testing.assert_close(logits.sigmoid(), result["image_labels_prob"][labels])


def test_test_images_are_warped_as_training_images_are(model):
    """Against Pillow, which the mapper warps with; its pixels are rounded."""
    (sample,) = make_samples(sizes=[(30, 70)], labels=[()])
    sample["image"] = F.avg_pool2d(sample["image"].float(), 5, 1, 2).byte()
    pixels = Image.fromarray(sample["image"].permute(1, 2, 0).numpy())
    warped = np.array(pixels.resize((48, 48), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    found = model.preprocess([sample])
    assert found.shape == (1, 3, 48, 48)
    expected = normalise(torch.as_tensor(warped))[None]
    assert (found - expected).abs().max() < 1.1 / min(STD)


def test_a_batch_is_its_images(model):
    samples = make_samples()
    model.eval()
    together = model(samples)
    for sample, result in zip(samples, together, strict=True):
        (alone,) = model([sample])
        for key, value in alone.items():
            torch.testing.assert_close(result[key], value)
    assert model([]) == []


def test_layers_can_be_tapped(model):
    """As the class patterns read features."""
    model.eval()
    with LayerTaps(model.classifier.backbone, ("C41", "layer3")) as taps:
        logits = model.classifier(model.preprocess(make_samples()))
    assert logits.shape == (3, 4)
    assert taps.features["C41"].shape == (3, 128, 6, 6)
    assert taps.features["layer3"].shape == (3, 96, 6, 6)


@pytest.mark.parametrize(
    ("backbone", "opts", "feature"),
    [
        ("build_resnet_backbone", ("MODEL.RESNETS.OUT_FEATURES", ["res5"]), "res5"),
        ("build_resnet_backbone", ("MODEL.RESNETS.OUT_FEATURES", ["res4"]), "res4"),
        ("MaskXVGG16", (), "conv5_3"),
        ("MaskXVGG16", ("MODEL.MASKX.IN_FEATURE", "conv3_3"), "conv3_3"),
        ("MaskXTimm", ("MODEL.MASKX.IN_FEATURE", "layer4"), "layer4"),
        ("MaskXTimm", ("MODEL.MASKX.IN_FEATURE", "layer2"), "layer2"),
        (
            "build_resnet_backbone",
            ("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4"], "MODEL.MASKX.IN_FEATURE", "res3"),
            "res3",
        ),
        (
            "build_resnet_fpn_backbone",
            pairs(
                {
                    "MODEL.RESNETS.OUT_FEATURES": ["res4", "res5"],
                    "MODEL.FPN.OUT_CHANNELS": 16,
                    "MODEL.FPN.IN_FEATURES": ["res4", "res5"],
                    "MODEL.MASKX.IN_FEATURE": "p4",
                }
            ),
            "p4",
        ),
    ],
)
def test_any_backbone_of_detectron2_can_be_classified(make_classifier_cfg, backbone, opts, feature):
    core = ("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "GN")
    freeze = ("MODEL.BACKBONE.FREEZE_AT", 0, "INPUT.MASKX.SIZE", 64)
    cfg = make_classifier_cfg("MODEL.BACKBONE.NAME", backbone, *core, *freeze, *opts)
    model = build_model(cfg)
    assert model.classifier.in_feature == feature
    assert all(module.training for module in model.modules())
    loss = model.train()(make_samples())["loss_labels"]
    loss.backward()
    assert torch.isfinite(loss)
    assert model.classifier.classifier.weight.grad.abs().sum() > 0
    # Whatever the feature map does not depend on would stop training by several processes.
    parameters = list(model.classifier.backbone.parameters())
    assert [p.grad is not None for p in parameters] == [p.requires_grad for p in parameters]
    assert any(p.requires_grad for p in parameters)
    assert model.eval()(make_samples())[0]["image_labels_prob"].shape == (4,)


def test_it_is_built_without_a_configuration():
    model = MaskXImageClassifier(
        classifier=ImageClassifier(
            MaskXSmallResNet(widths=(4, 4, 4, 8)),
            in_feature="layer4",
            in_channels=8,
            num_classes=4,
        ),
        size=32,
        pixel_mean=MEAN,
        pixel_std=STD,
    )
    assert model(make_samples())["loss_labels"] > 0


def test_the_weights_have_the_names_of_the_plain_network(model):
    assert all(name.startswith("classifier.") for name, _ in model.named_parameters())


@pytest.mark.parametrize(("width", "height"), [(40, 25), (48, 48), (131, 64)])
def test_the_predictor_gives_the_image_as_it_is(make_classifier_cfg, tmp_path, width, height):
    """MIN_SIZE_TEST 0 leaves the resizing to the model, so that images are resized once."""
    cfg = make_classifier_cfg("MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    model = build_model(cfg).eval()
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    predictor = DefaultPredictor(cfg)
    assert np.array_equal(predictor.aug.get_transform(image).apply_image(image), image)
    result = predictor(image)  # BGR
    rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).transpose(2, 0, 1)
    with torch.no_grad():
        (expected,) = model([{"image": torch.as_tensor(rgb)}])
    torch.testing.assert_close(result["image_labels_prob"], expected["image_labels_prob"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("image_labels"), r"sample of image 2 has no 'image_labels'"),
        (lambda s: s.update(image_labels=[4]), r"image 1 of the batch has image_labels \[4\]; cl"),
        (lambda s: s.update(image_labels=[-1]), r"image_labels \[-1\]; class indices of 4"),
    ],
)
def test_bad_labels_are_named(model, change, words):
    samples = make_samples()
    change(samples[1])
    with pytest.raises(ValueError, match=words):
        model.train()(samples)


def test_bad_arguments_are_named(make_classifier_cfg):
    cfg = make_classifier_cfg("MODEL.MASKX.IN_FEATURE", "res5")
    words = r"IN_FEATURE \(in_feature\) is 'res5', which MaskXSmallResNet .* layer1, layer2, layer3"
    with pytest.raises(ValueError, match=words):
        MaskXImageClassifier(cfg)
    with pytest.raises(ValueError, match=r"size \(INPUT\.MASKX\.SIZE\) is 0\. Allowed"):
        MaskXImageClassifier(make_classifier_cfg("INPUT.MASKX.SIZE", 0))
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        MaskXImageClassifier(make_classifier_cfg("MODEL.MASKX.NUM_CLASSES", 0))
