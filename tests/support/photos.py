"""Generated images in place of photographs, and weights in place of pretrained ones."""

import json

import timm
import torch

from maskx.data.scenes.generator import generate_scenes


def make_photos(folder, count=8, *, with_masks=2, seed=0):
    """Write images of four categories, of which the first have masks.

    Returns:
        Their annotations and their folder.
    """
    path = generate_scenes(folder, count=count, size=64, num_categories=4, seed=seed)
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        if annotation["category_id"] > with_masks:
            del annotation["segmentation"]
    for image in content["images"]:
        del image["stuff_file_name"]
    path.write_text(json.dumps(content))
    return str(path), str(path.parent)


def frozen_options(folder, *, masks_for, **photos):
    """Return options of a study on own data with a frozen backbone of timm.

    Args:
        photos: of :func:`make_photos`, for the images to train on.
    """
    return {
        "coco_train": make_photos(folder / "photos", **photos),
        "coco_val": make_photos(folder / "val", photos.get("count", 8) // 3, with_masks=4, seed=1),
        "masks_for": masks_for,
        "image_size": 48,
        "backbone": "resnet10t",
        "pretrained": make_weights(folder / "weights.pth"),
        "frozen": True,
    }


def make_weights(path, name="resnet10t"):
    """Write weights of a model of timm; returns their path."""
    torch.manual_seed(0)
    torch.save(timm.create_model(name).state_dict(), path)
    return str(path)
