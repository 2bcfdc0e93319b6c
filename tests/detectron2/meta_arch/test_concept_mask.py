import copy

import numpy as np
import pytest
import timm
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine.defaults import create_ddp_model
from detectron2.modeling import build_model
from torch import nn

from maskx.core.word_table import WordTable, load_word_table, save_word_table
from maskx.detectron2 import MaskXConceptMask, Trainer
from maskx.detectron2.trainer import check_config
from maskx.systems.concept_mask.concept_sets import ConceptSplit, write_concept_split
from maskx.systems.concept_mask.network import concept_query
from maskx.systems.concept_mask.overlap import load_overlap, negative_weights
from maskx.systems.concept_mask.scenes import scene_concept_split

KEYS = "MODEL.MASKX.CONCEPT_MASK."
FILES = {
    1: "quick_schedules/stage1_embedding_scenes_cpu.yaml",
    2: "quick_schedules/stage2_refinement_scenes_cpu.yaml",
    3: "quick_schedules/stage3_segmentation_scenes_cpu.yaml",
}


def sample(stage, seed=0, size=32):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (3, size, size), generator=generator, dtype=torch.uint8)
    targets = {
        1: {"image_labels": [1, 4, 40]},
        2: {
            "concepts": [0, 2],
            "boxes": torch.tensor([[0.0, 0, 16, 16], [8, 8, 30, 30], [20, 2, 28, 9]]),
            "box_rows": torch.tensor([0, 1, 1]),
        },
        3: {"concepts": [0, 2], "masks": torch.rand(2, 32, 32, generator=generator) > 0.5},
    }[stage]
    return {"image": image, "image_id": seed} | targets


def gradients(losses, model):
    model.zero_grad()
    sum(losses.values()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_are_those_of_the_plain_network(stage, make_concept_cfg):
    cfg = make_concept_cfg(file=FILES[stage])
    model = build_model(cfg).train()
    batch = [sample(stage, seed) for seed in range(3)]
    mean, std = (
        torch.tensor(v).view(-1, 1, 1) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    images = torch.stack([(each["image"] - mean) / std for each in batch])
    targets = {
        1: {"image_labels": [[1, 4, 40]] * 3},
        2: {
            "concepts": [[0, 2]] * 3,
            "boxes": torch.cat([batch[0].get("boxes", torch.empty(0, 4))] * 3),
            "box_rows": torch.tensor([0, 1, 1, 2, 3, 3, 4, 5, 5]),
        },
        3: {
            "concepts": [[0, 2]] * 3,
            "masks": torch.cat([each.get("masks", torch.empty(0)) for each in batch]),
        },
    }[stage]
    expected = copy.deepcopy(model.network).losses(images, **targets)
    losses = model(batch)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])
    names = {
        1: {"loss_embedding"},
        2: {"loss_boxes", "loss_matching", "loss_discrimination"},
        3: {"loss_masks"},
    }[stage]
    assert losses.keys() == names
    found = gradients(losses, model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trained
    parts = {1: {"embedding"}, 2: {"embedding", "refinement"}, 3: {"segmenter"}}[stage]
    assert {name.split(".")[1] for name in trained} == parts


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parts_and_their_statistics_stay(stage, make_concept_cfg):
    model = build_model(make_concept_cfg(file=FILES[stage])).train()
    frozen = (
        [model.network.original]
        if stage == 2
        else [
            model.network.embedding,
            model.network.refinement,
        ]
    )
    before = [copy.deepcopy(part.state_dict()) for part in frozen]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    sum(model([sample(stage), sample(stage, 1)]).values()).backward()
    optimizer.step()
    for part, state in zip(frozen, before, strict=True):
        assert any("running_mean" in name for name in state) or part is model.network.refinement
        assert all(torch.equal(value, state[n]) for n, value in part.state_dict().items())


def test_a_batch_without_boxes_or_masks_has_zero_losses_with_a_graph(make_concept_cfg):
    empty = {
        2: {"concepts": [], "boxes": torch.zeros(0, 4), "box_rows": torch.zeros(0).long()},
        3: {"concepts": [], "masks": torch.zeros(0, 32, 32, dtype=torch.bool)},
    }
    for stage, targets in empty.items():
        model = build_model(make_concept_cfg(file=FILES[stage])).train()
        losses = model([sample(stage, seed) | targets for seed in range(2)])
        assert losses[{2: "loss_boxes", 3: "loss_masks"}[stage]] == 0
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert gradients(losses, model).keys() == trained


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_autocast_computes_nearly_the_same(stage, make_concept_cfg):
    model = build_model(make_concept_cfg(file=FILES[stage])).train()
    batch = [sample(stage, seed) for seed in range(2)]
    exact = {name: loss.item() for name, loss in copy.deepcopy(model)(batch).items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    for name, loss in losses.items():
        assert loss.isfinite()
        assert loss.item() == pytest.approx(exact[name], rel=0.15, abs=0.02)
    sum(losses.values()).backward()


def test_detectron2_shares_no_buffers_between_processes(make_concept_cfg, monkeypatch):
    """The matrix of Eq. 4 has no fixed size: processes must not exchange it in every step."""
    asked = {}
    monkeypatch.setattr(
        "detectron2.engine.defaults.create_ddp_model",
        lambda model, **kwargs: asked.update(kwargs) or create_ddp_model(model, **kwargs),
    )
    Trainer(make_concept_cfg(file=FILES[2]))
    assert asked == {"broadcast_buffers": False}


def test_the_stride_is_that_of_the_backbone(make_concept_cfg):
    model = build_model(make_concept_cfg(file=FILES[1])).eval()
    assert model.network.embedding.stride == 8
    with pytest.raises(ValueError, match=r"7 x 40 pixels, less than the 8"):
        model([{"image": torch.zeros(3, 7, 40)}])


def test_a_backbone_of_detectron2_serves(make_concept_cfg):
    fpn = (
        *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.OUT_FEATURES"),
        *(["res2", "res3", "res4", "res5"], "MODEL.FPN.IN_FEATURES"),
        *(["res2", "res3", "res4", "res5"], "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
        *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.MASKX.IN_FEATURE", "p4"),
        *("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0),
    )
    cfg = make_concept_cfg(*fpn, KEYS + "ATTENTION_SIZES", (32, 64), file=FILES[1])
    model = build_model(cfg).train()
    assert model.network.embedding.stride == 16
    losses = model([sample(1), sample(1, 1)])
    assert gradients(losses, model).keys() == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    with pytest.raises(ValueError, match=r"ATTENTION_SIZES has the side 48.*multiples of 32.* 32"):
        build_model(make_concept_cfg(*fpn, file=FILES[1]))


# --- prediction


def test_a_query_of_a_sample_is_answered_at_the_size_of_the_file(make_concept_cfg):
    model = build_model(make_concept_cfg(file=FILES[3])).eval()
    query = concept_query(*model.table.resolve(["grass", 3, model.table.vectors[5]]))
    image = sample(3, size=40)["image"]
    (found,) = model([{"image": image, "height": 50, "width": 60, "query": query}])
    assert found["concepts"] == ["grass", model.table.names[3], "vector 2"]
    assert found["concept_indices"].tolist() == [model.table.index_of("grass"), 3, -1]
    assert found["masks_prob"].shape == found["attention"].shape == (3, 50, 60)
    assert torch.equal(found["masks"], found["masks_prob"] > 0.5)
    plain = model.network.predict(model.normalise({"image": image}), query, output_size=(50, 60))
    assert torch.equal(plain.mask_prob, found["masks_prob"])
    assert torch.equal(plain.existence, found["existence"])


def test_concepts_come_from_the_config_or_exist(make_concept_cfg, concept_files):
    words = ("TEST.MASKX.UNSEEN_WORDS", str(concept_files / "unseen.safetensors"))
    cfg = make_concept_cfg("TEST.MASKX.CONCEPTS", ("grass", "green plus"), *words, file=FILES[2])
    image = {"image": sample(2)["image"]}
    (found,) = build_model(cfg).eval()([image])
    assert found["concepts"] == ["grass", "green plus"]
    assert found["concept_indices"].tolist()[1] == -1
    model = build_model(make_concept_cfg(file=FILES[2])).eval()
    model.network.set_fitted(existence_thresholds=torch.full((66,), 2.0))
    assert model([image])[0]["concepts"] == []
    assert model([image])[0]["masks"].shape == (0, 32, 32)
    thresholds = torch.full((66,), 2.0)
    thresholds[[3, 9]] = -1.0
    model.network.set_fitted(existence_thresholds=thresholds)
    assert model([image])[0]["concepts"] == [model.table.names[3], model.table.names[9]]


# --- checkpoints


def save(model, folder, name="model"):
    DetectionCheckpointer(model, save_dir=str(folder)).save(name)
    return str(folder / f"{name}.pth")


def test_a_stage_starts_from_the_one_before(make_concept_cfg, tmp_path):
    models = {stage: build_model(make_concept_cfg(file=FILES[stage])) for stage in FILES}
    for stage in (2, 3):
        path = save(models[stage - 1], tmp_path)
        DetectionCheckpointer(models[stage].train()).load(path)
        before = models[stage - 1].network.state_dict()
        for name, value in models[stage].network.state_dict().items():
            if name.startswith(("embedding.", "original.")):
                assert torch.equal(value, before[name.replace("original.", "embedding.", 1)])
            if stage == 3 and name.startswith("refinement."):
                assert torch.equal(value, before[name])
    with pytest.raises(
        ValueError, match=r"Stage 3 .*starts from a checkpoint of stage 2, got .* 1"
    ):
        DetectionCheckpointer(models[3].train()).load(save(models[1], tmp_path))


def test_another_stage_is_refused_for_prediction(make_concept_cfg, tmp_path):
    path = save(build_model(make_concept_cfg(file=FILES[2])), tmp_path)
    model = build_model(make_concept_cfg(file=FILES[3])).eval()
    with pytest.raises(ValueError, match=r"is of stage 2 .*the model of stage 3\. Set .*STAGE 2"):
        DetectionCheckpointer(model).load(path)


@pytest.mark.parametrize("change", ["vectors", "fewer", "names"])
def test_another_word_table_is_refused(change, make_concept_cfg, concept_files, tmp_path):
    path = save(build_model(make_concept_cfg(file=FILES[1])), tmp_path)
    table = load_word_table(concept_files / "words.safetensors")
    names, vectors = list(table.names), table.vectors.copy()
    if change == "vectors":
        vectors[0] *= 2
    elif change == "fewer":
        names, vectors = names[:-1], vectors[:-1]
    else:
        names[0] = "something else"
    other = WordTable(names, vectors, table.idf[: len(names)], source="elsewhere")
    save_word_table(tmp_path / "words.safetensors", other)
    lists = scene_concept_split()
    boxed, masked = ([n for n in each if n in names] for each in (lists.boxed, lists.masked))
    write_concept_split(tmp_path / "split.json", ConceptSplit(names, boxed, masked))
    opts = (KEYS + "WORD_TABLE", str(tmp_path / "words.safetensors"))
    opts += (KEYS + "SPLIT", str(tmp_path / "split.json"))
    model = build_model(make_concept_cfg(*opts, file=FILES[1]))
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"made with the word table \w{12}, but .*elsewhere"):
            DetectionCheckpointer(model.train(mode)).load(path)


def test_the_encoder_starts_from_imagenet(make_concept_cfg, monkeypatch):
    """The weights of timm are replaced by others, so that nothing is downloaded."""
    create = timm.create_model

    def filled(name, pretrained=False, **options):
        network = create(name, **options)
        if pretrained:
            nn.init.constant_(network.conv1.weight, 0.5)
            nn.init.constant_(network.layer1[0].conv1.weight, 0.25)
        return network

    monkeypatch.setattr(timm, "create_model", filled)
    model = build_model(make_concept_cfg(KEYS + "ENCODER_DEPTH", 18))
    model.start_encoder(18)
    segmenter = model.network.segmenter
    assert (segmenter.image_stem.weight == 0.5).all()
    assert (segmenter.encoder.network.layer1[0].conv1.weight == 0.25).all()


def test_gamma_is_that_of_the_file(make_concept_cfg, concept_files):
    model = build_model(make_concept_cfg(file=FILES[2]))
    names = scene_concept_split().vocabulary
    _, indices, weights = negative_weights(load_overlap(concept_files / "overlap.npz", names))
    assert np.array_equal(model.network.gamma_indices.numpy(), indices)
    assert np.array_equal(model.network.gamma_weights.numpy(), weights)
    model = build_model(make_concept_cfg(KEYS + "DISCRIMINATION_WEIGHT", 0.0, file=FILES[2]))
    assert model.network.gamma_indptr is None


# --- errors


@pytest.mark.parametrize(
    ("stage", "opts", "words"),
    [
        (1, (KEYS + "STAGE", 4), r"STAGE is 4\. Allowed: 1, 2, 3\."),
        (2, (KEYS + "NUM_MATCHED", 0), r"NUM_MATCHED is 0.*the first from 1"),
        (2, (KEYS + "MATCHING_WEIGHT", -1.0), r"MATCHING_WEIGHT -1\.0.*the others from 0"),
        (3, (KEYS + "ENCODER_PRETRAINED", True), r"ENCODER_DEPTH is 0, the small network"),
        (
            3,
            (KEYS + "ENCODER_PRETRAINED", True, KEYS + "ENCODER_DEPTH", 18, "INPUT.FORMAT", "BGR"),
            r"FORMAT is BGR.*ENCODER_PRETRAINED loads.*expect RGB.*or ENCODER_PRETRAINED False",
        ),
    ],
)
def test_keys_out_of_range_are_named(stage, opts, words, make_concept_cfg):
    with pytest.raises(ValueError, match=words):
        check_config(make_concept_cfg(*opts, file=FILES[stage]))


def test_concepts_that_are_not_known_are_named(make_concept_cfg):
    with pytest.raises(ValueError, match=r"'gras' is not among the 66 .*Closest: 'grass'"):
        build_model(make_concept_cfg("TEST.MASKX.CONCEPTS", ("gras",)))


def test_a_table_of_other_vectors_is_refused(make_concept_cfg):
    cfg = make_concept_cfg(file=FILES[1])
    parts = MaskXConceptMask.from_config(cfg)
    table = parts["table"]
    parts["table"] = WordTable(table.names, table.vectors + 1, table.idf)
    with pytest.raises(ValueError, match=r"not the 66 of length 12 .*was made with"):
        MaskXConceptMask(**parts)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_samples_without_targets_are_refused(stage, make_concept_cfg):
    model = build_model(make_concept_cfg(file=FILES[stage])).train()
    with pytest.raises(ValueError, match=r"image 7 has no '\w+'\. Use MaskXConceptMapper"):
        model([sample(stage), {"image": sample(stage)["image"], "image_id": 7}])
    with pytest.raises(ValueError, match=r"different sizes: \(32, 32\), \(40, 40\)"):
        model([sample(stage), sample(stage, size=40)])
