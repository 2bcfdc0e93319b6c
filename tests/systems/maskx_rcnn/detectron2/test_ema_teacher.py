"""Detectron2's host: a moving average of the model makes masks of objects without one.

What it has in common with the box loss is in test_box_loss.py.
"""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from maskx.detectron2 import Trainer
from maskx.systems.maskx_rcnn.weak_losses import EMATeacher

ON = ("MODEL.MASKX.EMA_TEACHER.WEIGHT", 1.0, "MODEL.MASKX.EMA_TEACHER.MIN_QUALITY", 0.0)
MIXED = ([True, False, False], [False, False])


def losses_of(model, batch):
    torch.manual_seed(0)  # proposals are sampled at random
    with EventStorage():
        return model(batch)


def test_the_teacher_sees_the_boxes_of_objects_without_a_mask(make_model, make_sample, monkeypatch):
    seen, forward = [], EMATeacher.forward

    def record(self, *args):
        seen.append(args)
        return forward(self, *args)

    monkeypatch.setattr(EMATeacher, "forward", record)
    model = make_model(*ON, "MODEL.MASKX.MAX_BOX_ROIS", 1, "MODEL.MASKX.GT_BOXES_ONLY", True)
    batch = [make_sample(has_mask) for has_mask in MIXED]
    losses = losses_of(model, batch)
    assert losses["loss_mask_ema"] > 0
    ((mask_logits, teacher_logits, rois, boxes),) = seen
    instances = [sample["instances"] for sample in batch]
    expected = [x.gt_boxes.tensor[~x.gt_has_mask.bool()][:1] for x in instances]
    assert torch.equal(boxes, torch.cat(expected))
    assert torch.equal(rois, boxes)
    torch.testing.assert_close(teacher_logits, mask_logits)  # at the first step
    losses["loss_mask_ema"].backward()
    assert all(p.grad is None for p in model.roi_heads.ema_teacher.parameters())


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"), r"EMA_TEACHER\.WEIGHT is 1.*MaskXRCNN"),
        (("MODEL.MASKX.EMA_TEACHER.DECAY", 1.5), r"EMA_TEACHER\.DECAY\) is 1\.5"),
        (("MODEL.MASKX.MAX_BOX_ROIS", 0), r"MAX_BOX_ROIS\) is 0"),
    ],
)
def test_what_does_not_fit_is_refused(make_model, opts, message):
    with pytest.raises(ValueError, match=message):
        make_model(*ON, *opts)


def test_an_interrupted_run_ends_with_the_same_bits(make_cfg, tiny_train, tmp_path):
    def train(name, trainer_class):
        opts = ("SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 2)
        cfg = make_cfg(*ON, *opts, "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path / name))
        torch.manual_seed(0)
        trainer = trainer_class(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()
        return trainer.model.state_dict()

    class Interrupted(Trainer):
        def before_step(self):
            super().before_step()
            if self.iter == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("parts", Interrupted)
    resumed, whole = train("parts", Trainer), train("whole", Trainer)
    teacher = {name for name in whole if ".ema_teacher." in name}
    assert any(".backbone." in name for name in teacher)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_of_a_checkpoint_of_other_classes_the_average_begins_anew(make_cfg, tiny_train, tmp_path):
    other = build_model(make_cfg(*ON, "MODEL.ROI_HEADS.NUM_CLASSES", 3))
    other.roi_heads.ema_teacher.updated()
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    trainer = Trainer(make_cfg(*ON, "MODEL.WEIGHTS", str(tmp_path / "other.pth")))
    trainer.resume_or_load(resume=False)
    heads = trainer.model.roi_heads
    assert heads.ema_teacher.average.n_averaged == 0
    averaged = heads.ema_teacher.updated()["box_predictor"]
    assert torch.equal(averaged.cls_score.weight, heads.box_predictor.cls_score.weight)
