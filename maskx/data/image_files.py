"""Where the image files of an annotation file lie, and whether they are whole."""

import difflib
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from maskx.data.images import problem_of_file

if TYPE_CHECKING:
    from maskx.data.coco_structure import Report

__all__ = ["find_images"]

_NUM_THREADS = 16  # they wait for the disk
_NUM_NAMED = 20  # missing files in an error
_NUM_NEAR = 5  # missing files of which a similar one is looked for


def find_images(
    records: list[dict[str, Any]], image_root: Path, report: "Report"
) -> list[dict[str, Any]]:
    """Check that the files of records exist and are whole, and correct paths as tools write them.

    Backslashes, `%20`, other Unicode forms, another case of the ending and the prefixes of Label
    Studio are found where exactly one file is meant.

    Args:
        records: With `file_name` below the root and perhaps `label_map_file_name` and
            `sem_seg_file_name`; their paths are corrected in place.

    Returns:
        The records whose image is there; all, if the report only collects.

    Raises:
        FileNotFoundError: The root or all images are missing; with strict reading, any file.
        ValueError: No image is whole; with strict reading, any is not.
    """
    if not image_root.is_dir():
        if not report.collect:
            raise FileNotFoundError(
                f"{image_root}: there is no such image folder, but {report.source} names "
                f"{len(records)} images in it. Check the path."
            )
        found = (
            f"the image folder {image_root} does not exist; {len(records)} images are to be in it"
        )
        report.refuse("no_image_folder", found, "Check the path")
        return records
    folders = _Folders()
    missing = [record for record in records if not os.path.isfile(record["file_name"])]
    lost, used = [], None
    for record in missing:
        given = record["file_name"]
        path = _find(given, image_root, folders)
        if path is not None:
            used = used or {record["file_name"] for record in records}
        if path is None or path in used:
            lost.append(record)
            continue
        used.add(path)
        record["file_name"] = path
        report.note("image path as a tool writes it", given)
    parts = [
        (record, key)
        for record in records
        for key in ("sem_seg_file_name", "label_map_file_name")
        if key in record and not os.path.isfile(record[key])
    ]
    if not report.collect and (report.strict or len(lost) == len(records)):
        _refuse_missing(records, lost, parts, image_root, report, folders)
    for record, key in parts:
        report.entry("label_map_missing", f"{record.pop(key)} does not exist", "Restore it")
    for index, record in enumerate(lost):
        near = _near(record["file_name"], image_root, folders) if index < _NUM_NEAR else ""
        report.lost_file(
            "image_missing",
            "image",
            record["file_name"],
            f"does not exist{f', but {near} does' if near else ''}",
            "Check the image folder, correct the names, or remove these images from the file",
        )
    gone = {id(record) for record in lost}
    found = [record for record in records if id(record) not in gone]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        problems = list(pool.map(_problem_of, found))
    broken = [(record, why) for record, why in zip(found, problems, strict=True) if why]
    if len(broken) == len(found) > 0 and not report.collect:
        raise ValueError(
            f"{report.source}: none of its {len(found)} images is whole; the first, "
            f"{found[0]['file_name']}, {problems[0][1]}. Restore them, or correct the annotation "
            "file."
        )
    for record, (kind, problem, remedy) in broken:
        report.lost_file(kind, "image", record["file_name"], problem, remedy)
        gone.add(id(record))
    return [record for record in records if report.collect or id(record) not in gone]


def _problem_of(record: Mapping[str, Any]) -> tuple[str, str, str] | None:
    return problem_of_file(record["file_name"], record["height"], record["width"])


def _refuse_missing(
    records: list[dict[str, Any]],
    lost: list[dict[str, Any]],
    parts: list[tuple[dict[str, Any], str]],
    image_root: Path,
    report: "Report",
    folders: "_Folders",
) -> None:
    missing = [record["file_name"] for record in lost] + [record[key] for record, key in parts]
    if not missing:
        return
    keys = ("file_name", "sem_seg_file_name", "label_map_file_name")
    number = sum(key in record for record in records for key in keys)
    near = _near(missing[0], image_root, folders) if lost else ""
    skip = "leave them out, counted, with strict=False (--skip-bad)"
    names = "".join(f"\n  {name}" for name in missing[1:_NUM_NAMED])
    more = len(missing) - _NUM_NAMED
    names += f"\n  and {more} more" if more > 0 else ""
    raise FileNotFoundError(
        f"{report.source}: {len(missing)} of {number} files named do not exist, the first is "
        f"{missing[0]}{f', but {near} does' if near else ''}. Check the image root {image_root} "
        "or, for label maps, the folder of the annotation file; or remove these images from the "
        f"annotation file{f', or {skip}' if len(lost) < len(records) else ''}."
        f"{f' The others:{names}' if names else ''}"
    )


class _Folders:
    """The files of folders by their names without case and Unicode form, listed once."""

    def __init__(self) -> None:
        self._known: dict[str, Mapping[str, list[str]]] = {}

    def names(self, folder: str) -> Mapping[str, list[str]]:
        if folder not in self._known:
            found: dict[str, list[str]] = {}
            if os.path.isdir(folder):
                for name in os.listdir(folder):
                    found.setdefault(_plain(name), []).append(name)
            self._known[folder] = found
        return self._known[folder]


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _find(path: str, image_root: Path, folders: _Folders) -> str | None:
    """Return the one file that a path as of a tool stands for, or None."""
    given = os.path.relpath(path, image_root) if path.startswith(str(image_root)) else path
    if "://" in given:
        return None
    for name in _spellings(given):
        for below in _below(name, whole=name == given):
            folder = os.path.join(image_root, os.path.dirname(below))
            exact = os.path.join(image_root, below)
            if os.path.isfile(exact):
                return exact
            same = folders.names(folder).get(_plain(os.path.basename(below)), [])
            if len(same) == 1:
                return os.path.join(folder, same[0])
    return None


def _spellings(name: str) -> Iterator[str]:
    yield name
    local = re.search(r"[?&]d=([^&]+)", name)  # local files of Label Studio
    plain = unquote(local.group(1) if local else name).replace("\\", "/")
    if plain != name:
        yield plain


def _below(name: str, *, whole: bool) -> Iterator[str]:
    """Give a path and, if a tool wrote its beginning for another folder, what is left of it."""
    is_absolute = name.startswith("/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if any(part == ".." for part in parts):
        return
    last = 1 if whole and not is_absolute else len(parts)
    for start in range(last):
        yield "/".join(parts[start:])


def _near(path: str, image_root: Path, folders: _Folders) -> str:
    """Return a file that is there and may be meant, or nothing."""
    name = os.path.basename(unquote(path).replace("\\", "/"))
    for folder in dict.fromkeys((os.path.dirname(path), str(image_root))):
        names = [n for group in folders.names(folder).values() for n in group]
        same_stem = [n for n in names if os.path.splitext(n)[0] == os.path.splitext(name)[0]]
        close = same_stem or difflib.get_close_matches(name, names[:10_000], n=1, cutoff=0.8)
        if close:
            return os.path.join(folder, close[0])
    return ""
