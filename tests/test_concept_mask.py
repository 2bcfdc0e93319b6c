import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from maskx.concept_mask import (
    ConceptTest,
    batch_targets,
    concept_test,
    concept_truths,
    fit_concepts,
    found_concepts,
    named_query,
)
from maskx.data.concept_sets import ConceptSplit
from maskx.data.word_table import WordTable
from maskx.evaluation.concept_scores import fit_existence_threshold, soft_iou
from maskx.modeling.backbones import SmallResNet
from maskx.modeling.concept_embedding import ConceptEmbedding
from maskx.modeling.concept_mask import ConceptMask, concept_query
from maskx.modeling.concept_segmenter import normalise_maps, resize_maps

NAMES = ("cat", "dog", "fire truck", "green")
RNG = np.random.default_rng(0)
TABLE = WordTable(NAMES, RNG.standard_normal((4, 6)), np.ones(4), source="a test")
UNSEEN = WordTable(("owl",), RNG.standard_normal((1, 6)), np.ones(1))
SPLIT = ConceptSplit(NAMES, boxed=("cat", "dog"), masked=("cat",))


@pytest.fixture
def network():
    torch.manual_seed(0)
    backbone = SmallResNet(widths=(4, 4, 4, 8), output_stride=8)
    embedding = ConceptEmbedding(
        backbone, in_feature="layer4", in_channels=8, dim=6, hidden_channels=(8, 8)
    )
    made = ConceptMask(
        embedding,
        vectors=torch.from_numpy(TABLE.vectors),
        idf=torch.from_numpy(TABLE.idf),
        boxed=SPLIT.boxed_indices,
        masked=SPLIT.masked_indices,
        stage=2,
        hidden_channels=8,
        attention_sizes=(32, 48),
    )
    torch.nn.init.normal_(made.refinement.conv2.weight)  # maps that differ
    return made.eval()


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
def records():
    """Images with their concepts; class indices count another list than the table."""
    shown = [(0, 3), (1, 3), (0, 1, 2), (2, 3), (0,), (1, 2)]
    return [
        {
            "image_id": number,
            "height": 32,
            "width": 32,
            "image_labels": list(labels),
            "annotations": [annotation(c, square(4 * c, 10 + 5 * c)) for c in labels],
        }
        for number, labels in enumerate(shown)
    ]


CLASSES = ("green", "dog", "owl", "cat")


def read_image(record):
    return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(record["image_id"]))


def test_names_numbers_and_vectors_are_asked_for_by_name():
    vector = TABLE.vectors[0]
    names, query = named_query(TABLE, UNSEEN, ["fire_truck", 1, vector, "owl"])
    assert names == ["fire truck", "dog", "vector 2", "owl"]
    assert query.indices.tolist() == [2, 1, -1, -1]
    expected = np.stack([TABLE.vectors[2], TABLE.vectors[1], vector, UNSEEN.vectors[0]])
    assert np.array_equal(query.vectors.numpy(), expected)


@pytest.mark.parametrize(
    ("concepts", "words"),
    [
        ([], "list of concepts is empty"),
        ("cat", "the text 'cat'"),
        (["dgo"], "'dgo' is not among the 4 .*Closest: 'dog'"),
        (["cat", 0], "'cat' is asked for twice"),
        (["fire_truck", "fire truck"], "'fire truck' is asked for twice"),
    ],
)
def test_questions_without_an_answer_are_refused(concepts, words):
    with pytest.raises(ValueError, match=words):
        named_query(TABLE, UNSEEN, concepts)


def test_an_unseen_word_that_the_table_has_is_refused():
    with pytest.raises(ValueError, match="'cat' is among the unseen words, but the word table"):
        named_query(TABLE, WordTable(("cat",), UNSEEN.vectors, np.ones(1)), ["dog"])


def test_what_is_found_is_taken_apart_at_the_size_of_the_masks(network):
    names, query = named_query(TABLE, UNSEEN, ["dog", "owl"])
    result = network.predict(read_image({"image_id": 0}), query, output_size=(20, 30))
    found = found_concepts(result, names, (20, 30))
    assert list(found) == names
    for row, each in enumerate(found.values()):
        assert np.array_equal(each.mask, result.masks[row].numpy())
        assert np.array_equal(each.mask_prob, result.mask_prob[row].numpy())
        expected = resize_maps(result.attention[None], (20, 30))[0, row].numpy()
        assert np.array_equal(each.attention, expected)
        assert each.initial.shape == (20, 30)
        assert each.existence == result.existence[row].item()
        assert each.exists == result.exists[row].item()


def test_rows_of_boxes_count_the_pairs_of_all_images():
    samples = [
        {"concepts": [4, 7], "boxes": torch.ones(3, 4), "box_rows": torch.tensor([0, 1, 1])},
        {"concepts": [], "boxes": torch.ones(0, 4), "box_rows": torch.zeros(0).long()},
        {"concepts": [2], "boxes": 2 * torch.ones(1, 4), "box_rows": torch.tensor([0])},
    ]
    targets = batch_targets(samples)
    assert targets["concepts"] == [[4, 7], [], [2]]
    assert targets["box_rows"].tolist() == [0, 1, 1, 2]
    assert targets["boxes"].shape == (4, 4)
    masks = [
        {"concepts": [1], "masks": torch.ones(1, 2, 2)},
        {"concepts": [], "masks": torch.ones(0, 2, 2)},
    ]
    assert batch_targets(masks)["masks"].shape == (1, 2, 2)


def test_a_truth_is_the_union_of_all_instances():
    first, second = square(0, 4), square(2, 9)
    record = {
        "height": 32,
        "width": 32,
        "annotations": [
            *(annotation(2, first), annotation(1, first), annotation(2, second)),
            *(annotation(3, first), annotation(3), annotation(5, np.zeros((32, 32), bool))),
        ],
    }
    truths = dict(concept_truths(record))
    assert list(truths) == [1, 2]  # one instance of 3 has no mask, and 5 is not visible
    assert np.array_equal(truths[1], first)
    assert np.array_equal(truths[2], first | second)


def test_classes_are_matched_by_name(records, caplog):
    found = concept_test(records, (*CLASSES, "yak"), SPLIT, TABLE, UNSEEN, source="x")
    assert found.indices.tolist() == [3, 1, -1, 0, -2]
    assert found.levels == ("image", "box", "unseen", "mask", "unseen")
    assert np.array_equal(found.vectors[2], UNSEEN.vectors[0])
    assert "x: 1 of 5 classes have no vector and are not measured, such as 'yak'" in caplog.text
    assert list(found.truths(records[2])) == [0, 1, 2]
    assert found.query([1, 2]).indices.tolist() == [1, -1]
    without = concept_test(records, CLASSES, SPLIT, TABLE, source="x")
    assert list(without.truths(records[2])) == [0, 1]
    with pytest.raises(ValueError, match="None of the 1 classes of 'x' is in the word table"):
        concept_test(records, ("yak",), SPLIT, TABLE, source="x")


def test_fitted_values_are_the_best_of_their_grids(network, records):
    """Against loops that blend, normalise and compare one image and one value at a time."""
    test = concept_test(records, CLASSES, SPLIT, TABLE, UNSEEN, source="x")
    expected = {}
    for name, index in (("theta_image", 3), ("theta_unseen", -1)):
        query = concept_query([index], TABLE.vectors[[3]])
        means = {}
        for theta in np.linspace(0, 1, 21):
            scores = []
            for record in records:
                if 0 not in record["image_labels"]:
                    continue
                maps = network.embedding_maps(read_image(record)[None])
                kinds = [network.attention(maps, query, kind=k) for k in ("own", "nearest")]
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
    fitted = fit_concepts(network, test, read_image)
    assert {name: fitted[name] for name in expected} == expected
    assert network.theta_image.item() == pytest.approx(expected["theta_image"])
    assert network.theta_unseen.item() == pytest.approx(expected["theta_unseen"])
    maps = [network.embedding_maps(read_image(record)[None]) for record in records]
    scores = torch.cat([network.vocabulary_existence(each) for each in maps]).detach().numpy()
    for concept, label in ((0, 3), (1, 1), (3, 0)):
        present = np.array([label in record["image_labels"] for record in records])
        threshold = fit_existence_threshold(scores[:, concept], present)
        assert network.existence_thresholds[concept].item() == pytest.approx(threshold)
    assert fitted["own_thresholds"] == 3  # no image shows a fire truck


def test_what_cannot_be_fitted_is_said(network, records, caplog):
    test = concept_test(records, CLASSES, SPLIT, TABLE, source="x")
    with pytest.raises(ValueError, match="There is no image to fit theta"):
        fit_concepts(
            network,
            ConceptTest([], test.names, test.indices, test.vectors, test.levels),
            read_image,
        )
    for record in records:
        record["annotations"] = [a for a in record["annotations"] if a["class_index"] != 0]
    fitted = fit_concepts(network, test, read_image)
    assert fitted["theta_image"] is fitted["theta_unseen"] is None
    assert network.theta_image == 1
    assert "None of the 6 images has a mask of a concept with tags only" in caplog.text
    network.stage = 1
    with pytest.raises(ValueError, match=r"Stage 1 .*nothing to fit"):
        fit_concepts(network, test, read_image)
