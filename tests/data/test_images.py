import struct
import subprocess
import sys
import zlib
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from maskx.core.images import shrink_image, warp_image
from maskx.data.images import read_image, read_image_sample, read_record_image, read_rgb


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
    with pytest.raises(ValueError, match=r"a\.png' \(id 1\) is empty\. It cannot be read"):
        read_image(path, 5, 7, 1)
    path.write_bytes(b"no image, and of no known kind")
    with pytest.raises(ValueError, match=r"a\.png' \(id 1\) cannot be read"):
        read_image(path, 5, 7, 1)
    cv2.imwrite(str(path), np.zeros((5, 7, 3), np.uint8))
    with pytest.raises(ValueError, match="is 7 x 5 pixels, but its annotations say 5 x 7"):
        read_image(path, 7, 5, 1)


def test_grey_of_16_bits_is_read_by_its_upper_8(tmp_path):
    grey = np.random.default_rng(0).integers(0, 65536, (5, 7)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), grey)
    image = read_image(tmp_path / "a.png", 5, 7, 1)
    assert image.std() > 10
    assert np.abs(image[:, :, 0].astype(int) - grey // 256).max() <= 1


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_files_that_are_cut_off_are_named(tmp_path, ending):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = cv2.imencode(f".{ending}", pixels)[1].tobytes()
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"a\.{ending}' \(id 1\) is a .* file that is cut off"):
        read_image(path, 64, 64, 1)


def test_a_turned_image_is_read_upright(tmp_path):
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    image = read_image(tmp_path / "a.jpg", 12, 8, 1)
    assert image.shape == (12, 8, 3)
    assert image[:, :3].mean() < 60 < 190 < image[:, 5:].mean()
    with pytest.raises(ValueError, match="is 8 x 12 pixels, but its annotations say 12 x 8"):
        read_image(tmp_path / "a.jpg", 8, 12, 1)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "bmp", "gif"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_the_pixels_of_every_kind_of_file_are_those_of_opencv(tmp_path, ending, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 70, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 8
    image, path = Image.fromarray(pixels).convert(mode), tmp_path / f"bild_ä.{ending}"
    image.convert("RGB" if (mode, ending) in (("P", "jpg"), ("P", "webp")) else mode).save(
        path, **({"exif": exif} if ending in ("jpg", "tif") else {})
    )
    expected = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(read_image(path, *expected.shape[:2], 1), expected)
    rgb = read_rgb(path)
    assert np.array_equal(rgb, expected[:, :, ::-1])
    assert rgb.flags.c_contiguous
    height, width = expected.shape[:2]
    record = {"file_name": path, "height": height, "width": width, "image_id": 1}
    sample = read_image_sample(record)["image"]
    assert sample.is_contiguous()
    assert np.array_equal(sample.permute(1, 2, 0), rgb)


def test_an_image_is_resized_as_it_lies_to_the_same_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 70, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    record = {"file_name": tmp_path / "a.png", "height": 300, "width": 70, "image_id": 1}
    whole = read_image_sample(record)["image"]
    for resize in (partial(shrink_image, sizes=(32, 100)), partial(warp_image, size=48)):
        small = read_image_sample(record, resize)["image"]
        assert small.is_contiguous()
        assert torch.equal(small, resize(whole))


@pytest.mark.skipif(not hasattr(cv2, "IMREAD_COLOR_RGB"), reason="needs OpenCV 4.11")
def test_an_image_takes_the_memory_of_its_pixels_once(tmp_path):
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), np.zeros((4000, 4000, 3), np.uint8))
    read = "import resource, sys; from maskx.data.images import read_rgb\n"
    read += "def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    read += "before = peak(); read_rgb(sys.argv[1]); print(peak() - before)"
    done = subprocess.run([sys.executable, "-c", read, str(path)], capture_output=True, text=True)
    assert int(done.stdout) < 1.5 * 48e6


def write_bomb(path, width, height):
    """Write a PNG file of few bytes that says it has many pixels."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"0" * 99)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((50_000, 50_000), "has more than 268 million pixels"),
        ((18_000, 18_000), "has more than 268 million pixels"),
        ((1, 20_000), "is 1 x 20000 pixels. Allowed: one side at most 200 times the other"),
        ((9_000, 9_000), "is 9000 x 9000 pixels, but its annotations say 64 x 64"),
    ],
)
def test_sizes_are_checked_before_a_pixel_is_read(tmp_path, size, words):
    write_bomb(tmp_path / "a.png", *size)
    with pytest.raises(ValueError, match=words):
        read_image(tmp_path / "a.png", 64, 64, 1)
    if size != (9_000, 9_000):
        with pytest.raises(ValueError, match=words):
            read_image(tmp_path / "a.png", *size[::-1], 1)


def test_records_may_ask_for_rgb_and_lack_a_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    record = {"file_name": str(tmp_path / "a.png")}
    assert np.array_equal(read_record_image(record), pixels)
    rgb = read_record_image(record | {"height": 5, "width": 7, "image_id": 1}, image_format="RGB")
    assert np.array_equal(rgb, pixels[:, :, ::-1])
