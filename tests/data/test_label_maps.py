import json

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from maskx.data.coco import load_coco
from maskx.data.label_maps import (
    aligned_labels,
    ignore_label,
    label_map_of_instances,
    read_label_map,
    semantic_label_map,
    write_label_map,
)
from maskx.data.masks import encode_masks
from maskx.data.scenes.generator import generate_scenes
from maskx.data.vocabularies import COCO_THING_CLASSES, VOC_CLASSES, VOC_TO_COCO

VOC_COLOURS = {  # of the devkit's label map
    0: (0, 0, 0),
    1: (128, 0, 0),
    2: (0, 128, 0),
    3: (128, 128, 0),
    4: (0, 0, 128),
    7: (128, 128, 128),
    8: (64, 0, 0),
    15: (192, 128, 128),
    20: (0, 64, 128),
    255: (224, 224, 192),
}


def read(path, *, num_classes, size=(5, 7)):
    return read_label_map(path, *size, num_classes=num_classes, image_id=3)


def rectangle(x1, y1, x2, y2, size=(8, 10)):
    mask = np.zeros(size, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def make_object(class_index, box, *, mask=True, crowd=0, polygon=False):
    x1, y1, x2, y2 = box
    annotation = {"id": 9, "bbox": list(map(float, box)), "class_index": class_index}
    annotation["iscrowd"] = crowd
    if polygon:
        annotation["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    elif mask:
        (annotation["segmentation"],) = encode_masks(rectangle(*box)[None])
    return annotation


def make_record(*annotations, **keys):
    labels = sorted({annotation["class_index"] for annotation in annotations})
    return {
        "image_id": 3,
        "height": 8,
        "width": 10,
        "image_labels": labels,
        "annotations": list(annotations),
    } | keys


# --- files


@pytest.mark.parametrize(
    ("num_classes", "ignore", "dtype"),
    [(1, 255, np.uint8), (254, 255, np.uint8), (255, 65535, np.int32), (65534, 65535, np.int32)],
)
def test_what_is_written_is_read(tmp_path, num_classes, ignore, dtype):
    assert ignore_label(num_classes) == ignore
    values = np.random.default_rng(0).integers(0, num_classes + 1, (5, 7))
    values[0, :3] = 0, num_classes, ignore
    path = tmp_path / "karte_ä.png"
    write_label_map(path, values, num_classes=num_classes)
    found = read(path, num_classes=num_classes)
    assert found.dtype == dtype
    assert np.array_equal(found, values)
    assert found.flags.writeable
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@given(st.integers(1, 65534), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**16))
def test_writing_and_reading_are_inverse(tmp_path_factory, num_classes, height, width, seed):
    random = np.random.default_rng(seed)
    values = random.integers(0, num_classes + 1, (height, width))
    values[random.random(values.shape) < 0.2] = ignore_label(num_classes)
    path = tmp_path_factory.getbasetemp() / "inverse.png"
    write_label_map(path, values, num_classes=num_classes)
    assert np.array_equal(read(path, num_classes=num_classes, size=values.shape), values)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_label_map(path, np.ones((5, 7), int), num_classes=3)

    def save(self, file, **_):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt):
        write_label_map(path, np.zeros((5, 7), int), num_classes=3)
    assert (read(path, num_classes=3) == 1).all()


def test_people_see_the_colours_of_voc(tmp_path):
    path = tmp_path / "a.png"
    write_label_map(path, np.array([list(VOC_COLOURS)]), num_classes=20)
    colours = np.asarray(Image.open(path).convert("RGB"))[0]
    assert [tuple(colour) for colour in colours.tolist()] == list(VOC_COLOURS.values())


def test_a_palette_is_not_looked_at(tmp_path):
    values = np.random.default_rng(0).integers(0, 3, (5, 7), np.uint8)
    image = Image.fromarray(values)
    image.putpalette([10, 20, 30, 1, 1, 1, 2, 2, 2])  # so few colours are stored in 2 bits
    path = tmp_path / "a.png"
    image.save(path)
    assert path.read_bytes()[24] == 2
    assert np.array_equal(read(path, num_classes=3), values)


def test_grey_files_are_read(tmp_path):
    values = np.random.default_rng(0).integers(0, 4, (5, 7), np.uint8)
    cv2.imwrite(str(tmp_path / "8.png"), values)
    cv2.imwrite(str(tmp_path / "16.png"), values.astype(np.uint16) * 300)
    assert np.array_equal(read(tmp_path / "8.png", num_classes=3), values)
    assert np.array_equal(read(tmp_path / "16.png", num_classes=900), values * 300.0)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "a.png"
    start = r"^Label map '.*a\.png' \(image 3\)"
    with pytest.raises(FileNotFoundError, match=rf"{start}: there is no such file\. Check the fol"):
        read(path, num_classes=3)
    values = np.random.default_rng(0).integers(0, 4, (50, 70))
    write_label_map(path, values, num_classes=3)
    content = path.read_bytes()
    for end in (0, 10, 30, 100, len(content) - 50):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=rf"{start} cannot be read as PNG\. .*complete\?"):
            read(path, num_classes=3, size=(50, 70))
    path.write_bytes(content[:11] + bytes([5]) + content[12:])  # Pillow: ValueError
    with pytest.raises(ValueError, match=rf"{start} cannot be read as PNG"):
        read(path, num_classes=3, size=(50, 70))
    path.write_bytes(cv2.imencode(".jpg", np.zeros((5, 7), np.uint8))[1].tobytes())
    with pytest.raises(ValueError, match="other formats may change values"):
        read(path, num_classes=3)
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{start} is 70 x 50 pixels, its image is 7 x 5\. .*near"
    ):
        read(path, num_classes=3)


@pytest.mark.parametrize(
    ("pixels", "num_classes", "message"),
    [
        (np.zeros((5, 7, 3), np.uint8), 3, "colour image of 8 bits. Allowed for 3 classes: 8 bits"),
        (
            np.zeros((5, 7), np.uint16),
            254,
            "grey image of 16 bits. .* 254 classes: 8 bits, grey or",
        ),
        (np.zeros((5, 7), np.uint8), 255, "grey image of 8 bits. .* 255 classes: 16 bits, grey. W"),
        (np.zeros((5, 7), bool), 3, "grey image of 1 bits"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, pixels, num_classes, message):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"a\.png' \(image 3\) is a {message}"):
        read(tmp_path / "a.png", num_classes=num_classes)


@pytest.mark.parametrize(
    ("num_classes", "value", "ignore"), [(3, 4, 255), (300, 301, 65535), (300, 65534, 65535)]
)
def test_bad_values_are_named(tmp_path, num_classes, value, ignore):
    values = np.zeros((5, 7), int)
    values[2, 4:] = value
    message = (
        rf"has the value {value} at row 2, column 4 and in 3 pixels a value that is not allowed\. "
        rf"Allowed: 0 \(background\), 1 to {num_classes} \(class index \+ 1\), {ignore} \(ignore\)"
    )
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=rf"Label map for '.*a\.png' {message}"):
        write_label_map(path, values, num_classes=num_classes)
    assert not path.exists()
    write_label_map(path, values, num_classes=254 if num_classes == 3 else 65534)
    with pytest.raises(ValueError, match=rf"a\.png' \(image 3\) {message}"):
        read(path, num_classes=num_classes)


@pytest.mark.parametrize(
    "values",
    [np.zeros((5, 7)), np.zeros((1, 5, 7), int), np.ones((2, 2), bool), np.zeros((0, 3), int)],
)
def test_only_integer_maps_are_written(tmp_path, values):
    with pytest.raises(ValueError, match=r"a\.png' has shape \(.*\) and dtype .*Allowed: \(H, W\)"):
        write_label_map(tmp_path / "a.png", values, num_classes=3)


def test_negative_values_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has the value -1 at row 0, column 0"):
        write_label_map(tmp_path / "a.png", np.full((2, 2), -1), num_classes=3)


@pytest.mark.parametrize("num_classes", [0, 65535])
def test_the_number_of_classes_is_limited(num_classes):
    message = f"Label maps of {num_classes} classes .* Allowed: 1 to 65534"
    with pytest.raises(ValueError, match=message):
        ignore_label(num_classes)


# --- another class list


def test_labels_are_aligned_by_name():
    label_map = np.array([[0, 1, 2], [3, 255, 1]])
    found = aligned_labels(("cat", "dog", "owl"), ("owl", "cat", "dog"))[label_map]
    assert found.dtype == np.uint8
    assert found.tolist() == [[0, 2, 3], [1, 255, 2]]
    found = aligned_labels(("cat", "dog", "cat"), ("cat", "dog"))[label_map]
    assert found.tolist() == [[0, 1, 2], [1, 255, 1]]


def test_background_is_unknown_where_the_list_has_other_classes():
    large = [*map(str, range(299)), "owl"]
    labels = aligned_labels(("owl",), large)
    assert labels.dtype == np.int32
    assert labels[[0, 1, 255]].tolist() == [65535, 300, 65535]
    labels = aligned_labels(large, large)
    assert np.array_equal(labels[:301], np.arange(301))
    assert labels[65535] == 65535


def test_labels_of_voc_in_coco():
    labels = aligned_labels([*VOC_TO_COCO.values()], COCO_THING_CLASSES)
    assert labels[0] == labels[255] == 255
    assert labels[VOC_CLASSES.index("person") + 1] == COCO_THING_CLASSES.index("person") + 1
    assert labels[VOC_CLASSES.index("tvmonitor") + 1] == COCO_THING_CLASSES.index("tv") + 1
    with pytest.raises(
        ValueError, match=r"6 of the 20 .* 80 .*: aeroplane, diningtable, .* and more\. Add them"
    ):
        aligned_labels(VOC_CLASSES, COCO_THING_CLASSES)


# --- drawing


def test_small_objects_lie_on_top_whatever_the_order():
    large, small = make_object(0, (1, 1, 9, 7)), make_object(2, (3, 2, 6, 5), polygon=True)
    expected = rectangle(1, 1, 9, 7).astype(np.uint8)
    expected[2:5, 3:6] = 3
    for record in (make_record(large, small), make_record(small, large)):
        label_map = label_map_of_instances(record, 3)
        assert label_map.dtype == np.uint8
        assert np.array_equal(label_map, expected)


def test_objects_without_a_mask_and_crowds_are_ignored_where_nothing_else_is_drawn():
    record = make_record(
        make_object(0, (0, 0, 3, 3)),
        make_object(1, (2, 2, 6, 6), mask=False),
        make_object(1, (5, 5, 9, 8), crowd=1),
        make_object(2, (5, 5, 6, 6)),
    )
    expected = np.zeros((8, 10), int)
    expected[2:6, 2:6] = expected[5:8, 5:9] = 255
    expected[0:3, 0:3] = 1
    expected[5, 5] = 3
    assert np.array_equal(label_map_of_instances(record, 3), expected)


def test_every_pixel_that_a_box_touches_is_ignored():
    record = make_record({"id": 1, "bbox": [1.9, 0.5, 4.1, 1.2], "class_index": 0, "iscrowd": 0})
    assert np.array_equal(label_map_of_instances(record, 1) == 255, rectangle(1, 0, 5, 2))
    record["annotations"][0]["bbox"] = [-3.0, -2.5, 12.0, 1.0]
    assert np.array_equal(label_map_of_instances(record, 1) == 255, rectangle(0, 0, 10, 1))


def test_an_object_that_may_be_anywhere_leaves_no_background():
    masked = make_object(0, (1, 1, 4, 4))
    for keys in ({"image_labels": [0, 2]}, {"boxes_complete": False}):
        label_map = label_map_of_instances(make_record(masked, **keys), 300)
        assert label_map.dtype == np.int32
        assert np.array_equal(label_map, np.where(rectangle(1, 1, 4, 4), 1, 65535))
    assert not label_map_of_instances(make_record(), 3).any()


def test_a_class_index_outside_the_list_is_named():
    record = make_record(make_object(3, (1, 1, 4, 4)))
    with pytest.raises(
        ValueError, match=r"Annotation 9 of image 3 has class index 3\. Allowed: 0 to 2"
    ):
        label_map_of_instances(record, 3)


def test_scenes_are_drawn_as_they_were_made(tmp_path):
    """Masks of generated scenes are those of the visible parts, which do not overlap."""
    data = load_coco(
        generate_scenes(tmp_path, count=3, size=64, num_categories=8, seed=0), tmp_path
    )
    for record in data.records:
        stuff = cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_UNCHANGED)
        label_map = label_map_of_instances(record, 8)
        assert np.array_equal(label_map == 0, stuff > 0)
        assert sorted(set(np.unique(label_map)) - {0}) == [c + 1 for c in record["image_labels"]]


# --- records


def test_a_record_takes_its_file_before_its_objects(tmp_path):
    values = np.random.default_rng(0).integers(0, 4, (8, 10))
    write_label_map(tmp_path / "a.png", values, num_classes=3)
    record = make_record(make_object(0, (1, 1, 4, 4)))
    assert semantic_label_map(record, 3).sum() == 9
    record["label_map_file_name"] = str(tmp_path / "a.png")
    assert np.array_equal(semantic_label_map(record, 3), values)
    with pytest.raises(ValueError, match=r"a\.png' \(image 3\) has the value 3 at row"):
        semantic_label_map(record, 2)


def test_a_label_map_of_an_annotation_file_is_found(tmp_path):
    (tmp_path / "maps").mkdir()
    write_label_map(tmp_path / "maps" / "1.png", np.eye(5, 7, dtype=int) * 2, num_classes=2)
    content = {
        "images": [
            {"id": 3, "file_name": "1.jpg", "height": 5, "width": 7}
            | {"label_map_file_name": "maps/1.png"}
        ],
        "annotations": [],
        "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}],
    }
    (tmp_path / "toy.json").write_text(json.dumps(content))
    cv2.imwrite(str(tmp_path / "1.jpg"), np.zeros((5, 7, 3), np.uint8))
    data = load_coco(tmp_path / "toy.json", tmp_path)
    assert np.array_equal(semantic_label_map(data.records[0], 2), np.eye(5, 7) * 2)


# --- real data


def test_label_maps_of_photos(shared_data, tmp_path):
    """Clothing Co-Parsing says beside its label maps which classes are in each."""
    folder = shared_data / "ccp"
    num_classes = len(json.loads((folder / "classes.json").read_text())["classes"]) - 1
    found_in = json.loads((folder / "classes_in_masks.json").read_text())
    for name in sorted(found_in)[:20]:
        path = folder / "masks" / f"{name}.png"
        values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        label_map = read(path, num_classes=num_classes, size=values.shape)
        assert np.array_equal(label_map, values)
        assert np.unique(label_map).tolist() == found_in[name]
        write_label_map(tmp_path / "a.png", label_map, num_classes=num_classes)
        again = read(tmp_path / "a.png", num_classes=num_classes, size=values.shape)
        assert np.array_equal(again, values)


def test_label_maps_of_coco(shared_data):
    """Each pixel belongs to the smallest object over it; crowds count only where there is none."""
    folder = shared_data / "coco_mini"
    path = folder / "annotations" / "instances_val2017.json"
    truth = COCO(path)
    data = load_coco(path, folder / "val2017", check_images=False)
    for record in data.records[:30]:
        objects = truth.loadAnns(truth.getAnnIds(record["image_id"]))
        masks = np.array([truth.annToMask(a) for a in objects], bool)
        smallest = np.full((record["height"], record["width"]), np.inf)
        expected = np.zeros(smallest.shape, int)
        for annotation, mask in zip(objects, masks, strict=True):
            if annotation["iscrowd"]:
                expected[mask & np.isinf(smallest)] = 255
            else:
                above = mask & (mask.sum() <= smallest)
                smallest[above] = mask.sum()
                expected[above] = data.category_ids.index(annotation["category_id"]) + 1
        assert np.array_equal(label_map_of_instances(record, 80), expected)
