"""Fixed vectors of class names, such as word embeddings, from a file."""

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def load_class_vectors(path: str | os.PathLike, class_names: Sequence[str]) -> np.ndarray:
    """Read the vector of each class name. In the file, underscores stand for spaces.

    Args:
        path: a text file with one ``word v1 ... vE`` per line, as GloVe, word2vec and fastText are
            published (a first line that holds only two counts is skipped); or an ``.npy`` file of
            shape (N, E) with the N words beside it, under the same name with the ending ``.txt``
            (one per line) or ``.json`` (a list).
        class_names: class list, by class index.

    Returns:
        (K, E) float32, one row per class name. Not normalised.

    Raises:
        FileNotFoundError: there is no such file, or no word list beside an ``.npy`` file.
        ValueError: the file cannot be used or lacks a word; the message says why.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of word vectors. Check the path.")
    wanted = [name.replace(" ", "_") for name in class_names]
    read = _read_npy if path.suffix == ".npy" else _read_text
    words, vectors = read(path, set(wanted))
    for name, word in zip(class_names, wanted, strict=True):
        if word not in vectors:
            close = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
            hint = f" Closest words: {', '.join(map(repr, close))}." if close else ""
            raise ValueError(
                f"{path} has no vector for '{word}' (class '{name}') among its {len(words)} "
                f"words.{hint} Add a line for it, or use another file."
            )
    table = np.stack([vectors[word] for word in wanted])
    if not np.isfinite(table).all():
        bad = class_names[int(np.flatnonzero(~np.isfinite(table).all(axis=1))[0])]
        raise ValueError(f"{path}: the vector of class '{bad}' holds NaN or infinity.")
    return table


def _read_text(path: Path, wanted: set[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Read all words, but only the wanted vectors: published files have up to 2 million lines."""
    words, vectors, length = [], {}, None
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            word, *values = line.split() or [""]
            if not word or (number == 1 and len(values) == 1):
                continue
            words.append(word)
            if word not in wanted:
                continue
            length = length or len(values)
            try:
                vectors[word] = np.array(values, dtype=np.float32)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} ('{word}'): {error}.") from None
            if len(values) != length:
                raise ValueError(
                    f"{path}, line {number} ('{word}') has {len(values)} numbers, earlier lines "
                    f"have {length}. All vectors must have one length."
                )
    return words, vectors


def _read_npy(path: Path, wanted: set[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    table = np.load(path, allow_pickle=False)
    if (text := path.with_suffix(".txt")).is_file():
        names = text.read_text(encoding="utf-8").splitlines()
    elif (text := path.with_suffix(".json")).is_file():
        names = json.loads(text.read_text(encoding="utf-8"))
    else:
        raise FileNotFoundError(
            f"{path} needs its words beside it: {path.stem}.txt (one per line) or "
            f"{path.stem}.json (a list)."
        )
    if table.ndim != 2 or len(table) != len(names):
        raise ValueError(
            f"{path} has shape {table.shape}, but {text} lists {len(names)} words. Allowed: one "
            "row per word."
        )
    words = [name.strip().replace(" ", "_") for name in names]
    rows = zip(words, table.astype(np.float32), strict=True)
    return words, {word: row for word, row in rows if word in wanted}
