import numpy as np
import pytest
import timm
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine.defaults import create_ddp_model
from detectron2.modeling import build_model
from settings import pairs
from torch import nn

from maskx.core.word_table import WordTable, load_word_table, save_word_table
from maskx.detectron2 import Trainer
from maskx.detectron2.trainer import check_config
from maskx.systems.concept_mask.concept_sets import (
    ConceptSplit,
    scene_concept_split,
    write_concept_split,
)
from maskx.systems.concept_mask.overlap import load_overlap, negative_weights

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


def test_detectron2_shares_no_buffers_between_processes(make_concept_cfg, monkeypatch):
    """The matrix of Eq. 4 has no fixed size: processes must not exchange it in every step."""
    asked = {}
    monkeypatch.setattr(
        "detectron2.engine.defaults.create_ddp_model",
        lambda model, **kwargs: asked.update(kwargs) or create_ddp_model(model, **kwargs),
    )
    Trainer(make_concept_cfg(file=FILES[2]))
    assert asked == {"broadcast_buffers": False}


def test_keys_reach_the_network(make_concept_cfg):
    opts = (KEYS + "NUM_MATCHED", 5, KEYS + "MATCHING_WEIGHT", 0.5)
    opts += (KEYS + "DISCRIMINATION_WEIGHT", 0.25, "MODEL.PIXEL_STD", [1.0, 2.0, 4.0])
    model = build_model(make_concept_cfg(*opts, file=FILES[2]))
    assert (model.num_matched, model.matching_weight, model.discrimination_weight) == (5, 0.5, 0.25)
    assert model.pixel_std.flatten().tolist() == [1, 2, 4]
    assert model.attention_sizes == (32, 48)
    model = build_model(make_concept_cfg("TEST.MASKX.SCORED_SIZES", (48,), file=FILES[3]))
    assert model.size == 32
    image = sample(3)["image"]
    (found,) = model.eval()([{"image": image, "height": 40, "width": 50}])
    assert found["attention"].shape[1:] == (40, 50)


def test_the_stride_is_that_of_the_backbone(make_concept_cfg):
    model = build_model(make_concept_cfg(file=FILES[1])).eval()
    assert model.embedding.stride == 8
    with pytest.raises(ValueError, match=r"7 x 40 pixels, less than the 8"):
        model([{"image": torch.zeros(3, 7, 40)}])


def test_a_backbone_of_detectron2_serves(make_concept_cfg):
    fpn = (
        "MODEL.BACKBONE.NAME",
        "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES",
        ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES",
        ["res2", "res3", "res4", "res5"],
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        64,
        *pairs(
            {
                "MODEL.FPN.OUT_CHANNELS": 16,
                "MODEL.MASKX.IN_FEATURE": "p4",
                "MODEL.RESNETS.NORM": "BN",
                "MODEL.BACKBONE.FREEZE_AT": 0,
            }
        ),
    )
    cfg = make_concept_cfg(*fpn, KEYS + "ATTENTION_SIZES", (32, 64), file=FILES[1])
    model = build_model(cfg).train()
    assert model.embedding.stride == 16
    losses = model([sample(1), sample(1, 1)])
    assert gradients(losses, model).keys() == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    with pytest.raises(ValueError, match=r"ATTENTION_SIZES has the side 48.*multiples of 32.* 32"):
        build_model(make_concept_cfg(*fpn, file=FILES[1]))


# --- prediction


def test_concepts_come_from_the_config_or_exist(make_concept_cfg, concept_files):
    words = ("TEST.MASKX.UNSEEN_WORDS", str(concept_files / "unseen.safetensors"))
    asked = ("TEST.MASKX.CONCEPTS", ("grass", "green plus"), *words)
    image = {"image": sample(2)["image"]}
    for blend in (False, True):
        cfg = make_concept_cfg(*asked, "TEST.MASKX.BLEND_UNSEEN", blend, file=FILES[2])
        model = build_model(cfg).eval()
        model.set_fitted(theta_image=0.5, theta_unseen=0.25)
        (found,) = model([image])
        assert found["concepts"] == ["grass", "green plus"]
        assert found["concept_indices"].tolist()[1] == -1
        assert found["own_share"].tolist() == [0.5, 0.25 if blend else 1]
        assert (found["borrowed"][1] is None) != blend
    model = build_model(make_concept_cfg(file=FILES[2])).eval()
    thresholds = torch.full((66,), 2.0)
    thresholds[[3, 9]] = -1.0
    model.set_fitted(existence_thresholds=thresholds)
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
        before = models[stage - 1].state_dict()
        for name, value in models[stage].state_dict().items():
            if name.startswith(("embedding.", "original.")):
                assert torch.equal(value, before[name.replace("original.", "embedding.", 1)])
            if stage == 3 and name.startswith("refinement."):
                assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match=r"is of stage 1 .*Stage 3 starts from one of stage 2"):
        DetectionCheckpointer(models[3].train()).load(save(models[1], tmp_path))


def test_another_stage_is_refused_for_prediction(make_concept_cfg, tmp_path):
    path = save(build_model(make_concept_cfg(file=FILES[2])), tmp_path)
    model = build_model(make_concept_cfg(file=FILES[3])).eval()
    with pytest.raises(ValueError, match=r"is of stage 2 .*the network of stage 3"):
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


def test_the_encoder_starts_from_imagenet_unless_it_was_trained(
    make_concept_cfg, tmp_path, monkeypatch
):
    """The weights of timm are replaced by others, so that nothing is downloaded."""
    create = timm.create_model

    def filled(name, pretrained=False, **options):
        network = create(name, **options)
        if pretrained:
            nn.init.constant_(network.conv1.weight, 0.5)
        return network

    monkeypatch.setattr(timm, "create_model", filled)
    opts = (KEYS + "ENCODER", "resnet18", KEYS + "ENCODER_PRETRAINED", True)
    for stage, starts in ((2, True), (3, False)):
        own = () if stage == 2 else opts
        before = build_model(make_concept_cfg(*own, file=FILES[stage])).state_dict()
        torch.save({"model": before}, tmp_path / "before.pth")
        trainer = Trainer(make_concept_cfg(*opts, "MODEL.WEIGHTS", str(tmp_path / "before.pth")))
        trainer.resume_or_load(resume=False)
        assert (trainer.model.segmenter.image_stem.weight == 0.5).all() == starts


def test_gamma_is_that_of_the_file(make_concept_cfg, concept_files):
    model = build_model(make_concept_cfg(file=FILES[2]))
    names = scene_concept_split().vocabulary
    _, indices, weights = negative_weights(load_overlap(concept_files / "overlap.npz", names))
    assert np.array_equal(model.gamma_indices.numpy(), indices)
    assert np.array_equal(model.gamma_weights.numpy(), weights)
    model = build_model(make_concept_cfg(KEYS + "DISCRIMINATION_WEIGHT", 0.0, file=FILES[2]))
    assert model.gamma_indptr is None


# --- errors


@pytest.mark.parametrize(
    ("stage", "opts", "words"),
    [
        (2, (KEYS + "NUM_MATCHED", 0), r"NUM_MATCHED is 0\. Allowed for ConceptMask: 1 or"),
        (3, (KEYS + "ENCODER_PRETRAINED", True), r"but ENCODER is small, for which there are no"),
        (
            3,
            (
                KEYS + "ENCODER_PRETRAINED",
                True,
                KEYS + "ENCODER",
                "resnet18",
                "INPUT.FORMAT",
                "BGR",
            ),
            r"FORMAT is BGR.*ENCODER_PRETRAINED loads.*expect RGB.*or ENCODER_PRETRAINED off",
        ),
    ],
)
def test_keys_out_of_range_are_named(stage, opts, words, make_concept_cfg):
    with pytest.raises(ValueError, match=words):
        check_config(make_concept_cfg(*opts, file=FILES[stage]))


@pytest.mark.parametrize(
    ("stage", "opts", "words"),
    [
        (2, (KEYS + "MATCHING_WEIGHT", -1.0), "matching_weight of ConceptMask must be at least 0"),
        (3, (KEYS + "ENCODER", "resnet5"), "There is no backbone 'resnet5'"),
        (1, ("TEST.MASKX.CONCEPTS", ("gras",)), "'gras' is not among the 66 .*Closest: 'grass'"),
        (1, ("TEST.MASKX.SCORED_SIZES", (20,)), r"scored_sizes of ConceptMask has \[20\]"),
    ],
)
def test_what_the_networks_refuse(stage, opts, words, make_concept_cfg):
    with pytest.raises(ValueError, match=words):
        build_model(make_concept_cfg(*opts, file=FILES[stage]))
