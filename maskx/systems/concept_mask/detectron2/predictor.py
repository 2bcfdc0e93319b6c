"""Finding concepts by name in images, with a trained ConceptMask of Detectron2."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils as utils

from maskx.core.files import written_whole
from maskx.data.coco import load_coco
from maskx.detectron2.config import read_config
from maskx.detectron2.hooks import hooks_of
from maskx.detectron2.trainer import load_trained
from maskx.systems.concept_mask.detectron2.data import concept_split, concept_table, unseen_words
from maskx.systems.concept_mask.detectron2.model import MaskXConceptMask
from maskx.systems.concept_mask.steps import (
    FoundConcept,
    concept_test,
    fit_concepts,
    found_concepts,
    image_tensor,
)

__all__ = ["ConceptPredictor", "fit_checkpoint", "trained_config"]


class ConceptPredictor:
    """Finds any concepts in images; Detectron2's ``DefaultPredictor`` finds those of the config.

    Args:
        cfg: the configuration of a trained MaskXConceptMask, ``MODEL.WEIGHTS`` among it.

    Attributes:
        model: in evaluation mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the model is another, or the weights are not those of the configuration.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.model, self._format = _load(cfg), cfg.INPUT.FORMAT

    def __call__(
        self, image: np.ndarray, concepts: Sequence[str | int | np.ndarray] | None = None
    ) -> dict[str, FoundConcept]:
        """Find concepts in one image; what is computed of the image alone is shared by them.

        Args:
            image: (H, W, 3) uint8 BGR, as ``DefaultPredictor`` takes.
            concepts: names of the word table or of ``TEST.MASKX.UNSEEN_WORDS``, concept indices, or
                vectors; None for all of the word table that seem to exist in the image.

        Returns:
            What was found by name, in the order asked for; a concept given as a vector has the
            name "vector" and its position.

        Raises:
            ValueError: the image is of another kind or too small, the list is empty, or a concept
                is not known or asked for twice.
        """
        pixels = image_tensor(image, "BGR")
        names, query = (None, None) if concepts is None else self.model.ask(concepts)
        if self._format == "RGB":
            pixels = pixels.flip(0)
        own_names, result = self.model.find(pixels, query, tuple(pixels.shape[1:]))
        return found_concepts(result, own_names if names is None else names)


def trained_config(
    config_file: str | Path, opts: Sequence[Any] = (), *, device: torch.device | str = "cpu"
) -> CfgNode:
    """Read the configuration of a trained model.

    Args:
        config_file: YAML file, such as the ``config.yaml`` of a run.
        opts: KEY VALUE pairs over the file. Without ``MODEL.WEIGHTS`` among them, the weights are
            ``model_final.pth`` of ``OUTPUT_DIR``.
        device: where to compute.

    Raises:
        FileNotFoundError: there is no such file, or there are no such weights.
        ValueError: a key does not exist, or has a value of the wrong type.
    """
    cfg = read_config(Path(config_file), opts)
    if "MODEL.WEIGHTS" not in opts[::2]:
        cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if not Path(cfg.MODEL.WEIGHTS).is_file():
        raise FileNotFoundError(
            f"There is no file '{cfg.MODEL.WEIGHTS}'. Train the model to its end, or add "
            "MODEL.WEIGHTS FILE."
        )
    cfg.MODEL.DEVICE = str(device)
    return cfg


def fit_checkpoint(
    cfg: CfgNode, json_file: str | Path, image_root: str | Path, *, strict: bool = True
) -> dict[str, Any]:
    """Fit theta and the existence thresholds, and write them to the file ``MODEL.WEIGHTS``.

    Args:
        cfg: the configuration of a trained MaskXConceptMask.
        json_file: COCO-format file with tags and true masks of concepts.
        image_root: folder of its images.
        strict: see :func:`maskx.data.coco.load_coco`.

    Returns:
        What :func:`maskx.systems.concept_mask.steps.fit_concepts` returns.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be used.
    """
    model = _load(cfg)
    data = load_coco(json_file, image_root, strict=strict)
    test = concept_test(
        data.records,
        data.class_names,
        concept_split(cfg),
        concept_table(cfg),
        unseen_words(cfg),
        source=str(json_file),
    )

    def read_image(record: dict[str, Any]) -> torch.Tensor:
        image = utils.read_image(record["file_name"], format=cfg.INPUT.FORMAT)
        utils.check_image_size(record, image)
        return model.normalise(
            {"image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))}
        )

    fitted = fit_concepts(model.network, test, read_image)
    path = Path(cfg.MODEL.WEIGHTS)
    content = torch.load(path, map_location="cpu", weights_only=True)
    content["model"] |= {name: value.cpu() for name, value in model.state_dict().items()}
    with written_whole(path, durable=True) as scratch:
        torch.save(content, scratch)
    return fitted


def _load(cfg: CfgNode) -> MaskXConceptMask:
    if hooks_of(cfg).system != "concept_mask":
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, which finds no concepts. "
            "Give the configuration of a MaskXConceptMask."
        )
    return load_trained(cfg)
