import functools
import re

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import configurable, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    StandardROIHeads,
    build_model,
)
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from settings import pairs
from torch import nn

from maskx.detectron2 import MaskXDatasetMapper, MaskXROIHeads, MaskXROIHeadsMixin
from maskx.systems.maskx_rcnn.weight_transfer import DetectorWeights

KINDS = {
    "masked": ([True, True, True], [True]),
    "mixed": ([True, False, False], [False, False]),
    "box-only": ([False, False], [False]),
    "one image without objects": ([True, False], []),
    "no objects": ([], []),
}


def losses_of(model, batch):
    torch.manual_seed(0)  # proposals are sampled at random
    with EventStorage():
        return model(batch)


def gradients(loss, parameters):
    """Gradient norm by name; None where the graph does not reach a parameter."""
    names = list(parameters)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: None if g is None else g.norm().item() for n, g in zip(names, found, strict=True)}


@pytest.mark.parametrize("gt_boxes_only", [False, True])
@pytest.mark.parametrize("predictor", ["transfer", "class_agnostic", "class_specific"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_the_graph_of_every_batch(
    make_model, make_sample, kind, predictor, gt_boxes_only
):
    model = make_model(
        "MODEL.MASKX.PREDICTOR", predictor, "MODEL.MASKX.GT_BOXES_ONLY", gt_boxes_only
    )
    losses = losses_of(model, [make_sample(has_mask) for has_mask in KINDS[kind]])

    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    norms = gradients(sum(losses.values()), trained)
    assert all(norm is not None and np.isfinite(norm) for norm in norms.values()), norms
    mask_norms = [norm for name, norm in norms.items() if "mask_head" in name]
    if any(map(any, KINDS[kind])):
        assert losses["loss_mask"] > 0
        assert all(norm > 0 for norm in mask_norms)
    else:
        assert losses["loss_mask"] == 0
        assert not any(mask_norms)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("kind", ["masked", "box-only", "no objects"])
def test_what_the_mask_loss_reaches(make_model, make_sample, kind, stop_gradient):
    model = make_model("MODEL.MASKX.TRANSFER.STOP_GRADIENT", stop_gradient)
    losses = losses_of(model, [make_sample(has_mask) for has_mask in KINDS[kind]])

    norms = gradients(losses["loss_mask"], dict(model.named_parameters()))
    reached = {name for name, norm in norms.items() if norm}
    if kind != "masked":
        assert not reached
        return
    backbone = {name for name in reached if name.startswith("backbone.")}
    assert "backbone.fpn_output2.weight" in backbone
    expected = {name for name in norms if name.startswith("roi_heads.mask_head.")}
    if not stop_gradient:
        expected |= {f"roi_heads.box_predictor.{x}.weight" for x in ("cls_score", "bbox_pred")}
    assert reached - backbone == expected


@pytest.mark.parametrize("gt_boxes_only", [False, True])
def test_only_boxes_with_a_mask_are_pooled(make_model, make_sample, gt_boxes_only):
    model = make_model("MODEL.MASKX.GT_BOXES_ONLY", gt_boxes_only)
    batch = [make_sample([True, False, True]), make_sample([False]), make_sample([])]
    pooled = []
    model.roi_heads.mask_pooler.register_forward_hook(
        lambda _, inputs, __: pooled.append(inputs[1])
    )
    torch.manual_seed(0)
    with EventStorage() as storage:
        model(batch)
        assert storage.latest()["maskx/num_mask_rois"][0] == sum(map(len, pooled[0]))
    first, *others = pooled[0]
    assert len(first) > 0
    assert not any(map(len, others))
    masked = batch[0]["instances"].gt_boxes[batch[0]["instances"].gt_has_mask]
    if gt_boxes_only:
        assert torch.equal(first.tensor, masked.tensor)
    else:
        assert (pairwise_iou(first, masked).max(dim=1).values >= 0.5).all()


def test_boxes_that_are_to_be_ignored_are_not_pooled(make_model, make_sample):
    """Detectron2 gives them the class -1, which must not pick the weights of the last class."""
    model = make_model("MODEL.MASKX.GT_BOXES_ONLY", True)
    targets = make_sample([True, True])["instances"]
    targets.gt_classes[0] = -1
    pooled = []
    model.roi_heads.mask_pooler.register_forward_hook(
        lambda _, inputs, __: pooled.extend(inputs[1])
    )
    features = {f"p{k}": torch.randn(1, 16, 64 // 2**k, 64 // 2**k) for k in range(2, 6)}
    none = Boxes(torch.zeros(0, 4))
    proposals = [Instances((64, 64), proposal_boxes=none, objectness_logits=torch.zeros(0))]
    with EventStorage():
        model.roi_heads.freeze_detector = True  # the box branch does not take such targets
        model.roi_heads(None, features, proposals, [targets])
    assert torch.equal(pooled[0].tensor, targets.gt_boxes[1].tensor)


def test_masks_without_a_flag_are_refused(make_model, make_sample):
    sample = make_sample([True, True])
    sample["instances"].remove("gt_has_mask")
    with pytest.raises(ValueError, match=r"Image 1 .* gt_masks but no gt_has_mask.*MaskXDatasetM"):
        losses_of(make_model(), [make_sample([True]), sample])


def test_samples_of_a_mapper_that_knows_no_masks_train_the_boxes(make_model, make_sample):
    sample = make_sample([True, True])
    for field in ("gt_has_mask", "gt_masks"):
        sample["instances"].remove(field)
    losses = losses_of(make_model(), [sample])
    assert losses["loss_mask"] == 0
    assert losses["loss_box_reg"] > 0


def test_masks_follow_the_detector_weights(make_model, make_sample):
    model = make_model().eval()
    sample = make_sample([])
    given_boxes = Instances((64, 64), pred_boxes=Boxes([[5.0, 5, 40, 50]]))
    given_boxes.pred_classes = torch.tensor([2])

    def masks():
        with torch.no_grad():
            results = model.inference([sample], [given_boxes], do_postprocess=False)
        return results[0].pred_masks

    before = masks()
    assert torch.equal(masks(), before)
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():
        predictor.bbox_pred.weight[4 * 3 : 4 * 4] += 1  # rows of class 3
        predictor.cls_score.weight[-1] += 1  # background
        assert torch.equal(masks(), before)
        predictor.bbox_pred.weight[4 * 2] += 1
    after = masks()
    assert not torch.allclose(after, before)
    model.load_state_dict(
        {k: v + 0.1 if "cls_score" in k else v for k, v in model.state_dict().items()}
    )
    assert not torch.allclose(masks(), after)


def test_detections_have_masks(make_model, make_sample):
    model = make_model().eval()
    with torch.no_grad():
        (result,) = model([make_sample([]) | {"height": 32, "width": 48}])
    instances = result["instances"]
    assert 0 < len(instances) <= 5
    assert instances.pred_masks.shape == (len(instances), 32, 48)
    assert instances.pred_masks.dtype == torch.bool


def test_autocast_trains_in_bfloat16(make_model, make_sample):
    model = make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, [make_sample([True, False]), make_sample([True])])
        with torch.no_grad():
            (result,) = model.eval()([make_sample([])])
    assert losses["loss_mask"].dtype == torch.float32
    assert result["instances"].pred_masks.shape[1:] == (64, 64)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert model.roi_heads.mask_head.deconv.weight.grad.abs().sum() > 0


def test_two_processes_of_which_one_sees_no_mask_stay_equal(run_two_processes):
    """Neither hangs, and weights are equal after each step."""
    run_two_processes("two_processes.py")


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
    return str(path)


def box_polygon(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


POINTS = st.lists(st.floats(0, 64, width=32), min_size=6, max_size=20).filter(
    lambda p: len(p) % 2 == 0
)
ANY_MASK = st.one_of(
    st.none(),
    st.lists(POINTS, min_size=0, max_size=2),
    st.just([[1.0, 2.0]]),
    st.just({"size": [64, 64], "counts": [0, 64 * 64]}),
    st.just({"size": [64, 64], "counts": [2000, 100, 1996]}),
    st.just(np.eye(64, dtype=np.uint8)),
)


OF_A = box_polygon(4, 4, 30, 40), box_polygon(34, 2, 50, 22)
OF_B = box_polygon(20, 10, 60, 60), box_polygon(8, 30, 40, 62)


@pytest.fixture(params=[False, True], ids=["whole", "crop"])
def learn(request, make_cfg, make_model, tiny_train, photo):
    """Losses and gradients of four objects: ``learn(seed, <mask by class>)``; A is 0 and 2."""
    cfg = make_cfg("INPUT.CROP.ENABLED", request.param, "INPUT.CROP.SIZE", [0.7, 0.7])
    mapper = MaskXDatasetMapper(cfg, is_train=True)
    assert mapper.classes_with_masks == {0, 2}
    model = make_model()

    def run(seed, *masks):
        boxes = [(4, 4, 30, 40), (20, 10, 60, 60), (34, 2, 60, 22), (8, 30, 40, 62)]
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": k, "segmentation": mask}
            for k, (box, mask) in enumerate(zip(boxes, masks, strict=True))
        ]
        record = {"file_name": photo, "height": 64, "width": 64, "annotations": annotations}
        np.random.seed(seed)
        losses = losses_of(model, [mapper(record)])
        model.zero_grad()
        sum(losses.values()).backward()
        return losses, {n: p.grad.clone() for n, p in model.named_parameters()}

    return run


@pytest.fixture
def reference(learn):
    """What is learned with boxes as masks of B, by seed."""
    return functools.cache(lambda seed: learn(seed, OF_A[0], OF_B[0], OF_A[1], OF_B[1]))


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(masks_of_b=st.tuples(ANY_MASK, ANY_MASK), seed=st.integers(0, 1))
def test_masks_of_b_change_no_loss_and_no_gradient(learn, reference, masks_of_b, seed):
    """From the file to the gradients, also where a crop makes boxes from masks."""
    assert_same(learn(seed, OF_A[0], masks_of_b[0], OF_A[1], masks_of_b[1]), reference(seed))


def test_a_mask_of_a_changes_the_loss(learn, reference):
    """Shows that the test above can fail."""
    halves = box_polygon(4, 4, 17, 40), box_polygon(34, 2, 42, 22)
    losses, _ = learn(0, halves[0], OF_B[0], halves[1], OF_B[1])
    assert losses["loss_mask"] != reference(0)[0]["loss_mask"]


def assert_same(first, second):
    for some, other in zip(first, second, strict=True):
        assert some.keys() == other.keys()
        assert all(torch.equal(some[name], other[name]) for name in some)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True), r"CLS_AGNOSTIC_BBOX_REG \(now True\)"),
        (("MODEL.MASK_ON", False), "MODEL.MASK_ON is False.*StandardROIHeads"),
        (
            ("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
            "MaskRCNNConvUpsampleHead takes no weights .*ROI_MASK_HEAD.NAME MaskXMaskHead",
        ),
    ],
)
def test_bad_configurations_are_named(make_model, opts, words):
    with pytest.raises(ValueError, match=words):
        make_model(*opts)


def test_class_agnostic_box_regression_goes_with_other_inputs(make_model, make_sample):
    agnostic = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
    model = make_model(*agnostic, "MODEL.MASKX.TRANSFER.INPUTS", "cls")
    assert losses_of(model, [make_sample([True])])["loss_mask"] > 0
    make_model(*agnostic, "MODEL.MASKX.PREDICTOR", "class_agnostic")


def test_a_configuration_without_our_keys_is_named():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NAME = "MaskXROIHeads"
    with pytest.raises(ValueError, match=r"Call maskx\.detectron2\.add_maskx_config\(cfg\)"):
        build_model(cfg)


class TaggingROIHeads(StandardROIHeads):
    """Heads of another code base: a further loss, and images that have tags but no boxes."""

    @configurable
    def __init__(self, *, tag_weight=1.0, **kwargs):
        super().__init__(**kwargs)
        self.tag_weight = tag_weight

    @classmethod
    def from_config(cls, cfg, input_shape):
        return super().from_config(cfg, input_shape) | {"tag_weight": cfg.MODEL.TAG_WEIGHT}

    def forward(self, images, features, proposals, targets=None, ann_type="box"):
        if self.training and ann_type == "image":
            pooled = self.box_pooler(
                [features[name] for name in self.box_in_features],
                [x.proposal_boxes for x in proposals],
            )
            scores, deltas = self.box_predictor(self.box_head(pooled))
            return proposals, {"loss_tag": scores.mean() * self.tag_weight + 0 * deltas.sum()}
        results, losses = super().forward(images, features, proposals, targets)
        return results, {name: 2 * loss for name, loss in losses.items()}


@ROI_HEADS_REGISTRY.register()
class MaskXTaggingROIHeads(MaskXROIHeadsMixin, TaggingROIHeads):
    pass


@pytest.fixture
def make_tagging(make_cfg):
    def make(name="MaskXTaggingROIHeads", *opts):
        cfg = make_cfg("MODEL.ROI_HEADS.NAME", name, *opts)
        cfg.MODEL.TAG_WEIGHT = 3.0
        torch.manual_seed(0)
        return build_model(cfg).train()

    return make


def run_heads(model, batch, **kwargs):
    """What a model does in training, with further arguments for its RoI heads."""
    torch.manual_seed(0)
    with EventStorage():
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        targets = [x["instances"] for x in batch]
        proposals, _ = model.proposal_generator(images, features, targets)
        return model.roi_heads(images, features, proposals, targets, **kwargs)[1]


def test_heads_of_another_code_base_keep_their_box_branch(make_tagging, make_model, make_sample):
    theirs, ours = make_tagging(), make_model()
    theirs.load_state_dict(ours.state_dict())
    assert theirs.roi_heads.tag_weight == 3
    batch = [make_sample([True, False]), make_sample([])]
    losses, expected = losses_of(theirs, batch), losses_of(ours, batch)
    assert losses.keys() == expected.keys()
    for name, loss in expected.items():
        factor = 2 if name in ("loss_cls", "loss_box_reg") else 1
        assert loss > 0
        torch.testing.assert_close(losses[name], factor * loss)
    with torch.no_grad():
        (result,) = theirs.eval()([make_sample([])])
    assert result["instances"].has("pred_masks")


@pytest.mark.parametrize("gt_boxes_only", [False, True])
def test_further_arguments_reach_the_other_heads(make_tagging, make_sample, gt_boxes_only):
    model = make_tagging("MaskXTaggingROIHeads", "MODEL.MASKX.GT_BOXES_ONLY", gt_boxes_only)
    sample = make_sample([])
    for field in ("gt_has_mask", "gt_masks"):
        sample["instances"].remove(field)
    run_heads(model, [make_sample([True])])  # what was sampled here must not be used again
    losses = run_heads(model, [sample], ann_type="image")
    assert losses.keys() == {"loss_tag", "loss_mask"}
    assert losses["loss_mask"] == 0
    sum(losses.values()).backward()
    heads = dict(model.roi_heads.named_parameters())
    assert [name for name, p in heads.items() if p.grad is None] == []


def test_other_heads_are_built_from_explicit_arguments(make_tagging, make_sample):
    model = make_tagging()
    model.roi_heads = MaskXTaggingROIHeads(
        tag_weight=2.0, gt_boxes_only=True, **arguments_of(model.roi_heads)
    )
    assert losses_of(model, [make_sample([True, False])])["loss_mask"] > 0


def arguments_of(heads):
    """Explicit arguments that make the same heads again."""
    names = (
        "num_classes",
        "batch_size_per_image",
        "positive_fraction",
        "proposal_matcher",
        "box_in_features",
        "box_pooler",
        "box_head",
        "box_predictor",
        "mask_in_features",
        "mask_pooler",
        "mask_head",
    )
    return {name: getattr(heads, name) for name in names}


class ConvUpsampleOfATest(MaskRCNNConvUpsampleHead):
    def forward(self, features, instances, detector):
        return super().forward(features, instances)


ROI_MASK_HEAD_REGISTRY.register(ConvUpsampleOfATest)


def test_a_mask_head_of_another_code_base_learns_from_partial_masks(make_model, make_sample):
    model = make_model("MODEL.ROI_MASK_HEAD.NAME", "ConvUpsampleOfATest")
    for kind, batch in KINDS.items():
        losses = losses_of(model, [make_sample(has_mask) for has_mask in batch])
        assert (losses["loss_mask"] > 0) == any(map(any, batch)), kind
    with torch.no_grad():
        (result,) = model.eval()([make_sample([])])
    assert result["instances"].has("pred_masks")


def test_a_mask_head_that_takes_no_detector_weights_is_named_without_a_configuration(make_model):
    arguments = arguments_of(make_model().roi_heads)
    shape = ShapeSpec(channels=16, height=4, width=4)
    arguments["mask_head"] = MaskRCNNConvUpsampleHead(shape, num_classes=4, conv_dims=[8])
    with pytest.raises(ValueError, match=r"MaskRCNNConvUpsampleHead takes no weights .*Protocol"):
        MaskXROIHeads(**arguments)


class ZeroShotOutputLayers(FastRCNNOutputLayers):
    """Box predictor of another code base, whose classifier has no rows of weights."""

    def __init__(self, cfg, input_shape):
        super().__init__(cfg, input_shape)
        self.bbox_pred = nn.Sequential(self.bbox_pred)
        self.cls_score = nn.Sequential(nn.Linear(self.cls_score.in_features, 7))
        self.embeddings = nn.Parameter(torch.randn(7, self.num_classes + 1), requires_grad=False)

    def forward(self, x):
        return self.cls_score(x) @ self.embeddings, self.bbox_pred(x)


class HookedOutputLayers(ZeroShotOutputLayers):
    def detector_weights(self):
        return DetectorWeights(self.embeddings[:, :-1].T, None)


class ZeroShotROIHeads(StandardROIHeads):
    predictor = HookedOutputLayers

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        return ret | {"box_predictor": cls.predictor(cfg, ret["box_head"].output_shape)}


@ROI_HEADS_REGISTRY.register()
class MaskXZeroShotROIHeads(MaskXROIHeadsMixin, ZeroShotROIHeads):
    pass


ZERO_SHOT = pairs(
    {
        "MODEL.ROI_HEADS.NAME": "MaskXZeroShotROIHeads",
        "MODEL.MASKX.TRANSFER.INPUTS": "cls",
        "MODEL.MASKX.TRANSFER.DETECTOR_CHANNELS": 7,
    }
)


def test_a_classifier_without_rows_gives_them_by_a_method(make_model, make_sample):
    model = make_model(*ZERO_SHOT)
    rows = model.roi_heads.detector_weights().cls
    assert torch.equal(rows, model.roi_heads.box_predictor.embeddings[:, :4].T)
    losses = losses_of(model, [make_sample([True, False])])
    assert losses["loss_mask"] > 0


def test_a_classifier_without_rows_is_named(make_model, monkeypatch):
    monkeypatch.setattr(ZeroShotROIHeads, "predictor", ZeroShotOutputLayers)
    with pytest.raises(
        ValueError, match=r"ZeroShotOutputLayers has no cls_score.weight.*detector_weights\(\)"
    ):
        make_model(*ZERO_SHOT)


@pytest.mark.parametrize(
    "opts", [("MODEL.MASKX.PREDICTOR", "class_agnostic"), ("MODEL.MASKX.TRANSFER.INPUTS", "randn")]
)
def test_a_mask_head_that_reads_no_rows_goes_with_any_classifier(
    make_model, make_sample, monkeypatch, opts
):
    monkeypatch.setattr(ZeroShotROIHeads, "predictor", ZeroShotOutputLayers)
    model = make_model(*ZERO_SHOT, *opts)
    assert losses_of(model, [make_sample([True])])["loss_mask"] > 0


@pytest.mark.parametrize(
    ("heads", "inputs", "found"),
    [("MaskXZeroShotROIHeads", "cls", 7), ("MaskXROIHeads", "cls+box", 24)],
)
def test_a_wrong_length_of_the_rows_is_named_when_the_model_is_built(
    make_model, heads, inputs, found
):
    words = rf"from '{re.escape(inputs)}' expects .*rows have {found}\. Set .*_CHANNELS {found} \("
    opts = ("MODEL.ROI_HEADS.NAME", heads, "MODEL.MASKX.TRANSFER.INPUTS", inputs)
    with pytest.raises(ValueError, match=words):
        make_model(*opts, "MODEL.MASKX.TRANSFER.DETECTOR_CHANNELS", 9)


def test_rows_that_hold_the_background_are_refused(make_model, monkeypatch):
    monkeypatch.setattr(
        HookedOutputLayers,
        "detector_weights",
        lambda self: DetectorWeights(self.embeddings.T, None),
    )
    with pytest.raises(ValueError, match="HookedOutputLayers gives the weights of 5 classes, but"):
        make_model(*ZERO_SHOT)


def test_without_a_configuration_too_class_agnostic_boxes_give_no_rows(make_model):
    arguments = arguments_of(make_model().roi_heads)
    agnostic = make_model(
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True, "MODEL.MASKX.TRANSFER.INPUTS", "cls"
    )
    arguments["box_predictor"] = agnostic.roi_heads.box_predictor
    with pytest.raises(ValueError, match=r"box regression is class-agnostic\. Make it class-spec"):
        MaskXROIHeads(**arguments)
