"""Optimisers: Detectron2's SGD or Adam, with a learning rate of its own for the backbone."""

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

__all__ = ["OPTIMIZERS", "build_optimizer"]

OPTIMIZERS = ("sgd", "adam")
"""Values of ``SOLVER.MASKX.OPTIMIZER``."""


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimiser that ``SOLVER`` asks for.

    All of Detectron2's keys mean what they mean there, but MOMENTUM and NESTEROV, which Adam does
    not have. ``SOLVER.MASKX.BACKBONE_LR_FACTOR`` multiplies the learning rate of every parameter
    in a module named ``backbone``.

    Args:
        cfg: the configuration.
        model: what is to be trained.

    Raises:
        ValueError: there is no such optimiser, the factor is negative, or there is no backbone.
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


def check_solver(cfg: CfgNode) -> None:
    """Refuse bad values of ``SOLVER.MASKX``.

    Raises:
        ValueError: there is no such optimiser, or the factor is negative.
    """
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


def _in_backbone(name: str) -> bool:
    return "backbone" in name.split(".")
