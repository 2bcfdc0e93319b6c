"""Training and evaluation with Detectron2's engine: data, evaluator and checks in place."""

import argparse
import contextlib
import itertools
import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch import nn

from maskx.detectron2.config import get_cfg
from maskx.detectron2.datasets import (
    class_names_of,
    register_all,
    register_from_config,
    split_from_config,
)
from maskx.detectron2.evaluation import MaskXCOCOEvaluator
from maskx.detectron2.image_label_evaluation import (
    MaskXImageLabelEvaluator,
    check_all_classes_known,
)
from maskx.detectron2.image_mapper import MaskXImageMapper, training_records
from maskx.detectron2.sem_seg_evaluation import MaskXLargeVocabularyEvaluator, MaskXSemSegEvaluator
from maskx.detectron2.solver import build_lr_scheduler, build_optimizer, check_solver
from maskx.detectron2.tasks import Task, architecture_of, is_transfer, num_classes_of, task_of
from maskx.systems.concept_mask.detectron2.data import (
    MaskXConceptMapper,
    build_concept_loader,
    check_concept_data,
    concept_test_data,
)
from maskx.systems.concept_mask.detectron2.evaluation import MaskXConceptEvaluator
from maskx.systems.concept_mask.detectron2.model import (
    MaskXConceptMask,
    check_concept_mask,
    check_started,
)
from maskx.systems.larvseg.detectron2.data import (
    JointLoader,
    MaskXJointMapper,
    build_joint_loader,
    check_joint_data,
    split_of_dataset,
    trained_indices,
)
from maskx.systems.larvseg.detectron2.model import MaskXLarvSeg
from maskx.systems.maskx_rcnn.detectron2.dataset_mapper import MaskXDatasetMapper
from maskx.systems.maskx_rcnn.detectron2.grabcut import predicts_masks
from maskx.systems.maskx_rcnn.detectron2.proposal_generator import MaskXRPN
from maskx.systems.maskx_rcnn.detectron2.rcnn import check_can_freeze
from maskx.systems.maskx_rcnn.detectron2.roi_heads import MaskXROIHeadsMixin
from maskx.systems.transfernet.detectron2.data import (
    MaskXTransferMapper,
    build_transfer_loader,
    check_transfer_data,
    transfer_split,
)
from maskx.systems.transfernet.detectron2.evaluation import (
    MaskXTransferLabelEvaluator,
    MaskXTransferSemSegEvaluator,
)
from maskx.systems.transfernet.detectron2.model import (
    MaskXTransferNet,
    check_loaded,
    check_transfernet,
)

__all__ = ["Trainer", "check_num_gpus", "evaluate", "load_trained", "setup"]


class Trainer(DefaultTrainer):
    """Detectron2's trainer with the mappers, the evaluators and the optimisers of maskx.

    What the meta-architecture learns decides on them; see :class:`maskx.detectron2.tasks.Task`.
    Registers the data sets of ``DATASETS.MASKX.REGISTER`` and checks that the configuration and
    the data sets fit together before anything is built.

    Args:
        cfg: the configuration.

    Raises:
        ValueError: something does not fit; the message names the key and the remedy.
    """

    def __init__(self, cfg: CfgNode) -> None:
        if not logging.getLogger("maskx").isEnabledFor(logging.INFO):  # as the base class does
            setup_logger(name="maskx")
        check_config(cfg)
        super().__init__(cfg)
        _keep_class_names(cfg, self.checkpointer)
        model = self.checkpointer.model
        if isinstance(model, MaskXLarvSeg) and isinstance(self.data_loader, JointLoader):
            shown = trained_indices(cfg, self.data_loader.sets)
            model.network.classifier.set_trained(shown)

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint of the output folder, or else ``MODEL.WEIGHTS``.

        To resume, the checkpoint must fit as for evaluation: mask heads refuse one with another
        number of classes in eval mode, whereas for fine-tuning they take what fits. Batches of
        joint data sets, with a ``SEED``, go on where the interrupted training was; others begin
        anew, as Detectron2 has it.

        Raises:
            ValueError: the detector, or the encoder or attention of TransferNet, is to stay frozen,
                but not all of its weights were loaded; or a stage of ConceptMask lacks what it
                starts from.
        """
        resume = resume and self.checkpointer.has_checkpoint()
        if resume:
            self.model.eval()
        with _load_report(self.checkpointer.model) as (missing, _):
            super().resume_or_load(resume)
        self.model.train()
        if isinstance(self.data_loader, JointLoader):
            self.data_loader.start = self.start_iter
        if self.cfg.MODEL.MASKX.FREEZE_DETECTOR and not resume:
            _check_detector_loaded(self.cfg.MODEL.WEIGHTS, missing)
        model = self.checkpointer.model
        if isinstance(model, MaskXTransferNet) and not resume:
            check_loaded(self.cfg, model, missing)
        if isinstance(model, MaskXConceptMask) and not resume:
            check_started(self.cfg, missing)
            keys = self.cfg.MODEL.MASKX.CONCEPT_MASK
            if keys.STAGE == 3 and keys.ENCODER_PRETRAINED and model.is_new:
                model.start_encoder(keys.ENCODER_DEPTH)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Make the optimiser; see :func:`maskx.detectron2.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule; see :func:`maskx.detectron2.solver.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Make the training loader."""
        if is_transfer(cfg):
            return build_transfer_loader(cfg)
        task = task_of(cfg)
        if task is Task.LARGE_VOCABULARY:
            return build_joint_loader(cfg)
        if task is Task.CONCEPTS:
            return build_concept_loader(cfg)
        mapper = _build_mapper(cfg, is_train=True)
        if task is Task.INSTANCES:
            return build_detection_train_loader(cfg, mapper=mapper)
        return build_detection_train_loader(cfg, mapper=mapper, dataset=training_records(cfg))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Make the loader of one test set."""
        if is_transfer(cfg):
            mapper = MaskXTransferMapper(cfg, is_train=False, dataset_name=dataset_name)
        elif task_of(cfg) is Task.LARGE_VOCABULARY:
            mapper = MaskXJointMapper(cfg, is_train=False, dataset_name=dataset_name)
        elif task_of(cfg) is Task.CONCEPTS:
            mapper = MaskXConceptMapper(cfg, is_train=False, dataset_name=dataset_name)
        else:
            mapper = _build_mapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Make the evaluator of one data set; that of instances writes its results.

        They go to ``OUTPUT_DIR/inference/<name>``.
        """
        split = cfg.DATASETS.MASKX.SPLIT
        task = task_of(cfg)
        if is_transfer(cfg):
            of_labels = task is Task.IMAGE_LABELS
            cls = MaskXTransferLabelEvaluator if of_labels else MaskXTransferSemSegEvaluator
            return cls(dataset_name, split=transfer_split(cfg))
        if task is Task.IMAGE_LABELS:
            return MaskXImageLabelEvaluator(dataset_name, split=split)
        if task is Task.PIXELS:
            return MaskXSemSegEvaluator(dataset_name, split=split)
        if task is Task.LARGE_VOCABULARY:
            own_split = split_of_dataset(cfg, dataset_name)
            return MaskXLargeVocabularyEvaluator(dataset_name, split=own_split)
        if task is Task.CONCEPTS:
            return MaskXConceptEvaluator(dataset_name, test=concept_test_data(cfg, dataset_name))
        return MaskXCOCOEvaluator(
            dataset_name,
            split=split,
            iou_types=("bbox", "segm") if predicts_masks(cfg) else ("bbox",),
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name),
        )


def setup(args: argparse.Namespace) -> CfgNode:
    """Make the configuration of a run from the arguments of Detectron2's command line.

    Args:
        args: of ``detectron2.engine.default_argument_parser()``.

    Returns:
        The frozen configuration. All data sets it names are registered, and it was checked.
    """
    if not PathManager.isfile(args.config_file):
        raise FileNotFoundError(f"--config-file '{args.config_file}': there is no such file.")
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="maskx")
    default_setup(cfg, args)
    register_all()
    check_config(cfg)
    return cfg


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate a trained model on the data sets of ``DATASETS.TEST``.

    Args:
        cfg: the configuration that the model was trained with.
        resume: evaluate the last checkpoint of the output folder, if there is one, instead of
            ``MODEL.WEIGHTS``.

    Returns:
        What :meth:`DefaultTrainer.test` returns.

    Raises:
        ValueError: there are no weights, or they are not those of this model.
    """
    return Trainer.test(cfg, load_trained(cfg, resume=resume))


def load_trained(cfg: CfgNode, *, resume: bool = False, exact: bool = False) -> nn.Module:
    """Build a trained model in evaluation mode.

    Args:
        cfg: the configuration that it was trained with.
        resume: load the last checkpoint of the output folder, if there is one, instead of
            ``MODEL.WEIGHTS``.
        exact: refuse weights that the model does not have.

    Raises:
        ValueError: there are no weights, or they are not those of this model.
    """
    model_cfg = cfg.clone()
    model_cfg.defrost()
    # All weights are loaded below.
    model_cfg.MODEL.MASKX.BACKBONE.PRETRAINED = False
    model_cfg.MODEL.MASKX.TRANSFERNET.CLASSIFIER_WEIGHTS = ""
    model_cfg.MODEL.MASKX.CONCEPT_MASK.OVERLAP = ""  # read by its training alone
    model = Trainer.build_model(model_cfg).eval()
    checkpointer = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    _keep_class_names(cfg, checkpointer)
    source = cfg.MODEL.WEIGHTS
    if resume and checkpointer.has_checkpoint():
        source = checkpointer.get_checkpoint_file()
    if not source:
        raise ValueError(
            "MODEL.WEIGHTS is empty: there is nothing to evaluate. Add MODEL.WEIGHTS <file>, or "
            "--resume for the last checkpoint of OUTPUT_DIR."
        )
    try:
        with _load_report(model) as (missing, unknown):
            checkpointer.load(source)
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(
            f"'{source}' cannot be read ({type(error).__name__}). Give the model_final.pth of a "
            "training."
        ) from error
    if missing:
        raise ValueError(
            f"'{source}' lacks {len(missing)} of the model's weights, or holds them in another "
            f"shape, so random ones would be used: {_first(missing)}. Use the configuration "
            "that it was trained with, or another checkpoint."
        )
    if unknown and exact:
        raise ValueError(
            f"'{source}' holds {len(unknown)} weights that the configured "
            f"{cfg.MODEL.META_ARCHITECTURE} does not have: {_first(unknown)}. Use the "
            "configuration that it was trained with, or another checkpoint."
        )
    return model


def check_num_gpus(num_gpus: int) -> None:
    """Refuse to start more processes than there are GPUs.

    Args:
        num_gpus: of the command line; 1 is allowed without a GPU, for ``MODEL.DEVICE cpu``.
    """
    available = torch.cuda.device_count()
    if num_gpus > max(available, 1):
        raise ValueError(
            f"--num-gpus {num_gpus} asks for more GPUs than there are ({available}). Use "
            f"--num-gpus {max(available, 1)}{'' if available else ' MODEL.DEVICE cpu'}."
        )


def check_config(cfg: CfgNode) -> None:
    """Register the data sets of a configuration and check that all of it fits together.

    Raises:
        FileNotFoundError: a file that the configuration names is missing.
        ValueError: something does not fit; the message names the key and the remedy.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}', but PyTorch sees no GPU here. Set MODEL.DEVICE "
            "cpu, or check the driver and that PyTorch was built for it."
        )
    weights = cfg.MODEL.WEIGHTS
    classifier = cfg.MODEL.MASKX.TRANSFERNET.CLASSIFIER_WEIGHTS
    if classifier and not weights and not PathManager.isfile(classifier):
        raise FileNotFoundError(
            f"MODEL.MASKX.TRANSFERNET.CLASSIFIER_WEIGHTS '{classifier}': there is no such file. "
            "Train the classifier of stage 0 first, or all stages with tools/train_transfernet.py."
        )
    # As in Detectron2, "?matching_heuristics=True" may follow the path.
    if weights and "://" not in weights and not PathManager.isfile(weights.partition("?")[0]):
        raise FileNotFoundError(f"MODEL.WEIGHTS '{weights}': there is no such file.")
    backbone = cfg.MODEL.BACKBONE.NAME
    if backbone not in BACKBONE_REGISTRY:
        raise ValueError(
            f"MODEL.BACKBONE.NAME is '{backbone}', which is not registered. Allowed: "
            f"{', '.join(sorted(name for name, _ in BACKBONE_REGISTRY))}. One of another project "
            "is there once that is imported."
        )
    architecture_of(cfg)
    check_can_freeze(cfg)
    check_solver(cfg)
    _check_text_classifier(cfg)
    check_transfernet(cfg)
    check_concept_mask(cfg)
    register_from_config(cfg)
    task = task_of(cfg)
    if is_transfer(cfg):
        check_transfer_data(cfg)
    elif task is Task.LARGE_VOCABULARY:
        check_joint_data(cfg)
    elif task is Task.CONCEPTS:
        check_concept_data(cfg)
    else:
        _check_classes(cfg)
        split_from_config(cfg)
    if task is Task.IMAGE_LABELS:
        for name in cfg.DATASETS.TRAIN:
            check_all_classes_known(name)
    if task is Task.INSTANCES and not cfg.MODEL.MASKX.FREEZE_DETECTOR:
        _check_incomplete_boxes(cfg)


def _check_classes(cfg: CfgNode) -> None:
    key, num_classes = num_classes_of(cfg)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        found = len(class_names_of(name))
        if found != num_classes:
            raise ValueError(
                f"{key} is {num_classes}, but data set '{name}' has {found} classes. Set {key} "
                f"{found}, or choose another data set."
            )


def _build_mapper(cfg: CfgNode, *, is_train: bool) -> MaskXDatasetMapper | MaskXImageMapper:
    is_instances = task_of(cfg) is Task.INSTANCES
    return (MaskXDatasetMapper if is_instances else MaskXImageMapper)(cfg, is_train=is_train)


class _ClassNames:
    """The class list of a model as a part of its checkpoints: its union is in no data set's file.

    Args:
        class_names: by class index of the model.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)

    def state_dict(self) -> dict[str, list[str]]:
        return {"class_names": self.class_names}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        pairs = itertools.zip_longest(state["class_names"], self.class_names)
        for index, (in_checkpoint, here) in enumerate(pairs):
            if in_checkpoint != here:
                raise ValueError(
                    f"Class {index} is {in_checkpoint!r} in the checkpoint, but {here!r} by "
                    "DATASETS.TRAIN and DATASETS.MASKX.SPLIT. Set them as the model was trained."
                )


def _keep_class_names(cfg: CfgNode, checkpointer: DetectionCheckpointer) -> None:
    if is_transfer(cfg):
        names = _ClassNames(transfer_split(cfg).class_names)
        checkpointer.add_checkpointable("class_list", names)


@contextlib.contextmanager
def _load_report(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """Collect the names of the weights that are not loaded, and of those that the model lacks.

    Weights of another shape are left out before loading, so they are missing.
    """
    missing: list[str] = []
    unknown: list[str] = []

    def collect(module: nn.Module, incompatible: Any) -> None:
        missing.extend(incompatible.missing_keys)
        unknown.extend(incompatible.unexpected_keys)

    hook = model.register_load_state_dict_post_hook(collect)
    try:
        yield missing, unknown
    finally:
        hook.remove()


def _check_detector_loaded(weights: str, missing: list[str]) -> None:
    missing = [name for name in missing if not name.startswith("roi_heads.mask_head.")]
    if weights and not missing:
        return
    lacks = f"lacks {len(missing)} of its weights: {_first(missing)}" if weights else "is empty"
    raise ValueError(
        f"MODEL.MASKX.FREEZE_DETECTOR keeps the detector as it was trained in stage 1, but "
        f"MODEL.WEIGHTS '{weights}' {lacks}. Train a detector with the same backbone and classes "
        "first, for example configs/MaskX/stage1/faster_rcnn_R_50_FPN_1x.yaml, and set "
        "MODEL.WEIGHTS to its model_final.pth."
    )


def _check_text_classifier(cfg: CfgNode) -> None:
    """Refuse RoI heads that would classify by learned weights all the same."""
    vectors, name = cfg.MODEL.MASKX.TEXT_CLASSIFIER.VECTORS, cfg.MODEL.ROI_HEADS.NAME
    if vectors and not issubclass(ROI_HEADS_REGISTRY.get(name), MaskXROIHeadsMixin):
        raise ValueError(
            f"MODEL.MASKX.TEXT_CLASSIFIER.VECTORS is '{vectors}', but MODEL.ROI_HEADS.NAME {name} "
            "do not read it. Set NAME MaskXROIHeads or MaskXCascadeROIHeads, or VECTORS ''."
        )


def _check_incomplete_boxes(cfg: CfgNode) -> None:
    """Refuse modules that would take objects of classes without annotations for background."""
    for dataset in cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(dataset)
        num_annotated = len(metadata.thing_dataset_id_to_contiguous_id)
        if num_annotated == len(metadata.thing_classes):
            continue
        for key, registry, needed in (
            ("PROPOSAL_GENERATOR", PROPOSAL_GENERATOR_REGISTRY, MaskXRPN),
            ("ROI_HEADS", ROI_HEADS_REGISTRY, MaskXROIHeadsMixin),
        ):
            name = cfg.MODEL[key].NAME
            if name != "PrecomputedProposals" and not issubclass(registry.get(name), needed):
                remedy = needed.__name__.removesuffix("Mixin")
                raise ValueError(
                    f"Data set '{dataset}' annotates {num_annotated} of "
                    f"{len(metadata.thing_classes)} classes, so its boxes are incomplete, but "
                    f"MODEL.{key}.NAME {name} would take every other object for background. Set "
                    f"it to {remedy}."
                )


def _first(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (" and more" if len(names) > limit else "")
