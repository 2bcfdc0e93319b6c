"""What word vectors know, for people: the neighbours of words and the spectrum of a table."""

import os
from collections.abc import Sequence

import numpy as np

from maskx.core.word_table import WordTable, explained_spectrum
from maskx.evaluation.plots import check_matplotlib

__all__ = ["format_neighbours", "format_spectrum", "plot_spectrum"]


def format_neighbours(table: WordTable, words: Sequence[str], *, count: int) -> str:
    """Say of each word which others are nearest to it by cosine.

    Raises:
        ValueError: the table has no such word, or `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"{count} neighbours were asked for. Allowed: at least 1.")
    lines = []
    for word in words:
        index = table.index_of(word)
        others = [i for i in range(len(table)) if i != index]
        nearest = table.nearest(table.vectors[index], among=others, count=count) if others else []
        found = ", ".join(f"{table.names[i]} {cosine:.3f}" for i, cosine in nearest)
        lines.append(f"{table.names[index]}: {found or 'no other word'}")
    return "\n".join(lines)


def format_spectrum(table: WordTable) -> str:
    """List eigenvalues of a table and the share of its squared spectrum up to each of them.

    Components 1, 2, 4, 8 and so on are listed, and the last one.
    """
    values, shares = explained_spectrum(table)
    last = len(values)
    listed = [*(2**power for power in range(last.bit_length()) if 2**power < last), last]
    rows = [f"{'component':>9}  {'eigenvalue':>12}  {'explained':>9}"]
    rows += [f"{c:>9}  {values[c - 1]:>12.4g}  {shares[c - 1]:>9.1%}" for c in listed]
    return "\n".join(rows)


def plot_spectrum(path: str | os.PathLike[str], table: WordTable) -> None:
    """Draw the eigenvalues of a table, and the share of its squared spectrum they explain.

    Args:
        path: PNG file to write.
        table: any word table.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    values, shares = explained_spectrum(table)
    components = np.arange(1, len(values) + 1)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.loglog(components, values, color="#0b3c6f", label="eigenvalue (left)")
    axes.set_xlabel("Component")
    axes.set_ylabel("Eigenvalue")
    explained = axes.twinx()
    explained.plot(components, 100 * shares, color="#d4572a", label="explained (right)")
    explained.set_ylim(0, 100)
    explained.set_ylabel("Share of the squared spectrum (%), cumulative")
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines["top"].set_visible(False)
    explained.spines["top"].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150, format="png")
