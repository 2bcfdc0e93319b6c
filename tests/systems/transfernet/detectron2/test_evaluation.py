import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from maskx.data.label_maps import write_label_map
from maskx.detectron2 import MaskXTransferLabelEvaluator, MaskXTransferSemSegEvaluator
from maskx.supervision import CategorySplit

# The target first, in another order than the data set's, and by COCO's names.
SPLIT = CategorySplit(
    "test", ("couch", "cat", "tv", "zebra", "kite"), ("zebra", "kite"), ("couch", "cat", "tv")
)


def register(name, class_names, tmp_path, truths, image_labels=None):
    records = []
    for image_id, truth in enumerate(truths):
        path = tmp_path / f"{name}{image_id}.png"
        write_label_map(path, truth, num_classes=len(class_names))
        record = {"file_name": "", "image_id": image_id, "image_labels": [], "annotations": []}
        if image_labels is not None:
            record["image_labels"] = image_labels[image_id]
        height, width = truth.shape
        record |= {"height": height, "width": width, "label_map_file_name": str(path)}
        records.append(record)
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = list(class_names)


def test_iou_is_that_of_a_confusion_matrix(tmp_path):
    random = np.random.RandomState(0)
    names = ("cat", "tvmonitor", "sofa", "zebra")
    to_union = [0, 2, 3, 1, 4]  # by label of the data set
    truths = [random.randint(0, 5, (6, 7)) for _ in range(3)]
    truths[1][2:4] = 255
    register("mixed", names, tmp_path, truths)
    evaluator = MaskXTransferSemSegEvaluator("mixed", split=SPLIT)
    confusion = np.zeros((5, 5))
    for image_id, truth in enumerate(truths):
        predicted = np.where(random.rand(6, 7) < 0.6, truth, random.randint(0, 5, (6, 7)))
        predicted[truth == 255] = 1
        for t, p in zip(truth.flat, predicted.flat, strict=True):
            if t != 255:
                confusion[t, p] += 1
        sem_seg = torch.tensor(to_union)[torch.from_numpy(predicted)]
        evaluator.process([{"image_id": image_id}], [{"sem_seg": sem_seg}])
    right = confusion.diagonal()
    iou = 100 * right / (confusion.sum(0) + confusion.sum(1) - right)
    result = evaluator.evaluate()["sem_seg"]
    assert result["mIoU"] == pytest.approx(iou.mean())
    assert result["mIoU_A"] == pytest.approx(iou[4])  # zebra
    assert result["mIoU_B"] == pytest.approx(iou[1:4].mean())
    assert result["background"] == pytest.approx(iou[0])
    assert [result[f"IoU-{name}"] for name in names] == pytest.approx(list(iou[1:]))


def test_a_data_set_of_targets_alone_has_no_group_a(tmp_path):
    register("voc", ("cat", "sofa"), tmp_path, [np.array([[0, 1, 2]])])
    evaluator = MaskXTransferSemSegEvaluator("voc", split=SPLIT)
    evaluator.process([{"image_id": 0}], [{"sem_seg": torch.tensor([[0, 2, 2]])}])
    result = evaluator.evaluate()["sem_seg"]
    assert np.isnan(result["mIoU_A"])
    assert result["mIoU_B"] == pytest.approx((100 * 1 / 2 + 0) / 2)
    assert result["IoU-cat"] == pytest.approx(50)


def test_a_class_of_another_data_set_is_named(tmp_path):
    register("voc", ("cat", "sofa"), tmp_path, [np.array([[0, 1]])])
    evaluator = MaskXTransferSemSegEvaluator("voc", split=SPLIT)
    words = r"sem_seg of image 0 has tv, zebra, which data set 'voc' does not have"
    with pytest.raises(ValueError, match=words):
        evaluator.process([{"image_id": 0}], [{"sem_seg": torch.tensor([[3, 4]])}])
    with pytest.raises(ValueError, match=r"torch\.float32\. Allowed: a label map \(H, W\)"):
        evaluator.process([{"image_id": 0}], [{"sem_seg": torch.zeros(6, 1, 2)}])


def test_image_labels_are_scored_on_the_classes_of_the_data_set(tmp_path):
    labels = [[0], [1], [0, 1]]
    register("voc", ("cat", "sofa"), tmp_path, [np.array([[0]])] * 3, labels)
    evaluator = MaskXTransferLabelEvaluator("voc", split=SPLIT)
    probs = [[0.1, 0.9, 1, 1, 1], [0.9, 0.8, 1, 1, 1], [0.5, 0.7, 1, 1, 1]]
    for image_id, prob in enumerate(probs):
        evaluator.process([{"image_id": image_id}], [{"image_labels_prob": torch.tensor(prob)}])
    result = evaluator.evaluate()["image_labels"]
    assert result["AP-sofa"] == pytest.approx(100)  # couch: ranks 1 and 2
    assert result["AP-cat"] == pytest.approx(100 * (1 + 2 / 3) / 2)  # ranks 1 and 3
    assert result["mAP_B"] == pytest.approx((100 + 250 / 3) / 2)
    assert np.isnan(result["mAP_A"])


def test_labels_are_those_of_the_label_map_where_images_have_none(tmp_path):
    register("voc", ("cat", "sofa"), tmp_path, [np.array([[0, 1]]), np.array([[2, 255]])])
    evaluator = MaskXTransferLabelEvaluator("voc", split=SPLIT)
    for image_id, prob in enumerate([[0.1, 0.9, 0, 0, 0], [0.9, 0.1, 0, 0, 0]]):
        evaluator.process([{"image_id": image_id}], [{"image_labels_prob": torch.tensor(prob)}])
    result = evaluator.evaluate()["image_labels"]
    assert (result["AP-cat"], result["AP-sofa"]) == (100, 100)
