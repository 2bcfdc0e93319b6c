import copy
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from maskx.core.digests import network_hash
from maskx.core.sample_models import SampleClassifier
from maskx.data.coco import load_coco
from maskx.data.dense_crf import TRANSFERNET, refine
from maskx.data.image_samples import ImageMapper
from maskx.data.label_maps import semantic_label_map
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.engine import training_chain
from maskx.engine.training import CHECKPOINT_NAME, load_weights
from maskx.systems.transfernet import pipeline as transfernet
from maskx.systems.transfernet.baselines import BaselineNet, DecoupledNet
from maskx.systems.transfernet.decoder import UnpoolingDecoder
from maskx.systems.transfernet.network import TransferNet
from maskx.systems.transfernet.pipeline import (
    SampleTransferNet,
    TransferChain,
    TransferMapper,
    TransferMethod,
    TransferSettings,
    alternating_batches,
    evaluate_transfer,
    predict_transfer,
)
from maskx.systems.transfernet.transfer_sets import source_subset, transfer_sets

K, SIZE = 12, 32
TINY = {
    "image_size": SIZE,
    "num_factors": 8,
    "hidden_channels": 8,
    "iterations": 2,
    "attention_iterations": 2,
    "joint_iterations": 2,
    "batch_size": 4,
}


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
    return transfer_sets(data.records, split)


@pytest.fixture
def make_chain(sets, split, tmp_path):
    def make(output=tmp_path, resume=False, **changes):
        settings = TransferSettings(**TINY | changes)
        return TransferChain(sets, split, settings, output=output, resume=resume)

    return make


@pytest.fixture(scope="module")
def trained(sets, split, tmp_path_factory):
    """A chain whose classifier and first stage are there."""
    chain = TransferChain(
        sets, split, TransferSettings(**TINY), output=tmp_path_factory.mktemp("chain"), resume=True
    )
    assert chain.attention is chain.attention
    return chain


@pytest.fixture
def samples(sets):
    mapper = TransferMapper(K, size=SIZE)
    records = [sets.target[0], *sets.source[:2], sets.target[1]]
    return [mapper(record, np.random.RandomState(0)) for record in records]


def with_unreadable_masks(record):
    record = copy.deepcopy(record)
    for annotation in record["annotations"]:
        annotation["segmentation"] = "decoding this would fail"
    return record


def weights_of(module):
    return [p.detach().clone() for p in module.parameters()]


def assert_same(before, after):
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- samples


def test_masks_of_target_images_are_decoded_only_where_asked_for(data, split):
    target = set(split.indices_without_masks)
    records = [
        with_unreadable_masks(record) if target & set(record["image_labels"]) else record
        for record in data.records
    ]
    mapper = TransferMapper(K, size=SIZE)
    sets = transfer_sets(records, split)
    for record in sets.target:
        sample = mapper(record, np.random.RandomState(0))
        assert "sem_seg" not in sample
        assert set(sample["image_labels"]) <= target
    for record in sets.source:
        assert mapper(record, np.random.RandomState(0))["sem_seg"].shape == (SIZE, SIZE)
    with_masks = transfer_sets(records, split, use_target_masks=True)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        mapper(with_masks.target[0], np.random.RandomState(0))
    readable = transfer_sets(data.records, split, use_target_masks=True).target[0]
    assert "sem_seg" in mapper(readable, np.random.RandomState(0))


def test_labels_without_a_pixel_make_no_pair(sets):
    record = copy.deepcopy(next(r for r in sets.source if len(r["image_labels"]) == 1))
    crowd = record["annotations"][0] | {"class_index": 4, "iscrowd": 1, "id": 99}
    record["annotations"].append(crowd)
    record["image_labels"] = sorted({*record["image_labels"], 4})
    sample = TransferMapper(K, size=SIZE)(record, np.random.RandomState(0))
    assert 4 not in sample["image_labels"]


def ids_of(batches):
    return [[(s["image_id"], int(s["image"].sum())) for s in batch] for batch in batches]


def make_batches(sets, start, stop, **options):
    options = {"batch_size": 4, "seed": 5} | options
    mapper = TransferMapper(K, size=SIZE)
    return alternating_batches(sets.source, sets.target, mapper, start=start, stop=stop, **options)


def test_half_of_each_batch_are_source_images(sets):
    source, target = ({r["image_id"] for r in side} for side in (sets.source, sets.target))
    batches = ids_of(make_batches(sets, 0, 20))
    assert len(batches) == 20
    seen = [[], []]
    for batch in batches:
        ids = [image_id for image_id, _ in batch]
        assert set(ids[:2]) <= source
        assert set(ids[2:]) <= target
        seen[0] += ids[:2]
        seen[1] += ids[2:]
    # Each side is shuffled on its own: all of it comes before anything comes again.
    assert set(seen[0][: len(source)]) == source
    assert set(seen[1][: len(target)]) == target


def test_a_resumed_run_sees_what_the_interrupted_one_would_have_seen(sets):
    whole = ids_of(make_batches(sets, 0, 8))
    assert whole == ids_of(make_batches(sets, 0, 3)) + ids_of(make_batches(sets, 3, 8))
    assert whole == ids_of(make_batches(sets, 0, 8, num_workers=1))
    assert whole != ids_of(make_batches(sets, 0, 8, seed=6))


def test_the_halves_are_drawn_independently(sets):
    same = SimpleNamespace(source=sets.source, target=sets.source)
    batches = ids_of(make_batches(same, 0, 10))
    assert [batch[:2] for batch in batches] != [batch[2:] for batch in batches]


def test_a_source_of_one_image_is_enough(sets):
    one = SimpleNamespace(source=sets.source[:1], target=sets.target)
    for batch in make_batches(one, 0, 3):
        assert [s["image_id"] for s in batch[:2]] == [sets.source[0]["image_id"]] * 2


def test_an_odd_batch_size_is_refused(sets):
    with pytest.raises(ValueError, match=r"batch size is 5\. Allowed: even numbers"):
        make_batches(sets, 0, 1, batch_size=5)


# --- models


def test_the_losses_are_those_of_the_equations(trained, samples):
    model = trained.train_masks(TransferMethod()).train()
    losses = model(samples)
    labels, masks = [], []
    for sample in samples:
        for label in sample["image_labels"]:
            outputs = model.network(
                model.preprocess([sample]), torch.tensor([0]), torch.tensor([label])
            )
            labels.append(-outputs.class_logits.log_softmax(dim=1)[0, label])
            if "sem_seg" in sample:
                log_prob = outputs.mask_logits[0].log_softmax(dim=0)
                is_label = sample["sem_seg"] == label + 1
                known = sample["sem_seg"] != 255
                masks.append(-torch.where(is_label, log_prob[1], log_prob[0])[known])
    assert len(masks) < len(labels)
    assert losses["loss_labels"].item() == pytest.approx(
        torch.stack(labels).mean().item(), rel=1e-4
    )
    expected = 2 * torch.cat(masks).mean().item()
    assert losses["loss_masks"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", transfernet.METHODS)
def test_nothing_to_learn_from_is_a_zero_loss_with_a_graph(trained, samples, method):
    model = trained._build(TransferMethod(method)).train()
    unlabelled = [sample | {"image_labels": []} for sample in samples]
    tags_only = [sample for sample in samples if "sem_seg" not in sample]
    for batch, zero in (
        (unlabelled, ("loss_labels", "loss_masks")),
        (tags_only, ("loss_masks",)),
    ):
        model.zero_grad(set_to_none=True)
        losses = model(batch)
        assert all(losses[name].item() == 0 for name in zero)
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("method", transfernet.METHODS)
def test_results_have_the_size_of_the_file(trained, data, method):
    """Also where neither the image nor the square is a multiple of the stride."""
    trained_model = trained._build(TransferMethod(method))
    model = SampleTransferNet(trained_model.network, size=45, num_classes=K).eval()
    reader = ImageMapper(K, size=None, label_maps=False)
    samples = [reader.read_image(record) for record in data.records[:3]]
    samples[0] |= {"image": samples[0]["image"][:, :, :50], "width": 50}
    samples[1]["image_labels"] = []
    samples[2]["image_labels"] = [7, 2, 9]
    with torch.no_grad():
        results = model(samples)
        alone = [model([sample])[0] for sample in samples]
    assert [r["prob"].shape[1:] for r in results] == [(64, 50), (64, 64), (64, 64)]
    assert results[1]["labels"] == []
    assert not results[1]["label_map"].any()
    assert results[2]["labels"] == [7, 2, 9]
    for together, single in zip(results, alone, strict=True):
        assert torch.allclose(together["prob"], single["prob"], atol=1e-5)
        expected = np.zeros(together["label_map"].shape, int)
        for y, x in np.ndindex(expected.shape):
            probs = together["prob"][:, y, x].tolist()
            if probs and max(probs) > 0.5:
                expected[y, x] = together["labels"][probs.index(max(probs))] + 1
        np.testing.assert_array_equal(together["label_map"].numpy(), expected)
    assert ("attention" in results[2]) == (method == "transfernet")
    if method == "transfernet":
        assert results[2]["attention"].shape == results[2]["densified"].shape == (3, 6, 6)


def test_no_samples_at_all(trained):
    model = trained._build(TransferMethod())
    losses = model.train()([])
    assert {name: loss.item() for name, loss in losses.items()} == dict.fromkeys(losses, 0)
    with torch.no_grad():
        assert model.eval()([]) == []


def test_labels_outside_the_class_list_are_refused(trained, samples):
    model = trained._build(TransferMethod())
    samples[1]["image_labels"] = [K]
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"image_labels \[12\]"):
            model.train(mode)(samples)


def test_label_maps_must_fit_the_model(trained, sets):
    model = trained._build(TransferMethod()).train()
    sample = TransferMapper(K, size=40)(sets.source[0], np.random.RandomState(0))
    with pytest.raises(ValueError, match=r"label map of \(40, 40\), .* on \(32, 32\).*size=32"):
        model([sample])


# --- inference and evaluation


class Oracle(nn.Module):
    """Stands in for a trained network: the true mask of each label, half of it for one label."""

    num_classes = K

    def __init__(self, records, half=None):
        super().__init__()
        self.truth = {r["image_id"]: torch.from_numpy(semantic_label_map(r, K)) for r in records}
        self.half = half

    def forward(self, samples):
        results = []
        for sample in samples:
            truth = self.truth[sample["image_id"]].long()
            prob = [(truth == label + 1) * 0.9 for label in sample["image_labels"]]
            prob = torch.stack(prob) if prob else torch.zeros(0, *truth.shape)
            labels = list(sample["image_labels"])
            label_map = torch.zeros_like(truth)
            for row, label in zip(prob, labels, strict=True):
                label_map[row > 0.5] = label + 1
            results.append({"labels": labels, "prob": prob, "label_map": label_map})
        return results


def groups_of(split):
    return {"target": split.indices_without_masks, "source": split.indices_with_masks}


def test_perfect_masks_score_100(data, split):
    found = evaluate_transfer(Oracle(data.records), data.records, groups_of(split), batch_size=3)
    assert found["mIoU"] == {name: pytest.approx(100) for name in ("all", "target", "source")}
    assert "attention_entropy" not in found


def test_what_was_predicted_decides_which_masks_are_made(data, split):
    of_source = [
        [label for label in r["image_labels"] if label in split.indices_with_masks]
        for r in data.records
    ]
    found = evaluate_transfer(
        Oracle(data.records), data.records, groups_of(split), image_labels=of_source
    )
    assert found["mIoU"]["source"] == pytest.approx(100)
    assert found["mIoU"]["target"] == 0
    with pytest.raises(ValueError, match=r"labels of 1 images, but 16 records\. Give a list for"):
        next(predict_transfer(Oracle(data.records), data.records, image_labels=[[]]))


def test_the_separate_classifier_gives_at_least_one_label(trained, data):
    labels, prob = trained.predict_labels(data.records)
    assert prob.shape == (16, K)
    for row, chosen in zip(prob, labels, strict=True):
        above = np.flatnonzero(row >= 0.6).tolist()
        assert chosen == (above or [int(row.argmax())])


def test_the_map_of_a_group_is_that_of_its_categories():
    prob = np.array([[0.9, 0.1, 0.2], [0.2, 0.8, 0.6], [0.1, 0.7, 0.1]], np.float32)
    records = [{"image_labels": labels} for labels in ([0], [2], [1])]
    found = transfernet._tag_mean_ap(prob, records, {"a": (0, 2), "b": (1,), "all": range(3)})
    # of class 1 the only image comes second
    assert found == {"a": pytest.approx(100), "b": pytest.approx(50), "all": pytest.approx(250 / 3)}


def test_the_attention_entropy_is_reported(trained, data, split):
    model = trained.train_masks(TransferMethod())
    found = evaluate_transfer(model, data.records, groups_of(split))
    entropies = []
    for _, result in predict_transfer(model, data.records, batch_size=2):
        for alpha in result["attention"].double().numpy():
            entropies.append(-(alpha * np.log(alpha)).sum() / math.log(alpha.size))
    assert len(entropies) == sum(len(r["image_labels"]) for r in data.records)
    assert found["attention_entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)


def test_the_crf_says_where_and_the_network_which(data):
    pytest.importorskip("pydensecrf")
    record = max(data.records, key=lambda r: len(r["image_labels"]))
    noisy = Oracle([record])
    noise = torch.rand(8, 64, 64, generator=torch.Generator().manual_seed(0))

    def forward(samples, plain=noisy.forward):
        (result,) = plain(samples)
        result["prob"] = (result["prob"] * 0.5 + 0.4 * noise[: len(result["prob"])]).float()
        return [result]

    noisy.forward = forward
    ((_, result),) = predict_transfer(noisy, [record], crf=True)
    image = ImageMapper(K, size=None, label_maps=False).read_image(record)["image"]
    image = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    prob = result["prob"].numpy()
    inside = []
    for p in prob:
        refined = refine(image, np.stack([1 - p, p]), TRANSFERNET)
        inside.append(refined[1] > refined[0])
    expected = np.zeros((64, 64), int)
    for y, x in np.ndindex(64, 64):
        scores = [p[y, x] * i[y, x] for p, i in zip(prob, inside, strict=True)]
        if max(scores) > 0:
            expected[y, x] = result["labels"][int(np.argmax(scores))] + 1
    np.testing.assert_array_equal(result["label_map"], expected)
    assert expected.any()
    unlabelled = record | {"image_labels": []}
    ((_, result),) = predict_transfer(noisy, [unlabelled], crf=True)
    assert not result["label_map"].any()


def test_a_crf_that_is_not_installed_is_named_at_once(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[crf\]'"):
        next(predict_transfer(Oracle(data.records), data.records, crf=True))


# --- training


def test_every_step_sees_its_images_for_its_number_of_steps(make_chain, sets, monkeypatch):
    steps = {}

    def train(model, batches, settings, *, output_dir, **_):
        samples = [sample for batch in batches(start=0, stop=12) for sample in batch]
        steps[output_dir.name] = (settings.iterations, samples)

    monkeypatch.setattr(training_chain, "train", train)
    chain = make_chain(iterations=2, attention_iterations=3, joint_iterations=4)
    for name in transfernet.METHODS:
        chain.train_masks(TransferMethod(name))
    counts = {name: count for name, (count, _) in steps.items()}
    assert counts == {
        **{"classifier": 2, "attention": 3, "transfernet": 4},
        **{"baseline": 7, "decoupled": 7},
    }
    source, target = ({r["image_id"] for r in side} for side in (sets.source, sets.target))
    for name, (_, samples) in steps.items():
        assert {sample["image_id"] for sample in samples} == source | target
        with_masks = {sample["image_id"] for sample in samples if "sem_seg" in sample}
        assert with_masks == (set() if name in ("classifier", "attention") else source)


def test_methods_share_the_encoder_and_the_first_stage(trained):
    encoder = trained.classifier.classifier.backbone
    states = [v.clone() for v in encoder.state_dict().values()]
    calls = set(trained.seconds)
    for method in (
        TransferMethod(),
        TransferMethod("baseline"),
        TransferMethod("decoupled"),
        TransferMethod(decoder_input="attention"),
    ):
        model = trained.train_masks(method)
        assert_same(states, model.network.encoder.state_dict().values())
        assert not model.training
        assert not any(p.requires_grad for p in model.network.encoder.parameters())
    assert_same(states, encoder.state_dict().values())
    assert {"classifier", "attention"} <= calls | set(trained.seconds)
    networks = (TransferNet, BaselineNet, DecoupledNet)
    for method, network in zip(transfernet.METHODS, networks, strict=True):
        assert type(trained._build(TransferMethod(method)).network) is network
    for decoder_input in ("densified", "attention"):
        built = trained._build(TransferMethod(decoder_input=decoder_input)).network
        assert built.decoder_input == decoder_input


def test_a_frozen_attention_is_that_of_the_first_stage(trained):
    first = weights_of(trained.attention.network.attention)
    frozen = trained.train_masks(TransferMethod(freeze_attention=True))
    assert_same(first, weights_of(frozen.network.attention))
    joint = trained.train_masks(TransferMethod())
    pairs = zip(first, weights_of(joint.network.attention), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_masks_are_read_of_the_chosen_source_images_only(sets, split, tmp_path):
    """Neither the classifier nor the first stage reads masks, the second those of its share."""
    method = TransferMethod(source_fraction=0.01)
    chosen = source_subset(sets.source, method.source_fraction, 0)
    others = [with_unreadable_masks(record) for record in sets.source if record not in chosen]
    order = {record["image_id"]: number for number, record in enumerate(sets.source)}
    source = sorted([*chosen, *others], key=lambda record: order[record["image_id"]])
    assert len(chosen) == 1 < len(source)
    chain = TransferChain(
        replace(sets, source=source), split, TransferSettings(**TINY), output=tmp_path
    )
    chain.train_masks(method)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        chain.train_masks(TransferMethod())


def test_the_first_stage_trains_no_decoder(trained):
    first, fresh = trained.attention, trained._build(TransferMethod())
    assert first.network.train_stage == "attention"
    assert_same(weights_of(fresh.network.decoder), weights_of(first.network.decoder))


def test_a_source_fraction_leaves_the_other_source_images_out(trained, sets, monkeypatch):
    used = []

    def spy(source, target, mapper, **options):
        used.append((len(source), len(target)))
        return alternating_batches(source, target, mapper, **options)

    monkeypatch.setattr(transfernet, "alternating_batches", spy)
    trained.train_masks(TransferMethod("baseline", source_fraction=0.25))
    assert used == [(max(1, int(len(sets.source) / 4 + 0.5)), len(sets.target))]


def test_what_is_finished_is_not_trained_again(make_chain, monkeypatch):
    first = make_chain().train_masks(TransferMethod())

    def refuse(self, samples):
        assert not self.training, "trained again"

    again = make_chain(resume=True)
    for model in (SampleClassifier, SampleTransferNet):
        monkeypatch.setattr(model, "forward", refuse)
    assert_same(weights_of(first), weights_of(again.train_masks(TransferMethod())))


def test_without_resuming_everything_is_made_anew(make_chain, tmp_path):
    make_chain().attention
    before = (tmp_path / "attention" / CHECKPOINT_NAME).read_bytes()
    make_chain(seed=1).attention
    assert (tmp_path / "attention" / CHECKPOINT_NAME).read_bytes() != before
    previous = tmp_path / "attention" / f"previous_{CHECKPOINT_NAME}"
    assert previous.read_bytes() == before


def test_a_run_with_other_data_settings_or_encoder_is_not_resumed(make_chain, tmp_path):
    chain = make_chain()
    chain.train_masks(TransferMethod("baseline"))
    with pytest.raises(ValueError, match="made with image size 32, but this run has image size 40"):
        make_chain(resume=True, image_size=40).classifier
    other = make_chain(resume=True)
    with torch.no_grad():
        other.classifier.classifier.backbone.conv1.weight += 1
    assert network_hash(other.classifier.classifier.backbone) != chain._encoder_hash
    with pytest.raises(ValueError, match="made with encoder "):
        other.train_masks(TransferMethod("baseline"))
    chain.train_masks(TransferMethod())
    other = make_chain(resume=True)
    with torch.no_grad():
        other.attention.network.attention.attend.weight += 1
    with pytest.raises(ValueError, match="made with first stage "):
        other.train_masks(TransferMethod())


def test_the_published_attention_is_for_one_size(make_chain, tmp_path):
    make_chain(attention="fc", joint_iterations=1).train_masks(TransferMethod())
    checkpoint = tmp_path / "transfernet" / CHECKPOINT_NAME
    other = make_chain(output=tmp_path / "other", attention="fc", image_size=48)
    with pytest.raises(ValueError, match="for feature maps of 6 x 6 positions, but the checkpoint"):
        load_weights(other._build(TransferMethod()), checkpoint)
    with pytest.raises(ValueError, match=r"image size of 45 is no multiple of the stride 8"):
        make_chain(attention="fc", image_size=45)


def test_vgg_has_the_decoder_of_the_paper(make_chain):
    chain = make_chain(backbone="vgg16", batch_size=2, iterations=1, attention_iterations=1)
    model = chain._build(TransferMethod())
    assert isinstance(model.network.decoder, UnpoolingDecoder)
    assert model.network.in_feature == "conv5_3"
    with pytest.raises(ValueError, match=r"'conv4_3', but .* starts from 'conv5_3'\. Leave in_f"):
        make_chain(backbone="vgg16", in_feature="conv4_3")
    with pytest.raises(ValueError, match=r"image_size is 8, .*Allowed: at least 16\."):
        make_chain(backbone="vgg16", image_size=8)
    make_chain(backbone="vgg16", image_size=16)


def test_what_cannot_be_is_refused_before_anything_is_trained(make_chain):
    with pytest.raises(ValueError, match=r"attention of TransferNet must be one of .*'fc'"):
        make_chain(attention="other")
    with pytest.raises(ValueError, match=r"batch size is 5\. Allowed: even numbers"):
        make_chain(batch_size=5)
    with pytest.raises(
        ValueError, match=r"backbone must be one of small, vgg16, resnet18, .*'vgg'"
    ):
        make_chain(backbone="vgg")
    with pytest.raises(
        ValueError, match=r"in_feature of SmallResNet must be one of .*got 'layer9'"
    ):
        make_chain(in_feature="layer9")
    with pytest.raises(ValueError, match="no pretrained weights of the backbone 'small'"):
        make_chain(pretrained=True).classifier


def test_methods_have_names_for_folders():
    assert TransferMethod().name == "transfernet"
    ablation = TransferMethod(
        decoder_input="attention", freeze_attention=True, source_fraction=0.05
    )
    assert ablation.name == "transfernet_attention_input_frozen_attention_source_0.05"
    with pytest.raises(ValueError, match="method must be one of"):
        TransferMethod("other")
    with pytest.raises(ValueError, match="'baseline' has no attention"):
        TransferMethod("baseline", freeze_attention=True)
    with pytest.raises(ValueError, match="source fraction is 2"):
        TransferMethod(source_fraction=2)
