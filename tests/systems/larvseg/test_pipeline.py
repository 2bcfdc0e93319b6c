import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photos import make_weights

import maskx
from maskx.data.coco import load_coco
from maskx.data.images import read_image_sample
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.engine.runs import read_run
from maskx.engine.training import CHECKPOINT_NAME
from maskx.systems.larvseg.evaluation import (
    LarvSegScores,
    evaluate_grouping,
    evaluate_larvseg,
    predict_larvseg,
    response_maps,
)
from maskx.systems.larvseg.model import read_extra_state
from maskx.systems.larvseg.network import LarvSeg
from maskx.systems.larvseg.pipeline import (
    METHODS,
    LarvSegChain,
    LarvSegMethod,
    LarvSegSettings,
    attention_of,
    build_larvseg,
    open_larvseg,
)
from maskx.systems.larvseg.samples import (
    JointDataSet,
    LabelledImages,
    joint_sets,
    labelled_images,
    sets_of_one_file,
    true_label_map,
)

K, SIZE = 12, 32
NUM_CLASSES = K + 5
TINY = LarvSegSettings(
    image_size=SIZE, start_iterations=2, iterations=4, batch_size=4, bank_size=2, top_tokens=4
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    json_file = generate_scenes(folder, count=16, size=64, seed=3, num_categories=K, style="sparse")
    return load_coco(json_file, folder)


@pytest.fixture(scope="module")
def split(data):
    return resolve_split("scenes_half", data.class_names)


@pytest.fixture(scope="module")
def sets(data, split):
    return sets_of_one_file(data, split, image_size=SIZE)


def make_chain(sets, output, settings=TINY, **options):
    return LarvSegChain(sets, settings, output=output, **options)


@pytest.fixture(scope="module")
def trained(sets, tmp_path_factory):
    chain = make_chain(sets, tmp_path_factory.mktemp("chain"))
    return chain, {name: chain.train_method(LarvSegMethod(name)) for name in METHODS}


def weights_of(folder):
    return torch.load(folder / CHECKPOINT_NAME, weights_only=True)


def test_methods_share_the_backbone_that_they_start_from(trained):
    chain, models = trained
    assert set(chain.seconds) == {"start", "baseline", "larvseg"}
    assert models["baseline"].network.bank is None
    assert models["larvseg"].network.bank.counts.sum() > 0
    starts = [read_run(chain.output / name).started_from["start"] for name in METHODS]
    assert starts[0] == starts[1]


def test_random_crops_keep_no_features(sets, tmp_path, caplog):
    weights = make_weights(tmp_path / "weights.pth")
    settings = replace(TINY, backbone="resnet10t", pretrained=weights, frozen=True)
    settings = replace(settings, start_iterations=0, min_crop=0.5)
    chain = make_chain(sets, tmp_path / "chain", settings)
    assert chain.new_model(LarvSegMethod()).network.backbone.cache is None
    assert "min_crop is 0.5: a crop drawn at random has features of its own" in caplog.text
    chain = make_chain(sets, tmp_path / "chain", replace(settings, min_crop=1.0))
    assert chain.new_model(LarvSegMethod()).network.backbone.cache is not None


def test_methods_begin_with_the_same_weights(trained, sets, tmp_path):
    """One step at the lowest rate leaves them closer to each other than to another seed."""
    chain, _ = trained
    firsts = {}
    for method in (
        LarvSegMethod("baseline"),
        LarvSegMethod(),
        LarvSegMethod(bank="single", pooling="normalised"),
    ):
        model = chain.new_model(method)
        firsts[method.name] = model.network.state_dict()
    assert list(firsts) == ["baseline", "larvseg", "larvseg_single_image_normalised"]
    for name in ("larvseg", "larvseg_single_image_normalised"):
        for key, value in firsts["baseline"].items():
            assert torch.equal(value, firsts[name][key])
    assert "bank.means" in firsts["larvseg"]
    assert "bank.means" not in firsts["larvseg_single_image_normalised"]


def test_an_interrupted_chain_goes_on(trained, sets, tmp_path):
    _, models = trained
    first = make_chain(sets, tmp_path).train_method(LarvSegMethod())
    again = make_chain(sets, tmp_path, resume=True).train_method(LarvSegMethod())
    for key, value in models["larvseg"].network.state_dict().items():
        assert torch.equal(value, first.network.state_dict()[key])
        assert torch.equal(value, again.network.state_dict()[key])
    changed = LarvSegSettings(**vars(TINY) | {"bank_size": 3})
    with pytest.raises(ValueError, match=r"bank.size is 3, but the run in .* with 2"):
        make_chain(sets, tmp_path, changed, resume=True).train_method(LarvSegMethod())


def test_a_trained_model_opens_again_from_its_checkpoint_alone(trained, data):
    chain, models = trained
    opened = open_larvseg(chain.output / "larvseg").eval()
    for key, value in models["larvseg"].state_dict().items():
        assert torch.equal(value, opened.state_dict()[key])
    test = LabelledImages(labelled_images(data).records[:2], labelled_images(data).class_names)
    for (_, a), (_, b) in zip(
        predict_larvseg(opened, test), predict_larvseg(models["larvseg"], test), strict=True
    ):
        assert torch.equal(a["sem_seg"], b["sem_seg"])
        assert a["sem_seg"].min() >= 1
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint"):
        open_larvseg(chain.output)


@pytest.mark.parametrize("what", ["the start", "nothing"])
def test_a_checkpoint_of_something_else_is_named(trained, tmp_path, what):
    chain, _ = trained
    folder = chain.output / "start"
    if what == "nothing":
        folder = tmp_path
        torch.save({"model": {}, "run": {}, "iteration": 1}, tmp_path / CHECKPOINT_NAME)
    with pytest.raises(ValueError, match=r"is no checkpoint of LarvSeg on pip alone"):
        open_larvseg(folder)


def test_a_class_without_images_is_never_predicted_and_named_once(data, split, tmp_path, caplog):
    images = labelled_images(data)
    shared = {"records": images.records, "image_size": SIZE}
    names = (*images.class_names, "unicorn")
    sets = joint_sets(
        [
            JointDataSet("masks", supervision="mask", class_names=images.class_names, **shared),
            JointDataSet("tags", supervision="image", class_names=names, **shared),
        ]
    )
    assert "unicorn" in caplog.text
    assert caplog.text.count("so they are never predicted") == 1
    unseen = {i for i in range(len(names)) if i not in sets.trained}
    assert NUM_CLASSES in unseen
    model = make_chain(sets, tmp_path).train_method(LarvSegMethod("baseline"))
    with torch.no_grad():  # even where it would be the best
        model.network.classifier.class_embeddings[NUM_CLASSES] *= -1
    some = LabelledImages(images.records[:4], names)
    for _, result in predict_larvseg(model, some):
        assert not set((result["sem_seg"] - 1).unique().tolist()) & unseen
    assert open_larvseg(tmp_path / "baseline").network.classifier.trained.sum() == len(sets.trained)


def test_a_checkpoint_of_another_vocabulary_goes_by_name(trained):
    chain, models = trained
    old = models["larvseg"]
    weights = weights_of(chain.output / "larvseg")["model"]
    names = ("unicorn", *reversed(old.class_names[2:]))
    model = build_larvseg(read_extra_state(weights)["architecture"], names).train()
    model.load_state_dict(weights)
    row = old.class_names.index(names[1])
    for part in (lambda n: n.classifier.class_embeddings, lambda n: n.bank.means):
        assert torch.equal(part(model.network)[1], part(old.network)[row])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "cac"}, "method must be one of 'baseline', 'larvseg'"),
        ({"bank": "both"}, "bank must be one of 'cross', 'single'"),
        ({"pooling": "max"}, "pooling must be one of 'weighted', 'normalised'"),
        ({"method": "baseline", "bank": "single"}, "no meaning for it"),
    ],
)
def test_methods_that_cannot_be_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        LarvSegMethod(**options)


@pytest.mark.parametrize("attended", [(), ("tags",), ("single",), ("tags", "single")])
def test_attention_on_some_of_the_data_sets(data, split, tmp_path, monkeypatch, attended):
    """Table 4 of the paper: on neither, on one, or on both of the data sets with image labels."""
    images = labelled_images(data)
    shared = {"class_names": images.class_names, "image_size": SIZE}
    one_label = [r | {"image_labels": r["image_labels"][:1]} for r in images.records]
    sets = joint_sets(
        [
            JointDataSet("masks", images.records, supervision="mask", **shared),
            *(
                JointDataSet(
                    name,
                    records,
                    supervision="image",
                    attention=name in attended,
                    single_label=name == "single",
                    **shared,
                )
                for name, records in (("tags", images.records), ("single", one_label))
            ),
        ]
    )
    losses_of, found = LarvSeg.losses, []

    def losses(network, tokens, **options):
        found.append(losses_of(network, tokens, **options))
        return found[-1]

    monkeypatch.setattr(LarvSeg, "losses", losses)
    settings = LarvSegSettings(**vars(TINY) | {"start_iterations": 0, "iterations": 3})
    make_chain(sets, tmp_path, settings).train_method(LarvSegMethod(bank="single"))
    expected = [name in attended for name in ("masks", "tags", "single")]
    assert [(each["loss_attention"] > 0).item() for each in found] == expected
    assert [(each["loss_labels"] > 0).item() for each in found] == [False, True, True]


def test_masks_alone_have_no_start(data, tmp_path):
    images = labelled_images(data)
    only = JointDataSet("masks", images.records, images.class_names, "mask", SIZE)
    chain = make_chain(joint_sets([only]), tmp_path)
    with pytest.raises(ValueError, match="No data set has supervision 'image'"):
        chain.train_method(LarvSegMethod("baseline"))
    settings = LarvSegSettings(**vars(TINY) | {"start_iterations": 0})
    chain = make_chain(joint_sets([only]), tmp_path, settings)
    assert chain.train_method(LarvSegMethod("baseline")).network.bank is None


# --- evaluation


def test_true_label_maps_score_100_and_no_background_counts(data, split):
    test = labelled_images(data)
    truth = [true_label_map(record, test.class_names) for record in test.records]

    def score(predictions):
        scores = [LarvSegScores(test.class_names, split.without_masks) for _ in range(2)]
        for number, (record, label_map) in enumerate(zip(test.records, predictions, strict=True)):
            scores[number % 2].update(record, {"sem_seg": torch.from_numpy(label_map)})
        scores[0].merge(scores[1])
        return scores[0]

    scores = score(truth)
    assert {test.class_names[i] for i in scores.groups["novel"]} == set(split.without_masks)
    assert len(scores.groups["base"]) == len(split.with_masks) + 5
    found = scores.results()
    assert set(found["mIoU"].values()) == {100.0}
    assert np.isnan(found["background"])
    # One class missed throughout: its IoU is 0, and nothing else enters the mean.
    label = int(np.bincount(truth[0].ravel()).argmax())
    other = 1 + label % NUM_CLASSES
    found = score([np.where(t == label, other, t) for t in truth]).results()
    assert found["per_class"][label - 1] == 0
    shown = {int(v) for t in truth for v in np.unique(t)} | {other}
    values = [found["per_class"][v - 1] for v in shown]
    assert found["mIoU"]["all"] == pytest.approx(np.mean(values))


def test_labels_of_one_name_are_one_class_of_the_scores():
    scores = LarvSegScores(("wall", "sky", "wall"), novel=("sky",))
    assert scores.classes == [0, 1]
    assert scores.groups == {"base": [0], "novel": [1]}
    assert LarvSegScores(("wall", "sky")).groups == {}


def test_an_evaluation_is_that_of_the_predictions(trained, data, split):
    _, models = trained
    test = labelled_images(data)
    test = LabelledImages(test.records[:5], test.class_names)
    found = evaluate_larvseg(models["larvseg"], test, split.without_masks)
    scores = LarvSegScores(test.class_names, split.without_masks)
    for record, result in predict_larvseg(models["larvseg"], test):
        scores.update(record, result)
    assert found["mIoU"].keys() == {"all", "base", "novel"}
    assert str(found) == str(scores.results())
    renamed = LabelledImages(test.records, ("unicorn", *test.class_names[1:]))
    with pytest.raises(ValueError, match=r"1 of the classes .* the 17 of the model: 'unicorn'"):
        evaluate_larvseg(models["larvseg"], renamed)


def test_grouping_of_perfect_features_is_perfect(trained, data, split, monkeypatch):
    _, models = trained
    model, test = models["baseline"], labelled_images(data)
    test = LabelledImages(test.records[:4], test.class_names)
    truth = itertools.cycle([true_label_map(record, test.class_names) for record in test.records])

    def one_hot(images):
        labels = torch.from_numpy(next(truth)).long() - 1
        return F.one_hot(labels, NUM_CLASSES).permute(2, 0, 1)[None].float()

    monkeypatch.setattr(model.network, "forward", one_hot)
    assert evaluate_grouping(model, test, split.without_masks)["mIoU"]["all"] == 100


def test_grouping_is_seeded_and_takes_features_of_both_kinds(trained, data, split):
    _, models = trained
    test = labelled_images(data)
    test = LabelledImages(test.records[:5], test.class_names)
    measure = functools.partial(evaluate_grouping, models["larvseg"], test)
    first, again, other = (measure(seed=seed)["mIoU"]["all"] for seed in (1, 1, 2))
    assert first == again != other
    assert 0 < measure(features="backbone")["mIoU"]["all"] < 100
    with pytest.raises(ValueError, match="features must be one of 'tokens'"):
        measure(features="pixels")


def test_response_maps_are_the_cosines_of_tokens_with_that_of_a_pixel(trained, data):
    chain, models = trained
    record = data.records[0]
    size, points = (record["height"], record["width"]), [(3, 60), (40, 0)]
    model, sample = models["larvseg"].eval(), read_image_sample(record)
    maps = response_maps(model, sample, points)
    with torch.no_grad():
        tokens = F.normalize(model.network(model.preprocess([sample]))[0], dim=0)
    for found, (x, y) in zip(maps, points, strict=True):
        own = tokens[:, y * tokens.shape[1] // size[0], x * tokens.shape[2] // size[1]]
        torch.testing.assert_close(found, torch.einsum("chw,c->hw", tokens, own))
        assert found.max() == pytest.approx(1)
    opened = maskx.open_run(chain.output / "larvseg", device="cpu")
    assert np.allclose(opened.similarities(record["file_name"], points), maps, atol=1e-5)


def test_attention_needs_images_in_the_bank(trained, data):
    _, models = trained
    model = models["larvseg"]
    sample = read_image_sample(data.records[0])
    known = [int(i) for i in (model.network.bank.counts > 0).nonzero()[:2, 0]]
    maps = attention_of(model, sample, known[::-1])
    assert maps.shape == (2, 4, 4)
    assert ((maps > 0) & (maps < 1)).all()
    assert np.array_equal(maps[::-1], attention_of(model, sample, known))
    counts = model.network.bank.counts.clone()
    model.network.bank.counts[known[0]] = 0
    assert np.isnan(attention_of(model, sample, known)[0]).all()
    model.network.bank.counts.copy_(counts)
