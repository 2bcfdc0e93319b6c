import sys

import cv2
import numpy as np
import pytest

from maskx.evaluation.plots import plot_relative_gains, plot_settings


def plotted(path, **points):
    plot_relative_gains(path, **points)
    return cv2.imread(str(path)).astype(int)


def test_each_size_of_a_has_its_own_colour_and_legend_entry(tmp_path):
    three = plotted(
        tmp_path / "three.png",
        mean_masks=[100.0, 200.0, 300.0],
        relative_gains=[-5.0, 10.0, 20.0],
        num_with_masks=[10, 20, 30],
    )
    one = plotted(
        tmp_path / "one.png",
        mean_masks=[100.0, 200.0, 300.0],
        relative_gains=[-5.0, 10.0, 20.0],
        num_with_masks=[10, 10, 10],
    )

    def num_colors(image):
        """Saturated colours of at least 150 pixels: those of markers, not of their edges."""
        saturated = image[image.max(axis=2) - image.min(axis=2) > 60]
        _, counts = np.unique(saturated, axis=0, return_counts=True)
        return (counts >= 150).sum()

    assert num_colors(three) == 3
    assert num_colors(one) == 1


def test_a_higher_gain_is_drawn_higher_and_more_masks_further_right(tmp_path):
    picture = plotted(
        tmp_path / "two.png",
        mean_masks=[100.0, 300.0],
        relative_gains=[-10.0, 20.0],
        num_with_masks=[10, 20],
    )
    centres = []
    for rgb in ((0x0B, 0x3C, 0x6F), (0x2A, 0x7A, 0xB9)):
        rows, columns = np.nonzero((picture == rgb[::-1]).all(axis=2))
        inside = columns < 0.8 * picture.shape[1]  # without the legend
        centres.append((rows[inside].mean(), columns[inside].mean()))
    (low_row, left), (high_row, right) = centres
    assert high_row < low_row
    assert left < right


def test_nothing_to_plot_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no split to plot"):
        plot_relative_gains(
            tmp_path / "none.png", mean_masks=[], relative_gains=[], num_with_masks=[]
        )


def test_the_error_without_matplotlib_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_relative_gains(
            tmp_path / "x.png", mean_masks=[1.0], relative_gains=[1.0], num_with_masks=[1]
        )


def test_settings_are_drawn_in_order_with_a_dot_per_seed_and_a_line_at_the_mean(tmp_path):
    values = {f"sw/setting_{i}": [float(i), i + 2.0, i + 1.5] for i in range(6)}
    plot_settings(tmp_path / "settings.png", values, label="Mask AP on B (percent)")
    picture = cv2.imread(str(tmp_path / "settings.png")).astype(int)
    assert picture.shape[:2] == (round((1 + 0.28 * 6) * 150), 960)
    blue, _, red = np.moveaxis(picture, 2, 0)

    def centres(mask):
        """(row, column) of connected regions, from top to bottom, then from left to right."""
        count, _, stats, middles = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
        found = [middles[i][::-1] for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] > 20]
        return np.array(sorted(found, key=lambda middle: (round(middle[0] / 10), middle[1])))

    dots, means = centres(blue - red > 60).reshape(6, 3, 2), centres(red - blue > 60)
    assert np.ptp(dots[..., 0], axis=1).max() < 2
    assert (np.diff(dots[:, 0, 0]) > 20).all()
    np.testing.assert_allclose(means[:, 0], dots[:, 0, 0], atol=1)
    columns = dots[..., 1]
    per_point = (columns[:, 2] - columns[:, 0]) / 2
    np.testing.assert_allclose(columns[:, 1], columns[:, 0] + 1.5 * per_point, atol=1)
    np.testing.assert_allclose(means[:, 1], columns[:, 0] + 3.5 / 3 * per_point, atol=1)
    np.testing.assert_allclose(np.diff(columns[:, 0]), per_point[0], atol=1)
