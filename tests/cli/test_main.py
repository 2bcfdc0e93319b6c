"""The command itself: its verbs, its help, its exit status."""

import importlib
import subprocess
import sys

import pytest

from maskx import __version__
from maskx.cli.main import VERBS, main

HEAVY = {"torch", "numpy", "cv2", "scipy", "detectron2", "torchvision", "matplotlib"}


def test_without_a_verb_it_names_all_of_them(capsys):
    with pytest.raises(SystemExit) as ending:
        main(["--help"])
    assert ending.value.code == 0
    text = capsys.readouterr().out
    assert all(f"    {verb}" in text for verb in VERBS)


@pytest.mark.parametrize("words", [[], ["nonsense"], ["train", "--no-such-option"]])
def test_a_wrong_command_line_ends_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as ending:
        main(words)
    assert ending.value.code == 2
    assert "usage: maskx" in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"maskx {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_a_help_text_shows_the_command_and_waits_for_no_library(verb):
    code = """
import sys
from maskx.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as ending:
    assert not ending.code, ending.code
print("loaded:", *sys.modules)
"""
    finished = subprocess.run(
        [sys.executable, "-c", code, verb, "--help"], capture_output=True, text=True, check=True
    )
    text, _, loaded = finished.stdout.rpartition("loaded:")
    assert f"usage: maskx {verb}" in text
    assert f"    maskx {verb}" in text.partition("Examples:")[2]
    assert not HEAVY & set(loaded.split())


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_explains_itself(verb):
    module = importlib.import_module(f"maskx.cli.{verb.replace('-', '_')}")
    assert [line for line in module.__doc__.splitlines() if len(line) > 100] == []


def test_as_a_module_it_is_the_same_command():
    finished = subprocess.run(
        [sys.executable, "-m", "maskx", "train", "--device", "tpu", "--iterations", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ")
    assert "Traceback" not in finished.stderr


def test_a_run_that_exists_is_not_replaced(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"holds a run already.*add --resume.*--overwrite"):
        main(["train", "--output", str(tmp_path)])
    assert (tmp_path / "run.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["metrics.json", "report.html", "predictions.png"])
def test_results_of_others_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit, match=f"holds '{name}' already.*--overwrite to replace it"):
        main(["train", "--output", str(tmp_path)])
    assert (tmp_path / name).read_text() == "mine"
