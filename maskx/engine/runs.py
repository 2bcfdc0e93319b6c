"""What a run folder says of itself: ``run.json``, of every system and on both hosts.

It names the system, the class list, the categories with masks, all settings, and by digest what
the run started from. A run that goes on must be the same run, and a predictor is built from it.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskx.core.digests import sha256_of
from maskx.core.files import read_json, write_json
from maskx.core.tensor_files import read_content
from maskx.core.text import listed
from maskx.data.coco import CocoData
from maskx.supervision import CategorySplit, split_one_side

RUN_NAME = "run.json"
MODEL_FILE_SUFFIX, MODEL_FILE_KIND = ".safetensors", "a trained model of maskx"
"""Of what :func:`maskx.engine.model_files.write_model_file` writes."""
_FORMAT = 1
_LINK = "run"


@dataclass(frozen=True)
class Origin:
    """Something a run started from. Its content decides; the path says where it was.

    Attributes:
        sha256: digest of the file, or of what was in memory.
        path: of the file, absolute or from the run folder; empty where it is none.
    """

    sha256: str
    path: str = ""


@dataclass(frozen=True)
class Run:
    """What a run is.

    Attributes:
        system: its registered name.
        host: ``pip`` or ``detectron2``.
        settings: plain values that the model and its training are made of, nested by part.
        split: which classes have masks in training; None where that is no matter of classes.
        started_from: files and weights by what they are for, such as ``annotations``.
        weights: file name of the trained weights.
        results: what the evaluation at its end measured; None until it is finished.
        seconds: of all sessions so far that were not killed.
    """

    system: str
    host: str
    class_names: tuple[str, ...]
    settings: Mapping[str, Any]
    split: CategorySplit | None = None
    started_from: Mapping[str, Origin] = field(default_factory=dict)
    weights: str = "checkpoint.pth"
    results: Mapping[str, Any] | None = None
    seconds: float = 0.0
    version: str = ""
    folder: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        # As in the file: tuples become lists, and keys strings.
        object.__setattr__(self, "settings", json.loads(json.dumps(self.settings)))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if not self.version:
            from maskx import __version__

            object.__setattr__(self, "version", __version__)

    @property
    def weights_file(self) -> Path:
        """The trained weights."""
        path = self._folder / self.weights
        if not path.is_file():
            raise FileNotFoundError(
                f"'{path}': there are no weights of the run yet, or they were moved. Let it "
                "train to its end, or copy its whole folder."
            )
        return path

    def file(self, name: str) -> Path:
        """A file that the run started from and still needs, such as a word table.

        Raises:
            FileNotFoundError: it is gone, as when the folder was copied without it.
            ValueError: it has changed since, or the run has no such file.
        """
        if name not in self.started_from:
            known = listed(self.started_from) or "nothing"
            raise ValueError(
                f"The run in '{self.folder}' says nothing of {name!r}, but of {known}."
            )
        origin = self.started_from[name]
        path = self._folder / origin.path  # an absolute one stays as it is
        if not path.is_file():
            raise FileNotFoundError(
                f"The run in '{self.folder}' needs its {name}, which was '{path}' and is gone. "
                f"Copy that file too, or set its path in {RUN_NAME}."
            )
        if sha256_of(path) != origin.sha256:
            raise ValueError(
                f"'{path}' has changed since the run in '{self.folder}' started from it as its "
                f"{name}. Restore it, or train anew."
            )
        return path

    @property
    def _folder(self) -> Path:
        if self.folder is None:
            raise ValueError("This run was not read from a folder. Read it with read_run.")
        return self.folder

    def as_json(self) -> dict[str, Any]:
        """Everything but the folder, as plain values."""
        content = {name.name: getattr(self, name.name) for name in dataclasses.fields(self)}
        del content["folder"]
        content["class_names"] = list(self.class_names)
        content["started_from"] = {k: dataclasses.asdict(o) for k, o in self.started_from.items()}
        if self.split is not None:
            content["split"] = {"name": self.split.name, "with_masks": list(self.split.with_masks)}
            if self.split.class_names != self.class_names:
                content["split"]["class_names"] = list(self.split.class_names)
        return {"format": _FORMAT, **content}

    @classmethod
    def from_json(cls, content: Any, source: str | os.PathLike[str]) -> "Run":
        """Make a run of what :meth:`as_json` gave."""
        found = content.get("format") if isinstance(content, dict) else None
        if not isinstance(found, int):
            raise ValueError(f"'{source}' does not describe a run of maskx. Give a run folder.")
        if found != _FORMAT:
            raise ValueError(
                f"'{source}' is in form {found}, written by maskx {content.get('version')}, but "
                f"this version reads form {_FORMAT}. Use the version that made it, or train anew."
            )
        known = {name.name for name in dataclasses.fields(cls)} - {"folder"}
        values = {name: value for name, value in content.items() if name in known}
        try:
            for key, kind in (("system", str), ("host", str), ("weights", str), ("settings", dict)):
                if not isinstance(values[key], kind):
                    raise TypeError(f"{key} is {values[key]!r}")
            names = tuple(map(str, values["class_names"]))
            values["class_names"] = names
            values["started_from"] = {k: Origin(**o) for k, o in values["started_from"].items()}
            split = values["split"]
            if split is not None:
                values["split"] = split_one_side(
                    split["name"],
                    tuple(split.get("class_names", names)),
                    with_masks=tuple(split["with_masks"]),
                )
            return cls(**values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"'{source}' is no whole description of a run ({type(error).__name__}: {error}). "
                "Restore it, or train anew."
            ) from error


def write_run(folder: str | os.PathLike[str], run: Run) -> None:
    """Write ``run.json`` into a run folder, whole or not at all."""
    write_json(Path(folder) / RUN_NAME, run.as_json())


def link_run(folder: str | os.PathLike[str], run_folder: str) -> None:
    """Say in the folder of a chain of runs which of them is its result."""
    write_json(Path(folder) / RUN_NAME, {"format": _FORMAT, _LINK: run_folder})


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read what a run folder, the folder of a chain of runs, or a model file says of itself."""
    folder = Path(folder)
    path = folder / RUN_NAME
    if folder.is_file():
        content = read_content(folder, MODEL_FILE_KIND, {"run": dict})["run"]
        run = Run.from_json(content, folder)
        return dataclasses.replace(run, folder=folder.parent, weights=folder.name)
    if not folder.is_dir():
        raise FileNotFoundError(f"'{folder}': there is no such run folder.")
    if not path.is_file():
        inside = sorted(found.parent.name for found in folder.glob(f"*/{RUN_NAME}"))
        hint = f" Runs are in its folders {listed(inside)}." if inside else ""
        raise FileNotFoundError(
            f"'{folder}' has no {RUN_NAME}, so it is no run folder of maskx, or of a version "
            f"before there was one.{hint} Give the output folder of a training."
        )
    content = read_json(path)
    linked = content.get(_LINK) if isinstance(content, dict) else None
    if isinstance(linked, str):
        if Path(linked).name != linked or not (folder / linked).is_dir():
            raise FileNotFoundError(
                f"'{path}' names the run '{linked}', which is not in '{folder}'. Copy the whole "
                "folder, or give the folder of the run itself."
            )
        return read_run(folder / linked)
    return dataclasses.replace(Run.from_json(content, path), folder=folder)


def origin_of(path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> Origin:
    """Describe a file that a run starts from.

    Args:
        path: a file, or the name of something that is none, which then stands for itself.
        folder: of the run; a file in it or beside it is found again when both are moved.
    """
    path = Path(path)
    if not path.is_file():
        return Origin(str(path))
    shown = str(path.resolve())
    if folder is not None and path.resolve().is_relative_to(Path(folder).resolve().parent):
        shown = os.path.relpath(path.resolve(), Path(folder).resolve())
    return Origin(sha256_of(path), shown)


def origins_of_data(data: CocoData, folder: str | os.PathLike[str]) -> dict[str, Origin]:
    """Describe the annotation files that a run learns from: ``annotations`` and any further."""
    files = (data.json_file, *data.more_files)
    names = ("annotations", *(f"annotations {n}" for n in range(2, len(files) + 1)))
    return {name: origin_of(file, folder) for name, file in zip(names, files, strict=True)}


def check_same_run(
    then: Run,
    now: Run,
    *,
    source: str | os.PathLike[str],
    free: Collection[str] = (),
    settings: bool = True,
) -> None:
    """Refuse to go on with a run that is another one.

    Args:
        free: dotted names of settings that do not change what is learned, and of those above them.
    """
    started = f"the run in '{source}' was started"
    found = next(_differences(then, now, free if settings else None, started), None)
    if found is not None:
        raise ValueError(
            f"{found} Undo the change, choose another output folder, or remove that one to start "
            "anew."
        )


def _differences(then: Run, now: Run, free: Collection[str] | None, started: str) -> Iterator[str]:
    def changed(key: str, old: Any, new: Any) -> str:
        return f"{key} is {_shortened(new)}, but {started} with {_shortened(old)}."

    for key in ("system", "host"):
        if getattr(then, key) != getattr(now, key):
            yield changed(key, getattr(then, key), getattr(now, key))
    if then.class_names != now.class_names:
        pairs = itertools.zip_longest(then.class_names, now.class_names)
        index, names = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        yield changed(f"class {index}", *names)
    old, new = (set(run.split.with_masks if run.split else ()) for run in (then, now))
    if old != new:
        name = now.split.name if now.split else None
        changes = (("more", new - old), ("no more", old - new))
        said = ", ".join(f"{word} {listed(names)}" for word, names in changes if names)
        yield (
            f"The split {name!r} has other categories with masks (A) than {started} with, which "
            f"had {listed(old) or 'none'}: {said}."
        )
    if free is not None:
        other = settings_difference(then.settings, now.settings, free)
        if other is not None:
            yield changed(*other)
    for name in sorted(then.started_from.keys() | now.started_from.keys()):
        before, after = then.started_from.get(name), now.started_from.get(name)
        if getattr(before, "sha256", None) != getattr(after, "sha256", None):
            path = (after.path or after.sha256) if after else "nothing"
            yield f"{name} '{path}' is not what {started} from: other content, or another file."


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def settings_difference(
    then: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()
) -> tuple[str, Any, Any] | None:
    """Find the first setting that two runs have otherwise.

    Args:
        free: dotted names that may differ, and of those above them.

    Returns:
        The dotted name and its two values, or None.
    """
    old, new = flat_settings(then), flat_settings(now)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not is_below(key, free):
            return key, old.get(key), new.get(key)
    return None


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested settings into one dict by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        is_node = isinstance(value, Mapping)
        flat |= flat_settings(value, f"{prefix}{key}.") if is_node else {f"{prefix}{key}": value}
    return flat


def is_below(key: str, names: Collection[str]) -> bool:
    """Whether a dotted name is one of some, or below one of them."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


class RunState:
    """The run as a part of its checkpoints, for checkpointers that keep parts by name.

    To load it checks that the checkpoint is of the same run.
    """

    def __init__(
        self,
        run: Run,
        *,
        source: str | os.PathLike[str],
        free: Collection[str] = (),
        settings: bool = True,
    ) -> None:
        self.run, self.source, self.free, self.settings = run, source, free, settings

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return self.run.as_json()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check what a checkpoint says."""
        then = Run.from_json(state, self.source)
        check_same_run(then, self.run, source=self.source, free=self.free, settings=self.settings)
