import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from settings import pairs

from maskx.systems.transfernet.evaluation import gram_rows

KEYS = "MODEL.MASKX.TRANSFERNET."


def make_sample(labels, *, mask=False, size=(32, 32), seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample = {"image": torch.randint(256, (3, *size), generator=generator).byte()}
    sample["image_labels"] = labels
    if mask:
        sample["sem_seg"] = torch.zeros(size, dtype=torch.int64)
        for row, label in enumerate(labels):
            sample["sem_seg"][4 * row : 4 * row + 4] = label + 1
    return sample


def losses_of(model, samples):
    with EventStorage() as storage:
        losses = model.train()(samples)
    return losses, {name: value for name, (value, _) in storage.latest().items()}


def test_it_logs_into_the_storage_of_detectron2(make_transfer_cfg):
    model = build_model(make_transfer_cfg())
    _, logged = losses_of(model, [make_sample([2, 0], mask=True), make_sample([])])
    assert logged["maskx/images_without_labels"] == 1
    assert 0.9 < logged["maskx/attention_entropy"] <= 1


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


def test_rows_of_the_gram_matrix(make_transfer_cfg):
    """Figure 6, by the function of the other host."""
    model = build_model(make_transfer_cfg()).eval()
    sample = {"image": make_sample([2])["image"]}
    rows = gram_rows(model, sample, [(0, 0)])
    features = model.network.encode(model.preprocess([sample]))[0][0].detach()
    expected = torch.einsum("dhw,d->hw", features, features[:, 0, 0])
    torch.testing.assert_close(rows[0], expected)


def test_the_stage_attention_has_no_masks(make_transfer_cfg):
    model = build_model(make_transfer_cfg(KEYS + "STAGE", "attention"))
    losses, _ = losses_of(model, [make_sample([2, 0], mask=True), make_sample([1])])
    assert set(losses) == {"loss_labels"}
    model.has_classifier.fill_(True)
    with torch.no_grad():
        (result,) = model.eval()([make_sample([])])
    assert set(result) == {"image_labels", "attention", "densified", "image_labels_prob"}


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
    words = (
        r"CLASSIFIER_WEIGHTS lacks 2 of the \d+ weights of the classifier, or .*: classifier\.cl"
    )
    with pytest.raises(ValueError, match=words):
        build_model(make_transfer_cfg(*opts, "MODEL.MASKX.NUM_CLASSES", 5))
    del state["model"]["classifier.backbone.layer1.0.conv1.weight"]
    torch.save(state, classifier_weights)
    words = r"lacks 1 of .*classifier\.backbone\.layer1\.0\.conv1\.weight\. Give a checkpoint of su"
    with pytest.raises(ValueError, match=words):
        build_model(make_transfer_cfg(*opts))


@pytest.mark.parametrize("content", [b"", b"nothing", {"weights": 1}, 3])
def test_a_file_that_is_no_checkpoint_is_refused(make_transfer_cfg, tmp_path, content):
    path = tmp_path / "model.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"model\.pth' (is no checkpoint|holds)"):
        build_model(make_transfer_cfg(KEYS + "CLASSIFIER_WEIGHTS", str(path)))


VGG = ("MODEL.BACKBONE.NAME", "MaskXVGG16", "MODEL.MASKX.BACKBONE.OUTPUT_STRIDE", 16)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        ((KEYS + "METHOD", "fcn"), r"method of TransferNet must be one of 'transfernet', 'baselin"),
        ((*VGG[:3], 8, KEYS + "DECODER", "unpooling"), r"'unpooling' needs all pooling switches"),
        (
            (*VGG, KEYS + "DECODER", "unpooling", "INPUT.MASKX.SIZE", 40),
            r"size is 40, but decoder 'unpooling' needs a multiple of 16.*Set it to 32",
        ),
        (
            (*VGG, KEYS + "DECODER", "unpooling", "MODEL.MASKX.IN_FEATURE", "conv4_3"),
            r"all pooling switches of .* conv5_3\. Choose these, or decoder 'transposed'",
        ),
        (("INPUT.MASKX.SIZE", 0), r"INPUT.MASKX.SIZE\) is 0"),
        (("MODEL.MASKX.IN_FEATURE", "layer9"), r"IN_FEATURE \(in_feature\) is 'layer9'"),
    ],
)
def test_keys_that_do_not_fit_are_named(make_transfer_cfg, opts, words):
    with pytest.raises(ValueError, match=words):
        build_model(make_transfer_cfg(*opts))


def test_any_backbone_of_detectron2_will_do(make_transfer_cfg):
    cfg = make_transfer_cfg(
        *pairs(
            {
                "MODEL.BACKBONE.NAME": "build_resnet_backbone",
                "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
                "MODEL.RESNETS.NORM": "GN",
                "MODEL.BACKBONE.FREEZE_AT": 0,
                "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4"],
                "MODEL.MASKX.IN_FEATURE": "res3",
            }
        )
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
