"""Broken files of every format: each must be read, or refused by an error that names it.

A mutant is a good file of which something is changed where its format has structure: keys and
values of JSON, chunks of a PNG, headers of arrays. Mutants are numbered, and a number always gives
the same one.

Example:
    python tools/benchmarks/mutants.py --formats coco tags --count 2000
"""

import argparse
import copy
import io
import json
import logging
import pickle
import random
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from maskx.core.array_pickles import read_array_pickle
from maskx.core.tensor_files import write_tensors
from maskx.core.word_table import WordTable, load_word_table
from maskx.core.word_vectors import load_class_vectors
from maskx.data.coco import load_coco
from maskx.data.images import read_image
from maskx.data.label_maps import read_label_map
from maskx.data.tag_lists import read_tag_list
from maskx.engine.training import read_checkpoint

__all__ = ["FORMATS", "Finding", "find_bad"]

_SECONDS = 5  # in which a small file must be read or refused
_SIZE = (24, 32)
_ODD = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    10**400,
    "",
    "1",
    "a",
    "\ud800",
    "../x",
    [],
    [[]],
    [None],
    {},
    {"a": 1},
    [1, 2, 3, 4],
    [[0, 0, 5, 0, 5, 5]],
    {"size": [24, 32], "counts": [768]},
    {"size": [1], "counts": "\x00"},
)


class Finding(NamedTuple):
    """A mutant that was neither read nor refused as it should be."""

    number: int
    what: str


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        name: of the file.
        make: a mutant, from a random source and an empty folder for files beside it.
        read: reads it; raises an AssertionError where something is lost unseen.
    """

    name: str
    make: Callable[[random.Random, Path], bytes]
    read: Callable[[Path], object]


def find_bad(format_name: str, numbers: Iterable[int]) -> list[Finding]:
    """Read mutants of a format, and return those that end in anything but success or our error."""
    form, found = FORMATS[format_name], []
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        for number in numbers:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                path = Path(folder) / form.name
                path.write_bytes(form.make(random.Random(number), Path(folder)))
                problem = _problem(form, path)
            if problem:
                found.append(Finding(number, problem))
    finally:
        logging.disable(previous)
    return found


def _problem(form: Format, path: Path) -> str | None:
    started = time.process_time()
    try:
        form.read(path)
    except (ValueError, FileNotFoundError) as error:
        # Files beside it are named after it.
        if path.stem not in str(error):
            return f"{type(error).__name__} does not name the file: {error!s:.200}"
    except Exception as error:  # what must not happen
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {place.filename}:{place.lineno}: {error!s:.200}"
    seconds = time.process_time() - started
    return f"took {seconds:.1f} s" if seconds > _SECONDS else None


def _changed(random_: random.Random, value: Any) -> Any:
    """Return a copy of a JSON value in which one or two places are changed."""
    value = copy.deepcopy(value)
    for _ in range(random_.choice((1, 1, 2))):
        parent, key = random_.choice([*_places(value)])
        kind = random_.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == 2 and isinstance(parent, dict):
            parent[f"{key}_"] = parent.pop(key)
        elif kind == 3 and isinstance(parent[key], int | float) and parent[key] is not None:
            parent[key] = random_.choice((-parent[key], parent[key] * 1000, str(parent[key])))
        else:
            parent[key] = copy.deepcopy(random_.choice(_ODD))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in [*value] if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _bytes_changed(random_: random.Random, content: bytes) -> bytes:
    """Cut, repeat or change bytes."""
    content = bytearray(content)
    kind, at = random_.randrange(5), random_.randrange(max(1, len(content)))
    if kind == 0:
        del content[at:]
    elif kind == 1:
        del content[at : at + random_.randrange(1, 40)]
    elif kind == 2:
        content[at:at] = content[max(0, at - random_.randrange(1, 40)) : at]
    else:
        for _ in range(random_.choice((1, 4, 30))):
            content[random_.randrange(len(content))] = random_.randrange(256)
    return bytes(content)


def _json_text(random_: random.Random, value: Any) -> bytes:
    text = json.dumps(value, indent=random_.choice((None, None, 1)))
    kind = random_.randrange(12)
    if kind == 0:
        return _bytes_changed(random_, text.encode())
    if kind == 1:
        return text.replace('"id":', '"id": 7, "id":', 1).encode()
    if kind == 2:
        return text.encode(random_.choice(("utf-8-sig", "utf-16", "utf-32")))
    return text.encode()


_COCO = {
    "info": {"year": 2020},
    "images": [
        {"id": n, "file_name": f"{n}.png", "height": _SIZE[0], "width": _SIZE[1]} for n in (1, 2, 3)
    ],
    "annotations": [
        {
            "id": n,
            "image_id": n % 3 + 1,
            "category_id": n % 2 + 1,
            "bbox": [2, 3, 10, 8],
            "area": 80,
            "iscrowd": int(n == 4),
            "segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]]
            if n < 4
            else {"size": [*_SIZE], "counts": [100, 50, 618]},
        }
        for n in range(1, 6)
    ],
    "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
}


def _read_coco(path: Path) -> None:
    for strict in (True, False):
        try:
            data = load_coco(path, path.parent, check_images=False, strict=strict)
        except (ValueError, FileNotFoundError):
            if not strict:
                raise
            continue
        rows = json.loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))["annotations"]
        lost = len(rows) - sum(len(record["annotations"]) for record in data.records)
        reported = sum(data.problems.values())
        assert 0 <= lost <= reported, f"{lost} annotations are lost, {reported} problems reported"


def _make_tags(random_: random.Random, folder: Path) -> bytes:
    lines = [
        {"file_name": f"{n}.jpg", "tags": ["cat", "two words", "dog"][: n % 4]} for n in range(6)
    ]
    lines = _changed(random_, lines)
    if random_.randrange(4) == 0:
        coco = _changed(random_, _COCO)
        return _json_text(random_, coco)
    return b"\n".join(_json_text(random_, line) for line in lines)


def _read_tags(path: Path) -> None:
    tags = read_tag_list(path, strict=False)
    assert len(tags.image_ids) == len(tags), "images and their tags differ in number"


def _png(random_: random.Random, palette: bool) -> bytes:
    pixels = np.random.RandomState(random_.randrange(99)).randint(0, 5, (*_SIZE, 3)).astype("u1")
    image = Image.fromarray(pixels[..., 0] if palette else pixels)
    if palette:
        image.putpalette([*range(256)] * 3)
    file = io.BytesIO()
    image.save(file, format="PNG")
    return _png_changed(random_, file.getvalue())


def _png_changed(random_: random.Random, content: bytes) -> bytes:
    """Change a field of the header, a chunk or some bytes; checksums fit, mostly."""
    chunks, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    kind, which = random_.randrange(8), random_.randrange(len(chunks))
    if kind == 0:
        header = [*struct.unpack(">IIBBBBB", chunks[0][1])]
        place = random_.randrange(7)
        header[place] = random_.choice((0, 1, 2, 3, 6, 16, 255, *((70000, 2**31) * (place < 2))))
        chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", *header))
    elif kind == 1:
        del chunks[which]
    elif kind == 2:
        chunks.insert(which, random_.choice(chunks))
    elif kind == 3:
        name, data = chunks[which]
        chunks[which] = (name, _bytes_changed(random_, data) if data else b"x")
    elif kind == 4:
        extra = random_.choice((b"tEXt", b"iCCP", b"eXIf", b"acTL", b"tRNS", b"zTXt"))
        chunks.insert(1, (extra, random_.randbytes(random_.choice((0, 1, 30, 3000)))))
    elif kind == 5:  # other pixels
        data = zlib.decompress(b"".join(data for name, data in chunks if name == b"IDAT"))
        chunks = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
        chunks.insert(-1, (b"IDAT", zlib.compress(_bytes_changed(random_, data))))
    changed = content[:8] + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return _bytes_changed(random_, changed) if kind > 5 else changed


def _make_image(random_: random.Random, folder: Path) -> bytes:
    if random_.randrange(2):
        return _png(random_, palette=False)
    file = io.BytesIO()
    pixels = np.random.RandomState(0).randint(0, 255, (*_SIZE, 3)).astype("u1")
    Image.fromarray(pixels).save(file, format="JPEG")
    return _bytes_changed(random_, file.getvalue())


def _make_word_table(random_: random.Random, folder: Path) -> bytes:
    """Change what the file says, with a digest that fits, its header, or bytes."""
    tensors = {"vectors": torch.ones(2, 3), "idf": torch.ones(2)}
    table = WordTable(("a", "b c"), tensors["vectors"].numpy(), tensors["idf"].numpy(), source="s")
    about = {"names": [*table.names], "source": "s", "hash": table.hash}
    kind, path = random_.randrange(4), folder / "made.safetensors"
    if kind == 0:
        about = _changed(random_, about)
    elif kind == 1:
        name = random_.choice([*tensors])
        odd = (torch.ones(2, dtype=torch.int64), torch.zeros(2, 3), torch.ones(0), torch.ones(()))
        tensors[random_.choice((name, "other"))] = random_.choice(odd)
        del tensors[name if random_.randrange(4) == 0 else [*tensors][-1]]
    write_tensors(path, tensors, "word table", about)
    content = path.read_bytes()
    if kind == 2:
        return _bytes_changed(random_, content)
    if kind == 3:
        (length,) = struct.unpack("<Q", content[:8])
        text = json.dumps(_changed(random_, json.loads(content[8 : 8 + length]))).encode()
        content = struct.pack("<Q", len(text)) + text + content[8 + length :]
    return content


_NAMES = ("cat", "dog", "traffic light")


def _make_word_text(random_: random.Random, folder: Path) -> bytes:
    lines = [[word, "0.5", "-1", "2e-3"] for word in ("cat", "dog", "traffic", "light", "other")]
    for _ in range(random_.choice((1, 2))):
        line = random_.choice(lines)
        place = random_.randrange(len(line))
        kind = random_.randrange(3)
        if kind == 0:
            line[place] = random_.choice(("", "nan", "1e999", "x", "\u2028", "0x1", "5 5", "\x00"))
        elif kind == 1 and len(line) > 1:
            del line[place]
        else:
            line.insert(place, random_.choice(("1", "word")))
    content = "\n".join(" ".join(line) for line in lines).encode()
    return _bytes_changed(random_, content) if random_.randrange(3) == 0 else content


def _make_word_array(random_: random.Random, folder: Path) -> bytes:
    words = "\n".join(("cat", "dog", "traffic_light")).encode()
    if random_.randrange(4) == 0:
        words = _bytes_changed(random_, words)
    (folder / "words.txt").write_bytes(words)
    header = {"descr": "<f4", "fortran_order": False, "shape": (3, 2)}
    if random_.randrange(3):
        odd = ("<f8", "|O", "<U4", "<M8", ">i2", 3, (3,), (10**9, 10**9), (3, -2), None, "f4,f4")
        header[random_.choice([*header])] = random_.choice(odd)
    text = repr(header).encode()
    text = _bytes_changed(random_, text) if random_.randrange(4) == 0 else text
    content = (
        b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + np.ones(6, "f4").tobytes()
    )
    return _bytes_changed(random_, content) if random_.randrange(4) == 0 else content


def _make_checkpoint(random_: random.Random, folder: Path) -> bytes:
    content = {"model": {"a": [1.0, 2.0]}, "run": {"b": 1}, "iteration": 3, "version": 1}
    if random_.randrange(2):
        content = _changed(random_, content)
    file = io.BytesIO()
    torch.save({**content, "weights": torch.ones(4)}, file)
    return _bytes_changed(random_, file.getvalue()) if random_.randrange(3) else file.getvalue()


def _make_pickle(random_: random.Random, folder: Path) -> bytes:
    content = {"model": {"a": np.ones((2, 3), np.float32), "b": np.float64(3)}, "author": "x"}
    protocol = random_.randrange(5)
    return _bytes_changed(random_, pickle.dumps(content, protocol=protocol))


FORMATS = {
    "coco": Format("coco.json", lambda r, _: _json_text(r, _changed(r, _COCO)), _read_coco),
    "tags": Format("tags.jsonl", _make_tags, _read_tags),
    "label_maps": Format(
        "map.png",
        lambda r, _: _png(r, palette=True),
        lambda path: read_label_map(path, *_SIZE, num_classes=4, image_id=1),
    ),
    "images": Format("image.png", _make_image, lambda path: read_image(path, *_SIZE, 1)),
    "word_tables": Format("table.safetensors", _make_word_table, load_word_table),
    "word_texts": Format(
        "words.txt", _make_word_text, lambda path: load_class_vectors(path, _NAMES)
    ),
    "word_arrays": Format(
        "words.npy", _make_word_array, lambda path: load_class_vectors(path, _NAMES)
    ),
    "checkpoints": Format(
        "checkpoint.pth", _make_checkpoint, lambda path: read_checkpoint(path, "cpu")
    ),
    "pickles": Format("weights.pkl", _make_pickle, read_array_pickle),
}


def main() -> None:
    """Read mutants and say which ended otherwise than they should."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*FORMATS])
    parser.add_argument("--count", type=int, default=2000, help="of each (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    arguments = parser.parse_args()
    bad = 0
    for name in arguments.formats:
        started = time.process_time()
        found = find_bad(name, range(arguments.first, arguments.first + arguments.count))
        bad += len(found)
        seconds = time.process_time() - started
        print(
            f"{name}: {len(found)} of {arguments.count} end otherwise, {seconds:.0f} s", flush=True
        )
        for number, what in found[:20]:
            print(f"  {number}: {what}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
