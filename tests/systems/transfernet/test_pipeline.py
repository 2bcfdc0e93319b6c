import copy
from dataclasses import replace

import pytest
import torch

from maskx.core.sample_models import SampleClassifier
from maskx.data.coco import load_coco
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.engine import training_chain
from maskx.engine.training import CHECKPOINT_NAME, load_weights
from maskx.systems.transfernet.baselines import BaselineNet, DecoupledNet
from maskx.systems.transfernet.decoder import UnpoolingDecoder
from maskx.systems.transfernet.model import METHODS, TransferNetModel
from maskx.systems.transfernet.network import TransferNet
from maskx.systems.transfernet.pipeline import (
    TransferChain,
    TransferMethod,
    TransferSettings,
    build_transfer_model,
)
from maskx.systems.transfernet.samples import source_subset, transfer_sets

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


def with_unreadable_masks(record):
    record = copy.deepcopy(record)
    for annotation in record["annotations"]:
        annotation["segmentation"] = "decoding this would fail"
    return record


def weights_of(module):
    return [p.detach().clone() for p in module.parameters()]


def assert_same(before, after):
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_every_step_sees_its_images_for_its_number_of_steps(make_chain, sets, monkeypatch):
    steps = {}

    def train(model, batches, settings, *, output_dir, **_):
        samples = [sample for batch in batches(start=0, stop=12) for sample in batch]
        steps[output_dir.name] = (settings.iterations, samples)

    monkeypatch.setattr(training_chain, "train", train)
    chain = make_chain(iterations=2, attention_iterations=3, joint_iterations=4)
    for name in METHODS:
        chain.train_masks(TransferMethod(name))
    counts = {name: count for name, (count, _) in steps.items()}
    assert counts == {
        **{"classifier": 2, "attention": 3, "transfernet": 4},
        **{"baseline_source": 7, "baseline": 2, "decoupled_source": 7, "decoupled": 2},
    }
    source, target = ({r["image_id"] for r in side} for side in (sets.source, sets.target))
    for name, (_, samples) in steps.items():
        sides = source if name.endswith("_source") else source | target
        if name in ("baseline", "decoupled"):
            sides = target
        assert {sample["image_id"] for sample in samples} == sides
        with_masks = {sample["image_id"] for sample in samples if "sem_seg" in sample}
        assert with_masks == (set() if name in ("classifier", "attention") else source & sides)


def test_methods_share_the_classifier_and_those_of_transfernet_its_encoder(trained):
    encoder = trained.classifier.classifier.backbone
    states = [v.clone() for v in encoder.state_dict().values()]
    for method, network in (
        (TransferMethod(), TransferNet),
        (TransferMethod(decoder_input="attention"), TransferNet),
        (TransferMethod("baseline"), BaselineNet),
    ):
        model = trained.train_masks(method)
        assert type(model.network) is network
        assert not model.training
        assert_same(states, model.classifier.backbone.state_dict().values())
        own = model.network.encoder.state_dict().values()
        if network is TransferNet:
            assert_same(states, own)
            assert model.network.decoder_input == method.decoder_input
        else:
            assert not all(torch.equal(a, b) for a, b in zip(states, own, strict=True))
    assert_same(states, encoder.state_dict().values())
    assert type(trained.build(TransferMethod("decoupled"), "source").network) is DecoupledNet


def test_the_second_stage_of_a_baseline_keeps_its_decoder_and_the_rows_of_the_source(
    trained, split
):
    model = trained.train_masks(TransferMethod("baseline"))
    first = trained.build(TransferMethod("baseline"), "source")
    load_weights(first, trained.output / "baseline_source" / CHECKPOINT_NAME)
    before, after = (each.network for each in (first, model))
    assert_same(weights_of(before.decoder), weights_of(after.decoder))
    assert_same(weights_of(before.to_decoder), weights_of(after.to_decoder))
    moved = (before.classifier.score.weight != after.classifier.score.weight).any(dim=1)
    assert moved.nonzero()[:, 0].tolist() == list(split.indices_without_masks)


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
    first, fresh = trained.attention, trained.build(TransferMethod())
    assert first.network.train_stage == "attention"
    assert_same(weights_of(fresh.network.decoder), weights_of(first.network.decoder))


def test_what_is_finished_is_not_trained_again(make_chain, monkeypatch):
    first = make_chain().train_masks(TransferMethod())

    def refuse(self, samples):
        assert not self.training, "trained again"

    again = make_chain(resume=True)
    for model in (SampleClassifier, TransferNetModel):
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
    with pytest.raises(ValueError, match=r"image_size is 40, but the run in .* with 32"):
        make_chain(resume=True, image_size=40).classifier
    other = make_chain(resume=True)
    with torch.no_grad():
        other.classifier.classifier.backbone.conv1.weight += 1
    with pytest.raises(ValueError, match=r"classifier '.*' is not what the run"):
        other.train_masks(TransferMethod("baseline"))
    chain.train_masks(TransferMethod())
    other = make_chain(resume=True)
    with torch.no_grad():
        other.attention.network.attention.attend.weight += 1
    with pytest.raises(ValueError, match=r"first stage '.*' is not what the run"):
        other.train_masks(TransferMethod())


def test_the_published_attention_is_for_one_size(make_chain, tmp_path):
    make_chain(attention="fc", joint_iterations=1).train_masks(TransferMethod())
    checkpoint = tmp_path / "transfernet" / CHECKPOINT_NAME
    other = make_chain(output=tmp_path / "other", attention="fc", image_size=48)
    with pytest.raises(ValueError, match="for feature maps of 6 x 6 positions, but the checkpoint"):
        load_weights(other.build(TransferMethod()), checkpoint)
    with pytest.raises(ValueError, match=r"size is 45, but attention 'fc' needs a multiple of 8"):
        make_chain(attention="fc", image_size=45)


def test_vgg_has_the_decoder_of_the_paper(make_chain):
    chain = make_chain(backbone="vgg16", batch_size=2, iterations=1, attention_iterations=1)
    model = chain.build(TransferMethod())
    assert isinstance(model.network.decoder, UnpoolingDecoder)
    assert model.network.in_feature == "conv5_3"
    with pytest.raises(ValueError, match=r"'unpooling' needs all .* feature map conv5_3"):
        make_chain(backbone="vgg16", in_feature="conv4_3")
    with pytest.raises(ValueError, match=r"size is 8, but .*multiple of 16.*Set it to 16"):
        make_chain(backbone="vgg16", image_size=8)
    make_chain(backbone="vgg16", image_size=16)


def test_what_cannot_be_is_refused_before_anything_is_trained(make_chain):
    with pytest.raises(ValueError, match=r"attention of TransferNet must be one of .*'fc'"):
        make_chain(attention="other")
    with pytest.raises(ValueError, match=r"batch size is 5\. Allowed: even numbers"):
        make_chain(batch_size=5)
    with pytest.raises(ValueError, match=r"There is no backbone 'vgg'"):
        make_chain(backbone="vgg")
    with pytest.raises(
        ValueError, match=r"in_feature of SmallResNet must be one of .*got 'layer9'"
    ):
        make_chain(in_feature="layer9")
    with pytest.raises(ValueError, match="no pretrained weights of the backbone 'small'"):
        make_chain(pretrained=True).classifier


def test_images_are_normalised_as_the_backbone_expects(split):
    settings = TransferSettings(**TINY, backbone="efficientnet_lite0")
    model = build_transfer_model(settings, split, TransferMethod())
    assert model.pixel_mean.flatten().tolist() == [127.5] * 3
    assert model.pixel_std.flatten().tolist() == [127.5] * 3


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
