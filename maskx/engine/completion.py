"""Masks for the objects of an annotation file that have boxes alone, label maps for tags alone.

Objects are segmented in the boxes they have: by a trained model, by a teacher, or by both. What a
person drew stays as it is, to the letter.
"""

import contextlib
import functools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pycocotools import mask as mask_api
from tqdm import tqdm

from maskx.core.digests import digest_of, sha256_of
from maskx.core.files import written_whole
from maskx.core.processes import run_jobs
from maskx.core.text import listed
from maskx.data.coco import CocoData, load_coco
from maskx.data.coco_shapes import SOURCE_KEY
from maskx.data.images import read_record_image
from maskx.data.json_edits import edited, rows, with_members
from maskx.data.json_files import paused_collector, read_json
from maskx.data.label_maps import has_pixels, moved_label_maps
from maskx.data.masks import run_lengths
from maskx.data.splits import resolve_split
from maskx.engine.label_map_completion import (
    CompletedLabelMaps,
    complete_label_maps,
    images_with_tags,
    label_map_folder,
)
from maskx.engine.mask_sources import (
    FoundMask,
    MaskSource,
    NoMask,
    RunSource,
    Teacher,
    source_name,
)
from maskx.engine.predictor import Predictor, open_run
from maskx.engine.runs import Run, read_run
from maskx.evaluation.calibration import MIN_MASKS, cross_validated, fit_calibration

__all__ = ["Completed", "Completion", "CompletionOptions", "complete"]

logger = logging.getLogger(__name__)

# Masks whose truth is known that a calibration is made of; more say little more.
_MOST_KNOWN = 500

# Of an image, as of an annotation: what made its label map, and the mean IoU to be expected.
_MAP_SOURCE_KEY, _MAP_QUALITY_KEY = "label_map_source", "label_map_quality"

Source = tuple[str, str]  # file and image folder


@dataclass(frozen=True)
class CompletionOptions:
    """What to complete, and by what.

    Attributes:
        data: annotation file and image folder.
        output: file to write.
        run: run folder of a model that segments given boxes, or makes label maps of images.
        teacher: ``grabcut``, ``u2netp`` or ``module:callable``, see
            :func:`maskx.engine.mask_sources.load_teacher`; besides a run or instead of one.
        agree: least IoU of the masks of run and teacher; where they agree less, there is no mask.
        min_quality: masks of a lower quality are left out.
        withhold: category split, see :func:`maskx.data.splits.resolve_split`: masks of its
            categories without masks (B) are replaced, and compared with what replaces them.
        again: replace masks of an earlier completion too.
        calibrate: annotation file and image folder with masks that the run was not trained on.
        skip_bad: leave bad annotations as they are, counted, instead of stopping at them.
        workers: processes of the teacher.
        device: of the run: ``auto``, ``cpu`` or ``cuda``.
        overwrite: replace an output that exists.
    """

    data: Source
    output: Path
    run: Path | None = None
    teacher: str | None = None
    agree: float | None = None
    min_quality: float = 0.0
    withhold: str | None = None
    again: bool = False
    calibrate: Source | None = None
    skip_bad: bool = False
    workers: int = 1
    device: str = "auto"
    overwrite: bool = False


@dataclass(frozen=True)
class Completed:
    """An object that was to get a mask, or whose mask is known and shows how good masks are.

    Attributes:
        annotation_id: in its file.
        image_id: likewise.
        file_name: of its image, whole path.
        box: XYXY in pixels.
        class_name: its category.
        found: the mask, or why there is none.
        source: what made it.
        quality: from 0 to 1; of a known one by a calibration that did not see its image.
        iou: with the true mask, where that is known.
    """

    annotation_id: int | str
    image_id: int | str
    file_name: str
    box: tuple[float, ...]
    class_name: str
    found: FoundMask | NoMask
    source: str = ""
    quality: float = 0.0
    iou: float | None = None


@dataclass(frozen=True)
class Completion:
    """What was done.

    Attributes:
        objects: that were to get a mask.
        known: whose masks the qualities were calibrated on, or could not be, as too few.
        calibrated: names of the sources whose qualities are calibrated.
        failures: what is broken, by file name of the image.
        num_drawn: masks of people that stay.
        label_maps: of images with tags alone.
    """

    objects: Sequence[Completed]
    known: Sequence[Completed]
    calibrated: Sequence[str]
    failures: Mapping[str, str]
    num_drawn: int
    label_maps: CompletedLabelMaps = field(default_factory=CompletedLabelMaps)

    @property
    def masks(self) -> list[Completed]:
        """Objects that got a mask, the worst first; of one quality, by the score of the source."""
        found = [each for each in self.objects if isinstance(each.found, FoundMask)]
        return sorted(found, key=lambda each: (each.quality, each.found.score))

    @property
    def reasons(self) -> Counter[str]:
        """Why the others have none."""
        return Counter(o.found.reason for o in self.objects if isinstance(o.found, NoMask))


@dataclass(frozen=True)
class _Object:
    """A box to segment; of some the true mask is known."""

    key: str
    annotation: Mapping[str, Any]
    class_name: str
    is_asked_for: bool
    truth: Any = None


@dataclass
class _Image:
    record: Mapping[str, Any]
    objects: list[_Object] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    """An image and its boxes, as other processes get them."""

    record: Mapping[str, Any]
    keys: list[str]
    boxes: np.ndarray
    names: list[str]
    teacher: str | None = None


def complete(options: CompletionOptions) -> Completion:
    """Write a copy of an annotation file in which objects with boxes alone have masks.

    An annotation gets ``segmentation`` (run lengths), ``area``, ``segmentation_source`` and
    ``segmentation_quality``; every other character of the file stays. Crowd regions get no mask.
    Finished images are kept in ``<output>.<source>.partial.jsonl``: the same call goes on from
    there after an interruption.

    Args:
        options: what to do.

    Raises:
        FileNotFoundError: a file or folder is missing.
        FileExistsError: the output exists.
        ValueError: an option, an annotation or the run cannot be used; the message says why.
    """
    _check(options)
    run = None if options.run is None else read_run(options.run)
    predictor = None if run is None else open_run(options.run, options.device)
    sources = _box_sources(options, predictor)
    data = load_coco(*options.data, strict=not options.skip_bad)
    text = _text_of(data)
    raw = _read_raw(text)
    todo = _objects_of(data, options, raw)
    calibrate = None
    if options.calibrate is not None:
        calibrate = load_coco(*options.calibrate, strict=not options.skip_bad)
    known = _known_objects(calibrate, data, run, raw, todo)
    if not sources:
        if todo:
            logger.warning(
                "%d objects keep their boxes alone: %s makes label maps of images. A teacher, or a "
                "run of Mask^X R-CNN, makes masks in boxes.",
                len(todo),
                predictor.system.title,
            )
        todo, known = [], []
    images = _by_image([*todo, *known])
    found = {}
    for part, source in sources.items():
        workers = options.workers if isinstance(source, Teacher) else 1
        path = options.output.with_name(f"{options.output.name}.{part}.partial.jsonl")
        found[part] = _ask(source, images, path, options, workers)
    objects, known_ones, calibrated = _judged(options, sources, images, found)
    failures = {**data.lost_images, **(calibrate.lost_images if calibrate else {})}
    failures |= _failures(images, found)
    if predictor is not None and predictor.system.box_masks is None:
        label_maps = complete_label_maps(
            predictor,
            data,
            label_map_folder(options.output),
            known=_known_images([data, *([calibrate] if calibrate else [])], run),
            min_quality=options.min_quality,
        )
        failures |= label_maps.failures
    else:
        reason = "masks are made in boxes alone; a run of class patterns, say, makes label maps"
        count = len(images_with_tags(data))
        label_maps = CompletedLabelMaps(passed_over={reason: count} if count else {})
    completion = Completion(
        objects=objects,
        known=known_ones,
        calibrated=calibrated,
        failures=failures,
        label_maps=label_maps,
        num_drawn=len(raw.with_masks - raw.machine_made - {e.annotation_id for e in objects}),
    )
    _write(options, text, completion)
    for part in sources:
        options.output.with_name(f"{options.output.name}.{part}.partial.jsonl").unlink()
    return completion


def _check(options: CompletionOptions) -> None:
    if options.run is None and options.teacher is None:
        raise ValueError("Nothing makes masks. Name a run folder, or a teacher such as grabcut.")
    if options.agree is not None and (options.run is None or options.teacher is None):
        raise ValueError("agree compares a run with a teacher. Name both, or leave it out.")
    for name in ("agree", "min_quality"):
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}. Allowed: 0 to 1.")
    folder = label_map_folder(output := options.output)
    if folder.exists() and any(folder.iterdir()) and not options.overwrite:
        raise FileExistsError(
            f"{folder} holds label maps already. Add --overwrite to replace them, or name another "
            "output."
        )
    if options.workers < 1:
        raise ValueError(f"workers must be at least 1, got {options.workers}.")
    if output.exists() and os.path.samefile(output, options.data[0]):
        raise ValueError(f"{output} is the annotation file itself. Name another output.")
    if output.exists() and not options.overwrite:
        raise FileExistsError(
            f"{output} exists already. Add --overwrite to replace it, or name another output."
        )
    for source in filter(None, (options.data, options.calibrate)):
        if not Path(source[1]).is_dir():
            raise FileNotFoundError(f"'{source[1]}': there is no such image folder.")


def _box_sources(options: CompletionOptions, predictor: Predictor | None) -> dict[str, MaskSource]:
    sources: dict[str, MaskSource] = {}
    if predictor is not None and predictor.system.box_masks is not None:
        identity = {"weights": sha256_of(predictor.run.weights_file)}
        sources["run"] = RunSource(predictor, options.run, identity)
    elif options.agree is not None:
        raise ValueError(
            f"agree compares masks in boxes, but a run of {predictor.system.title} makes label "
            "maps of images. Leave it out, or give a run of Mask^X R-CNN."
        )
    if options.teacher is not None:
        sources["teacher"] = Teacher(options.teacher)
    return sources


@dataclass(frozen=True)
class _Raw:
    """What the annotations of a file are before anything is mended.

    Attributes:
        own_ids: ids that stand once.
        with_masks: ids of annotations with a mask of any form.
        machine_made: ids of those whose mask an earlier completion made.
        made_label_maps: ids of images whose label map an earlier completion made.
    """

    own_ids: set[Any]
    with_masks: set[Any]
    machine_made: set[Any]
    made_label_maps: set[Any]


def _read_raw(text: str) -> _Raw:
    ids: Counter[Any] = Counter()
    raw = _Raw(set(), set(), set(), set())
    with paused_collector():
        for key, row, *_ in rows(text):
            if key == "images" and isinstance(row, dict) and row.get(_MAP_SOURCE_KEY) is not None:
                raw.made_label_maps.add(row.get("id"))
            if key != "annotations" or not isinstance(row, dict):
                continue
            id_ = row.get("id")
            ids[id_] += 1
            if row.get("segmentation") not in (None, [], [[]]):
                raw.with_masks.add(id_)
                if row.get(SOURCE_KEY) is not None:
                    raw.machine_made.add(id_)
    raw.own_ids.update(id_ for id_, count in ids.items() if count == 1 and id_ is not None)
    return raw


def _text_of(data: CocoData) -> str:
    return data.json_file.read_bytes().decode("utf-8")


def _objects_of(
    data: CocoData, options: CompletionOptions, raw: _Raw
) -> list[tuple[Mapping, _Object]]:
    """Collect the objects to complete, with their records."""
    withheld: set[int] = set()
    if options.withhold is not None:
        split = resolve_split(options.withhold, data.class_names)
        withheld = set(split.indices_without_masks)
    todo, unclear = [], []
    for record in data.records:
        for annotation in record["annotations"]:
            id_, truth = annotation["id"], annotation.get("segmentation")
            is_drawn = id_ in raw.with_masks and id_ not in raw.machine_made
            is_replaced = annotation["class_index"] in withheld or (options.again and not is_drawn)
            if annotation["iscrowd"] or (truth is not None and not is_replaced):
                continue
            if id_ not in raw.own_ids or (truth is None and id_ in raw.with_masks):
                unclear.append(id_)
                continue
            name = data.class_names[annotation["class_index"]]
            truth = truth if is_drawn else None
            todo.append((record, _Object(f"a{id_}", annotation, name, True, truth)))
    if unclear:
        logger.warning(
            "%s: %d annotations have a mask that cannot be used, or no id of their own: %s. They "
            "stay as they are.",
            data.json_file,
            len(unclear),
            listed(unclear),
        )
    return todo


def _known_objects(
    calibrate: CocoData | None,
    data: CocoData,
    run: Run | None,
    raw: _Raw,
    todo: Sequence[tuple[Mapping, _Object]],
) -> list[tuple[Mapping, _Object]]:
    """Choose objects whose masks are known and were not trained on, evenly over the images."""
    asked = {each.annotation["id"] for _, each in todo}
    is_seen = _seen_by(run, data.json_file) if run else lambda record, name: False
    found = _drawn(data, "k", raw.machine_made | asked, is_seen)
    if calibrate is not None:
        is_seen = _seen_by(run, calibrate.json_file) if run else lambda record, name: False
        found += _drawn(calibrate, "c", _read_raw(_text_of(calibrate)).machine_made, is_seen)
    return found[:: -(-len(found) // _MOST_KNOWN) or 1]


def _known_images(
    sources: Sequence[CocoData], run: Run
) -> list[tuple[Mapping[str, Any], Sequence[str]]]:
    """Choose images whose pixels are known and were not trained on, with their class lists."""
    found = []
    for data in sources:
        raw, is_seen = _read_raw(_text_of(data)), _seen_by(run, data.json_file)
        for record in data.records:
            names = [data.class_names[index] for index in record["image_labels"]]
            is_made = record["image_id"] in raw.made_label_maps or any(
                annotation["id"] in raw.machine_made for annotation in record["annotations"]
            )
            is_known = has_pixels(record) and bool(names) and not is_made
            if is_known and not any(is_seen(record, name) for name in names):
                found.append((record, data.class_names))
    return found[:: -(-len(found) // _MOST_KNOWN) or 1]


def _drawn(
    data: CocoData, prefix: str, left_out: set[Any], is_seen: Callable[[Mapping, str], bool]
) -> list[tuple[Mapping, _Object]]:
    found = []
    for record in data.records:
        for annotation in record["annotations"]:
            if (
                "segmentation" not in annotation
                or annotation["iscrowd"]
                or annotation["id"] in left_out
            ):
                continue
            name, key = data.class_names[annotation["class_index"]], f"{prefix}{annotation['id']}"
            if not is_seen(record, name):
                truth = annotation["segmentation"]
                found.append((record, _Object(key, annotation, name, False, truth)))
    return found


def _seen_by(run: Run, json_file: Path) -> Callable[[Mapping, str], bool]:
    """Say which masks of a file a run was trained on, by its images and their categories."""
    with_masks = set(run.split.with_masks if run.split else run.class_names)
    images: set[str] | None = set()
    for name, origin in run.started_from.items():
        if not name.startswith("annotations") and not name.endswith("json_file"):
            continue
        if origin.sha256 == sha256_of(json_file):
            images = None  # all
            break
        path = run.folder / origin.path
        if not path.is_file():
            logger.warning(
                "The run in '%s' was trained on '%s', which is gone. In the calibration masks of "
                "its images pass for new ones.",
                run.folder,
                origin.path or name,
            )
            continue
        images |= {os.path.basename(i["file_name"]) for i in read_json(path)["images"]}

    def is_seen(record: Mapping[str, Any], class_name: str) -> bool:
        is_of_training = images is None or os.path.basename(record["file_name"]) in images
        return is_of_training and class_name in with_masks

    return is_seen


def _by_image(objects: Sequence[tuple[Mapping, _Object]]) -> list[_Image]:
    images: dict[str, _Image] = {}
    for record, each in objects:
        images.setdefault(record["file_name"], _Image(record)).objects.append(each)
    return list(images.values())


def _ask(
    source: MaskSource,
    images: Sequence[_Image],
    partial: Path,
    options: CompletionOptions,
    workers: int,
) -> dict[str, FoundMask | NoMask]:
    """Ask a source for all masks, by key; what it gave before an interruption is kept."""
    jobs = [
        _Job(
            {key: image.record[key] for key in ("file_name", "height", "width", "image_id")},
            [each.key for each in image.objects],
            np.array([each.annotation["bbox"] for each in image.objects]),
            [each.class_name for each in image.objects],
            options.teacher if workers > 1 else None,
        )
        for image in images
    ]
    header = {
        "source": {"name": source.name, **source.identity},
        "objects": digest_of([[job.keys, job.boxes.tolist(), job.names] for job in jobs]),
        "annotations": sha256_of(options.data[0]),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    function = _ask_teacher if workers > 1 else functools.partial(_ask_image, source)
    with _open_partial(partial, header) as (file, found):
        left = [job for job in jobs if not set(job.keys) <= found.keys()]
        with tqdm(
            total=len(jobs), initial=len(jobs) - len(left), desc=source.name, unit="img"
        ) as bar:
            for entries in run_jobs(function, left, workers):
                file.write(json.dumps(entries).encode("ascii") + b"\n")
                file.flush()
                found |= entries
                bar.update()
    return {key: _from_json(entry) for key, entry in found.items()}


def _ask_teacher(job: _Job) -> dict[str, dict[str, Any]]:
    """As `_ask_image`, in a process of its own."""
    return _ask_image(Teacher(job.teacher), job)


def _ask_image(source: MaskSource, job: _Job) -> dict[str, dict[str, Any]]:
    """Segment the objects of an image; plain values by key."""
    record = job.record
    try:
        image = read_record_image(record, image_format="RGB")
    except (ValueError, OSError) as error:
        found: Sequence[FoundMask | NoMask] = [NoMask(str(error), failed=True)] * len(job.keys)
    else:
        found = source(image, job.boxes, job.names)
    return {key: asdict(each) for key, each in zip(job.keys, found, strict=True)}


def _from_json(entry: Mapping[str, Any]) -> FoundMask | NoMask:
    return FoundMask(**entry) if "score" in entry else NoMask(**entry)


@contextlib.contextmanager
def _open_partial(
    partial: Path, header: dict[str, Any]
) -> Iterator[tuple[BinaryIO, dict[str, Any]]]:
    """Open the file of finished images to append to; also yields what it holds already.

    Its first line is the header, each other one what `_ask_image` made of an image.
    """
    content = partial.read_bytes() if partial.is_file() else b""
    finished = content[: content.rfind(b"\n") + 1]  # a kill may have cut the last line
    try:
        first, *lines = map(json.loads, finished.splitlines() or [json.dumps(header)])
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{partial}, the rest of an interrupted completion, cannot be read ({error}). Delete "
            "it to start again."
        ) from None
    differing = [key for key in header if first.get(key) != header[key]]
    if differing:
        raise ValueError(
            f"{partial} holds masks of an interrupted completion of something else: other "
            f"{listed(differing)}. Delete it to start again, or name another output."
        )
    with partial.open("r+b" if content else "wb") as file:
        file.seek(len(finished))
        if not finished:
            file.write(json.dumps(header).encode("ascii") + b"\n")
        yield file, {key: entry for line in lines for key, entry in line.items()}


def _judged(
    options: CompletionOptions,
    sources: Mapping[str, MaskSource],
    images: Sequence[_Image],
    found: Mapping[str, Mapping[str, FoundMask | NoMask]],
) -> tuple[list[Completed], list[Completed], list[str]]:
    """Choose among the sources and say how good the masks are.

    Returns:
        The objects asked for, those whose masks are known, and the sources that are calibrated.
    """
    names = {part: source.name for part, source in sources.items()}
    first = _better_part(images, found)
    entries = []
    for image in images:
        size = image.record["height"], image.record["width"]
        for each in image.objects:
            of_sources = {part: masks[each.key] for part, masks in found.items()}
            mask, source = _chosen(of_sources, names, first, options.agree)
            truth = None if each.truth is None else run_lengths(each.truth, *size)
            iou = _iou(mask.segmentation, truth) if truth and isinstance(mask, FoundMask) else None
            entry = Completed(
                annotation_id=each.annotation["id"],
                image_id=image.record["image_id"],
                file_name=image.record["file_name"],
                box=tuple(each.annotation["bbox"]),
                class_name=each.class_name,
                found=mask,
                source=source,
                quality=mask.score if isinstance(mask, FoundMask) else 0.0,
                iou=iou,
            )
            entries.append((each.is_asked_for, entry))
    objects = [entry for is_asked_for, entry in entries if is_asked_for]
    known = [
        entry
        for is_asked_for, entry in entries
        if not is_asked_for and isinstance(entry.found, FoundMask)
    ]
    calibrated = []
    for source in sorted({entry.source for entry in known}):
        of_source = [entry for entry in known if entry.source == source]
        groups = [entry.file_name for entry in of_source]
        if len(of_source) < MIN_MASKS or len(set(groups)) < 2:
            continue
        scores, ious = [e.found.score for e in of_source], [e.iou for e in of_source]
        calibration, tested = fit_calibration(scores, ious), cross_validated(scores, ious, groups)
        quality = dict(zip(map(id, of_source), tested.tolist(), strict=True))
        known = [replace(e, quality=quality.get(id(e), e.quality)) for e in known]
        objects = [
            replace(e, quality=float(calibration([e.quality])[0])) if e.source == source else e
            for e in objects
        ]
        calibrated.append(source)
    low = f"the quality is below {options.min_quality:g}"
    objects = [
        replace(e, found=NoMask(low))
        if isinstance(e.found, FoundMask) and e.quality < options.min_quality
        else e
        for e in objects
    ]
    return objects, known, calibrated


def _better_part(
    images: Sequence[_Image], found: Mapping[str, Mapping[str, FoundMask | NoMask]]
) -> str:
    """Find the source whose masks are better where the truth is known; the first, if unknown."""
    ious: dict[str, list[float]] = {part: [] for part in found}
    for image in images:
        size = image.record["height"], image.record["width"]
        for each in image.objects:
            masks = {part: of_source[each.key] for part, of_source in found.items()}
            if each.is_asked_for or not all(isinstance(m, FoundMask) for m in masks.values()):
                continue
            truth = run_lengths(each.truth, *size)
            for part, mask in masks.items():
                ious[part].append(_iou(mask.segmentation, truth))
    if any(len(values) < MIN_MASKS for values in ious.values()):
        return next(iter(ious))
    return max(ious, key=lambda part: sum(ious[part]), default="")


def _chosen(
    found: Mapping[str, FoundMask | NoMask],
    names: Mapping[str, str],
    first: str,
    agree: float | None,
) -> tuple[FoundMask | NoMask, str]:
    """Choose the mask of the first source, or else of the other; two masks vouch for each other."""
    masks = {part: each for part, each in found.items() if isinstance(each, FoundMask)}
    if len(masks) == 2:
        (second,) = masks.keys() - {first}
        mask, iou = masks[first], _iou(masks[first].segmentation, masks[second].segmentation)
        if agree is not None and iou < agree:
            return NoMask(f"the sources agree by less than {agree:g}"), ""
        score = (mask.score + iou) / 2
        return replace(mask, score=score), f"{names[first]}+{names[second]}"
    if masks and agree is None:
        part = next(iter(masks))
        return masks[part], names[part]
    return next(each for each in found.values() if isinstance(each, NoMask)), ""


def _iou(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    return float(mask_api.iou([one], [other], [0])[0, 0])


def _failures(
    images: Sequence[_Image], found: Mapping[str, Mapping[str, FoundMask | NoMask]]
) -> dict[str, str]:
    failures = {}
    for image in images:
        for each in image.objects:
            for masks in found.values():
                entry = masks[each.key]
                if isinstance(entry, NoMask) and entry.failed:
                    failures.setdefault(image.record["file_name"], entry.reason)
    return failures


def _write(options: CompletionOptions, text: str, completion: Completion) -> None:
    """Write the text of the file with the new masks in it."""
    changes: dict[Any, dict[str, Any]] = {}
    for each in completion.masks:
        changes[each.annotation_id] = each.found.annotation_keys(each.source, each.quality)
    folders = Path(options.data[0]).parent, options.output.parent
    edits, says_predicted = [], not completion.label_maps.made
    with paused_collector():
        for key, row, start, end in rows(text):
            if key == "annotations" and isinstance(row, dict):
                change = changes.pop(row.get("id"), {})
            elif key == "images" and isinstance(row, dict):
                change = moved_label_maps(row, *folders)
                if made := completion.label_maps.made.get(row.get("id")):
                    change["label_map_file_name"] = f"{made.path.parent.name}/{made.path.name}"
                    change[_MAP_SOURCE_KEY] = source_name(options.run)
                    change[_MAP_QUALITY_KEY] = round(made.quality, 4)
            elif key == "info" and isinstance(row, dict) and not says_predicted:
                change, says_predicted = {"label_maps": "predicted"}, True
            else:
                continue
            if change:
                edits.append((start, end, with_members(text[start:end], change)))
    if not says_predicted:
        begin = text.index("{") + 1
        edits.insert(0, (begin, begin, '"info": {"label_maps": "predicted"}, '))
    assert not changes, f"annotations {list(changes)[:3]} are not in the file"
    with written_whole(options.output) as scratch:
        scratch.write_bytes(edited(text, edits).encode("utf-8"))
