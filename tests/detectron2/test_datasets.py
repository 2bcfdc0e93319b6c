import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import BoxMode

from maskx.data.vocabularies import COCO_THING_CLASSES
from maskx.detectron2 import (
    MaskXDatasetMapper,
    register_all,
    register_coco,
    register_from_config,
)
from maskx.detectron2.data import class_names_of, datasets, split_from_config

BAD_POLYGON = {"category_id": 20, "bbox": [5, 5, 20, 20], "segmentation": [[1, 1, 2, 2]]}
GOOD = {"category_id": 40, "bbox": [1, 2, 30, 20], "segmentation": [[1, 2, 31, 2, 31, 22]]}


def test_records_are_those_of_detectron2(write_coco):
    path, root = write_coco([GOOD, {"category_id": 10, "bbox": [0, 0, 9, 9], "iscrowd": 1}])
    register_coco("farm", path, root)
    (record,) = DatasetCatalog.get("farm")
    assert (record["image_id"], record["height"], record["width"]) == (7, 40, 60)
    masked, crowd = record["annotations"]
    assert masked["category_id"] == 3
    assert masked["bbox"] == [1, 2, 31, 22]
    assert masked["bbox_mode"] == BoxMode.XYXY_ABS
    assert masked["segmentation"] == GOOD["segmentation"]
    assert crowd["iscrowd"] == 1
    metadata = MetadataCatalog.get("farm")
    assert metadata.thing_classes == ["cat", "dog", "owl", "yak"]
    assert metadata.thing_dataset_id_to_contiguous_id == {10: 0, 20: 1, 30: 2, 40: 3}
    assert (metadata.json_file, metadata.image_root) == (str(path), str(root))
    assert metadata.evaluator_type == "maskx_coco"


def test_a_box_with_only_bad_polygons_stays(write_coco):
    """Trap: Detectron2's reader drops it."""
    path, root = write_coco([BAD_POLYGON, GOOD])
    assert len(load_coco_json(str(path), str(root), "other")[0]["annotations"]) == 1
    register_coco("farm", path, root, strict=False)
    (record,) = DatasetCatalog.get("farm")
    assert [a["category_id"] for a in record["annotations"]] == [1, 3]
    assert ["segmentation" in a for a in record["annotations"]] == [False, True]


def test_strict_is_the_default_and_names_the_annotation(write_coco):
    register_coco("farm", *write_coco([BAD_POLYGON]))
    with pytest.raises(ValueError, match=r"annotation 1 of image 7, category 'dog'"):
        DatasetCatalog.get("farm")


def test_registering_twice_is_harmless_and_anything_else_is_an_error(write_coco, tmp_path):
    path, root = write_coco([GOOD])
    for _ in range(2):
        register_coco("farm", path, root)
    with pytest.raises(ValueError, match=r"'farm' is already registered with .*'strict': True"):
        register_coco("farm", path, root, strict=False)
    with pytest.raises(ValueError, match="Choose another name"):
        register_coco("coco_2017_train", path, root)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        register_coco("zoo", tmp_path / "none.json", root)
    assert "zoo" not in DatasetCatalog


def test_register_all_twice_reads_nothing(tmp_path):
    for _ in range(2):
        register_all(tmp_path)
    assert not list(tmp_path.iterdir())
    coco = MetadataCatalog.get("maskx_coco_2017_train")
    official = MetadataCatalog.get("coco_2017_train")
    assert coco.thing_classes == official.thing_classes == list(COCO_THING_CLASSES)
    assert coco.thing_dataset_id_to_contiguous_id == official.thing_dataset_id_to_contiguous_id
    assert coco.json_file == str(tmp_path / "coco/annotations/instances_train2017.json")
    with pytest.raises(FileNotFoundError, match=r"instances_train2017\.json"):
        DatasetCatalog.get("maskx_coco_2017_train")


def test_the_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_all()
    assert MetadataCatalog.get("maskx_scenes_val").image_root == str(tmp_path / "maskx_scenes/val")


def test_scenes_are_generated_when_first_used(tmp_path, monkeypatch):
    monkeypatch.setitem(
        datasets._SCENES, "val", {"count": 2, "size": 64, "num_categories": 40, "seed": 1}
    )
    register_all(tmp_path)
    records = DatasetCatalog.get("maskx_scenes_val")
    assert [p.name for p in (tmp_path / "maskx_scenes").iterdir()] == ["val"]
    assert len(records) == 2
    written = json.loads(Path(MetadataCatalog.get("maskx_scenes_val").json_file).read_text())
    assert [c["name"] for c in written["categories"]] == class_names_of("maskx_scenes_val")
    assert DatasetCatalog.get("maskx_scenes_val") == records


def test_scenes_may_be_generated_by_several_processes_at_once(tmp_path):
    folder = tmp_path / "scenes" / "val"
    parameters = {"count": 3, "size": 64, "num_categories": 4, "seed": 1}
    with ThreadPoolExecutor(4) as pool:
        for run in [pool.submit(datasets._write_scenes, folder, parameters) for _ in range(4)]:
            run.result()
    assert [p.name for p in folder.parent.iterdir()] == ["val"]
    assert len(json.loads((folder / "annotations.json").read_text())["images"]) == 3


def test_data_sets_of_the_configuration(make_cfg, write_coco):
    path, root = write_coco([GOOD])
    cfg = make_cfg("DATASETS.MASKX.REGISTER", [["farm", str(path), str(root)]])
    for _ in range(2):
        register_from_config(cfg)
    assert class_names_of("farm") == ["cat", "dog", "owl", "yak"]
    for entry in ["abc", ["farm", str(path)], ["farm", str(path), 1]]:
        cfg.DATASETS.MASKX.REGISTER = [entry]
        with pytest.raises(ValueError, match=r"Allowed: entries \[name, json_file, image_root\]"):
            register_from_config(cfg)


def test_a_misspelt_name_is_an_error_and_makes_no_metadata():
    """Trap: MetadataCatalog.get makes an empty entry for any name."""
    with pytest.raises(ValueError, match=r"'coco_2017_trian'.*Did you mean 'coco_2017_train'"):
        class_names_of("coco_2017_trian")
    assert "coco_2017_trian" not in MetadataCatalog.list()


def test_a_data_set_without_a_class_list_is_an_error():
    DatasetCatalog.register("nameless", lambda: [])
    with pytest.raises(ValueError, match=r"'nameless' has no class list"):
        class_names_of("nameless")


def test_data_sets_registered_with_detectron2_work_as_well(write_coco, make_cfg, tmp_path):
    path, root = write_coco([GOOD, {"category_id": 20, "bbox": [5, 5, 20, 20]}])
    register_coco_instances("plain", {}, str(path), str(root))
    split = tmp_path / "split.txt"
    split.write_text("yak\n")
    cfg = make_cfg("DATASETS.TRAIN", ("plain",), "DATASETS.MASKX.SPLIT", str(split))
    assert split_from_config(cfg).indices_with_masks == (3,)
    (record,) = DatasetCatalog.get("plain")
    instances = MaskXDatasetMapper(cfg, is_train=True)(record)["instances"]
    assert instances.gt_has_mask.tolist() == [True, False]


def test_real_annotations_keep_every_box(make_cfg, shared_data):
    root = shared_data / "coco_mini"
    path = root / "annotations" / "instances_val2017.json"
    register_coco("mini", path, root / "val2017")
    records = DatasetCatalog.get("mini")
    annotations = json.loads(path.read_text())["annotations"]
    assert sum(len(r["annotations"]) for r in records) == len(annotations)
    cfg = make_cfg("DATASETS.TRAIN", ("mini",), "DATASETS.MASKX.SPLIT", "coco_voc")
    mapper = MaskXDatasetMapper(cfg, is_train=True)
    voc = np.array(split_from_config(cfg).indices_with_masks)
    for record in records[:40]:
        instances = mapper(record)["instances"]
        assert len(instances) == sum(not a["iscrowd"] for a in record["annotations"])
        expected = np.isin(instances.gt_classes.numpy(), voc)
        assert instances.gt_has_mask.tolist() == expected.tolist()
    assert not mapper.lost_masks
