import cv2
import numpy as np
import pytest

from maskx.data.images import read_image


def test_pixels_come_in_bgr(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = tmp_path / "bild_ä.png"
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    assert np.array_equal(read_image(path, 5, 7, 1), pixels)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(
        FileNotFoundError, match=r"a\.png' \(id 1\): there is no such file\. Check the image folder"
    ):
        read_image(path, 5, 7, 1)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.png' \(id 1\) cannot be read"):
        read_image(path, 5, 7, 1)
    cv2.imwrite(str(path), np.zeros((5, 7, 3), np.uint8))
    with pytest.raises(ValueError, match="is 7 x 5 pixels, but its annotations say 5 x 7"):
        read_image(path, 7, 5, 1)
