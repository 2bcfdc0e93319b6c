"""Configurations by name."""

import shutil
from pathlib import Path

import pytest

import maskx
from maskx.detectron2 import get_cfg, get_config_file

NAME = "MaskX/voc2nonvoc/e2e/clsbox_2_layer_R_50_FPN_1x.yaml"


@pytest.mark.parametrize("where", ["beside the package", "inside it"])
def test_a_configuration_is_found_and_read(tmp_path, monkeypatch, where):
    if where == "inside it":
        shutil.copytree(Path(get_config_file(NAME)).parents[3], tmp_path / "maskx" / "configs")
        monkeypatch.setattr(maskx, "__file__", str(tmp_path / "maskx" / "__init__.py"))
    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(NAME))
    assert cfg.MODEL.MASKX.PREDICTOR == "transfer"
    assert cfg.DATASETS.MASKX.SPLIT == "coco_voc"


def test_another_name_is_refused_with_the_near_ones():
    with pytest.raises(FileNotFoundError, match=r"clsbox_2_layer_R_50_FPN_1x\.yaml"):
        get_config_file("voc2nonvoc/e2e/clsbox_2_layer_R_50_FPN.yaml")
    with pytest.raises(FileNotFoundError, match=r"MaskX/lazy/maskx_vitdet_b\.py"):
        get_config_file("MaskX/lazy/vitdet_b.py")
