import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image
from pycocotools import mask as mask_utils

from maskx.data.coco import load_coco
from maskx.data.images import read_image
from maskx.data.prepare import open_images as open_images_module
from maskx.data.prepare.label_map_sets import oriented_size
from maskx.data.prepare.open_images import (
    OPEN_IMAGES_NAMES,
    prepare_open_images_boxes,
    prepare_open_images_tags,
    read_open_images_names,
)
from maskx.data.prepare.open_images_masks import prepare_open_images_masks
from maskx.data.tag_lists import read_tag_list
from maskx.data.vocabularies import COCO_THING_CLASSES

SCRIPT = Path(__file__).parents[3] / "datasets" / "prepare.py"
CAR, DOG, RED, COMPUTER_MOUSE, MOUSE = "/m/0k4j", "/m/0bt9lr", "/m/06fvc", "/m/020lf", "/m/04rmv"
A, B, C = "000060e3121c7305", "ffffffffffffffff", "0a00000000000001"
SIZES = {A: (30, 40), B: (25, 10), C: (8, 8)}  # height, width
BOX_HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,"
    "IsDepiction,IsInside"
)
BOXES = f"""{BOX_HEADER}
{A},xclick,{CAR},1,0.25,0.75,0.5,1,0,0,1,0,0
{A},activemil,{DOG},1,0,0.1,0.2,0.4,-1,-1,-1,-1,-1
{A},xclick,{DOG},1,0.3,0.3,0.2,0.4,0,0,0,0,0
{B},xclick,/m/unnamed,1,0,1,0,1,0,0,0,0,0
{C},xclick,{DOG},1,0.5,1,0.25,0.75,0,0,0,0,0
"""
LABELS = f"""ImageID,Source,LabelName,Confidence
{B},verification,{CAR},1
{A},crowdsource-verification,{DOG},1
{A},verification,{DOG},1
{A},verification,{RED},0
{A},verification,{CAR},1
{C},verification,{RED},1
{C},verification,/m/unnamed,1
"""
MACHINE = f"""ImageID,Source,LabelName,Confidence
{A},machine,{RED},0.9
{A},machine,{CAR},0.8
{B},machine,{DOG},0.5
{B},machine,{RED},0.7
"""


class Files:
    """The files of a miniature Open Images, by the names that its script expects."""

    def __init__(self, root):
        self.root = root
        self.output = root / "annotations"
        self.images = root / "validation"
        self.images.mkdir(parents=True)
        for image_id, (height, width) in SIZES.items():
            image = Image.fromarray(np.zeros((height, width, 3), np.uint8))
            image.save(self.images / f"{image_id}.jpg")
        (self.images / "notes.jpg").write_text("no image of the data set")
        self.labels = self.write("oidv7-val-annotations-human-imagelabels.csv", LABELS)
        self.machine = self.write("machine.csv", MACHINE)
        self.boxes = self.write("validation-annotations-bbox.csv", BOXES)
        rows = [f"{CAR},Automobile", f"{DOG},Dog", f"{RED},Red", f"{MOUSE},Mouse"]
        self.descriptions = self.write(
            "oidv7-class-descriptions.csv", "\n".join(["LabelName,DisplayName", *rows, ""])
        )
        self.boxable = self.write("class-descriptions-boxable.csv", f"{CAR},Car\n{DOG},Dog\n")
        self.names = {CAR: "car", DOG: "dog", RED: "red", MOUSE: "mouse (/m/04rmv)"}

    def write(self, name, text):
        path = self.root / name
        path.write_text(text, encoding="utf-8")
        return path

    def tags(self, labels=None, **kwargs):
        return prepare_open_images_tags(
            labels or [self.labels], self.names, self.output / "val_tags.jsonl", **kwargs
        )

    def read_tags(self):
        tags = read_tag_list(self.output / "val_tags.jsonl")
        return {
            image: [tags.names[i] for i in tags.tags_of(position)]
            for position, image in enumerate(tags.image_ids)
        }

    def prepare_boxes(self, **kwargs):
        return prepare_open_images_boxes(
            self.boxes,
            self.names,
            self.images,
            self.output / "val_boxes.json",
            sizes=self.output / "val_sizes.csv",
            **kwargs,
        )


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path / "open_images")


def test_verified_labels_become_tags(files):
    summary = files.tags()
    assert files.read_tags() == {
        f"{A}.jpg": ["car", "dog"],
        f"{C}.jpg": ["red"],
        f"{B}.jpg": ["car"],
    }
    assert list(files.read_tags()) == [f"{A}.jpg", f"{C}.jpg", f"{B}.jpg"]  # by id
    assert summary.num_images == 3
    assert summary.per_class == {"car": 2, "dog": 1, "red": 1}
    assert summary.left_out == {
        "labels that people denied": 1,
        "labels given twice, or denied in another row": 1,
        "labels of classes without a name": 1,
    }
    text = str(summary)
    assert "3 images with 4 tags of 3 classes." in text
    assert "Most tags: car (2)" in text
    assert "1 labels that people denied" in text


def test_machine_labels_count_above_a_confidence_unless_people_denied_them(files):
    summary = files.tags([files.labels, files.machine])
    assert files.read_tags()[f"{B}.jpg"] == ["car"]
    assert summary.left_out["machine labels of low confidence or not asked for"] == 4
    files.tags([files.machine, files.labels], min_machine_confidence=0.7)
    assert files.read_tags() == {
        f"{A}.jpg": ["car", "dog"],
        f"{C}.jpg": ["red"],
        f"{B}.jpg": ["car", "red"],
    }


def test_only_images_that_are_there(files):
    (files.images / f"{A}.jpg").unlink()
    (files.images / f"{B}.jpg").unlink()
    summary = files.tags(existing_images=files.images)
    assert files.read_tags() == {f"{C}.jpg": ["red"]}
    assert summary.left_out["images that are not there"] == 2


@pytest.mark.parametrize("seed", range(3))
def test_tags_are_those_of_a_slow_reading(files, seed):
    rng = random.Random(seed)
    ids = [f"{rng.getrandbits(64):016x}" for _ in range(8)]
    rows = [
        (rng.choice(ids), source, rng.choice(list(files.names)), confidence)
        for source, confidence in rng.choices(
            [
                ("verification", "1"),
                ("verification", "1.0"),
                ("verification", "0"),
                ("machine", "0.8"),
                ("machine", "0.4"),
            ],
            k=60,
        )
    ]
    expected = {}
    for image in sorted(ids):
        of_image = [row for row in rows if row[0] == image]
        denied = {row[2] for row in of_image if row[1:2] + row[3:] == ("verification", "0")}
        given = {row[2] for row in of_image if float(row[3]) >= 0.6}
        if given - denied:
            expected[f"{image}.jpg"] = sorted(files.names[label] for label in given - denied)
    path = files.write("rows.csv", "")
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("ImageID", "Source", "LabelName", "Confidence"), *rows])
    summary = files.tags([path], min_machine_confidence=0.6)
    assert files.read_tags() == expected
    assert summary.per_class.total() == sum(map(len, expected.values()))
    assert summary.per_class.total() + summary.left_out.total() == len(rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{A},verification,{CAR},0.5", "line 2 has the source 'verification' and the confidence"),
        (f"{A},machine,{CAR},high", "the confidence 'high'. Allowed: 0 or 1, or between"),
        (f"{A}.jpg,verification,{CAR},1", "line 2 has the image id '000060e3121c7305.jpg'"),
        (f"{A},verification,{CAR}", "line 2 has fewer fields than its header"),
        (f"{A},verification,{CAR},0", "no tag is left. 1 labels that people denied. Give the ver"),
    ],
)
def test_bad_labels_are_named(files, row, message):
    path = files.write("bad.csv", f"ImageID,Source,LabelName,Confidence\n{row}\n")
    with pytest.raises(ValueError, match=r"bad\.csv.*") as error:
        files.tags([path])
    assert message in str(error.value)
    assert not (files.output / "val_tags.jsonl").exists()


def test_bad_arguments_of_tags_are_named(files):
    with pytest.raises(ValueError, match=r"min_machine_confidence is 2\. Allowed: above 0, up"):
        files.tags(min_machine_confidence=2)
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder of images"):
        files.tags(existing_images=files.root / "nowhere")
    with pytest.raises(ValueError, match="lacks the column ImageID, Source"):
        files.tags([files.descriptions])


def test_boxes_become_a_coco_file(files):
    summary = files.prepare_boxes()
    data = load_coco(files.output / "val_boxes.json", files.images)
    assert data.class_names == ("car", "dog")
    content = json.loads((files.output / "val_boxes.json").read_text())
    assert [c["label"] for c in content["categories"]] == [CAR, DOG]
    first, second = data.records
    assert (first["height"], first["width"]) == SIZES[A]
    assert Path(second["file_name"]) == files.images / f"{C}.jpg"
    assert [(a["bbox"], a["class_index"], a["iscrowd"]) for a in first["annotations"]] == [
        ([10.0, 15.0, 30.0, 30.0], 0, 1),
        ([0.0, 6.0, 4.0, 12.0], 1, 0),
    ]
    assert [a["bbox"] for a in second["annotations"]] == [[4.0, 2.0, 8.0, 6.0]]
    assert first["supervision"] == "box"
    assert summary.num_images == 2
    assert summary.per_class == {"dog": 2, "car": 1}
    assert summary.left_out == {
        "boxes without width or height": 1,
        "boxes of classes without a name": 1,
        "images without a usable box": 1,
    }


@pytest.mark.parametrize("orientation", range(1, 10))  # 9 is not allowed and turns nothing
def test_boxes_are_turned_with_their_image(files, orientation):
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[6:12, 4:20] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for image_id in SIZES:
        Image.fromarray(pixels).save(files.images / f"{image_id}.jpg", exif=exif, quality=100)
    files.boxes.write_text(f"{BOX_HEADER}\n{A},xclick,{DOG},1,0.1,0.5,0.25,0.5,0,0,0,0,0\n")
    files.prepare_boxes()
    for _ in range(2):  # from the images, from the file of sizes
        files.prepare_boxes()
        (record,) = load_coco(files.output / "val_boxes.json", files.images).records
        image = read_image(record["file_name"], record["height"], record["width"], A)
        left, top, width, height = cv2.boundingRect((image[:, :, 0] > 127).astype(np.uint8))
        (annotation,) = record["annotations"]
        assert annotation["bbox"] == [left, top, left + width, top + height]


def test_the_size_of_an_image_is_that_of_its_readers(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    damaged = exif.tobytes()[:8] + b"xx"
    xmp = b"<x:xmpmeta><rdf:Description tiff:Orientation='6' tiff:Orientation=\"6\"/></x:xmpmeta>"
    for name, options in (
        ("a.png", {"exif": exif}),
        ("a.webp", {"exif": exif}),
        ("a.tiff", {"exif": exif}),
        ("damaged.jpg", {"exif": damaged}),
        ("no.jpg", {"exif": b"Exif\0\0no tags"}),
        ("xmp.jpg", {"xmp": xmp}),
    ):
        Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(tmp_path / name, **options)
        height, width, _ = oriented_size(tmp_path / name)
        assert read_image(tmp_path / name, height, width, name).shape == (height, width, 3)


def test_sizes_are_read_once(files):
    files.prepare_boxes()
    before = (files.output / "val_boxes.json").read_text()
    assert set((files.output / "val_sizes.csv").read_text().splitlines()) == {
        "ImageID,Width,Height,Orientation",
        *(f"{image},{width},{height},1" for image, (height, width) in SIZES.items()),
    }
    for image in files.images.iterdir():
        image.unlink()
    files.images.rmdir()
    files.prepare_boxes()
    assert (files.output / "val_boxes.json").read_text() == before


def test_sizes_that_were_read_are_kept_when_the_run_is_interrupted(files, monkeypatch):
    def size(path):
        if path.stem == B:  # the last one
            raise KeyboardInterrupt
        return oriented_size(path)

    monkeypatch.setattr(open_images_module, "_FILES_PER_JOB", 1)
    monkeypatch.setattr(open_images_module, "oriented_size", size)
    with pytest.raises(KeyboardInterrupt):
        files.prepare_boxes()
    assert [path.name for path in files.output.iterdir()] == ["val_sizes.csv"]
    assert len((files.output / "val_sizes.csv").read_text().splitlines()) == 3
    monkeypatch.setattr(open_images_module, "oriented_size", None)
    (files.images / f"{B}.jpg").unlink()
    assert files.prepare_boxes(existing_only=True).num_images == 2


def test_bad_and_missing_images_are_named(files):
    (files.images / f"{B}.jpg").write_text("cut off")
    with pytest.raises(ValueError, match="the size of 1 of 3 images cannot be read") as error:
        files.prepare_boxes()
    assert f"{B}.jpg: cannot be read as image" in str(error.value)
    assert len((files.output / "val_sizes.csv").read_text().splitlines()) == 3
    (files.images / f"{B}.jpg").unlink()
    with pytest.raises(ValueError, match="there is no such image, but it is listed"):
        files.prepare_boxes()
    assert not (files.output / "val_boxes.json").exists()
    summary = files.prepare_boxes(existing_only=True)
    assert summary.num_images == 2
    assert summary.left_out["images that are not there"] == 1
    assert summary.left_out["boxes in images that are not there"] == 1


def test_several_processes_read_the_same_sizes(files):
    files.prepare_boxes()
    before = (files.output / "val_boxes.json").read_text()
    (files.output / "val_sizes.csv").unlink()
    files.prepare_boxes(workers=2)
    assert (files.output / "val_boxes.json").read_text() == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{A},xclick,{CAR},1,10,30,0,1,0,0,0,0,0", "line 2 (image 000060e3121c7305) has the box "),
        (f"{A},xclick,{CAR},1,0,x,0,1,0,0,0,0,0", "Allowed: numbers from 0 to 1, in units of the"),
        (f"{A},xclick,{CAR},1,0,0,0,1,0,0,0,0,0", "no box is left. 1 boxes without width or heig"),
        (f"7,xclick,{CAR},1,0,1,0,1,0,0,0,0,0", "line 2 has the image id '7'"),
        ("", "has no box. Download it again"),
    ],
)
def test_bad_boxes_are_named(files, row, message):
    files.boxes.write_text(f"{BOX_HEADER}\n{row}\n")
    with pytest.raises(ValueError, match=r"annotations-bbox\.csv") as error:
        files.prepare_boxes()
    assert message in str(error.value)
    assert [p.name for p in files.output.glob("val_boxes*")] == []


def test_bad_sizes_and_folders_are_named(files):
    files.output.mkdir()
    sizes = files.output / "val_sizes.csv"
    for row, message in (
        ("0,30,1", r"line 2 \(image .*the size 0 x 30 and the orientation 1\. Allowed: pix"),
        ("40,30.5,1", "the size 40 x 30.5 and"),
        ("40,30,9", "the orientation 9"),
    ):
        sizes.write_text(f"ImageID,Width,Height,Orientation\n{A},{row}\n")
        with pytest.raises(ValueError, match=message):
            files.prepare_boxes()
    sizes.write_text(f"ImageID,Width,Height\n{A},40,30\n")
    with pytest.raises(ValueError, match="lacks the column Orientation"):
        files.prepare_boxes()
    sizes.unlink()
    files.images.rename(files.root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no such folder of images, but .* of 3"):
        files.prepare_boxes()
    with pytest.raises(FileNotFoundError, match="there is no such folder of images"):
        files.prepare_boxes(existing_only=True)


def test_names_are_unique_and_those_of_coco_are_told_by_id(files):
    rows = {CAR: "Automobile", MOUSE: "Mouse", COMPUTER_MOUSE: "Mouse", RED: "Red_X"}
    rows |= {"/m/1": "Polar bear", "/m/2": "Polar bear", "/m/3": "Iris", "/m/4": "Iris"}
    text = "".join(f"{label},{name}\n" for label, name in rows.items())
    names = read_open_images_names(
        files.write("all.csv", text), files.write("boxable.csv", f"/m/2,Polar bear\n{CAR},Car\n")
    )
    assert names == {
        CAR: "car",
        MOUSE: "mouse (/m/04rmv)",
        COMPUTER_MOUSE: "mouse",
        RED: "red x",
        "/m/1": "polar bear (/m/1)",
        "/m/2": "polar bear",
        "/m/3": "iris (/m/3)",
        "/m/4": "iris (/m/4)",
    }
    assert read_open_images_names(files.descriptions, files.boxable) == files.names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Dog,/m/0bt9lr\n", "line 1 is 'Dog,/m/0bt9lr'. Allowed: the id of a class"),
        ("/m/1,A\n/m/1,B\n", "line 2 is '/m/1,B'"),
        ("/m/1\n", "line 1 is '/m/1'"),
        ("/m/1,_\n", "line 1 is '/m/1,_'"),
        ("LabelName,DisplayName\n", "has no class. Download it again"),
    ],
)
def test_bad_descriptions_are_named(files, text, message):
    with pytest.raises(ValueError, match=r"bad\.csv") as error:
        read_open_images_names(files.write("bad.csv", text), files.boxable)
    assert message in str(error.value)


def test_all_classes_of_coco_but_one_have_an_id():
    names = list(OPEN_IMAGES_NAMES.values())
    assert len(set(names)) == len(names)
    assert [name for name in COCO_THING_CLASSES if name not in names] == ["cup"]


def test_names_agree_with_those_of_the_first_release(shared_data):
    with (shared_data / "vocab" / "openimages" / "dict.csv").open(encoding="utf-8") as file:
        given = dict(csv.reader(file))
    renamed = {
        name: given[label]
        for label, name in OPEN_IMAGES_NAMES.items()
        if label in given and given[label] != name
    }
    assert renamed == {
        "car": "automobile",
        "cow": "cattle",
        "tie": "necktie",
        "frisbee": "flying disc",
        "skis": "ski",
        "sports ball": "ball",
        "donut": "doughnut",
        "potted plant": "houseplant",
        "tv": "television",
        "remote": "remote control",
        "keyboard": "computer keyboard",
        "cell phone": "mobile phone",
        "microwave": "microwave oven",
        "hair drier": "hair dryer",
    }
    # Classes that the first release lacks.
    assert [name for label, name in OPEN_IMAGES_NAMES.items() if label not in given] == [
        "parking meter",
        "baseball glove",
        "tennis racket",
        "dining table",
        "oven",
        "toaster",
    ]


def run(files, *arguments):
    command = [
        sys.executable,
        str(SCRIPT),
        "open_images",
        "--root",
        str(files.root.parent),
        "--workers",
        "1",
    ]
    return subprocess.run(
        [*command, "--split", "val", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command(files):
    finished = run(files)
    assert finished.returncode == 0, finished.stderr
    assert "3 images with 4 tags of 3 classes." in finished.stdout
    assert "2 images with 3 boxes of 2 classes." in finished.stdout
    assert {p.name for p in files.output.iterdir()} == {
        "val_tags.jsonl",
        "val_boxes.json",
        "val_sizes.csv",
    }
    finished = run(files, "--split", "train")
    assert finished.returncode == 1
    assert "train-annotations-human-imagelabels.csv: there is no such file" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_command_makes_one_of_the_two_files(files):
    (files.images / f"{C}.jpg").unlink()
    arguments = ["--labels", files.labels, files.machine, "--min-machine-confidence", "0.7"]
    finished = run(files, "--only", "tags", "--existing-images", *map(str, arguments))
    assert finished.returncode == 0, finished.stderr
    assert files.read_tags() == {f"{A}.jpg": ["car", "dog"], f"{B}.jpg": ["car", "red"]}
    assert not (files.output / "val_boxes.json").exists()
    finished = run(files, "--only", "boxes", "--existing-images")
    assert "1 images with 2 boxes of 2 classes." in finished.stdout


# --- masks


def test_masks_are_put_to_their_boxes(files):
    boxes, sizes = files.output / "boxes.json", files.output / "sizes.csv"
    prepare_open_images_boxes(files.boxes, files.names, files.images, boxes, sizes=sizes)
    masks = files.root / "masks"
    masks.mkdir()
    pixels = np.zeros((16, 16), np.uint8)  # not the size of its image, (8, 8)
    pixels[4:12, 8:16] = 255
    cv2.imwrite(str(masks / "c.png"), pixels)
    header = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
    rows = [f"c.png,{C},{DOG},x,0.5,1,0.25,0.75,0.9,", f"c.png,{C},{CAR},x,0.5,1,0.25,0.75,0.9,"]
    rows += [f"c.png,{A},{DOG},x,0.5,1,0.25,0.75,0.9,"]  # its box is elsewhere
    csv_file = files.write("masks.csv", "\n".join([header, *rows, ""]))
    output = files.output / "masks.json"
    made = prepare_open_images_masks(csv_file, masks, boxes, output, sizes=sizes)
    assert "1 images with 1 masks of 1 classes" in str(made)
    assert made.left_out == {"masks without their box": 2}
    (record,) = load_coco(output, files.images).records
    (annotation,) = record["annotations"]
    expected = np.zeros((8, 8), bool)
    expected[2:6, 4:8] = True
    rle = annotation["segmentation"]
    np.testing.assert_array_equal(mask_utils.decode(rle).astype(bool), expected)
    text = f"{header}\n{rows[0].replace('c.png', 'nothing.png')}\n"
    missing = files.write("missing.csv", text)
    with pytest.raises(ValueError, match=r"nothing\.png: this mask is not there"):
        prepare_open_images_masks(missing, masks, boxes, output, sizes=sizes)
