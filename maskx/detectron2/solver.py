"""Optimisers and schedules: what Detectron2 has, and what the systems of maskx need besides.

SGD or Adam, with a learning rate of its own for the backbone; and the polynomial schedule.
"""

import math

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler, get_default_optimizer_params
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.solver.build import maybe_add_gradient_clipping
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

OPTIMIZERS = ("sgd", "adam")
"""Values of ``SOLVER.MASKX.OPTIMIZER``."""
POLY = "WarmupPolyLR"
"""Value of ``SOLVER.LR_SCHEDULER_NAME``, beside Detectron2's own."""


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimiser that ``SOLVER`` asks for.

    All of Detectron2's keys mean what they mean there, but MOMENTUM and NESTEROV, which Adam does
    not have. ``SOLVER.MASKX.BACKBONE_LR_FACTOR`` multiplies the learning rate of every parameter
    in a module named ``backbone``, or in the ``encoder`` of a network.
    """
    check_solver(cfg)
    solver = cfg.SOLVER
    factor = solver.MASKX.BACKBONE_LR_FACTOR
    if solver.MASKX.OPTIMIZER == "sgd" and factor == 1:
        return build_detectron2_optimizer(cfg, model)
    if factor != 1 and not any(_in_backbone(name) for name, _ in model.named_parameters()):
        raise ValueError(
            f"SOLVER.MASKX.BACKBONE_LR_FACTOR is {factor}, but {type(model).__name__} has no "
            "module named backbone. Set it to 1."
        )

    def lr_factor(name: str) -> float:
        # Detectron2's own factor for biases would replace that of the backbone.
        bias = solver.BIAS_LR_FACTOR if name.endswith(".bias") else 1.0
        return bias * (factor if _in_backbone(name) else 1.0)

    parameters = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=lr_factor,
    )
    common = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if solver.MASKX.OPTIMIZER == "adam":
        optimizer = torch.optim.Adam(parameters, **common)
    else:
        optimizer = torch.optim.SGD(
            parameters, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **common
        )
    return maybe_add_gradient_clipping(cfg, optimizer)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Make the schedule of the learning rate that ``SOLVER.LR_SCHEDULER_NAME`` asks for.

    ``WarmupPolyLR`` is, after the warm-up of Detectron2's schedules,
    ``(BASE_LR - BASE_LR_END) * (1 - iteration / MAX_ITER) ** POLY_POWER + BASE_LR_END``. A group
    with a learning rate of its own keeps its ratio to ``BASE_LR``.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != POLY:
        return build_detectron2_lr_scheduler(cfg, optimizer)
    check_solver(cfg)
    schedule = WarmupParamScheduler(
        _Poly(solver.BASE_LR_END / solver.BASE_LR, solver.MASKX.POLY_POWER),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
        solver.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=solver.MAX_ITER)


def check_solver(cfg: CfgNode) -> None:
    """Refuse numbers of a training that are out of range, and bad values of ``SOLVER.MASKX``."""
    for key, value, least in (
        ("SOLVER.MAX_ITER", cfg.SOLVER.MAX_ITER, 1),
        ("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH, 1),
        ("SOLVER.CHECKPOINT_PERIOD", cfg.SOLVER.CHECKPOINT_PERIOD, 1),
        ("TEST.EVAL_PERIOD", cfg.TEST.EVAL_PERIOD, 0),
        ("DATALOADER.NUM_WORKERS", cfg.DATALOADER.NUM_WORKERS, 0),
    ):
        if value < least:
            raise ValueError(f"{key} is {value}. Allowed: {least} or more.")
    if not 0 <= cfg.SOLVER.BASE_LR < math.inf:
        raise ValueError(f"SOLVER.BASE_LR is {cfg.SOLVER.BASE_LR}. Allowed: a number, 0 or more.")
    keys = cfg.SOLVER.MASKX
    if keys.OPTIMIZER not in OPTIMIZERS:
        raise ValueError(
            f"SOLVER.MASKX.OPTIMIZER is {keys.OPTIMIZER!r}. Allowed: {', '.join(OPTIMIZERS)}."
        )
    if not keys.BACKBONE_LR_FACTOR >= 0:
        raise ValueError(
            f"SOLVER.MASKX.BACKBONE_LR_FACTOR is {keys.BACKBONE_LR_FACTOR}. Allowed: 0 or more; 1 "
            "trains the backbone as everything else."
        )
    if cfg.SOLVER.LR_SCHEDULER_NAME != POLY:
        return
    if not 0 <= cfg.SOLVER.BASE_LR_END <= cfg.SOLVER.BASE_LR or cfg.SOLVER.BASE_LR <= 0:
        raise ValueError(
            f"SOLVER.BASE_LR_END is {cfg.SOLVER.BASE_LR_END} and BASE_LR {cfg.SOLVER.BASE_LR}. "
            f"Allowed for {POLY}: 0 <= BASE_LR_END <= BASE_LR, BASE_LR above 0."
        )
    if not keys.POLY_POWER > 0:
        raise ValueError(f"SOLVER.MASKX.POLY_POWER is {keys.POLY_POWER}. Allowed: above 0.")


class _Poly(ParamScheduler):
    """Polynomial decay from 1 to ``end``; fvcore's own ends at 0."""

    def __init__(self, end: float, power: float) -> None:
        self._end, self._power = end, power

    def __call__(self, where: float) -> float:
        return (1 - self._end) * (1 - where) ** self._power + self._end


def _in_backbone(name: str) -> bool:
    return "backbone" in name.split(".") or name.startswith("network.encoder.")
