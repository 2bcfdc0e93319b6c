"""The commands of all pages: their tool, its arguments and the files of the package are there.

What they do is tested with tiny settings beside each tool; here nothing is run.
"""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from maskx.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*/**/README.md"))]


def blocks():
    """(page, text) of each block of commands."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", text, flags=re.DOTALL):
            yield page, block


def documented():
    """(page, words) of each command of ours."""
    commands = {}
    for page, block in blocks():
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|; ", line.replace("$S", "voc2nonvoc")):
                ours = re.match(r"\s*(?:do )?((?:python [^-]|maskx ).*)", command)
                if ours:
                    words = tuple(shlex.split(ours[1], comments=True))
                    commands.setdefault(words, page.relative_to(ROOT).as_posix())
    return [(page, list(words)) for words, page in commands.items()]


COMMANDS = documented()


class Understood(BaseException):
    """Raised where a command would begin its work."""


def run(words):
    if words[0] == "maskx":
        return main(words[1:])
    return runpy.run_path(words[1], run_name="__main__")


@pytest.fixture(autouse=True)
def only_arguments(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(self, *args, **options):
        parse(self, *args, **options)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.chdir(ROOT)


def test_the_pages_have_commands():
    assert len(COMMANDS) > 100
    assert {page for page, _ in COMMANDS} >= {"README.md", "docs/half_labelled.md"}


def test_commands_for_gpus_say_so():
    of_gpus = [block for _, block in blocks() if "--num-gpus" in block]
    assert len(of_gpus) > 15
    assert not [block for block in of_gpus if "# needs GPUs" not in block]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda v: " ".join(v)[:60])
def test_a_command_is_understood(page, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(Understood):
        run(words)
    ours = [w for w in words if re.match(r"configs/.*\.(yaml|py)$", w)]
    assert not [w for w in ours if not (ROOT / w).is_file()]


@pytest.mark.parametrize("words", [["maskx", "train", "--no-such"], ["maskx", "none"]])
def test_what_is_wrong_would_be_found(words):
    with pytest.raises(SystemExit):
        main(words[1:])
