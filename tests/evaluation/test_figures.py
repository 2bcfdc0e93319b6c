import cv2
import numpy as np

from maskx.evaluation.figures import (
    COLOR_WITH_MASKS,
    COLOR_WITHOUT_MASKS,
    contact_sheet,
    draw_instances,
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
