"""``run.json`` of trainings with Detectron2: what they are, and their trained models."""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultTrainer
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import nn

from maskx.core.sample_models import SampleModel
from maskx.core.text import listed
from maskx.detectron2.adapters import PhotographInput
from maskx.detectron2.checkpointer import FINAL_NAME
from maskx.detectron2.config import get_cfg
from maskx.detectron2.datasets import register_from_config
from maskx.detectron2.hooks import architecture_of, hooks_of
from maskx.detectron2.known_datasets import register_all
from maskx.engine.checkpoints import locked
from maskx.engine.predictor import rgb_sample
from maskx.engine.results import Prediction
from maskx.engine.runs import (
    RUN_NAME,
    Origin,
    Run,
    RunState,
    check_same_run,
    origin_of,
    read_run,
    write_run,
)
from maskx.engine.stages import timed_stage

logger = logging.getLogger(__name__)

# What does not change what is learned, or stands for files whose content is compared.
FREE_KEYS = (
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "DATASETS.MASKX.SPLIT",
    "DATASETS.MASKX.REGISTER",
)


def run_of(cfg: CfgNode) -> Run:
    """Describe the training of a configuration, whose data sets are registered."""
    hooks, folder = hooks_of(cfg), cfg.OUTPUT_DIR
    started_from: dict[str, Origin] = {}
    for key in ("MODEL.WEIGHTS", *hooks.files):
        file = str(value_of(cfg, key)).partition("?")[0]
        if file:
            started_from[key] = origin_of(file, folder)
    class_names = tuple(hooks.class_names(cfg))  # some data sets are read only then
    for name in cfg.DATASETS.TRAIN:
        for key, value in sorted(MetadataCatalog.get(name).as_dict().items()):
            if isinstance(value, str) and key != "name" and Path(value).is_file():
                started_from[f"{name}.{key}"] = origin_of(value, folder)
    return Run(
        system=hooks.system,
        host="detectron2",
        class_names=class_names,
        split=hooks.split(cfg),
        settings=as_dict(cfg),
        started_from=started_from,
        weights=FINAL_NAME,
    )


def free_keys(cfg: CfgNode) -> tuple[str, ...]:
    """Return keys that may differ between a training and its continuation."""
    return (*FREE_KEYS, *hooks_of(cfg).files)


def check_resumable(cfg: CfgNode) -> None:
    """Refuse to go on in ``OUTPUT_DIR`` with other data, classes or masks; settings may change."""
    if (Path(cfg.OUTPUT_DIR) / RUN_NAME).is_file():
        then = read_run(cfg.OUTPUT_DIR)
        check_same_run(then, run_of(cfg), source=cfg.OUTPUT_DIR, settings=False)


def run_state(cfg: CfgNode) -> RunState:
    """Make the part of the checkpoints that says which run they are of."""
    return RunState(run_of(cfg), source=cfg.OUTPUT_DIR, settings=False)


class LearnedRun:
    """What a checkpoint says of its run, read when it is evaluated."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg

    def state_dict(self) -> dict[str, Any]:
        """Nothing: an evaluation writes no checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare the class lists, and say which categories had masks if the split is another."""
        then, hooks = Run.from_json(state, "the checkpoint"), hooks_of(self.cfg)
        class_names, split = tuple(hooks.class_names(self.cfg)), hooks.split(self.cfg)
        if class_names and not hooks.matches_class_names:
            now = dataclasses.replace(then, class_names=class_names)
            check_same_run(then, now, source="the checkpoint", settings=False)
        if then.split and split and set(then.split.with_masks) != set(split.with_masks):
            logger.warning(
                "The model learned masks of %s (split '%s'), but A of the evaluation is %s (split "
                "'%s').",
                listed(then.split.with_masks),
                then.split.name,
                listed(split.with_masks),
                split.name,
            )


@contextlib.contextmanager
def training_run(trainer: DefaultTrainer) -> Iterator[None]:
    """Write ``run.json`` around a training, and let no other process into its folder."""
    cfg = trainer.cfg
    if not comm.is_main_process():
        yield
        return
    folder = Path(cfg.OUTPUT_DIR)
    with locked(folder):
        run = run_of(cfg)
        if trainer.start_iter > 0 and (folder / RUN_NAME).is_file():
            run = dataclasses.replace(run, seconds=read_run(folder).seconds)
        write_run(folder, run)
        with timed_stage(folder, run) as results:
            if trainer.start_iter >= trainer.max_iter:
                trainer.checkpointer.write_final()
            yield
            results.update(_measures(trainer))


def config_of_run(run: Run, device: torch.device | str = "cpu") -> CfgNode:
    """Make the configuration of a trained model from its ``run.json``."""
    cfg = get_cfg()
    try:
        cfg.merge_from_other_cfg(CfgNode(run.settings))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"The settings of the run in '{run.folder}' do not fit this version of maskx "
            f"({error.args[0]}); it was made by version {run.version}. Use that one, or train anew."
        ) from error
    cfg.MODEL.DEVICE = str(device)
    cfg.MODEL.WEIGHTS = str(run.weights_file)
    hooks_of(cfg).for_inference(cfg)
    for key in hooks_of(cfg).files:
        is_file = key in run.started_from and run.started_from[key].path
        if value_of(cfg, key) and is_file:
            cfg.merge_from_list([key, str(run.file(key))])
    cfg.freeze()
    return cfg


def open_model(
    run: Run, device: torch.device | str
) -> tuple[nn.Module, Callable[[np.ndarray], dict[str, Any]]]:
    """Open the trained model of a run folder.

    Returns:
        The model in evaluation mode, and what makes its sample of an (H, W, 3) uint8 RGB image.
    """
    from maskx.detectron2.trainer import load_trained  # which imports this module

    cfg = config_of_run(run, device)
    _register_what_is_there(cfg)
    return load_trained(cfg, compare=False), functools.partial(_sample, cfg)


def _register_what_is_there(cfg: CfgNode) -> None:
    """Register data sets for models that ask for their class lists, as far as they are here."""
    register_all()
    here = cfg.clone()
    here.defrost()
    here.DATASETS.MASKX.REGISTER = [
        entry
        for entry in cfg.DATASETS.MASKX.REGISTER
        if entry[0] not in DatasetCatalog and Path(entry[1]).is_file()
    ]
    register_from_config(here)


def _sample(cfg: CfgNode, image: np.ndarray) -> dict[str, Any]:
    height, width = image.shape[:2]
    if not issubclass(architecture_of(cfg), SampleModel):
        # As Detectron2's own models expect it; those of whole images warp it themselves.
        sizes = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        resized = PhotographInput(image)
        ResizeShortestEdge([sizes[0]] * 2, sizes[1])(resized)
        image = resized.image
    sample = rgb_sample(image) | {"height": height, "width": width}
    if cfg.INPUT.FORMAT == "BGR":
        sample["image"] = sample["image"].flip(0)
    return sample


def as_dict(cfg: CfgNode) -> dict[str, Any]:
    """Plain values of a configuration, with lists for tuples, as in a file."""
    return _plain(cfg)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in sorted(value)}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def value_of(cfg: CfgNode, key: str) -> Any:
    """Value of a dotted key."""
    return functools.reduce(getattr, key.split("."), cfg)


def _measures(trainer: DefaultTrainer) -> dict[str, float | None]:
    """What the last evaluation measured, by "task/metric" as in "segm_B/AP"; None for NaN."""
    storage = trainer.storage
    hints = storage.smoothing_hints()  # measures of an evaluation stand for themselves
    return {
        name: None if math.isnan(value) else value
        for name, (value, _) in storage.latest().items()
        if "/" in name and not hints[name]
    }


def to_instances(prediction: Prediction) -> Instances:
    """Turn the instances of a prediction of ``maskx.open_run`` into Detectron2's.

    They have what the prediction has; ``pred_masks`` are (N, H, W) bool.
    """
    if prediction.class_indices is None:
        raise ValueError("The prediction has no instances, but a label map. Use its label_map.")
    instances = Instances(prediction.image_size)
    instances.pred_classes = torch.as_tensor(prediction.class_indices)
    if prediction.boxes is not None:
        instances.pred_boxes = Boxes(torch.as_tensor(prediction.boxes))
    if prediction.scores is not None:
        instances.scores = torch.as_tensor(prediction.scores)
    if prediction.segmentations is not None:
        instances.pred_masks = torch.from_numpy(prediction.masks)
    return instances
