import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from maskx.core.backbones import SmallResNet
from maskx.core.word_table import WordTable, save_word_table
from maskx.systems.concept_mask.concept_sets import ConceptSplit
from maskx.systems.concept_mask.embedding import ConceptEmbedding
from maskx.systems.concept_mask.network import ConceptMask, concept_query
from maskx.systems.concept_mask.scores import fit_existence_threshold, soft_iou
from maskx.systems.concept_mask.segmenter import normalise_maps, resize_maps
from maskx.systems.concept_mask.steps import (
    ConceptTest,
    batch_targets,
    concept_test,
    concept_truths,
    fit_concepts,
    found_concepts,
    named_query,
    read_unseen_words,
)

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


def test_unseen_words_come_from_an_array_with_its_words_or_from_a_table(tmp_path):
    vectors = RNG.standard_normal((2, 6)).astype(np.float32)
    np.save(tmp_path / "new.npy", vectors)
    with pytest.raises(FileNotFoundError, match=r"need their names .*new\.txt'.*new\.json'"):
        read_unseen_words(tmp_path / "new.npy", TABLE)
    (tmp_path / "new.json").write_text('["owl", "sea_horse"]')
    from_json = read_unseen_words(tmp_path / "new.npy", TABLE)
    (tmp_path / "new.txt").write_text("sea horse\nowl\n")  # the one that the vectors are read by
    from_text = read_unseen_words(tmp_path / "new.npy", TABLE)
    assert from_json.names == ("owl", "sea horse")
    assert from_text.names == ("sea horse", "owl")
    assert np.array_equal(from_json.vectors, vectors)
    assert np.array_equal(from_text.vectors, vectors)
    save_word_table(tmp_path / "owl.safetensors", UNSEEN)
    assert read_unseen_words(tmp_path / "owl.safetensors", TABLE).hash == UNSEEN.hash
    np.save(tmp_path / "new.npy", vectors[:, :5])
    with pytest.raises(ValueError, match=r"new\.npy' have vectors of length 5, .* 6\. Fold"):
        read_unseen_words(tmp_path / "new.npy", TABLE)
    with pytest.raises(FileNotFoundError, match=r"no word table '.*gone\.npy'"):
        read_unseen_words(tmp_path / "gone.npy", TABLE)


def test_what_is_found_is_taken_apart_at_the_size_of_the_masks(network):
    names, query = named_query(TABLE, UNSEEN, ["dog", "owl"])
    result = network.predict(read_image({"image_id": 0}), query, output_size=(20, 30))
    found = found_concepts(result, names)
    assert list(found) == names
    for row, each in enumerate(found.values()):
        assert np.array_equal(each.mask, result.masks[row].numpy())
        assert np.array_equal(each.mask_prob, result.mask_prob[row].numpy())
        assert np.array_equal(each.attention, result.attention[row].numpy())
        assert np.array_equal(each.initial, result.initial[row].numpy())
        assert each.initial.shape == each.attention.shape == (20, 30)
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
    labels = {0: 3, 1: 1, 3: 0}  # of the images, by concept
    present = np.array([[labels.get(c) in r["image_labels"] for c in range(4)] for r in records])
    of_all = fit_existence_threshold(scores.ravel(), present.ravel())
    assert network.existence_thresholds[2].item() == pytest.approx(of_all)
    query = concept_query([-1] * 4, TABLE.vectors)
    cosines = torch.cat([network.existence(each, query) for each in maps]).detach().numpy()
    unseen = fit_existence_threshold(cosines.ravel(), present.ravel())
    assert unseen != pytest.approx(of_all)
    assert network.existence_threshold_unseen.item() == pytest.approx(unseen)
    assert fitted["existence_threshold_unseen"] == pytest.approx(unseen)


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
