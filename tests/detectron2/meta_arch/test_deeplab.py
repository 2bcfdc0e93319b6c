import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from maskx.core.backbones import SmallResNet
from maskx.data import dense_crf
from maskx.detectron2 import MaskXDeepLab, MaskXSmallResNet, evaluate
from maskx.systems.class_patterns.deeplab import DeepLab
from maskx.systems.class_patterns.detectron2 import deeplab

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def make_samples(count=2, size=(48, 48)):
    generator = torch.Generator().manual_seed(0)
    samples = []
    for image_id in range(1, count + 1):
        label_map = torch.randint(5, size, generator=generator)
        label_map[:5] = 255
        image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
        samples.append({"image": image, "sem_seg": label_map, "image_id": image_id})
    return samples


def normalise(image):
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (image - mean) / std


@pytest.fixture
def model(make_deeplab_cfg):
    torch.manual_seed(0)
    return sharpened(build_model(make_deeplab_cfg()))


def sharpened(model):
    """Make predictions that differ from pixel to pixel."""
    with torch.no_grad():
        model.network.head[-1].weight.mul_(200)
    return model


def make_plain(model):
    plain = DeepLab(
        SmallResNet(output_stride=8),
        in_feature="layer4",
        in_channels=128,
        num_classes=4,
        hidden_channels=8,
        dilation=2,
    )
    plain.load_state_dict(model.network.state_dict())
    return plain


def slow_prediction(plain, image, sizes, output_size):
    """The mean over sizes of the logits, then the softmax."""
    logits = []
    for size in sizes:
        square = F.interpolate(
            normalise(image)[None], (size, size), mode="bilinear", antialias=True
        )
        logits.append(F.interpolate(plain(square), output_size, mode="bilinear")[0])
    return torch.stack(logits).mean(dim=0).softmax(dim=0)


def test_it_computes_what_the_plain_network_computes(model):
    plain = make_plain(model)
    samples = make_samples()
    torch.manual_seed(1)  # of the dropout
    losses = model.train()(samples)
    torch.manual_seed(1)
    logits = plain.train()(torch.stack([normalise(sample["image"]) for sample in samples]))
    logits = F.interpolate(logits, (48, 48), mode="bilinear", align_corners=False)
    targets = torch.stack([sample["sem_seg"] for sample in samples])
    expected = F.cross_entropy(logits, targets, ignore_index=255)
    assert list(losses) == ["loss_pixels"]
    torch.testing.assert_close(losses["loss_pixels"], expected)
    losses["loss_pixels"].backward()
    assert all(p.grad is not None for p in model.parameters())

    results = model.eval()(samples)
    with torch.no_grad():
        for sample, result in zip(samples, results, strict=True):
            expected = slow_prediction(plain.eval(), sample["image"], (32, 48), (48, 48))
            torch.testing.assert_close(result["sem_seg"], expected)


@pytest.mark.parametrize("sizes", [(48,), (32, 48, 64)])
def test_the_output_has_the_size_of_the_file(model, sizes):
    model.eval().test_sizes = sizes
    (sample,) = make_samples(1, size=(30, 70))
    (result,) = model([sample | {"height": 45, "width": 61}])
    assert result["sem_seg"].shape == (5, 45, 61)
    torch.testing.assert_close(result["sem_seg"].sum(dim=0), torch.ones(45, 61))
    with torch.no_grad():
        expected = slow_prediction(make_plain(model).eval(), sample["image"], sizes, (45, 61))
    torch.testing.assert_close(result["sem_seg"], expected)
    assert model([sample])[0]["sem_seg"].shape == (5, 30, 70)
    assert model([]) == []


def test_other_labels_can_be_ruled_out(model):
    (sample,) = make_samples(1)
    free = model.eval().predict(sample)
    prob = model.predict(sample, [2, 0])
    assert prob[[2, 4]].abs().sum() == 0
    torch.testing.assert_close(prob[[0, 1, 3]], free[[0, 1, 3]] / free[[0, 1, 3]].sum(dim=0))
    assert (model.predict(sample, [])[0] == 1).all()
    with pytest.raises(ValueError, match=r"class indices \[4\]\. Allowed: 0 to 3"):
        model.predict(sample, [4])


def test_the_crf_sees_the_image_at_the_size_of_the_output(make_deeplab_cfg):
    pytest.importorskip("pydensecrf")
    torch.manual_seed(0)
    model = sharpened(build_model(make_deeplab_cfg("TEST.MASKX.CRF", True))).eval()
    (sample,) = make_samples(1, size=(30, 70))
    refined = model.predict(sample)
    model.crf = False
    prob = model.predict(sample)
    pixels = sample["image"].permute(1, 2, 0).numpy()
    expected = dense_crf.refine(pixels, prob.numpy())
    assert np.abs(expected - prob.numpy()).max() > 0.01
    torch.testing.assert_close(refined, torch.as_tensor(expected))

    model.crf = True
    refined = model.predict(sample | {"height": 15, "width": 35})
    assert refined.shape == (5, 15, 35)
    torch.testing.assert_close(refined.sum(dim=0), torch.ones(15, 35))


def test_the_crf_takes_only_labels_that_were_not_ruled_out(make_deeplab_cfg, monkeypatch):
    monkeypatch.setattr(dense_crf, "check_crf", lambda: None)
    seen = []

    def refine(image, prob):
        seen.append((image.shape, prob.shape))
        return prob[::-1].copy()

    monkeypatch.setattr(dense_crf, "refine", refine)
    model = build_model(make_deeplab_cfg("TEST.MASKX.CRF", True)).eval()
    (sample,) = make_samples(1)
    prob = model.predict(sample, [2])
    assert seen == [((48, 48, 3), (2, 48, 48))]
    model.crf = False
    assert torch.equal(prob[[3, 0]], model.predict(sample, [2])[[0, 3]])
    assert prob[[1, 2, 4]].abs().sum() == 0


def test_a_missing_library_is_named_before_the_training(make_deeplab_cfg, monkeypatch):
    def check():
        raise ImportError("needs pydensecrf2")

    monkeypatch.setattr(deeplab.dense_crf, "check_crf", check)
    build_model(make_deeplab_cfg())
    with pytest.raises(ImportError, match="needs pydensecrf2"):
        build_model(make_deeplab_cfg("TEST.MASKX.CRF", True))


def test_pixels_of_which_nothing_is_known_train_nothing(model):
    """A zero with a gradient for every parameter, so that processes do not wait for one another."""
    samples = make_samples()
    for sample in samples:
        sample["sem_seg"][:] = 255
    loss = model.train()(samples)["loss_pixels"]
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in model.parameters())


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
    assert model.eval()(make_samples(1))[0]["sem_seg"].shape == (5, 48, 48)


def test_it_is_built_without_a_configuration():
    model = MaskXDeepLab(
        backbone=MaskXSmallResNet(widths=(4, 4, 4, 8)),
        num_classes=4,
        hidden_channels=8,
        pixel_mean=MEAN,
        pixel_std=STD,
    )
    assert model(make_samples())["loss_pixels"] > 0


def test_the_predictor_returns_the_file_size(make_deeplab_cfg, tmp_path):
    cfg = make_deeplab_cfg("MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    model = sharpened(build_model(cfg)).eval()
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    image = np.random.default_rng(0).integers(0, 256, (33, 57, 3), np.uint8)
    result = DefaultPredictor(cfg)(image)["sem_seg"]
    rgb = torch.as_tensor(cv2.cvtColor(image, cv2.COLOR_BGR2RGB).transpose(2, 0, 1))
    torch.testing.assert_close(result, model.predict({"image": rgb}))
    assert result.shape == (5, 33, 57)


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


def drop(sample):
    del sample["sem_seg"]


def grow(sample):
    sample["image"] = torch.zeros(3, 50, 48)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            drop,
            r"training sample of image 2 has no 'sem_seg'\. Use MaskXImageMapper with",
        ),
        (grow, r"different sizes: \(48, 48\), \(50, 48\)\. Use a mapper"),
    ],
)
def test_bad_samples_are_named(model, change, words):
    samples = make_samples()
    change(samples[1])
    with pytest.raises(ValueError, match=words):
        model.train()(samples)


@pytest.mark.parametrize("sizes", [(), (0,), (48, -1), (32.5,)])
def test_bad_sizes_are_named(make_deeplab_cfg, sizes):
    with pytest.raises(ValueError, match=r"TEST\.MASKX\.SIZES \(test_sizes\) is \(.*\. Allowed"):
        build_model(make_deeplab_cfg("TEST.MASKX.SIZES", sizes))
