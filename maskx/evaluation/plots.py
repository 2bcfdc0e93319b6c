"""Plots of results."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

# Blue to orange, told apart by brightness as well; the markers differ too.
_STYLES = tuple(
    zip(
        ("#0b3c6f", "#2a7ab9", "#3fa7a0", "#8cb84c", "#e0a030", "#d4572a", "#8a2b4f", "#555555"),
        "osD^vP*X",
        strict=True,
    )
)


def plot_relative_gains(
    path: str | os.PathLike[str],
    *,
    mean_masks: Sequence[float],
    relative_gains: Sequence[float],
    num_with_masks: Sequence[int],
) -> None:
    """Draw how much weight transfer gains on random splits (Mask^X R-CNN, Figure 3.1).

    Args:
        mean_masks: of each split, masks in the training data per category of A.
        relative_gains: of each split, change of the mask AP on B against the baseline in percent.
        num_with_masks: of each split, |A|; one marker and colour each.

    Raises:
        ValueError: there is no split.
        ImportError: matplotlib is not installed.
    """
    if not relative_gains:
        raise ValueError("There is no split to plot.")
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    axes.axhline(0, color="0.35", linewidth=1)
    for index, size in enumerate(sorted(set(num_with_masks))):
        color, marker = _STYLES[index % len(_STYLES)]
        points = [
            (x, y)
            for x, y, n in zip(mean_masks, relative_gains, num_with_masks, strict=True)
            if n == size
        ]
        axes.scatter(
            *zip(*points, strict=True),
            label=f"|A| = {size}",
            color=color,
            marker=marker,
            s=42,
            edgecolors="white",
            linewidths=0.6,
            zorder=3,
        )
    axes.set_xlabel("Mask annotations per category with masks (A), mean")
    axes.set_ylabel("Relative change of mask AP on B (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.margins(0.06)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    # Beside the axes, where no point can lie.
    figure.legend(loc="outside right upper", frameon=False, handletextpad=0.2)
    figure.savefig(path, dpi=150, format="png")


def plot_settings(
    path: str | os.PathLike[str], values: Mapping[str, Sequence[float]], *, label: str
) -> None:
    """Draw a row per setting: a dot for each seed, a line at their mean.

    Args:
        values: of each setting, one value per seed; the first setting comes on top.
        label: what the values are, with their unit.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # Long names widen the figure, not narrow the axes.
    width = max(6.4, 4 + 0.075 * max(map(len, values)))
    figure = _figure(width, 1 + 0.28 * len(values))
    axes = figure.subplots()
    for row, seeds in enumerate(values.values()):
        mean = sum(seeds) / len(seeds)
        axes.plot([mean, mean], [row - 0.32, row + 0.32], color=_STYLES[5][0], linewidth=2)
        axes.scatter(seeds, [row] * len(seeds), color=_STYLES[1][0], s=26, alpha=0.8, zorder=3)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlabel(f"{label}; dots: seeds, line: mean", loc="right")
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150, format="png")


def check_matplotlib() -> None:
    """Find out that matplotlib is missing before hours go into what is to be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    _figure(1, 1)


def _figure(width: float, height: float) -> Any:
    """Make an empty figure of a size in inches, laid out without overlaps."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "The figure needs matplotlib. Install it with: pip install matplotlib"
        ) from error
    # No pyplot: its global state and its choice of a display are not needed for a file.
    return Figure(figsize=(width, height), layout="constrained")
