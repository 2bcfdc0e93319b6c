"""The pages and answers of `maskx serve`, on Flask."""

import dataclasses
import io
import threading
import uuid
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
from flask import Flask, Response, abort, jsonify, request, send_file
from PIL import Image, ImageOps, UnidentifiedImageError
from werkzeug.exceptions import HTTPException

from maskx.data.masks import decode_segmentation
from maskx.engine.predictor import Predictor
from maskx.engine.results import Prediction

__all__ = ["make_app"]

_PAGE = Path(__file__).with_name("page.html")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_KEPT = 8  # images whose predictions are held for further questions


class _RefusedError(ValueError):
    """What a person asked for cannot be done; the page shows the message."""


def make_app(
    predictor: Predictor, *, max_bytes: int, max_pixels: int, hosts: Collection[str] | None = None
) -> Flask:
    """Make the application.

    Args:
        predictor: of a run folder.
        max_bytes: of an upload; a larger one is refused before it is read.
        max_pixels: of an image; a larger one is refused before it is decoded.
        hosts: names under which the page may be asked for; None for any. Another site could give
            its own name the address of this machine, and then read the answers.
    """
    app = Flask(__name__, static_folder=None)
    # A little more than the file, for the form around it.
    app.config["MAX_CONTENT_LENGTH"] = max_bytes + 2**16
    app.config["MAX_FORM_MEMORY_SIZE"] = 2**16
    kept: OrderedDict[str, Prediction] = OrderedDict()
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
        pixels = _read_upload(max_pixels)
        concepts = [c.strip() for c in request.form.get("concepts", "").split(",") if c.strip()]
        with lock:
            found = predictor(pixels, **({"concepts": concepts} if concepts else {}))
            key = uuid.uuid4().hex
            kept[key] = found
            while len(kept) > _KEPT:
                kept.popitem(last=False)
        return jsonify(
            id=key, width=pixels.shape[1], height=pixels.shape[0], objects=_objects(found)
        )

    @app.post("/mask")
    def mask() -> Response:
        asked = _read_question()
        found = _kept(kept, asked["id"])
        box = _checked_box(asked.get("box"), found.image_size)
        with lock:
            masks = predictor.masks_of_boxes(found.image, [box], [asked["name"]])
            grown = _with_object(found, box, asked["name"], masks.encode()[0])
            kept[asked["id"]] = grown
        return jsonify(objects=_objects(grown))

    @app.get("/coco/<key>")
    def coco(key: str) -> Response:
        found = _kept(kept, key)
        threshold = request.args.get("threshold", 0.0, type=float)
        answer = jsonify(_coco_file(found, request.args.get("name", "image.jpg"), threshold))
        answer.headers["Content-Disposition"] = "attachment; filename=annotations.json"
        return answer

    @app.errorhandler(ValueError)
    def refused(error: ValueError) -> tuple[Response, int]:
        return jsonify(error=str(error)), 400

    @app.errorhandler(HTTPException)
    def failed(error: HTTPException) -> tuple[Response, int]:
        message = error.description
        if error.code == 413:
            message = f"The file is larger than {max_bytes / 2**20:.0f} MiB. Make it smaller."
        return jsonify(error=message), error.code

    @app.after_request
    def guard(response: Response) -> Response:
        # Nothing of other sites is loaded, and no other site may frame or read this one.
        policy = "default-src 'self' 'unsafe-inline' blob: data:; frame-ancestors 'none'"
        response.headers["Content-Security-Policy"] = policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    return app


def _read_upload(max_pixels: int) -> np.ndarray:
    """Read the uploaded image, (H, W, 3) uint8 RGB, turned as its EXIF data says."""
    upload = request.files.get("image")
    if upload is None:
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
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise _RefusedError(f"'{upload.filename}' is damaged: {error}.") from error


def _read_question() -> dict[str, Any]:
    """Read what is asked about a box of an image that is held."""
    asked = request.get_json()
    if not (isinstance(asked, dict) and all(isinstance(asked.get(k), str) for k in ("id", "name"))):
        raise _RefusedError(
            f"The question is {asked!r:.80}. Allowed: an object with 'id', the text that came with "
            "the image, 'name', the text of a class, and 'box', four numbers."
        )
    return asked


def _kept(kept: OrderedDict[str, Prediction], key: str) -> Prediction:
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


def _with_object(found: Prediction, box: list[float], name: str, segmentation: dict) -> Prediction:
    index = found.class_names.index(name)
    return dataclasses.replace(
        found,
        boxes=np.concatenate([np.reshape(found.boxes, (-1, 4)), [box]]),
        segmentations=[*found.segmentations, segmentation],
        scores=np.append(found.scores, 1.0),
        class_indices=np.append(found.class_indices, index),
    )


def _objects(found: Prediction) -> list[dict[str, Any]]:
    """Say what was found, with masks as polygons that the browser fills by the even-odd rule."""
    objects = []
    for entry in found.to_coco(0):
        mask = decode_segmentation(entry["segmentation"], *found.image_size)
        box = None
        if found.boxes is not None:
            x, y, width, height = entry["bbox"]
            box = [x, y, x + width, y + height]
        objects.append(
            {
                "name": found.class_names[entry["category_id"] - 1],
                "score": entry.get("score"),
                "box": box,
                "polygons": _polygons(mask),
            }
        )
    return objects


def _polygons(mask: np.ndarray) -> list[list[int]]:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [contour.ravel().tolist() for contour in contours if len(contour) > 2]


def _coco_file(found: Prediction, name: str, threshold: float) -> dict[str, Any]:
    """Make a COCO file of one image, of the objects whose score reaches the threshold."""
    height, width = found.image_size
    names = enumerate(found.class_names, 1)
    return {
        "images": [{"id": 1, "file_name": Path(name).name, "height": height, "width": width}],
        "annotations": found.above(threshold).to_annotations(1),
        "categories": [{"id": number, "name": name} for number, name in names],
    }
