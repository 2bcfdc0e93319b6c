import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from settings import pairs

from maskx.detectron2 import MaskXCascadeROIHeads

CASCADE = pairs(
    {
        "MODEL.ROI_HEADS.NAME": "MaskXCascadeROIHeads",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        "MODEL.MASKX.TRANSFER.INPUTS": "cls",
    }
)

KINDS = {
    "masked": ([True, True, True], [True]),
    "mixed": ([True, False, False], [False, False]),
    "box-only": ([False, False], [False]),
    "one image without objects": ([True, False], []),
    "no objects": ([], []),
}


@pytest.fixture
def make_cascade(make_model):
    return lambda *opts: make_model(*CASCADE, *opts)


def losses_of(model, batch):
    torch.manual_seed(0)  # proposals are sampled at random
    with EventStorage():
        return model(batch)


def incomplete(sample):
    """Say that the image is not annotated with the boxes of all classes."""
    instances = sample["instances"]
    instances.gt_boxes_complete = torch.zeros(len(instances), dtype=torch.bool)
    return sample


@pytest.mark.parametrize("gt_boxes_only", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_the_graph_of_every_batch(
    make_cascade, make_sample, kind, gt_boxes_only
):
    model = make_cascade("MODEL.MASKX.GT_BOXES_ONLY", gt_boxes_only)
    losses = losses_of(model, [make_sample(has_mask) for has_mask in KINDS[kind]])
    assert {name for name in losses if "box_reg" in name} == {
        f"loss_box_reg_stage{stage}" for stage in range(3)
    }
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    gradient = model.roi_heads.mask_head.deconv.weight.grad.norm()
    has_masks = any(map(any, KINDS[kind]))
    assert (losses["loss_mask"] > 0) == has_masks
    assert (gradient > 0) == has_masks


@pytest.fixture(params=[True, False], ids=["stop-gradient", "no-stop-gradient"])
def cascade_and_stop(request, make_cascade):
    opts = ("MODEL.MASKX.TRANSFER.STOP_GRADIENT", request.param, "MODEL.MASKX.GT_BOXES_ONLY", True)
    return make_cascade(*opts), request.param


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(has_mask=st.lists(st.booleans(), max_size=4))
def test_what_the_mask_loss_reaches(cascade_and_stop, make_sample, has_mask):
    """Without stop-gradient, of the detector only the last stage's rows of the masked classes."""
    model, stop_gradient = cascade_and_stop
    model.zero_grad()
    losses_of(model, [make_sample(has_mask), make_sample([])])["loss_mask"].backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    if not any(has_mask):
        assert not reached
        return
    backbone = {name for name in reached if name.startswith("backbone.")}
    assert "backbone.fpn_output2.weight" in backbone
    expected = {n for n, _ in model.named_parameters() if n.startswith("roi_heads.mask_head.")}
    last = model.roi_heads.box_predictor[2].cls_score.weight
    if not stop_gradient:
        expected.add("roi_heads.box_predictor.2.cls_score.weight")
        masked = {index for index, flag in enumerate(has_mask) if flag}
        assert set(last.grad.any(dim=1).nonzero().flatten().tolist()) == masked
    assert reached - backbone == expected


@pytest.mark.parametrize("kind", ["masked", "mixed", "no objects"])
def test_the_box_branch_is_that_of_the_plain_cascade(make_cascade, make_cfg, make_sample, kind):
    ours = make_cascade("MODEL.MASKX.PREDICTOR", "class_agnostic")
    plain = build_model(
        make_cfg(*CASCADE, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.MASK_ON", False)
    ).train()
    plain.load_state_dict(
        {name: value for name, value in ours.state_dict().items() if "mask_head" not in name}
    )
    batch = [make_sample(has_mask) for has_mask in KINDS[kind]]
    losses, expected = losses_of(ours, batch), losses_of(plain, batch)
    losses.pop("loss_mask")
    assert losses.keys() == expected.keys()
    assert len(expected) == 3 * 2 + 2
    for name, loss in expected.items():
        assert torch.equal(losses[name], loss), name


def test_the_transfer_reads_the_classifier_of_the_last_stage(make_cascade):
    heads = make_cascade().roi_heads
    assert isinstance(heads, MaskXCascadeROIHeads)
    cls, box = heads.detector_weights()
    assert torch.equal(cls, heads.box_predictor[2].cls_score.weight[:4])
    assert not torch.equal(cls, heads.box_predictor[0].cls_score.weight[:4])
    assert box is None
    assert heads.mask_head.predictor.layers[0].in_features == 24  # MODEL.ROI_BOX_HEAD.FC_DIM


def test_masks_follow_the_last_stage_only(make_cascade, make_sample):
    model = make_cascade().eval()
    given = Instances((64, 64), pred_boxes=Boxes([[5.0, 5, 40, 50]]))
    given.pred_classes = torch.tensor([2])

    def masks():
        with torch.no_grad():
            (result,) = model.inference([make_sample([])], [given], do_postprocess=False)
        return result.pred_masks

    before = masks()
    with torch.no_grad():
        model.roi_heads.box_predictor[1].cls_score.weight[2] += 1
        assert torch.equal(masks(), before)
        model.roi_heads.box_predictor[2].cls_score.weight[2] += 1
    assert not torch.equal(masks(), before)


def test_detections_have_masks(make_cascade, make_sample):
    model = make_cascade().eval()
    with torch.no_grad():
        (result,) = model([make_sample([]) | {"height": 32, "width": 48}])
    assert 0 < len(result["instances"]) <= 5
    assert result["instances"].pred_masks.shape[1:] == (32, 48)


def test_a_frozen_detector_trains_the_mask_head_only(make_cascade, make_sample):
    model = make_cascade(
        "MODEL.META_ARCHITECTURE", "MaskXRCNN", "MODEL.MASKX.FREEZE_DETECTOR", True
    )
    for kind, batch in KINDS.items():
        losses = losses_of(model, [make_sample(has_mask) for has_mask in batch])
        assert set(losses) == {"loss_mask"}, kind
        model.zero_grad()
        losses["loss_mask"].backward()
        with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
        assert with_gradient == {n for n, _ in model.named_parameters() if "mask_head" in n}


def test_an_image_with_incomplete_boxes_trains_the_mask_branch_only(make_cascade, make_sample):
    model = make_cascade("MODEL.PROPOSAL_GENERATOR.NAME", "MaskXRPN")
    losses = losses_of(model, [incomplete(make_sample([True, True]))])
    assert losses["loss_mask"] > 0
    assert all(loss == 0 for name, loss in losses.items() if name != "loss_mask")
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def test_the_boxes_of_an_incomplete_image_change_no_box_loss(make_cascade, make_sample):
    model = make_cascade("MODEL.PROPOSAL_GENERATOR.NAME", "MaskXRPN")
    complete = make_sample([True, False])
    runs = []
    for seed in (1, 2):
        other = incomplete(make_sample([True, True], seed=seed))
        other["image"] = complete["image"]
        runs.append(losses_of(model, [complete, other]))
    first, second = runs
    assert first["loss_mask"] != second["loss_mask"]
    # Sampling draws from one stream of random numbers; what is drawn for the complete image, the
    # first, is the same.
    for name in first.keys() - {"loss_mask"}:
        assert first[name] == second[name], name
        assert first[name] > 0


@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.MASKX.TRANSFER.INPUTS", "cls+box"),
        ("MODEL.MASKX.TRANSFER.INPUTS", "box"),
        ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False),
    ],
)
def test_weights_that_a_cascade_does_not_have_are_refused(make_cascade, opts):
    with pytest.raises(ValueError, match="Box regression of a cascade is class-agn") as caught:
        make_cascade(*opts)
    message = str(caught.value)
    assert "Set MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True" in message
    assert "MODEL.MASKX.TRANSFER.INPUTS cls" in message
    assert f"(now {opts[1]!r})" in message


def test_other_inputs_need_no_classifier(make_cascade, make_sample):
    model = make_cascade("MODEL.MASKX.TRANSFER.INPUTS", "randn")
    assert losses_of(model, [make_sample([True])])["loss_mask"] > 0
