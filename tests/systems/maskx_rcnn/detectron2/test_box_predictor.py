import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads, build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from settings import pairs

from maskx.core.word_vectors import load_class_vectors
from maskx.data.vocabularies import COCO_THING_CLASSES
from maskx.detectron2 import MaskXROIHeadsMixin, MaskXTextOutputLayers

K, D, E = 5, 6, 4
ANIMALS = ["cat", "dog", "owl", "yak"]
OTHERS = ["axolotl", "cat", "okapi"]
CASCADE = ("MODEL.ROI_HEADS.NAME", "MaskXCascadeROIHeads")
REST = {
    "box2box_transform": Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
    "test_score_thresh": 0.05,
}


def make_predictor(**changes):
    torch.manual_seed(0)
    arguments = {"num_classes": K, "class_vectors": torch.randn(K, E)} | REST | changes
    return MaskXTextOutputLayers(ShapeSpec(channels=D), **arguments)


@pytest.fixture
def text_opts(tmp_path):
    """Keys of a text classifier: ``text_opts(names)``, with a file of random vectors."""
    words = sorted({*ANIMALS, *OTHERS})
    np.save(tmp_path / "words.npy", np.random.RandomState(0).randn(len(words), E))
    (tmp_path / "words.txt").write_text("\n".join(words))

    def opts(names):
        return pairs(
            {
                "MODEL.MASKX.TEXT_CLASSIFIER.VECTORS": str(tmp_path / "words.npy"),
                "MODEL.MASKX.TEXT_CLASSIFIER.CLASSES": names,
                "MODEL.ROI_HEADS.NUM_CLASSES": len(names),
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
                "MODEL.MASKX.TRANSFER.INPUTS": "cls",
            }
        )

    return opts


def losses_of(model, batch):
    torch.manual_seed(0)  # proposals are sampled at random
    with EventStorage():
        return model(batch)


def test_the_logit_is_the_scaled_cosine_and_zero_for_background():
    vectors, features = torch.randn(K, E) * 7, torch.randn(3, D)
    predictor = make_predictor(class_vectors=vectors, temperature=20.0)
    logits, deltas = predictor(features)
    projection = predictor.cls_score.projection
    for row, x in zip(logits.tolist(), features, strict=True):
        projected = projection.weight @ x + projection.bias
        cosines = [(projected @ v / projected.norm() / v.norm()).item() for v in vectors]
        assert row == pytest.approx([*(20 * c for c in cosines), 0.0], abs=1e-4)
    assert deltas.shape == (3, 4)
    torch.testing.assert_close(
        predictor.predict_probs((logits, deltas), [Instances((9, 9), x=range(3))])[0],
        logits.softmax(dim=1),
    )


def test_the_loss_is_the_softmax_loss_of_the_box_head():
    predictor = make_predictor()
    assert predictor.cls_score.temperature == 50
    boxes = Boxes([[0.0, 0, 9, 9], [2.0, 2, 8, 8]])
    proposals = Instances((9, 9), proposal_boxes=boxes, gt_boxes=boxes)
    proposals.gt_classes = torch.tensor([3, K])
    predictions = predictor(torch.randn(2, D))
    with EventStorage():
        losses = predictor.losses(predictions, [proposals])
    torch.testing.assert_close(
        losses["loss_cls"], F.cross_entropy(predictions[0], proposals.gt_classes)
    )
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in predictor.parameters())
    assert predictor.cls_score.projection.weight.grad.abs().sum() > 0


def test_autocast_keeps_the_cosine_exact():
    predictor = make_predictor()
    features = torch.randn(8, D)
    expected, _ = predictor(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = predictor.cls_score.projection(features).float()
        logits, _ = predictor(features)
    assert logits.dtype == torch.float32
    exact = 50 * F.normalize(projected, dim=1) @ predictor.cls_score.class_vectors.T
    torch.testing.assert_close(logits[:, :K], exact)
    assert (logits - expected).abs().max() > 0


def test_vectors_are_no_part_of_a_checkpoint():
    state = make_predictor().state_dict()
    assert not [name for name in state if "vectors" in name]
    other = make_predictor(num_classes=3, class_vectors=torch.randn(3, E))
    other.load_state_dict(state)
    assert torch.equal(other.cls_score.projection.weight, state["cls_score.projection.weight"])


def test_the_weight_transfer_takes_the_vectors(make_model, text_opts, tmp_path):
    heads = make_model(*text_opts(ANIMALS)).roi_heads
    cls, box = heads.detector_weights()
    expected = torch.from_numpy(load_class_vectors(tmp_path / "words.npy", ANIMALS))
    torch.testing.assert_close(cls, expected / expected.norm(dim=1, keepdim=True))
    assert box is None
    assert not cls.requires_grad
    assert heads.mask_head.predictor.layers[0].in_features == E


def test_the_example_of_the_configs_takes_the_names_of_the_training_data(
    make_cfg, tiny_train, tmp_path
):
    (tmp_path / "names.txt").write_text(
        "".join(f"{n.replace(' ', '_')} {k} 1\n" for k, n in enumerate(names_of(tiny_train)))
    )
    cfg = make_cfg(
        "MODEL.MASKX.TEXT_CLASSIFIER.VECTORS",
        str(tmp_path / "names.txt"),
        "MODEL.MASKX.TEXT_CLASSIFIER.TEMPERATURE",
        20.0,
        file="other_heads/text_cls_2_layer_R_50_FPN.yaml",
    )
    heads = build_model(cfg).roi_heads
    assert isinstance(heads.box_predictor, MaskXTextOutputLayers)
    assert heads.box_predictor.cls_score.temperature == 20
    cls = heads.detector_weights().cls
    torch.testing.assert_close(cls[:, 0] / cls[:, 1], torch.arange(4.0))


def names_of(dataset):
    return MetadataCatalog.get(dataset).thing_classes


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("has_mask", [[True, False], [False]])
def test_every_parameter_is_in_the_graph(make_model, make_sample, text_opts, cascade, has_mask):
    model = make_model(*text_opts(ANIMALS), *(CASCADE if cascade else ()))
    losses = losses_of(model, [make_sample(has_mask), make_sample([])])
    assert (losses["loss_mask"] > 0) == any(has_mask)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("cascade", [False, True])
def test_autocast_trains_and_predicts_in_bfloat16(make_model, make_sample, text_opts, cascade):
    model = make_model(*text_opts(ANIMALS), *(CASCADE if cascade else ()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, [make_sample([True, False]), make_sample([])])
        with torch.no_grad():
            (result,) = model.eval()([make_sample([])])
    assert result["instances"].pred_masks.shape[1:] == (64, 64)
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_each_stage_of_a_cascade_has_its_own_classifier(make_model, text_opts):
    first, _, last = make_model(*text_opts(ANIMALS), *CASCADE).roi_heads.box_predictor
    assert isinstance(first, MaskXTextOutputLayers)
    assert first.box2box_transform.weights == (10.0, 10.0, 5.0, 5.0)
    assert last.box2box_transform.weights == (30.0, 30.0, 15.0, 15.0)


@pytest.mark.parametrize("cascade", [False, True])
def test_a_checkpoint_serves_other_classes(make_model, make_sample, text_opts, tmp_path, cascade):
    """Built with other class names: every weight loads, and a class that stays keeps its masks."""
    heads = CASCADE if cascade else ()
    trained = make_model(*text_opts(ANIMALS), *heads)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
    sum(losses_of(trained, [make_sample([True, True])]).values()).backward()
    optimizer.step()
    DetectionCheckpointer(trained, str(tmp_path)).save("model")

    other = make_model(*text_opts(OTHERS), *heads).eval()
    DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
    weights = other.state_dict()
    assert weights.keys() == trained.state_dict().keys()
    for name, value in trained.state_dict().items():
        assert torch.equal(weights[name], value), name

    trained.eval()
    sample, masks = make_sample([]), {}
    for names, model in ((ANIMALS, trained), (OTHERS, other)):
        given = Instances((64, 64), pred_boxes=Boxes([[5.0, 5, 40, 50]] * len(names)))
        given.pred_classes = torch.arange(len(names))
        with torch.no_grad():
            (result,) = model.inference([sample], [given], do_postprocess=False)
            (detected,) = model([sample])
        masks |= {(len(names), n): m for n, m in zip(names, result.pred_masks, strict=True)}
        assert detected["instances"].pred_classes.max() < len(names)
    torch.testing.assert_close(masks[4, "cat"], masks[3, "cat"])
    assert not torch.allclose(masks[3, "okapi"], masks[3, "axolotl"])


def test_the_vectors_of_clip_for_the_classes_of_coco(
    make_model, make_sample, shared_data, tmp_path
):
    source = shared_data / "vocab" / "detic" / "coco_clip_a+cname.npy"
    shutil.copy(source, tmp_path / "clip.npy")
    (tmp_path / "clip.json").write_text(json.dumps(COCO_THING_CLASSES))

    def opts(names):
        return pairs(
            {
                "MODEL.MASKX.TEXT_CLASSIFIER.VECTORS": str(tmp_path / "clip.npy"),
                "MODEL.MASKX.TEXT_CLASSIFIER.CLASSES": list(names),
                "MODEL.ROI_HEADS.NUM_CLASSES": len(names),
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
                "MODEL.MASKX.TRANSFER.INPUTS": "cls",
            }
        )

    model = make_model(*opts(COCO_THING_CLASSES))
    assert losses_of(model, [make_sample([True, False])])["loss_mask"] > 0
    vectors = model.roi_heads.detector_weights().cls
    assert vectors.shape == (80, 512)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(80))
    cosines = vectors @ vectors.T
    index = COCO_THING_CLASSES.index
    assert cosines[index("cat"), index("dog")] > cosines[index("cat"), index("toaster")]
    few = make_model(*opts(["zebra", "cat"])).eval()
    few.load_state_dict(model.state_dict())
    torch.testing.assert_close(few.roi_heads.detector_weights().cls[1], vectors[index("cat")])


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (
            ("MODEL.ROI_HEADS.NUM_CLASSES", 7),
            "NUM_CLASSES is 7, but the class list of .*CLASSES has 4 names. Set NUM_CLASSES to 4",
        ),
        (
            (
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
                False,
                "MODEL.MASKX.TRANSFER.INPUTS",
                "randn",
            ),
            "Set MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True",
        ),
        (("MODEL.MASKX.TRANSFER.INPUTS", "cls+box"), "CLS_AGNOSTIC_BBOX_REG .now True"),
        (("MODEL.MASKX.TEXT_CLASSIFIER.CLASSES", ["cat", "dog", "owl", "gnu"]), "'gnu'"),
    ],
)
def test_bad_configurations_are_named(make_model, text_opts, opts, words):
    with pytest.raises(ValueError, match=words):
        make_model(*text_opts(ANIMALS), *opts)


def test_it_is_built_by_a_lazy_config(text_opts, tmp_path):
    text_opts(ANIMALS)
    config = L(MaskXTextOutputLayers)(
        input_shape=ShapeSpec(channels=D),
        box2box_transform=L(Box2BoxTransform)(weights=(10.0, 10.0, 5.0, 5.0)),
        num_classes=2,
        class_vectors=L(load_class_vectors)(
            path=str(tmp_path / "words.npy"), class_names=["yak", "axolotl"]
        ),
    )
    logits, _ = instantiate(config)(torch.randn(3, D))
    assert logits.shape == (3, 3)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="temperature of a text classifier must be above 0, got 0"):
        make_predictor(temperature=0)
    with pytest.raises(ValueError, match="class_vectors has 3 rows for 5 classes"):
        make_predictor(class_vectors=torch.randn(3, E))
    vectors = torch.randn(K, E)
    vectors[[1, 4]] = 0
    with pytest.raises(ValueError, match=r"class indices \[1, 4\] are all zero"):
        make_predictor(class_vectors=vectors)


class HeadsThatMakeTheirOwnPredictor(StandardROIHeads):
    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret.pop("box_predictor")
        return ret


def test_a_predictor_that_cannot_be_replaced_is_named(make_cfg, text_opts):
    class MaskXOfATest(MaskXROIHeadsMixin, HeadsThatMakeTheirOwnPredictor):
        pass

    ROI_HEADS_REGISTRY._do_register("MaskXHeadsWithoutPredictor", MaskXOfATest)
    cfg = make_cfg(*text_opts(ANIMALS), "MODEL.ROI_HEADS.NAME", "MaskXHeadsWithoutPredictor")
    with pytest.raises(ValueError, match="MaskXHeadsWithoutPredictor do not make their box"):
        build_model(cfg)
