"""Mistakes at the command line of datasets/prepare.py end in one line, whatever is prepared."""

import runpy
import sys
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[3] / "datasets" / "prepare.py"), run_name="tool")
NEEDED = {"concept_split": ["--words"]}


@pytest.fixture
def ending(monkeypatch):
    """Run the command and return its exit status, or the line it ends with."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            TOOL["main"]()
        return ended.value.code

    return run


def names(capsys):
    with pytest.raises(SystemExit):
        TOOL["parse_arguments"](["nonsense"])
    listed = capsys.readouterr().err.rpartition("choose from ")[2]
    return [name.strip(" '\n)") for name in listed.split(",")]


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_root_that_is_missing_empty_or_a_file_is_named(tmp_path, capsys, ending, kind):
    root = tmp_path / "root"
    if kind == "empty":
        root.mkdir()
    elif kind == "file":
        root.write_text("hello")
    found = names(capsys)
    assert {"voc", "ccp", "concept_tests"} <= set(found)
    for name in found:
        given = [word for flag in NEEDED.get(name, ()) for word in (flag, root / "words")]
        line = ending(name, "--root", root, *given)
        assert line.startswith("error: "), name
        assert str(root) in line, name
        assert "\n" not in line.removesuffix("\n"), name


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"images": 3}'])
@pytest.mark.parametrize(
    "words",
    [
        ["coco60", "--json"],
        ["lvis", "--json"],
        ["visual_genome", "--coco-val-json"],
        ["concept_split", "--words"],
        ["concept_tests", "--split"],
    ],
    ids=lambda words: words[0],
)
def test_a_file_of_other_content_is_named(tmp_path, ending, words, content):
    path = tmp_path / "given.json"
    path.write_text(content)
    line = ending(words[0], "--root", tmp_path, words[1], path)
    assert line.startswith("error: ")
    assert "given.json" in line


@pytest.mark.parametrize("words", [[], ["vocc"], ["voc", "--workers", "x"], ["concept_split"]])
def test_words_that_mean_nothing_end_with_the_usage(ending, capsys, words):
    assert ending(*words) == 2
    assert "error: " in capsys.readouterr().err
