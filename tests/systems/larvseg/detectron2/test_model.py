import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from settings import pairs
from torch import nn

from maskx.detectron2 import MaskXLarvSeg, MaskXSmallResNet
from maskx.detectron2.datasets import class_names_of
from maskx.systems.larvseg.model import LarvSegModel
from maskx.systems.larvseg.network import LarvSeg

NAMES = ("wall", "tree", "cat", "mug", "owl", "sky", "boat", "yak")


def make_model(names=NAMES, **options):
    torch.manual_seed(0)
    network = LarvSeg(
        MaskXSmallResNet(widths=(4, 4, 4, 8), output_stride=8),
        in_feature="layer4",
        in_channels=8,
        num_classes=len(names),
        **{"bank_size": 2} | options,
    )
    return MaskXLarvSeg(network=network, class_names=names, image_size=32)


def test_it_is_the_model_of_the_other_host():
    assert MaskXLarvSeg.forward is LarvSegModel.forward


def test_the_predictor_gives_what_the_model_gives(make_larvseg_cfg, tmp_path):
    cfg = make_larvseg_cfg("TEST.MASKX.CLASSES_OF", "tiny_train", "TEST.MASKX.TOP_K", 2)
    model = build_model(cfg).eval()
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    image = np.random.RandomState(0).randint(256, size=(40, 50, 3), dtype=np.uint8)
    result = DefaultPredictor(cfg)(image)
    assert result["sem_seg"].shape == (40, 50)
    assert result["class_indices"].tolist() == [4, 5, 6, 7]
    rgb = torch.from_numpy(image[:, :, ::-1].copy().transpose(2, 0, 1))
    (expected,) = model([{"image": rgb}])
    for key, value in expected.items():
        assert torch.equal(result[key], value), key


def test_the_configuration_is_read(make_larvseg_cfg):
    cfg = make_larvseg_cfg(
        *pairs(
            {
                "MODEL.MASKX.LARVSEG.BANK_SIZE": 3,
                "MODEL.MASKX.LARVSEG.WARM_UP": 2,
                "MODEL.MASKX.LARVSEG.TOP_TOKENS": 5,
                "MODEL.MASKX.LARVSEG.HIDDEN_CHANNELS": 6,
                "MODEL.MASKX.LARVSEG.SAMPLE_CLASSES": 2,
                "MODEL.MASKX.LARVSEG.SYNCHRONISE_BANK": True,
                "MODEL.MASKX.LARVSEG.LOGIT_FORM": "layernorm",
                "MODEL.MASKX.LARVSEG.POOLING": "normalised",
                "MODEL.MASKX.LARVSEG.IMAGE_WEIGHT": 0.3,
                "MODEL.MASKX.LARVSEG.ATTENTIVE_WEIGHT": 0.4,
                "MODEL.MASKX.IN_FEATURE": "layer3",
                "TEST.MASKX.WINDOW": 32,
                "TEST.MASKX.STRIDE": 16,
            }
        )
    )
    model = build_model(cfg)
    network = model.network
    assert (network.bank.size, network.bank.warm_up, network.top_tokens) == (3, 2, 5)
    assert (network.classifier.channels, network.classifier.logit_form) == (6, "layernorm")
    assert (network.sample_classes, network.synchronise_bank) == (2, True)
    assert (network.pooling, network.in_feature) == ("normalised", "layer3")
    assert (network.image_weight, network.attentive_weight) == (0.3, 0.4)
    assert (model.window, model.stride, model.size) == (32, 16, 32)
    for memory in ("single_image", "none"):
        cfg.MODEL.MASKX.LARVSEG.MEMORY = memory
        assert build_model(cfg).network.bank is None


def test_the_classes_are_those_of_the_data_sets(make_larvseg_cfg, tiny_train, tiny_sparse):
    cfg = make_larvseg_cfg()
    model = build_model(cfg)
    union = dict.fromkeys((*class_names_of(tiny_sparse), *class_names_of(tiny_train)))
    assert model.class_names == tuple(union)
    shown = model.network.classifier.trained.nonzero()[:, 0].tolist()
    of_train = [list(union).index(name) for name in class_names_of(tiny_train)]
    # Masks of every second class, image labels of all.
    assert shown == sorted({*range(0, 4, 2), *of_train})
    cfg.DATASETS.TRAIN = ()
    cfg.MODEL.MASKX.LARVSEG.CLASSES_OF = (tiny_sparse, tiny_train)
    assert build_model(cfg).class_names == tuple(union)
    cfg.MODEL.MASKX.LARVSEG.CLASSES_OF = ()
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN and .*CLASSES_OF are empty"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("MODEL.MASKX.LARVSEG.MEMORY", "both"), r"memory of LarvSeg must be one of 'cross_im"),
        (("MODEL.MASKX.LARVSEG.POOLING", "max"), r"pooling of LarvSeg must be one of 'weighted'"),
        (("MODEL.MASKX.LARVSEG.LOGIT_FORM", "dot"), r"logit_form of CosineClassifier must be"),
        (("MODEL.MASKX.LARVSEG.BANK_SIZE", 0), r"size of a memory bank must be at"),
        (("MODEL.MASKX.IN_FEATURE", "p3"), r"IN_FEATURE \(in_feature\) is 'p3'"),
        (("TEST.MASKX.CLASSES_OF", "tiny"), r"There is no data set 'tiny'"),
    ],
)
def test_bad_values_of_keys_are_named(make_larvseg_cfg, opts, words):
    with pytest.raises(ValueError, match=words):
        build_model(make_larvseg_cfg(*opts))


def test_backbones_that_take_multiples_only(make_larvseg_cfg):
    options = {"file": "larvseg_R_50_FPN_C171_WA150.yaml"}
    whole = ("TEST.MASKX.WINDOW", 0, "TEST.MASKX.STRIDE", 0)
    with pytest.raises(ValueError, match=r"image_size .* is 40, but FPN .* 32\. Set it to 32"):
        build_model(make_larvseg_cfg(*whole, "INPUT.MASKX.SIZE", 40, **options))
    with pytest.raises(ValueError, match=r"windows of 40 pixels .* must be multiples of 32"):
        build_model(make_larvseg_cfg("TEST.MASKX.WINDOW", 40, "TEST.MASKX.STRIDE", 40, **options))
    model = build_model(make_larvseg_cfg(**options)).train()
    sample = {"data_set": "tiny_train", "image_labels": [0]}
    words = r"images of data set 'tiny_train' have sides of 64 x 40 pixels, but FPN takes .* 32"
    with pytest.raises(ValueError, match=words):
        model([sample | {"image": torch.zeros(3, 64, 40)}])


# --- checkpoints


def test_a_loaded_model_is_the_same_in_every_buffer(tmp_path):
    model = make_model()
    model.network.bank.enqueue(torch.tensor([0, 5, 5]), torch.randn(3, 8))
    model.network.classifier.set_trained([0, 3, 6])
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    other = make_model().eval()
    nn.init.zeros_(other.network.classifier.class_embeddings)
    DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("names", [("yak", "cup", "tree"), ("yak", *NAMES[:-1])])
def test_a_checkpoint_of_other_classes_is_refused_for_prediction(names, tmp_path):
    """Of another number or another order, though the checkpointer drops what has another shape."""
    DetectionCheckpointer(make_model(), str(tmp_path)).save("model")
    words = r"has 8 classes, which are not the \d of the model: class 0 is 'wall' there, but 'yak'"
    with pytest.raises(ValueError, match=words):
        DetectionCheckpointer(make_model(names).eval()).load(str(tmp_path / "model.pth"))


def test_the_backbone_of_an_image_classifier_is_a_start(make_larvseg_cfg, make_classifier_cfg):
    classifier = build_model(make_classifier_cfg("INPUT.MASKX.SIZE", 32)).train()
    model = build_model(make_larvseg_cfg()).train()
    result = model.load_state_dict(classifier.state_dict(), strict=False)
    assert not any(key.startswith("network.backbone.") for key in result.missing_keys)
    assert result.unexpected_keys == []
    expected = classifier.classifier.backbone.state_dict()
    for key, value in model.network.backbone.state_dict().items():
        assert torch.equal(value, expected[key])
    other = build_model(make_larvseg_cfg("MODEL.BACKBONE.NAME", "MaskXTimm"))
    with pytest.raises(ValueError, match=r"lacks \d+ of the weights of its backbone MaskXTimm"):
        other.load_state_dict(classifier.state_dict(), strict=False)
