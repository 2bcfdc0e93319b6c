import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from maskx.core.backbones import SmallResNet
from maskx.core.word_table import WordTable
from maskx.data.label_maps import write_label_map
from maskx.systems.concept_mask.concept_sets import ConceptSplit
from maskx.systems.concept_mask.evaluation import (
    ConceptTest,
    concept_test,
    concept_truths,
    evaluate_concepts,
    evaluate_existence,
    fit_concepts,
    fit_existence_threshold,
    soft_iou,
)
from maskx.systems.concept_mask.model import EmbeddingModel, RefinementModel
from maskx.systems.concept_mask.network import ConceptEmbedding, normalise_maps, resize_maps
from maskx.systems.concept_mask.query import ConceptQuery

NAMES = ("cat", "dog", "fire truck", "green")
RNG = np.random.default_rng(0)
TABLE = WordTable(NAMES, RNG.standard_normal((4, 6)), np.ones(4), source="a test")
UNSEEN = WordTable(("owl",), RNG.standard_normal((1, 6)), np.ones(1))
SPLIT = ConceptSplit(NAMES, boxed=("cat", "dog"), masked=("cat",))
CLASSES = ("green", "dog", "owl", "cat")


def make_model(network=RefinementModel, **options):
    torch.manual_seed(0)
    backbone = SmallResNet(widths=(4, 4, 4, 8), output_stride=8)
    embedding = ConceptEmbedding(
        backbone, in_feature="layer4", in_channels=8, dim=6, hidden_channels=(8, 8)
    )
    return network(embedding, table=TABLE, split=SPLIT, attention_sizes=(32, 48), **options).eval()


@pytest.fixture
def model():
    made = make_model(hidden_channels=8)
    torch.nn.init.normal_(made.refinement.conv2.weight)  # maps that differ
    return made


def rle(mask):
    return mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))


def annotation(index, mask=None):
    segmentation = {} if mask is None else {"segmentation": rle(mask)}
    return {"class_index": index, "bbox": [0, 0, 1, 1], "iscrowd": 0, **segmentation}


def square(start, stop, size=32):
    mask = np.zeros((size, size), bool)
    mask[start:stop, start:stop] = True
    return mask


@pytest.fixture
def records(tmp_path):
    """Images with their concepts; class indices count another list than the table."""
    made = []
    for number, labels in enumerate([(0, 3), (1, 3), (0, 1, 2), (2, 3), (0,), (1, 2)]):
        file = tmp_path / f"{number}.png"
        pixels = np.random.RandomState(number).randint(0, 256, (32, 32, 3))
        cv2.imwrite(str(file), pixels.astype(np.uint8))
        made.append(
            {
                "image_id": number,
                "file_name": str(file),
                "height": 32,
                "width": 32,
                "image_labels": list(labels),
                "annotations": [annotation(c, square(4 * c, 10 + 5 * c)) for c in labels],
            }
        )
    return made


def read_image(record):
    generator = torch.Generator().manual_seed(record["image_id"])
    return {"image": 255 * torch.rand(3, 32, 32, generator=generator)}


def embed(model, record):
    with torch.no_grad():
        return model.embedding_maps(model.normalise(read_image(record))[None])


def test_a_truth_is_the_union_of_all_instances():
    first, second = square(0, 4), square(2, 9)
    record = {
        "height": 32,
        "width": 32,
        "annotations": [
            annotation(2, first),
            annotation(1, first),
            annotation(2, second),
            annotation(3, first),
            annotation(3),
            annotation(5, np.zeros((32, 32), bool)),
        ],
    }
    truths = dict(concept_truths(record, 6))
    assert list(truths) == [1, 2]  # one instance of 3 has no mask, and 5 is not visible
    assert np.array_equal(truths[1], first)
    assert np.array_equal(truths[2], first | second)


def test_a_label_map_is_the_truth_where_there_is_one(records, tmp_path):
    """Also of what has no annotation; background and what is unknown are of no concept."""
    label_map = np.zeros((32, 32), np.uint8)
    label_map[:8], label_map[8:16], label_map[16:20], label_map[20:22] = 1, 3, 255, 2
    write_label_map(tmp_path / "map.png", label_map, num_classes=4)
    record = records[0] | {"label_map_file_name": str(tmp_path / "map.png"), "annotations": []}
    truths = dict(concept_truths(record, 4))
    assert {c: int(truth.sum()) for c, truth in truths.items()} == {0: 256, 2: 256, 1: 64}
    test = concept_test([record], CLASSES, SPLIT, TABLE, UNSEEN, source="x")
    assert test.has_truth
    assert test.asked(record) == [0, 1, 2]
    assert test.query([0, 2]).names == ("green", "owl", "owl (blended)")
    without = concept_test([record], CLASSES, SPLIT, TABLE, source="x")
    assert list(without.truths(record)) == without.asked(record) == [0, 1]
    found = evaluate_concepts(make_model(hidden_channels=8), test)
    assert set(found["concepts"]) == {"green", "dog", "owl", "owl (blended)"}


def test_classes_are_matched_by_name(records, caplog):
    found = concept_test(records, (*CLASSES, "yak"), SPLIT, TABLE, UNSEEN, source="x")
    assert found.indices.tolist() == [3, 1, -1, 0, -2]
    assert found.levels == ("image", "box", "unseen", "mask", "unseen")
    assert np.array_equal(found.vectors[2], UNSEEN.vectors[0])
    assert "x: 1 of 5 classes have no vector and are not measured, such as 'yak'" in caplog.text
    assert list(found.truths(records[2])) == [0, 1, 2]
    query = found.query([1, 2])
    assert (query.indices.tolist(), query.blended.tolist()) == ([1, -1, -1], [False, False, True])
    without = concept_test(records, CLASSES, SPLIT, TABLE, source="x")
    assert list(without.truths(records[2])) == [0, 1]
    with pytest.raises(ValueError, match="None of the 1 classes of 'x' is in the word table"):
        concept_test(records, ("yak",), SPLIT, TABLE, source="x")


def test_unseen_words_are_measured_by_eq_1_alone_and_blended_beside_it(model, records):
    model.set_fitted(theta_unseen=0.5)
    test = concept_test(records, CLASSES, SPLIT, TABLE, UNSEEN, source="x")
    found = evaluate_concepts(model, test)
    assert found["concepts"]["owl"]["level"] == "unseen"
    assert found["concepts"]["owl (blended)"]["level"] == "unseen_blended"
    alone = []
    for record in records:
        truth = test.truths(record).get(2)
        if truth is not None:
            sample = test.sample(record)
            with torch.no_grad():
                maps = model.embedding_maps(model.normalise(sample)[None])
            scores = (
                resize_maps(
                    (e * torch.tensor(UNSEEN.vectors[0])[:, None, None]).sum(1)[None], (32, 32)
                )
                for e in maps
            )
            shown = normalise_maps(sum(scores) / 2)[0, 0].numpy()
            alone.append(soft_iou(shown, truth))
    assert found["levels"]["unseen"]["soft_iou"] == pytest.approx(np.mean(alone), abs=1e-5)
    assert found["levels"]["unseen_blended"]["soft_iou"] != found["levels"]["unseen"]["soft_iou"]


def test_perfect_results_have_perfect_measures(records):
    test = concept_test(records, CLASSES, SPLIT, TABLE, UNSEEN, source="x")
    scores, other = test.new_scores(), test.new_scores()
    for each, part in ((scores, records[:3]), (other, records[3:])):
        for record in part:
            truths = test.truths(record)
            names = list(test.query(list(truths)).names)
            masks = np.stack([truths[CLASSES.index(name.split(" (")[0])] for name in names])
            masks = torch.from_numpy(masks)
            result = {"concepts": names, "masks": masks, "attention": masks.float()}
            test.measure(each, record, result)
    scores.merge(other)
    for level, count in {"mask": 1, "box": 1, "image": 1, "unseen": 1, "unseen_blended": 1}.items():
        measures = scores.evaluate()["levels"][level]
        assert measures["num_concepts"] == count
        for name in ("pointing", "soft_iou", "precision", "recall", "iou"):
            assert measures[name] == 1
    wrong = {"concepts": ["yak"], "masks": masks[:1], "attention": masks[:1].float()}
    with pytest.raises(ValueError, match=r"Of image 0 the concepts \['yak'\] were predicted"):
        test.measure(scores, records[0], wrong)
    with pytest.raises(ValueError, match=r"with 1 masks\. Ask with the query of the test"):
        test.measure(scores, records[0], wrong | {"concepts": ["cat", "green"]})


def test_masks_are_of_the_attention_where_asked(model, records, monkeypatch):
    test = concept_test(records, CLASSES, SPLIT, TABLE, source="x")
    asked = []
    predict = model.predict
    monkeypatch.setattr(
        model, "predict", lambda sample, **options: asked.append(options) or predict(sample)
    )
    evaluate_concepts(model, test, kind="own", segment=False)
    assert asked == [{"kind": "own", "segment": False}] * len(records)


def test_what_is_said_to_exist_is_counted_over_all_pairs(model, records):
    test = concept_test(records, CLASSES, SPLIT, TABLE, source="x")
    shown = sum(len({0, 1, 3} & set(r["image_labels"])) for r in records)
    model.set_fitted(existence_thresholds=torch.full((4,), -1.0))
    found = evaluate_existence(model, test)
    assert found == {"precision": pytest.approx(shown / (4 * len(records))), "recall": 1}
    model.set_fitted(existence_thresholds=torch.full((4,), 2.0))
    found = evaluate_existence(model, test)
    assert np.isnan(found["precision"])
    assert found["recall"] == 0


def test_fitted_values_are_the_best_of_their_grids(model, records):
    """Against loops that blend, normalise and compare one image and one value at a time."""
    test = concept_test(records, CLASSES, SPLIT, TABLE, UNSEEN, source="x")
    expected = {}
    for name, index in (("theta_image", 3), ("theta_unseen", -1)):
        query = ConceptQuery([index], TABLE.vectors[[3]])
        means = {}
        for theta in np.linspace(0.05, 1, 20):
            scores = []
            for record in records:
                if 0 not in record["image_labels"]:
                    continue
                maps = embed(model, record)
                kinds = [model.attention(maps, query, kind=k) for k in ("own", "nearest")]
                blends = [
                    normalise_maps(
                        theta * resize_maps(own, (32, 32))
                        + (1 - theta) * resize_maps(nearest, (32, 32))
                    )
                    for own, nearest in zip(*kinds, strict=True)
                ]
                blend = torch.stack(blends).mean(dim=0)[0, 0].detach().numpy()
                scores.append(soft_iou(blend, square(0, 10)))
            means[round(theta, 2)] = np.mean(scores)
        expected[name] = max(means, key=means.get)
        assert max(means.values()) > min(means.values()) + 1e-4
    fitted = fit_concepts(model, test, read_image)
    assert {name: fitted[name] for name in expected} == expected
    assert model.theta_image.item() == pytest.approx(expected["theta_image"])
    assert model.theta_unseen.item() == pytest.approx(expected["theta_unseen"])
    maps = [embed(model, record) for record in records]
    scores = torch.cat([model.vocabulary_existence(each) for each in maps]).detach().numpy()
    for concept, label in ((0, 3), (1, 1), (3, 0)):
        present = np.array([label in record["image_labels"] for record in records])
        threshold = fit_existence_threshold(scores[:, concept], present)
        assert model.existence_thresholds[concept].item() == pytest.approx(threshold)
    assert fitted["own_thresholds"] == 3  # no image shows a fire truck
    labels = {0: 3, 1: 1, 3: 0}  # of the images, by concept
    present = np.array([[labels.get(c) in r["image_labels"] for c in range(4)] for r in records])
    of_all = fit_existence_threshold(scores.ravel(), present.ravel())
    assert model.existence_thresholds[2].item() == pytest.approx(of_all)
    query = ConceptQuery([-1] * 4, TABLE.vectors)
    cosines = torch.cat([model.existence(each, query) for each in maps]).detach().numpy()
    unseen = fit_existence_threshold(cosines.ravel(), present.ravel())
    assert unseen != pytest.approx(of_all)
    assert model.existence_threshold_unseen.item() == pytest.approx(unseen)
    assert fitted["existence_threshold_unseen"] == pytest.approx(unseen)


def test_what_cannot_be_fitted_is_said(model, records, caplog):
    test = concept_test(records, CLASSES, SPLIT, TABLE, source="x")
    with pytest.raises(ValueError, match="There is no image to fit theta"):
        fit_concepts(
            model,
            ConceptTest([], test.names, test.indices, test.vectors, test.levels),
            read_image,
        )
    for record in records:
        record["annotations"] = [a for a in record["annotations"] if a["class_index"] != 0]
    fitted = fit_concepts(model, test, read_image)
    assert fitted["theta_image"] is fitted["theta_unseen"] is None
    assert model.theta_image == 1
    assert "None of the 6 images has a mask of a concept with tags only" in caplog.text
    with pytest.raises(ValueError, match=r"Stage 1 .*nothing to fit"):
        fit_concepts(make_model(EmbeddingModel), test, read_image)
