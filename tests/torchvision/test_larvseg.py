import functools
import json

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskx.core.backbones import FeatureShape
from maskx.core.image_classifier import ImageClassifier
from maskx.data.coco import load_coco
from maskx.data.label_maps import ignore_label, write_label_map
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.engine import training_chain
from maskx.engine.training import CHECKPOINT_NAME
from maskx.systems.larvseg import chain as larvseg_chain
from maskx.systems.larvseg import samples as larvseg_samples
from maskx.systems.larvseg.chain import LarvSegChain, LarvSegMethod, LarvSegSettings
from maskx.systems.larvseg.checkpoints import build_larvseg, load_matching_weights, open_larvseg
from maskx.systems.larvseg.evaluation import evaluate_grouping, evaluate_larvseg, open_with_images
from maskx.systems.larvseg.joint_sets import JointDataSet, joint_sets, things_and_stuff_label_map
from maskx.systems.larvseg.model import SampleJointClassifier, SampleLarvSeg, predict_larvseg
from maskx.systems.larvseg.network import LarvSeg
from maskx.systems.larvseg.pipeline import attention_of
from maskx.systems.larvseg.samples import (
    JointMapper,
    LabelledImages,
    joint_batches,
    labelled_images,
    read_sample,
    sets_of_one_file,
    split_groups,
    table_label_map,
)

K, SIZE = 12, 32
NUM_CLASSES = K + 5
TINY = LarvSegSettings(
    image_size=SIZE, start_iterations=2, iterations=4, batch_size=4, bank_size=2, top_tokens=4
)


class Patches(nn.Module):
    """Backbone of one layer with stride 4."""

    def __init__(self):
        super().__init__()
        self.feature_shapes = {"last": FeatureShape(6, 4)}
        self.conv = nn.Conv2d(3, 6, 4, stride=4)

    def forward(self, images):
        return {"last": self.conv(images)}


def make_model(num_classes=NUM_CLASSES, size=SIZE, names=None, scored=None, **options):
    torch.manual_seed(0)
    wrapper = {key: options.pop(key) for key in ("sliding", "test_classes") if key in options}
    network = LarvSeg(
        Patches(), in_feature="last", in_channels=6, num_classes=num_classes, **options
    )
    names = names or [f"class {i}" for i in range(num_classes)]
    return SampleLarvSeg(network, size=size, class_names=names, scored=scored, **wrapper)


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


def batches_of(sets, mapper=None, **changes):
    options = {"batch_size": 2, "seed": 1, "start": 0, "stop": 4}
    return list(joint_batches(sets, mapper or JointMapper(sets), **options | changes))


# --- samples


def test_batches_alternate_between_masks_and_image_labels(sets):
    found = batches_of(sets)
    assert [{sample["data_set"] for sample in batch} for batch in found] == [
        {"masks"},
        {"image labels"},
    ] * 2
    for batch in found:
        for sample in batch:
            assert sample["image"].shape == (3, SIZE, SIZE)
            assert ("label_map" in sample) != ("image_labels" in sample)
    again = batches_of(sets, start=2, num_workers=1)
    for expected, sample in zip(found[2], again[0], strict=True):
        assert expected["image_id"] == sample["image_id"]
        assert torch.equal(expected["image"], sample["image"])


def test_no_novel_mask_and_no_image_label_of_a_masked_image_is_trained_on(sets, data, split):
    mapper = JointMapper(sets, flip=False)
    scored = [sets.table.names[index] for index in sets.scored["masks"]]
    assert not set(scored) & set(split.without_masks)
    assert len(scored) == len(split.with_masks) + 5
    images = labelled_images(data)
    truth_of = {r["image_id"]: things_and_stuff_label_map(r, NUM_CLASSES) for r in images.records}
    novel = [label + 1 for label in split.indices_without_masks]
    for record in sets.data_sets[0].records:
        known = sets.label_map(record)
        assert ((known == -1) == np.isin(truth_of[record["image_id"]], novel)).all()
        assert "image_labels" not in mapper(record, np.random.RandomState(0))
    ids = [{r["image_id"] for r in each.records} for each in sets.data_sets]
    assert not ids[0] & ids[1]


def test_each_data_set_has_its_own_image_size(data, split):
    images = labelled_images(data)
    shared = {"records": images.records, "class_names": images.class_names}
    sets = joint_sets(
        [
            JointDataSet("a", supervision="mask", image_size=32, ratio=2, **shared),
            JointDataSet("b", supervision="image", image_size=48, **shared),
        ]
    )
    sides = [batch[0]["image"].shape[-1] for batch in batches_of(sets, stop=6)]
    assert sides == [32, 48, 32] * 2
    model = make_model(scored=sets.scored).train()
    for batch in batches_of(sets):
        assert all(torch.isfinite(loss) for loss in model(batch).values())


@pytest.mark.parametrize("has_stuff", [True, False])
def test_the_ground_is_among_the_image_labels(sets, data, split, tmp_path, has_stuff):
    """Without it nothing holds novel classes off the ground, and attention has no background."""
    if not has_stuff:
        content = json.loads(data.json_file.read_text())
        for image in content["images"]:
            del image["stuff_file_name"]
        json_file = tmp_path / "things.json"
        json_file.write_text(json.dumps(content))
        data = load_coco(json_file, data.json_file.parent)
        sets = sets_of_one_file(data, split, image_size=SIZE)
        assert sets.table.names[K:] == ("background",)
    ground = set(sets.table.names[K:])
    things_of = {
        r["image_id"]: {data.class_names[i] for i in r["image_labels"]} for r in data.records
    }
    mapper = JointMapper(sets)
    names = [sets.table.names[index] for index in sets.scored["image labels"]]
    assert set(names) == set(sets.table.names)
    for record in sets.data_sets[1].records:
        labels = mapper(record, np.random.RandomState(0))["image_labels"]
        shown = {names[label] for label in labels}
        assert shown & ground
        assert shown - ground == things_of[record["image_id"]]


def test_crops_cut_image_and_label_map_alike_and_labels_come_from_the_whole_image(tmp_path):
    rows, columns = np.indices((40, 40))
    label_map = 1 + (rows // 20) * 2 + columns // 20
    cv2.imwrite(str(tmp_path / "image.png"), np.repeat(label_map[:, :, None] * 40, 3, axis=2))
    write_label_map(tmp_path / "map.png", label_map, num_classes=4)
    record = {
        "file_name": str(tmp_path / "image.png"),
        "height": 40,
        "width": 40,
        "image_id": 1,
        "image_labels": [0, 1, 2, 3],
        "annotations": [],
        "supervision": "mask",
        "label_map_file_name": str(tmp_path / "map.png"),
    }
    shared = {"records": [record], "class_names": tuple("abcd"), "image_size": 40}
    found = set()
    for changes in ({"supervision": "mask"}, {"supervision": "image", "crop_level_labels": True}):
        sets = joint_sets([JointDataSet("it", **shared | changes)])
        for seed in range(12):
            mapper = JointMapper(sets, min_crop=0.2)
            sample = mapper(sets.data_sets[0].records[0], np.random.RandomState(seed))
            # Pixels between two quarters are mixed by the resize.
            shown = {v // 40 - 1 for v in sample["image"].unique().tolist() if v % 40 == 0}
            if "label_map" in sample:
                inner = sample["image"][0] % 40 == 0
                expected = sample["image"][0].long() // 40 - 1
                assert (sample["label_map"] == expected)[inner].float().mean() > 0.98
            else:
                assert shown <= set(sample["image_labels"])
                found.add(tuple(sample["image_labels"]))
    assert len(found) > 1  # labels of the crop differ from crop to crop
    sets = joint_sets([JointDataSet("it", supervision="image", **shared)])
    for seed in range(4):
        mapper = JointMapper(sets, min_crop=0.2)
        sample = mapper(sets.data_sets[0].records[0], np.random.RandomState(seed))
        assert sample["image_labels"] == [0, 1, 2, 3]
        # Mirrored from left to right, never upside down.
        whole = JointMapper(sets)(sets.data_sets[0].records[0], np.random.RandomState(seed))
        assert whole["image"][0, 0].unique().tolist() == [40, 80]
    with pytest.raises(ValueError, match="min_crop must be above 0 and at most 1"):
        JointMapper(sets, min_crop=1.5)


# --- model


def test_losses_are_those_of_the_network(sets):
    model = make_model(scored=sets.scored, warm_up=1).train()
    masks, tags = batches_of(sets, batch_size=4)[:2]
    found = model(masks)
    assert set(found) == {"loss_pixels", "loss_labels", "loss_attention"}
    assert found["loss_pixels"] > 0
    assert found["loss_labels"] == found["loss_attention"] == 0
    # Written out: cross-entropy of the classes with masks at half the size, without unknown pixels.
    with torch.no_grad():
        scored = torch.tensor(sets.scored["masks"])
        tokens = model.network(torch.stack([model.normalise(sample) for sample in masks]))
        vectors = model.network.classifier.class_vectors(scored)
        logits = torch.einsum("ndhw,ld->nlhw", tokens, vectors)
        logits = logits / model.network.classifier.temperature()
        logits = F.interpolate(logits, (SIZE // 2, SIZE // 2), mode="bilinear")
        label_maps = torch.stack([sample["label_map"][::2, ::2] for sample in masks])
        expected = F.cross_entropy(logits, label_maps, ignore_index=-1)
    torch.testing.assert_close(found["loss_pixels"], expected)

    model(tags)
    found = model(tags)
    assert found["loss_pixels"] == 0
    assert found["loss_labels"] > 0
    assert found["loss_attention"] > 0
    sum(found.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    counts = model.network.bank.counts
    shown = {sets.scored["image labels"][label] for s in tags for label in s["image_labels"]}
    assert {i for i, count in enumerate(counts.tolist()) if count} == shown


def test_the_baseline_has_no_attention(sets):
    model = make_model(scored=sets.scored, memory="none").train()
    assert set(model(batches_of(sets)[1])) == {"loss_pixels", "loss_labels"}


def test_an_empty_bank_and_fewer_tokens_than_asked_for(sets):
    """The first image of each class has no loss, and 64 tokens stand for 200."""
    model = make_model(scored=sets.scored, top_tokens=200).train()
    batch = batches_of(sets)[1]
    assert model(batch)["loss_attention"] == 0
    assert torch.isfinite(model.network.bank.means).all()
    assert model.network.bank.counts.sum() > 0


def test_batches_that_are_not_of_one_data_set_are_named(sets):
    model = make_model(scored=sets.scored).train()
    masks, tags = batches_of(sets)[:2]
    with pytest.raises(ValueError, match=r"\['image labels', 'masks'\]"):
        model([masks[0], tags[0]])
    with pytest.raises(ValueError, match=r"\['other'\]. Allowed: samples of one of masks, image"):
        model([masks[0] | {"data_set": "other"}])


def test_labels_outside_the_table_are_named(sets):
    model = make_model(scored=sets.scored).train()
    masks, tags = batches_of(sets)[:2]
    for label in (11, -2):
        bad = masks[0] | {"label_map": masks[0]["label_map"].clone()}
        bad["label_map"][3, 5] = label
        with pytest.raises(ValueError, match=f"'masks' has the label {label} in a label map"):
            model([masks[0], bad])
    with pytest.raises(ValueError, match=r"image_labels \[17\]; the labels of 17 classes"):
        model([tags[0] | {"image_labels": [17]}])
    with pytest.raises(ValueError, match=r"class_indices has \[17\]. Allowed: 0 to 16"):
        make_model(scored={"a": [17]})
    with pytest.raises(ValueError, match="class_names has 2 names, the network 3 classes"):
        make_model(3, names=["a", "b"])


def test_label_maps_are_those_of_dense_logits_in_the_size_of_the_file():
    model = make_model(5, size=16, test_classes=[4, 1, 3]).eval()
    model.network.classifier.set_trained([0, 1, 4])
    sample = {"image": torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)}
    sample |= {"height": 20, "width": 30}
    (found,) = model([sample])
    with torch.no_grad():
        tokens = model.network(model.preprocess([sample]))
        vectors = model.network.classifier.class_vectors(torch.tensor([4, 1]))
        logits = model.network.classifier.factors(tokens, vectors).dense()
        scores = F.interpolate(logits, (20, 30), mode="bilinear")[0]
    expected = torch.tensor([5, 2])[scores.argmax(dim=0)]
    assert (found["label_map"] == expected).float().mean() > 0.99
    torch.testing.assert_close(found["scores"], scores.amax(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("logit_form", ["temperature", "layernorm"])
def test_sliding_windows_average_the_logits_where_they_overlap(logit_form):
    model = make_model(5, size=16, sliding=True, logit_form=logit_form).eval()
    if logit_form == "layernorm":
        model.network.classifier.shift.data.fill_(0.7)
    sample = {"image": torch.randint(0, 256, (3, 16, 40), dtype=torch.uint8)}
    (found,) = model([sample | {"height": 16, "width": 40}])
    with torch.no_grad():
        image = model.normalise(sample)[None]
        vectors = model.network.classifier.class_vectors()
        total, count = torch.zeros(5, 4, 10), torch.zeros(4, 10)
        for left in (0, 16, 24):
            tokens = model.network(image[..., left : left + 16])
            part = model.network.classifier.factors(tokens, vectors).dense()[0]
            total[..., left // 4 : left // 4 + 4] += part
            count[:, left // 4 : left // 4 + 4] += 1
        scores = F.interpolate((total / count)[None], (16, 40), mode="bilinear")[0]
    assert (found["label_map"] == scores.argmax(dim=0) + 1).float().mean() > 0.99
    torch.testing.assert_close(found["scores"], scores.amax(dim=0), rtol=1e-4, atol=1e-4)
    # A square image is one window, which is the whole image.
    square = {"image": sample["image"][..., :16], "height": 16, "width": 16}
    (sliding,) = model([square])
    model.sliding = False
    (whole,) = model([square])
    assert torch.equal(sliding["label_map"], whole["label_map"])
    with pytest.raises(ValueError, match=r"windows of 18 pixels .* multiples of 4, by the stride"):
        make_model(5, size=18, sliding=True)


@pytest.mark.parametrize("sliding", [False, True])
def test_classes_that_training_did_not_show_are_not_predicted(sliding):
    model = make_model(10, size=16, sliding=sliding).eval()
    model.network.classifier.set_trained([3, 5])
    sample = {"image": torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)}
    (found,) = model([sample | {"height": 20, "width": 30}])
    assert set(found["label_map"].unique().tolist()) <= {4, 6}
    model.network.classifier.trained.zero_()
    words = r"None of the 10 classes to predict .* and more\. Choose other test_classes"
    with pytest.raises(ValueError, match=words):
        model([sample | {"height": 20, "width": 30}])


# --- start classifier


def test_the_start_learns_only_the_classes_of_its_data_set(sets):
    torch.manual_seed(0)
    classifier = ImageClassifier(
        Patches(), in_feature="last", in_channels=6, num_classes=NUM_CLASSES + 2
    )
    model = SampleJointClassifier(classifier, size=SIZE, scored=sets.scored).train()
    tags = batches_of(sets)[1]
    losses = model(tags)
    losses["loss_labels"].backward()
    grad = classifier.classifier.weight.grad.abs().sum(dim=1)
    assert (grad[:NUM_CLASSES] > 0).all()
    assert (grad[NUM_CLASSES:] == 0).all()
    logits = classifier(torch.stack([model.normalise(sample) for sample in tags]))
    target = torch.zeros(2, NUM_CLASSES)
    for row, sample in zip(target, tags, strict=True):
        row[sample["image_labels"]] = 1
    expected = F.binary_cross_entropy_with_logits(logits[:, :NUM_CLASSES], target)
    torch.testing.assert_close(losses["loss_labels"], expected)
    assert model.eval()(tags)[0]["image_labels_prob"].shape == (NUM_CLASSES + 2,)


# --- chain


def make_chain(sets, output, settings=TINY, **options):
    return LarvSegChain(sets, settings, output=output, **options)


@pytest.fixture(scope="module")
def trained(sets, tmp_path_factory):
    chain = make_chain(sets, tmp_path_factory.mktemp("chain"))
    return chain, {name: chain.train_method(LarvSegMethod(name)) for name in larvseg_chain.METHODS}


def test_methods_start_alike_and_share_the_backbone(trained, sets, monkeypatch, tmp_path):
    chain, models = trained
    assert set(chain.seconds) == {"start", "baseline", "larvseg"}
    assert models["baseline"].network.bank is None
    assert models["larvseg"].network.bank.counts.sum() > 0
    before = {}

    def kept(model, *args, output_dir, **options):
        before[output_dir.name] = {k: v.clone() for k, v in model.state_dict().items()}

    monkeypatch.setattr(training_chain, "train", kept)
    chain = make_chain(sets, tmp_path)
    for method in (
        LarvSegMethod("baseline"),
        LarvSegMethod(),
        LarvSegMethod(bank="single", pooling="normalised"),
    ):
        (tmp_path / method.name).mkdir()
        chain.train_method(method)
    assert list(before) == ["start", "baseline", "larvseg", "larvseg_single_image_normalised"]
    for name in ("larvseg", "larvseg_single_image_normalised"):
        for key, value in before["baseline"].items():
            assert torch.equal(value, before[name][key])
    assert "network.bank.means" in before["larvseg"]
    assert "network.bank.means" not in before["larvseg_single_image_normalised"]


def test_an_interrupted_chain_goes_on(trained, sets, tmp_path):
    _, models = trained
    first = make_chain(sets, tmp_path).train_method(LarvSegMethod())
    again = make_chain(sets, tmp_path, resume=True).train_method(LarvSegMethod())
    for key, value in models["larvseg"].state_dict().items():
        assert torch.equal(value, first.state_dict()[key])
        assert torch.equal(value, again.state_dict()[key])
    changed = LarvSegSettings(**vars(TINY) | {"bank_size": 3})
    with pytest.raises(ValueError, match="bank size 2, but this run has bank size 3"):
        make_chain(sets, tmp_path, changed, resume=True).train_method(LarvSegMethod())


def test_a_trained_model_opens_again(trained, data):
    chain, models = trained
    opened = open_larvseg(chain.output / "larvseg").eval()
    for key, value in models["larvseg"].state_dict().items():
        assert torch.equal(value, opened.state_dict()[key])
    records = labelled_images(data).records[:2]
    for (_, a), (_, b) in zip(
        predict_larvseg(opened, records), predict_larvseg(models["larvseg"], records), strict=True
    ):
        assert (a == b).all()
        assert a.min() >= 1
    with pytest.raises(FileNotFoundError, match=r"There is no file .*says what network"):
        open_larvseg(chain.output)


def test_a_damaged_model_file_is_named(trained, tmp_path):
    chain, _ = trained
    content = json.loads((chain.output / "larvseg" / "model.json").read_text())
    del content["network"]
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is damaged .*KeyError: 'network'"):
        open_larvseg(tmp_path)


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
    for _, label_map in predict_larvseg(model, images.records[:4]):
        assert not set(np.unique(label_map) - 1) & unseen
    assert open_larvseg(tmp_path / "baseline").network.classifier.trained.sum() == len(sets.trained)


def test_a_checkpoint_of_another_vocabulary_goes_by_name(trained, caplog):
    chain, models = trained
    old = models["larvseg"]
    names = ("unicorn", *reversed(old.class_names[2:]))
    content = json.loads((chain.output / "larvseg" / "model.json").read_text())
    model = build_larvseg(content | {"class_names": list(names)})
    fresh = model.network.classifier.class_embeddings[0].clone()
    match = load_matching_weights(model, chain.output / "larvseg" / CHECKPOINT_NAME)
    assert match.only_new == ("unicorn",)
    assert match.only_old == old.class_names[:2]
    for new, name in enumerate(names[1:], 1):
        row = old.class_names.index(name)
        for part in ("classifier.class_embeddings", "classifier.trained", "bank.means"):
            module, _, key = part.partition(".")
            values = [getattr(getattr(m.network, module), key) for m in (model, old)]
            assert torch.equal(values[0][new], values[1][row])
    assert torch.equal(model.network.classifier.class_embeddings[0], fresh)
    assert not model.network.classifier.trained[0]
    assert model.network.bank.counts[0] == 0
    assert "1 classes are not in the checkpoint" in caplog.text
    assert "unicorn" in caplog.text
    assert "2 classes of the checkpoint are not wanted" in caplog.text
    # A model without a bank takes the rest.
    content = json.loads((chain.output / "baseline" / "model.json").read_text())
    baseline = build_larvseg(content)
    load_matching_weights(baseline, chain.output / "larvseg" / CHECKPOINT_NAME)
    key = "class_projection"
    assert torch.equal(
        getattr(baseline.network.classifier, key), getattr(old.network.classifier, key)
    )


def test_checkpoints_that_share_nothing_are_named(trained, tmp_path):
    chain, _ = trained
    content = json.loads((chain.output / "larvseg" / "model.json").read_text())
    model = build_larvseg(content | {"class_names": ["unicorn"]})
    with pytest.raises(ValueError, match="has none of the 1 classes"):
        load_matching_weights(model, chain.output / "larvseg" / CHECKPOINT_NAME)
    content["network"]["bank_size"] = 3
    with pytest.raises(ValueError, match=r"row of network.bank.means has shape \(2, 128\) in"):
        load_matching_weights(build_larvseg(content), chain.output / "larvseg" / CHECKPOINT_NAME)
    path = tmp_path / CHECKPOINT_NAME
    torch.save({"model": {}, "run": {}, "iteration": 1}, path)
    with pytest.raises(ValueError, match="does not say which classes it has"):
        load_matching_weights(model, path)


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


def fixed_model(label_maps, **options):
    """A model that predicts what it is told, in order."""
    model = make_model(**options)
    found = iter(label_maps)
    model.forward = lambda samples: [{"label_map": torch.from_numpy(next(found))}]
    return model


def test_true_label_maps_score_100_and_no_background_counts(data, split):
    test = labelled_images(data)
    names = tuple(reversed(test.class_names))
    truth = [table_label_map(test, record, names) for record in test.records]
    groups = split_groups(test, split, names)
    assert {names[i] for i in groups["novel"]} == set(split.without_masks)
    assert len(groups["base"]) == len(split.with_masks) + 5
    found = evaluate_larvseg(fixed_model(truth, names=list(names)), test, groups)
    assert set(found["mIoU"].values()) == {100.0}
    assert np.isnan(found["background"])
    # One class missed throughout: its IoU is 0, and nothing else enters the mean.
    label = int(np.bincount(truth[0].ravel()).argmax())
    other = 1 + label % NUM_CLASSES
    wrong = [np.where(t == label, other, t) for t in truth]
    found = evaluate_larvseg(fixed_model(wrong, names=list(names)), test, groups)
    assert found["per_class"][label - 1] == 0
    shown = {int(v) for t in truth for v in np.unique(t)} | {other}
    values = [found["per_class"][v - 1] for v in shown]
    assert found["mIoU"]["all"] == pytest.approx(np.mean(values))


def test_a_background_that_is_a_class_has_its_label():
    test = LabelledImages([], ("a", "b"), "background")
    labels = larvseg_samples._table_labels(test, ("b", "c", "background"))
    assert labels[[0, 1, 2, 255]].tolist() == [3, ignore_label(3), 1, ignore_label(3)]


def test_grouping_of_perfect_features_is_perfect(data, split, monkeypatch):
    test = LabelledImages(*vars(labelled_images(data)).values())
    test = LabelledImages(test.records[:4], test.class_names)
    model = make_model(names=list(test.class_names), size=64)
    truth = iter([table_label_map(test, record, model.class_names) for record in test.records])

    def one_hot(images):
        return (
            F.one_hot(torch.from_numpy(next(truth)) - 1, NUM_CLASSES).permute(2, 0, 1)[None].float()
        )

    monkeypatch.setattr(model.network, "forward", one_hot)
    groups = split_groups(test, split, model.class_names)
    assert evaluate_grouping(model, test, groups)["mIoU"]["all"] == 100


def test_grouping_is_seeded_and_takes_features_of_both_kinds(trained, data, split):
    _, models = trained
    test = LabelledImages(*vars(labelled_images(data)).values())
    test = LabelledImages(test.records[:5], test.class_names)
    measure = functools.partial(evaluate_grouping, models["larvseg"], test, {})
    first, again, other = (measure(seed=seed)["mIoU"]["all"] for seed in (1, 1, 2))
    assert first == again != other
    assert 0 < measure(features="backbone")["mIoU"]["all"] < 100
    with pytest.raises(ValueError, match="features must be one of 'tokens'"):
        measure(features="pixels")


def test_attention_needs_images_in_the_bank(trained, data):
    _, models = trained
    model = models["larvseg"]
    sample = read_sample(data.records[0])
    known = [int(i) for i in (model.network.bank.counts > 0).nonzero()[:2, 0]]
    maps = attention_of(model, sample, known[::-1])
    assert maps.shape == (2, 4, 4)
    assert ((maps > 0) & (maps < 1)).all()
    assert np.array_equal(maps[::-1], attention_of(model, sample, known))
    counts = model.network.bank.counts.clone()
    model.network.bank.counts[known[0]] = 0
    assert np.isnan(attention_of(model, sample, known)[0]).all()
    model.network.bank.counts.copy_(counts)


def test_images_for_a_trained_model(trained, data, split, tmp_path):
    chain, _ = trained
    folder = data.json_file.parent
    _, test, groups = open_with_images(
        chain.output / "larvseg", data.json_file, folder, masks_for="scenes_half"
    )
    assert len(test.records) == 16
    assert set(groups) == {"base", "novel"}
    content = json.loads(data.json_file.read_text())
    for number, category in enumerate(content["categories"] + content["stuff_categories"]):
        category["name"] = f"other {number}"
    for image in content["images"]:
        image["stuff_file_name"] = str(folder / image["stuff_file_name"])
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has none of the 17 classes"):
        open_with_images(chain.output / "larvseg", path, folder)
