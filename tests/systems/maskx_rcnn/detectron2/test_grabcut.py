import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from settings import pairs

from maskx.core.images import resized_image
from maskx.data.grabcut import grabcut_mask
from maskx.detectron2 import MaskXCOCOEvaluator, Trainer
from maskx.systems.maskx_rcnn.detectron2.model import MaskXGrabCutRCNN, predicts_masks

GRABCUT = pairs(
    {
        "MODEL.META_ARCHITECTURE": "MaskXGrabCutRCNN",
        "MODEL.MASK_ON": False,
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    }
)


@pytest.fixture
def model(make_cfg):
    return build_model(make_cfg(*GRABCUT)).eval()


@pytest.fixture
def disc():
    """A sample of 60 x 80 with a disc, its mask, and the box around it."""
    y, x = np.mgrid[:60, :80]
    mask = (x - 40) ** 2 + (y - 30) ** 2 < 15**2
    image = np.where(mask[..., None], (40, 60, 200), (180, 120, 60))
    image = image + np.random.RandomState(0).randint(-15, 16, image.shape)
    image = image.astype(np.uint8)
    sample = {"image": torch.as_tensor(image.transpose(2, 0, 1).copy()), "height": 60, "width": 80}
    return sample, mask, [23.0, 13.0, 58.0, 48.0]


def known(boxes, size):
    instances = Instances(size, pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))
    instances.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    instances.scores = torch.ones(len(boxes))
    return [instances]


def hwc(sample):
    return np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())


def test_detections_get_the_masks_of_grabcut(model, disc):
    sample, _, _ = disc
    with torch.no_grad():
        (output,) = model([sample])
        (boxes_only,) = GeneralizedRCNN.inference(model, [sample])
    found, expected = output["instances"], boxes_only["instances"]
    assert len(found) == 5
    for name in ("scores", "pred_classes"):
        assert (getattr(found, name) == getattr(expected, name)).all()
    assert (found.pred_boxes.tensor == expected.pred_boxes.tensor).all()
    assert found.pred_masks.dtype == torch.bool
    for mask, box in zip(found.pred_masks, found.pred_boxes.tensor.tolist(), strict=True):
        np.testing.assert_array_equal(mask.numpy(), grabcut_mask(hwc(sample), box))


def test_masks_have_the_size_of_the_output(model, disc):
    """The network may see the image larger or smaller than its output is."""
    sample, truth, box = disc
    for factor, least in ((0.5, 0.8), (2, 0.9)):  # half of the image tells less
        size = round(60 * factor), round(80 * factor)
        image = cv2.resize(hwc(sample), size[::-1], interpolation=cv2.INTER_AREA)
        # As Detectron2's mapper may give it.
        resized = torch.as_tensor(image.transpose(2, 0, 1)).float() + 0.3
        boxes = known([[side * factor for side in box]], size)
        with torch.no_grad():
            ((output),) = model.inference([sample | {"image": resized}], boxes)
        (mask,) = output["instances"].pred_masks.numpy()
        assert mask.shape == (60, 80)
        assert (mask & truth).sum() / (mask | truth).sum() > least


def test_floats_are_rounded_and_kept_in_range():
    values = torch.tensor([-3.0, 0.4, 99.6, 258.0])
    image = resized_image(values.expand(3, 1, 4), 1, 4)
    assert image.dtype == np.uint8
    assert image[0].tolist() == [[v] * 3 for v in (0, 0, 100, 255)]


def test_the_output_is_as_large_as_the_image_unless_the_sample_says(model, disc):
    sample, truth, box = disc
    with torch.no_grad():
        ((output),) = model.inference([{"image": sample["image"]}], known([box], (60, 80)))
    (mask,) = output["instances"].pred_masks.numpy()
    np.testing.assert_array_equal(mask, grabcut_mask(hwc(sample), box))
    assert (mask & truth).sum() / (mask | truth).sum() > 0.95


def test_images_of_a_batch_keep_their_own_masks(model, disc):
    sample, _, box = disc
    small = {"image": sample["image"][:, :40, :50], "height": 40, "width": 50}
    known_boxes = known([box], (60, 80)) + known([[5.0, 6, 30, 35], [20, 10, 45, 38]], (40, 50))
    with torch.no_grad():
        outputs = model.inference([sample, small], known_boxes)
    assert [tuple(o["instances"].pred_masks.shape) for o in outputs] == [(1, 60, 80), (2, 40, 50)]


def test_no_detections_are_no_masks(model, disc):
    with torch.no_grad():
        ((output),) = model.inference([disc[0]], known([], (60, 80)))
    assert output["instances"].pred_masks.shape == (0, 60, 80)


def test_without_postprocessing_there_are_no_masks(model, disc):
    with torch.no_grad():
        (instances,) = model.inference([disc[0]], do_postprocess=False)
    assert not instances.has("pred_masks")


def test_it_trains_as_faster_rcnn_and_its_weights_are_faster_rcnns(
    make_cfg, make_sample, tiny_train
):
    faster_rcnn = build_model(make_cfg(*GRABCUT, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"))
    model = build_model(make_cfg(*GRABCUT))
    model.load_state_dict(faster_rcnn.state_dict())
    samples = [make_sample([True, False])]
    losses = []
    for each in (model, faster_rcnn):
        torch.manual_seed(0)
        with EventStorage():
            losses.append(each.train()(samples))
    assert set(losses[0]) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_training_and_evaluation_from_end_to_end(make_cfg, tiny_train):
    cfg = make_cfg(*GRABCUT)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    evaluator = MaskXCOCOEvaluator(tiny_train, split=cfg.DATASETS.MASKX.SPLIT)
    results = Trainer.test(cfg, trainer.model, evaluators=[evaluator])
    assert {"bbox", "segm", "segm_A", "segm_B"} <= set(results)
    assert 0 <= results["segm"]["AP"] <= 100


def test_the_masks_of_good_boxes_are_scored(model, make_cfg, tiny_train):
    evaluator = MaskXCOCOEvaluator(tiny_train, split="scenes_half")
    evaluator.reset()
    cfg = make_cfg(*GRABCUT)
    for (sample,) in Trainer.build_test_loader(cfg, tiny_train):
        truth = true_objects(tiny_train, sample["image_id"])
        scale = sample["image"].shape[1] / sample["height"]
        boxes = known(
            [[side * scale for side in box] for box, _ in truth], sample["image"].shape[1:]
        )
        boxes[0].pred_classes = torch.tensor([index for _, index in truth])
        with torch.no_grad():
            evaluator.process([sample], model.inference([sample], boxes))
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] > 99
    assert 10 < results["segm"]["AP"] < 99


def true_objects(name, image_id):
    (record,) = (r for r in DatasetCatalog.get(name) if r["image_id"] == image_id)
    return [(a["bbox"], a["category_id"]) for a in record["annotations"]]


def test_a_mask_head_is_refused(make_cfg):
    with pytest.raises(ValueError, match=r"MODEL.MASK_ON is True.*Set MODEL.MASK_ON False"):
        build_model(make_cfg("MODEL.META_ARCHITECTURE", "MaskXGrabCutRCNN"))


def test_which_models_predict_masks(make_cfg):
    assert predicts_masks(make_cfg())
    assert predicts_masks(make_cfg(*GRABCUT))
    assert not predicts_masks(make_cfg(*GRABCUT, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"))
    assert issubclass(MaskXGrabCutRCNN, GeneralizedRCNN)
