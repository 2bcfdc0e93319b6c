"""Boxes of Visual Genome and masks of COCO in one model: at once, in two stages, with any K."""

import copy
import json
import math
import runpy
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from settings import pairs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskx.data.prepare.visual_genome import prepare_visual_genome
from maskx.data.vocabularies import COCO_THING_CLASSES
from maskx.detectron2 import Trainer, get_cfg, register_all
from maskx.detectron2.datasets import split_from_config

ROOT = Path(__file__).parents[2]
FILES = runpy.run_path(str(ROOT / "tests" / "support" / "visual_genome_files.py"))
WIDTH, HEIGHT = FILES["WIDTH"], FILES["HEIGHT"]
NUM_CLASSES = 110

JOINT = "vg3k/e2e/clsbox_2_layer_mlp_R_50_FPN_1x.yaml"
STAGE_1 = "vg3k/stage1/faster_rcnn_R_50_FPN_1x.yaml"
STAGE_2 = "vg3k/sw/clsbox_2_layer_mlp_R_50_FPN_1x.yaml"
DETECTOR_LOSSES = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Visual Genome with 110 classes, and COCO with masks: 60 images of training, 3 of val2017."""
    root = tmp_path_factory.mktemp("datasets")
    images, objects, _ = FILES["make_vg"](seed=0)
    official = MetadataCatalog.get("coco_2017_train")
    ids = official.thing_dataset_id_to_contiguous_id
    categories = [{"id": i, "name": official.thing_classes[index]} for i, index in ids.items()]
    rng = np.random.default_rng(0)
    contents = {
        "visual_genome/image_data.json": images,
        "visual_genome/objects.json": objects,
        "coco/annotations/instances_train2017.json": coco_file(range(1, 61), categories, rng),
        "coco/annotations/instances_val2017.json": coco_file((1001, 1002, 1004), categories, rng),
    }
    for file, content in contents.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(json.dumps(content))
    pictures = [f"visual_genome/{'/'.join(image['url'].split('/')[-2:])}" for image in images]
    for part in ("train", "val"):
        content = contents[f"coco/annotations/instances_{part}2017.json"]
        pictures += [f"coco/{part}2017/{image['file_name']}" for image in content["images"]]
    for picture in pictures:
        (root / picture).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / picture), rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
    prepare_visual_genome(
        root / "visual_genome" / "objects.json",
        root / "visual_genome" / "image_data.json",
        root / "coco" / "annotations" / "instances_val2017.json",
        root / "visual_genome" / "annotations",
        num_classes=NUM_CLASSES,
        num_test_images=5,
    )
    return root


def coco_file(image_ids, categories, rng):
    """Two objects in each image, whose masks are triangles."""
    images, annotations = [], []
    for image_id in image_ids:
        file_name = f"{image_id:012}.jpg"
        images.append({"id": image_id, "file_name": file_name, "height": HEIGHT, "width": WIDTH})
        for x, y in ((4, 5), (30, 8)):
            category = categories[rng.integers(80)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category["id"],
                    "bbox": [x, y, 24, 20],
                    "segmentation": [[x, y, x + 24, y, x, y + 20]],
                }
            )
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def make_vg_cfg(root, make_cfg):
    """Make a tiny configuration of a file under vg3k that keeps its data sets and its split."""
    register_all(root)

    def make(file, *opts):
        whole = get_cfg()
        whole.merge_from_file(str(ROOT / "configs" / "MaskX" / file))
        assert whole.MODEL.ROI_HEADS.NUM_CLASSES == 3000
        datasets = whole.DATASETS
        return make_cfg(
            *pairs(
                {
                    "DATASETS.TRAIN": datasets.TRAIN,
                    "DATASETS.TEST": datasets.TEST,
                    "DATASETS.MASKX.SPLIT": datasets.MASKX.SPLIT,
                }
            ),
            "MODEL.ROI_HEADS.NUM_CLASSES",
            NUM_CLASSES,
            "SOLVER.IMS_PER_BATCH",
            4,
            *opts,
            file=file,
        )

    return make


def is_coco(sample):
    return "coco" in Path(sample["file_name"]).parts


def run(trainer):
    """Train; return the batches, the losses of each, and what the evaluation wrote."""
    steps = []

    def record(model, inputs, outputs):
        if model.training:
            steps.append((inputs[0], {name: loss.item() for name, loss in outputs.items()}))

    hook = trainer.model.register_forward_hook(record)
    trainer.train()
    hook.remove()
    assert len(steps) == trainer.cfg.SOLVER.MAX_ITER
    for _, losses in steps:
        assert all(map(math.isfinite, losses.values())), losses
    return steps, {name: value for name, (value, _) in trainer.storage.latest().items()}


def losses_of(model, samples):
    """Losses of a batch, with gradients; the same random samples of boxes are drawn every time."""
    model.train().zero_grad()
    torch.manual_seed(0)
    with EventStorage():
        losses = model(copy.deepcopy(samples))
    sum(losses.values()).backward()
    return {name: loss.item() for name, loss in losses.items()}


def every_mask(model, sample):
    """Masks, (K, M, M), that a model predicts for one box as each of its classes."""
    box = torch.tensor([[10.0, 10, 60, 50]]).repeat(NUM_CLASSES, 1)
    given = Instances(sample["image"].shape[1:], pred_boxes=Boxes(box))
    given.pred_classes = torch.arange(NUM_CLASSES)
    with torch.no_grad():
        (given,) = model.eval().inference([sample], [given], do_postprocess=False)
    return given.pred_masks[:, 0]


def assert_masks_for_every_class(model, sample):
    masks = every_mask(model, sample)
    assert ((masks >= 0) & (masks <= 1)).all()
    assert len(torch.unique(masks.flatten(1), dim=0)) == NUM_CLASSES  # each has its own w_seg
    # And the way of a user: detections, some of them of classes that no mask was seen of.
    with torch.no_grad():
        (output,) = model.eval()([sample])
    instances = output["instances"]
    assert (instances.pred_classes >= len(COCO_THING_CLASSES)).any()
    assert instances.pred_masks.shape == (len(instances), sample["height"], sample["width"])


def test_boxes_of_visual_genome_and_masks_of_coco_train_one_model(make_vg_cfg):
    cfg = make_vg_cfg(JOINT, "TEST.DETECTIONS_PER_IMAGE", 50)
    assert cfg.DATASETS.TRAIN == ("maskx_vg3k_train", "maskx_coco_2017_vg3k_train")
    assert split_from_config(cfg).with_masks == COCO_THING_CLASSES
    trainer = Trainer(cfg)
    steps, latest = run(trainer)
    samples = [sample for batch, _ in steps for sample in batch]
    assert {is_coco(sample) for sample in samples} == {True, False}
    for batch, losses in steps:
        assert losses.keys() == DETECTOR_LOSSES | {"loss_mask"}
        assert (losses["loss_mask"] > 0) == any(map(is_coco, batch))
        assert (losses["loss_cls"] > 0) == (not all(map(is_coco, batch)))

    # Mask AP of the classes of COCO, which have masks; of the others none is known.
    assert latest.keys() >= {"segm/AP", "segm_A/AP", "bbox/AP", "segm_B/AP"}
    assert latest["segm/AP"] == latest["segm_A/AP"] >= 0
    assert math.isnan(latest["segm_B/AP"])
    assert trainer.model.roi_heads.box_predictor.cls_score.weight.shape[0] == NUM_CLASSES + 1
    assert_masks_for_every_class(trainer.model, next(x for x in samples if not is_coco(x)))


def test_in_a_batch_of_both_each_trains_what_it_knows(make_vg_cfg):
    trainer = Trainer(make_vg_cfg(JOINT))
    model, loader = trainer.model, iter(trainer.data_loader)
    samples = [sample for _ in range(3) for sample in next(loader)]
    coco = [sample for sample in samples if is_coco(sample)][:2]
    vg = [s for s in samples if not is_coco(s) and len(s["instances"]) > 0][:2]
    assert len(coco) == len(vg) == 2
    joint, boxes, masks = (losses_of(model, batch) for batch in (vg + coco, vg, coco))

    for name in DETECTOR_LOSSES:
        assert joint[name] == pytest.approx(boxes[name], rel=1e-4), name
        assert boxes[name] > 0, name
        assert masks[name] == 0, name
    assert boxes["loss_mask"] == 0
    assert masks["loss_mask"] > 0
    assert joint["loss_mask"] > 0
    # The last batch had masks alone: nothing of the detector's own layers learned.
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith(("proposal_generator.", "roi_heads.box_")):
            assert not parameter.grad.any(), name
    assert all(p.grad.any() for p in model.roi_heads.mask_head.predictor.parameters())


def test_two_stages_need_no_surgery_of_weights(make_vg_cfg, tmp_path):
    folders = [str(tmp_path / stage) for stage in ("stage1", "stage2")]
    first = Trainer(make_vg_cfg(STAGE_1, "OUTPUT_DIR", folders[0]))
    steps, latest = run(first)
    assert not any(is_coco(sample) for batch, _ in steps for sample in batch)
    assert all(losses.keys() == DETECTOR_LOSSES for _, losses in steps)
    assert latest["bbox/AP"] >= 0

    weights = tmp_path / "stage1" / "model_final.pth"
    options = ("MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", folders[1])
    cfg = make_vg_cfg(STAGE_2, *options, "TEST.DETECTIONS_PER_IMAGE", 50)
    assert cfg.MODEL.MASKX.FREEZE_DETECTOR
    assert split_from_config(cfg).with_masks == COCO_THING_CLASSES
    second = Trainer(cfg)
    second.resume_or_load(resume=False)
    steps, latest = run(second)
    assert all(is_coco(sample) for batch, _ in steps for sample in batch)
    assert all(losses.keys() == {"loss_mask"} for _, losses in steps)
    assert all(losses["loss_mask"] > 0 for _, losses in steps)
    assert latest["segm/AP"] == latest["segm_A/AP"] >= 0
    assert math.isnan(latest["segm_B/AP"])

    detector, whole = first.model.state_dict(), second.model.state_dict()
    assert {name for name in whole if not name.startswith("roi_heads.mask_head.")} == set(detector)
    assert all(torch.equal(whole[name], weight) for name, weight in detector.items())
    assert detector["roi_heads.box_predictor.bbox_pred.weight"].shape == (4 * NUM_CLASSES, 24)
    sample = next(iter(Trainer.build_test_loader(cfg, "maskx_vg3k_val")))[0]
    assert_masks_for_every_class(second.model, sample)


# Any number of classes


def sizes_of(file, num_classes):
    """Shapes of all weights of a model at full size, and numbers that its optimiser holds."""
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / "MaskX" / file))
    cfg.merge_from_list(["MODEL.DEVICE", "meta", "MODEL.ROI_HEADS.NUM_CLASSES", num_classes])
    with torch.device("meta"):
        model = build_model(cfg)
    groups = build_optimizer(cfg, model).param_groups
    trained = sum(p.numel() for group in groups for p in group["params"])
    return {name: weight.shape for name, weight in model.state_dict().items()}, trained


@pytest.mark.parametrize("file", [JOINT, STAGE_2])
def test_with_3000_classes_only_the_box_predictor_is_larger(file):
    (few, few_trained), (many, many_trained) = (sizes_of(file, k) for k in (80, 3000))
    assert few.keys() == many.keys()
    predictor = "roi_heads.box_predictor"
    assert {name for name in few if few[name] != many[name]} == {
        f"{predictor}.cls_score.weight",
        f"{predictor}.cls_score.bias",
        f"{predictor}.bbox_pred.weight",
        f"{predictor}.bbox_pred.bias",
    }
    # A class has a row of the classifier and four of the regressor: 1024 weights and a bias each.
    more = (3000 - 80) * 5 * (1024 + 1)
    total = {k: sum(map(math.prod, shapes.values())) for k, shapes in ((80, few), (3000, many))}
    assert total[3000] - total[80] == more
    assert many_trained - few_trained == (0 if file == STAGE_2 else more)


class NewTensors(TorchDispatchMode):
    """Counts the tensors that are made, by their number of elements; views are none."""

    def __init__(self):
        super().__init__()
        self.sizes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        for made in filter(is_tensor, tree_leaves(result)):
            if made.untyped_storage()._cdata not in given:
                self.sizes[made.numel()] += 1
        return result


def is_tensor(value):
    return isinstance(value, torch.Tensor)


def tensors_of_a_mask_step(model):
    """Tensors that a training step of the mask head makes, for 6 RoIs of any classes."""
    heads, num_classes = model.roi_heads, model.roi_heads.num_classes
    generator = torch.Generator().manual_seed(0)
    rois = Instances((64, 64), proposal_boxes=Boxes(torch.tensor([[4.0, 4, 40, 40]] * 6)))
    rois.gt_classes = torch.randint(num_classes, (6,), generator=generator)
    rois.gt_masks = BitMasks(torch.rand(6, 64, 64, generator=generator) > 0.5)
    features = torch.rand(6, 16, 4, 4, generator=generator)
    with EventStorage(), NewTensors() as tensors:
        losses = heads.mask_head(features, [rois], detector=heads.detector_weights())
        sum(losses.values()).backward()
    return tensors.sizes


def test_no_tensor_of_the_mask_head_grows_with_the_number_of_classes(make_model):
    steps = {}
    for num_classes in (80, 3000):
        model = make_model(
            "MODEL.ROI_HEADS.NUM_CLASSES", num_classes, "DATASETS.MASKX.SPLIT", "all"
        )
        steps[num_classes] = tensors_of_a_mask_step(model)
    assert steps[80] == steps[3000]
    assert sum(steps[3000].values()) > 20

    # The K-channel form, as a check that such a tensor would be seen.
    predictor, detector = model.roi_heads.mask_head.predictor, model.roi_heads.detector_weights()
    with NewTensors() as tensors, torch.no_grad():
        w_seg = predictor.layers(predictor.class_inputs(torch.arange(3000), detector))
        F.conv2d(torch.rand(6, 8, 8, 8), w_seg[:, :, None, None])
    assert max(tensors.sizes) == 6 * 3000 * 8 * 8 > 10 * max(steps[3000])
