"""Teachers of masks, good and bad, as a user's module would have them."""

import numpy as np


def ellipses(image, boxes, names):
    """The ellipse in each box, which is often near the object."""
    rows, columns = np.indices(image.shape[:2]) + 0.5
    masks = []
    for x0, y0, x1, y1 in boxes:
        across = (columns - (x0 + x1) / 2) / ((x1 - x0) / 2)
        down = (rows - (y0 + y1) / 2) / ((y1 - y0) / 2)
        masks.append(across**2 + down**2 <= 1)
    return masks


def probabilities(image, boxes, names):
    """The same, the surer the larger the box is."""
    widths = (boxes[:, 2] - boxes[:, 0]) / image.shape[1]
    masks = ellipses(image, boxes, names)
    return [(0.5 + 0.5 * width) * mask for mask, width in zip(masks, widths, strict=True)]


def larger_than_the_box(image, boxes, names):
    """All pixels of the image, as 0 and 1."""
    return np.ones((len(boxes), *image.shape[:2]), np.uint8)


def of_bright_objects(image, boxes, names):
    """Nothing of the first object, and empty masks."""
    return [None, *[np.zeros(image.shape[:2], bool)] * (len(boxes) - 1)]


def raises(image, boxes, names):
    """Breaks."""
    raise RuntimeError("no such layer")


def nothing(image, boxes, names):
    """No list of masks."""


def too_few(image, boxes, names):
    """One mask less than there are boxes."""
    return ellipses(image, boxes[1:], names)


def of_another_size(image, boxes, names):
    """Masks of half the size."""
    return ellipses(image[::2, ::2], boxes, names)


def not_a_number(image, boxes, names):
    """NaN."""
    return np.full((len(boxes), *image.shape[:2]), np.nan)


def beyond_one(image, boxes, names):
    """Grey values."""
    return [255.0 * mask for mask in ellipses(image, boxes, names)]


def texts(image, boxes, names):
    """No numbers."""
    return np.full((len(boxes), *image.shape[:2]), "x")


class SamPredictor:
    """Has the call signature of Segment Anything's predictor, and finds ellipses."""

    def set_image(self, image, image_format="RGB"):
        assert (image.dtype, image.ndim, image_format) == (np.uint8, 3, "RGB")
        self.image = image

    def predict(
        self,
        point_coords=None,
        point_labels=None,
        box=None,
        mask_input=None,
        multimask_output=True,
        return_logits=False,
    ):
        """Return masks (C, H, W), their quality (C,) and coarse logits (C, 256, 256)."""
        assert box.shape == (4,)
        number = 3 if multimask_output else 1
        masks = np.stack(ellipses(self.image, box[None], [""]) * number)
        return masks, np.ones(number), np.zeros((number, 256, 256))


predictor = SamPredictor()


def sam(image, boxes, names):
    """As the page of the loop has it."""
    predictor.set_image(image)
    return [predictor.predict(box=box, multimask_output=False)[0][0] for box in boxes]


constant = 3
