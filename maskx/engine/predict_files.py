"""Predictions of image files and videos: pictures, label maps, and one COCO file of all."""

import contextlib
import glob
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from maskx.core.files import write_json
from maskx.data.images import read_rgb
from maskx.data.label_maps import write_label_map
from maskx.data.voc_results import VocResults
from maskx.engine.predictor import Predictor
from maskx.engine.results import Prediction
from maskx.engine.tiles import predict_tiles
from maskx.evaluation.figures import save_png

__all__ = ["Predicted", "find_inputs", "predict_files"]

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")

RESULTS_NAME = "predictions.json"
_LABEL_MAPS = "label_maps"
_SMALLEST_TILE = 32
_SMALLEST, _LARGEST = 400, 1600  # pixels of the longer side of a picture
_FRAMES_PER_SECOND = 25.0  # of a video that does not say


@dataclass
class Predicted:
    """What was written.

    Attributes:
        images: entries of the COCO file; frames of a video have ``frame``, from 0.
        annotations: likewise, each with a ``score``.
        failures: what could not be read, and why.
        files: pictures and videos.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def find_inputs(words: Iterable[str]) -> list[Path | int]:
    """Find images and videos: files, all of those in folders, and patterns such as ``*.jpg``.

    A number is that of a camera, unless a file or folder is called so.

    Raises:
        FileNotFoundError: a word stands for nothing.
    """
    found: dict[Path | int, None] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            paths = sorted(p for p in path.iterdir() if _is_media(p))
        elif path.exists():
            paths = [path]
        elif word.isascii() and word.isdigit():
            paths = [int(word)]
        else:  # a shell hands a pattern on when it fits nothing, and on Windows always
            paths = sorted(map(Path, glob.glob(word, recursive=True)))
            paths = [p for p in paths if p.is_file()]
        if not paths:
            what = "a folder without images or videos" if path.is_dir() else "no file and no folder"
            raise FileNotFoundError(
                f"'{word}' is {what}. Images end in {', '.join(IMAGE_ENDINGS)}, videos in "
                f"{', '.join(VIDEO_ENDINGS)}; a camera is a number, such as 0."
            )
        found |= dict.fromkeys(paths)
    return list(found)


def predict_files(
    predictor: Predictor,
    inputs: Sequence[Path | int],
    output: Path,
    *,
    source: str,
    threshold: float = 0.5,
    batch_size: int = 1,
    tile: int | None = None,
    pictures: bool = True,
    voc_results: bool = False,
    asked: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Predicted:
    """Predict images and videos and write what is found.

    The folder gets ``predictions.json``, COCO's format with all images, and by input a picture
    ``NAME.png`` or a video ``NAME.mp4``; label maps are in ``label_maps``. A file that cannot be
    read is named, and the rest goes on. A camera is predicted until a KeyboardInterrupt, which ends
    it alone.

    Args:
        predictor: of any system.
        inputs: of :func:`find_inputs`.
        output: folder to write to; it is made when there is something to write.
        source: what the masks say that made them, see
            :func:`maskx.engine.mask_sources.source_name`.
        threshold: least score of an instance.
        batch_size: images, frames or tiles that are predicted at a time, if they have one shape.
        tile: side of the tiles that larger images are predicted in, see
            :func:`maskx.engine.tiles.predict_tiles`; None for whole images.
        pictures: write pictures and videos too.
        voc_results: write label maps as the test server of PASCAL VOC takes them too, see
            :class:`maskx.data.voc_results.VocResults`. Other classes are not predicted where the
            system can choose.
        asked: what else the system is told, see :class:`maskx.engine.predictor.Predictor`.
        overwrite: write into a folder that holds files already.

    Raises:
        FileExistsError: the folder holds files.
        ValueError: an option is out of range, or a class that is asked for is not known.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}. Allowed: 0 to 1.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if tile is not None and tile < _SMALLEST_TILE:
        raise ValueError(f"tile must be at least {_SMALLEST_TILE} pixels, got {tile}.")
    if tile is not None and predictor.system.takes_concepts:
        raise ValueError(
            f"tile has no meaning for {predictor.system.title}, which makes one mask of a concept "
            "in the whole image. Leave it out."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
        raise FileExistsError(
            f"{output} exists already. Add --overwrite to write into it, or name another output."
        )
    voc = VocResults(predictor.class_names) if voc_results else None
    asked = ({} if voc is None else {"candidate_labels": voc.class_indices}) | dict(asked or {})

    def predict(images: Sequence[np.ndarray]) -> list[Prediction]:
        return predictor.many(images, threshold=threshold, **asked)

    work = _Work(predict, predictor.class_names, output, source, batch_size, tile, pictures, voc)
    done = work.run(list(zip(inputs, _names(inputs), strict=True)))
    categories = [{"id": id_, "name": name} for name, id_ in work.ids.items()]
    content = {
        "info": {"label_maps": "predicted"},
        "images": done.images,
        "annotations": done.annotations,
        "categories": categories,
    }
    write_json(output / RESULTS_NAME, content, compact=True)
    return done


class _Work:
    def __init__(
        self,
        predict: Callable[[Sequence[np.ndarray]], list[Prediction]],
        class_names: Sequence[str],
        output: Path,
        source: str,
        batch_size: int,
        tile: int | None,
        pictures: bool,
        voc: VocResults | None,
    ) -> None:
        self.predict, self.output, self.source = predict, output, source
        self.batch_size, self.tile, self.pictures = batch_size, tile, pictures
        self.voc = voc
        self.ids = {name: index for index, name in enumerate(class_names, start=1)}
        self.done = Predicted()

    def run(self, todo: Sequence[tuple[Path | int, str]]) -> Predicted:
        with tqdm(total=len(todo), desc="predicting", unit="file") as bar:
            for is_video, group in itertools.groupby(todo, key=lambda item: _is_video(item[0])):
                for source, name in group if is_video else ():
                    try:
                        self._video(source, name)
                    except _UnreadableError as error:
                        self.done.failures[_shown(source)] = str(error)
                    bar.update()
                if not is_video:
                    self._images(group, bar)
        return self.done

    def _images(self, todo: Iterable[tuple[Path, str]], bar: tqdm) -> None:
        for (path, name), found in self._predicted(self._read(todo, bar)):
            self._note(found, path, name)
            if self.pictures:
                self.done.files.append(self.output / f"{name}.png")
                save_png(self.done.files[-1], _picture(found))
            bar.update()

    def _read(self, todo: Iterable[tuple[Path, str]], bar: tqdm) -> Iterator[tuple[Any, Any]]:
        for path, name in todo:
            try:
                yield (path, name), read_rgb(path)
            except (ValueError, OSError) as error:
                self.done.failures[str(path)] = str(error)
                bar.update()

    def _video(self, source: Path | int, name: str) -> None:
        with contextlib.closing(_Video(source)) as video, contextlib.ExitStack() as stack:
            writer = None
            frames = ((i, np.ascontiguousarray(f[:, :, ::-1])) for i, f in video.frames())
            bar = tqdm(total=video.length, desc=_shown(source), unit="frame", leave=False)
            stack.enter_context(bar)
            with contextlib.suppress(*[KeyboardInterrupt] * isinstance(source, int)):
                for index, found in self._predicted(frames):
                    self._note(found, source, f"{name}_{index:06d}", frame=index)
                    bar.update()
                    if not self.pictures:
                        continue
                    picture = _picture(found)
                    if writer is None:
                        self.output.mkdir(parents=True, exist_ok=True)
                        path = self.output / f"{name}.mp4"
                        opened = _written_video(path, video.rate, picture.shape)
                        writer = stack.enter_context(opened)
                        self.done.files.append(path)
                    writer.write(np.ascontiguousarray(picture[:, :, ::-1]))

    def _predicted(
        self, images: Iterable[tuple[Any, np.ndarray]]
    ) -> Iterator[tuple[Any, Prediction]]:
        """Predict images, each with what it is called; those of one shape several at a time."""
        for _, group in itertools.groupby(images, key=lambda item: item[1].shape):
            while batch := list(itertools.islice(group, 1 if self.tile else self.batch_size)):
                keys, pixels = zip(*batch, strict=True)
                if self.tile:
                    batch_size = self.batch_size
                    found = [predict_tiles(self.predict, *pixels, self.tile, batch_size=batch_size)]
                else:
                    found = self.predict(pixels)
                yield from zip(keys, found, strict=True)

    def _note(self, found: Prediction, source: Path | int, name: str, **more: Any) -> None:
        height, width = found.image_size
        image_id = len(self.done.images) + 1
        entry = {"id": image_id, "file_name": _shown(source), "height": height, "width": width}
        entry |= more
        self.done.images.append(entry)
        if found.class_indices is not None:
            for each in found.class_names:  # ConceptMask names what it was asked for
                self.ids.setdefault(each, len(self.ids) + 1)
            category_ids = [self.ids[each] for each in found.class_names]
            self.done.annotations += found.to_annotations(
                image_id,
                category_ids,
                source=self.source,
                first_id=len(self.done.annotations) + 1,
            )
        if found.label_map is not None:
            folder = self.output / _LABEL_MAPS
            folder.mkdir(parents=True, exist_ok=True)
            write_label_map(
                folder / f"{name}.png", found.label_map, num_classes=len(found.class_names)
            )
            entry["label_map_file_name"] = f"{_LABEL_MAPS}/{name}.png"
            if self.voc is not None:
                self.voc.write(self.output, name, found.label_map)
        elif self.voc is not None:
            raise ValueError(
                "Results for the test server of PASCAL VOC are label maps, but this run finds "
                "instances. Give a run of TransferNet, LarvSeg or class patterns."
            )


class _UnreadableError(ValueError):
    """An input that cannot be read."""


class _Video:
    def __init__(self, source: Path | int) -> None:
        self.source = source
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < 1000 else _FRAMES_PER_SECOND
        length = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.length = length if length > 0 else None

    def frames(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the frames with their number, (H, W, 3) uint8 BGR."""
        for index in itertools.count():
            is_there, frame = self._capture.read()
            if not is_there and index == 0:
                is_camera = isinstance(self.source, int)
                why = "Is one connected, and free?" if is_camera else "Is it a video, and complete?"
                raise _UnreadableError(
                    f"'{_shown(self.source)}' has no frames that can be read. {why}"
                )
            if not is_there:
                return
            yield index, frame

    def close(self) -> None:
        self._capture.release()


@contextlib.contextmanager
def _written_video(path: Path, rate: float, shape: Sequence[int]) -> Iterator[cv2.VideoWriter]:
    """Open a video that takes its name when it is whole; its ending must stay for OpenCV."""
    scratch = path.with_name(f".{path.name}.partial.mp4")
    code = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(scratch), code, rate, (shape[1], shape[0]))
    if not writer.isOpened():
        raise OSError(f"'{path}' cannot be written as a video by this build of OpenCV.")
    try:
        yield writer
        writer.release()
        os.replace(scratch, path)
    finally:
        writer.release()
        scratch.unlink(missing_ok=True)


def _picture(found: Prediction) -> np.ndarray:
    """Draw a prediction in the shape of its image, with even sides, as videos need them."""
    height, width = found.image_size
    side = min(_LARGEST, max(_SMALLEST, height, width))
    scale = side / max(height, width)
    rows, columns = (max(2, round(edge * scale) // 2 * 2) for edge in (height, width))
    return found.plot(side=side)[:rows, :columns]


def _names(sources: Sequence[Path | int]) -> list[str]:
    """Names of outputs: the stems, numbered where they are the same."""
    taken: set[str] = set()
    names = []
    for source in sources:
        name = stem = f"camera_{source}" if isinstance(source, int) else source.stem
        numbers = (f"{stem}_{number}" for number in itertools.count(2))
        while name in taken:
            name = next(numbers)
        taken.add(name)
        names.append(name)
    return names


def _shown(source: Path | int) -> str:
    return f"camera {source}" if isinstance(source, int) else str(source)


def _is_video(source: Path | int) -> bool:
    return isinstance(source, int) or source.suffix.lower() in VIDEO_ENDINGS


def _is_media(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (*IMAGE_ENDINGS, *VIDEO_ENDINGS)
