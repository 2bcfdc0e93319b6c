"""What Detectron2 adds to the segmentation network of class patterns."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from maskx.detectron2 import MaskXDeepLab, MaskXSmallResNet, evaluate
from maskx.systems.class_patterns.model import DeepLab


def make_samples(count=2, size=(48, 48)):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8),
            "sem_seg": torch.randint(5, size, generator=generator),
            "image_id": image_id,
        }
        for image_id in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("backbone", "opts"),
    [
        ("build_resnet_backbone", ("MODEL.RESNETS.OUT_FEATURES", ["res5"])),
        ("MaskXVGG16", ()),
        ("MaskXTimm", ("MODEL.MASKX.IN_FEATURE", "layer4")),
    ],
)
def test_any_backbone_of_detectron2_can_segment(make_deeplab_cfg, backbone, opts):
    core = ("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "GN")
    freeze = ("MODEL.BACKBONE.FREEZE_AT", 0)
    model = build_model(make_deeplab_cfg("MODEL.BACKBONE.NAME", backbone, *core, *freeze, *opts))
    loss = model.train()(make_samples())["loss_pixels"]
    loss.backward()
    assert torch.isfinite(loss)
    assert model.network.head[0].weight.grad.abs().sum() > 0
    assert model.eval()(make_samples(1))[0]["sem_seg_prob"].shape == (5, 48, 48)


def test_it_is_built_without_a_configuration():
    backbone = MaskXSmallResNet(widths=(4, 4, 4, 8))
    network = DeepLab(backbone, in_feature="layer4", in_channels=8, num_classes=4)
    assert MaskXDeepLab(network=network)(make_samples())["loss_pixels"] > 0


def test_the_predictor_returns_the_file_size(make_deeplab_cfg, tmp_path):
    torch.manual_seed(0)
    cfg = make_deeplab_cfg("MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    model = build_model(cfg).eval()
    with torch.no_grad():
        model.network.head[-1].weight.mul_(200)
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    image = np.random.default_rng(0).integers(0, 256, (33, 57, 3), np.uint8)
    result = DefaultPredictor(cfg)(image)
    rgb = torch.as_tensor(cv2.cvtColor(image, cv2.COLOR_BGR2RGB).transpose(2, 0, 1))
    torch.testing.assert_close(result["sem_seg_prob"], model.predict({"image": rgb}))
    assert result["sem_seg"].shape == (33, 57)


def test_it_starts_from_the_backbone_of_an_image_classifier(
    make_deeplab_cfg, make_classifier_cfg, tmp_path
):
    torch.manual_seed(3)
    classifier = build_model(make_classifier_cfg()).state_dict()
    cfg = make_deeplab_cfg("MODEL.WEIGHTS", str(tmp_path / "classifier.pth"))
    torch.save({"model": classifier}, cfg.MODEL.WEIGHTS)
    for feature in ("", "layer3"):
        cfg.MODEL.MASKX.IN_FEATURE = feature
        model = build_model(cfg)
        head = {name: value.clone() for name, value in model.network.head.state_dict().items()}
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        for name, value in model.network.backbone.state_dict().items():
            assert torch.equal(value, classifier[f"classifier.backbone.{name}"])
        for name, value in model.network.head.state_dict().items():
            assert torch.equal(value, head[name])
    with pytest.raises(ValueError, match=r"lacks 6 of the model's weights.*network\.head\.0\.wei"):
        evaluate(cfg)


def test_it_does_not_start_from_another_backbone(make_deeplab_cfg, make_classifier_cfg, tmp_path):
    classifier = build_model(make_classifier_cfg()).state_dict()
    path = str(tmp_path / "classifier.pth")
    torch.save({"model": classifier}, path)
    model = build_model(make_deeplab_cfg("MODEL.BACKBONE.NAME", "MaskXTimm"))
    words = r"image classifier that .* lacks \d+ of the weights of its backbone MaskXTimm.*PRETR"
    with pytest.raises(ValueError, match=words):
        DetectionCheckpointer(model).load(path)


@pytest.mark.parametrize("sizes", [(), (0,), (48, -1), (32.5,)])
def test_bad_sizes_are_named(make_deeplab_cfg, sizes):
    with pytest.raises(ValueError, match=r"test_sizes \(TEST\.MASKX\.SIZES\) is \(.*\. Allowed"):
        build_model(make_deeplab_cfg("TEST.MASKX.SIZES", sizes))
