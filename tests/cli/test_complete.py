"""`maskx complete`: its words, its report, its exit status."""

import json
import re
from pathlib import Path

import pytest

from maskx.cli.main import main
from maskx.data.scenes.generator import generate_scenes


@pytest.fixture
def data(tmp_path):
    """A file in which the second half of the categories has no masks, with its images beside it."""
    path = generate_scenes(tmp_path / "data", count=30, size=64, num_categories=4, seed=2)
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        if annotation["category_id"] > 2:
            del annotation["segmentation"]
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "completed.json"


def test_the_report_lists_the_worst_first(data, output, capsys):
    status = main(
        ["complete", str(data), "--teacher", "teachers:probabilities", "--output", str(output)]
    )
    assert status == 0
    text = capsys.readouterr().out
    todo = [a for a in json.loads(data.read_text())["annotations"] if "segmentation" not in a]
    assert f"{len(todo)} objects were to get a mask, {len(todo)} have one now" in text
    assert "The qualities are calibrated on" in text
    page = output.with_suffix(".html").read_text()
    assert f"Wrote {output} and {output.with_suffix('.html')}" in text
    assert page.count("data:image/jpeg;base64,") == 1
    assert "Reliability, on masks that were known" in page
    made = {a["id"]: a for a in json.loads(output.read_text())["annotations"]}
    rows = re.findall(
        r'<td class="number">([\d.]+)</td><td>[^<]+</td><td>[^<]+</td><td>(\d+)', page
    )
    qualities = [float(quality) for quality, _ in rows]
    assert qualities == sorted(qualities)
    assert {int(id_) for _, id_ in rows} == {a["id"] for a in todo}
    for quality, id_ in rows:
        assert made[int(id_)]["segmentation_quality"] == pytest.approx(float(quality), abs=6e-4)
    assert "http" not in page.replace("http://www.w3.org", "")


def test_withheld_masks_are_measured_by_category(data, output, tmp_path, capsys):
    names = [c["name"] for c in json.loads(data.read_text())["categories"]]
    (tmp_path / "split.txt").write_text(names[0])
    words = ["complete", str(data), str(data.parent), "--teacher", "grabcut"]
    words += ["--withhold", str(tmp_path / "split.txt"), "--output", str(output)]
    assert main(words) == 0
    text = capsys.readouterr().out
    measured = text.partition("Against the masks that were withheld:")[2]
    assert re.search(rf"\| {names[1]} \| \d+ \| 0\.\d\d\d \|", measured)
    assert names[2] not in measured  # it never had any
    assert "Reliability, on masks that were withheld" in output.with_suffix(".html").read_text()


def test_an_image_that_fails_is_named_and_the_status_is_1(data, output, capsys):
    content = json.loads(data.read_text())
    whole = (data.parent / content["images"][0]["file_name"]).read_bytes()
    middle = bytes(len(whole) - 100)  # which reading the annotations does not look at
    (data.parent / "text.png").write_bytes(whole[:60] + middle + whole[-40:])
    content["images"][0]["file_name"] = "text.png"
    data.write_text(json.dumps(content))
    words = ["complete", str(data), "--teacher", "teachers:ellipses", "--output", str(output)]
    assert main(words) == 1
    text = capsys.readouterr().out
    assert "1 images failed:" in text
    assert "text.png' (id 0) cannot be read" in text
    assert output.exists()


def test_images_that_the_reader_leaves_out_are_named_and_the_status_is_1(data, output, capsys):
    images = [data.parent / i["file_name"] for i in json.loads(data.read_text())["images"][:2]]
    images[0].unlink()
    images[1].write_text("text")
    words = ["complete", str(data), "--teacher", "teachers:ellipses", "--output", str(output)]
    with pytest.raises(SystemExit, match="--skip-bad"):
        main(words)
    assert main([*words, "--skip-bad"]) == 1
    text, page = capsys.readouterr().out, output.with_suffix(".html").read_text()
    for where in (text, page):
        assert "2 images failed:" in where
        assert f"{images[0]}: does not exist" in where
        assert f"{images[1]}: is " in where
    assert output.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{data}"], "Nothing makes masks"),
        (["a.json", "--teacher", "grabcut"], "a.json: there is no such file or folder"),
        (["run", "b.txt", "--teacher", "grabcut"], "b.txt: there is no such file or folder"),
        (["a", "b", "c", "d"], "Got a b c d. Allowed: a run folder"),
        (["no_such_run", "{data}"], "'no_such_run': there is no such run folder"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(words, message, data, output):
    words = [word.format(data=data) for word in words]
    with pytest.raises(SystemExit) as ending:
        main(["complete", *words, "--output", str(output)])
    assert re.search(message, str(ending.value.code))
    assert not output.exists()


def test_a_report_that_exists_is_not_overwritten(data, output):
    page = output.with_suffix(".html")
    page.parent.mkdir()
    page.write_text("mine")
    words = ["complete", str(data), "--teacher", "teachers:ellipses", "--output", str(output)]
    with pytest.raises(SystemExit) as ending:
        main(words)
    assert "completed.html exists already. Add --overwrite" in str(ending.value.code)
    assert page.read_text() == "mine"
    assert main([*words, "--report", str(page.with_name("other.html"))]) == 0
    assert Path(page.with_name("other.html")).exists()


@pytest.mark.parametrize("name", ["yolo", "labelme", "cvat", "label-studio", "voc"])
def test_annotations_of_other_formats(name, data, output, tmp_path, capsys):
    content = json.loads(data.read_text())
    content["images"] = content["images"][:3]
    for image in content["images"]:
        del image["stuff_file_name"]
    wanted = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in wanted]
    with_boxes = [a for a in content["annotations"] if "segmentation" not in a]
    data.write_text(json.dumps(content))
    export = ["export", str(data), str(data.parent), "--format", name, "--copy-images"]
    assert main([*export, "--output", str(tmp_path / "tool")]) == 0
    source = tmp_path / "tool"
    if name == "yolo":  # whose export has no box beside masks, but people's folders do
        sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
        stems = {i["id"]: Path(i["file_name"]).stem for i in content["images"]}
        for each in with_boxes:
            (x, y, w, h), (width, height) = each["bbox"], sizes[each["image_id"]]
            numbers = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            (labels,) = (source / "labels").rglob(f"{stems[each['image_id']]}.txt")
            line = " ".join(map(str, [each["category_id"] - 1, *numbers]))
            labels.write_text(f"{labels.read_text().rstrip()}\n{line}\n")
    inputs = [str(source)]
    if name in ("cvat", "label-studio"):  # which say nothing of a folder of images
        file = {"cvat": "annotations/instances_default.json", "label-studio": "tasks.json"}[name]
        inputs = [str(source / file), str(source / "images")]
    words = ["complete", *inputs, "--teacher", "teachers:ellipses", "--output", str(output)]
    assert main(words) == 0
    assert f"{len(with_boxes)} objects were to get a mask, {len(with_boxes)} have one now" in (
        capsys.readouterr().out
    )
    rows = json.loads(output.read_text())["annotations"]
    made = [row for row in rows if "segmentation_source" in row]
    assert len(made) == len(with_boxes)
    assert len(rows) == len(content["annotations"])
    assert all(row["segmentation"] for row in rows)
