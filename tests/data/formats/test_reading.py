"""Files as other tools write them, by hand."""

import base64
import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskx.data.coco import load_coco
from maskx.data.formats.label_studio import decode_brush, encode_brush
from maskx.data.formats.table import as_coco, check_annotations, read_dataset
from maskx.data.label_maps import semantic_label_map, write_label_map
from maskx.data.masks import decode_segmentation
from maskx.data.vocabularies import VOC_CLASSES

MASK = np.array([[0, 1, 1], [1, 0, 1]], bool)  # rows 2 to 3, columns 3 to 5 of the image


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (10, 8), (90, 90, 90)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def objects(dataset):
    """(category, box, area of the mask) of each object, by image."""
    names = {c["id"]: c["name"] for c in dataset.content["categories"]}
    found = {}
    for image in dataset.content["images"]:
        found[image["file_name"]] = [
            (
                names[a["category_id"]],
                [round(float(number), 3) for number in a["bbox"]],
                int(decode_segmentation(a["segmentation"], 8, 10).sum())
                if a.get("segmentation")
                else None,
            )
            for a in dataset.content["annotations"]
            if a["image_id"] == image["id"]
        ]
    return found


def tags(dataset):
    names = {c["id"]: c["name"] for c in dataset.content["categories"]}
    images = dataset.content["images"]
    return {i["file_name"]: [names[t] for t in i.get("image_labels", ())] for i in images}


def cvat(image, head="<meta><task><labels><label><name>ring</name></label></labels></task></meta>"):
    size = 'width="10" height="8"'
    return (
        f'<?xml version="1.0"?><annotations><version>1.1</version>{head}'
        f'<image id="0" name="a.png" {size}>{image}</image>'
        f'<image id="1" name="b.png" {size}></image></annotations>'
    )


def test_cvat_for_images(folder):
    box = '<box label="moon" xtl="1" ytl="2" xbr="4.5" ybr="6" occluded="0"/>'
    part = '<polygon label="ring" points="{}" group_id="3"/>'
    parts = part.format("1,1;3,1;3,3;1,3") + part.format("5.0,5.0;7,5;7,7;5,7")
    mask = '<mask label="disc" rle="1, 3, 1, 1" left="3" top="2" width="3" height="2"/>'
    file = folder / "task.xml"
    file.write_text(cvat(f'{box}{parts}{mask}<tag label="moon"/><tag label="crescent"/>'))
    dataset = read_dataset(file, folder / "images")
    assert objects(dataset) == {
        "a.png": [
            ("moon", [1, 2, 3.5, 4], None),
            ("ring", [1, 1, 6, 6], 8),
            ("disc", [3, 2, 3, 2], 4),
        ],
        "b.png": [],
    }
    assert tags(dataset)["a.png"] == ["moon", "crescent"]
    assert dataset.content["categories"][0]["name"] == "ring"
    rle = dataset.content["annotations"][2]["segmentation"]
    assert (decode_segmentation(rle, 8, 10)[2:4, 3:6] == MASK).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (cvat('<polyline label="ring" points="1,1;2,2"/>'), "has a polyline of the label 'ring'"),
        (cvat('<polygon label="ring" points="1,1;2"/>'), "has a polygon of the label 'ring'"),
        (cvat('<box label="ring" xtl="1" ytl="1" xbr="3" ybr="3" rotation="30"/>'), "has a box"),
        (cvat('<mask label="ring" rle="1, 9" left="0" top="0" width="2" height="2"/>'), "a mask"),
        (cvat("", '<track id="0" label="ring"/>'), "1 tracks of a video"),
        (cvat("<image"), "is not valid XML"),
        (cvat('<mask label="r" rle="0,4" left="8" top="9" width="2" height="2"/>'), "has a mask"),
        (cvat("").replace('height="8"', 'height="-8"', 1), "image 'a.png' has no size"),
    ],
)
def test_what_cvat_writes_beside_is_named(folder, text, words):
    file = folder / "task.xml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"task\.xml.*{words}"):
        read_dataset(file)
    _, report, _ = check_annotations(file)
    assert sum(report.problems.values()) == 1


def yolo(folder, names="names: [ring, moon]", **files):
    (folder / "data.yaml").write_text(f"path: /home/me/data\ntrain: images\nval: images\n{names}\n")
    (folder / "labels").mkdir()
    for name, text in files.items():
        (folder / "labels" / f"{name}.txt").write_text(text)


@pytest.mark.parametrize("names", ["names: [ring, moon]", "names:\n  0: ring\n  1: moon"])
def test_yolo_boxes_and_polygons(folder, names):
    yolo(folder, names, a="1 0.5 0.5 0.4 0.5\n\n0 .1 .125 .3 .125 .3 .375 .1 .375\n")
    expected = {"a.png": [("moon", [3, 2, 4, 4], None), ("ring", [1, 1, 2, 2], 4)], "b.png": []}
    for path in (folder, folder / "data.yaml"):
        assert objects(read_dataset(path)) == expected
        assert objects(read_dataset(path, folder / "images")) == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("2 .5 .5 .1 .1", "line 1 is '2 .5 .5 .1 .1'. Allowed: a class from 0 to 1"),
        ("ring .5 .5 .1 .1", "line 1 is 'ring"),
        ("0 .5 .5 .1", "line 1 has 3 numbers"),
        ("0 .5 .5 .1 .1 .2 .2 .3", "line 1 has 7 numbers"),
        ("0 nan .5 .1 .1 .2 .2", "line 1 has 6 numbers"),
    ],
)
def test_lines_that_are_none_of_yolo(folder, line, words):
    yolo(folder, a=line, b="0 .5 .5 .1 .1")
    with pytest.raises(ValueError, match=words):
        read_dataset(folder)
    data, report, _ = check_annotations(folder)
    assert report.problems.total() == 1
    assert sum(len(record["annotations"]) for record in data.records) == 1


def test_yolo_without_labels_or_names_is_refused(folder):
    yolo(folder)
    with pytest.raises(ValueError, match=r"none of 2 images in .*images has labels in .*labels"):
        read_dataset(folder)
    twice = "names: [ring]\nnames: [moon]"
    for names in ("", "names: []", "names: {1: ring}", "names: [", twice, "names: [ring, ring]"):
        (folder / "data.yaml").write_text(names)
        with pytest.raises(ValueError, match=r"data\.yaml"):
            read_dataset(folder)


def labelme(folder, shapes, flags=None, name="a"):
    content = {"version": "5.0.1", "flags": flags or {}, "shapes": shapes, "imageData": None}
    content |= {"imagePath": f"images\\{name}.png", "imageHeight": None, "imageWidth": None}
    (folder / f"{name}.json").write_text(json.dumps(content))


def shape(label, kind, points, **more):
    return {"label": label, "shape_type": kind, "points": points, "group_id": None, **more}


def test_labelme(folder):
    shapes = [
        shape("ring", "polygon", [[1, 1], [3, 1], [3, 3], [1, 3]], group_id=4),
        shape("ring", "polygon", [[5, 5], [7, 5], [7, 7], [5, 7]], group_id=4),
        shape("moon", "rectangle", [[4, 6], [1, 2]], description="bright"),
        shape("disc", "mask", [[3, 2], [5, 3]], mask=png_text(MASK)),
        shape("disc", "circle", [[5, 4], [5, 6]], flags={"crowd": True}),
    ]
    labelme(folder, shapes, {"crescent": True, "moon": False, "verified": True})
    (folder / "labels.txt").write_text("__ignore__\n_background_\ncrescent\nring\n")
    dataset = read_dataset(folder)
    (found,) = objects(dataset).values()
    assert found[:3] == [
        ("ring", [1, 1, 6, 6], 8),
        ("moon", [1, 2, 3, 4], None),
        ("disc", [3, 2, 3, 2], 4),
    ]
    assert found[3][2] == pytest.approx(np.pi * 4, abs=2)
    annotations = dataset.content["annotations"]
    assert [a["iscrowd"] for a in annotations] == [0, 0, 0, 1]
    assert annotations[1]["description"] == "bright"
    assert tags(dataset) == {"images/a.png": ["crescent"]}
    assert [c["name"] for c in dataset.content["categories"]][:2] == ["crescent", "ring"]
    assert objects(read_dataset(folder / "a.json")) == objects(dataset)


def png_text(mask):
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PIXELS = png_text(np.ones((3, 3), bool))


def test_masks_of_labelme_over_the_edge_are_cut_there(folder):
    labelme(folder, [shape("ring", "mask", [[-1, -2], [1, 0]], mask=PIXELS)])
    assert list(objects(read_dataset(folder)).values()) == [[("ring", [0, 0, 2, 1], 2)]]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (shape("ring", "line", [[1, 1], [2, 2]]), "has a 'line' of 2 points"),
        (shape("ring", "polygon", [[1, 1], [2, 2]]), "has a 'polygon' of 2 points"),
        (shape("ring", "polygon", [[float("nan"), 1], [5, 1], [5, 5]]), "of 0 points"),
        (shape("ring", "mask", [[1, 1], [2, 2]], mask="!!"), "has a 'mask'"),
        (shape("ring", "mask", [[90, 90], [92, 92]], mask=PIXELS), "has a 'mask'"),
        ({"points": []}, r"shapes\[1\] has no label"),
        (7, r"shapes\[1\] has no label"),
    ],
)
def test_shapes_of_labelme_that_are_no_objects(folder, bad, words):
    labelme(folder, [shape("ring", "rectangle", [[1, 1], [3, 3]]), bad])
    with pytest.raises(ValueError, match=words):
        read_dataset(folder)
    data, report, _ = check_annotations(folder, folder)
    assert report.problems == {"labelme_shape": 1}
    assert len(data.records[0]["annotations"]) == 1


# What Label Studio's own converter packs of an image of 2 x 3 pixels, of which the mask is on.
BRUSH = [0, 0, 0, 24, 57, 27, 252, 96, 22, 255, 227, 0, 143, 252]


def test_brushes_are_those_of_label_studio():
    assert (decode_brush(BRUSH, 2, 3) == MASK).all()
    rng = np.random.default_rng(0)
    for size in ((1, 1), (7, 5), (300, 400)):
        for mask in (rng.random(size) < 0.5, np.zeros(size, bool), np.ones(size, bool)):
            assert (decode_brush(encode_brush(mask), *size) == mask).all()
    with pytest.raises(ValueError, match="24 numbers, but its image has 3 x 3"):
        decode_brush(BRUSH, 3, 3)


def result(kind, value, **more):
    size = {"original_width": 10, "original_height": 8}
    return {"type": kind, "from_name": "x", "to_name": "image", "value": value, **size, **more}


def test_label_studio(folder):
    rectangle = {"x": 10, "y": 25, "width": 30, "height": 50, "rotation": 0}
    points = [[10, 12.5], [30, 12.5], [30, 37.5], [10, 37.5]]
    brush = encode_brush(np.pad(MASK, ((2, 4), (3, 4))))
    results = [
        result("rectanglelabels", {**rectangle, "rectanglelabels": ["moon"]}),
        result("polygonlabels", {"points": points, "polygonlabels": ["ring"]}),
        result("brushlabels", {"format": "rle", "rle": brush, "brushlabels": ["disc"]}),
        result("choices", {"choices": ["crescent"]}),
    ]
    tasks = [
        {"id": 1, "data": {"image": "/data/local-files/?d=my%20a.png"}}
        | {"annotations": [{"was_cancelled": True, "result": []}, {"result": results}]},
        {"id": 2, "data": {"photo": "b.png"}, "annotations": []}
        | {"predictions": [{"result": results[:1]}]},
    ]
    file = folder / "export.json"
    file.write_text(json.dumps(tasks))
    dataset = read_dataset(file, folder / "images")
    assert objects(dataset) == {
        "my a.png": [
            ("moon", [1, 2, 3, 4], None),
            ("ring", [1, 1, 2, 2], 4),
            ("disc", [3, 2, 3, 2], 4),
        ],
        "b.png": [("moon", [1, 2, 3, 4], None)],
    }
    assert tags(dataset)["my a.png"] == ["crescent"]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"data": {}}, "task 0 has no image"),
        ({"data": {"image": "a.png"}, "annotations": ["x"]}, "has 'x' in 'annotations'"),
        *(
            ({"data": {"image": "a.png"}, "annotations": [{"result": [result(*bad)]}]}, words)
            for bad, words in (
                (("rectanglelabels", {"y": 1, "rectanglelabels": ["m"]}), "not whole"),
                (("rectanglelabels", {"rectanglelabels": [3]}), r"with the labels \[3\]"),
                (("polygonlabels", {"points": [[1, 2], [3]], "polygonlabels": ["m"]}), "not whole"),
                (("brushlabels", {"rle": [0, 0, 1, 64, 57], "brushlabels": ["m"]}), "not whole"),
                (("brushlabels", {"rle": "x", "brushlabels": ["m"]}), "not whole"),
                (("choices", {"choices": "cat"}), "type 'choices'"),
            )
        ),
        ({"data": {"image": "c.png"}, "id": 7}, "task 7 says no size of its image c.png"),
        (
            {
                "data": {"image": "a.png"},
                "annotations": [{"result": [result("keypointlabels", {})]}],
            },
            "type 'keypointlabels'",
        ),
    ],
)
def test_tasks_of_label_studio_that_cannot_be_used(folder, task, words):
    file = folder / "export.json"
    file.write_text(json.dumps([task]))
    with pytest.raises(ValueError, match=words):
        read_dataset(file, folder / "images")
    _, report, _ = check_annotations(file, folder / "images")
    assert any(kind.startswith("label_studio") for kind in report.problems)


def voc(folder, *found, name="a"):
    (folder / "Annotations").mkdir(exist_ok=True)
    text = "<annotation><filename>{}.png</filename>{}</annotation>"
    (folder / "Annotations" / f"{name}.xml").write_text(text.format(name, "".join(found)))


def voc_object(name, box=(2, 3, 4, 6), difficult=0):
    keys = ("xmin", "ymin", "xmax", "ymax")
    inner = "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, box, strict=True))
    head = f"<name>{name}</name><difficult>{difficult}</difficult>"
    return f"<object>{head}<bndbox>{inner}</bndbox></object>"


def test_voc(folder):
    (folder / "images").rename(folder / "JPEGImages")
    voc(folder, voc_object("moon"), voc_object("ring", difficult=1))
    voc(folder, voc_object("disc"), name="b")
    numbers = np.full((8, 10), 255, np.uint8)
    numbers[2:6, 1:4] = 1
    (folder / "SegmentationObject").mkdir()
    Image.fromarray(numbers).save(folder / "SegmentationObject" / "a.png")
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "crescent_train.txt").write_text("a -1\nb  1\n")
    dataset = read_dataset(folder)
    assert objects(dataset) == {
        "a.png": [("moon", [1, 2, 3, 4], 12), ("ring", [1, 2, 3, 4], None)],
        "b.png": [("disc", [1, 2, 3, 4], None)],
    }
    assert [a["iscrowd"] for a in dataset.content["annotations"]] == [0, 1, 0]
    assert tags(dataset)["b.png"] == ["crescent"]


def class_maps(folder, **labels):
    """SegmentationClass files by stem, with VOC's palette."""
    (folder / "SegmentationClass").mkdir()
    for stem, values in labels.items():
        path = folder / "SegmentationClass" / f"{stem}.png"
        write_label_map(path, np.asarray(values), num_classes=20)


def test_label_maps_of_voc_are_read_where_there_is_nothing_else(folder):
    (folder / "images").rename(folder / "JPEGImages")
    labels = np.zeros((8, 10), np.uint8)
    labels[2:6, 1:4], labels[7] = 15, 255
    class_maps(folder, a=labels, b=labels.T[:8, :8].repeat(2, 1)[:, :10])
    _, report, _ = check_annotations(folder)
    assert not report.problems
    file, root = as_coco(folder, None, folder / "deep" / "made.json")
    data = load_coco(file, root)
    assert data.class_names == VOC_CLASSES
    record = data.records[0]
    assert record["file_name"].endswith("a.png")
    assert (semantic_label_map(record, 20) == labels).all()


def test_label_maps_of_voc_are_kept_where_they_say_more_than_the_objects(folder):
    numbers = np.zeros((8, 10), np.uint8)
    numbers[2:6, 1:4] = 1
    voc(folder, voc_object("person"))
    voc(folder, voc_object("person"), name="b")
    (folder / "SegmentationObject").mkdir()
    border = 15 * numbers
    border[2] = 255
    class_maps(folder, a=15 * numbers, b=border)
    for stem in "ab":
        Image.fromarray(numbers).save(folder / "SegmentationObject" / f"{stem}.png")
    images = read_dataset(folder, folder / "images").content["images"]
    assert [image.get("label_map_file_name") for image in images] == [
        None,
        "SegmentationClass/b.png",
    ]


def test_label_maps_of_voc_that_cannot_be_used_are_named(folder):
    voc(folder, voc_object("my own"))
    class_maps(folder, a=np.zeros((8, 10), np.uint8))
    with pytest.raises(
        ValueError, match=r"a\.png has labels of classes that nothing names\. Add lab"
    ):
        read_dataset(folder, folder / "images")
    (folder / "labelmap.txt").write_text("background:0,0,0::\nmy own:128,0,0::\n")
    assert read_dataset(folder, folder / "images").content["images"][0]["label_map_file_name"]
    (folder / "SegmentationObject").mkdir()
    numbers = folder / "SegmentationObject" / "a.png"
    for content, words in (
        (b"no PNG", r"map of objects .*a\.png cannot be read\. Restore it, or .*--skip-bad"),
        (np.zeros((8, 10, 3), np.uint8), r"shape \(8, 10, 3\), .*not colours"),
    ):
        if isinstance(content, bytes):
            numbers.write_bytes(content)
        else:
            Image.fromarray(content).save(numbers)
        with pytest.raises(ValueError, match=words):
            read_dataset(folder, folder / "images")
    Image.fromarray(np.zeros((8, 10), np.uint8)).save(numbers)
    Image.new("RGB", (10, 8)).save(folder / "SegmentationClass" / "a.png")
    with pytest.raises(
        ValueError, match=r"label map .*a\.png cannot be used: .* is a colour image"
    ):
        read_dataset(folder, folder / "images")
    (image,) = read_dataset(folder, folder / "images", strict=False).content["images"]
    assert "label_map_file_name" not in image


@pytest.mark.parametrize("size", ["nan", "inf", "-3", "0", "wide"])
def test_sizes_of_voc_that_are_none_come_from_the_image(folder, size):
    voc(folder, f"<size><width>{size}</width><height>8</height></size>", voc_object("moon"))
    (image,) = read_dataset(folder, folder / "images").content["images"]
    assert (image["height"], image["width"]) == (8, 10)


def test_objects_of_voc_without_a_box_are_named(folder):
    voc(folder, "<object><name>ring</name></object>", voc_object("moon"))
    with pytest.raises(ValueError, match=r"a\.xml, object 1 lacks its name or bndbox"):
        read_dataset(folder, folder / "images")
    data, report, _ = check_annotations(folder, folder / "images")
    assert report.problems == {"voc_object": 1}
    assert len(data.records[0]["annotations"]) == 1


def two_without_sizes(folder, name):
    """Annotations of a.png and b.png in a format, which say nothing of their sizes."""
    if name == "yolo":
        yolo(folder, a="1 0.5 0.5 0.4 0.5", b="1 0.5 0.5 0.4 0.5")
        return folder
    if name == "labelme":
        for image in "ab":
            labelme(folder, [shape("moon", "rectangle", [[3, 2], [7, 6]])], name=image)
        return folder
    if name == "voc":
        for image in "ab":
            voc(folder, voc_object("moon", (4, 3, 7, 6)), name=image)
        return folder
    box = {"x": 30, "y": 25, "width": 40, "height": 50, "rectanglelabels": ["moon"]}
    results = [{"type": "rectanglelabels", "value": box}]
    tasks = [
        {"data": {"image": f"{n}.png"}, "annotations": [{"result": results}]} for n in ("a", "b")
    ]
    (folder / "export.json").write_text(json.dumps(tasks))
    return folder / "export.json"


@pytest.mark.parametrize("name", ["yolo", "labelme", "voc", "label-studio"])
def test_images_whose_size_cannot_be_read_are_named_or_left_out(folder, name):
    path = two_without_sizes(folder, name)
    root = folder if name == "labelme" else folder / "images"
    broken = folder / "images" / "a.png"
    good = broken.read_bytes()
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image .*a\.png cannot be read\. Restore .*--skip-bad"):
        read_dataset(path, root)
    dataset = read_dataset(path, root, strict=False)
    (found,) = objects(dataset).values()
    assert found == [("moon", [3, 2, 4, 4], None)]
    assert dataset.lost_files == {str(broken): "cannot be read"}
    data, report, _ = check_annotations(path, root)
    assert report.problems == {"image_broken": 1}
    assert len(data.records) == 1
    (folder / "images" / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image that can be read: .*a\.png cannot be read; "):
        read_dataset(path, root, strict=False)
    broken.write_bytes(good)
    assert len(read_dataset(path, root, strict=False).content["images"]) == 1


@pytest.mark.parametrize("name", ["labelme", "voc"])
def test_images_of_no_size_that_are_missing_are_named(folder, name):
    path = two_without_sizes(folder, name)
    root = folder if name == "labelme" else folder / "images"
    (folder / "images" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"b\.png does not exist\. Check the folder of the images"):
        read_dataset(path, root)
    assert len(read_dataset(path, root, strict=False).content["images"]) == 1


def test_training_gets_a_coco_file_of_any_format(folder, caplog):
    yolo(folder, a="1 0.5 0.5 0.4 0.5\n1 0.5 0.5 2 2\n")
    with pytest.raises(ValueError, match="box_outside: 1"):
        as_coco(folder, folder / "images", folder / "made.json")
    made, root = as_coco(folder, folder / "images", folder / "made.json", strict=False)
    assert any("1 left out" in message for message in caplog.messages)
    caplog.set_level(logging.ERROR)
    data = load_coco(made, root)
    assert data.class_names == ("ring", "moon")
    assert [len(record["annotations"]) for record in data.records] == [1, 0]
    assert as_coco(made, "images", folder / "other.json") == (made, Path("images"))
    assert not (folder / "other.json").exists()


def test_what_is_of_no_format_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such file or folder\. Give"):
        read_dataset(folder / "nowhere")
    with pytest.raises(ValueError, match=r"images: is of no format that can be read\. Give a COCO"):
        read_dataset(folder / "images")
