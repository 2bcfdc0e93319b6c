"""Training and evaluation with Detectron2's engine: data, evaluator and checks in place."""

import argparse
import contextlib
import logging
import os
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, default_setup
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch import nn

from maskx.core.checks import check_choice
from maskx.core.global_mean import means_per_process
from maskx.core.seeds import step_seed
from maskx.core.text import listed
from maskx.detectron2.checkpointer import MaskXCheckpointer
from maskx.detectron2.config import read_config
from maskx.detectron2.datasets import register_from_config
from maskx.detectron2.hooks import hooks_of
from maskx.detectron2.known_datasets import register_all
from maskx.detectron2.runs import LearnedRun, check_resumable, run_state, training_run
from maskx.detectron2.solver import build_lr_scheduler, build_optimizer, check_solver


class Trainer(DefaultTrainer):
    """Detectron2's trainer with the mappers, the evaluators and the optimisers of maskx.

    The meta-architecture says which; see :class:`maskx.detectron2.hooks.Detectron2Hooks`.
    Registers the data sets of ``DATASETS.MASKX.REGISTER`` and checks that the configuration and
    the data sets fit together before anything is built.
    """

    def __init__(self, cfg: CfgNode) -> None:
        if not logging.getLogger("maskx").isEnabledFor(logging.INFO):  # as the base class does
            setup_logger(name="maskx")
        check_config(cfg)
        super().__init__(cfg)
        if cfg.MODEL.DEVICE == "cpu":  # elsewhere a look at the gradients waits for the device
            self.optimizer.register_step_pre_hook(_check_gradients)
        hooks_of(cfg).built(cfg, self.checkpointer.model, self.data_loader)

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint of the output folder, or else ``MODEL.WEIGHTS``.

        To resume, the checkpoint must fit as for evaluation: mask heads refuse one with another
        number of classes in eval mode, whereas for fine-tuning they take what fits. With a
        ``SEED`` the batches, and what is random in a step, go on where the interrupted training
        was.
        """
        resume = resume and self.checkpointer.has_checkpoint()
        if resume:
            self.model.eval()
        with _load_report(self.checkpointer.model) as (missing, _):
            super().resume_or_load(resume)
        self.model.train()
        if hasattr(self.data_loader, "start"):
            self.data_loader.start = self.start_iter
        if not resume:
            hooks_of(self.cfg).started(self.cfg, self.checkpointer.model, missing)

    def build_hooks(self) -> list[HookBase | None]:
        """Make Detectron2's hooks, on checkpoints that say which run they are of."""
        self.checkpointer = MaskXCheckpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            images=lambda: getattr(self.data_loader, "images", ()),
            trainer=weakref.proxy(self),
            maskx_run=run_state(self.cfg),
        )
        return super().build_hooks()

    def train(self) -> Any:
        """Train; see :func:`maskx.detectron2.runs.training_run` for what it leaves."""
        with training_run(self):
            try:
                return super().train()
            except Exception as error:
                # After its last step Detectron2 evaluates also what has diverged, and fails there.
                diverged, own = (
                    isinstance(e, FloatingPointError) for e in (error.__context__, error)
                )
                if diverged and not own:
                    raise error.__context__ from None
                raise
            finally:
                if hasattr(self.data_loader, "close"):
                    self.data_loader.close()

    def run_step(self) -> None:
        """Make a step; what is random in it follows from ``SEED`` and the iteration."""
        if self.cfg.SEED >= 0:
            # Rank 0 draws what the other host draws in this step.
            torch.manual_seed(step_seed(self.cfg.SEED, self.iter, *filter(None, [comm.get_rank()])))
        try:
            with means_per_process(self.cfg.SOLVER.MASKX.MEANS_PER_PROCESS):
                super().run_step()
            self.optimizer.zero_grad()  # not kept while images are read or the model is evaluated
        except FloatingPointError as error:
            images = listed(getattr(self.data_loader, "images", ()))
            raise FloatingPointError(
                f"Iteration {self.iter}: {error} Lower the learning rate, or look at the images of "
                f"that step{f' ({images})' if images else ''}."
            ) from error

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
        return hooks_of(cfg).train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Make the loader of one test set."""
        return hooks_of(cfg).test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Make the evaluator of one test set; that of instances writes its results.

        They go to ``OUTPUT_DIR/inference/<name>``.
        """
        return hooks_of(cfg).evaluator(cfg, dataset_name)


def setup(args: argparse.Namespace) -> CfgNode:
    """Make the configuration of a run from the arguments of Detectron2's command line.

    Returns:
        The frozen configuration. All data sets it names are registered, and it was checked. To
        resume, the run in ``OUTPUT_DIR`` is of the same data, classes and masks. An evaluation
        writes its configuration and log into ``OUTPUT_DIR/evaluation``.
    """
    cfg = read_config(args.config_file, args.opts)
    cfg.freeze()
    register_all()
    written = cfg.clone()
    if getattr(args, "eval_only", False):
        written.defrost()
        written.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "evaluation")
    elif getattr(args, "resume", False):
        register_from_config(cfg)
        check_resumable(cfg)  # before config.yaml is written anew
    setup_logger(written.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="maskx")
    default_setup(written, args)
    check_config(cfg)
    return cfg


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Do :meth:`DefaultTrainer.test` with the model of :func:`load_trained`."""
    return Trainer.test(cfg, load_trained(cfg, resume=resume))


def load_trained(
    cfg: CfgNode, *, resume: bool = False, exact: bool = False, compare: bool = True
) -> nn.Module:
    """Build a trained model in evaluation mode.

    Args:
        resume: load the last checkpoint of the output folder, if there is one, instead of
            ``MODEL.WEIGHTS``.
        exact: refuse weights that the model does not have.
        compare: refuse weights of another class list than that of ``cfg``, and warn of another
            split, where the checkpoint says what it was trained with.
    """
    model_cfg = cfg.clone()
    model_cfg.defrost()
    # All weights are loaded below.
    model_cfg.MODEL.MASKX.BACKBONE.PRETRAINED = False
    hooks_of(cfg).for_inference(model_cfg)
    model = Trainer.build_model(model_cfg).eval()
    checkpointer = MaskXCheckpointer(model, cfg.OUTPUT_DIR)
    if compare:
        checkpointer.add_checkpointable("maskx_run", LearnedRun(cfg))
    source = cfg.MODEL.WEIGHTS
    if resume and checkpointer.has_checkpoint():
        source = checkpointer.get_checkpoint_file()
    if not source:
        raise ValueError(
            "MODEL.WEIGHTS is empty: there is nothing to evaluate. Add MODEL.WEIGHTS <file>, or "
            "--resume for the last checkpoint of OUTPUT_DIR."
        )
    with _load_report(model) as (missing, unknown):
        checkpointer.load(source)
    if missing:
        raise ValueError(
            f"'{source}' lacks {len(missing)} of the model's weights, or holds them in another "
            f"shape, so random ones would be used: {listed(missing)}. Use the configuration "
            "that it was trained with, or another checkpoint."
        )
    if unknown and exact:
        raise ValueError(
            f"'{source}' holds {len(unknown)} weights that the configured "
            f"{cfg.MODEL.META_ARCHITECTURE} does not have: {listed(unknown)}. Use the "
            "configuration that it was trained with, or another checkpoint."
        )
    return model


def check_num_gpus(num_gpus: int) -> None:
    """Refuse to start more processes than there are GPUs."""
    available = torch.cuda.device_count()
    if num_gpus > max(available, 1):
        raise ValueError(
            f"--num-gpus {num_gpus} asks for more GPUs than there are ({available}). Use "
            f"--num-gpus {max(available, 1)}{'' if available else ' MODEL.DEVICE cpu'}."
        )


def check_config(cfg: CfgNode) -> None:
    """Register the data sets of a configuration and check that all of it fits together."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}', but PyTorch sees no GPU here. Set MODEL.DEVICE "
            "cpu, or check the driver and that PyTorch was built for it."
        )
    if cfg.SOLVER.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise ValueError(
            f"SOLVER.AMP.ENABLED is True, but MODEL.DEVICE is '{cfg.MODEL.DEVICE}': mixed "
            "precision needs a GPU in Detectron2. Set SOLVER.AMP.ENABLED False."
        )
    if cfg.TEST.AUG.ENABLED:
        raise ValueError(
            "TEST.AUG.ENABLED is True, but maskx evaluates images at one size and unflipped. Set "
            "TEST.AUG.ENABLED False."
        )
    weights = cfg.MODEL.WEIGHTS
    # As in Detectron2, "?matching_heuristics=True" may follow the path.
    if weights and "://" not in weights and not PathManager.isfile(weights.partition("?")[0]):
        raise FileNotFoundError(
            f"MODEL.WEIGHTS '{weights}': there is no such file. Correct the path, train what makes "
            "it first, or set MODEL.WEIGHTS '' to start from random weights."
        )
    backbone = cfg.MODEL.BACKBONE.NAME
    if backbone not in BACKBONE_REGISTRY:
        raise ValueError(
            f"MODEL.BACKBONE.NAME is '{backbone}', which is not registered. Allowed: "
            f"{', '.join(sorted(name for name, _ in BACKBONE_REGISTRY))}. One of another project "
            "is there once that is imported."
        )
    _check_values(cfg)
    hooks = hooks_of(cfg)
    check_solver(cfg)
    register_from_config(cfg)
    hooks.check(cfg)


def _check_values(cfg: CfgNode) -> None:
    """Refuse values that Detectron2 takes for others, or fails at without naming the key."""
    check_choice("INPUT.MASK_FORMAT", cfg.INPUT.MASK_FORMAT, ("polygon", "bitmask"))
    if "resnet" in cfg.MODEL.BACKBONE.NAME:  # Detectron2's own
        check_choice("MODEL.RESNETS.DEPTH", cfg.MODEL.RESNETS.DEPTH, (18, 34, 50, 101, 152))
    if not cfg.INPUT.MIN_SIZE_TRAIN:
        raise ValueError("INPUT.MIN_SIZE_TRAIN is empty. Give at least one size in pixels.")
    means, stds = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if not len(means) == len(stds) == 3 or not all(value > 0 for value in stds):
        raise ValueError(
            f"MODEL.PIXEL_MEAN is {means} and MODEL.PIXEL_STD {stds}. Allowed: three numbers, of "
            "the channels, those of PIXEL_STD above 0."
        )


def _check_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    if not all(p.grad.isfinite().all() for p in parameters if p.grad is not None):
        raise FloatingPointError("A gradient is not finite.")


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
