"""Numbers that are not finite, and half precision, for every system on Detectron2."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from maskx.detectron2 import Trainer
from maskx.detectron2.trainer import check_config
from maskx.engine.training import TrainingSettings, train

# RoIs are the ground-truth boxes: proposals of random weights change order by a bit.
BOXES = ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 0)
CONCEPTS = "quick_schedules/stage{}_scenes_cpu.yaml"
SYSTEMS = {
    "maskx": ("make_cfg", {"opts": BOXES}),
    "maskx, PointRend": (
        "make_cfg",
        {"opts": BOXES, "file": "other_heads/pointrend_clsbox_2_layer_R_50_FPN.yaml"},
    ),
    "class patterns, classifier": ("make_classifier_cfg", {}),
    "class patterns": ("make_deeplab_cfg", {}),
    "TransferNet, classifier": (
        "make_transfer_cfg",
        {"file": "quick_schedules/stage0_classifier_scenes_cpu.yaml"},
    ),
    "TransferNet": ("make_transfer_cfg", {}),
    "LarvSeg": ("make_joint_cfg", {}),
    "ConceptMask 1": ("make_concept_cfg", {"file": CONCEPTS.format("1_embedding")}),
    "ConceptMask 2": ("make_concept_cfg", {"file": CONCEPTS.format("2_refinement")}),
    "ConceptMask 3": ("make_concept_cfg", {}),
}


@pytest.fixture(params=SYSTEMS)
def cfg(request, tiny_train, tiny_sparse, tiny_concepts):
    fixture, options = SYSTEMS[request.param]
    options = dict(options)
    return request.getfixturevalue(fixture)(*options.pop("opts", ()), **options)


def losses_and_gradient(cfg, batch, *, half):
    torch.manual_seed(0)
    model = build_model(cfg).train()
    torch.manual_seed(1)  # of sampled proposals and dropout
    with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        losses = model(batch)
    sum(losses.values()).backward()
    learned = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    return losses, torch.cat([gradient.flatten().float() for gradient in learned])


def test_autocast_to_bfloat16_is_finite_and_near(cfg):
    batch = next(iter(Trainer.build_train_loader(cfg)))
    losses, gradient = losses_and_gradient(cfg, batch, half=False)
    found, found_gradient = losses_and_gradient(cfg, batch, half=True)
    assert found_gradient.isfinite().all()
    for name, loss in losses.items():
        # bfloat16 has 8 bits.
        torch.testing.assert_close(
            found[name].float(), loss, rtol=0.1, atol=0.02, msg=lambda text, name=name: name + text
        )
    cosine = torch.nn.functional.cosine_similarity(gradient, found_gradient, dim=0)
    assert cosine > 0.7


class Poisoned:
    """A loader whose images are not finite in one batch, or whose loss is steep there."""

    def __init__(self, loader, value):
        self.loader, self.value = loader, value

    def __iter__(self):
        for step, batch in enumerate(self.loader):
            self.images = self.loader.images
            for sample in batch if step == 1 else ():
                sample["image"] = torch.full_like(sample["image"].float(), self.value)
            yield batch


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_name_step_and_images(cfg, value, monkeypatch):
    make = Trainer.build_train_loader.__func__
    monkeypatch.setattr(
        Trainer, "build_train_loader", classmethod(lambda cls, cfg: Poisoned(make(cls, cfg), value))
    )
    trainer = Trainer(cfg)
    with pytest.raises(FloatingPointError, match=r"(?s)Iteration 1: .*images of that step \('"):
        trainer.train()


# Mask^X has another detector with pip alone, see tests/torchvision.
@pytest.mark.parametrize("cfg", [s for s in SYSTEMS if not s.startswith("maskx")], indirect=True)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_loop_of_pip_alone_names_them_too(cfg, value, tmp_path):
    loader = Poisoned(Trainer.build_train_loader(cfg), value)
    settings = TrainingSettings(iterations=3, batch_size=2, learning_rate=1e-3)
    words = r"(?s)iteration 1 .*not finite.*images of that step \(\S+"
    with EventStorage(), pytest.raises(FloatingPointError, match=words):
        train(build_model(cfg), lambda **_: loader, settings, output_dir=tmp_path / "pip")


def test_a_gradient_that_is_not_finite_names_step_and_images(make_deeplab_cfg, tiny_train):
    trainer = Trainer(make_deeplab_cfg())
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    words = r"Iteration 0: A gradient is not finite\. Lower .*images of that step \('"
    with pytest.raises(FloatingPointError, match=words):
        trainer.train()


def test_mixed_precision_without_a_gpu_is_refused(make_cfg, tiny_train):
    with pytest.raises(ValueError, match=r"AMP\.ENABLED is True, but MODEL\.DEVICE is 'cpu'"):
        check_config(make_cfg("SOLVER.AMP.ENABLED", True))
