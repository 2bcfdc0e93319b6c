import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from maskx.core.backbones import SmallResNet
from maskx.core.extra_state import EXTRA_STATE
from maskx.core.image_classifier import ImageClassifier
from maskx.systems.larvseg.model import (
    JointClassifier,
    LarvSegModel,
    check_windows,
    read_extra_state,
)
from maskx.systems.larvseg.network import LarvSeg

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
NAMES = ("wall", "tree", "cat", "mug", "owl", "sky", "boat", "yak")
SCORED = {"masks": (0, 1, 2, 5), "tags": (0, 3, 6)}
UNKNOWN = 255


def make_network(num_classes=8, **options):
    torch.manual_seed(0)
    return LarvSeg(
        SmallResNet(widths=(4, 4, 4, 8), output_stride=8),
        in_feature="layer4",
        in_channels=8,
        num_classes=num_classes,
        **{"bank_size": 2, "warm_up": 1, "top_tokens": 3} | options,
    )


def make_model(names=NAMES, scored=None, *, network=None, **options):
    return LarvSegModel(
        network=make_network(len(names), **network or {}),
        class_names=names,
        scored=SCORED if scored is None else scored,
        **{"image_size": 32} | options,
    )


def make_samples(data_set="masks", count=2, size=(32, 32), **changes):
    generator = torch.Generator().manual_seed(0)
    samples = []
    for image_id in range(1, count + 1):
        image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
        sample = {"image": image, "image_id": image_id, "data_set": data_set}
        if data_set == "masks":
            labels = torch.tensor([0, UNKNOWN, *(index + 1 for index in SCORED["masks"])])
            sample["sem_seg"] = labels[torch.randint(len(labels), size, generator=generator)]
        else:
            sample |= {"image_labels": [(3, 6), (6,)][image_id - 1], "single_label": False}
        samples.append(sample | changes)
    return samples


def normalise(image):
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (image - mean) / std


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
    model, plain = make_model().train(), make_network().train()
    position = torch.full((256,), -1)
    position[[index + 1 for index in SCORED["masks"]]] = torch.arange(4)
    for name in ("masks", "tags", "tags", "masks"):
        samples = make_samples(name)
        found = model(samples)
        labels = (
            {"label_maps": position[torch.stack([sample["sem_seg"] for sample in samples])]}
            if name == "masks"
            else {"image_labels": [[1, 2], [2]]}
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
    assert model.network.bank.counts.tolist() == [0, 0, 0, 2, 0, 0, 4, 0]


@pytest.mark.parametrize("name", ["masks", "tags"])
def test_every_parameter_has_a_gradient_whatever_is_known(name):
    model = make_model().train()
    nothing = (
        {"sem_seg": torch.full((32, 32), UNKNOWN)} if name == "masks" else {"image_labels": []}
    )
    for changes in ({}, nothing):
        model.zero_grad()
        losses = model(make_samples(name, **changes))
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert all((loss == 0) for loss in losses.values()) == bool(changes)


def test_what_a_sample_says_of_its_data_set_reaches_the_losses(monkeypatch):
    seen = []

    def losses(network, tokens, *, single_label, attention, **_):
        seen.append((single_label, attention))
        return {}

    monkeypatch.setattr(LarvSeg, "losses", losses)
    model = make_model().train()
    for changes in ({}, {"single_label": True}, {"attention": False}):
        model(make_samples("tags", **changes))
    assert seen == [(False, True), (True, True), (False, False)]


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
        (lambda s: s[0].pop("data_set"), r"sample of image 1 has no 'data_set'\. Training samples"),
        (lambda s: s[1].pop("sem_seg"), r"sample of image 2 has no 'sem_seg'"),
        (
            lambda s: s[1].update(data_set="tags"),
            r"data sets \['masks', 'tags'\]\. Allowed: samples of one of masks, tags",
        ),
        (
            lambda s: [x.update(data_set="more") for x in s],
            r"data sets \['more'\]\. Allowed: samples of one of masks, tags",
        ),
        (
            lambda s: s[1]["sem_seg"][3:4, 5].fill_(5),  # owl is not scored
            r"Image 2 of data set 'masks' has the label 5 in sem_seg, which the data set does not",
        ),
        (lambda s: s[0]["sem_seg"][3:4, 5].fill_(-2), r"Image 1 .* has the label -2 in sem_seg"),
        (lambda s: s[0]["sem_seg"][3:4, 5].fill_(999), r"Image 1 .* has the label 999 in sem_seg"),
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
    with pytest.raises(ValueError, match=r"Image 1 of .* 'tags' has the label 4 in image_labels"):
        model(make_samples("tags", image_labels=[3, 4]))
    with pytest.raises(ValueError, match=r"sample of image 1 has no 'image_labels'"):
        model([{k: v for k, v in s.items() if k != "image_labels"} for s in make_samples("tags")])
    with pytest.raises(ValueError, match=r"samples of one of the training data, which are not kn"):
        make_model(scored={}).train()(make_samples())


def test_the_start_learns_only_the_classes_of_its_data_set():
    torch.manual_seed(0)
    backbone = SmallResNet(widths=(4, 4, 4, 8), output_stride=8)
    classifier = ImageClassifier(backbone, in_feature="layer4", in_channels=8, num_classes=8)
    model = JointClassifier(classifier, image_size=32, scored=SCORED).train()
    tags = make_samples("tags")
    losses = model(tags)
    losses["loss_labels"].backward()
    grad = classifier.classifier.weight.grad.abs().sum(dim=1)
    assert grad.nonzero()[:, 0].tolist() == list(SCORED["tags"])
    logits = classifier(torch.stack([normalise(sample["image"]) for sample in tags]))
    target = torch.tensor([[0.0, 1, 1], [0, 0, 1]])
    expected = F.binary_cross_entropy_with_logits(logits[:, SCORED["tags"]], target)
    torch.testing.assert_close(losses["loss_labels"], expected)
    assert model.eval()(tags)[0]["image_labels_prob"].shape == (8,)


# --- inference


@pytest.mark.parametrize("size", [(32, 32), (45, 61)])
def test_label_maps_are_those_of_the_dense_logits(size):
    model = make_model(top_k=3).eval()
    (sample,) = make_samples(count=1, size=(30, 70))
    sample |= {"height": size[0], "width": size[1]}
    (result,) = model([sample])
    scores, classes = dense_logits(model, sample["image"], range(8), size).topk(3, dim=0)
    assert torch.equal(result["top_classes"], classes)
    assert torch.equal(result["sem_seg"], classes[0] + 1)
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
        assert torch.equal(result["sem_seg"], expected + 1)
        assert result["class_indices"].tolist() == classes
    with pytest.raises(ValueError, match=r"\(class_indices\) have \[8\]\. .* 0 to 7"):
        model([sample | {"class_indices": (1, 8)}])


def test_of_labels_with_one_class_the_first_is_predicted():
    """As in a class list with seven walls."""
    model = make_model(top_k=3).eval()
    (sample,) = make_samples(count=1)
    (result,) = model([sample | {"class_indices": (5, 1, 5, 2)}])
    (unique,) = model([sample | {"class_indices": (5, 1, 2)}])
    assert set(result["sem_seg"].unique().tolist()) <= {1, 2, 4}
    assert torch.equal(result["top_classes"], torch.tensor([0, 1, 3])[unique["top_classes"]])


@pytest.mark.parametrize("logit_form", ["temperature", "layernorm"])
@pytest.mark.parametrize("stride", [0, 8])
def test_sliding_windows(stride, logit_form):
    options = {"window": 16, "stride": stride, "top_k": 2}
    model = make_model(network={"logit_form": logit_form}, **options).eval()
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


@pytest.mark.parametrize("size", [(16, 16), (7, 30), (50, 41)])
def test_the_shorter_side_becomes_a_window_and_the_result_has_the_size_of_the_image(size):
    model = make_model(window=16).eval()
    (sample,) = make_samples(count=1, size=size)
    (result,) = model([sample])
    assert result["sem_seg"].shape == result["top_scores"][0].shape == size
    # Without aliasing, and of a square image one window is the whole image.
    if size[0] == size[1] == 16:
        whole = make_model(image_size=16).eval()
        torch.testing.assert_close(whole([sample])[0]["top_scores"], result["top_scores"])


def test_large_images_are_resized_without_aliasing():
    model, whole = make_model(window=16).eval(), make_model(image_size=16).eval()
    (sample,) = make_samples(count=1, size=(48, 48))
    found, expected = (m([sample])[0]["top_scores"] for m in (model, whole))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("window", "stride"), [(18, 16), (16, 6), (16, 20), (16, 0)])
def test_windows_whose_tokens_do_not_meet_are_refused(window, stride):
    message = rf"windows of {window} pixels with stride {stride} do not fit: both must be multiples"
    with pytest.raises(ValueError, match=message):
        check_windows(window, stride, 4)


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
        "5 classes were in no image of the training, so they are never predicted: 'tree', 'mug', "
        "'owl', 'boat', 'yak'."
    ]
    with pytest.raises(ValueError, match=r"None of the 2 classes to .*: 'yak', 'mug'\. Choose"):
        model([sample | {"class_indices": (7, 3)}])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 20}, r"windows of 20 pixels with stride 20 do not fit: both must be mult"),
        ({"window": 16, "stride": 24}, r"16 pixels with stride 24"),
        ({"top_k": 0}, r"top_k \(TEST\.MASKX\.TOP_K\) is 0.* Allowed: the first from 1"),
        ({"window": -8}, r"window \(TEST\.MASKX\.WINDOW\) -8"),
        ({"test_classes": (1, 8)}, r"\(class_indices\) have \[8\]"),
        ({"scored": {"masks": (1, 1)}}, r"class_indices has \[1\] more than once"),
    ],
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        make_model(**options)


def test_as_many_names_as_classes():
    with pytest.raises(ValueError, match=r"class_names has 1 names, the network 8 classes"):
        LarvSegModel(make_network(), class_names=["wall"], image_size=32)


# --- checkpoints


def test_checkpoints_hold_the_plain_names_and_say_of_what_classes_they_are():
    model = make_model(architecture={"backbone": "small"})
    state = model.state_dict()
    assert state.keys() == {EXTRA_STATE, *(f"network.{key}" for key in make_network().state_dict())}
    expected = {"class_names": NAMES, "architecture": {"backbone": "small"}}
    assert read_extra_state(state) == expected
    inside = nn.ModuleDict({"module": model})
    assert {f"module.{key}" for key in state} == set(inside.state_dict())
    inside.load_state_dict(inside.state_dict())
    with pytest.raises(ValueError, match="they name no classes"):
        read_extra_state(make_network().state_dict())


@pytest.mark.parametrize(
    "names",
    [("yak", "cup", "tree", "wall", "sky"), ("yak", *NAMES[:-1])],
    ids=["another number", "another order"],
)
def test_rows_of_another_class_list_are_taken_by_name(names, caplog):
    old = make_model().train()
    old.network.bank.enqueue(torch.tensor([0, 5, 5]), torch.randn(3, 8))
    old.network.classifier.set_trained([0, 1, 5])
    new = make_model(names, scored={"tags": (1,)}).train()
    nn.init.normal_(new.network.classifier.class_embeddings)
    new.network.classifier.set_trained([1])
    before = {key: value.clone() for key, value in new.network.state_dict().items()}
    with caplog.at_level(logging.WARNING, logger="maskx"):
        new.load_state_dict(old.state_dict())
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
    messages = [record.getMessage() for record in caplog.records]
    assert messages == (
        [
            "1 classes are not in the checkpoint and keep their initial weights: 'cup'.",
            "4 classes of the checkpoint are not wanted: 'cat', 'mug', 'owl', 'boat'.",
        ]
        if "cup" in names
        else []
    )
    # To resume, to evaluate and to predict, the classes must be those of the model.
    words = r"has 8 classes, which are not the \d of the model: class 0 is 'wall' there, but 'yak'"
    with pytest.raises(ValueError, match=words):
        new.eval().load_state_dict(old.state_dict())


def test_a_baseline_and_larvseg_start_from_each_other():
    with_bank, without = make_model(), make_model(NAMES[::-1], network={"memory": "none"})
    for first, second in ((with_bank, without), (without, with_bank)):
        nn.init.zeros_(second.train().network.classifier.class_embeddings)
        second.load_state_dict(first.state_dict(), strict=False)
        embeddings = [m.network.classifier.class_embeddings for m in (first, second)]
        assert torch.equal(embeddings[0], embeddings[1].flip(0))


def test_what_either_training_showed_counts_as_trained():
    old, new = make_model(), make_model().train()
    old.network.classifier.set_trained([0, 3, 6])
    new.network.classifier.set_trained([1])
    new.load_state_dict(old.state_dict())
    assert new.network.classifier.trained.nonzero()[:, 0].tolist() == [0, 1, 3, 6]
    new.eval().load_state_dict(old.state_dict())
    assert new.network.classifier.trained.nonzero()[:, 0].tolist() == [0, 3, 6]


def test_checkpoints_that_cannot_be_matched_are_refused():
    model = make_model().train()
    with pytest.raises(ValueError, match=r"has none of the 1 classes of the model\. It has 'wall'"):
        make_model(("cup",), scored={}).load_state_dict(model.state_dict())
    words = r"row of network\.bank\.means has shape \(2, 8\) in the checkpoint, but \(3, 8\)"
    with pytest.raises(ValueError, match=words):
        make_model(network={"bank_size": 3}).load_state_dict(model.state_dict())
    plain = {f"network.{key}": value for key, value in model.network.state_dict().items()}
    with pytest.raises(ValueError, match=r"do not say which classes their rows are of"):
        model.load_state_dict(plain)
