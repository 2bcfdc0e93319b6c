import copy
import json
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from maskx.core.backbones import SmallResNet
from maskx.detectron2 import MaskXLarvSeg, MaskXSmallResNet
from maskx.detectron2.datasets import class_names_of
from maskx.systems.larvseg.network import LarvSeg

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
NAMES = ("wall", "tree", "cat", "mug", "owl", "sky", "boat", "yak")
SCORED = {"masks": (0, 1, 2, 5), "tags": (6, 3, 0)}
WIDTHS = (4, 4, 4, 8)


def make_model(names=NAMES, scored=None, *, network=None, **options):
    torch.manual_seed(0)
    plain = LarvSeg(
        MaskXSmallResNet(widths=WIDTHS, output_stride=8),
        in_feature="layer4",
        in_channels=8,
        num_classes=len(names),
        **{"bank_size": 2, "warm_up": 1, "top_tokens": 3} | (network or {}),
    )
    options = {"image_size": 32, "pixel_mean": MEAN, "pixel_std": STD} | options
    scored = SCORED if scored is None else scored
    return MaskXLarvSeg(network=plain, class_names=names, scored=scored, **options)


def make_samples(data_set="masks", count=2, size=(32, 32), **changes):
    generator = torch.Generator().manual_seed(0)
    samples = []
    for image_id in range(1, count + 1):
        image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
        sample = {"image": image, "image_id": image_id, "data_set": data_set}
        if data_set == "masks":
            sample["label_map"] = torch.randint(-1, len(SCORED["masks"]), size, generator=generator)
        else:
            sample |= {"image_labels": [image_id % 3, 2][: 3 - image_id], "single_label": False}
        samples.append(sample | changes)
    return samples


def normalise(image):
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (image - mean) / std


def make_plain(model):
    plain = LarvSeg(
        SmallResNet(widths=WIDTHS, output_stride=8),
        in_feature="layer4",
        in_channels=8,
        num_classes=len(NAMES),
        **{"bank_size": 2, "warm_up": 1, "top_tokens": 3},
    )
    plain.load_state_dict(model.network.state_dict())
    return plain


@torch.no_grad()
def dense_logits(model, image, classes, size):
    """Logits of the classes at every pixel, the way that is not affordable for many classes."""
    network = model.network
    square = F.interpolate(normalise(image)[None], (32, 32), mode="bilinear", antialias=True)
    factors = network.classifier.factors(
        network(square), network.classifier.class_vectors(torch.tensor(classes))
    )
    return F.interpolate(factors.dense(), size, mode="bilinear", align_corners=False)[0]


# --- training


def test_losses_are_those_of_the_plain_network_for_each_data_set_in_turn():
    model = make_model().train()
    plain = make_plain(model).train()
    for name in ("masks", "tags", "tags", "masks"):
        samples = make_samples(name)
        found = model(samples)
        labels = (
            {"label_maps": torch.stack([sample["label_map"] for sample in samples])}
            if name == "masks"
            else {"image_labels": [sample["image_labels"] for sample in samples]}
        )
        expected = plain.losses(
            plain(torch.stack([normalise(sample["image"]) for sample in samples])),
            class_indices=torch.tensor(SCORED[name]),
            ignore=-1,
            **labels,
        )
        assert list(found) == ["loss_pixels", "loss_labels", "loss_attention"]
        torch.testing.assert_close(list(found.values()), list(expected.values()))
        assert (found["loss_pixels"] > 0) == (name == "masks")
        assert (found["loss_labels"] > 0) == (name == "tags")
    assert found["loss_attention"] == 0
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.network.state_dict()[name])
    # Images 1 and 2 show the labels 1 and 2, and 2: classes 3 and 0, and 0; twice.
    assert model.network.bank.counts.tolist() == [4, 0, 0, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["masks", "tags"])
def test_every_parameter_has_a_gradient_whatever_is_known(name):
    model = make_model().train()
    nothing = {"label_map": torch.full((32, 32), -1)} if name == "masks" else {"image_labels": []}
    for changes in ({}, nothing):
        model.zero_grad()
        losses = model(make_samples(name, **changes))
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert all((loss == 0) for loss in losses.values()) == bool(changes)


def test_images_of_single_labels_guess_their_background(monkeypatch):
    seen = []
    monkeypatch.setattr(
        LarvSeg, "losses", lambda *_, single_label, **__: seen.append(single_label) or {}
    )
    model = make_model().train()
    model(make_samples("tags"))
    model(make_samples("tags", single_label=True))
    assert seen == [False, True]


@pytest.mark.parametrize("name", ["masks", "tags"])
def test_mixed_precision_gives_finite_losses(name):
    model = make_model().train()
    expected = copy.deepcopy(model)(make_samples(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(make_samples(name))
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for key, loss in losses.items():
        torch.testing.assert_close(loss.float(), expected[key], rtol=0.05, atol=0.02)
    assert model.network.bank.means.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s[0].pop("data_set"), r"sample of image 1 has no 'data_set'\. Use the mapper"),
        (lambda s: s[1].pop("label_map"), r"sample of image 2 has no 'label_map'"),
        (
            lambda s: s[1].update(data_set="tags"),
            r"data sets \['masks', 'tags'\]\. Allowed: samples of one of masks, tags",
        ),
        (
            lambda s: [x.update(data_set="more") for x in s],
            r"data sets \['more'\]\. Allowed: samples of one of masks, tags",
        ),
        (
            lambda s: s[1]["label_map"][3:4, 5].fill_(4),
            r"Image 2 of data set 'masks' has the label 4 in its label map\. Allowed: 0 to 3, .*-1",
        ),
        (
            lambda s: s[0]["label_map"][3:4, 5].fill_(-2),
            r"Image 1 of data set 'masks' has the label -2 in its label map",
        ),
        (
            lambda s: s[0].update(image=s[0]["image"][:, :16]),
            r"batch have different sizes: \(16, 32\), \(32, 32\)",
        ),
    ],
)
def test_bad_training_samples_are_named(change, words):
    samples = make_samples()
    change(samples)
    with pytest.raises(ValueError, match=words):
        make_model().train()(samples)


def test_bad_image_labels_are_named():
    model = make_model().train()
    with pytest.raises(ValueError, match=r"image 0 of the batch has image_labels \[3\]; .* 0 to 2"):
        model(make_samples("tags", image_labels=[3]))
    with pytest.raises(ValueError, match=r"sample of image 1 has no 'image_labels'"):
        model([{k: v for k, v in s.items() if k != "image_labels"} for s in make_samples("tags")])
    with pytest.raises(ValueError, match=r"samples of one of DATASETS\.TRAIN, which is empty"):
        make_model(scored={}).train()(make_samples())


# --- inference


@pytest.mark.parametrize("size", [(32, 32), (45, 61)])
def test_label_maps_are_those_of_the_dense_logits(size):
    model = make_model(top_k=3).eval()
    (sample,) = make_samples(count=1, size=(30, 70))
    sample |= {"height": size[0], "width": size[1]}
    (result,) = model([sample])
    scores, classes = dense_logits(model, sample["image"], range(8), size).topk(3, dim=0)
    assert torch.equal(result["top_classes"], classes)
    assert torch.equal(result["sem_seg"], classes[0])
    torch.testing.assert_close(result["top_scores"], scores, rtol=1e-4, atol=1e-5)
    assert result["class_indices"].tolist() == list(range(8))
    (result,) = model([{key: sample[key] for key in ("image",)}])
    assert result["sem_seg"].shape == (30, 70)
    assert model([]) == []


def test_a_sample_says_which_classes_to_choose_from_and_the_model_otherwise():
    model = make_model(test_classes=(5, 1)).eval()
    (sample,) = make_samples(count=1)
    for asked, classes in (({"class_indices": (6, 2, 7)}, [6, 2, 7]), ({}, [5, 1])):
        (result,) = model([sample | asked])
        expected = dense_logits(model, sample["image"], classes, (32, 32)).argmax(dim=0)
        assert torch.equal(result["sem_seg"], expected)
        assert result["class_indices"].tolist() == classes
    with pytest.raises(ValueError, match=r"class_indices has \[8\]\. Allowed: 0 to 7"):
        model([sample | {"class_indices": (1, 8)}])


@pytest.mark.parametrize("stride", [0, 8])
def test_sliding_windows(stride):
    model = make_model(window=16, stride=stride, top_k=2).eval()
    (sample,) = make_samples(count=1, size=(16, 40))
    (result,) = model([sample | {"class_indices": (3, 1, 4)}])
    network, stride = model.network, stride or 16
    vectors = network.classifier.class_vectors(torch.tensor([3, 1, 4]))
    total, count = torch.zeros(3, 2, 5), torch.zeros(5)
    for left in sorted({*range(0, 24, stride), 24}):
        window = normalise(sample["image"])[None, :, :, left : left + 16]
        with torch.no_grad():
            logits = network.classifier.factors(network(window), vectors).dense()[0]
        total[:, :, left // 8 : left // 8 + 2] += logits
        count[left // 8 : left // 8 + 2] += 1
    dense = F.interpolate((total / count)[None], (16, 40), mode="bilinear")[0]
    scores, classes = dense.topk(2, dim=0)
    assert torch.equal(result["top_classes"], classes)
    torch.testing.assert_close(result["top_scores"], scores, rtol=1e-4, atol=1e-5)


def test_nothing_of_classes_times_pixels_is_held():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **kwargs or {})
            if isinstance(found, torch.Tensor):
                self.numbers = max(self.numbers, found.numel())
            return found

    names = [f"class {index}" for index in range(3000)]
    model = make_model(names, network={"memory": "none"}, scored={}).eval()
    (sample,) = make_samples(count=1, size=(128, 128))
    with Largest() as largest:
        model([sample])
    assert largest.numbers < 3000 * 128 * 128 / 10


def test_classes_that_training_did_not_show_are_named_once_and_never_predicted(caplog):
    model = make_model(top_k=8).eval()
    (sample,) = make_samples(count=1)
    model.network.classifier.set_trained([0, 2, 5])
    with caplog.at_level(logging.WARNING):
        (result,) = model([sample])
        model([sample | {"class_indices": (7, 0)}])
    assert result["top_classes"].unique().tolist() == [0, 2, 5]
    assert [record.getMessage() for record in caplog.records] == [
        "5 classes were in no image of the training, so they are never predicted: tree, mug, owl, "
        "boat, yak."
    ]
    with pytest.raises(ValueError, match=r"None of the 2 classes to predict .*: yak, mug\. Choose"):
        model([sample | {"class_indices": (7, 3)}])


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


# --- configuration


def test_the_configuration_is_read(make_larvseg_cfg):
    cfg = make_larvseg_cfg(
        *("MODEL.MASKX.LARVSEG.BANK_SIZE", 3, "MODEL.MASKX.LARVSEG.WARM_UP", 2),
        *("MODEL.MASKX.LARVSEG.TOP_TOKENS", 5, "MODEL.MASKX.LARVSEG.HIDDEN_CHANNELS", 6),
        *("MODEL.MASKX.LARVSEG.SAMPLE_CLASSES", 2, "MODEL.MASKX.LARVSEG.SYNCHRONISE_BANK", True),
        *("MODEL.MASKX.LARVSEG.LOGIT_FORM", "layernorm"),
        *("MODEL.MASKX.LARVSEG.POOLING", "normalised"),
        *("MODEL.MASKX.LARVSEG.IMAGE_WEIGHT", 0.3, "MODEL.MASKX.LARVSEG.ATTENTIVE_WEIGHT", 0.4),
        *("MODEL.MASKX.IN_FEATURE", "layer3", "TEST.MASKX.WINDOW", 32, "TEST.MASKX.STRIDE", 16),
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
    ("options", "words"),
    [
        ({"window": 20}, r"windows of 20 pixels with stride 20 do not fit: both must be mult"),
        ({"window": 16, "stride": 24}, r"16 pixels with stride 24"),
        ({"top_k": 0}, r"top_k \(TEST\.MASKX\.TOP_K\) 0.* Allowed: the first two from 1"),
        ({"window": -8}, r"window \(TEST\.MASKX\.WINDOW\) -8"),
        ({"test_classes": (1, 8)}, r"class_indices has \[8\]"),
        ({"scored": {"masks": (1, 1)}}, r"class_indices has \[1\] more than once"),
    ],
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        make_model(**options)


def test_as_many_names_as_classes():
    network = make_model().network
    with pytest.raises(ValueError, match=r"class_names has 1 names, the network 8 classes"):
        MaskXLarvSeg(network=network, class_names=["wall"], pixel_mean=MEAN, pixel_std=STD)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("MODEL.MASKX.LARVSEG.MEMORY", "both"), r"memory of LarvSeg must be one of 'cross_im"),
        (("MODEL.MASKX.LARVSEG.POOLING", "max"), r"pooling of LarvSeg must be one of 'weighted'"),
        (("MODEL.MASKX.LARVSEG.LOGIT_FORM", "dot"), r"logit_form of CosineClassifier must be"),
        (("MODEL.MASKX.LARVSEG.BANK_SIZE", 0), r"size and warm_up of a memory bank must be at"),
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
    with pytest.raises(ValueError, match=r"\(image_size\) is 40, but FPN .* 32\. Set it to 32"):
        build_model(make_larvseg_cfg(*whole, "INPUT.MASKX.SIZE", 40, **options))
    with pytest.raises(ValueError, match=r"windows of 40 pixels .* must be multiples of 32"):
        build_model(make_larvseg_cfg("TEST.MASKX.WINDOW", 40, "TEST.MASKX.STRIDE", 40, **options))
    model = build_model(make_larvseg_cfg(**options)).train()
    sample = {"data_set": "tiny_train", "image_labels": [0]}
    words = r"images of data set 'tiny_train' have sides of 64 x 40 pixels, but FPN takes .* 32"
    with pytest.raises(ValueError, match=words):
        model([sample | {"image": torch.zeros(3, 64, 40)}])


# --- checkpoints


def test_checkpoints_hold_the_plain_names_and_the_class_list():
    model = make_model()
    state = model.state_dict()
    marked = {key.partition("@")[0] for key in state if "@" in key}
    rows = {"network.classifier.class_embeddings", "network.classifier.trained"}
    rows |= {"network.bank.means", "network.bank.counts"}
    assert marked == {"class_names", *rows}
    plain = {f"network.{key}" for key in make_plain(model).state_dict()}
    assert {key.partition("@")[0] for key in state} == {"class_names", *plain}
    (names,) = (value for key, value in state.items() if key.startswith("class_names"))
    assert json.loads(bytes(names.tolist())) == list(NAMES)
    assert model.network.state_dict().keys() == make_plain(model).state_dict().keys()
    inside = nn.ModuleDict({"module": model})
    assert {f"module.{key}" for key in state} == set(inside.state_dict())
    inside.load_state_dict(inside.state_dict())


def test_a_loaded_model_is_the_same_in_every_buffer(tmp_path):
    model = make_model().train()
    model(make_samples("tags"))
    model.network.classifier.set_trained([0, 3, 6])
    saver = DetectionCheckpointer(model, str(tmp_path))
    saver.save("model")
    other = make_model().eval()
    nn.init.zeros_(other.network.classifier.class_embeddings)
    DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert model.network.bank.counts.any()
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in other.state_dict().items())
    # A new training of the same classes: what either showed counts as trained.
    fresh = make_model().train()
    fresh.network.classifier.set_trained([1])
    DetectionCheckpointer(fresh).load(str(tmp_path / "model.pth"))
    assert fresh.network.classifier.trained.nonzero()[:, 0].tolist() == [0, 1, 3, 6]


@pytest.mark.parametrize(
    "names",
    [("yak", "cup", "tree", "wall", "sky"), ("yak", *NAMES[:-1])],
    ids=["another number", "another order"],
)
def test_rows_of_another_class_list_are_taken_by_name(names, tmp_path, caplog):
    old = make_model().train()
    old.network.bank.enqueue(torch.tensor([0, 5, 5]), torch.randn(3, 8))
    old.network.classifier.set_trained([0, 1, 5])
    DetectionCheckpointer(old, str(tmp_path)).save("model")
    new = make_model(names, scored={"tags": (1,)}).train()
    nn.init.normal_(new.network.classifier.class_embeddings)
    new.network.classifier.set_trained([1])
    before = {key: value.clone() for key, value in new.network.state_dict().items()}
    with caplog.at_level(logging.WARNING, logger="maskx"):
        DetectionCheckpointer(new).load(str(tmp_path / "model.pth"))
    found, given = new.network.state_dict(), old.network.state_dict()
    for key, value in found.items():
        if key in ("classifier.class_embeddings", "bank.means", "bank.counts"):
            for row, name in enumerate(names):
                expected = given[key][NAMES.index(name)] if name in NAMES else before[key][row]
                assert torch.equal(value[row], expected), (key, name)
        elif key != "classifier.trained":
            assert torch.equal(value, given[key]), key
    trained = {names[i] for i in found["classifier.trained"].nonzero()[:, 0].tolist()}
    assert trained == {"wall", "tree", "sky", names[1]}
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("maskx")]
    assert messages == (
        [
            "1 classes are not in the checkpoint and keep their initial weights: cup.",
            "4 classes of the checkpoint are not wanted: cat, mug, owl, boat.",
        ]
        if "cup" in names
        else []
    )
    # To resume, to evaluate and to predict, the classes must be those of the model.
    words = r"has 8 classes, which are not the \d of the model: class 0 is 'wall' there, but 'yak'"
    with pytest.raises(ValueError, match=words):
        DetectionCheckpointer(new.eval()).load(str(tmp_path / "model.pth"))


def test_a_baseline_and_larvseg_start_from_each_other(tmp_path):
    with_bank, without = make_model(), make_model(NAMES[::-1], network={"memory": "none"})
    for number, (first, second) in enumerate(((with_bank, without), (without, with_bank))):
        DetectionCheckpointer(first, str(tmp_path)).save(f"{number}")
        nn.init.zeros_(second.train().network.classifier.class_embeddings)
        DetectionCheckpointer(second).load(str(tmp_path / f"{number}.pth"))
        embeddings = [m.network.classifier.class_embeddings for m in (first, second)]
        assert torch.equal(embeddings[0], embeddings[1].flip(0))


def test_checkpoints_that_cannot_be_matched_are_refused():
    model = make_model().train()
    with pytest.raises(ValueError, match=r"has none of the 1 classes of the model\. It has wall, "):
        make_model(("cup",), scored={}).load_state_dict(model.state_dict())
    words = r"row of network\.bank\.means has shape \(2, 8\) in the checkpoint, but \(3, 8\)"
    with pytest.raises(ValueError, match=words):
        make_model(network={"bank_size": 3}).load_state_dict(model.state_dict())
    plain = {f"network.{key}": value for key, value in model.network.state_dict().items()}
    with pytest.raises(ValueError, match=r"do not say which classes their rows are of"):
        model.load_state_dict(plain)


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
