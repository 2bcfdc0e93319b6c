"""Fixed vectors of class names, such as word embeddings, from a file or an installed package."""

import difflib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maskx.core.text_packages import PACKAGED, phrase_vectors, read_glove

logger = logging.getLogger(__name__)


def load_class_vectors(path: str | os.PathLike, class_names: Sequence[str]) -> np.ndarray:
    """Read the vector of each class name. In the file, underscores stand for spaces.

    A name of several words that has no vector of its own takes the mean of the vectors of its
    words, if all of them have one: published GloVe files hold single words only. One line of the
    log names these classes.

    Args:
        path: ``minilm`` or ``glove``, which the extra ``text`` installs: the first embeds whole
            names (E = 384), whatever their words, the second has 400,000 lower-case words (E = 50).
            Or a file: text with one ``word v1 ... vE`` per line, as GloVe, word2vec and fastText
            are published (a first line that holds only two counts is skipped), or an ``.npy`` file
            of shape (N, E) with the N words beside it, under the same name with the ending
            ``.txt`` (one per line) or ``.json`` (a list). Of a word that comes twice, the first
            counts.

    Returns:
        (K, E) float32, one row per class name. Not normalised.

    Raises:
        FileNotFoundError: there is no such file, or no word list beside an ``.npy`` file.
        ValueError: the file cannot be used or lacks a word, or the extra ``text`` is not installed;
            the message says why.
    """
    path = Path(path)
    if str(path) == "minilm":
        return phrase_vectors([name.replace("_", " ") for name in class_names])
    if str(path) not in PACKAGED and not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file of word vectors. Check the path, or give one of "
            f"{', '.join(PACKAGED)}, of the extra text."
        )
    spelled = [name.replace(" ", "_") for name in class_names]
    if str(path) == "glove":
        spelled, read = [word.lower() for word in spelled], _read_glove
    else:
        read = _read_npy if path.suffix == ".npy" else _read_text
    wanted = {*spelled, *(part for word in spelled for part in _parts(word))}
    words, vectors = read(path, wanted)

    rows, averaged = [], []
    for name, word in zip(class_names, spelled, strict=True):
        if word in vectors:
            rows.append(vectors[word])
            continue
        parts = _parts(word)
        missing = [part for part in parts if part not in vectors]
        if missing or not parts:
            raise ValueError(_missing_message(path, name, word, missing, words))
        rows.append(np.mean([vectors[part] for part in parts], axis=0))
        averaged.append(name)
    table = np.stack(rows)
    if not np.isfinite(table).all():
        bad = class_names[int(np.flatnonzero(~np.isfinite(table).all(axis=1))[0])]
        raise ValueError(f"{path}: the vector of class '{bad}' holds NaN or infinity.")
    if averaged:
        logger.warning(
            "%s has no vector for %d of %d classes; each takes the mean of the vectors of its "
            "words: %s.",
            path,
            len(averaged),
            len(class_names),
            ", ".join(map(repr, averaged)),
        )
    return table


def _parts(word: str) -> list[str]:
    return [part for part in word.split("_") if part]


def _missing_message(path: Path, name: str, word: str, missing: list[str], words: list[str]) -> str:
    looked_for = [word, *(part for part in missing if part != word)]
    close = [w for x in looked_for for w in difflib.get_close_matches(x, words, n=3, cutoff=0.5)]
    nor = f", nor for {', '.join(map(repr, looked_for[1:]))} in it" if looked_for[1:] else ""
    hint = f" Closest words: {', '.join(map(repr, dict.fromkeys(close)))}." if close else ""
    return (
        f"{path} has no vector for '{word}' (class '{name}'){nor} among its {len(words)} words."
        f"{hint} Add a line for it, or use another file."
    )


def _read_glove(path: Path, wanted: set[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    words, table = read_glove()
    rows = {word: row for row, word in enumerate(words) if word in wanted}
    return words, {word: np.asarray(table[row], dtype=np.float32) for word, row in rows.items()}


def _read_text(path: Path, wanted: set[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Read all words, but only the wanted vectors: published files have up to 2 million lines."""
    words, vectors, length = [], {}, None
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                word, *values = line.split() or [""]
                if not word or (number == 1 and len(values) == 1):
                    continue
                words.append(word)
                if word not in wanted or word in vectors:
                    continue
                vectors[word] = _parse_vector(f"{path}, line {number} ('{word}')", values, length)
                length = len(values)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not a text file in UTF-8 ({error}). Allowed: one 'word v1 ... vE' per "
                "line, or an .npy file. Convert a binary file first."
            ) from None
    return words, vectors


def _parse_vector(where: str, values: list[str], length: int | None) -> np.ndarray:
    if not values:
        raise ValueError(f"{where} holds no numbers. Allowed: one 'word v1 ... vE' per line.")
    try:
        vector = np.array(values, dtype=np.float32)
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from None
    if length is not None and len(values) != length:
        raise ValueError(
            f"{where} has {len(values)} numbers, earlier lines have {length}. All vectors must "
            "have one length."
        )
    return vector


def _read_npy(path: Path, wanted: set[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    try:
        table = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy lets through whatever the parser of a header raises
        raise ValueError(
            f"{path} is not an .npy file of numbers: {error or type(error).__name__}"
        ) from None
    text, names = _read_names(path)
    if not isinstance(table, np.ndarray):
        raise ValueError(f"{path} is not an .npy file of numbers, but an archive of arrays.")
    if table.ndim != 2 or len(table) != len(names) or table.shape[1] == 0:
        raise ValueError(
            f"{path} has shape {table.shape}, but {text} lists {len(names)} words. Allowed: "
            f"({len(names)}, E), one row of E numbers per word."
        )
    if table.dtype.kind not in "fiu":
        raise ValueError(f"{path} has dtype {table.dtype}. Allowed: real numbers.")
    words = [name.strip().replace(" ", "_") for name in names]
    rows = list(zip(words, table.astype(np.float32), strict=True))
    return words, {word: row for word, row in reversed(rows) if word in wanted}


def _read_names(path: Path) -> tuple[Path, list[str]]:
    """Read the words beside an array, and say in which file they are."""
    text, listed = path.with_suffix(".txt"), path.with_suffix(".json")
    if not (text.is_file() or listed.is_file()):
        raise FileNotFoundError(
            f"{path} needs its words beside it: {text.name} (one per line) or {listed.name} (a "
            "list)."
        )
    text, kind = (text, "text in UTF-8") if text.is_file() else (listed, "JSON")
    try:
        names = text.read_text(encoding="utf-8")
        names = json.loads(names) if text is listed else names.splitlines()
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{text} is not {kind}: {error}. Allowed: the words of {path.name}, one per row."
        ) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{text} must hold a list of words, one per row of {path.name}.")
    return text, names
