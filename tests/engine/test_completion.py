"""Objects with boxes alone get masks; everything else of the file stays to the letter."""

import json
import logging
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from maskx.data.coco import load_coco
from maskx.data.json_edits import edited, rows
from maskx.data.masks import decode_segmentation
from maskx.data.scenes.generator import generate_scenes
from maskx.engine import completion
from maskx.engine.completion import CompletionOptions, complete
from maskx.engine.completion_report import summary

KEYS = {"segmentation", "area", "segmentation_source", "segmentation_quality"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The scenes as they are: 40 images, all objects with masks."""
    folder = tmp_path_factory.mktemp("original")
    json_file = generate_scenes(folder, count=40, size=64, num_categories=4, seed=3)
    content = json.loads(json_file.read_text())
    for image in content["images"]:
        del image["stuff_file_name"]
    json_file.write_text(json.dumps(content))
    return json_file


@pytest.fixture
def half(original, tmp_path):
    """The same without every second mask; one object without is a crowd."""
    content = json.loads(original.read_text())
    for index, annotation in enumerate(content["annotations"]):
        if index % 2:
            annotation |= {"segmentation": [[], None][index % 4 == 1], "area": 0}
        if index == 1:
            annotation["iscrowd"] = 1
        if index % 6 == 3:
            del annotation["segmentation"], annotation["area"]
    path = tmp_path / "half.json"
    # A layout, a number and a word that no writer of Python would choose so.
    text = json.dumps(content, indent=3).replace('"bbox"', '"note": "\\u00e9", "x": 1.50, "bbox"')
    path.write_text(text, newline="\r\n")
    return path


@pytest.fixture
def options(half, original, tmp_path):
    return CompletionOptions(
        data=(str(half), str(original.parent)),
        output=tmp_path / "new" / "out.json",
        teacher="teachers:ellipses",
    )


def read(path):
    return json.loads(path.read_text())


def annotations(path):
    return {a["id"]: a for a in read(path)["annotations"]}


def without_mask(path):
    return {i for i, a in annotations(path).items() if not (a.get("segmentation") or a["iscrowd"])}


def test_objects_without_masks_get_them_and_all_else_stays_to_the_letter(options, half, original):
    found = complete(replace(options, output=half.with_name("out.json")))
    output, asked = half.with_name("out.json"), without_mask(half)
    assert len(asked) > 15
    assert {each.annotation_id for each in found.masks} == asked
    before, after = (p.read_bytes().decode() for p in (half, output))
    pairs = list(zip(rows(before), rows(after), strict=True))
    changed = [
        (start, end, before[old_start:old_end])
        for (key, row, old_start, old_end), (_, _, start, end) in pairs
        if key == "annotations" and row["id"] in asked
    ]
    assert edited(after, changed) == before
    assert after != before
    for old, new in ((annotations(half)[i], annotations(output)[i]) for i in asked):
        assert {k: v for k, v in new.items() if k not in KEYS} == {
            k: v for k, v in old.items() if k not in KEYS
        }
        mask = decode_segmentation(new["segmentation"], 64, 64)
        assert new["area"] == mask.sum() > 0
        assert new["segmentation_source"] == "teachers:ellipses"
        assert 0 <= new["segmentation_quality"] <= 1
    load_coco(output, original.parent)  # strict
    assert not list(half.parent.glob("*.partial*"))


def test_masks_stay_in_their_boxes(options):
    for each in complete(replace(options, teacher="teachers:larger_than_the_box")).masks:
        ys, xs = decode_segmentation(each.found.segmentation, 64, 64).nonzero()
        x0, y0, x1, y1 = each.box
        assert x0 - 1 < xs.min() < x0 + 1
        assert x1 - 2 < xs.max() < x1
        assert y0 - 1 < ys.min() < y0 + 1
        assert y1 - 2 < ys.max() < y1


def test_paths_that_count_from_the_file_are_found_from_a_new_folder(options, half, original):
    content = read(half)
    shutil.copytree(original.parent / "stuff", half.parent / "stuff")
    content["images"][0]["stuff_file_name"] = "stuff/000000.png"
    half.write_text(json.dumps(content))
    complete(options)
    images = read(options.output)["images"]
    assert images[0]["stuff_file_name"] == "../stuff/000000.png"
    assert images[1] == content["images"][1]


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("raises", "the teacher raised RuntimeError: no such layer"),
        ("nothing", r"the teacher returned None for \d boxes"),
        ("too_few", r"the teacher returned \d masks for \d boxes"),
        ("of_another_size", r"returned a mask of \(32, 32\), the image has \(64, 64\)"),
        ("not_a_number", "returned NaN or infinity"),
        ("beyond_one", "returned 0 to 255; allowed: 0 to 1"),
        ("texts", "returned a mask of the type <U1"),
    ],
)
def test_what_a_teacher_breaks_is_named_by_image_and_counted(
    options, half, original, teacher, words
):
    found = complete(replace(options, teacher=f"teachers:{teacher}"))
    assert found.masks == []
    assert found.reasons.total() == len(without_mask(half))
    names = {image["id"]: image["file_name"] for image in read(half)["images"]}
    images = {names[annotations(half)[i]["image_id"]] for i in without_mask(half)}
    assert all(str(original.parent / name) in found.failures for name in images)
    assert all(re.search(words, reason) for reason in found.failures.values())
    assert annotations(options.output) == annotations(half)


def test_a_predictor_of_segment_anything_is_a_teacher(options, tmp_path):
    expected = complete(options)
    found = complete(replace(options, teacher="teachers:sam", output=tmp_path / "sam.json"))
    assert {each.source for each in found.masks} == {"teachers:sam"}
    assert not found.failures
    assert [e.found for e in found.masks] == [e.found for e in expected.masks]


def test_masks_that_a_teacher_made_are_read_with_source_and_quality(options, original):
    completion = complete(options)
    data = load_coco(options.output, original.parent)
    read_back = {
        a["id"]: (a["segmentation_source"], a["segmentation_quality"])
        for record in data.records
        for a in record["annotations"]
        if "segmentation_source" in a
    }
    assert read_back == {
        each.annotation_id: (each.source, round(each.quality, 4)) for each in completion.masks
    }


def test_a_mask_that_is_not_found_is_no_failure(options, half):
    found = complete(replace(options, teacher="teachers:of_bright_objects"))
    assert found.failures == {}
    assert found.masks == []
    assert set(found.reasons) == {"the teacher found no mask", "the mask is empty"}


def test_images_that_cannot_be_read_are_named_and_the_rest_goes_on(
    options, half, original, tmp_path
):
    content = read(half)
    broken = content["images"][2]
    whole = (original.parent / broken["file_name"]).read_bytes()
    middle = bytes(len(whole) - 100)  # which reading the annotations does not look at
    (tmp_path / "text.png").write_bytes(whole[:60] + middle + whole[-40:])
    broken["file_name"] = str(tmp_path / "text.png")
    half.write_text(json.dumps(content))
    found = complete(options)
    assert list(found.failures) == [broken["file_name"]]
    assert "text.png' (id" in found.failures[broken["file_name"]]
    left = {a["id"] for a in content["annotations"] if a["image_id"] == broken["id"]}
    assert {each.annotation_id for each in found.masks} == without_mask(half) - left


def test_images_that_the_reader_leaves_out_are_failures(options, half, original, tmp_path):
    for path in (half, tmp_path / "known.json"):
        content = read(original if path.name == "known.json" else half)
        content["images"][3]["file_name"] = f"no_{path.stem}.png"
        path.write_text(json.dumps(content))
    known = str(tmp_path / "known.json"), str(original.parent)
    found = complete(replace(options, calibrate=known, skip_bad=True))
    assert {Path(name).name for name in found.failures} == {"no_half.png", "no_known.png"}
    assert all(reason.startswith("does not exist") for reason in found.failures.values())


def test_images_with_tags_alone_are_counted_where_masks_are_made_in_boxes(options, half):
    content = read(half)
    image = content["images"][3]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != image["id"]]
    image["image_labels"] = [content["categories"][0]["id"]]
    half.write_text(json.dumps(content))
    found = complete(options)
    assert list(found.label_maps.passed_over.values()) == [1]
    assert "1 images with tags alone have no label map: masks are made in boxes" in summary(found)


def test_withheld_masks_are_replaced_and_measured(options, original, tmp_path):
    names = [category["name"] for category in read(original)["categories"]]
    (tmp_path / "split.txt").write_text(names[0])
    data = (str(original), str(original.parent))
    found = complete(replace(options, data=data, withhold=str(tmp_path / "split.txt")))
    before, after = annotations(original), annotations(options.output)
    assert {each.class_name for each in found.masks} == set(names[1:])
    assert len(found.masks) == sum(a["category_id"] != 1 for a in before.values())
    for each in found.masks:
        old, new = (
            decode_segmentation(a[each.annotation_id]["segmentation"], 64, 64)
            for a in (before, after)
        )
        assert each.iou == pytest.approx((old & new).sum() / (old | new).sum())
    # Those of the first category stay, and say how good the others are.
    assert {each.class_name for each in found.known} == {names[0]}
    kept = {i for i, a in before.items() if a["category_id"] == 1}
    assert all(before[i] == after[i] for i in kept)


def test_qualities_are_calibrated_on_masks_of_the_file(options, half):
    found = complete(options)
    assert found.calibrated == ["teachers:ellipses"]
    drawn = [a for a in annotations(half).values() if a.get("segmentation") and not a["iscrowd"]]
    assert len(found.known) == len(drawn) == found.num_drawn >= 20
    ious = [each.iou for each in found.known]
    assert min(ious) <= min(each.quality for each in found.masks)
    assert max(each.quality for each in found.masks) <= max(ious)
    assert np.mean([e.quality for e in found.masks]) == pytest.approx(np.mean(ious), abs=0.1)


def test_with_few_known_masks_the_score_is_the_quality(options, original, tmp_path):
    content = read(original)
    for annotation in content["annotations"][19:]:
        del annotation["segmentation"]
    (tmp_path / "few.json").write_text(json.dumps(content))
    options = replace(options, data=(str(tmp_path / "few.json"), str(original.parent)))
    found = complete(options)
    assert found.calibrated == []
    assert [each.quality for each in found.masks] == [each.found.score for each in found.masks]
    # Another file has enough.
    other = (str(original), str(original.parent))
    found = complete(replace(options, calibrate=other, overwrite=True))
    assert found.calibrated == ["teachers:ellipses"]


def test_a_sure_mask_scores_higher(options):
    scores = {}
    for teacher in ("ellipses", "probabilities", "larger_than_the_box"):
        found = complete(replace(options, teacher=f"teachers:{teacher}", overwrite=True))
        scores[teacher] = np.mean([each.found.score for each in found.masks])
    assert scores["ellipses"] > scores["probabilities"] > 0.4
    assert scores["larger_than_the_box"] == pytest.approx(0.5, abs=0.01)


def test_masks_of_low_quality_are_left_out(options, half):
    options = replace(options, teacher="teachers:probabilities")
    everything = complete(options)
    limit = sorted(each.quality for each in everything.masks)[5] + 1e-9
    found = complete(replace(options, min_quality=limit, overwrite=True))
    assert all(each.quality >= limit for each in found.masks)
    assert found.reasons == Counter(
        {f"the quality is below {limit:g}": len(everything.masks) - len(found.masks)}
    )
    assert without_mask(options.output)


def test_masks_of_an_earlier_completion_are_no_truth_and_may_be_made_again(
    options, half, original, tmp_path
):
    first = complete(options)
    second = replace(
        options,
        data=(str(options.output), str(original.parent)),
        output=tmp_path / "again.json",
        teacher="teachers:probabilities",
    )
    found = complete(second)
    assert found.objects == []
    assert {each.annotation_id for each in found.known}.isdisjoint(without_mask(half))
    assert second.output.read_bytes() == options.output.read_bytes()
    found = complete(replace(second, again=True, overwrite=True))
    assert {e.annotation_id for e in found.masks} == {e.annotation_id for e in first.masks}
    assert {each.iou for each in found.masks} == {None}
    sources = {a.get("segmentation_source") for a in annotations(second.output).values()}
    assert sources == {None, "teachers:probabilities"}


def test_processes_write_the_same(options, tmp_path):
    complete(options)
    other = replace(options, output=tmp_path / "new" / "two.json", workers=2)
    complete(other)
    assert other.output.read_bytes() == options.output.read_bytes()


@pytest.fixture
def interrupted(options, monkeypatch):
    """A completion that ends with Ctrl-C after 4 images, and what it leaves."""
    ask, left = completion._ask_image, iter(range(4))

    def ask_some(source, job):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return ask(source, job)

    with monkeypatch.context() as patch:
        patch.setattr(completion, "_ask_image", ask_some)
        with pytest.raises(KeyboardInterrupt):
            complete(options)
    partial = options.output.with_name("out.json.teacher.partial.jsonl")
    assert len(partial.read_bytes().splitlines()) == 5  # a header and four images
    return partial


def test_an_interrupted_completion_goes_on(options, interrupted, tmp_path, monkeypatch):
    with interrupted.open("ab") as file:
        file.write(b'{"a7": {"segmen')  # a kill within a line
    asked = []
    ask = completion._ask_image
    monkeypatch.setattr(
        completion, "_ask_image", lambda source, job: asked.append(job) or ask(source, job)
    )
    complete(options)
    assert len(asked) == 36
    assert not interrupted.exists()
    monkeypatch.undo()
    at_once = replace(options, output=tmp_path / "new" / "at_once.json")
    complete(at_once)
    assert options.output.read_bytes() == at_once.output.read_bytes()


def test_the_rest_of_another_completion_is_refused(options, interrupted):
    with pytest.raises(ValueError, match=r"partial\.jsonl holds masks .* something else: other 's"):
        complete(replace(options, teacher="teachers:probabilities"))
    interrupted.write_text("{}\nno JSON\n")
    with pytest.raises(ValueError, match=r"partial\.jsonl, the rest .* cannot be read"):
        complete(options)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"teacher": None}, ValueError, "Nothing makes masks"),
        ({"agree": 0.5}, ValueError, "agree compares a run with a teacher"),
        ({"min_quality": 2}, ValueError, r"min_quality is 2\. Allowed: 0 to 1"),
        ({"workers": 0}, ValueError, "workers must be at least 1, got 0"),
        ({"teacher": "grabkut"}, ValueError, "no teacher 'grabkut'. Allowed: grabcut, u2netp, or"),
        ({"teacher": "teachers:none"}, ValueError, "'teachers:none' cannot be imported"),
        ({"teacher": "no_such:thing"}, ValueError, "cannot be imported.*No module named 'no_such'"),
        ({"teacher": "teachers:constant"}, ValueError, "is a int, not a function"),
        ({"run": Path("no/run")}, FileNotFoundError, "no/run': there is no such run folder"),
        ({"withhold": "coco_vok"}, FileNotFoundError, "'coco_vok' is neither"),
        ({"calibrate": ("a.json", "nowhere")}, FileNotFoundError, "'nowhere': there is no such im"),
    ],
)
def test_what_cannot_be_is_named(options, changes, error, words):
    with pytest.raises(error, match=words):
        complete(replace(options, **changes))
    assert not options.output.exists()


def test_an_output_that_exists_is_not_overwritten(options, half):
    options.output.parent.mkdir()
    options.output.write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.json exists already\. Add --overwrite"):
        complete(options)
    assert options.output.read_text() == "mine"
    complete(replace(options, overwrite=True))
    assert without_mask(options.output) == set()
    with pytest.raises(ValueError, match="is the annotation file itself"):
        complete(replace(options, output=half, overwrite=True))


def test_a_bad_mask_stays_and_is_said_with_skip_bad(options, half, caplog):
    content = read(half)
    chosen = next(a for a in content["annotations"] if a.get("segmentation"))
    chosen["segmentation"] = [[1, 2, 3]]
    half.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="polygon of 3 coordinates"):
        complete(options)
    with caplog.at_level(logging.WARNING):
        complete(replace(options, skip_bad=True))
    assert annotations(options.output)[chosen["id"]] == chosen
    assert (
        f"1 annotations have a mask that cannot be used, or no id of their own: '{chosen['id']}'"
        in caplog.text
    )
