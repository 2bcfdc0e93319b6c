import copy
import dataclasses
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from photos import make_weights
from tiny_concept_mask import TINY

import maskx
from maskx.core.word_table import WordTable, load_word_table
from maskx.data.images import read_rgb
from maskx.engine import training_chain
from maskx.engine.training import read_checkpoint
from maskx.systems.concept_mask import pipeline
from maskx.systems.concept_mask.concept_sets import concept_sets
from maskx.systems.concept_mask.pipeline import (
    ConceptMaskChain,
    ConceptMaskMethod,
    coco_concept_data,
    draw_test_concepts,
    fit_run,
    learn_concept_mask,
    scene_concept_data,
)
from maskx.systems.concept_mask.predictor import ConceptPredictor, segment_files
from maskx.systems.concept_mask.samples import ConceptMapper
from maskx.systems.concept_mask.system import (
    ConceptNetwork,
    build_model,
    open_model,
    open_predictor,
)

TOOLS = Path(__file__).parents[3] / "tools"
FOLDERS = ("embedding", "refinement", "segmentation")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scene_concept_data(
        tmp_path_factory.mktemp("scenes"), num_train=20, num_val=5, num_tags=400, size=64, seed=0
    )


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Folder of a run, its metrics and what was reported."""
    output, lines = tmp_path_factory.mktemp("run"), []
    metrics = learn_concept_mask(
        data, TINY, output=output, device=torch.device("cpu"), report=lines.append
    )
    return output, metrics, lines


@pytest.fixture(scope="module")
def predictor(trained):
    return open_predictor(trained[0])


@pytest.fixture(scope="module")
def image(data):
    return read_rgb(data.val.records[0]["file_name"])


def chain_of(data, output, settings=TINY, **options):
    return ConceptMaskChain(data, settings, output=output, **options)


def weights_equal(first, second):
    return all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


# --- trainings


def test_each_stage_reads_only_what_it_may(data):
    sets = concept_sets(data.split, tags=data.train, boxes=data.train, masks=data.train)
    sample = ConceptMapper(1, size=32)(sets.tagged[0], np.random.RandomState(0))
    assert {"image", "image_labels"} < set(sample)
    assert not {"boxes", "masks"} & set(sample)
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


def test_every_stage_is_made_once_and_methods_share_what_does_not_differ(data, tmp_path):
    tiny = dataclasses.replace(TINY, seed=7)
    chain = chain_of(data, tmp_path, tiny)
    chain.model(3)
    chain.model(3, ConceptMaskMethod(two_sizes=False))
    chain.model(2, ConceptMaskMethod(discrimination_weight=0))
    chain.model(2, ConceptMaskMethod(discrimination_weight=0.5))
    chain.model(1, ConceptMaskMethod(final_relu=True))
    names = [*FOLDERS, "segmentation_one_size", "refinement_discrimination_0"]
    names += ["refinement_discrimination_0.5", "embedding_final_relu"]
    assert list(chain.seconds) == names
    assert chain.model(3, ConceptMaskMethod(two_sizes=False)).attention_sizes == (32, 32)
    assert list(chain.seconds) == names

    # Each stage has the data and rates of its own, and starts from the one before.
    files = [tmp_path / name / "checkpoint.pth" for name in FOLDERS]
    of_stages = [read_checkpoint(file, "cpu")["run"] for file in files]
    trainings = [run["settings"]["training"] for run in of_stages]
    assert [training["learning_rate"] for training in trainings] == [4e-3, 2e-3, 1e-3]
    slow = [training["lr_multipliers"] for training in trainings]
    assert slow == [{}, {"embedding.": pytest.approx(0.15)}, {}]
    assert {training["seed"] for training in trainings} == {7}
    assert of_stages[2]["settings"]["max_concepts"] == TINY.max_concepts
    starts = [run["started_from"].get("start") for run in of_stages]
    assert starts[0] is None
    assert starts[1]["sha256"] != starts[2]["sha256"]
    first, second, third = (chain.model(stage) for stage in (1, 2, 3))
    assert weights_equal(second.original, first.embedding)
    assert weights_equal(third.embedding, second.embedding)
    assert weights_equal(third.refinement, second.refinement)

    # And each method what makes it another.
    without = chain.model(2, ConceptMaskMethod(discrimination_weight=0))
    assert [network.gamma_indptr is None for network in (second, without)] == [False, True]
    assert second.matching_weight == without.matching_weight == TINY.matching_weight
    assert second.discrimination_weight == 0.1
    other = chain.model(2, ConceptMaskMethod(discrimination_weight=0.5))
    assert other.discrimination_weight == 0.5
    assert third.size == TINY.network.image_size
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    lowest = [
        chain.model(1, ConceptMaskMethod(final_relu=final_relu)).embedding.embedding_map(images)
        for final_relu in (False, True)
    ]
    assert lowest[0].min() < 0 <= lowest[1].min()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_that_is_interrupted_in_any_stage_ends_with_the_same_weights(
    trained, data, tmp_path, monkeypatch, stage
):
    """As after a kill: the stages before are done, this one has made 2 of its 3 steps."""
    shutil.copytree(trained[0], tmp_path / "run")
    for folder in FOLDERS[stage - 1 :]:
        shutil.rmtree(tmp_path / "run" / folder)
    every = training_chain.train
    name = f"{('embedding', 'refinement', 'segmentation')[stage - 1]}_iterations"

    def train_two_steps(model, batches, settings, **kwargs):
        settings = dataclasses.replace(settings, checkpoint_every=2)
        if kwargs["output_dir"].name != FOLDERS[stage - 1]:
            return every(model, batches, settings, **kwargs)

        def broken_off(**steps):
            for number, batch in enumerate(batches(**steps)):
                if number == 2:
                    raise KeyboardInterrupt
                yield batch

        return every(model, broken_off, settings, **kwargs)

    monkeypatch.setattr(training_chain, "train", train_two_steps)
    with pytest.raises(KeyboardInterrupt):
        chain_of(data, tmp_path / "run", resume=True).model(stage)
    monkeypatch.setattr(training_chain, "train", every)
    model = chain_of(data, tmp_path / "run", resume=True).model(3)
    fitted = {"theta_image", "theta_unseen", "existence_thresholds", "existence_threshold_unseen"}
    found = model.state_dict()
    for key, value in open_model(trained[0]).state_dict().items():
        assert key in fitted or torch.equal(value, found[key]), (name, key)


def test_a_checkpoint_of_another_word_table_is_refused(data, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    other = dataclasses.replace(data.table, vectors=data.table.vectors * 2)
    with pytest.raises(ValueError, match=r"word table '\w+' is not what the run in .* started"):
        chain_of(dataclasses.replace(data, table=other), tmp_path / "run", resume=True).model(1)
    assert load_word_table(tmp_path / "run" / "words.safetensors").hash == data.table.hash


def test_a_table_of_another_vocabulary_is_refused(data, tmp_path):
    table = WordTable(data.table.names[:-1], data.table.vectors[:-1], data.table.idf[:-1])
    with pytest.raises(ValueError, match="than the word table: it has 66 concepts, not 65"):
        chain_of(dataclasses.replace(data, table=table), tmp_path).model(1)
    empty = dataclasses.replace(data, split=dataclasses.replace(data.split, masked=()))
    with pytest.raises(ValueError, match="no image has usable masks of the 0 concepts"):
        chain_of(empty, tmp_path)


def test_a_model_is_opened_from_its_checkpoint_alone(data, trained, tmp_path):
    shutil.copytree(trained[0] / "segmentation", tmp_path / "segmentation")
    model = open_model(tmp_path)
    assert model.table.hash == data.table.hash
    assert model.split == dataclasses.replace(data.split, unseen=())
    assert ConceptNetwork(**model.architecture) == TINY.network
    assert np.array_equal(model.table.idf, data.table.idf)
    assert not model.training


def test_files_of_a_run_that_are_missing_or_damaged_are_named(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file '.*nothing.*checkpoint.pth'"):
        open_model(tmp_path / "nothing")
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    path = run / "segmentation" / "checkpoint.pth"
    content = torch.load(path, weights_only=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"'.*checkpoint.pth'"):
        open_model(run)
    for name in ("_extra_state", "vectors"):
        state = {key: value for key, value in content["model"].items() if key != name}
        torch.save(content | {"model": state}, path)
        with pytest.raises(ValueError, match=r"'.*checkpoint.pth' cannot be opened"):
            open_model(run)
    state = content["model"] | {"idf": torch.ones(3)}
    torch.save(content | {"model": state}, path)
    with pytest.raises(ValueError, match=r"cannot be opened: .* 66 words, but an idf of shape"):
        open_model(run)


def test_images_and_lists_of_tags_are_of_different_scenes_also_of_other_seeds(tmp_path):
    images, tags = [], []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        made = scene_concept_data(folder, num_train=2, num_val=1, num_tags=400, size=64, seed=seed)
        records = (*made.train.records, *made.fitting.records, *made.val.records)
        images += [Path(record["file_name"]).read_bytes() for record in records]
        lists = [(folder / name).read_text() for name in ("tags.jsonl", "tags_unseen.jsonl")]
        # Both lists of a seed are of the same scenes, one without the unseen names.
        for name in made.split.unseen:
            assert f'"{name}"' not in lists[0]
            assert f'"{name}"' in lists[1]
        tags += lists
    assert len(set(images)) == len(images) == 6
    assert len(set(tags)) == 4


def test_images_to_fit_on_are_of_no_training_and_no_evaluation(data, trained):
    train, fitting = ({r["image_id"] for r in d.records} for d in (data.train, data.fitting))
    assert (len(train), len(fitting)) == (18, 2)
    assert not train & fitting
    names = {r["file_name"] for r in data.val.records}
    assert not names & {r["file_name"] for d in (data.train, data.fitting) for r in d.records}
    test = data.test(data.fitting)
    again = pipeline.fit_concepts(open_model(trained[0]), test)
    assert again == trained[1]["fitted"]


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


def test_theta_and_thresholds_are_fitted_and_kept_in_the_checkpoint(data, trained, tmp_path):
    output, metrics, lines = trained
    model = open_model(output)
    assert model.theta_image.item() == pytest.approx(metrics["fitted"]["theta_image"])
    assert model.theta_unseen.item() == pytest.approx(metrics["fitted"]["theta_unseen"])
    assert not torch.isnan(model.existence_thresholds).any()
    shutil.copytree(output, tmp_path / "run")
    json_file, folder = data.val.json_file, data.val.json_file.parent
    again = fit_run(tmp_path / "run", json_file, folder)
    fitted = open_model(tmp_path / "run")
    assert fitted.theta_image.item() == pytest.approx(again["theta_image"])
    assert not weights_equal(model, fitted)
    shown = f"theta: {metrics['fitted']['theta_image']:.2f} for concepts with tags only"
    assert shown in "\n".join(lines)


def test_fitting_goes_on_with_the_checkpoint_of_a_resumed_run(data, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    model = chain_of(data, tmp_path / "run", resume=True).model(3)
    assert weights_equal(model, open_model(trained[0]))


def test_imagenet_weights_are_loaded_where_training_starts_alone(data):
    network = dataclasses.replace(TINY.network, pretrained=True)
    with pytest.raises(ValueError, match="no pretrained weights of the backbone 'small'"):
        build_model(network, 1, data.table, data.split, initial=True)
    build_model(network, 1, data.table, data.split)


def test_images_are_normalised_as_the_backbone_expects(data):
    network = dataclasses.replace(TINY.network, backbone="efficientnet_lite0")
    model = build_model(network, 1, data.table, data.split)
    assert model.pixel_mean.flatten().tolist() == [127.5] * 3
    assert model.pixel_std.flatten().tolist() == [127.5] * 3


def test_images_of_other_concepts_are_refused(data):
    names = tuple(f"other {i}" for i in range(len(data.val.class_names)))
    other = dataclasses.replace(data.val, class_names=names)
    with pytest.raises(ValueError, match=r"None of the 71 classes of '.*concepts.json' is in"):
        data.test(other)
    some = dataclasses.replace(data.val, class_names=(*names[:-1], data.val.class_names[-1]))
    assert (data.test(some).indices >= 0).sum() == 1


# --- use


def test_concepts_are_asked_for_by_name_index_or_vector(predictor, image):
    names = predictor.model.table.names
    found = predictor(image, [names[3], 5, predictor.model.table.vectors[7], "crescent"])
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


def test_blending_unseen_words_is_asked_for(trained, image):
    predictor = open_predictor(trained[0])
    predictor.model.set_fitted(theta_unseen=0.5)
    alone = predictor(image, ["crescent"])["crescent"]
    assert (alone.borrowed, alone.own_share) == (None, 1)
    assert np.array_equal(alone.attention, alone.initial)
    predictor.blend_unseen = True
    blended = predictor(image, ["crescent"])["crescent"]
    assert blended.borrowed in predictor.model.split.boxed
    assert blended.own_share == 0.5
    assert not np.allclose(blended.attention, alone.attention)


def test_a_prediction_of_the_run_says_of_what_a_map_was_borrowed(trained, image):
    opened = maskx.open_run(trained[0], device="cpu")
    opened.model.set_fitted(theta_image=0.25)
    split = opened.model.split
    names = [split.masked[0], next(n for n in split.vocabulary if n not in split.boxed)]
    prediction = opened(image, concepts=[*names, "crescent"])
    nearest = open_predictor(trained[0])
    nearest.model.set_fitted(theta_image=0.25)
    borrowed = nearest(image, names)[names[1]].borrowed
    assert borrowed in split.boxed
    assert prediction.remarks == [None, f"75% '{borrowed}'", None]
    remarks = [entry.get("remark") for entry in prediction.to_coco(1)]
    found = zip(prediction.remarks, prediction.masks, strict=True)
    assert remarks == [remark for remark, mask in found if mask.any()]


def test_images_and_models_may_have_either_order_of_channels(trained, image):
    model = open_model(trained[0])
    expected = ConceptPredictor(model)(image, ["grass"])["grass"].mask_prob
    turned = np.ascontiguousarray(image[:, :, ::-1])
    for given, options in (
        (turned, {"order": "BGR"}),
        (image, {"order": "BGR", "model_format": "BGR"}),
        (turned, {"model_format": "BGR"}),
    ):
        found = ConceptPredictor(model, **options)(given, ["grass"])["grass"].mask_prob
        assert np.array_equal(found, expected)
    with pytest.raises(ValueError, match="order must be one of 'RGB', 'BGR', got 'rgb'"):
        ConceptPredictor(model, order="rgb")


def test_the_picture_has_concepts_of_every_level_that_images_show(
    data, trained, predictor, tmp_path, monkeypatch
):
    stage_1 = ConceptPredictor(open_model(trained[0], 1))
    drawn = []
    monkeypatch.setattr(pipeline, "draw_concepts", lambda path, rows: drawn.append(rows))
    test = data.test(data.val)
    # Concepts that no image shows are passed over, wherever they stand.
    shown = {c for record in test.records for c in record["image_labels"]}
    draw_test_concepts(tmp_path / "a.png", predictor, stage_1, test)
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
    draw_test_concepts(tmp_path / "a.png", predictor, stage_1, nothing)
    assert len(drawn) == 1


def test_without_names_all_that_exist_are_found(predictor, image):
    thresholds = predictor.model.existence_thresholds
    kept = thresholds.clone()
    thresholds.fill_(2)
    assert predictor(image) == {}
    thresholds[[2, 9]] = -1
    found = predictor(image)
    assert list(found) == [predictor.model.table.names[index] for index in (2, 9)]
    assert all(each.exists for each in found.values())
    thresholds.copy_(kept)


@pytest.mark.parametrize(
    ("concepts", "words"),
    [
        ([], "The list of concepts is empty"),
        (["gras"], "'gras' is not among the 66 concepts of the word table. Closest: 'grass'"),
        ([66], "66 is no concept index"),
        ([np.ones(3)], r"has shape \(3,\)"),
    ],
)
def test_queries_that_cannot_be_answered_are_named(predictor, image, concepts, words):
    with pytest.raises(ValueError, match=words):
        predictor(image, concepts)


def test_what_is_no_image_is_named(predictor):
    with pytest.raises(ValueError, match=r"shape \(4, 4\) and dtype float64. Allowed: \(H, W, 3\)"):
        predictor(np.zeros((4, 4)), ["grass"])
    with pytest.raises(ValueError, match="has 7 x 40 pixels, less than the 8 of one position"):
        predictor(np.zeros((7, 40, 3), np.uint8), ["grass"])
    assert predictor(np.zeros((8, 40, 3), np.uint8), ["grass"])["grass"].mask.shape == (8, 40)


def test_pictures_and_masks_of_files_are_written(predictor, data, tmp_path):
    files = [record["file_name"] for record in data.val.records[:2]]
    # Names that differ in what is no letter do not replace each other, or the picture.
    names = ["grass", "green lamp stand", "t-shirt", "t.shirt", "concepts"]
    unseen = WordTable(tuple(names[2:]), predictor.model.table.vectors[:3], np.ones(3))
    model = copy.copy(predictor.model)
    model.unseen = unseen
    with_unseen = ConceptPredictor(model)

    def halves(image, concepts):  # three steps of training leave the masks empty
        found = with_unseen(image, concepts).items()
        return {name: dataclasses.replace(each, mask=each.initial > 0.5) for name, each in found}

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
    shown = run_tool("segment_concepts", *asked, "grass", "crescent", "--blend-unseen")
    assert "| 000000 | crescent |" in shown
    assert (tmp_path / "out" / "000000" / "crescent.png").is_file()
    with pytest.raises(SystemExit, match=r"^error: 'gras' is not among the 66 concepts"):
        run_tool("segment_concepts", *asked, "gras")
    with pytest.raises(SystemExit, match=r"^error: There is no file"):
        run_tool("fit_concepts", tmp_path / "nothing", json_file, json_file.parent)


def test_both_embeddings_of_stage_2_share_the_features_of_a_frozen_backbone(data, tmp_path):
    weights = make_weights(tmp_path / "weights.pth")
    network = dataclasses.replace(
        TINY.network, backbone="resnet10t", pretrained=weights, frozen=True
    )
    settings = dataclasses.replace(
        TINY, network=network, embedding_iterations=1, refinement_iterations=1
    )
    model = ConceptMaskChain(data, settings, output=tmp_path / "run").model(2)
    cache = model.embedding.backbone.cache
    assert cache is not None
    assert model.original.backbone.cache is cache
