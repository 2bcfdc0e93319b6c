"""Lists of the tags of images, without the images.

Millions of images are held as two arrays: the concept indices of all tags one after another, and
where those of each image begin. In tags, underscores and spaces are the same.
"""

import difflib
import json
import logging
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from maskx.core.files import parse_json, written_text
from maskx.core.text import listed
from maskx.core.word_table import spelled
from maskx.data.coco import read_coco_json

__all__ = ["TagList", "read_tag_list", "read_vocabulary", "tag_list", "write_tag_lines"]

logger = logging.getLogger(__name__)

_ALLOWED = (
    'Allowed: JSON lines such as {"file_name": "a.jpg", "tags": ["cat", "sofa"]}, or a COCO file '
    "whose images have image_labels or annotations"
)
_NUM_EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class TagList:
    """The tags of images.

    Attributes:
        names: Vocabulary by concept index, with spaces.
        offsets: (N + 1,) int64; the tags of image n are `indices[offsets[n]:offsets[n + 1]]`.
        indices: Concept indices, int32, of each image without repetition and ascending.
        image_ids: Of each image its file name where the file gives one, else its id.
    """

    names: tuple[str, ...]
    offsets: np.ndarray
    indices: np.ndarray
    image_ids: tuple[str | int, ...]
    source: str = ""

    def __len__(self) -> int:
        return len(self.image_ids)

    def tags_of(self, image: int) -> np.ndarray:
        """Return the concept indices of the image at a position."""
        return self.indices[self.offsets[image] : self.offsets[image + 1]]

    def counts(self) -> np.ndarray:
        """Return the number of images with each word, (V,) int64."""
        return np.bincount(self.indices, minlength=len(self.names))

    @property
    def num_tagged(self) -> int:
        """Number of images with any tag."""
        return int(np.count_nonzero(np.diff(self.offsets)))


def tag_list(
    image_labels: Iterable[Iterable[int]],
    names: Sequence[str],
    *,
    image_ids: Sequence[str | int] | None = None,
    source: str = "the given tags",
) -> TagList:
    """Make a list of tags that are concept indices already, such as `image_labels` of records.

    Args:
        image_labels: of each image its concept indices; repetitions count once.
        image_ids: of each image; its position if None.

    Raises:
        ValueError: a name comes twice, an index is not of the vocabulary, or lengths differ.
    """
    names = _checked_vocabulary(names, source)
    offsets, indices = array("q", [0]), array("i")
    for position, labels in enumerate(image_labels):
        ordered = sorted(set(labels))
        if ordered and not 0 <= ordered[0] <= ordered[-1] < len(names):
            raise ValueError(
                f"{source}: image {position} has the labels {ordered}. Allowed: concept indices "
                f"from 0 to {len(names) - 1}."
            )
        indices.extend(ordered)
        offsets.append(len(indices))
    ids = tuple(range(len(offsets) - 1)) if image_ids is None else tuple(image_ids)
    if len(ids) != len(offsets) - 1:
        raise ValueError(f"{source}: {len(offsets) - 1} images have {len(ids)} ids. Give one each.")
    return TagList(names, _int_array(offsets, np.int64), _int_array(indices, np.int32), ids, source)


def read_vocabulary(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read a list of words: a `.json` file with a list, or a text file with one word per line.

    Raises:
        ValueError: the file holds something else, nothing, or a word twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no vocabulary '{path}'. Correct the path.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        words = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"'{path}' is no vocabulary: {error}. Allowed: one word per line, or a JSON list in a "
            "file that ends with .json."
        ) from None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"'{path}' is no vocabulary. Allowed in a .json file: a list of words.")
    words = [word for word in words if spelled(word)]
    if not words:
        raise ValueError(f"The vocabulary '{path}' holds no word. Give at least one.")
    return _checked_vocabulary(words, f"'{path}'")


def read_tag_list(
    path: str | os.PathLike[str],
    *,
    vocabulary: Sequence[str] | None = None,
    min_count: int = 1,
    strict: bool = True,
) -> TagList:
    """Read the tags of images from JSON lines or a COCO file.

    Args:
        path: JSON lines, ``{"file_name": ..., "tags": [...]}`` with ``image_id`` instead of or
            beside ``file_name``; they are read line by line. Or a COCO file: the tags of an image
            are the names of its ``image_labels`` (category ids) and of its annotations.
        vocabulary: words by concept index; without it all tags of the file, in the order of the
            alphabet.
        min_count: without a vocabulary, tags on fewer images are left out, which is reported.
        strict: whether a tag that is not in the vocabulary, or is twice on an image, is an error.
            If False it is left out, counted and reported in one warning. Likewise bad entries of a
            COCO file, see :func:`maskx.data.coco.read_coco_json`.

    Raises:
        ValueError: the file cannot be used; the message says why.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no tag list '{path}'. Correct the path.")
    if min_count < 1 or (vocabulary is not None and min_count > 1):
        raise ValueError(
            f"min_count is {min_count}. Allowed: at least 1, and only without a vocabulary, which "
            "says itself what is kept."
        )
    names = None if vocabulary is None else _checked_vocabulary(vocabulary, "The vocabulary")
    reader = _Reader(path, names, strict)
    entries = _json_lines(path) if _is_json_lines(path) else _coco_entries(path, strict)
    for where, image_id, tags in entries:
        reader.add(where, image_id, tags)
    return reader.finish(min_count)


def write_tag_lines(
    path: str | os.PathLike[str],
    images: Iterable[tuple[str, Sequence[int]]],
    names: Sequence[str],
) -> int:
    """Write JSON lines ``{"file_name": ..., "tags": [...]}``, whole or not at all.

    Args:
        images: File names and the tags of each, as places in `names`.

    Returns:
        Number of images.
    """
    words = [json.dumps(name, ensure_ascii=False) for name in names]
    number = 0
    with written_text(path) as file:
        for file_name, tags in images:
            tags = ", ".join(words[tag] for tag in tags)
            file.write(
                f'{{"file_name": {json.dumps(file_name, ensure_ascii=False)}, "tags": [{tags}]}}\n'
            )
            number += 1
    return number


class _Reader:
    """Collects the tags of one image after another."""

    def __init__(self, path: Path, names: tuple[str, ...] | None, strict: bool) -> None:
        self._path, self._names, self._strict = path, names, strict
        # By tag as it is spelled in the file: one look-up per tag, 30 million for a large file.
        self._index = {name: index for index, name in enumerate(names or ())}
        self._canonical = dict(self._index)
        self._offsets, self._indices = array("q", [0]), array("i")
        self._ids: dict[str | int, None] = {}
        self._left_out: dict[str, Counter[str]] = {"unknown": Counter(), "repeated": Counter()}

    def add(self, where: Callable[[], str], image_id: str | int, tags: list[str]) -> None:
        if image_id in self._ids:
            raise ValueError(f"{where()} is the image {image_id!r} again. Give each image once.")
        self._ids[image_id] = None
        try:
            found = [self._index[tag] for tag in tags]
        except (KeyError, TypeError):
            found = [index for tag in tags if (index := self._look_up(where, tag)) >= 0]
        kept = sorted(set(found))
        if len(kept) != len(found):
            self._repeated(where, found)
        self._indices.extend(kept)
        self._offsets.append(len(self._indices))

    def finish(self, min_count: int) -> TagList:
        offsets = _int_array(self._offsets, np.int64)
        indices = _int_array(self._indices, np.int32)
        if len(indices) == 0:
            raise ValueError(
                f"'{self._path}' has {len(self._ids)} images, none with a usable tag. {_ALLOWED}."
            )
        self._report()
        if self._names is None:
            found = tuple(self._canonical)
            offsets, indices, names = _kept_words(offsets, indices, found, min_count, self._path)
        else:
            names = self._names
            absent = np.flatnonzero(np.bincount(indices, minlength=len(names)) == 0)
            if len(absent):
                logger.warning(
                    "%s: %d of %d words of the vocabulary are on no image: %s.",
                    self._path,
                    len(absent),
                    len(names),
                    listed([names[i] for i in absent]),
                )
        if empty := np.count_nonzero(np.diff(offsets) == 0):
            logger.warning("%s: %d of %d images have no tag.", self._path, empty, len(self._ids))
        return TagList(names, offsets, indices, tuple(self._ids), str(self._path))

    def _look_up(self, where: Callable[[], str], tag: Any) -> int:
        if not isinstance(tag, str) or not spelled(tag):
            raise ValueError(f"{where()} has the tag {tag!r}. Allowed: words.")
        index = self._index.get(tag)
        if index is not None:
            return index
        name = spelled(tag)
        if name not in self._canonical:
            if self._names is not None:
                return self._unknown(where, name)
            self._canonical[name] = len(self._canonical)
        self._index[tag] = self._canonical[name]
        return self._index[tag]

    def _unknown(self, where: Callable[[], str], name: str) -> int:
        if self._strict:
            close = difflib.get_close_matches(name, self._names, n=3, cutoff=0.5)
            hint = f" Closest: {', '.join(map(repr, close))}." if close else ""
            raise ValueError(
                f"{where()} has the tag '{name}', which is not among the {len(self._names)} words "
                f"of the vocabulary.{hint} Correct it, add it to the vocabulary, or leave such "
                "tags out (strict=False, --skip-bad)."
            )
        self._left_out["unknown"][name] += 1
        return -1

    def _repeated(self, where: Callable[[], str], found: list[int]) -> None:
        names = tuple(self._canonical)
        twice = [names[index] for index, times in Counter(found).items() if times > 1]
        if self._strict:
            raise ValueError(
                f"{where()} has tags twice ('_' and ' ' are the same): {listed(twice)}. Give each "
                "once, or let them count once (strict=False, --skip-bad)."
            )
        self._left_out["repeated"].update(twice)

    def _report(self) -> None:
        for kind, names in self._left_out.items():
            if names:
                most = ", ".join(f"'{n}' {times}x" for n, times in names.most_common(_NUM_EXAMPLES))
                logger.warning(
                    "%s: %d %s tags (%d words) were left out, most often %s.",
                    self._path,
                    names.total(),
                    kind,
                    len(names),
                    most,
                )


def _kept_words(
    offsets: np.ndarray, indices: np.ndarray, found: tuple[str, ...], min_count: int, path: Path
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Put words in the order of the alphabet and leave rare ones out."""
    counts = np.bincount(indices, minlength=len(found))
    kept = sorted(np.flatnonzero(counts >= min_count).tolist(), key=found.__getitem__)
    if not kept:
        raise ValueError(
            f"'{path}': none of its {len(found)} tags is on {min_count} images or more; the most "
            f"frequent one is on {counts.max()}. Lower min_count."
        )
    if len(kept) < len(found):
        logger.warning(
            "%s: %d of %d tags are on fewer than %d images and were left out.",
            path,
            len(found) - len(kept),
            len(found),
            min_count,
        )
    new_index = np.full(len(found), -1, np.int32)
    new_index[kept] = np.arange(len(kept), dtype=np.int32)
    image_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    renamed = new_index[indices]
    image_of, renamed = image_of[renamed >= 0], renamed[renamed >= 0]
    # One number per tag sorts faster than two keys: by image, then by word.
    ordered = np.sort(image_of * len(kept) + renamed)
    sizes = np.bincount(image_of, minlength=len(offsets) - 1)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return offsets, (ordered % len(kept)).astype(np.int32), tuple(found[i] for i in kept)


def _is_json_lines(path: Path) -> bool:
    """Tell by the first line: that of a COCO file is all of it, or no JSON by itself."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        content = json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        # A COCO file begins with an open bracket or the key of a list; a broken line does not.
        return b'"tags"' in first
    return not (isinstance(content, dict) and "images" in content)


def _json_lines(path: Path) -> Iterator[tuple[Callable[[], str], str | int, list[str]]]:
    bar = tqdm(total=path.stat().st_size, desc="tags", unit="B", unit_scale=True, disable=None)
    with path.open("rb") as file, bar:
        for number, line in enumerate(file, start=1):
            bar.update(len(line))
            if not line.strip():
                continue
            try:
                entry = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"'{path}', line {number} is not JSON: {error}. {_ALLOWED}."
                ) from None
            image_id = None
            if isinstance(entry, dict):
                image_id = entry.get("file_name", entry.get("image_id"))
            if not isinstance(image_id, str | int) or not isinstance(entry.get("tags"), list):
                raise ValueError(
                    f"'{path}', line {number} lacks file_name or image_id, or a list of tags. "
                    f"{_ALLOWED}."
                )
            yield lambda n=number: f"'{path}', line {n}", image_id, entry["tags"]


def _coco_entries(
    path: Path, strict: bool
) -> Iterator[tuple[Callable[[], str], str | int, list[str]]]:
    try:
        dataset = read_coco_json(path, strict=strict)
    except ValueError as error:
        raise ValueError(f"{error} As a tag list: {_ALLOWED[0].lower()}{_ALLOWED[1:]}.") from None
    name_of = {category["id"]: category["name"] for category in dataset["categories"]}
    shown: dict[str | int, set[int]] = {image["id"]: set() for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        shown[annotation["image_id"]].add(annotation["category_id"])
    for image in tqdm(dataset["images"], desc="tags", unit="image", disable=None):
        given = image.get("image_labels", [])
        try:
            names = [name_of[label] for label in [*given, *(shown[image["id"]] - set(given))]]
        except (KeyError, TypeError):
            raise ValueError(
                f"'{path}': image {image['id']!r} has image_labels {given!r}. Allowed: a list of "
                f"ids of the file's {len(name_of)} categories."
            ) from None
        where = f"'{path}', image {image['id']!r}"
        name = image.get("file_name", image["id"])
        if not isinstance(name, str | int):
            raise ValueError(f"{where} has file_name {name!r:.80}. Allowed: a path.")
        yield lambda w=where: w, name, names


def _checked_vocabulary(names: Sequence[str], what: str) -> tuple[str, ...]:
    names = tuple(spelled(name) for name in names)
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice or not all(names) or not names:
        raise ValueError(
            f"{what}: {len(twice)} words come twice ('_' and ' ' are the same), or one is empty, "
            f"or there is none{': ' if twice else ''}{listed(twice)}. Give each word once."
        )
    return names


def _int_array(values: array, dtype: type) -> np.ndarray:
    return np.frombuffer(values, dtype=dtype) if len(values) else np.zeros(0, dtype)
