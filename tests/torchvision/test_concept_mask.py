import dataclasses
import itertools
import json
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from maskx.core.word_table import WordTable, load_word_table
from maskx.data.masks import decode_segmentation
from maskx.engine import training_chain
from maskx.systems.concept_mask import chain as concept_mask_chain
from maskx.systems.concept_mask import model as concept_mask_models
from maskx.systems.concept_mask import pipeline as concept_mask
from maskx.systems.concept_mask.chain import (
    ConceptMaskChain,
    ConceptMaskMethod,
    ConceptMaskSettings,
)
from maskx.systems.concept_mask.concept_sets import concept_sets
from maskx.systems.concept_mask.evaluation import evaluate_concepts, evaluate_existence, fit_run
from maskx.systems.concept_mask.image_samples import ConceptMapper, read_sample
from maskx.systems.concept_mask.model import ConceptNetwork, build_concept_mask, open_concept_mask
from maskx.systems.concept_mask.pipeline import (
    coco_concept_data,
    learn_concept_mask,
    open_chain,
    scene_concept_data,
)
from maskx.systems.concept_mask.predictor import ConceptPredictor, read_rgb, segment_files
from maskx.systems.concept_mask.steps import batch_targets, concept_truths

TOOLS = Path(__file__).parents[2] / "tools"
TINY = ConceptMaskSettings(
    network=ConceptNetwork(
        image_size=64,
        embedding_size=32,
        attention_sizes=(32, 64),
        hidden_channels=(16, 16),
        refinement_channels=16,
        encoder_widths=(4, 6, 8, 8),
        decoder_channels=(8, 8, 8, 8, 4),
    ),
    embedding_iterations=3,
    refinement_iterations=3,
    segmentation_iterations=3,
    batch_size=4,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scene_concept_data(
        tmp_path_factory.mktemp("scenes"), num_train=20, num_val=5, num_tags=400, size=64, seed=0
    )


@pytest.fixture(scope="module")
def used():
    """Stage and images of each step after the trainings of `trained`."""
    return []


@pytest.fixture(scope="module")
def trained(data, used, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    steps = ("fit_concepts", "evaluate_concepts", "evaluate_existence")

    def recorded(original):
        def step(model, test, *args, **kwargs):
            network = getattr(model, "network", model)
            used.append((original.__name__, network.stage, test.records))
            return original(model, test, *args, **kwargs)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in steps:
            patch.setattr(concept_mask, name, recorded(getattr(concept_mask, name)))
        metrics = learn_concept_mask(
            data, TINY, output=output, device=torch.device("cpu"), report=lambda line: None
        )
    return output, metrics


@pytest.fixture(scope="module")
def predictor(trained):
    return ConceptPredictor.open(trained[0])


@pytest.fixture(scope="module")
def image(data):
    return read_rgb(data.val.records[0]["file_name"])


def chain_of(data, output, settings=TINY, **options):
    return open_chain(data, settings, output=output, device=torch.device("cpu"), **options)


def weights_equal(first, second):
    return all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


# --- samples


@pytest.mark.parametrize("seed", range(4))
def test_boxes_and_masks_are_mirrored_with_their_image(data, seed):
    sets = concept_sets(data.split, tags=data.train, boxes=data.train, masks=data.train)
    record = sets.masked[0]
    boxed = next(r for r in sets.boxed if r["image_id"] == record["image_id"])
    plain = read_sample(record)["image"]
    shared = {"size": 64, "masked": data.split.masked_indices, "max_concepts": 99}
    boxes, masks = (
        ConceptMapper(stage, **shared)(each, np.random.RandomState(seed))
        for stage, each in ((2, boxed), (3, record))
    )
    is_flipped = not torch.equal(boxes["image"], plain)
    assert torch.equal(boxes["image"], plain.flip(-1) if is_flipped else plain)
    assert torch.equal(boxes["image"], masks["image"])
    for concept, mask in zip(masks["concepts"], masks["masks"], strict=True):
        truth = np.zeros((64, 64), bool)
        for annotation in record["annotations"]:
            if annotation["class_index"] == concept:
                truth |= decode_segmentation(annotation["segmentation"], 64, 64)
        assert np.array_equal(mask.numpy(), truth[:, ::-1] if is_flipped else truth)
        rows = boxes["box_rows"] == boxes["concepts"].index(concept)
        columns = np.flatnonzero(mask.any(0))
        assert boxes["boxes"][rows][:, 0].min() == columns.min()
        assert boxes["boxes"][rows][:, 2].max() == columns.max() + 1


def test_each_stage_reads_only_what_it_may(data):
    sets = concept_sets(data.split, tags=data.train, boxes=data.train, masks=data.train)
    sample = ConceptMapper(1, size=32)(sets.tagged[0], np.random.RandomState(0))
    assert set(sample) == {"image", "height", "width", "image_id", "image_labels"}
    assert sample["image"].shape == (3, 32, 32)
    for records, allowed, keys in (
        (sets.boxed, data.split.boxed_indices, {"bbox"}),
        (sets.masked, data.split.masked_indices, {"bbox", "segmentation"}),
    ):
        annotations = [annotation for record in records for annotation in record["annotations"]]
        assert {a["class_index"] for a in annotations} <= set(allowed)
        assert all(keys == {"bbox", "segmentation"} & set(a) for a in annotations)
    few = ConceptMapper(3, size=32, masked=data.split.masked_indices, max_concepts=1)
    assert all(len(few(r, np.random.RandomState(0))["concepts"]) <= 1 for r in sets.masked)


def test_pairs_of_a_batch_stand_behind_each_other():
    samples = [
        {"concepts": [3, 7], "boxes": torch.ones(3, 4), "box_rows": torch.tensor([1, 0, 1])},
        {"concepts": [], "boxes": torch.ones(0, 4), "box_rows": torch.tensor([], dtype=torch.long)},
        {"concepts": [5], "boxes": torch.zeros(1, 4), "box_rows": torch.tensor([0])},
    ]
    targets = batch_targets(samples)
    assert targets["concepts"] == [[3, 7], [], [5]]
    assert targets["box_rows"].tolist() == [1, 0, 1, 2]
    assert targets["boxes"][:, 0].tolist() == [1, 1, 1, 0]


def test_a_concept_with_an_instance_without_mask_has_no_truth():
    square = [[0, 0, 2, 0, 2, 2, 0, 2]]
    annotations = [
        {"class_index": 1, "segmentation": square},
        {"class_index": 1, "segmentation": [[2, 2, 4, 2, 4, 4, 2, 4]]},
        {"class_index": 0, "segmentation": square},
        {"class_index": 0},
    ]
    ((index, truth),) = concept_truths({"height": 4, "width": 4, "annotations": annotations})
    assert index == 1
    assert truth.sum() == 8
    assert truth[0, 0]
    assert truth[3, 3]


# --- trainings


def test_every_stage_is_made_once_and_methods_share_what_does_not_differ(
    data, tmp_path, monkeypatch
):
    made, how, starts = [], {}, {}
    original = training_chain.train
    tiny = dataclasses.replace(TINY, seed=7, discrimination_weight=0.5)

    def train(model, batches, settings, **kwargs):
        name = kwargs["output_dir"].name
        made.append(name)
        records, mapper = batches.args
        assert batches.keywords["seed"] == settings.seed == torch.initial_seed() == 7
        how[name] = (records, mapper.stage, mapper.size, settings, kwargs["identity"])
        starts[name] = {key: value.clone() for key, value in model.network.state_dict().items()}
        return original(model, batches, settings, **kwargs)

    monkeypatch.setattr(training_chain, "train", train)
    chain = chain_of(data, tmp_path, tiny)
    chain.model(3)
    chain.model(3, ConceptMaskMethod(two_sizes=False))
    chain.model(2, ConceptMaskMethod(negatives=False))
    chain.model(1, ConceptMaskMethod(final_relu=True))
    assert made == [
        "embedding",
        "refinement",
        "segmentation",
        "segmentation_one_size",
        "refinement_no_negatives",
        "embedding_final_relu",
    ]
    assert chain.model(3, ConceptMaskMethod(two_sizes=False)).network.attention_sizes == (32, 32)
    assert len(made) == 6

    # Each stage has the data, sizes and rates of its own, and starts from the one before.
    sets = chain.sets
    expected = [(sets.tagged, 32), (sets.boxed, 32), (sets.masked, 64)]
    for stage, (name, (records, size)) in enumerate(zip(made, expected, strict=False), 1):
        assert how[name][1:3] == (stage, size)
        assert how[name][0] is records
    assert [how[name][3].learning_rate for name in made[:3]] == [4e-3, 2e-3, 1e-3]
    slow = [how[name][3].lr_multipliers for name in made[:3]]
    assert slow == [{}, {"network.embedding.": pytest.approx(0.15)}, {}]
    assert how["segmentation"][4]["max_concepts"] == TINY.max_concepts
    assert len({how[name][4].get("start") for name in made[:3]}) == 3
    for before, after in itertools.pairwise(made[:3]):
        trained = chain.model(made.index(before) + 1).network.embedding.state_dict()
        assert all(
            torch.equal(value, starts[after][f"embedding.{key}"]) for key, value in trained.items()
        )

    # And each method what makes it another.
    refinements = [
        chain.model(2).network,
        chain.model(2, ConceptMaskMethod(negatives=False)).network,
    ]
    assert [network.gamma_indptr is None for network in refinements] == [False, True]
    assert {network.matching_weight for network in refinements} == {TINY.matching_weight}
    assert refinements[0].discrimination_weight == 0.5
    assert chain.model(3).network.mask_size == TINY.network.image_size
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    lowest = [
        chain.model(1, ConceptMaskMethod(final_relu=final_relu))
        .network.embedding.embedding_map(images)
        .min()
        for final_relu in (False, True)
    ]
    assert lowest[0] < 0 <= lowest[1]


def test_a_run_that_is_interrupted_in_any_stage_ends_with_the_same_weights(
    trained, data, tmp_path, monkeypatch
):
    settings = TINY
    original = concept_mask_chain.training_batches

    class Interrupted(Exception):
        pass

    for stage in (1, 2, 3):

        def broken_off(*args, last=stage, mapper=None, **kwargs):
            mapper = args[1]
            for step, batch in enumerate(original(*args, **kwargs), kwargs["start"]):
                if mapper.stage == last and step == 1:
                    raise Interrupted
                yield batch

        monkeypatch.setattr(concept_mask_chain, "training_batches", broken_off)
        with pytest.raises(Interrupted):
            chain_of(data, tmp_path, settings, resume=True).model(3)
    monkeypatch.setattr(concept_mask_chain, "training_batches", original)
    model = chain_of(data, tmp_path, settings, resume=True).model(3)
    expected, _, _ = open_concept_mask(trained[0])
    fitted = {"theta_image", "theta_unseen", "existence_thresholds", "existence_threshold_unseen"}
    found = model.network.state_dict()
    for name, value in expected.network.state_dict().items():
        assert name in fitted or torch.equal(value, found[name]), name


def test_a_checkpoint_of_another_word_table_is_refused(data, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    other = dataclasses.replace(data.table, vectors=data.table.vectors * 2)
    with pytest.raises(ValueError, match="was made with word table"):
        chain_of(dataclasses.replace(data, table=other), tmp_path / "run", resume=True).model(1)
    assert load_word_table(tmp_path / "run" / "words.safetensors").hash == data.table.hash
    with pytest.raises(ValueError, match=r"made with the word table \w{12}, but the one given"):
        open_concept_mask(trained[0], table=other)


def test_a_table_of_another_vocabulary_is_refused(data, tmp_path):
    sets = concept_sets(data.split, tags=data.train, boxes=data.train, masks=data.train)
    table = WordTable(data.table.names[:-1], data.table.vectors[:-1], data.table.idf[:-1])
    with pytest.raises(ValueError, match="has 65 names, the vocabulary 66"):
        ConceptMaskChain(sets, table, TINY, output=tmp_path)
    empty = dataclasses.replace(sets, masked=[])
    with pytest.raises(ValueError, match="There is no masked image to train on"):
        ConceptMaskChain(empty, data.table, TINY, output=tmp_path)


def test_files_of_a_run_that_are_missing_or_damaged_are_named(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file '.*nothing.*model.json'"):
        open_concept_mask(tmp_path / "nothing")
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    path = run / "segmentation" / "model.json"
    content = json.loads(path.read_text())
    for bad in ("{", "\xff", "[]", json.dumps(content | {"network": {"depth": 3}})):
        path.write_text(bad, encoding="latin-1")
        with pytest.raises(ValueError, match=r"'.*model.json' is damaged"):
            open_concept_mask(run)


def test_images_and_lists_of_tags_are_of_different_scenes_also_of_other_seeds(
    data, tmp_path, monkeypatch
):
    seeds, generate = [], concept_mask.generate_concept_scenes

    def generate_concept_scenes(folder, **kwargs):
        seeds.append((folder.name, kwargs["seed"]))
        return generate(folder, **kwargs)

    def write_scene_tags(path, *, seed, unseen, **kwargs):
        seeds.append((path.name, seed))
        written = data.train.json_file.parents[1] / path.name
        assert unseen == any(f'"{name}"' in written.read_text() for name in data.split.unseen)
        return written

    monkeypatch.setattr(concept_mask, "generate_concept_scenes", generate_concept_scenes)
    monkeypatch.setattr(concept_mask, "write_scene_tags", write_scene_tags)
    for seed in (0, 1):
        scene_concept_data(
            tmp_path / str(seed), num_train=2, num_val=1, num_tags=400, size=64, seed=seed
        )
    # Both lists of tags of a seed are of the same scenes.
    assert len({number for _, number in seeds}) == 6
    assert len(set(seeds)) == len(seeds) == 8


def test_images_to_fit_on_are_of_no_training_and_no_evaluation(data, trained, used):
    train, fitting = ({r["image_id"] for r in d.records} for d in (data.train, data.fitting))
    assert (len(train), len(fitting)) == (18, 2)
    assert not train & fitting
    assert used == [
        ("fit_concepts", 3, data.fitting.records),
        ("evaluate_concepts", 3, data.val.records),
        ("evaluate_concepts", 1, data.val.records),
        ("evaluate_existence", 3, data.val.records),
    ]


def test_categories_of_a_file_become_concepts_and_loners_are_left_out(data):
    names = tuple(data.train.class_names)
    labels = [sorted(r["image_labels"]) for r in data.train.records]
    lonely = labels[0][0]
    records = [
        {**r, "image_labels": [i for i in r["image_labels"] if i != lonely]}
        for r in data.train.records
    ]
    records.append({**records[0], "image_labels": [lonely]})
    split = type("Split", (), {"with_masks": names[:3]})
    found = coco_concept_data(dataclasses.replace(data.train, records=records), data.val, split)
    assert names[lonely] in found.split.unseen
    assert names[lonely] not in found.split.vocabulary
    assert found.split.boxed == found.split.vocabulary
    assert set(found.split.masked) <= set(names[:3])
    alone = [{**r, "image_labels": r["image_labels"][:1]} for r in records]
    with pytest.raises(ValueError, match="has no two categories in one image"):
        coco_concept_data(dataclasses.replace(data.train, records=alone), data.val, split)


# --- evaluation


def test_perfect_maps_have_perfect_measures(data, trained, monkeypatch):
    model = open_concept_mask(trained[0])[0]
    test = data.test(data.val)
    truths = [dict(concept_truths(record)) for record in data.val.records]

    def evaluate(second):
        images = iter(truths)

        def attention(maps, query, kind):
            assert kind == "own"
            found = torch.from_numpy(np.stack(list(next(images).values()))).float()
            return [found[None], second(found[None])]

        monkeypatch.setattr(model.network, "attention", attention)
        return evaluate_concepts(model, test, kind="own", masks="attention")

    # The maps of the two sizes are averaged; a constant one becomes 0.
    assert evaluate(torch.ones_like)["levels"]["image"]["soft_iou"] == 0.5
    found = evaluate(lambda each: 3 * each + 1)
    for level in ("mask", "box", "image"):
        measures = found["levels"][level]
        for name in ("pointing", "soft_iou", "precision", "recall", "iou"):
            assert measures[name] == 1
    assert set(found["concepts"]) == {
        data.val.class_names[c] for r in data.val.records for c in r["image_labels"]
    }
    with pytest.raises(ValueError, match="masks must be one of 'segmentation', 'attention'"):
        evaluate_concepts(model, test, masks="crf")


def test_theta_and_thresholds_are_fitted_and_kept_in_the_checkpoint(data, trained, tmp_path):
    output, metrics = trained
    model, _, _ = open_concept_mask(output)
    assert model.network.theta_image.item() == pytest.approx(metrics["fitted"]["theta_image"])
    assert model.network.theta_unseen.item() == pytest.approx(metrics["fitted"]["theta_unseen"])
    assert not torch.isnan(model.network.existence_thresholds).any()
    shutil.copytree(output, tmp_path / "run")
    json_file, folder = data.val.json_file, data.val.json_file.parent
    again = fit_run(tmp_path / "run", json_file, folder)
    fitted, _, _ = open_concept_mask(tmp_path / "run")
    assert fitted.network.theta_image.item() == pytest.approx(again["theta_image"])
    assert not weights_equal(model, fitted)
    # With everything that exists above its threshold, nothing is missed.
    fitted.network.existence_thresholds.fill_(-1)
    test = data.test(data.val)
    shown = [c for r in test.records for c in r["image_labels"] if test.indices[c] >= 0]
    share = len(shown) / (len(test.records) * len(data.table.names))
    assert evaluate_existence(fitted, test) == {"precision": pytest.approx(share), "recall": 1}


def test_fitting_goes_on_with_the_checkpoint_of_a_resumed_run(data, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    model = chain_of(data, tmp_path / "run", resume=True).model(3)
    assert weights_equal(model, open_concept_mask(trained[0])[0])


@pytest.mark.parametrize(("pretrained", "initial"), [(True, True), (True, False), (False, True)])
def test_imagenet_weights_are_loaded_where_training_starts_alone(
    data, monkeypatch, pretrained, initial
):
    asked, original = {}, concept_mask_models.build_backbone

    def build_backbone(name, *, frozen_norm, pretrained):
        asked.update(frozen_norm=frozen_norm, pretrained=pretrained)
        return original(name, frozen_norm=False, pretrained=False)

    monkeypatch.setattr(concept_mask_models, "build_backbone", build_backbone)
    network = dataclasses.asdict(dataclasses.replace(TINY.network, pretrained=pretrained))
    content = {"stage": 1, "network": network, "boxed": [], "masked": []}
    build_concept_mask(content, data.table, initial=initial)
    assert asked == {"frozen_norm": pretrained, "pretrained": pretrained and initial}


def test_images_of_other_concepts_are_refused(data):
    names = tuple(f"other {i}" for i in range(len(data.val.class_names)))
    other = dataclasses.replace(data.val, class_names=names)
    with pytest.raises(ValueError, match=r"None of the 71 classes of '.*concepts.json' is in"):
        data.test(other)
    some = dataclasses.replace(data.val, class_names=(*names[:-1], data.val.class_names[-1]))
    assert (data.test(some).indices >= 0).sum() == 1


# --- use


def test_concepts_are_asked_for_by_name_index_or_vector(predictor, image):
    names = predictor.table.names
    found = predictor(image, [names[3], 5, predictor.table.vectors[7], "crescent"])
    assert list(found) == [names[3], names[5], "vector 2", "crescent"]
    for each in found.values():
        for values in (each.initial, each.attention, each.mask_prob):
            assert values.shape == image.shape[:2]
            assert ((values >= 0) & (values <= 1)).all()
        assert np.array_equal(each.mask, each.mask_prob > 0.5)
    # In one call or each alone: the same.
    alone = predictor(image, [5])[names[5]]
    assert np.allclose(alone.mask_prob, found[names[5]].mask_prob, atol=1e-5)
    assert predictor(image, ["green_lamp_stand"]).keys() == {"green lamp stand"}


def test_a_model_in_evaluation_answers_samples(predictor, data, image):
    model, names = predictor.model, predictor.table.names
    query = data.test(data.val).query([data.val.class_names.index("grass")])
    (found,) = model([read_sample(data.val.records[0]) | {"query": query}])
    expected = predictor(image, ["grass"])["grass"]
    assert names[found.indices.item()] == "grass"
    assert np.array_equal(found.mask_prob[0].numpy(), expected.mask_prob)


def test_the_picture_has_concepts_of_every_level_that_images_show(
    data, trained, predictor, tmp_path, monkeypatch
):
    model, table, _ = open_concept_mask(trained[0], "embedding")
    stage_1 = ConceptPredictor(model, table)
    drawn = []
    monkeypatch.setattr(concept_mask, "draw_concepts", lambda path, rows: drawn.append(rows))
    test = data.test(data.val)
    # Concepts that no image shows are passed over, wherever they stand.
    shown = {c for record in test.records for c in record["image_labels"]}
    concept_mask.draw_test_concepts(tmp_path / "a.png", predictor, stage_1, test)
    (rows,) = drawn
    wanted = {"masks": 1, "boxes": 2, "tags only": 3, "unseen word": 2}
    levels = [row.title.rstrip(")").split(" (")[1] for row in rows]
    assert 0 < len(rows) <= len(test.records)
    assert levels == [level for level, count in wanted.items() for _ in range(count)][: len(rows)]
    assert {test.names.index(row.title.split(" (")[0]) for row in rows} <= shown
    for row in rows:
        assert list(row.maps) == ["stage 1", "refined"]
        name = row.title.split(" (")[0]
        asked = [test.vectors[test.names.index(name)]] if "unseen" in row.title else [name]
        (found,) = predictor(row.image, asked).values()
        assert np.array_equal(row.maps["refined"], found.attention)
        (found,) = stage_1(row.image, asked).values()
        assert np.array_equal(row.maps["stage 1"], found.attention)
        truths = [
            test.truths(record).get(test.names.index(name))
            for record in test.records
            if np.array_equal(read_rgb(record["file_name"]), row.image)
        ]
        assert np.array_equal(truths[0], row.masks["truth"])
    assert len({row.image.tobytes() for row in rows}) == len(rows)
    nothing = dataclasses.replace(test, records=[])
    concept_mask.draw_test_concepts(tmp_path / "a.png", predictor, stage_1, nothing)
    assert len(drawn) == 1


def test_without_names_all_that_exist_are_found(predictor, image, monkeypatch):
    thresholds = predictor.model.network.existence_thresholds
    kept = thresholds.clone()
    thresholds.fill_(2)
    assert predictor(image) == {}
    thresholds[[2, 9]] = -1
    found = predictor(image)
    assert list(found) == [predictor.table.names[index] for index in (2, 9)]
    assert all(each.exists for each in found.values())
    thresholds.copy_(kept)


def test_images_of_any_size_are_segmented_at_their_size(predictor):
    image = np.random.RandomState(0).randint(0, 256, (50, 90, 3)).astype(np.uint8)
    assert predictor(image, ["grass"])["grass"].mask.shape == (50, 90)


@pytest.mark.parametrize(
    ("concepts", "words"),
    [
        ([], "The list of concepts is empty"),
        (["gras"], "'gras' is not among the 66 concepts of the word table. Closest: 'grass'"),
        (["grass", "grass"], "'grass' is asked for twice"),
        ([66], "66 is no concept index"),
        ([np.ones(3)], r"has shape \(3,\)"),
        ("grass", r"Allowed: a list, such as \['grass'\]"),
    ],
)
def test_queries_that_cannot_be_answered_are_named(predictor, image, concepts, words):
    with pytest.raises(ValueError, match=words):
        predictor(image, concepts)


def test_what_is_no_image_is_named(predictor, tmp_path):
    with pytest.raises(ValueError, match=r"shape \(4, 4\) and dtype float64. Allowed: \(H, W, 3\)"):
        predictor(np.zeros((4, 4)), ["grass"])
    with pytest.raises(ValueError, match="has 7 x 40 pixels, less than the 8 of one position"):
        predictor(np.zeros((7, 40, 3), np.uint8), ["grass"])
    assert predictor(np.zeros((8, 40, 3), np.uint8), ["grass"])["grass"].mask.shape == (8, 40)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_rgb(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match="cannot be read"):
        read_rgb(tmp_path / "text.png")


def test_unseen_words_must_not_be_in_the_table(predictor, image):
    table = predictor.table
    both = ConceptPredictor(predictor.model, table, unseen=table)
    with pytest.raises(ValueError, match="'blue' is among the unseen words"):
        both(image, ["grass"])


def test_pictures_and_masks_of_files_are_written(predictor, data, tmp_path):
    files = [record["file_name"] for record in data.val.records[:2]]
    # Names that differ in what is no letter do not replace each other, or the picture.
    names = ["grass", "green lamp stand", "t-shirt", "t.shirt", "concepts"]
    unseen = WordTable(tuple(names[2:]), predictor.table.vectors[:3], np.ones(3))
    with_unseen = ConceptPredictor(predictor.model, predictor.table, unseen=unseen)

    def halves(image, concepts):  # three steps of training leave the masks empty
        found = with_unseen(image, concepts).items()
        return {name: dataclasses.replace(each, mask=each.attention > 0.5) for name, each in found}

    found = segment_files(halves, files, tmp_path / "out", names)
    for path in files:
        folder = tmp_path / "out" / Path(path).stem
        assert cv2.imread(str(folder / "concepts.png")).shape[1] == 4 * 256
        file_names = ("grass", "green_lamp_stand", "t_shirt", "t_shirt_", "concepts_")
        for name, file_name in zip(names, file_names, strict=True):
            mask = cv2.imread(str(folder / f"{file_name}.png"), cv2.IMREAD_GRAYSCALE)
            assert set(np.unique(mask)) == {0, 255}
            assert np.array_equal(mask > 0, found[folder.name][name].mask)
    with pytest.raises(ValueError, match="Two images are named '000000'"):
        segment_files(predictor, [files[0], files[0]], tmp_path / "out")


def test_the_tools_fit_and_segment(trained, data, tmp_path, monkeypatch, capsys):
    def run_tool(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    json_file = data.val.json_file
    assert "theta image: " in run_tool("fit_concepts", run, json_file, json_file.parent)
    image = data.val.records[0]["file_name"]
    asked = (image, "--run", run, "--output", tmp_path / "out", "--concepts")
    assert "| 000000 | crescent |" in run_tool("segment_concepts", *asked, "grass", "crescent")
    assert (tmp_path / "out" / "000000" / "crescent.png").is_file()
    with pytest.raises(SystemExit, match=r"^error: 'gras' is not among the 66 concepts"):
        run_tool("segment_concepts", *asked, "gras")
    with pytest.raises(SystemExit, match=r"^error: There is no file"):
        run_tool("fit_concepts", tmp_path / "nothing", json_file, json_file.parent)
