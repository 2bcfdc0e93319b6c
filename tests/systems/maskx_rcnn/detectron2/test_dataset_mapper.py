import copy
import logging
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from pycocotools import mask as mask_utils

from maskx.detectron2 import MaskXDatasetMapper

HEIGHT, WIDTH = 40, 60


def make_mapper(*augmentations, **changes):
    arguments = {
        "is_train": True,
        "augmentations": list(augmentations),
        "image_format": "BGR",
        "use_instance_mask": True,
    }
    return MaskXDatasetMapper(**(arguments | changes))


@pytest.fixture
def make_record(tmp_path):
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), np.zeros((HEIGHT, WIDTH, 3), np.uint8))

    def make(*annotations):
        """Give each annotation the box (10, 10, 40, 30) and its position as class."""
        defaults = {"bbox": [10.0, 10.0, 40.0, 30.0], "bbox_mode": BoxMode.XYXY_ABS}
        return {
            "file_name": str(path),
            "image_id": 7,
            "height": HEIGHT,
            "width": WIDTH,
            "annotations": [
                {"id": 100 + k, "category_id": k, **defaults, **a}
                for k, a in enumerate(annotations)
            ],
        }

    return make


def polygon(x0=10.0, y0=10.0, x1=40.0, y1=30.0):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def bitmap(x0=10, y0=10, x1=40, y1=30):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def rle(**box):
    return mask_utils.encode(np.asfortranarray(bitmap(**box)))


def uncompressed_rle(**box):
    column_major = bitmap(**box).ravel(order="F")
    changes = np.flatnonzero(np.diff(column_major)) + 1
    runs = np.diff([0, *changes, column_major.size]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": runs}


FORMS = {
    "polygon": polygon,
    "rle": rle,
    "uncompressed rle": uncompressed_rle,
    "array": bitmap,
}


@pytest.mark.parametrize("first", ["masked", "box-only"])
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_all_forms_stand_in_one_image(make_record, first, mask_format):
    """Trap: Detectron2's annotations_to_instances looks at the first annotation only."""
    annotations = [{"segmentation": make()} for make in FORMS.values()]
    box_only = [{}, {"segmentation": []}, {"segmentation": None}]
    annotations = annotations + box_only if first == "masked" else box_only + annotations
    instances = make_mapper(instance_mask_format=mask_format)(make_record(*annotations))[
        "instances"
    ]

    has_mask = [
        bool(a.get("segmentation") is not None and len(a["segmentation"])) for a in annotations
    ]
    assert instances.gt_has_mask.dtype == torch.bool
    assert instances.gt_has_mask.tolist() == has_mask
    assert instances.gt_classes.tolist() == list(range(7))
    assert instances.gt_boxes.tensor.tolist() == [[10, 10, 40, 30]] * 7
    assert isinstance(instances.gt_masks, BitMasks)
    for mask, is_there in zip(instances.gt_masks, has_mask, strict=True):
        expected = bitmap().astype(bool) if is_there else np.zeros((HEIGHT, WIDTH), bool)
        assert np.array_equal(mask.numpy(), expected)


def test_polygons_stay_polygons_beside_boxes(make_record):
    record = make_record(
        {}, {"segmentation": polygon()}, {"segmentation": [np.array(polygon()[0])]}
    )
    instances = make_mapper()(record)["instances"]
    assert isinstance(instances.gt_masks, PolygonMasks)
    assert [[p.tolist() for p in i] for i in instances.gt_masks] == [[], polygon(), polygon()]
    as_bitmaps = make_mapper(instance_mask_format="bitmask")(record)["instances"]
    assert isinstance(as_bitmaps.gt_masks, BitMasks)
    assert as_bitmaps.gt_masks.tensor.sum(dim=(1, 2)).tolist() == [0, 600, 600]


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("count", [0, 3])
def test_images_without_masks_have_all_fields(make_record, count, mask_format):
    record = make_record(*[{}] * count)
    instances = make_mapper(instance_mask_format=mask_format)(record)["instances"]
    assert len(instances) == count
    expected = {"gt_boxes", "gt_classes", "gt_masks", "gt_has_mask", "gt_mask_weight"}
    assert set(instances.get_fields()) == expected
    assert isinstance(instances.gt_masks, BitMasks if mask_format == "bitmask" else PolygonMasks)
    assert not instances.gt_has_mask.any()


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("with_masks", [True, False])
def test_incomplete_boxes_are_marked(make_record, count, with_masks):
    mapper = make_mapper(use_instance_mask=with_masks)
    record = make_record(*[{"segmentation": polygon()}] * count)
    for complete in (record, record | {"boxes_complete": True}):
        assert not mapper(complete)["instances"].has("gt_boxes_complete")
    marked = mapper(record | {"boxes_complete": False})["instances"].gt_boxes_complete
    assert marked.dtype == torch.bool
    assert marked.tolist() == [False] * count


def test_the_mark_follows_the_boxes_that_are_left(make_record):
    record = make_record({}, {"bbox": [0.0, 0.0, 5.0, 5.0]}) | {"boxes_complete": False}
    instances = make_mapper(T.CropTransform(8, 8, 40, 30, WIDTH, HEIGHT))(record)["instances"]
    assert instances.gt_boxes_complete.tolist() == [False]


TRANSFORMS = {
    "flip": T.HFlipTransform(WIDTH),
    "vertical flip": T.VFlipTransform(HEIGHT),
    "resize": T.ResizeTransform(HEIGHT, WIDTH, 80, 90),
    "crop": T.CropTransform(5, 8, 30, 25, WIDTH, HEIGHT),
    "rotation": T.RotationTransform(HEIGHT, WIDTH, 90),
    "padding": T.PadTransform(3, 4, 5, 6, WIDTH, HEIGHT, seg_pad_value=255),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_masks_and_boxes_move_with_the_image(make_record, name, form, monkeypatch):
    monkeypatch.setitem(sys.modules, "shapely", None)  # fvcore crops polygons with it
    transform = TRANSFORMS[name]
    record = make_record({"segmentation": FORMS[form]()}, {})
    cv2.imwrite(record["file_name"], np.repeat(bitmap()[:, :, None], 3, axis=2) * 255)
    sample = make_mapper(transform)(record)
    image, instances = sample["image"], sample["instances"]
    assert instances.gt_has_mask.tolist() == [True, False]
    bright = image[0] > 127
    mask = instances.gt_masks
    if isinstance(mask, PolygonMasks):
        mask = BitMasks.from_polygon_masks(mask, *bright.shape)
    union = (mask.tensor[0] | bright).sum()
    assert (mask.tensor[0] & bright).sum() > 0.95 * union
    rows, columns = torch.nonzero(bright, as_tuple=True)
    tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    for box in instances.gt_boxes.tensor:
        torch.testing.assert_close(box, torch.tensor(tight).float(), rtol=0, atol=1.01)


def test_a_crop_clips_the_boxes_of_all_instances_alike(make_record):
    """Traps: with a crop Detectron2 makes all boxes from masks; box-only ones would vanish."""
    upper = {"segmentation": polygon(y1=15.0)}
    record = make_record(upper, {}, upper, {"segmentation": rle(x0=10, y0=10, x1=20, y1=30)})
    crop = T.CropTransform(5, 5, 40, 30, WIDTH, HEIGHT)
    instances = make_mapper(crop, classes_with_masks=(0, 1, 3))(record)["instances"]
    assert instances.gt_has_mask.tolist() == [True, False, False, True]
    assert instances.gt_boxes.tensor.tolist() == [[5, 5, 35, 25]] * 4
    with pytest.raises(ValueError, match=r"those of the others not\. Set recompute_boxes=False"):
        make_mapper(crop, recompute_boxes=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_that_is_cropped_away_leaves_its_box(make_record, form, caplog):
    """Trap: filter_empty_instances drops an instance with an empty mask by default."""
    mapper = make_mapper(T.CropTransform(25, 5, 20, 30, WIDTH, HEIGHT))
    record = make_record({"segmentation": FORMS[form](x0=10, y0=10, x1=20, y1=30)})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            instances = mapper(record)["instances"]
            assert instances.gt_boxes.tensor.tolist() == [[0, 5, 15, 25]]
            assert instances.gt_has_mask.tolist() == [False]
    assert mapper.lost_masks == {"left_image": 3}
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("maskx.")]
    assert "Annotation 100 of image 7" in message


def test_a_polygon_that_is_rotated_out_leaves_its_box(make_record):
    record = make_record({"segmentation": polygon(0, 0, 3, 3), "bbox": [0.0, 0.0, 60.0, 40.0]})
    mapper = make_mapper(T.RotationTransform(HEIGHT, WIDTH, 45, expand=False))
    instances = mapper(record)["instances"]
    assert instances.gt_has_mask.tolist() == [False]
    assert mapper.lost_masks == {"left_image": 1}


def test_what_is_left_out_is_what_detectron2_leaves_out(make_record):
    record = make_record({"iscrowd": 1, "segmentation": rle()}, {}, {"bbox": [0.0, 0.0, 5.0, 5.0]})
    instances = make_mapper(T.CropTransform(8, 8, 40, 30, WIDTH, HEIGHT))(record)["instances"]
    assert instances.gt_classes.tolist() == [1]  # 0 is a crowd, the box of 2 is outside


BAD_MASKS = {
    "polygon of 2 points": ([[1.0, 1.0, 2.0, 2.0]], "polygon_malformed"),
    "polygon with NaN": ([[1.0, 1.0, 9.0, 1.0, float("nan"), 9.0]], "polygon_malformed"),
    "one bad polygon of two": ([*polygon(), [1.0, 2.0, 3.0]], "polygon_malformed"),
    "polygon outside": (polygon(x1=200.0), "polygon_outside"),
    "RLE of another size": ({"size": [4, 4], "counts": [0, 16]}, "rle_size"),
    "RLE without foreground": (rle(x0=5, x1=5), "mask_empty"),
    "array of another size": (np.ones((4, 4), np.uint8), "array_size"),
    "empty array": (bitmap(x0=5, x1=5), "mask_empty"),
    "text": ("mask", "mask_malformed"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_bad_mask_leaves_its_box_and_is_counted(make_record, name, caplog):
    segmentation, kind = BAD_MASKS[name]
    record = make_record({"segmentation": segmentation}, {"segmentation": polygon()})
    mapper = make_mapper()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            instances = mapper(record)["instances"]
            assert instances.gt_has_mask.tolist() == [False, True]
    assert mapper.lost_masks == {kind: 2}
    assert len([r for r in caplog.records if r.name.startswith("maskx.")]) == 1
    assert "Annotation 100 of image 7" in caplog.text
    assert record["file_name"] in caplog.text


def test_withheld_masks_are_not_even_read(make_record):
    record = make_record({"segmentation": "no mask at all"}, {"segmentation": polygon()})
    mapper = make_mapper(classes_with_masks=(1,))
    instances = mapper(record)["instances"]
    assert instances.gt_has_mask.tolist() == [False, True]
    assert not mapper.lost_masks


def test_a_record_without_ids_is_taken(make_record):
    """Detectron2's own data sets have no annotation ids."""
    record = make_record({"segmentation": [[1.0, 2.0]]})
    del record["image_id"], record["annotations"][0]["id"]
    mapper = make_mapper()
    mapper(record)
    assert mapper.lost_masks == {"polygon_malformed": 1}


def test_the_record_is_not_changed(make_record):
    record = make_record({"segmentation": polygon()}, {"segmentation": rle()})
    before = copy.deepcopy(record)
    make_mapper(T.HFlipTransform(WIDTH))(record)
    assert record == before


def test_stuff_maps_are_not_read(make_record):
    sample = make_mapper()(make_record({}) | {"sem_seg_file_name": "missing.png"})
    assert "sem_seg" not in sample


def test_keypoints_are_there_for_a_model_that_takes_them(make_record):
    points = [20.0, 15.0, 2, 30.0, 25.0, 1]
    record = make_record({"keypoints": points, "segmentation": polygon()}, {"keypoints": points})
    assert not make_mapper()(record)["instances"].has("gt_keypoints")
    flip = T.HFlipTransform(WIDTH)
    mapper = make_mapper(flip, use_keypoint=True, keypoint_hflip_indices=np.array([1, 0]))
    instances = mapper(record)["instances"]
    assert instances.gt_keypoints.tensor.tolist() == [[[30, 25, 1], [40, 15, 2]]] * 2
    assert instances.gt_has_mask.tolist() == [True, False]


def test_without_masks_in_the_model_there_are_none_in_the_data(make_cfg, make_record, tiny_train):
    cfg = make_cfg("MODEL.MASK_ON", False, "DATASETS.MASKX.SPLIT", "no such split")
    instances = MaskXDatasetMapper(cfg, is_train=True)(make_record({"segmentation": polygon()}))
    assert set(instances["instances"].get_fields()) == {"gt_boxes", "gt_classes"}


def test_configuration(make_cfg, tiny_train):
    cfg = make_cfg("INPUT.CROP.ENABLED", True, "INPUT.MASK_FORMAT", "bitmask")
    mapper = MaskXDatasetMapper(cfg, is_train=True)
    assert mapper.classes_with_masks == {0, 2}
    assert not mapper.recompute_boxes
    assert mapper.instance_mask_format == "bitmask"
    assert MaskXDatasetMapper(cfg, is_train=False).classes_with_masks is None


def test_masks_that_nobody_drew_weigh_by_their_quality_in_every_category(make_record):
    made = {"segmentation_source": "grabcut", "segmentation_quality": 0.4}
    record = make_record(
        {"segmentation": polygon()},
        {"segmentation": polygon()},
        {"segmentation": polygon(), **made},
        {},
    )
    mapper = make_mapper(classes_with_masks=[0])
    instances = mapper(record)["instances"]
    assert instances.gt_has_mask.tolist() == [True, False, True, False]
    torch.testing.assert_close(instances.gt_mask_weight, torch.tensor([1.0, 0.0, 0.4, 0.0]))
    alike = make_mapper(pseudo_weight="one")(record)["instances"]
    assert alike.gt_mask_weight.tolist() == [1.0, 1.0, 1.0, 0.0]


def test_the_weight_of_masks_that_nobody_drew_is_in_the_configuration(make_cfg, tiny_train):
    cfg = make_cfg(
        "DATASETS.TRAIN",
        (tiny_train,),
        "DATASETS.MASKX.SPLIT",
        "all",
        "MODEL.MASKX.PSEUDO_WEIGHT",
        "one",
    )
    assert MaskXDatasetMapper(cfg, is_train=True).pseudo_weight == "one"
    with pytest.raises(ValueError, match=r"PSEUDO_WEIGHT.*quality.*'half'"):
        make_mapper(pseudo_weight="half")
