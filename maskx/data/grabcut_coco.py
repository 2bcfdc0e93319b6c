"""COCO files with GrabCut's masks where true masks are withheld or do not exist."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from tqdm import tqdm

from maskx.core.digests import sha256_of
from maskx.core.files import write_json
from maskx.core.processes import run_jobs
from maskx.data.coco import AnnotationProblem, read_box, read_coco_json
from maskx.data.grabcut import GRABCUT_ITERATIONS, box_pixels, grabcut_mask
from maskx.data.images import read_image
from maskx.data.masks import encode_masks
from maskx.data.splits import resolve_split

__all__ = ["GrabCutSummary", "write_grabcut_json"]

_NUM_EXAMPLES = 5  # bad boxes quoted in an error


@dataclass(frozen=True)
class GrabCutSummary:
    """What :func:`write_grabcut_json` wrote.

    Attributes:
        num_whole_boxes: how many of these masks are the whole box, because GrabCut failed.
    """

    num_masks: int
    num_whole_boxes: int
    num_left_out: int


@dataclass(frozen=True)
class _Job:
    """An image and the boxes to cut in it: XYXY, by the annotation's position in the file."""

    image: dict[str, Any]
    image_root: str
    boxes: dict[str, list[float]]


def write_grabcut_json(
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    split: str | os.PathLike[str] | None = None,
    strict: bool = True,
    workers: int = 1,
    progress: bool = False,
) -> GrabCutSummary:
    """Write a copy of a COCO file in which the annotations of B have GrabCut's masks.

    An annotation of B gets a `segmentation` (RLE) and the `area` of its mask, whatever it had
    before. Annotations of A and crowd regions stay as they are, and so does the rest, but that
    `info` gets the key `grabcut`, which tells what was done, and that `stuff_file_name` is written
    relative to the new file.

    Finished images are kept in `<output>.partial.jsonl`. The same call goes on from there after
    an interruption, and writes the same bytes as if there had been none.

    Args:
        output: file to write; it must not exist.
        split: category split, see :func:`maskx.data.splits.resolve_split`, whose categories
            without masks (B) get GrabCut's; None for all categories.
        strict: whether a bad box in B is an error. If False its annotation is left out, counted.

    Raises:
        ValueError: an annotation, an image, the split or a file in the way cannot be used; the
            message says why.
    """
    json_file, image_root, output = Path(json_file), Path(image_root), Path(output)
    partial = output.with_name(f"{output.name}.partial.jsonl")
    _check_paths(image_root, output, workers)
    dataset = read_coco_json(json_file)
    names = [c["name"] for c in sorted(dataset["categories"], key=lambda c: c["id"])]
    chosen = names if split is None else resolve_split(split, names).without_masks
    jobs, left_out = _make_jobs(dataset, frozenset(chosen), json_file, image_root, strict)

    header = {
        "annotation file": json_file.name,
        "sha256": sha256_of(json_file),
        "categories": list(chosen),
        "iterations": GRABCUT_ITERATIONS,
        "opencv": cv2.__version__,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with _open_partial(partial, header) as (file, masks):
        todo = [job for job in jobs if not job.boxes.keys() <= masks.keys()]
        with tqdm(
            total=len(jobs),
            initial=len(jobs) - len(todo),
            desc="GrabCut",
            unit="img",
            disable=not progress,
        ) as bar:
            for found in run_jobs(_cut_image, todo, workers):
                file.write(json.dumps(found).encode("ascii") + b"\n")
                file.flush()
                masks |= found
                bar.update()

    annotations = [
        annotation | masks.get(str(position), {})
        for position, annotation in enumerate(dataset["annotations"])
        if str(position) not in left_out
    ]
    info = {"split": None if split is None else os.fspath(split), "num_masks": len(masks)} | header
    given = dataset.get("info")  # of any form, as nothing reads it
    dataset["info"] = (given if isinstance(given, dict) else {}) | {"grabcut": info}
    dataset["annotations"] = annotations
    for image in dataset["images"]:
        if "stuff_file_name" in image:  # relative to the JSON file
            stuff = json_file.parent / image["stuff_file_name"]
            image["stuff_file_name"] = Path(os.path.relpath(stuff, output.parent)).as_posix()
    write_json(output, dataset, compact=True)
    partial.unlink()
    return GrabCutSummary(len(masks), _count_whole_boxes(jobs, masks), len(left_out))


def _check_paths(image_root: Path, output: Path, workers: int) -> None:
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    if output.exists():
        raise ValueError(
            f"{output} exists already. Delete it to make it again, or name another output."
        )
    if not image_root.is_dir():
        raise FileNotFoundError(f"{image_root}: there is no such image folder. Check the path.")


def _make_jobs(
    dataset: dict[str, Any], names: frozenset[str], json_file: Path, image_root: Path, strict: bool
) -> tuple[list[_Job], set[str]]:
    """Collect the boxes to cut; also returns the positions of annotations with a bad box."""
    chosen = {c["id"]: c["name"] for c in dataset["categories"] if c["name"] in names}
    jobs = {image["id"]: _Job(image, str(image_root), {}) for image in dataset["images"]}
    problems = {}
    for position, annotation in enumerate(dataset["annotations"]):
        if annotation["category_id"] not in chosen or annotation.get("iscrowd", 0):
            continue
        job, key = jobs[annotation["image_id"]], str(position)
        try:
            job.boxes[key] = read_box(annotation["bbox"], job.image["height"], job.image["width"])
        except AnnotationProblem as problem:
            problems[key] = (
                f"annotation {annotation['id']!r} of image {annotation['image_id']!r}, category "
                f"{chosen[annotation['category_id']]!r}: {problem}"
            )
    if problems and strict:
        more = [f"and {len(problems) - _NUM_EXAMPLES} more"] * (len(problems) > _NUM_EXAMPLES)
        listing = "".join(f"\n  {p}" for p in [*list(problems.values())[:_NUM_EXAMPLES], *more])
        raise ValueError(
            f"{json_file}: has {len(problems)} bad boxes. Fix the file, or leave these annotations "
            f"out, counted (strict=False, --skip-bad):{listing}"
        )
    with_boxes = [job for job in jobs.values() if job.boxes]
    for job in with_boxes:
        name = job.image.get("file_name")
        if not isinstance(name, str) or not (image_root / name).is_file():
            raise FileNotFoundError(
                f"{json_file}: image {job.image['id']!r} has file_name {name!r}, which is no file "
                f"in {image_root}. Check the image folder, or remove the image from the file."
            )
    return with_boxes, set(problems)


@contextlib.contextmanager
def _open_partial(
    partial: Path, header: dict[str, Any]
) -> Iterator[tuple[BinaryIO, dict[str, Any]]]:
    """Open the file of finished images to append to; also yields what it holds already."""
    content = partial.read_bytes() if partial.is_file() else b""
    complete = content[: content.rfind(b"\n") + 1]  # a kill may have cut the last line
    try:
        found, *lines = map(json.loads, complete.splitlines() or [json.dumps(header)])
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{partial}, the rest of an interrupted run, cannot be read ({error}). Delete it to "
            "start again."
        ) from None
    differing = [key for key in header if found.get(key) != header[key]]
    if differing:
        differences = "; ".join(
            f"{key}: {found.get(key)!r:.80}, now {header[key]!r:.80}" for key in differing
        )
        raise ValueError(
            f"{partial} holds masks of an interrupted run with another input ({differences}). "
            "Delete it to start again, or name another output."
        )
    with partial.open("r+b" if content else "wb") as file:
        file.seek(len(complete))
        if not complete:
            file.write(json.dumps(header).encode("ascii") + b"\n")
        yield file, {key: entry for line in lines for key, entry in line.items()}


def _cut_image(job: _Job) -> dict[str, dict[str, Any]]:
    """Make the masks of an image: `segmentation` and `area` by position."""
    record = job.image
    path = os.path.join(job.image_root, record["file_name"])
    image = read_image(path, record["height"], record["width"], record["id"])
    cut = {}
    for key, box in job.boxes.items():
        mask = grabcut_mask(image, box)
        (rle,) = encode_masks(mask[None])
        cut[key] = {"segmentation": rle, "area": int(np.count_nonzero(mask))}
    return cut


def _count_whole_boxes(jobs: list[_Job], masks: dict[str, Any]) -> int:
    count = 0
    for job in jobs:
        for key, box in job.boxes.items():
            x1, y1, x2, y2 = box_pixels(box, int(job.image["height"]), int(job.image["width"]))
            count += masks[key]["area"] == (x2 - x1) * (y2 - y1)
    return count
