import cv2
import numpy as np
import pytest

from maskx.evaluation.figures import (
    COLOR_WITH_MASKS,
    COLOR_WITHOUT_MASKS,
    SPLIT_LEGEND,
    contact_sheet,
    draw_heat_map,
    draw_instances,
    draw_label_map,
    draw_similarities,
    plain_tile,
    save_png,
)


def make_tile(with_masks, side=100):
    mask = np.zeros((1, 50, 50), bool)
    mask[0, 20:40, 10:30] = True
    return draw_instances(
        np.zeros((50, 50, 3), np.uint8),
        boxes=np.array([[10.0, 20.0, 30.0, 40.0]]),
        masks=mask,
        labels=["x"],
        with_masks=[with_masks],
        side=side,
    )


def test_boxes_are_green_with_masks_and_red_without():
    for with_masks, color in ((True, COLOR_WITH_MASKS), (False, COLOR_WITHOUT_MASKS)):
        tile = make_tile(with_masks)
        assert tuple(tile[80, 40]) == color  # the lower edge of the box, at twice the size
        inside = tile[60, 40].astype(int)
        assert np.abs(inside - 0.4 * np.array(color)).max() <= 1
        assert (tile[95, 95] == 0).all()


def test_an_image_is_fitted_and_an_image_without_instances_stays():
    image = np.full((20, 40, 3), 77, np.uint8)
    tile = draw_instances(
        image,
        boxes=np.zeros((0, 4)),
        masks=np.zeros((0, 20, 40), bool),
        labels=[],
        with_masks=[],
        side=80,
    )
    assert (tile[:40] == 77).all()
    assert (tile[40:] == 255).all()
    assert (image == 77).all()
    assert np.array_equal(plain_tile(image, 80), tile)


def test_sheet_fills_the_last_row(tmp_path):
    sheet = contact_sheet([make_tile(True, 200)] * 5, columns=4)
    assert sheet.shape[1:] == (800, 3)
    assert (sheet.shape[0] - 400) > 0
    save_png(tmp_path / "sheet.png", sheet)
    assert np.array_equal(cv2.imread(str(tmp_path / "sheet.png"))[:, :, ::-1], sheet)


def test_rows_of_a_sheet_have_titles():
    tiles = [make_tile(True, 200)] * 4
    plain = contact_sheet(tiles, columns=2)
    titled = contact_sheet(tiles, columns=2, row_titles=["one", "two"])
    extra = (titled.shape[0] - plain.shape[0]) // 2
    assert extra > 0
    legend = plain.shape[0] - 400
    strip = titled[legend : legend + extra]
    assert (strip == 255).any()
    assert (strip == 0).any()  # letters
    assert np.array_equal(titled[legend + extra :][:200], plain[legend:][:200])


def test_a_sheet_may_have_another_legend_or_none():
    tiles = [make_tile(True, 200)] * 4
    bare = contact_sheet(tiles, columns=2, legend=())
    assert np.array_equal(bare, np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])]))
    default = contact_sheet(tiles, columns=2)
    assert np.array_equal(default, contact_sheet(tiles, columns=2, legend=SPLIT_LEGEND))
    other = contact_sheet(tiles, columns=2, legend=[((1, 2, 3), "a class")])
    assert (other == (1, 2, 3)).all(axis=2).any()
    assert not (other[:34] == COLOR_WITH_MASKS).all(axis=2).any()
    assert np.array_equal(other[34:], bare)


def test_columns_have_titles_once():
    tiles = [make_tile(True, 200)] * 6
    bare = contact_sheet(tiles, columns=3, legend=())
    titled = contact_sheet(tiles, columns=3, column_titles=["one", "", "three"], legend=())
    assert np.array_equal(titled[34:], bare)
    written = [bool((titled[:34, x : x + 200] == 0).any()) for x in (0, 200, 400)]
    assert written == [True, False, True]
    both = contact_sheet(
        tiles, columns=3, column_titles=["a", "b", "c"], row_titles=["d", "e"], legend=()
    )
    assert both.shape[0] == bare.shape[0] + 3 * 34


def test_too_few_titles_are_refused():
    tiles = [make_tile(True, 200)] * 4
    with pytest.raises(ValueError, match="The sheet has 2 columns, but 1 column titles"):
        contact_sheet(tiles, columns=2, column_titles=["one"])
    with pytest.raises(ValueError, match="The sheet has 2 rows, but 3 row titles"):
        contact_sheet(tiles, columns=2, row_titles=["one", "two", "three"])


def grey_image(height=20, width=40, value=100):
    return np.full((height, width, 3), value, np.uint8)


def test_label_maps_have_the_colors_of_voc():
    label_map = np.zeros((20, 40), np.uint8)
    label_map[:10, :10] = 1  # (128, 0, 0)
    label_map[10:, :10] = 2  # (0, 128, 0)
    label_map[:, 30:] = 255
    image = grey_image()
    tile = draw_label_map(image, label_map, num_classes=20, side=80)
    assert tile.shape == (80, 80, 3)
    assert (tile[40:] == 255).all()
    assert tile[10, 10].tolist() == [round(0.4 * 100 + 0.6 * 128), 40, 40]
    assert tile[30, 10].tolist() == [40, round(0.4 * 100 + 0.6 * 128), 40]
    assert (tile[:40, 20:60] == 100).all()
    unknown = tile[:40, 60:]
    assert {tuple(color) for color in unknown.reshape(-1, 3).tolist()} == {(100,) * 3, (150,) * 3}
    assert (image == 100).all()


def test_names_are_written_on_their_classes_only():
    label_map = np.zeros((200, 200), np.uint8)
    label_map[50:150, 50:150] = 2
    plain = draw_label_map(grey_image(200, 200), label_map, num_classes=2, side=200)
    named = draw_label_map(
        grey_image(200, 200), label_map, num_classes=2, names=["cat", "dog"], side=200
    )
    rows, columns, _ = np.nonzero(plain != named)
    assert 50 <= rows.min() <= rows.max() < 150
    assert 50 <= columns.min() <= columns.max() < 150
    assert (named[rows, columns] == (0, 128, 0)).all(axis=1).any()
    nothing = draw_label_map(
        grey_image(), np.zeros((20, 40), int), num_classes=2, names=["cat", "dog"], side=40
    )
    assert (nothing[:20] == 100).all()


def test_many_classes_repeat_the_colors():
    label_map = np.full((20, 20), 65535, np.int32)
    label_map[:, :10] = 232
    tile = draw_label_map(grey_image(20, 20), label_map, num_classes=1000, side=20)
    first = draw_label_map(grey_image(20, 20), np.ones((20, 20), int), num_classes=2, side=20)
    assert np.array_equal(tile[:, :10], first[:, :10])
    assert (tile[:, 10:] == 150).all(axis=2).any()


def test_every_class_is_seen_on_a_grey_image():
    for label in (7, 56, 63, 71, 231):
        label_map = np.full((20, 20), label, np.uint8)
        tile = draw_label_map(grey_image(20, 20, 128), label_map, num_classes=250, side=20)
        assert np.ptp(tile[10, 10].astype(int)) >= 0.6 * 64 - 1, label
    first, repeated = (
        draw_label_map(grey_image(20, 20), np.full((20, 20), n), num_classes=250, side=20)
        for n in (1, 231)
    )
    assert not np.array_equal(first, repeated)


def test_a_label_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"shape \(40, 20\), its image \(20, 40\)"):
        draw_label_map(grey_image(), np.zeros((40, 20), int), num_classes=2)


def test_symmetric_heat_maps_are_blue_white_and_red():
    values = np.array([[-2.0, 0.0, 1.0]])
    tile = draw_heat_map(grey_image(10, 30, 0), values, symmetric=True, side=30).astype(int)
    blue, white, red = tile[5, 0], tile[5, 14], tile[5, 29]
    assert blue[2] > blue[0] + 100
    assert (np.abs(white - 0.6 * 255) <= 12).all()
    assert red[0] > red[2] + 40
    # -2 is the largest absolute value, so 1 has half the strength of the other end.
    assert red[2] > blue[0] + 50
    assert (tile[10:] == 255).all()


def test_sequential_heat_maps_rise_from_zero_to_the_largest_value():
    image = grey_image(10, 40, 0)
    values = np.array([[-5.0, 0.0, 1.0, 2.0]])
    tile = draw_heat_map(image, values, symmetric=False, side=40).astype(int)
    brightness = tile[5].sum(axis=1)
    assert brightness[0] == brightness[12] < brightness[25] < brightness[39]
    doubled = draw_heat_map(image, 2 * values, symmetric=False, side=40)
    assert np.array_equal(doubled, tile)


def test_points_are_marked_in_the_image_and_in_their_own_map():
    image, points = grey_image(20, 40, 120), [(10, 10), (30, 5)]
    maps = np.stack([np.full((2, 4), 0.5), np.eye(2, 4)])
    sheet = draw_similarities(image, points, maps, symmetric=False, side=80)[-80:]
    assert sheet.shape == (80, 240, 3)
    plain = [draw_heat_map(image, each, symmetric=False, side=80) for each in maps]
    for tile, (x, y) in ((0, points[0]), (0, points[1]), (1, points[0]), (2, points[1])):
        marked = sheet[:, 80 * tile : 80 * (tile + 1)][2 * y + 1, 2 * x + 1]
        assert np.ptp(marked.astype(int)) > 100
    assert np.array_equal(sheet[:, 80:160][:, 50:], plain[0][:, 50:])
    assert np.array_equal(sheet[:, 160:][:, :50], plain[1][:, :50])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("symmetric", [True, False])
def test_heat_maps_without_numbers(symmetric):
    image = grey_image(10, 20, 50)
    values = np.full((2, 4), np.nan)
    assert (draw_heat_map(image, values, symmetric=symmetric, side=20)[:10] == 150).all()
    values[:, 2:] = 0
    tile = draw_heat_map(image, values, symmetric=symmetric, side=20)[:10]
    assert (tile[:, :10] == 150).all()
    assert len(np.unique(tile[:, 10:].reshape(-1, 3), axis=0)) == 1
    values[0, 3] = -3
    draw_heat_map(image, values, symmetric=symmetric, side=20)
