import pytest
import torch
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.utils.events import EventStorage
from settings import pairs

from maskx.data.masks import PastedMasks
from maskx.detectron2 import MaskXRCNN, Trainer, register_coco
from maskx.systems.maskx_rcnn.samples import masks_of_boxes

STAGE_1 = pairs(
    {
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.MASK_ON": False,
        "MODEL.RESNETS.NORM": "BN",
    }
)
STAGE_2 = pairs(
    {
        "MODEL.META_ARCHITECTURE": "MaskXRCNN",
        "MODEL.MASKX.FREEZE_DETECTOR": True,
        "MODEL.RESNETS.NORM": "BN",
    }
)
MASK_HEAD = "roi_heads.mask_head."


@pytest.fixture
def stage_1(make_cfg, tiny_train, tmp_path):
    """Checkpoint of a trained detector."""
    trainer = Trainer(make_cfg(*STAGE_1, "OUTPUT_DIR", str(tmp_path / "stage1")))
    trainer.train()
    return str(tmp_path / "stage1" / "model_final.pth")


def model_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_second_stage_changes_the_mask_head_and_nothing_else(make_cfg, stage_1, tmp_path):
    """Parameters, statistics of normalisation and the optimiser's state, over several steps."""
    cfg = make_cfg(*STAGE_2, "MODEL.WEIGHTS", stage_1, "SOLVER.MAX_ITER", 4)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    before = model_state(trainer.model)
    detector = torch.load(stage_1, weights_only=True)["model"]
    assert {name for name in before if not name.startswith(MASK_HEAD)} == set(detector)
    trainer.train()

    after = model_state(trainer.model)
    assert any(name.endswith("running_mean") for name in detector)
    for name, tensor in detector.items():
        assert torch.equal(tensor, after[name]), name
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    learned = {name for name, _ in trainer.model.named_parameters() if name.startswith(MASK_HEAD)}
    assert changed == learned

    own = {id(p) for p in trainer.model.roi_heads.mask_head.parameters()}
    groups = trainer.optimizer.param_groups
    assert {id(p) for group in groups for p in group["params"]} == own
    assert {id(p) for p in trainer.optimizer.state} == own
    assert all(p.grad is None for p in trainer.model.parameters() if id(p) not in own)


def test_a_second_stage_that_learns_from_boxes_starts_from_a_plain_detector(make_cfg, stage_1):
    """What it counts and averages is in no checkpoint of the first stage."""
    on = {"MODEL.MASKX.BOX_LOSS.WEIGHT": 1.0, "MODEL.MASKX.EMA_TEACHER.WEIGHT": 1.0}
    trainer = Trainer(make_cfg(*STAGE_2, *pairs(on), "MODEL.WEIGHTS", stage_1))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert trainer.model.roi_heads.ema_teacher.average.n_averaged == 2
    assert {"loss_mask_box", "loss_mask_ema"} <= trainer.storage.latest().keys()


def test_an_unfrozen_second_stage_changes_the_detector(make_cfg, stage_1):
    """Shows that the test above can fail."""
    cfg = make_cfg(*STAGE_2, "MODEL.WEIGHTS", stage_1, "MODEL.MASKX.FREEZE_DETECTOR", False)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    detector = torch.load(stage_1, weights_only=True)["model"]
    after = trainer.model.state_dict()
    changed = {name for name, tensor in detector.items() if not torch.equal(tensor, after[name])}
    assert any(name.endswith("running_mean") for name in changed)
    assert any(name.startswith("proposal_generator") for name in changed)
    assert any(name.startswith("roi_heads.box_predictor") for name in changed)


@pytest.fixture
def text_classifier(tmp_path):
    (tmp_path / "words.txt").write_text("cat 1 2\ndog -1 3\nowl 2 0\nyak 1 1\n")
    return pairs(
        {
            "MODEL.MASKX.TEXT_CLASSIFIER.VECTORS": str(tmp_path / "words.txt"),
            "MODEL.MASKX.TEXT_CLASSIFIER.CLASSES": ["cat", "dog", "owl", "yak"],
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
            "MODEL.MASKX.TRANSFER.INPUTS": "cls",
        }
    )


@pytest.mark.parametrize("gt_boxes_only", [False, True])
@pytest.mark.parametrize("heads", ["MaskXROIHeads", "MaskXCascadeROIHeads", "text"])
@pytest.mark.parametrize("kind", ["masked", "box-only", "no objects"])
def test_a_frozen_detector_computes_the_mask_loss_only(
    make_model, make_sample, text_classifier, kind, heads, gt_boxes_only
):
    opts = {
        "MaskXROIHeads": ("MODEL.MASKX.TRANSFER.STOP_GRADIENT", False),  # frozen all the same
        "MaskXCascadeROIHeads": pairs(
            {
                "MODEL.ROI_HEADS.NAME": "MaskXCascadeROIHeads",
                "MODEL.MASKX.TRANSFER.INPUTS": "cls",
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
            }
        ),
        "text": text_classifier,
    }[heads]
    model = make_model(*STAGE_2, *opts, "MODEL.MASKX.GT_BOXES_ONLY", gt_boxes_only)
    has_mask = {"masked": [True, False], "box-only": [False], "no objects": []}[kind]
    boxed = []
    model.roi_heads.box_head.register_forward_hook(lambda *_: boxed.append(True))
    with EventStorage():
        losses = model([make_sample(has_mask), make_sample([])])
    assert set(losses) == {"loss_mask"}
    assert not boxed
    losses["loss_mask"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(MASK_HEAD), name
    assert (losses["loss_mask"] > 0) == (kind == "masked")


def test_a_frozen_detector_names_a_batch_without_instances(make_model, make_sample):
    sample = make_sample([True])
    del sample["instances"]
    with pytest.raises(ValueError, match=r"batch has no instances\. Build .*MaskXDatasetMapper"):
        make_model(*STAGE_2)([sample])


def test_it_predicts_as_the_unfrozen_model_does(make_model, make_sample):
    plain_rcnn = ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.RESNETS.NORM", "BN")
    frozen, plain = make_model(*STAGE_2), make_model(*plain_rcnn)
    assert type(plain) is GeneralizedRCNN
    plain.load_state_dict(frozen.state_dict())
    results = [m.eval()([make_sample([])])[0]["instances"] for m in (frozen, plain)]
    assert len(results[0]) > 0
    assert torch.equal(results[0].pred_boxes.tensor, results[1].pred_boxes.tensor)
    assert torch.equal(results[0].pred_masks.tensor, results[1].pred_masks)


@pytest.mark.parametrize("asked", [False, True])
def test_training_mode_comes_and_goes(make_cfg, asked):
    model = build_model(make_cfg(*STAGE_2))
    if asked:
        model.eval().train()
    training = {name for name, module in model.named_modules() if module.training}
    own = {name for name in training if name.startswith("roi_heads.mask_head")}
    assert training - own == {"", "roi_heads"}
    assert "roi_heads.mask_head.predictor" in own
    assert not any(m.training for m in model.eval().modules())


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("", r"MODEL.WEIGHTS '' is empty.*stage1/faster_rcnn"),
        ("backbone", r"MODEL.WEIGHTS '.*backbone.pth' lacks \d+ of its weights: .* more"),
    ],
)
def test_a_second_stage_needs_the_weights_of_the_first(make_cfg, stage_1, tmp_path, weights, words):
    if weights:  # as ImageNet weights would
        state = torch.load(stage_1, weights_only=True)["model"]
        weights = str(tmp_path / "backbone.pth")
        kept = {name: tensor for name, tensor in state.items() if name.startswith("backbone")}
        torch.save({"model": kept}, weights)
    trainer = Trainer(make_cfg(*STAGE_2, "MODEL.WEIGHTS", weights))
    with pytest.raises(ValueError, match=words):
        trainer.resume_or_load(resume=False)


def test_a_second_stage_resumes_from_its_own_checkpoint(make_cfg, stage_1):
    """Weights and momentum go on where they stopped, and the detector stays what it was."""
    first = Trainer(make_cfg(*STAGE_2, "MODEL.WEIGHTS", stage_1))
    first.resume_or_load(resume=False)
    first.train()
    again = Trainer(make_cfg(*STAGE_2, "MODEL.WEIGHTS", stage_1, "SOLVER.MAX_ITER", 3))
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
    stopped, resumed = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in stopped.items())
    momenta = [
        {
            name: trainer.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in trainer.model.named_parameters()
            if parameter in trainer.optimizer.state
        }
        for trainer in (first, again)
    ]
    assert momenta[0].keys() == momenta[1].keys()
    assert all(name.startswith(MASK_HEAD) for name in momenta[0])
    assert any(tensor.any() for tensor in momenta[0].values())
    assert all(torch.equal(tensor, momenta[1][name]) for name, tensor in momenta[0].items())

    again.train()
    assert again.iter == 3
    before, after = model_state(first.model), again.model.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == set(momenta[0])


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (
            ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
            "FREEZE_DETECTOR is True, but MODEL.META_ARCHITECTURE GeneralizedRCNN would train",
        ),
        (
            ("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.MASK_ON", False),
            "StandardROIHeads have no mask branch .* on a frozen detector",
        ),
    ],
)
def test_freezing_that_leaves_nothing_to_train_is_refused(make_cfg, opts, words):
    with pytest.raises(ValueError, match=words):
        build_model(make_cfg(*STAGE_2, *opts))


def test_heads_that_are_frozen_alone_are_refused(make_model):
    plain, frozen = make_model("MODEL.META_ARCHITECTURE", "MaskXRCNN"), make_model(*STAGE_2)
    parts = {name: getattr(plain, name) for name in ("backbone", "proposal_generator")}
    rest = {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3}
    MaskXRCNN(roi_heads=plain.roi_heads, **parts, **rest)
    with pytest.raises(ValueError, match=r"built with freeze_detector=True.*both the same"):
        MaskXRCNN(roi_heads=frozen.roi_heads, **parts, **rest)


def test_with_a_frozen_detector_only_objects_with_masks_are_sampled(make_model, make_sample):
    model = make_model(*STAGE_2, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4)
    heads = model.roi_heads
    heads.positive_fraction = 1.0  # every foreground RoI is of the only object with a mask
    with EventStorage() as storage:
        model([make_sample([False, True, False, False])])
        assert (
            storage.latest()["maskx/num_mask_rois"][0]
            == storage.latest()["roi_head/num_fg_samples"][0]
        )
        assert storage.latest()["maskx/num_mask_rois"][0] > 0


def test_masks_are_pasted_when_asked_for_and_of_given_boxes(make_model, make_sample):
    model = make_model().eval()
    sample = {**make_sample([]), "height": 128, "width": 96}
    with torch.no_grad():
        (result,) = model([sample])
    instances = result["instances"]
    assert len(instances) > 1
    assert isinstance(instances.pred_masks, PastedMasks)
    assert instances.pred_masks.shape == (len(instances), 128, 96)
    boxes, classes = instances.pred_boxes.tensor, instances.pred_classes
    given = masks_of_boxes(model, sample, boxes, classes)
    # Boxes go to the image of the network and back.
    assert (given.tensor ^ instances.pred_masks.tensor).float().mean() < 1e-3
    assert torch.equal(instances[1:].pred_masks.tensor, instances.pred_masks.tensor[1:])
    empty = torch.tensor([[5.0, 5.0, 5.0, 5.0], [9.0, 9.0, 60.0, 60.0]])
    assert masks_of_boxes(model, sample, empty, torch.tensor([0, 1])).shape == (2, 128, 96)


def test_masks_of_a_split_that_the_data_does_not_have_are_refused(make_cfg, write_coco):
    box = {"bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
    path, root = write_coco([box | {"category_id": 10 * i} for i in (1, 2, 3, 4)])
    register_coco("boxes_only", path, root)
    names = ("DATASETS.TRAIN", ("boxes_only",), "DATASETS.TEST", ("boxes_only",))
    cfg = make_cfg(*names, "DATASETS.MASKX.SPLIT", "all")
    with pytest.raises(ValueError, match=r"no annotation of theirs has one: 'cat \(1 boxes\)'"):
        Trainer(cfg)


def test_data_without_any_box_are_named(make_cfg, write_coco):
    crowd = {"bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 1, "category_id": 10}
    path, root = write_coco([crowd])
    register_coco("crowds_only", path, root)
    names = ("DATASETS.TRAIN", ("crowds_only",), "DATASETS.TEST", ("crowds_only",))
    with pytest.raises(ValueError, match=r"crowds_only.*has a box that is no crowd region"):
        Trainer(make_cfg(*names, "DATASETS.MASKX.SPLIT", "all"))
