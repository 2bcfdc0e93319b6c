"""The console command: it finds the verb, and ends in one line where something is wrong."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import maskx.systems  # noqa: F401 - registers them, for every verb
from maskx import __version__
from maskx.core.command_line import ended_in_one_line

__all__ = ["VERBS", "main", "parse"]

# In the order of the work. A help text names all, so what they do stands here.
VERBS = {
    "check": "say what an annotation file holds, what is wrong with it, and what learns from it",
    "train": "train one of the five systems on own data, or on generated scenes",
    "predict": "predict images, folders and videos with a trained run",
    "complete": "give objects with boxes alone masks, by a trained run or a teacher",
    "report": "write a page of what a training gave: curves, measures, best and worst images",
    "serve": "try a trained run on a local page: drop a photograph, see its masks",
    "export": "bring annotations into the format of another tool, such as CVAT or YOLO",
    "export-model": "write a trained run as one file: as a program, or with a model card",
}

_DESCRIPTION = """\
Segmentation from uneven labels: masks for some categories, boxes or tags for the others.

Each verb explains itself: maskx VERB --help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: words behind `maskx`; None for those of this process.

    Returns:
        The exit status.
    """
    with ended_in_one_line():
        given = parse(sys.argv[1:] if arguments is None else arguments)
        run = vars(given).pop("run")
        return run(given) or 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; ``run`` of what it returns does what the verb says.

    Only the module of the verb is imported. Options of a settings file stand before the others.
    """
    parser = argparse.ArgumentParser(
        prog="maskx",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"maskx {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb, summary in VERBS.items():
        if list(words[:1]) != [verb]:
            verbs.add_parser(verb, help=summary)
            continue
        module = importlib.import_module(f"maskx.cli.{verb.replace('-', '_')}")
        own = verbs.add_parser(
            verb,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(own)
        own.set_defaults(run=module.run)
    given = parser.parse_args(list(words))
    if getattr(given, "settings", None) is None:
        return given
    from maskx.cli.settings_file import words_of_settings

    verb, *own_words = words
    return parser.parse_args([verb, *words_of_settings(given.settings), *own_words])
