"""The LazyConfigs on ViTDet; that on R-50 is compared with its YAML in test_config.py."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.layers.batch_norm import LayerNorm
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage

from maskx.detectron2 import MaskXCascadeROIHeads, MaskXROIHeads

LAZY = Path(__file__).parents[2] / "configs" / "MaskX" / "lazy"
NAMES = {"maskx_vitdet_b.py": MaskXROIHeads, "maskx_cascade_vitdet_b.py": MaskXCascadeROIHeads}


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    return lambda name: LazyConfig.load(str(LAZY / name))


def make_tiny(model):
    """Change the sizes only: a ViT of 2 blocks of 32 channels on images of 64 x 64."""
    model.backbone.square_pad = 64
    model.backbone.out_channels = 16
    model.backbone.net.update(
        **{"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "window_size": 2},
        window_block_indexes=[0],
    )
    model.proposal_generator.head.in_channels = 16
    model.proposal_generator.post_nms_topk = (20, 20)
    heads = model.roi_heads
    heads.update(num_classes=4, batch_size_per_image=16)
    for head in heads.get("box_heads") or [heads.box_head]:
        head.update(
            input_shape=ShapeSpec(channels=16, height=7, width=7), conv_dims=[8], fc_dims=[24]
        )
    for predictor in heads.get("box_predictors") or [heads.box_predictor]:
        predictor.update(
            **{"input_shape": ShapeSpec(channels=24), "test_score_thresh": 0.0},
            test_topk_per_image=5,
        )
    heads.mask_pooler.output_size = 4
    heads.mask_head.update(
        **{"input_shape": ShapeSpec(channels=16, height=4, width=4), "channels": 8},
        **{"num_convs": 1, "detector_channels": 24},
    )
    return model


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_predicts_at_tiny_size(load, make_sample, name):
    torch.manual_seed(0)
    model = instantiate(make_tiny(load(name).model)).train()
    assert type(model.roi_heads) is NAMES[name]
    for kind in ([True, False], [False]):  # the second batch has no mask
        with EventStorage():
            losses = model([make_sample(kind)])
        assert (losses["loss_mask"] > 0) == any(kind)
        model.zero_grad()
        sum(losses.values()).backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert missing == []
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        (result,) = model.eval()([make_sample([]) | {"height": 32, "width": 48}])
    assert 0 < len(result["instances"]) <= 5
    assert result["instances"].pred_masks.shape[1:] == (32, 48)


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_saved_and_loaded(load, tmp_path, name):
    """Detectron2 falls back to a pickle for what YAML cannot hold."""
    config = load(name)
    folder = tmp_path / "saved"
    folder.mkdir()
    LazyConfig.save(config, str(folder / "config.yaml"))
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    again = LazyConfig.load(str(folder / "config.yaml"))
    LazyConfig.save(again, str(tmp_path / "again.yaml"))
    assert (tmp_path / "again.yaml").read_text() == (folder / "config.yaml").read_text()
    assert type(instantiate(make_tiny(again.model)).roi_heads) is NAMES[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_branch_fits_the_box_branch(load, name):
    with torch.device("meta"):  # the full size
        heads = instantiate(load(name).model.roi_heads)
    cls, box = heads.detector_weights()
    length = cls.shape[1] + (0 if box is None else box.shape[1])
    assert heads.mask_head.predictor.layers[0].in_features == length
    assert length == {MaskXROIHeads: 5 * 1024, MaskXCascadeROIHeads: 1024}[NAMES[name]]
    assert isinstance(heads.mask_head.mask_fcn4.norm, LayerNorm)


def test_the_recipe_is_that_of_vitdet(load):
    config = load("maskx_vitdet_b.py")
    model = instantiate(make_tiny(config.model))
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    settings = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    # The learning rate falls by a factor of 0.7 per block towards the input.
    assert settings["roi_heads.mask_head.deconv.weight"] == (1e-4, 0.1)
    assert settings["backbone.net.pos_embed"] == (pytest.approx(1e-4 * 0.7**13), 0.0)
    assert settings["backbone.net.blocks.1.attn.qkv.weight"][0] == pytest.approx(1e-4 * 0.7**11)
    multiplier = instantiate(config.lr_multiplier)
    for where, expected in [(0, 0.001), (0.5, 1), (0.9, 0.1), (0.97, 0.01)]:
        assert multiplier(where) == pytest.approx(expected)
    assert config.train.max_iter == config.lr_multiplier.scheduler.num_updates == 184375


def test_the_mapper_withholds_masks_and_keeps_boxes(load, tmp_path):
    mapper = instantiate(load("maskx_vitdet_b.py").dataloader.train.mapper)
    cv2.imwrite(str(tmp_path / "photo.png"), np.zeros((64, 64, 3), np.uint8))
    box = {"bbox": [4, 4, 60, 60], "bbox_mode": BoxMode.XYXY_ABS}
    polygon = {"segmentation": [[4, 4, 60, 4, 60, 60, 4, 60]]}
    annotations = [{"category_id": k, **box, **polygon} for k in (0, 7)]  # person, truck
    record = {"file_name": str(tmp_path / "photo.png"), "height": 64, "width": 64}
    np.random.seed(0)
    sample = mapper(record | {"annotations": annotations})
    assert sample["instances"].gt_has_mask.tolist() == [True, False]
    assert sample["instances"].gt_boxes.nonempty().all()
    assert max(sample["image"].shape[1:]) <= 1024
