import json

import cv2
import numpy as np
import pytest

from maskx.data import grabcut_coco
from maskx.data.coco import load_coco
from maskx.data.grabcut import grabcut_mask
from maskx.data.grabcut_coco import write_grabcut_json
from maskx.data.masks import decode_segmentation
from maskx.data.scenes.generator import generate_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Annotation file and folder of 5 images; one annotation of B is a crowd."""
    root = tmp_path_factory.mktemp("scenes")
    json_file = generate_scenes(root, count=5, size=64, num_categories=4, seed=0)
    content = json.loads(json_file.read_text())
    next(a for a in content["annotations"] if a["category_id"] == 2)["iscrowd"] = 1
    json_file.write_text(json.dumps(content))
    return json_file, root


@pytest.fixture
def split(scenes, tmp_path):
    """Categories 1 and 3 are A."""
    names = [category["name"] for category in json.loads(scenes[0].read_text())["categories"]]
    path = tmp_path / "split.txt"
    path.write_text(f"{names[0]}\n{names[2]}\n")
    return path


def in_b(annotation):
    return annotation["category_id"] in (2, 4) and not annotation["iscrowd"]


def read(path):
    return json.loads(path.read_text())


def test_b_gets_masks_of_grabcut_and_the_rest_stays(scenes, split, tmp_path):
    output = tmp_path / "new" / "out.json"
    summary = write_grabcut_json(*scenes, output, split=split)
    before, after = read(scenes[0]), read(output)
    assert len(after["annotations"]) == len(before["annotations"])
    files = {image["id"]: str(scenes[1] / image["file_name"]) for image in before["images"]}
    num_masks = num_whole = 0
    for old, new in zip(before["annotations"], after["annotations"], strict=True):
        if not in_b(old):
            assert new == old
            continue
        x, y, width, height = old["bbox"]
        image = cv2.imread(files[old["image_id"]])
        expected = grabcut_mask(image, [x, y, x + width, y + height])
        mask = decode_segmentation(new["segmentation"], *image.shape[:2])
        np.testing.assert_array_equal(mask, expected)
        changed = {"segmentation", "area"}
        assert new["area"] == mask.sum()
        assert {k: v for k, v in new.items() if k not in changed} == {
            k: v for k, v in old.items() if k not in changed
        }
        num_masks += 1
        num_whole += bool(mask.sum() == width * height)
    assert 0 < num_masks < len(before["annotations"])
    assert (summary.num_masks, summary.num_whole_boxes) == (num_masks, num_whole)
    assert summary.num_left_out == 0
    for key in ("categories", "stuff_categories"):
        assert after[key] == before[key]
    for old, new in zip(before["images"], after["images"], strict=True):
        assert new == old | {"stuff_file_name": new["stuff_file_name"]}
        assert (output.parent / new["stuff_file_name"]).samefile(scenes[1] / old["stuff_file_name"])
    info = after["info"].pop("grabcut")
    assert after["info"] == before["info"]
    assert info["split"] == str(split)
    assert info["categories"] == [before["categories"][i]["name"] for i in (1, 3)]
    assert (info["num_masks"], info["iterations"]) == (num_masks, 5)
    assert [path.name for path in output.parent.iterdir()] == ["out.json"]
    load_coco(output, scenes[1])  # strict


def test_without_a_split_all_categories_get_masks(scenes, tmp_path):
    output = tmp_path / "out.json"
    summary = write_grabcut_json(*scenes, output)
    before, after = read(scenes[0])["annotations"], read(output)["annotations"]
    changed = [a["segmentation"] != b["segmentation"] for a, b in zip(before, after, strict=True)]
    assert changed == [not a["iscrowd"] for a in before]
    assert summary.num_masks == len(before) - 1
    assert read(output)["info"]["grabcut"]["split"] is None


def test_boxes_without_masks_get_them_too(scenes, tmp_path):
    content = read(scenes[0])
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 0
        del annotation["segmentation"], annotation["area"]
    boxes_only = tmp_path / "boxes.json"
    boxes_only.write_text(json.dumps({k: v for k, v in content.items() if k != "info"}))
    write_grabcut_json(boxes_only, scenes[1], tmp_path / "out.json")
    assert all("segmentation" in a for a in read(tmp_path / "out.json")["annotations"])


def test_processes_write_the_same_bytes(scenes, split, tmp_path):
    for workers in (1, 2):
        write_grabcut_json(
            *scenes, tmp_path / f"{workers}.json", split=split, workers=workers, progress=True
        )
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def stop_after(count, monkeypatch):
    """Let every image after the first ``count`` end in what Ctrl-C raises."""
    cut_image, left = grabcut_coco._cut_image, iter(range(count))

    def cut(job):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return cut_image(job)

    monkeypatch.setattr(grabcut_coco, "_cut_image", cut)


@pytest.fixture
def write_interrupted(monkeypatch):
    def write(*arguments, after):
        with monkeypatch.context() as patch:
            stop_after(after, patch)
            with pytest.raises(KeyboardInterrupt):
                write_grabcut_json(*arguments)

    return write


@pytest.mark.parametrize("half_line", [b"", b'{"3": {"segmenta'])
def test_an_interrupted_run_goes_on_and_writes_the_same_bytes(
    scenes, tmp_path, monkeypatch, write_interrupted, half_line
):
    write_grabcut_json(*scenes, tmp_path / "at_once.json")
    output, partial = tmp_path / "out.json", tmp_path / "out.json.partial.jsonl"
    write_interrupted(*scenes, output, after=2)
    assert not output.exists()
    assert len(partial.read_bytes().splitlines()) == 3  # a header and two images
    with partial.open("ab") as file:
        file.write(half_line)
    write_interrupted(*scenes, output, after=1)
    assert len(partial.read_bytes().splitlines()) == 4

    # Three of five images are not made again.
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        write_grabcut_json(*scenes, output)
    assert output.read_bytes() == (tmp_path / "at_once.json").read_bytes()
    assert not partial.exists()


def test_a_run_killed_within_the_first_line_starts_again(scenes, tmp_path):
    (tmp_path / "out.json.partial.jsonl").write_bytes(b'{"annotation fi')
    write_grabcut_json(*scenes, tmp_path / "out.json")
    write_grabcut_json(*scenes, tmp_path / "at_once.json")
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "at_once.json").read_bytes()


def test_the_rest_of_another_run_is_refused(scenes, split, tmp_path, write_interrupted):
    output = tmp_path / "out.json"
    write_interrupted(*scenes, output, after=2)
    with pytest.raises(ValueError, match=r"out.json.partial.jsonl holds .* another input \(categ"):
        write_grabcut_json(*scenes, output, split=split)
    (tmp_path / "out.json.partial.jsonl").write_text("{}\nno JSON\n")
    with pytest.raises(ValueError, match=r"out.json.partial.jsonl, the rest .* cannot be read"):
        write_grabcut_json(*scenes, output)


@pytest.fixture
def bad_boxes(scenes, tmp_path):
    """The scenes with 6 bad boxes in B and one in A; the new file and the positions in B."""
    content = read(scenes[0])
    positions = [i for i, a in enumerate(content["annotations"]) if in_b(a)][:6]
    assert len(positions) == 6
    for position in positions:
        content["annotations"][position]["bbox"] = [1, 1, 0, 5]
    next(a for a in content["annotations"] if a["category_id"] == 1)["bbox"] = [0, 0, 0, 0]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    return path, positions


def test_bad_boxes_are_named(scenes, split, tmp_path, bad_boxes):
    path, positions = bad_boxes
    annotation = read(path)["annotations"][positions[0]]
    with pytest.raises(ValueError, match=r"bad\.json: has 6 bad boxes") as error:
        write_grabcut_json(path, scenes[1], tmp_path / "out.json", split=split)
    text = str(error.value)
    assert f"annotation {annotation['id']} of image {annotation['image_id']}, category" in text
    assert "bbox is [1, 1, 0, 5]; allowed: width and height above 0" in text
    assert text.endswith("\n  and 1 more")
    assert "--skip-bad" in text


def test_bad_boxes_are_left_out_and_counted(scenes, split, tmp_path, bad_boxes):
    path, positions = bad_boxes
    output = tmp_path / "out.json"
    summary = write_grabcut_json(path, scenes[1], output, split=split, strict=False)
    assert summary.num_left_out == 6
    before, after = read(path)["annotations"], read(output)["annotations"]
    kept = [a["id"] for i, a in enumerate(before) if i not in positions]
    assert [a["id"] for a in after] == kept


def change_image(path, scenes, tmp_path, **changes):
    content = read(path)
    content["images"][1] |= changes
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content))
    return changed, scenes[1], tmp_path / "out.json"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_that_cannot_be_read_is_named(scenes, tmp_path, workers):
    (tmp_path / "text.png").write_text("no image")
    arguments = change_image(*(scenes[0], scenes, tmp_path), file_name=str(tmp_path / "text.png"))
    with pytest.raises(ValueError, match=r"text.png' \(id 1\) cannot be read"):
        write_grabcut_json(*arguments, workers=workers)


def test_an_image_of_another_size_is_named(scenes, tmp_path):
    arguments = change_image(scenes[0], scenes, tmp_path, width=70)
    with pytest.raises(ValueError, match="is 64 x 64 pixels, but its annotations say 70 x 64"):
        write_grabcut_json(*arguments)


@pytest.mark.parametrize("name", ["none.png", None])
def test_a_missing_image_is_named_before_the_work_begins(scenes, tmp_path, name):
    arguments = change_image(scenes[0], scenes, tmp_path, file_name=name)
    with pytest.raises(FileNotFoundError, match=rf"image 1 has file_name {name!r}, which is no"):
        write_grabcut_json(*arguments)
    assert not (tmp_path / "out.json.partial.jsonl").exists()


def test_paths_that_cannot_be_are_named(scenes, tmp_path):
    with pytest.raises(ValueError, match=r"annotations.json exists already"):
        write_grabcut_json(*scenes, scenes[0])
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such image folder"):
        write_grabcut_json(scenes[0], tmp_path / "nowhere", tmp_path / "out.json")
    with pytest.raises(FileNotFoundError, match=r"no\.json: there is no such annotation file"):
        write_grabcut_json(tmp_path / "no.json", scenes[1], tmp_path / "out.json")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        write_grabcut_json(*scenes, tmp_path / "out.json", workers=0)
    with pytest.raises(FileNotFoundError, match=r"'coco_vok' is neither.*'coco_voc'"):
        write_grabcut_json(*scenes, tmp_path / "out.json", split="coco_vok")
