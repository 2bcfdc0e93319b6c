import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from settings import pairs

from maskx.detectron2 import Trainer, build_lr_scheduler, build_optimizer


def settings(optimizer, model):
    """Learning rate and weight decay of each parameter, by its name."""
    of = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters()}


@pytest.fixture
def recipe():
    """Keys of SOLVER that treat biases and norms apart."""
    return pairs(
        {
            "SOLVER.BASE_LR": 0.1,
            "SOLVER.WEIGHT_DECAY": 0.01,
            "SOLVER.WEIGHT_DECAY_NORM": 0.02,
            "SOLVER.BIAS_LR_FACTOR": 2.0,
            "SOLVER.WEIGHT_DECAY_BIAS": 0.03,
            "SOLVER.MASKX.BACKBONE_LR_FACTOR": 1.0,
        }
    )


def test_sgd_is_detectron2s_own(make_classifier_cfg, recipe):
    cfg = make_classifier_cfg(*recipe, "SOLVER.MASKX.OPTIMIZER", "sgd")
    model = build_model(cfg)
    optimizer, own = build_optimizer(cfg, model), build_detectron2_optimizer(cfg, model)
    assert type(optimizer) is type(own)
    assert optimizer.defaults == own.defaults
    assert settings(optimizer, model) == settings(own, model)


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_the_backbone_has_its_own_learning_rate(make_classifier_cfg, recipe, name, kind):
    opts = ("SOLVER.MASKX.OPTIMIZER", name, "SOLVER.MASKX.BACKBONE_LR_FACTOR", 0.05)
    cfg = make_classifier_cfg(*recipe, *opts)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, kind)
    own = settings(build_detectron2_optimizer(cfg, model), model)
    found = settings(optimizer, model)
    assert found["classifier.backbone.bn1.bias"] == pytest.approx((0.01, 0.03))
    for name, (lr, decay) in found.items():
        factor = 0.05 if "backbone" in name else 1
        assert (lr, decay) == pytest.approx((own[name][0] * factor, own[name][1])), name
    if kind is torch.optim.SGD:
        assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, False)


def test_the_papers_learning_rates_stay_constant(make_image_cfg):
    """5e-6 for the backbone and 1e-4 for the rest, from the first iteration to the last."""
    for file in ("classifier_R_101_voc.yaml", "deeplab_R_101_voc.yaml"):
        cfg = make_image_cfg("SOLVER.MAX_ITER", 100, file=file)
        model = build_model(cfg)
        optimizer = build_optimizer(cfg, model)
        scheduler = build_lr_scheduler(cfg, optimizer)
        for _ in range(3):
            for name, (lr, decay) in settings(optimizer, model).items():
                assert lr == pytest.approx(5e-6 if "backbone" in name else 1e-4), name
                assert decay == 0
            optimizer.step()
            scheduler.step()


def test_gradients_are_clipped(make_classifier_cfg):
    clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-3)
    cfg = make_classifier_cfg("SOLVER.MASKX.OPTIMIZER", "adam", *clip)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all((p.grad == 1e-3).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("SOLVER.MASKX.OPTIMIZER", "adamw"), r"OPTIMIZER is 'adamw'\. Allowed: sgd, adam\."),
        (("SOLVER.MASKX.BACKBONE_LR_FACTOR", -0.1), r"BACKBONE_LR_FACTOR is -0\.1\. Allowed: 0 or"),
        (
            ("SOLVER.MASKX.BACKBONE_LR_FACTOR", 0.5),
            r"BACKBONE_LR_FACTOR is 0\.5, but Linear has no module named backbone\. Set it to 1",
        ),
    ],
)
def test_bad_values_are_named(make_classifier_cfg, opts, words):
    with pytest.raises(ValueError, match=words):
        build_optimizer(make_classifier_cfg(*opts), torch.nn.Linear(2, 2))


POLY = pairs(
    {
        "SOLVER.LR_SCHEDULER_NAME": "WarmupPolyLR",
        "SOLVER.BASE_LR": 1e-3,
        "SOLVER.BASE_LR_END": 1e-5,
        "SOLVER.MAX_ITER": 8,
        "SOLVER.WARMUP_ITERS": 0,
    }
)


def rates(cfg, optimizer, scheduler):
    """Learning rates of the first group and of that with the highest, step by step."""
    found = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        lrs = [group["lr"] for group in optimizer.param_groups]
        found.append((lrs[0], max(lrs)))
        optimizer.step()
        scheduler.step()
    return found


def test_the_polynomial_schedule_goes_to_its_end(make_classifier_cfg):
    """As the reference code of LarvSeg has it: (lr - end) * (1 - t / T) ** 0.9 + end."""
    cfg = make_classifier_cfg(*POLY, "SOLVER.MASKX.BACKBONE_LR_FACTOR", 0.1)
    optimizer = build_optimizer(cfg, build_model(cfg))
    found = rates(cfg, optimizer, Trainer.build_lr_scheduler(cfg, optimizer))
    for step, (backbone, rest) in enumerate(found):
        expected = (1e-3 - 1e-5) * (1 - step / 8) ** 0.9 + 1e-5
        assert rest == pytest.approx(expected, rel=1e-9)
        assert backbone == pytest.approx(0.1 * expected, rel=1e-9)
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(1e-5)


def test_the_polynomial_schedule_warms_up_and_has_any_power(make_classifier_cfg):
    warm_up = ("SOLVER.WARMUP_ITERS", 4, "SOLVER.WARMUP_FACTOR", 0.1)
    cfg = make_classifier_cfg(*POLY, *warm_up, "SOLVER.MASKX.POLY_POWER", 1.0)
    optimizer = build_optimizer(cfg, build_model(cfg))
    found = [rate for _, rate in rates(cfg, optimizer, build_lr_scheduler(cfg, optimizer))]
    line = [1e-3 - (1e-3 - 1e-5) * step / 8 for step in range(8)]
    start = [1e-4 + (line[4] - 1e-4) * step / 4 for step in range(4)]
    assert found == pytest.approx(start + line[4:], rel=1e-9)


def test_other_schedules_are_detectron2s_own(make_classifier_cfg):
    cfg = make_classifier_cfg("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.MAX_ITER", 5)
    model = build_model(cfg)
    expected, found = (
        rates(cfg, optimizer, build(cfg, optimizer))
        for build in (build_detectron2_lr_scheduler, build_lr_scheduler)
        for optimizer in [build_optimizer(cfg, model)]
    )
    assert found == expected


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("SOLVER.MAX_ITER", 0), r"SOLVER\.MAX_ITER is 0\. Allowed: 1 or more"),
        (("SOLVER.IMS_PER_BATCH", -2), r"IMS_PER_BATCH is -2\. Allowed: 1 or more"),
        (("SOLVER.CHECKPOINT_PERIOD", 0), r"CHECKPOINT_PERIOD is 0\. Allowed: 1 or more"),
        (("DATALOADER.NUM_WORKERS", -1), r"NUM_WORKERS is -1\. Allowed: 0 or more"),
        (("SOLVER.BASE_LR", float("nan")), r"BASE_LR is nan\. Allowed: a number"),
        (("SOLVER.BASE_LR_END", 0.1), r"BASE_LR_END is 0\.1 and BASE_LR 0\.001\. Allowed for Warm"),
        (("SOLVER.MASKX.POLY_POWER", 0.0), r"POLY_POWER is 0\.0\. Allowed: above 0"),
    ],
)
def test_bad_numbers_of_a_training_are_named(make_classifier_cfg, opts, words):
    cfg = make_classifier_cfg(*POLY, *opts)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    with pytest.raises(ValueError, match=words):
        build_lr_scheduler(cfg, optimizer)
