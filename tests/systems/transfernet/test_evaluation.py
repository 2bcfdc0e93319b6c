import math

import numpy as np
import pytest
import torch
from torch import nn

from maskx.data.coco import load_coco
from maskx.data.label_maps import semantic_label_map
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.systems.transfernet.evaluation import (
    evaluate_transfer,
    gram_rows,
    predict_transfer,
)
from maskx.systems.transfernet.pipeline import (
    TransferMethod,
    TransferSettings,
    build_transfer_model,
)

K = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    json_file = generate_scenes(folder, count=8, size=64, seed=3, num_categories=K, style="sparse")
    return load_coco(json_file, folder)


class Oracle(nn.Module):
    """Stands in for a trained network: the true mask of each label; it sees source labels only."""

    num_classes = K
    gt_labels = False

    def __init__(self, data, split):
        super().__init__()
        self.truth = {
            r["image_id"]: torch.from_numpy(semantic_label_map(r, K)).long() for r in data.records
        }
        self.source = set(split.indices_with_masks)

    def forward(self, samples):
        results = []
        for sample in samples:
            truth = self.truth[sample["image_id"]]
            labels = sample["image_labels"]
            result = {"attention": torch.tensor([[[0.5, 0.25, 0.125, 0.125]]] * len(labels))}
            if not self.gt_labels:
                labels = [label for label in labels if label in self.source]
                result["image_labels_prob"] = torch.rand(K)
                result["image_labels_prob"][labels] += 1
            kept = torch.isin(truth, torch.tensor([label + 1 for label in labels]))
            results.append(result | {"sem_seg": truth * kept})
        return results


@pytest.fixture(scope="module")
def split(data):
    return resolve_split("scenes_half", data.class_names)


@pytest.fixture(scope="module")
def groups(split):
    return {"target": split.indices_without_masks, "source": split.indices_with_masks}


def test_perfect_masks_score_100(data, split, groups):
    model = Oracle(data, split)
    found = evaluate_transfer(model, data.records, groups, gt_labels=True, batch_size=3)
    assert found["mIoU"] == {name: pytest.approx(100) for name in ("all", "target", "source")}
    assert "tag_mAP" not in found
    assert not model.gt_labels  # else a photograph, whose labels nobody gave, would show nothing
    entropy = -sum(p * math.log(p) for p in (0.5, 0.25, 0.125, 0.125)) / math.log(4)
    assert found["attention_entropy"] == pytest.approx(entropy)


def test_labels_of_the_classifier_decide_which_masks_are_made(data, split, groups):
    torch.manual_seed(0)
    found = evaluate_transfer(Oracle(data, split), data.records, groups)
    assert found["mIoU"]["source"] == pytest.approx(100)
    assert found["mIoU"]["target"] == 0
    assert found["tag_mAP"]["source"] == pytest.approx(100)
    assert found["tag_mAP"]["target"] < 100


def test_samples_and_results_come_in_the_order_of_the_records(data, split):
    found = list(predict_transfer(Oracle(data, split), data.records, batch_size=3))
    assert [record["image_id"] for record, _, _ in found] == [
        record["image_id"] for record in data.records
    ]
    for record, sample, result in found:
        assert sample["image_id"] == record["image_id"]
        assert sample["image"].shape[1:] == result["sem_seg"].shape
        assert np.isin(result["sem_seg"].numpy() - 1, [-1, *split.indices_with_masks]).all()


@pytest.mark.parametrize(("method", "stage"), [("transfernet", "joint"), ("baseline", "source")])
def test_rows_of_the_gram_matrix_are_the_densified_attention_of_one_position(method, stage, split):
    """Figure 6: Eq. 10 with an attention that is 1 at a position and 0 elsewhere."""
    torch.manual_seed(0)
    settings = TransferSettings(image_size=64, num_factors=4, hidden_channels=4)
    model = build_transfer_model(settings, split, TransferMethod(method), stage).eval()
    sample = {"image": torch.randint(0, 256, (3, 32, 128), dtype=torch.uint8)}
    rows = gram_rows(model, sample, [(0, 0), (127, 31), (70, 9)])
    with torch.no_grad():
        features = model.network.encode(model.preprocess([sample]))[0][0]
    height, width = features.shape[1:]
    assert rows.shape == (3, height, width)
    for row, (x, y) in zip(rows, [(0, 0), (127, 31), (70, 9)], strict=True):
        own = features[:, y * height // 32, x * width // 128]
        torch.testing.assert_close(row, torch.einsum("dhw,d->hw", features, own))
    for point in ((128, 0), (0, -1)):
        with pytest.raises(ValueError, match=rf"point \({point[0]}, {point[1]}\) is outside the"):
            gram_rows(model, sample, [(0, 0), point])
