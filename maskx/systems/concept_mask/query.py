"""What ConceptMask is asked for in an image, and how users say it.

Shape legend:
    V: concepts of the word table; k: length of a word vector; C: asked concepts.
"""

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskx.core.word_table import WordTable, load_word_table, spelled, word_table_from_file
from maskx.data.tag_lists import read_vocabulary

UNSEEN = -1
"""Index of a concept that is asked for by its vector."""


class ConceptQuery:
    """C concepts that are asked for.

    Args:
        indices: (C,) rows of the word table; -1 for an unseen word.
        vectors: (C, k), read for unseen words only.
        blended: (C,), or one for all: whether the map of an unseen word is blended with that of the
            nearest concept with boxes, where the paper takes that of Eq. 1 alone.
        names: C names; None for those of the word table.
    """

    def __init__(
        self,
        indices: Sequence[int] | np.ndarray | Tensor,
        vectors: np.ndarray | Tensor,
        *,
        blended: bool | Sequence[bool] | np.ndarray = False,
        names: Sequence[str] | None = None,
    ) -> None:
        self.indices = torch.as_tensor(indices, dtype=torch.int64)
        self.vectors = torch.as_tensor(vectors, dtype=torch.float32)
        blended = torch.as_tensor(blended, dtype=torch.bool, device=self.indices.device)
        self.blended = blended.expand(len(self))
        self.names = None if names is None else tuple(names)

    def __len__(self) -> int:
        return len(self.indices)

    def checked(self, table: Tensor) -> "ConceptQuery":
        """Return it on the device of the (V, k) word table, with the vectors of what is in it."""
        indices, vectors = self.indices, self.vectors
        if len(indices) == 0 and vectors.ndim == 2:
            vectors = table[:0]
        if vectors.shape != (len(indices), table.shape[1]):
            raise ValueError(
                f"A query of {len(indices)} concepts has vectors of shape {tuple(vectors.shape)}. "
                f"Needed: ({len(indices)}, {table.shape[1]}), as in the word table."
            )
        outside = indices[(indices < UNSEEN) | (indices >= len(table))]
        if len(outside):
            raise ValueError(
                f"The query has the concept indices {sorted(set(outside.tolist()))}. Allowed: 0 "
                f"to {len(table) - 1}, and -1 for an unseen word with its vector."
            )
        query = copy.copy(self)
        query.indices, query.blended = indices.to(table.device), self.blended.to(table.device)
        own, vectors = table[query.indices.clamp(min=0)], vectors.to(table.device, table.dtype)
        query.vectors = torch.where((query.indices >= 0)[:, None], own, vectors)
        return query


def named_query(
    table: WordTable,
    unseen: WordTable | None,
    concepts: Sequence[str | int | np.ndarray],
    *,
    blended: bool = False,
) -> ConceptQuery:
    """Resolve what a user asks for.

    Args:
        unseen: words that are not in it, found by their vectors alone.
        concepts: names of either table, concept indices, or vectors, whose names are "vector" and
            their position.
    """
    extra = {} if unseen is None else dict(zip(unseen.names, unseen.vectors, strict=True))
    both = sorted(set(extra) & set(table.names))
    if both:
        raise ValueError(
            f"'{both[0]}' is among the unseen words, but the word table has it. Leave it out."
        )
    if isinstance(concepts, str) or len(concepts) == 0:
        table.resolve(concepts)  # says what is wrong
    wanted = [extra.get(spelled(c), c) if isinstance(c, str) else c for c in concepts]
    indices, vectors = table.resolve(wanted)
    names = [
        table.names[index] if index >= 0 else spelled(c) if isinstance(c, str) else f"vector {i}"
        for i, (c, index) in enumerate(zip(concepts, indices.tolist(), strict=True))
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"'{twice[0]}' is asked for twice. Name each concept once.")
    return ConceptQuery(indices, vectors, blended=blended, names=names)


def read_unseen_words(path: str | os.PathLike[str], table: WordTable) -> WordTable:
    """Read words that are found by their vectors alone.

    Args:
        path: word table of ``tools/learn_word_vectors.py --fold-in``; or ``.npy`` file, such as
            CLIP's, with its words beside it in a ``.txt`` or ``.json`` file of the same name.
        table: of the model.
    """
    path = Path(path)
    if path.suffix == ".npy" and path.is_file():
        text, other = path.with_suffix(".txt"), path.with_suffix(".json")
        words = text if text.is_file() else other
        if not words.is_file():
            raise FileNotFoundError(
                f"The unseen words '{path}' need their names beside them: '{text}', one per line, "
                f"or '{other}', a list."
            )
        unseen = word_table_from_file(path, read_vocabulary(words))
    else:
        unseen = load_word_table(path)
    if unseen.dim != table.dim:
        raise ValueError(
            f"The unseen words '{path}' have vectors of length {unseen.dim}, the word table of "
            f"length {table.dim}. Fold the words into that table, see tools/learn_word_vectors.py "
            "--fold-in."
        )
    return unseen
