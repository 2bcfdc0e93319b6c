"""Options of `maskx train` in a YAML file: read as words of a command line, and written of a run.

The file is a mapping of long option names to values, such as ``coco-train: [train.json, train]``.
"""

import argparse
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from maskx.cli.train import add_arguments
from maskx.core.files import parse_yaml, written_text
from maskx.core.text import listed

__all__ = ["SETTINGS_NAME", "words_of_settings", "write_settings"]

SETTINGS_NAME = "settings.yaml"
"""In a run folder."""

# What the words of an option that are paths are called in its help text.
_PATHS = {"DATA", "FILE", "IMAGES", "JSON", "LIST", "RUN"}
_NAME_OR_PATH = "SPLIT"
# What is asked of one command, not of a training.
_OF_ONE_COMMAND = {"help", "settings", "resume", "overwrite"}


class _Options(argparse.ArgumentParser):
    """Knows its options by name; what is wrong with a value is raised."""

    def __init__(self) -> None:
        self.by_name: dict[str, argparse.Action] = {}
        super().__init__(add_help=False)
        add_arguments(self)

    def add_argument(self, *flags: str, **options: Any) -> argparse.Action:
        action = super().add_argument(*flags, **options)
        name = flags[-1].removeprefix("--")
        if name not in _OF_ONE_COMMAND:
            self.by_name[name] = action
        return action

    def error(self, message: str) -> None:
        raise ValueError(message)


def words_of_settings(file: Path) -> list[str]:
    """Read a settings file as words of a command line.

    Args:
        file: YAML; its relative paths count from its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be used; the message names the line and what is allowed.
    """
    options = _Options()
    words = []
    for key, node in _entries(file):
        where = f"'{file}', line {key.start_mark.line + 1}"
        if key.value not in options.by_name:
            close = difflib.get_close_matches(str(key.value), options.by_name, n=1, cutoff=0.5)
            hint = f"Did you mean {close[0]!r}?" if close else "`maskx train --help` has all."
            raise ValueError(
                f"{where}: there is no option {key.value!r:.80} for a settings file. {hint}"
            )
        try:
            given = _words(key.value, options.by_name[key.value], node)
            options.parse_args(given)
        except ValueError as error:
            raise ValueError(f"{where}: {error}. Correct the value.") from error
        action = options.by_name[key.value]
        words += [*given[:1], *(_from_file(file, action, word) for word in given[1:])]
    return words


def write_settings(folder: Path, options: Mapping[str, Any]) -> None:
    """Write the options of a run into its folder, as a settings file that gives them again.

    Args:
        options: of the command line, with the defaults, by their names in Python.
    """
    content: dict[str, Any] = {}
    for name, action in _Options().by_name.items():
        value = options[action.dest]
        if action.nargs == 0:  # a flag; `pretrained` shares its place with a file
            content |= {name: True} if value is True else {}
        elif value is not None and value is not False and value is not True:
            words = [value] if action.nargs is None else value
            words = [_whole(action, word) for word in words]
            content[name] = words[0] if action.nargs is None else words
    content["output"] = "."
    with written_text(folder / SETTINGS_NAME) as file:
        file.write("# Repeat this run: maskx train --settings THIS_FILE --output ANOTHER_FOLDER\n")
        yaml.safe_dump(content, file, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _entries(file: Path) -> list[tuple[yaml.Node, yaml.Node]]:
    if not file.is_file():
        raise FileNotFoundError(f"There is no settings file '{file}'. Correct --settings.")
    try:
        text = file.read_text(encoding="utf-8")
        parse_yaml(text)  # which finds keys that stand twice
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        cause = " ".join(str(error).split()).replace('in "<unicode string>", ', "")
        raise ValueError(
            f"The settings file '{file}' is no plain YAML: {cause}. Correct it."
        ) from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(
            f"The settings file '{file}' is no mapping of options to values. Give lines such as "
            "'iterations: 400'."
        )
    return root.value


def _words(name: str, action: argparse.Action, node: yaml.Node) -> list[str]:
    """Return the words that a person would type."""
    many = action.nargs not in (0, None)
    nodes = node.value if many and isinstance(node, yaml.SequenceNode) else [node]
    kinds = [each.tag.rpartition(":")[2] for each in nodes]
    if action.nargs == 0:
        if kinds != ["bool"]:
            raise ValueError(f"{name} takes true or false")
        return [f"--{name}"] * parse_yaml(node.value)
    if wrong := set(kinds) & {"bool", "null", "map", "seq"}:
        takes = f"a list of {listed(action.metavar)}" if many else "one value"
        raise ValueError(f"{name} takes {takes}, found {min(wrong)}")
    return [f"--{name}", *(each.value for each in nodes)]


def _from_file(file: Path, action: argparse.Action, word: str) -> str:
    """Let a path count from the folder of the file."""
    path = file.parent / Path(word).expanduser()
    return str(path) if _is_path(action, path) else word


def _whole(action: argparse.Action, word: Any) -> Any:
    """Return a path from the root, so that it is found from any folder."""
    return os.path.abspath(word) if _is_path(action, word) else word


def _is_path(action: argparse.Action, word: Any) -> bool:
    """Whether a word is a path; what may be a name too is one where there is such a file."""
    named = [action.metavar] if isinstance(action.metavar, str) else action.metavar or ()
    if _NAME_OR_PATH in named:
        return Path(word).is_file()
    return action.type is Path or not _PATHS.isdisjoint(named)
