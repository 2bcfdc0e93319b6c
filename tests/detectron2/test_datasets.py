import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.evaluation import COCOEvaluator, SemSegEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from settings import pairs

from maskx.data.coco import load_coco
from maskx.data.label_maps import write_label_map
from maskx.data.masks import decode_segmentation, encode_masks
from maskx.data.prepare.visual_genome import COCO_SYNSETS, prepare_visual_genome
from maskx.data.vocabularies import COCO_THING_CLASSES, VOC_CLASSES
from maskx.detectron2 import (
    MaskXDatasetMapper,
    register_all,
    register_coco,
    register_from_config,
)
from maskx.detectron2.datasets import (
    class_names_of,
    record_from_detectron2,
    records_of,
    register_tag_list,
    split_from_config,
)
from maskx.detectron2.known_datasets import KNOWN_DATASETS, Scenes

BAD_POLYGON = {"category_id": 20, "bbox": [5, 5, 20, 20], "segmentation": [[1, 1, 2, 2]]}
GOOD = {"category_id": 40, "bbox": [1, 2, 30, 20], "segmentation": [[1, 2, 31, 2, 31, 22]]}


def test_records_are_those_of_the_reader(write_coco):
    path, root = write_coco([GOOD, {"category_id": 10, "bbox": [0, 0, 9, 9], "iscrowd": 1}])
    register_coco("farm", path, root)
    (record,) = DatasetCatalog.get("farm")
    assert (record["image_id"], record["height"], record["width"]) == (7, 40, 60)
    (read,) = load_coco(path, root).records
    masked, crowd = record["annotations"]
    added = {"category_id": 3, "bbox_mode": BoxMode.XYXY_ABS}
    assert masked == read["annotations"][0] | added
    assert record | {"annotations": []} == read | {"annotations": []}
    assert masked["class_index"] == masked["category_id"] == 3
    assert masked["bbox"] == [1, 2, 31, 22]
    assert masked["bbox_mode"] == BoxMode.XYXY_ABS
    assert [list(part) for part in masked["segmentation"]] == GOOD["segmentation"]
    assert crowd["iscrowd"] == 1
    metadata = MetadataCatalog.get("farm")
    assert metadata.thing_classes == ["cat", "dog", "owl", "yak"]
    assert metadata.thing_dataset_id_to_contiguous_id == {10: 0, 20: 1, 30: 2, 40: 3}
    assert (metadata.json_file, metadata.image_root) == (str(path), str(root))


def test_a_box_with_only_bad_polygons_stays(write_coco):
    """Trap: Detectron2's reader drops it."""
    path, root = write_coco([BAD_POLYGON, GOOD])
    assert len(load_coco_json(str(path), str(root), "other")[0]["annotations"]) == 1
    register_coco("farm", path, root, strict=False)
    (record,) = DatasetCatalog.get("farm")
    assert [a["category_id"] for a in record["annotations"]] == [1, 3]
    assert ["segmentation" in a for a in record["annotations"]] == [False, True]


def test_entries_that_refer_to_nothing_are_passed_over_where_asked(make_cfg, write_coco):
    path, root = write_coco([{"category_id": 10, "bbox": [2, 2, 9, 9]}])
    content = json.loads(path.read_text())
    content["annotations"].append(content["annotations"][0] | {"id": 2, "image_id": 999})
    content["images"] += [{}, content["images"][0]]
    path.write_text(json.dumps(content))
    opts = ("DATASETS.MASKX.REGISTER", [["farm", str(path), str(root)]])
    with pytest.raises(ValueError, match=r"annotations\.json: images"):
        register_from_config(make_cfg(*opts))
    register_from_config(make_cfg(*opts, "DATASETS.MASKX.STRICT", False))
    (record,) = DatasetCatalog.get("farm")
    assert len(record["annotations"]) == 1


def test_strict_is_the_default_and_names_the_annotation(write_coco):
    register_coco("farm", *write_coco([BAD_POLYGON]))
    with pytest.raises(ValueError, match=r"annotation 1 of image 7, category 'dog'"):
        DatasetCatalog.get("farm")


def test_registering_twice_is_harmless_and_anything_else_is_an_error(write_coco, tmp_path):
    path, root = write_coco([GOOD])
    for _ in range(2):
        register_coco("farm", path, root)
    with pytest.raises(ValueError, match=r"'farm' is already registered with strict True; now"):
        register_coco("farm", path, root, strict=False)
    with pytest.raises(ValueError, match=r"names \['cat', .*now class names \['yak', 'dog'"):
        register_coco("farm", path, root, class_names=["yak", "dog", "owl", "cat"])
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


def write_voc(root):
    """Write the files of `prepare.py voc` for one image, and the image."""
    folder, images = root / "voc2012", root / "VOCdevkit/VOC2012/JPEGImages"
    folder.mkdir(parents=True)
    images.mkdir(parents=True)
    cv2.imwrite(str(images / "2007_000032.jpg"), np.zeros((4, 6, 3), np.uint8))
    write_label_map(folder / "32.png", np.full((4, 6), 20), num_classes=20)
    image = {"id": 2007000032, "file_name": "2007_000032.jpg", "height": 4, "width": 6}
    tags = image | {"image_labels": [20]}
    categories = [{"id": i, "name": name} for i, name in enumerate(VOC_CLASSES, start=1)]
    for part, entry in {
        "trainaug": tags | {"label_map_file_name": "32.png"},
        "trainaug_tags": tags,
    }.items():
        content = {"images": [entry], "annotations": [], "categories": categories}
        (folder / f"voc2012_{part}.json").write_text(json.dumps(content))


def test_voc_has_to_be_prepared(tmp_path):
    register_all(tmp_path)
    words = r"no file .*voc2012_trainaug\.json\. .*python datasets/prepare\.py voc --root"
    with pytest.raises(FileNotFoundError, match=words):
        DatasetCatalog.get("maskx_voc_2012_trainaug")
    write_voc(tmp_path)
    for _ in range(2):
        register_all()
    assert class_names_of("maskx_voc_2012_trainaug") == list(VOC_CLASSES)
    (record,) = DatasetCatalog.get("maskx_voc_2012_trainaug")
    (tags,) = DatasetCatalog.get("maskx_voc_2012_trainaug_tags")
    label_map = str(tmp_path / "voc2012/32.png")
    assert record.pop("label_map_file_name") == record.pop("sem_seg_file_name") == label_map
    assert (record.pop("supervision"), tags.pop("supervision")) == ("mask", "image")
    assert record == tags
    assert tags["image_labels"] == [19]
    assert tags["file_name"] == str(tmp_path / "VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg")


def test_records_of_other_readers_get_the_form_of_ours(write_coco):
    path, root = write_coco([GOOD, {"category_id": 10, "bbox": [0, 0, 9, 9], "iscrowd": 1}])
    register_coco("farm", path, root)
    (ours,) = records_of("farm")
    assert record_from_detectron2(ours) is ours
    register_coco_instances("core", {}, str(path), str(root))
    (read,) = records_of("core")
    assert [list(p) for p in ours["annotations"][0].pop("segmentation")] == GOOD["segmentation"]
    assert read["annotations"][0].pop("segmentation") == GOOD["segmentation"]
    keys = ("bbox", "class_index", "iscrowd", "segmentation")
    for own, other in zip(ours["annotations"], read["annotations"], strict=True):
        assert [own.get(key) for key in keys] == [other.get(key) for key in keys]
    for key in ("file_name", "height", "width", "image_id", "image_labels", "supervision"):
        assert read[key] == ours[key]
    tagged = record_from_detectron2({"image_labels": [1]})
    assert tagged == {"image_labels": [1], "annotations": [], "supervision": "image"}
    unknown = {"file_name": "a.png"}  # nobody says what it shows
    assert record_from_detectron2(unknown) == unknown


def test_detectron2_reads_the_records_of_our_data_sets(write_coco):
    """Its filter, histogram and Visualizer; the last cannot draw masks of only some objects."""
    path, root = write_coco([GOOD])
    register_coco("farm", path, root)
    (record,) = get_detection_dataset_dicts("farm")
    visualizer = Visualizer(np.zeros((40, 60, 3), np.uint8), MetadataCatalog.get("farm"))
    assert visualizer.draw_dataset_dict(record).get_image().any()


def test_the_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_all()
    assert MetadataCatalog.get("maskx_scenes_val").image_root == str(tmp_path / "maskx_scenes/val")


def few_scenes(known, count):
    return replace(known, scenes=Scenes({**known.scenes.parameters, "count": count, "size": 64}))


@pytest.mark.parametrize(("folder", "num_categories"), [("scenes", 40), ("scenes_sparse", 12)])
def test_scenes_are_generated_when_first_used(tmp_path, monkeypatch, folder, num_categories):
    name = f"maskx_{folder}_val"
    monkeypatch.setitem(KNOWN_DATASETS, name, few_scenes(KNOWN_DATASETS[name], 2))
    assert KNOWN_DATASETS[name].image_root == f"maskx_{folder}/val"
    register_all(tmp_path)
    assert not (tmp_path / f"maskx_{folder}").exists()
    records = DatasetCatalog.get(name)
    assert [p.name for p in (tmp_path / f"maskx_{folder}").iterdir()] == ["val"]
    assert len(records) == 2
    written = json.loads(Path(MetadataCatalog.get(name).json_file).read_text())
    assert [c["name"] for c in written["categories"]] == class_names_of(name)
    assert len(class_names_of(name)) == num_categories
    assert DatasetCatalog.get(name) == records


def test_tags_of_scenes_name_the_ground_and_nothing_more_is_there(tmp_path, monkeypatch):
    source, tags = "maskx_scenes_sparse_train", "maskx_scenes_sparse_stuff_tags"
    place = KNOWN_DATASETS[tags].image_root
    assert (place, KNOWN_DATASETS[tags].scenes) == (
        KNOWN_DATASETS[source].image_root,
        KNOWN_DATASETS[source].scenes,
    )
    for name in (source, tags):
        monkeypatch.setitem(KNOWN_DATASETS, name, few_scenes(KNOWN_DATASETS[name], 3))
    register_all(tmp_path)
    assert class_names_of(tags) == class_names_of("maskx_scenes_sparse_stuff_val")
    pairs = list(zip(DatasetCatalog.get(tags), DatasetCatalog.get(source), strict=True))
    images = json.loads((tmp_path / place / "annotations.json").read_text())["images"]
    assert len(pairs) == len(images) == 3
    for image, (record, plain) in zip(images, pairs, strict=True):
        assert image["stuff_labels"]
        ground = [12 + label - 1 for label in image["stuff_labels"]]
        kept = {key: plain[key] for key in ("file_name", "image_id", "height", "width")}
        labels = sorted([*plain["image_labels"], *ground])
        assert record == kept | {
            "image_labels": labels,
            "annotations": [],
            "supervision": "image",
        }


def test_scenes_may_be_generated_by_several_processes_at_once(tmp_path):
    folder = tmp_path / "scenes" / "val"
    parameters = {"count": 3, "size": 64, "num_categories": 4, "seed": 1}
    with ThreadPoolExecutor(4) as pool:
        for run in [pool.submit(Scenes(parameters).write, folder) for _ in range(4)]:
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


def test_the_configuration_says_whether_a_bad_annotation_is_an_error(make_cfg, write_coco):
    path, root = write_coco([BAD_POLYGON])
    for name, strict in {"strict": True, "lenient": False}.items():
        register = [[name, str(path), str(root)]]
        options = ("DATASETS.MASKX.REGISTER", register, "DATASETS.MASKX.STRICT", strict)
        register_from_config(make_cfg(*options))
    assert len(DatasetCatalog.get("lenient")[0]["annotations"]) == 1
    with pytest.raises(ValueError, match=r"has 1 bad annotations \(polygon_malformed: 1\)"):
        DatasetCatalog.get("strict")


def test_training_needs_a_data_set(make_cfg):
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN is empty\. Name at least one"):
        split_from_config(make_cfg("DATASETS.TRAIN", ()))


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


FARM = ["yak", "hen", "cat", "dog", "owl", "pig"]


def test_a_file_may_annotate_a_part_of_a_larger_class_list(write_coco):
    path, root = write_coco([GOOD, {"category_id": 10, "bbox": [0, 0, 9, 9]}])
    register_coco("farm", path, root, class_names=FARM)
    assert class_names_of("farm") == FARM
    ids = MetadataCatalog.get("farm").thing_dataset_id_to_contiguous_id
    assert ids == {10: 2, 20: 3, 30: 4, 40: 0}
    (record,) = DatasetCatalog.get("farm")
    assert [a["category_id"] for a in record["annotations"]] == [0, 2]
    assert record["image_labels"] == [0, 2]
    assert record["boxes_complete"] is False


def test_boxes_of_the_whole_class_list_are_complete(write_coco):
    path, root = write_coco([GOOD])
    register_coco("farm", path, root, class_names=["yak", "dog", "owl", "cat"])
    register_coco("plain", path, root)
    for name, class_index in {"farm": 0, "plain": 3}.items():
        (record,) = DatasetCatalog.get(name)
        assert "boxes_complete" not in record
        assert [a["category_id"] for a in record["annotations"]] == [class_index]


def test_a_category_outside_the_class_list_is_named(write_coco):
    path, root = write_coco([GOOD])
    with pytest.raises(ValueError, match=r"category 'yak', .* 4 of class_names\. Closest: 'yaks'"):
        register_coco("farm", path, root, class_names=["cat", "dog", "owl", "yaks"])
    with pytest.raises(ValueError, match=r"annotations\.json repeats a name"):
        register_coco("farm", path, root, class_names=["cat", "dog", "owl", "yak", "cat"])
    assert "farm" not in DatasetCatalog


def test_a_file_whose_categories_have_changed_is_an_error(write_coco):
    path, root = write_coco([GOOD])
    register_coco("farm", path, root)
    write_coco([GOOD], categories=("cat", "dog", "owl", "yeti"))
    with pytest.raises(ValueError, match=r"has 4 categories, .* differ in yak, yeti\. If it is"):
        DatasetCatalog.get("farm")


@pytest.fixture
def vg_root(tmp_path):
    """Visual Genome with 82 classes and COCO, of three and two images; all 80 classes occur."""
    synsets = [COCO_SYNSETS.get(n, f"{n.replace(' ', '_')}.n.01") for n in COCO_THING_CLASSES]
    synsets += ["window.n.01", "tree.n.01", "rare.n.01"]
    counts = [1] * 80 + [3, 2, 1]
    objects = [
        {"object_id": i, "x": 4, "y": 5, "w": 20, "h": 10, "synsets": [s]}
        for i, s in enumerate(s for s, n in zip(synsets, counts, strict=True) for _ in range(n))
    ]
    folder = tmp_path / "visual_genome"
    coco = tmp_path / "coco"
    files = [folder / f for f in ("VG_100K/1.jpg", "VG_100K_2/2.jpg", "VG_100K/3.jpg")]
    files += [coco / "train2017/7.jpg", coco / "val2017/9.jpg"]
    (coco / "annotations").mkdir(parents=True)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.full((40, 60, 3), 127, np.uint8))
    images = [
        {"image_id": i, "url": f"http://x/y/{file.parent.name}/{file.name}", "coco_id": coco_id}
        for i, (file, coco_id) in enumerate(zip(files, (5, 9, None), strict=False), start=1)
    ]
    images = [{**image, "width": 60, "height": 40} for image in images]
    entries = [
        {"image_id": 1, "objects": objects[:50]},
        {"image_id": 2, "objects": objects[50:70]},
        {"image_id": 3, "objects": objects[70:]},
    ]
    for name, content in {"image_data": images, "objects": entries}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    official = MetadataCatalog.get("coco_2017_train")
    ids = official.thing_dataset_id_to_contiguous_id
    categories = [{"id": i, "name": official.thing_classes[index]} for i, index in ids.items()]
    for part, id_ in {"train": 7, "val": 9}.items():
        image = {"id": id_, "file_name": f"{id_}.jpg", "height": 40, "width": 60}
        masked = {"id": 1, "image_id": id_, "category_id": 90, "bbox": [4, 5, 20, 10]}
        masked["segmentation"] = [[4, 5, 24, 5, 24, 15, 4, 15]]
        content = {"images": [image], "annotations": [masked], "categories": categories}
        path = coco / "annotations" / f"instances_{part}2017.json"
        path.write_text(json.dumps(content))
    return tmp_path


def prepare(root):
    prepare_visual_genome(
        root / "visual_genome" / "objects.json",
        root / "visual_genome" / "image_data.json",
        root / "coco" / "annotations" / "instances_val2017.json",
        root / "visual_genome" / "annotations",
        num_classes=82,
        num_test_images=1,
    )


VISUAL_GENOME = [f"maskx_vg3k_{part}" for part in ("train", "val", "test")]
COCO_IN_VG = [f"maskx_coco_2017_vg3k_{part}" for part in ("train", "val")]


def test_visual_genome_has_to_be_prepared(vg_root):
    register_all(vg_root)
    for name in (*VISUAL_GENOME, *COCO_IN_VG):
        with pytest.raises(FileNotFoundError) as error:
            class_names_of(name)
        assert "python datasets/prepare.py visual_genome --root" in str(error.value)
        path = vg_root / "visual_genome" / "annotations" / "vg3k_categories.json"
        assert f"no file {path}" in str(error.value)
    prepare(vg_root)
    for _ in range(2):
        register_all()  # knows its root, and finds what is new
    class_lists = [class_names_of(name) for name in (*VISUAL_GENOME, *COCO_IN_VG)]
    assert class_lists == [[*COCO_THING_CLASSES, "tree.n.01", "window.n.01"]] * 5


def test_records_of_visual_genome_and_of_coco_beside_it(vg_root):
    prepare(vg_root)
    register_all(vg_root)
    records = [DatasetCatalog.get(name) for name in VISUAL_GENOME]
    files = ["VG_100K/1.jpg", "VG_100K_2/2.jpg", "VG_100K/3.jpg"]
    found = [record["file_name"] for part in records for record in part]
    assert found == [str(vg_root / "visual_genome" / file) for file in files]
    ((train,), _, (test,)) = records
    assert [a["category_id"] for a in train["annotations"]] == list(range(50))
    assert [a["category_id"] for a in test["annotations"]] == [*range(70, 80), 81, 81, 81, 80, 80]
    assert train["annotations"][0]["bbox"] == [4, 5, 24, 15]
    assert "boxes_complete" not in train
    for name, part in zip(COCO_IN_VG, ("train", "val"), strict=True):
        (record,) = DatasetCatalog.get(name)
        (plain,) = DatasetCatalog.get(f"maskx_coco_2017_{part}")
        assert record == plain | {"boxes_complete": False}
        assert record["annotations"][0]["category_id"] == 79


def test_a_batch_of_both_says_what_each_can_teach(vg_root, make_cfg):
    prepare(vg_root)
    register_all(vg_root)
    cfg = make_cfg(
        *pairs(
            {
                "DATASETS.TRAIN": ("maskx_vg3k_train", "maskx_coco_2017_vg3k_train"),
                "DATASETS.MASKX.SPLIT": "vg3k_coco",
                "MODEL.ROI_HEADS.NUM_CLASSES": 82,
            }
        )
    )
    split = split_from_config(cfg)
    assert split.indices_with_masks == tuple(range(80))
    assert split.without_masks == ("tree.n.01", "window.n.01")
    mapper = MaskXDatasetMapper(cfg, is_train=True)
    loader = build_detection_train_loader(cfg, mapper=mapper)
    # Images are batched by aspect ratio; the two have the same.
    of_file = {}
    for _, batch in zip(range(8), loader, strict=False):
        of_file |= {Path(sample["file_name"]).parent.name: sample for sample in batch}
    vg, coco = (of_file[folder]["instances"] for folder in ("VG_100K", "train2017"))
    assert not vg.has("gt_boxes_complete")
    assert (len(vg), vg.gt_has_mask.any().item()) == (50, False)
    assert coco.gt_boxes_complete.tolist() == [False]
    assert coco.gt_has_mask.tolist() == [True]
    assert coco.gt_classes.tolist() == [79]
    assert vg.gt_masks[0].__class__ is coco.gt_masks[0].__class__


def test_the_empty_boxes_of_coco_are_left_out_and_those_of_visual_genome_are_none(vg_root):
    prepare(vg_root)
    coco, vg = vg_root / "coco", vg_root / "visual_genome"
    for path in (
        coco / "annotations" / "instances_train2017.json",
        vg / "annotations" / "instances_vg3k_val.json",
    ):
        content = json.loads(path.read_text())
        content["annotations"].append(
            {**content["annotations"][0], "id": 999, "bbox": [4, 5, 0, 9], "segmentation": []}
        )
        path.write_text(json.dumps(content))
    register_all(vg_root)
    for name in ("maskx_coco_2017_train", "maskx_coco_2017_vg3k_train"):
        assert len(DatasetCatalog.get(name)[0]["annotations"]) == 1
    with pytest.raises(ValueError, match=r"instances_vg3k_val\.json: has 1 bad .*box_empty: 1"):
        DatasetCatalog.get("maskx_vg3k_val")


def test_a_coco_file_with_fewer_categories_is_an_error(vg_root):
    path = vg_root / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"] = content["categories"][-3:]
    path.write_text(json.dumps(content))
    register_all(vg_root)
    with pytest.raises(ValueError, match=r"instances_val2017\.json has 3 categories, .* the 80"):
        DatasetCatalog.get("maskx_coco_2017_val")


@pytest.fixture
def tool_evaluator(tmp_path, monkeypatch):
    """Make an evaluator as Detectron2's tools/train_net.py does, and its test loader before."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    kinds = {"coco": COCOEvaluator, "sem_seg": SemSegEvaluator}

    def make(name, **options):
        records = DatasetCatalog.get(name)
        kind = kinds[MetadataCatalog.get(name).evaluator_type]
        evaluator = kind(name, output_dir=str(tmp_path / "inference"), **options)
        evaluator.reset()
        return evaluator, records

    return make


@pytest.mark.parametrize(
    ("keys", "strict"),
    [({"iscrowd": 0, "area": 300}, True), ({}, True), ({"iscrowd": None, "area": None}, False)],
)
def test_detectron2s_own_tool_evaluates_a_data_set(
    write_coco, tool_evaluator, tmp_path, keys, strict
):
    rle = encode_masks(np.ones((1, 40, 60), bool))[0]
    whole = {"category_id": 10, "bbox": [0, 0, 60, 40], "segmentation": rle, **keys}
    half_bad = {**GOOD, "segmentation": [*GOOD["segmentation"], [1, 1, 2, 2]]}
    path, root = write_coco([(GOOD if strict else half_bad) | keys, whole])
    written = path.read_bytes()
    register_coco("farm", path, root, strict=strict)
    evaluator, (record,) = tool_evaluator("farm", use_fast_impl=False)
    found = Instances((record["height"], record["width"]))
    boxes = [annotation["bbox"] for annotation in record["annotations"]]
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    found.scores, found.pred_classes = torch.ones(2), torch.tensor([3, 0])
    masks = [decode_segmentation(a["segmentation"], 40, 60) for a in record["annotations"]]
    found.pred_masks = torch.from_numpy(np.stack(masks))
    evaluator.process([{"image_id": record["image_id"]}], [{"instances": found}])
    results = evaluator.evaluate()
    for task in ("bbox", "segm"):
        assert results[task]["AP-yak"] == results[task]["AP-cat"] == pytest.approx(100)
    # The file is as it was, the copy elsewhere; one that lacks nothing is read as it is.
    assert path.read_bytes() == written
    assert MetadataCatalog.get("farm").json_file == str(path)
    copies = list((tmp_path / "cache").rglob("*.json"))
    assert len(copies) == (not keys.get("area"))


def test_detectron2s_own_tool_evaluates_label_maps(write_coco, tool_evaluator, tmp_path):
    truth = np.zeros((40, 60), np.uint8)
    truth[5:20, 5:20], truth[30:] = 3, 255
    write_label_map(tmp_path / "1.png", truth, num_classes=4)
    path, root = write_coco([])
    content = json.loads(path.read_text())
    content["images"][0] |= {"label_map_file_name": "1.png"}
    path.write_text(json.dumps(content))
    register_coco("fields", path, root)
    evaluator, (record,) = tool_evaluator("fields", distributed=False)
    predicted = torch.nn.functional.one_hot(torch.from_numpy(truth % 255).long(), 5)
    evaluator.process([record], [{"sem_seg": predicted.permute(2, 0, 1)}])
    results = evaluator.evaluate()["sem_seg"]
    assert results["mIoU"] == results["IoU-owl"] == results["IoU-background"] == 100


def test_what_detectron2s_own_tool_cannot_evaluate_has_a_type_of_its_own(
    write_coco, tool_evaluator, tmp_path
):
    """A mask AP of boxes would be wrong, or end in a traceback; their box AP can be asked for."""
    path, root = write_coco([GOOD, {**GOOD, "segmentation": None}])
    register_coco("boxes", path, root)
    register_coco("part", path, root, class_names=["ant", "cat", "dog", "owl", "yak"])
    (tmp_path / "tags.jsonl").write_text('{"file_name": "1.png", "tags": ["cat"]}')
    register_tag_list("tags", tmp_path / "tags.jsonl", root)
    for name in ("boxes", "part", "tags"):
        remedy = r"^.maskx \(let build_evaluator return maskx\.detectron2\.MaskXCOCOEvaluator\("
        with pytest.raises(KeyError, match=remedy):
            tool_evaluator(name)
    register_coco("boxes", path, root)  # again, which changes nothing
    assert MetadataCatalog.get("boxes").evaluator_type.startswith("maskx")
    evaluator = COCOEvaluator("boxes", ("bbox",), output_dir=str(tmp_path), use_fast_impl=False)
    evaluator.reset()
    found = Instances((40, 60), pred_boxes=Boxes(torch.tensor([[1.0, 2, 31, 22]] * 2)))
    found.scores, found.pred_classes = torch.ones(2), torch.tensor([3, 3])
    evaluator.process([{"image_id": 7}], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP-yak"] == pytest.approx(100)


def test_the_visualizer_draws_a_green_and_b_red(make_cfg, tiny_train, tmp_path):
    names = MetadataCatalog.get(tiny_train).thing_classes
    for with_masks in (names[1:], names[:1]):  # the last configuration counts
        (tmp_path / "split.txt").write_text("\n".join(with_masks))
        register_from_config(make_cfg("DATASETS.MASKX.SPLIT", str(tmp_path / "split.txt")))
    found = Instances((64, 64))
    found.pred_classes = torch.tensor([0, 1])
    found.pred_masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    found.pred_masks[0, :, :20], found.pred_masks[1, :, 44:] = True, True
    drawn = Visualizer(
        np.zeros((64, 64, 3), np.uint8),
        MetadataCatalog.get(tiny_train),
        instance_mode=ColorMode.SEGMENTATION,
    ).draw_instance_predictions(found)
    picture = drawn.get_image()
    left, right = (np.median(picture[:, part], axis=(0, 1)) for part in (slice(20), slice(44, 64)))
    assert left[1] > left[0] + 40  # in A
    assert right[0] > right[1] + 40
