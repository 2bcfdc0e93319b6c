import json
import logging
from array import array

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from maskx.data.coco import (
    OUTSIDE_TOLERANCE,
    AnnotationProblem,
    check_coco_structure,
    load_coco,
    read_box,
    read_coco_json,
    read_mask,
)

HEIGHT, WIDTH = 10, 20
TRIANGLE = [2, 1, 8, 1, 2, 7]


def make_annotation(annotation_id=1, image_id=1, category_id=3, bbox=(2, 1, 6, 6), **keys):
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(bbox),
    } | keys


def make_image(image_id=1, **keys):
    return {"id": image_id, "file_name": f"{image_id}.jpg", "height": HEIGHT, "width": WIDTH} | keys


def make_dataset(annotations=(), images=None):
    return {
        "images": [make_image()] if images is None else images,
        "annotations": list(annotations),
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


@pytest.fixture
def load(tmp_path):
    """Writes a data set and its image files, and loads it."""

    def write_and_load(dataset, **kwargs):
        json_file = tmp_path / "toy.json"
        json_file.write_text(json.dumps(dataset))
        for image in dataset["images"]:
            Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / image["file_name"])
        return load_coco(json_file, tmp_path, **kwargs)

    return write_and_load


def random_mask(rng, height=HEIGHT, width=WIDTH):
    return np.asfortranarray(rng.random((height, width)) < rng.random(), dtype=np.uint8)


def uncompressed(mask):
    """RLE with a list of counts, by definition: column-major runs, background first."""
    flat = mask.reshape(-1, order="F")
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    counts = np.diff(np.concatenate([[0], changes, [flat.size]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}


# --- records


def test_mixed_masks_and_boxes(load, tmp_path):
    crowd = uncompressed(np.eye(HEIGHT, WIDTH, dtype=np.uint8))
    data = load(
        make_dataset(
            [
                make_annotation(11, segmentation=[TRIANGLE]),
                make_annotation(12, category_id=7),
                make_annotation(13, segmentation=[]),
                make_annotation(14, segmentation=None),
                make_annotation(15, segmentation=crowd, iscrowd=1),
            ]
        )
    )
    assert data.json_file == tmp_path / "toy.json"
    assert data.class_names == ("cat", "dog")
    assert data.category_ids == (3, 7)
    assert not data.problems
    (record,) = data.records
    assert record["file_name"] == str(tmp_path / "1.jpg")
    assert (record["height"], record["width"], record["image_id"]) == (HEIGHT, WIDTH, 1)
    assert record["supervision"] == "mask"
    assert type(record["supervision"]) is str
    assert record["image_labels"] == [0, 1]
    polygon, dog, empty, null, rle = record["annotations"]
    box = [2.0, 1.0, 8.0, 7.0]
    assert polygon == {
        "id": 11,
        "bbox": box,
        "class_index": 0,
        "iscrowd": 0,
        "segmentation": [array("d", TRIANGLE)],
    }
    assert dog == {"id": 12, "bbox": box, "class_index": 1, "iscrowd": 0}
    assert "segmentation" not in empty
    assert "segmentation" not in null
    assert rle["iscrowd"] == 1
    assert np.array_equal(mask_utils.decode(rle["segmentation"]), np.eye(HEIGHT, WIDTH))


def test_supervision_is_the_highest_level_of_the_record(load):
    images = [
        make_image(1),
        make_image(2),
        make_image(3, image_labels=[7, 3, 7]),
        make_image(4),
        make_image(5, image_labels=[]),
        make_image(6, image_labels=[7]),
    ]
    annotations = [
        make_annotation(1, 1),
        make_annotation(2, 1, segmentation=[TRIANGLE]),
        make_annotation(3, 2),
        make_annotation(4, 6),
    ]
    records = load(make_dataset(annotations, images)).records
    levels = ["mask", "box", "image", "box", "image", "box"]
    assert [record["supervision"] for record in records] == levels
    assert [record["image_labels"] for record in records] == [[0], [0], [0, 1], [], [], [0, 1]]


def test_records_keep_the_order_of_the_file(load):
    records = load(make_dataset(images=[make_image(5), make_image(2), make_image(9)])).records
    assert [record["image_id"] for record in records] == [5, 2, 9]


def test_stuff_file_is_passed_on_from_the_folder_of_the_json(load, tmp_path):
    (tmp_path / "stuff.png").touch()
    images = [make_image(1, stuff_file_name="stuff.png"), make_image(2)]
    first, second = load(make_dataset(images=images)).records
    assert first["sem_seg_file_name"] == str(tmp_path / "stuff.png")
    assert "sem_seg_file_name" not in second


def test_label_map_is_passed_on_and_is_the_supervision_of_a_mask(load, tmp_path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "1.png").touch()
    images = [make_image(n, label_map_file_name="maps/1.png") for n in (1, 2)] + [make_image(3)]
    images[1]["image_labels"] = [3]
    first, second, third = load(make_dataset(images=images)).records
    assert first["label_map_file_name"] == str(tmp_path / "maps" / "1.png")
    assert "label_map_file_name" not in third
    assert [r["supervision"] for r in (first, second, third)] == ["mask", "mask", "box"]
    (tmp_path / "maps" / "1.png").unlink()
    message = (
        r"2 of 5 files named do not exist, .*maps.1\.png\. .*for label maps, the folder of the"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load(make_dataset(images=images))


def test_annotations_keep_the_order_of_the_file(load):
    # Every third has a box over the edge, which is read by itself and mended.
    over = (15, 1, 6.5, 6)
    rows = [
        make_annotation(n, image_id=1 + n % 2, bbox=(2, 1, 6, 6) if n % 3 else over)
        for n in range(1, 13)
    ]
    data = load(make_dataset(rows, [make_image(1), make_image(2), make_image(3)]), strict=False)
    assert data.problems == {"box_outside": 4}
    found = [[annotation["id"] for annotation in r["annotations"]] for r in data.records]
    assert found == [[2, 4, 6, 8, 10, 12], [1, 3, 5, 7, 9, 11], []]


@pytest.mark.parametrize("key", ["iscrowd", "area", "segmentation"])
@pytest.mark.parametrize("keys", [{}, {"iscrowd": None, "area": None, "segmentation": []}])
def test_keys_that_not_every_annotation_has_are_known(load, key, keys):
    full = {"iscrowd": 0, "area": 18, "segmentation": [TRIANGLE]}
    rest = {k: v for k, v in full.items() if k != key} | {k: keys[k] for k in keys if k == key}
    some = [make_annotation(1, **full), make_annotation(2, **rest)]
    assert load(make_dataset(some)).lacking == {key}
    assert load(make_dataset(some[:1])).lacking == frozenset()


def test_byte_order_mark_is_accepted(tmp_path):
    file = tmp_path / "bom.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(make_dataset()).encode())
    assert read_coco_json(file) == make_dataset()


# --- boxes


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([0, 0, WIDTH, HEIGHT], [0.0, 0.0, 20.0, 10.0]),
        ([1.5, 2.25, 3, 4], [1.5, 2.25, 4.5, 6.25]),
        ([-OUTSIDE_TOLERANCE, -0.5, 5, 5], [0.0, 0.0, 4.0, 4.5]),
        ([15, 5, 5 + OUTSIDE_TOLERANCE, 5.5], [15.0, 5.0, 20.0, 10.0]),
    ],
)
def test_boxes_become_corners_inside_the_image(bbox, expected):
    assert read_box(bbox, HEIGHT, WIDTH) == expected


@pytest.mark.parametrize(
    ("bbox", "kind", "message"),
    [
        (None, "box_missing", r"bbox is None; allowed: 4 finite numbers"),
        ([], "box_missing", r"bbox is \[\]; allowed: 4 finite numbers"),
        ([1, 2, 3], "box_malformed", r"bbox is \[1, 2, 3\]"),
        ([1, 2, 3, "4"], "box_malformed", "4 finite numbers"),
        ([1, 2, 3, None], "box_malformed", "4 finite numbers"),
        ([1, 2, float("nan"), 4], "box_malformed", "nan"),
        ([1, 2, float("inf"), 4], "box_malformed", "inf"),
        ([float("inf"), float("-inf"), 4, 4], "box_malformed", "inf"),
        ([1, 2, 10**400, 4], "box_malformed", "4 finite numbers"),
        ([1, 2, 0, 4], "box_empty", "width and height above 0"),
        ([1, 2, 3, -4], "box_empty", "width and height above 0"),
        ([-1.1, 2, 3, 4], "box_outside", r"leaves its image; allowed: inside 20x10"),
        ([1, -1.1, 3, 4], "box_outside", "1 pixel over at most"),
        ([18, 2, 3.1, 4], "box_outside", "inside 20x10"),
        ([1, 8, 3, 3.1], "box_outside", "inside 20x10"),
        ([20.2, 2, 0.5, 4], "box_outside", "inside 20x10"),  # within tolerance, but nothing left
    ],
)
def test_bad_boxes_are_named(bbox, kind, message):
    with pytest.raises(AnnotationProblem, match=message) as error:
        read_box(bbox, HEIGHT, WIDTH)
    assert error.value.kind == kind


# --- masks


def test_compressed_and_uncompressed_rle_agree():
    rng = np.random.default_rng(0)
    for size in [(1, 1), (7, 3), (HEIGHT, WIDTH), (300, 201)]:
        for _ in range(20):
            mask = random_mask(rng, *size)
            mask[0, 0] = 1
            rle = mask_utils.encode(mask)
            from_list = read_mask(uncompressed(mask), *size)
            assert from_list["counts"] == rle["counts"].decode()
            assert read_mask(rle, *size) == rle
            text = {"size": list(size), "counts": rle["counts"].decode()}
            assert np.array_equal(mask_utils.decode(read_mask(text, *size)), mask)


def test_large_runs():
    size = (4000, 5000)
    mask = np.zeros(size, dtype=np.uint8, order="F")
    mask[:, 1] = mask[2:, 4000] = 1
    rle = mask_utils.encode(mask)
    assert read_mask(rle, *size) == rle


def test_numbers_of_rle_strings_have_at_most_seven_digits():
    # 100 is 4 + 3 * 32: two digits of 5 bits, the first says (32) that another follows.
    def rle(second):
        digits = [4 + 32, 3, *second]
        return {"size": [HEIGHT, WIDTH], "counts": bytes(digit + 48 for digit in digits)}

    assert read_mask(rle([4 + 32, 3]), HEIGHT, WIDTH)
    padded = rle([4 + 32, 3 + 32, *[32] * 10, 0])  # shifts beyond 64 bits
    with pytest.raises(AnnotationProblem, match="cannot be decoded"):
        read_mask(padded, HEIGHT, WIDTH)


def test_broken_rle_strings_are_refused_and_never_reach_pycocotools():
    rng = np.random.default_rng(1)
    counts = mask_utils.encode(random_mask(rng))["counts"]
    broken = [b"", counts[:-1], counts[1:], counts + b"1", b"\x10" + counts, b"~" + counts]
    broken += [b"o" * 30, counts[:-1] + b"o", None, 5, [], [[1]], ["a"], [0.5], [-1, 201], [[1], 2]]
    broken += ["\N{SNOWMAN}", [200, 2**70]]
    for bad in broken:
        with pytest.raises(AnnotationProblem, match="non-negative runs over all 200") as error:
            read_mask({"size": [HEIGHT, WIDTH], "counts": bad}, HEIGHT, WIDTH)
        assert error.value.kind == "rle_malformed"


@pytest.mark.parametrize(
    ("segmentation", "kind", "message"),
    [
        ([[1, 1, 5, 5]], "polygon_malformed", "polygon of 4 coordinates.*at least 3 points"),
        ([[1, 1, 5, 5, 1, 5, 3]], "polygon_malformed", "polygon of 7 coordinates"),
        ([TRIANGLE, []], "polygon_malformed", "polygon of 0 coordinates"),
        (TRIANGLE, "polygon_malformed", r"polygon of 2; allowed: a list \[x, y"),
        ([[*TRIANGLE, 1, None]], "polygon_malformed", "something that is no number"),
        ([[*TRIANGLE, 1, "5"]], "polygon_malformed", "something that is no number"),
        ([[*TRIANGLE, 1, float("nan")]], "polygon_malformed", "NaN"),
        ([TRIANGLE, [*TRIANGLE, 21.5, 3]], "polygon_outside", r"to \(21.5, 7\).*inside 20x10"),
        ([[*TRIANGLE, -1.5, 3]], "polygon_outside", r"from \(-1.5, 1\)"),
        ([[*TRIANGLE, 3, 11.5]], "polygon_outside", "1 pixel over at most"),
        ({"size": [20, 10], "counts": [200]}, "rle_size", r"\[20, 10\].*\[10, 20\]"),
        ({"counts": [200]}, "rle_size", "RLE has size None"),
        ({"size": [10, 20], "counts": [100]}, "rle_malformed", "cover 100 pixels.*all 200"),
        ({"size": [10, 20]}, "rle_malformed", "cannot be decoded"),
        ({"size": [10, 20], "counts": [200]}, "mask_empty", "no foreground"),
        ("abc", "mask_malformed", "segmentation is a str.*list of polygons"),
    ],
)
def test_bad_masks_are_named(segmentation, kind, message):
    with pytest.raises(AnnotationProblem, match=message) as error:
        read_mask(segmentation, HEIGHT, WIDTH)
    assert error.value.kind == kind


def test_polygons_are_passed_on_as_they_are():
    polygons = [TRIANGLE, [-OUTSIDE_TOLERANCE, 0, 5, HEIGHT + OUTSIDE_TOLERANCE, 3, 3]]
    assert read_mask(polygons, HEIGHT, WIDTH) is polygons


# --- strict or not

BAD_BOX = make_annotation(1, bbox=(3, 3, -2, 2))
BAD_MASK = make_annotation(2, category_id=7, segmentation=[[*TRIANGLE, 5], [1, 2, 3, 4]])


def test_strict_names_file_annotation_image_category_and_remedy(load):
    with pytest.raises(ValueError, match=r"toy\.json") as error:
        load(make_dataset([BAD_BOX, BAD_MASK, make_annotation(3)]))
    message = str(error.value)
    assert "has 2 bad annotations (box_empty: 1, polygon_malformed: 1)" in message
    assert "annotation 1 of image 1, category 'cat': bbox is [3, 3, -2, 2]; allowed:" in message
    assert "annotation 2 of image 1, category 'dog': segmentation has a polygon of 7" in message
    assert "strict=False (--skip-bad, DATASETS.MASKX.STRICT False)" in message
    assert "takes what can be used: 1 left out, 1 without their mask" in message
    assert "more" not in message


def test_strict_quotes_five_problems_and_counts_the_rest(load):
    bad = [make_annotation(number, bbox=(1, 1, 0, 0)) for number in range(1, 8)]
    with pytest.raises(ValueError, match="has 7 bad annotations") as error:
        load(make_dataset(bad))
    assert str(error.value).count("annotation ") == 5
    assert "annotation 6" not in str(error.value)
    assert "and 2 more" in str(error.value)


def test_not_strict_drops_and_counts(load, caplog):
    with caplog.at_level(logging.WARNING):
        data = load(make_dataset([BAD_BOX, BAD_MASK, make_annotation(3)]), strict=False)
    assert data.problems == {"box_empty": 1, "polygon_malformed": 1}
    (record,) = data.records
    assert [annotation["id"] for annotation in record["annotations"]] == [2, 3]
    # A polygon of 7 numbers cannot be trusted: the mask as a whole is gone.
    assert all("segmentation" not in annotation for annotation in record["annotations"])
    assert record["supervision"] == "box"
    (message,) = caplog.messages
    assert "toy.json: 2 bad entries (box_empty: 1, polygon_malformed: 1)" in message
    assert "1 left out, 1 without their mask" in message


def test_image_without_any_good_box_is_no_negative(load):
    (record,) = load(make_dataset([BAD_BOX]), strict=False).records
    assert record["annotations"] == []
    assert record["supervision"] == "image"
    assert record["image_labels"] == [0]


def test_nothing_is_logged_about_a_good_file(load, caplog):
    load(make_dataset([make_annotation()]), strict=False)
    assert not caplog.records


# --- whole-file errors


def changed(path, value):
    """The toy data set with one entry replaced, or removed if the value is None."""
    dataset = make_dataset([make_annotation(1)], [make_image(1), make_image(2)])
    *parents, last = path
    target = dataset
    for key in parents:
        target = target[key]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return dataset


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["images"], None, r"lacks the list 'images' \(it has \['annotations', 'categories'\]\)"),
        (["annotations"], {}, r"lacks the list 'annotations' \(it is no list\)"),
        (["categories"], None, "needs the lists 'images', 'annotations' and 'categories'"),
        (["images", 1], 5, r"images\[1\] is 5. Allowed: a dict"),
        (["images", 0, "height"], None, r"images\[0\] \(id 1\) lacks the key 'height'"),
        (["images", 0, "height"], 0, "image 1 has height 0. Allowed: a positive whole number"),
        (["images", 1, "width"], -3, "image 2 has width -3"),
        (["images", 1, "width"], 2.5, "image 2 has width 2.5"),
        (["images", 1, "width"], "20", "image 2 has width '20'"),
        (["images", 1, "width"], float("nan"), "image 2 has width nan"),
        (["images", 1, "id"], 1, r"images repeat the id 1 \(1 are not unique\)"),
        (["images", 1, "id"], [1], r"images have the id \[1\]. Allowed: integer or string"),
        (["images", 1, "image_labels"], [3, 9], r"image 2 has image_labels \[3, 9\]. .*2 categor"),
        (["images", 1, "image_labels"], 3, "image 2 has image_labels 3. Allowed: a list of ids"),
        (["images", 0, "file_name"], None, "lacks the key 'file_name'"),
        (["images", 0, "stuff_file_name"], 4, "image 1 has stuff_file_name 4. Allowed: a path"),
        (["images", 0, "label_map_file_name"], 4, "image 1 has label_map_file_name 4. Allowed"),
        (["annotations", 0, "bbox"], None, r"annotation 1 of image 1, .*: bbox is None; allowed"),
        (["annotations", 0, "id"], None, r"annotations\[0\] \(id None\) lacks the key 'id'"),
        (
            ["annotations", 0, "image_id"],
            8,
            "annotation 1 has image_id 8, which is not in 'images'",
        ),
        (["annotations", 0, "image_id"], [1], r"annotation 1 has image_id \[1\]"),
        (
            ["annotations", 0, "category_id"],
            1,
            "category_id 1, which is not in 'categories'.*2 ids",
        ),
        (["annotations", 0, "iscrowd"], "no", "annotation 1 has iscrowd 'no'. Allowed: 0 or 1"),
        (["annotations", 0, "iscrowd"], 2, "annotation 1 has iscrowd 2. Allowed: 0 or 1"),
        (["categories", 0, "id"], 3, "categories repeat the id 3"),
        (["categories", 0, "id"], "seven", "has the category .*Allowed: an integer id"),
        (["categories", 0, "name"], "cat", "categories repeat the name 'cat'"),
        (["categories", 0, "name"], 4, "a string name"),
    ],
)
def test_file_that_does_not_fit_together(tmp_path, path, value, message):
    json_file = tmp_path / "toy.json"
    json_file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(ValueError, match=rf"(?s)toy\.json: .*{message}"):
        load_coco(json_file, tmp_path, check_images=False)


def test_repeated_annotation_ids():
    dataset = make_dataset([make_annotation(4), make_annotation(4)])
    with pytest.raises(ValueError, match=r"memory: annotations repeat the id 4 \(1 are not"):
        check_coco_structure(dataset, "memory")


def test_no_coco_dict():
    with pytest.raises(ValueError, match=r"results\.json: holds a list. Allowed is a COCO dict"):
        check_coco_structure([], "results.json")


def test_missing_annotation_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json: there is no such annotation file"):
        load_coco(tmp_path / "none.json", tmp_path)


def test_truncated_file(tmp_path):
    file = tmp_path / "cut.json"
    file.write_text(json.dumps(make_dataset([make_annotation()]), indent=1)[:200])
    with pytest.raises(ValueError, match=r"cut.json: is not valid JSON: .* at line \d+, column"):
        read_coco_json(file)
    with pytest.raises(ValueError, match="has 200 bytes; it does not end with '}': truncated"):
        read_coco_json(file)


def test_invalid_file_that_is_not_truncated(tmp_path):
    file = tmp_path / "bad.json"
    file.write_text('{"images": [1,,2]}')
    with pytest.raises(ValueError, match=r"line 1, column 15; the file has 18 bytes\. Down"):
        read_coco_json(file)


def test_packed_file(tmp_path):
    file = tmp_path / "packed.json"
    file.write_bytes(b"\x1f\x8b\x08\xff")
    with pytest.raises(ValueError, match=r"is not UTF-8 text .*unpacked"):
        read_coco_json(file)


def test_missing_images(tmp_path):
    json_file = tmp_path / "toy.json"
    json_file.write_text(json.dumps(make_dataset(images=[make_image(n) for n in (1, 2, 3)])))
    (tmp_path / "1.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"toy\.json: 2 of 3 files .*2\.jpg.*image root"):
        load_coco(json_file, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent: there is no such image folder.*3 images"):
        load_coco(json_file, tmp_path / "absent")
    assert len(load_coco(json_file, tmp_path / "absent", check_images=False).records) == 3


# --- real data


@pytest.mark.parametrize(("name", "count"), [("train2017", 2791), ("val2017", 1786)])
def test_official_coco_is_read_without_loss(shared_data, name, count):
    json_file = shared_data / "coco_mini" / "annotations" / f"instances_{name}.json"
    data = load_coco(json_file, shared_data / "coco_mini" / name)
    official = {entry["id"]: entry for entry in read_coco_json(json_file)["annotations"]}
    read = [annotation for record in data.records for annotation in record["annotations"]]
    assert len(read) == count == len(official)
    assert len(data.class_names) == 80
    for annotation in read:
        entry = official[annotation["id"]]
        x, y, width, height = entry["bbox"]
        # Nothing was clipped: official COCO does not use the tolerance.
        assert annotation["bbox"] == [x, y, x + width, y + height]
        assert data.category_ids[annotation["class_index"]] == entry["category_id"]
        if isinstance(entry["segmentation"], list):
            assert [list(p) for p in annotation["segmentation"]] == entry["segmentation"]
        else:
            area = sum(entry["segmentation"]["counts"][1::2])
            assert mask_utils.area(annotation["segmentation"]) == area


MADE = {"segmentation": [TRIANGLE], "segmentation_source": "grabcut"}


def test_masks_that_nobody_drew_say_where_they_come_from_and_how_good_they_are(load):
    drawn = make_annotation(1, segmentation=[TRIANGLE], segmentation_source=None)
    corrected = make_annotation(2, segmentation=[TRIANGLE], segmentation_quality=7)
    made = make_annotation(3, **MADE, segmentation_quality=1)
    (record,) = load(make_dataset([drawn, corrected, made])).records
    one, two, three = record["annotations"]
    for entry in (one, two):
        assert "segmentation" in entry
        assert not {"segmentation_source", "segmentation_quality"} & entry.keys()
    assert (three["segmentation_source"], three["segmentation_quality"]) == ("grabcut", 1.0)


@pytest.mark.parametrize("quality", [None, -0.01, 1.5, "0.5", True, float("nan")])
def test_a_mask_that_nobody_drew_without_a_quality_is_refused_or_left_out(load, quality):
    dataset = make_dataset([make_annotation(**MADE, segmentation_quality=quality)])
    with pytest.raises(ValueError, match=r"annotation 1 .*'grabcut'.*segmentation_quality.*0 to 1"):
        load(dataset)
    data = load(dataset, strict=False)
    assert data.problems == {"mask_quality": 1}
    assert "segmentation" not in data.records[0]["annotations"][0]
