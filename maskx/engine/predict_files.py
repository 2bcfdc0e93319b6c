"""Predictions of image files and videos: pictures, label maps, and one COCO file of all."""

import contextlib
import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_api
from tqdm import tqdm

from maskx.core.files import write_json
from maskx.data.images import read_rgb
from maskx.data.label_maps import write_label_map
from maskx.engine.predictor import Predictor
from maskx.engine.results import Prediction
from maskx.evaluation.figures import save_png

__all__ = ["Predicted", "find_inputs", "predict_files"]

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")

RESULTS_NAME = "predictions.json"
_LABEL_MAPS = "label_maps"
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


def find_inputs(words: Iterable[str]) -> list[Path]:
    """Find images and videos: files, all images and videos in folders, and patterns such as *.jpg.

    Raises:
        FileNotFoundError: a word stands for nothing.
    """
    found: dict[Path, None] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            paths = sorted(p for p in path.iterdir() if _is_media(p))
        elif path.exists():
            paths = [path]
        else:  # a shell hands a pattern on when it fits nothing, and on Windows always
            paths = sorted(map(Path, glob.glob(word, recursive=True)))
            paths = [p for p in paths if p.is_file()]
        if not paths:
            what = "a folder without images or videos" if path.is_dir() else "no file and no folder"
            raise FileNotFoundError(
                f"'{word}' is {what}. Images end in {', '.join(IMAGE_ENDINGS)}, videos in "
                f"{', '.join(VIDEO_ENDINGS)}."
            )
        found |= dict.fromkeys(paths)
    return list(found)


def predict_files(
    predictor: Predictor,
    inputs: Sequence[Path],
    output: Path,
    *,
    threshold: float = 0.5,
    pictures: bool = True,
    asked: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Predicted:
    """Predict images and videos one by one and write what is found.

    The folder gets ``predictions.json``, COCO's format with all images, and by input a picture
    ``NAME.png`` or a video ``NAME.mp4``; label maps are in ``label_maps``. A file that cannot be
    read is named, and the rest goes on.

    Args:
        predictor: of any system.
        inputs: of :func:`find_inputs`.
        output: folder to write to; it is made.
        threshold: least score of an instance.
        pictures: write pictures and videos too.
        asked: what else the system is told, see :class:`maskx.engine.predictor.Predictor`.
        overwrite: write into a folder that holds files already.

    Raises:
        FileExistsError: the folder holds files.
        ValueError: the threshold is out of range, or a class that is asked for is not known.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}. Allowed: 0 to 1.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
        raise FileExistsError(
            f"{output} exists already. Add --overwrite to write into it, or name another output."
        )
    output.mkdir(parents=True, exist_ok=True)
    work = _Work(predictor, output, threshold, pictures, dict(asked or {}))
    for path, name in zip(inputs, _names(inputs), strict=True):
        work.todo.append((path, name))
    done = work.run()
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
        predictor: Predictor,
        output: Path,
        threshold: float,
        pictures: bool,
        asked: dict[str, Any],
    ) -> None:
        self.predictor, self.output, self.threshold = predictor, output, threshold
        self.pictures, self.asked = pictures, asked
        self.ids = {name: index for index, name in enumerate(predictor.class_names, start=1)}
        self.todo: list[tuple[Path, str]] = []
        self.done = Predicted()

    def run(self) -> Predicted:
        with tqdm(self.todo, desc="predicting", unit="file") as bar:
            for path, name in bar:
                try:
                    (self._video if _is_video(path) else self._image)(path, name)
                except _UnreadableError as error:
                    self.done.failures[str(path)] = str(error)
        return self.done

    def _image(self, path: Path, name: str) -> None:
        try:
            pixels = read_rgb(path)
        except (ValueError, OSError) as error:
            raise _UnreadableError(str(error)) from error
        found = self._predict(pixels)
        self._note(found, path, name)
        if self.pictures:
            self.done.files.append(self.output / f"{name}.png")
            save_png(self.done.files[-1], _picture(found))

    def _video(self, path: Path, name: str) -> None:
        with contextlib.closing(_Video(path)) as video, contextlib.ExitStack() as stack:
            writer = None
            bar = tqdm(
                video.frames(), total=video.length, desc=path.name, unit="frame", leave=False
            )
            for index, frame in enumerate(bar):
                found = self._predict(np.ascontiguousarray(frame[:, :, ::-1]))
                self._note(found, path, f"{name}_{index:06d}", frame=index)
                if not self.pictures:
                    continue
                picture = _picture(found)
                if writer is None:
                    target = self.output / f"{name}.mp4"
                    writer = stack.enter_context(_written_video(target, video.rate, picture.shape))
                    self.done.files.append(target)
                writer.write(np.ascontiguousarray(picture[:, :, ::-1]))

    def _predict(self, pixels: np.ndarray) -> Prediction:
        return self.predictor(pixels, **self.asked).above(self.threshold)

    def _note(self, found: Prediction, path: Path, name: str, **more: Any) -> None:
        height, width = found.image_size
        image_id = len(self.done.images) + 1
        entry = {"id": image_id, "file_name": str(path), "height": height, "width": width, **more}
        self.done.images.append(entry)
        if found.class_indices is not None:
            for each in found.class_names:  # ConceptMask names what it was asked for
                self.ids.setdefault(each, len(self.ids) + 1)
            category_ids = [self.ids[each] for each in found.class_names]
            for row in found.to_coco(image_id, category_ids):
                row |= {"id": len(self.done.annotations) + 1, "iscrowd": 0}
                if "segmentation" in row:
                    row["area"] = int(mask_api.area(row["segmentation"]))
                self.done.annotations.append(row)
        if found.label_map is not None:
            folder = self.output / _LABEL_MAPS
            folder.mkdir(exist_ok=True)
            write_label_map(
                folder / f"{name}.png", found.label_map, num_classes=len(found.class_names)
            )
            entry["label_map_file_name"] = f"{_LABEL_MAPS}/{name}.png"


class _UnreadableError(ValueError):
    """An input that cannot be read."""


class _Video:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._capture = cv2.VideoCapture(str(path))
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < 1000 else _FRAMES_PER_SECOND
        length = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.length = length if length > 0 else None

    def frames(self) -> Iterator[np.ndarray]:
        """Yield the frames, (H, W, 3) uint8 BGR."""
        for index in itertools.count():
            is_there, frame = self._capture.read()
            if not is_there:
                if index == 0:
                    raise _UnreadableError(
                        f"'{self.path}' has no frames that can be read. Is the file a video, and "
                        "complete?"
                    )
                return
            yield frame

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


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of outputs: the stems, numbered where they are the same."""
    taken: set[str] = set()
    names = []
    for path in paths:
        numbers = (f"{path.stem}_{number}" for number in itertools.count(2))
        name = path.stem
        while name in taken:
            name = next(numbers)
        taken.add(name)
        names.append(name)
    return names


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_ENDINGS


def _is_media(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (*IMAGE_ENDINGS, *VIDEO_ENDINGS)
