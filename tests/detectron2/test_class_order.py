"""Test files whose categories are not those of the training, or not in their order."""

import json

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import Instances
from settings import pairs

from maskx.detectron2 import Trainer, evaluate, register_coco, register_from_config
from maskx.detectron2.trainer import check_config


@pytest.fixture
def write_test_file(scenes, tmp_path):
    """Write the scenes with other categories: ``write(names)``, a new (id, name) by old name."""

    def write(names, scenes=scenes):
        content = json.loads(scenes[0].read_text(encoding="utf-8"))
        old = {category["id"]: category["name"] for category in content["categories"]}
        content["annotations"] = [
            a | {"category_id": names[old[a["category_id"]]][0]}
            for a in content["annotations"]
            if old[a["category_id"]] in names
        ]
        for image in content["images"]:
            image.pop("stuff_file_name", None)
            labels = [old[label] for label in image["image_labels"]]
            image["image_labels"] = [names[label][0] for label in labels if label in names]
        content["categories"] = [{"id": id_, "name": name} for id_, name in names.values()]
        path = tmp_path / f"test_{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return str(path), str(scenes[1])

    return write


@pytest.fixture
def make(request, scenes):
    """Make a tiny configuration that is tested on a file: ``make(task, *pair)``."""

    def make(task, *pair, train=scenes):
        register = [["order_test", *pair], ["order_train", str(train[0]), str(train[1])]]
        return request.getfixturevalue(f"make_{task}cfg")(
            *pairs(
                {
                    "DATASETS.TRAIN": ("order_train",),
                    "DATASETS.TEST": ("order_test",),
                    "DATASETS.MASKX.REGISTER": register,
                    "DATASETS.MASKX.SPLIT": "scenes_half",
                    **OF_TASK.get(task, {}),
                }
            )
        )

    return make


# One data set instead of several, and no classifier of its own that would have to be trained.
OF_TASK = {
    "larvseg_": {
        "DATASETS.MASKX.JOINT.SUPERVISION": (),
        "DATASETS.MASKX.JOINT.RATIOS": (),
        "DATASETS.MASKX.JOINT.SIZES": (),
        "DATASETS.MASKX.JOINT.SINGLE_LABEL": (),
    },
    "transfer_": {"TEST.MASKX.GT_LABELS": True},
}


def reversed_ids(scenes):
    """Ids that turn the order of the categories, and collide with none."""
    content = json.loads(scenes[0].read_text(encoding="utf-8"))
    return {c["name"]: (1000 - c["id"], c["name"]) for c in content["categories"]}


@pytest.mark.parametrize("task", ["deeplab_", "classifier_", "larvseg_", "transfer_"])
def test_pixels_and_image_labels_are_matched_by_name(task, make, scenes, write_test_file, tmp_path):
    """The same images under other ids, in another order, have the same scores."""
    cfg = make(task, *write_test_file(reversed_ids(scenes)))
    check_config(cfg)
    torch.manual_seed(3)
    model = Trainer.build_model(cfg).eval()
    DetectionCheckpointer(model, str(tmp_path)).save("weights")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    (permuted,) = evaluate(cfg).values()
    cfg.DATASETS.TEST = ("order_train",)
    (expected,) = evaluate(cfg).values()
    assert permuted == pytest.approx(expected, nan_ok=True)
    per_class = [value for key, value in expected.items() if "-" in key]
    assert len(set(per_class)) > 1  # another order would be seen


def test_concepts_are_matched_by_name(make, concept_files, write_test_file, tmp_path):
    train = concept_files / "scenes" / "concepts.json", concept_files / "scenes"
    cfg = make("concept_", *write_test_file(reversed_ids(train), train), train=train)
    check_config(cfg)
    model = Trainer.build_model(cfg).eval()
    DetectionCheckpointer(model, str(tmp_path)).save("weights")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    permuted = evaluate(cfg)
    cfg.DATASETS.TEST = ("order_train",)
    expected = evaluate(cfg)
    assert str(permuted) == str(expected)
    assert any(np.isfinite(v) for values in expected.values() for v in values.values())


def test_detections_are_matched_by_name(make, scenes, write_test_file):
    cfg = make("", *write_test_file(reversed_ids(scenes)))
    check_config(cfg)
    evaluator = Trainer.build_evaluator(cfg, "order_test")
    evaluator.reset()
    for record in DatasetCatalog.get("order_train"):
        size = record["height"], record["width"]
        truth = annotations_to_instances(record["annotations"], size, mask_format="bitmask")
        found = Instances(size, pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes)
        found.scores, found.pred_masks = torch.ones(len(truth)), truth.gt_masks.tensor
        evaluator.process([record], [{"instances": found}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["segm_A"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (lambda old: {n: (i % 4 + 1, n) for n, i in old.items()}, r"other names to the same cat"),
        (
            lambda old: dict([(n, (i, n)) for n, i in old.items()][:3]),
            r"same categories: '[\w ]+' of 'order_train' is not",
        ),
        (lambda old: {n: (i, f"{n.title()} ") for n, i in old.items()}, r"', which has '[\w ]+'\."),
    ],
)
@pytest.mark.parametrize("task", ["", "deeplab_", "classifier_"])
def test_other_categories_are_refused_by_name(task, names, words, make, scenes, write_test_file):
    old = {c["name"]: c["id"] for c in json.loads(scenes[0].read_text())["categories"]}
    with pytest.raises(ValueError, match=rf"data set 'order_test' and 'order_train' .*{words}"):
        check_config(make(task, *write_test_file(names(old))))


def test_a_data_set_that_somebody_registered_in_another_order_is_refused(
    make_cfg, tiny_train, write_test_file, scenes
):
    pair = write_test_file(reversed_ids(scenes))
    register_coco("mine", *pair)
    with pytest.raises(ValueError, match=r"'mine' has the classes of 'tiny_train' in another ord"):
        check_config(make_cfg("DATASETS.TEST", ("mine",)))
    register_coco("theirs", *pair, class_names=list(reversed_ids(scenes)))
    check_config(make_cfg("DATASETS.TEST", ("theirs",)))


def test_a_checkpoint_of_another_order_is_refused(make, scenes, write_test_file):
    cfg = make("", *map(str, scenes))
    cfg.DATASETS.MASKX.SPLIT = "all"
    register_from_config(cfg)
    trainer = Trainer(cfg)
    trainer.train()
    pair = write_test_file(reversed_ids(scenes))
    cfg.DATASETS.MASKX.REGISTER = [["other", *pair]]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("other",)
    cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/model_final.pth"
    check_config(cfg)
    with pytest.raises(ValueError, match=r"class 0 is '[\w ]+', but the run .* with '[\w ]+'"):
        evaluate(cfg)
