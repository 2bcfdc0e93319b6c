"""Options of `maskx train` in a file."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from maskx.cli.main import main, parse
from maskx.engine.system import System, find_system, register_system

TOOL = Path(__file__).parents[2] / "tools" / "quickstart.py"


class Recorder:
    """A system that only says what it was asked to do."""

    asked = None

    def __call__(self, options, report):
        self.asked = options
        (options.output / "run.json").write_text("{}")
        return {}


register_system("recorder", System("recorder", "Recorder", pipeline=Recorder()))


@pytest.fixture
def recorder():
    return find_system("recorder").pipeline


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a settings file in a folder beside the current one."""
    folder = tmp_path / "settings"
    folder.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (folder / "train.json").write_text(json.dumps({"images": [], "annotations": []}))

    def make(text):
        (folder / "first.yaml").write_text(text, encoding="utf-8")
        return "../settings/first.yaml"

    return make


TEXT = """\
system: recorder
coco-train: [train.json, train]
iterations: 400  # steps
batch-size: 4
box-loss: 1e-1
frozen: true
light: false
weights: weights.pth
masks-for: drawn
output: run
"""


def test_a_file_gives_options_and_its_paths_count_from_its_folder(write, recorder):
    given = parse(["train", "--batch-size", "2", "--settings", write(TEXT), "--seed", "3"])
    assert given.coco_train == ["../settings/train.json", "../settings/train"]
    assert (given.iterations, given.batch_size, given.seed) == (400, 2, 3)
    assert (given.frozen, given.light, given.box_loss) == (True, None, 0.1)
    assert given.pretrained == "../settings/weights.pth"
    assert given.output == Path("../settings/run")
    assert given.masks_for == "drawn"


def test_a_split_is_a_path_where_the_folder_has_such_a_file(write):
    file = write("masks-for: masks.txt")
    Path("../settings/masks.txt").write_text("cat")
    assert parse(["train", "--settings", file]).masks_for == "../settings/masks.txt"


def test_a_run_folder_holds_settings_that_give_the_same_run(write, recorder, monkeypatch):
    Path("masks.txt").write_text("cat")
    assert main(["train", "--settings", write(TEXT), "--masks-for", "masks.txt"]) == 0
    first = recorder.asked
    written = "../settings/run/settings.yaml"
    with pytest.raises(SystemExit, match="holds a run already"):
        main(["train", "--settings", written])
    again = ["train", "--settings", str(Path(written).resolve()), "--output", "again"]
    monkeypatch.chdir("..")
    assert main(again) == 0
    assert recorder.asked.output == Path("again")
    for name in ("seed", "iterations", "batch_size", "box_loss", "frozen", "light"):
        assert getattr(recorder.asked, name) == getattr(first, name)
    folder = Path("settings").resolve()
    assert recorder.asked.pretrained == str(folder / "weights.pth")
    assert recorder.asked.coco_train == (str(folder / "train.json"), str(folder / "train"))
    assert recorder.asked.masks_for == str(Path("here/masks.txt").resolve())
    assert main(["train", "--settings", "settings/run/settings.yaml", "--resume"]) == 0
    assert recorder.asked.resume
    assert recorder.asked.output == Path("settings/run")
    assert "resume" not in Path("settings/run/settings.yaml").read_text()


def test_the_quick_start_takes_it_too(write, recorder, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--settings", write(TEXT), "--iterations", "1"])
    runpy.run_path(str(TOOL), run_name="__main__")
    assert (recorder.asked.iterations, recorder.asked.batch_size) == (1, 4)
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--settings", "none.yaml"])
    with pytest.raises(SystemExit, match=r"error: There is no settings file 'none\.yaml'"):
        runpy.run_path(str(TOOL), run_name="__main__")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nbatch_size: 4", r"line 2: .*no option 'batch_size'.*'batch-size'"),
        ("iteration: 4", r"no option 'iteration' for .* Did you mean 'iterations'"),
        ("settings: a.yaml", "no option 'settings' for a settings file"),
        ("overwrite: true", "no option 'overwrite' for a settings file"),
        ("xyzzy: 1", "no option 'xyzzy' for a settings file. `maskx train --help` has all"),
        (
            "seed: 1\n\niterations: many",
            r"line 3: argument --iterations: invalid int value: 'many'",
        ),
        ("iterations: 4.5", "invalid int value: '4.5'"),
        ("iterations: [1, 2]", "iterations takes one value, found seq"),
        ("iterations: {a: 1}", "iterations takes one value, found map"),
        ("iterations:", "iterations takes one value, found null"),
        ("backbone: yes", "backbone takes one value, found bool"),
        ("frozen: 1", "frozen takes true or false"),
        ("system: mask", "argument --system: invalid choice: 'mask'"),
        ("coco-train: train.json", "argument --coco-train: expected 2 arguments"),
        ("coco-train: [a, b, c]", "unrecognized arguments: c"),
        ("coco-train: [a, null]", "coco-train takes a list of 'DATA', 'IMAGES', found null"),
        ("seed: 1\nseed: 2", r"no plain YAML: the key 'seed' stands twice line 2"),
        ("seed: [1", "no plain YAML: .*line 1"),
        ("seed: !!python/name:os.getcwd ''", "no plain YAML"),
        ("", "no mapping of options to values"),
        ("- seed", "no mapping of options to values"),
    ],
)
def test_what_cannot_be_is_said_with_file_and_line(write, text, words):
    with pytest.raises(SystemExit, match=rf"error: .*first\.yaml.*{words}"):
        main(["train", "--settings", write(text)])


def test_a_file_that_cannot_be_read_is_named(write):
    with pytest.raises(SystemExit, match=r"There is no settings file '\.'"):
        main(["train", "--settings", "."])
    Path("latin.yaml").write_bytes("output: für".encode("latin-1"))
    with pytest.raises(SystemExit, match=r"'latin\.yaml' is no plain YAML: 'utf-8' codec"):
        main(["train", "--settings", "latin.yaml"])
