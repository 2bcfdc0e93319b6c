"""The pages and answers of `maskx serve`, on Flask."""

import io
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from flask import Flask, Response, abort, jsonify, request, send_file
from PIL import Image, ImageOps, UnidentifiedImageError
from werkzeug.exceptions import HTTPException

from maskx.cli.web.photograph import Photograph, base_name, read_annotations
from maskx.core.text import listed
from maskx.engine.mask_sources import NoMask, RunSource
from maskx.engine.predictor import Predictor

__all__ = ["make_app"]

_PAGE = Path(__file__).with_name("page.html")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_KEPT = 8  # photographs that are held for further questions


class _RefusedError(ValueError):
    """What a person asked for cannot be done; the page shows the message."""


def make_app(
    predictor: Predictor,
    run: str | os.PathLike[str],
    *,
    max_bytes: int,
    max_pixels: int,
    strict: bool = True,
    hosts: Collection[str] | None = None,
) -> Flask:
    """Make the application.

    Args:
        predictor: the opened run.
        run: its folder or model file.
        max_bytes: of an upload; a larger one is refused before it is read.
        max_pixels: of an image; a larger one is refused before it is decoded.
        strict: whether what is wrong in an annotation file is an error; else it is mended or left
            out, and the page says so.
        hosts: names under which the page may be asked for; None for any. Another site could give
            its own name the address of this machine, and then read the answers.
    """
    app = Flask(__name__, static_folder=None)
    # A little more than the file, for the form around it.
    app.config["MAX_CONTENT_LENGTH"] = max_bytes + 2**16
    app.config["MAX_FORM_MEMORY_SIZE"] = 2**16
    kept: OrderedDict[str, Photograph] = OrderedDict()
    source = RunSource(predictor, run, {})
    lock = threading.Lock()  # the model answers one question at a time
    split = predictor.run.split

    @app.before_request
    def check_host() -> None:
        host = urlsplit(f"//{request.host}").hostname
        if hosts is not None and host not in hosts:
            abort(
                403,
                f"The page was asked for under the name {host!r:.80}. Allowed: "
                f"{', '.join(sorted(hosts))}. Another address is given by --host.",
            )

    @app.get("/")
    def page() -> Response:
        return send_file(_PAGE)

    @app.get("/model")
    def model() -> Response:
        return jsonify(
            title=predictor.system.title,
            class_names=predictor.class_names,
            without_masks=[] if split is None else split.without_masks,
            takes_boxes=predictor.system.box_masks is not None,
            takes_concepts=predictor.system.takes_concepts,
        )

    @app.post("/predict")
    def predict() -> Response:
        pixels, name = _read_upload(max_pixels)
        concepts = [c.strip() for c in request.form.get("concepts", "").split(",") if c.strip()]
        with lock:
            found = predictor(pixels, **({"concepts": concepts} if concepts else {}))
            key, photograph = uuid.uuid4().hex, Photograph(found, name)
            kept[key] = photograph
            while len(kept) > _KEPT:
                kept.popitem(last=False)
        return jsonify(
            id=key, width=pixels.shape[1], height=pixels.shape[0], objects=photograph.objects()
        )

    @app.post("/annotations")
    def annotations() -> Response:
        photograph = _kept(kept, request.form.get("id", ""))
        upload = request.files.get("annotations")
        if not upload:
            raise _RefusedError("No file came. Send annotations as the field 'annotations'.")
        content, warnings = read_annotations(upload, strict=strict)
        with lock:
            photograph.take_file(content, base_name(upload.filename))
        objects = photograph.objects()
        names = {each["name"] for each in objects if each["needs_mask"]}
        unknown = sorted(names - set(predictor.class_names))
        return jsonify(objects=objects, unknown=unknown, warnings=warnings)

    @app.post("/mask")
    def mask() -> Response:
        asked = _read_question()
        photograph = _kept(kept, asked["id"])
        with lock:
            if "object" in asked:
                name, box = photograph.box_without_mask(asked["object"])
            else:
                size = photograph.found.image_size
                name, box = asked["name"], _checked_box(asked.get("box"), size)
            keys = _mask_keys(source, photograph, name, box)
            if "object" in asked:
                photograph.give_mask(asked["object"], keys)
            else:
                photograph.add_drawn(name, box, keys)
        return jsonify(objects=photograph.objects())

    @app.get("/coco/<key>")
    def coco(key: str) -> Response:
        threshold = request.args.get("threshold", 0.0, type=float)
        answer = jsonify(_kept(kept, key).to_coco(threshold, source.name))
        answer.headers["Content-Disposition"] = "attachment; filename=annotations.json"
        return answer

    @app.errorhandler(ValueError)
    def refused(error: ValueError) -> tuple[Response, int]:
        return jsonify(error=str(error)), 400

    @app.errorhandler(HTTPException)
    def failed(error: HTTPException) -> tuple[Response, int]:
        message = error.description
        if error.code == 413:
            message = (
                f"The file is larger than {max_bytes / 2**20:.0f} MiB. Make it smaller, or give "
                "--max-megabytes."
            )
        return jsonify(error=message), error.code

    @app.after_request
    def guard(response: Response) -> Response:
        # Nothing of other sites is loaded, and no other site may frame or read this one.
        policy = "default-src 'self' 'unsafe-inline' blob: data:; frame-ancestors 'none'"
        response.headers["Content-Security-Policy"] = policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    return app


def _read_upload(max_pixels: int) -> tuple[np.ndarray, str]:
    """Read the uploaded image, (H, W, 3) uint8 RGB, turned as its EXIF data says, and its name."""
    upload = request.files.get("image")
    if not upload:
        raise _RefusedError("No image came. Send a photograph as the field 'image'.")
    try:
        image = Image.open(io.BytesIO(upload.read()), formats=_FORMATS)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise _RefusedError(
            f"'{upload.filename}' is no image that can be read. Allowed: {', '.join(_FORMATS)}."
        ) from error
    if image.width * image.height > max_pixels:
        raise _RefusedError(
            f"'{upload.filename}' has {image.width} x {image.height} pixels. Allowed are "
            f"{max_pixels / 1e6:.0f} million; make it smaller, or give --max-megapixels."
        )
    try:
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise _RefusedError(f"'{upload.filename}' is damaged: {error}.") from error
    return pixels, base_name(upload.filename)


def _read_question() -> dict[str, Any]:
    """Read what is asked about an object of a photograph that is held."""
    asked = request.get_json()
    if not (
        isinstance(asked, dict)
        and isinstance(asked.get("id"), str)
        and ("object" in asked or isinstance(asked.get("name"), str))
    ):
        raise _RefusedError(
            f"The question is {asked!r:.80}. Allowed: an object with 'id', the text that came with "
            "the image, and either 'object', the number of an object that has no mask, or 'name', "
            "the text of a class, and 'box', four numbers."
        )
    return asked


def _kept(kept: OrderedDict[str, Photograph], key: str) -> Photograph:
    if key not in kept:
        raise _RefusedError(
            f"This image is no longer held; the last {_KEPT} are. Drop it on the page again."
        )
    return kept[key]


def _checked_box(box: object, size: tuple[int, int]) -> list[float]:
    """Cut a box (x0, y0, x1, y1) to the image, and refuse what is left with no area."""
    try:
        x0, y0, x1, y1 = (float(value) for value in box)
    except (TypeError, ValueError, OverflowError) as error:
        raise _RefusedError(
            f"The box is {box!r:.80}. Allowed: four numbers x0, y0, x1, y1."
        ) from error
    height, width = size
    x0, x1 = np.clip([min(x0, x1), max(x0, x1)], 0, width)
    y0, y1 = np.clip([min(y0, y1), max(y0, y1)], 0, height)
    if not (x1 - x0 >= 1 and y1 - y0 >= 1):
        raise _RefusedError(f"The box {box} has no pixel in the image of {width} x {height}.")
    return [float(x0), float(y0), float(x1), float(y1)]


def _mask_keys(
    source: RunSource, photograph: Photograph, name: str, box: list[float]
) -> dict[str, Any]:
    """Segment an object, and return the mask as keys of its annotation."""
    known = source.predictor.class_names
    if name not in known:
        raise _RefusedError(f"The model does not know '{name}'. It knows {listed(known)}.")
    (found,) = source(photograph.found.image, np.array([box]), [name])
    if isinstance(found, NoMask):
        raise _RefusedError(f"There is no mask of this {name}: {found.reason}. Drag another box.")
    return found.annotation_keys(source.name, found.score)
