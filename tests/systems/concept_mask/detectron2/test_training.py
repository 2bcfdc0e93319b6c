"""Training, evaluation and prediction of ConceptMask in Detectron2, and the chain of its stages."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.utils.visualizer import Visualizer

from maskx.core.word_table import WordTable, load_word_table, save_word_table
from maskx.data.coco import load_coco
from maskx.data.label_maps import write_label_map
from maskx.detectron2 import ConceptPredictor, MaskXConceptEvaluator, Trainer, evaluate
from maskx.detectron2.stagewise import run_stage
from maskx.detectron2.trainer import check_config
from maskx.engine.runs import read_run
from maskx.systems.concept_mask.concept_sets import scene_concept_split
from maskx.systems.concept_mask.detectron2.data import concept_test_data
from maskx.systems.concept_mask.detectron2.model import (
    check_concept_stages,
    concept_stages,
    fit_checkpoint,
    trained_config,
)
from maskx.systems.concept_mask.evaluation import (
    concept_test,
    evaluate_concepts,
    fit_concepts,
)

ROOT = Path(__file__).parents[4]
TOOLS = ROOT / "tools"
KEYS = "MODEL.MASKX.CONCEPT_MASK."
FILES = {
    1: "quick_schedules/stage1_embedding_scenes_cpu.yaml",
    2: "quick_schedules/stage2_refinement_scenes_cpu.yaml",
    3: "quick_schedules/stage3_segmentation_scenes_cpu.yaml",
}


def train(cfg):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


@pytest.fixture
def write_config(make_concept_cfg, concept_files, tmp_path):
    """Write a tiny config file, data included: ``write_config(<stage>, *opts)``."""

    def write(stage, *opts):
        folder = concept_files / "scenes"
        register = [["tiny_concepts", str(folder / "concepts.json"), str(folder)]]
        test = ("DATASETS.TEST", ()) if stage < 3 else ()
        cfg = make_concept_cfg(
            "DATASETS.MASKX.REGISTER",
            register,
            KEYS + "OVERLAP",
            "",
            *test,
            *opts,
            file=FILES[stage],
        )
        path = tmp_path / f"stage{stage}_{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(cfg.dump())
        return path

    return write


@pytest.fixture
def trained(make_concept_cfg, tmp_path):
    """Configuration of a model of stage 3 with weights that nothing was learned into."""
    cfg = make_concept_cfg()
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    return cfg


@pytest.fixture
def image():
    """An image of a scene, as OpenCV reads it, cut to a rectangle."""
    return cv2.imread(DatasetCatalog.get("tiny_concepts")[0]["file_name"])[:50]


def test_stage_1_trains_and_its_maps_are_evaluated(make_concept_cfg):
    latest = train(make_concept_cfg(file=FILES[1])).storage.latest()
    assert 0 < latest["total_loss"][0] <= 2  # one minus a cosine
    assert 0 <= latest["concepts/soft_iou_image"][0] <= 1


def test_a_later_stage_does_not_start_from_nothing(make_concept_cfg):
    for stage in (2, 3):
        trainer = Trainer(make_concept_cfg(file=FILES[stage]))
        with pytest.raises(ValueError, match=rf"is stage {stage}, which starts from stage .*empty"):
            trainer.resume_or_load(resume=False)
    cfg = make_concept_cfg(file=FILES[1])
    torch.save({"model": build_model(cfg).state_dict()}, Path(cfg.OUTPUT_DIR).with_suffix(".pth"))
    weights = ("MODEL.WEIGHTS", str(Path(cfg.OUTPUT_DIR).with_suffix(".pth")))
    trainer = Trainer(make_concept_cfg(*weights, KEYS + "OVERLAP", "", file=FILES[2]))
    with pytest.raises(ValueError, match=r"OVERLAP is empty.*concept_overlap\.py.*WEIGHT 0"):
        trainer.resume_or_load(resume=False)


# --- evaluation


def test_the_evaluator_measures_what_the_scores_measure(trained, tiny_concepts):
    """Against the evaluation of the host on pip alone."""
    result = evaluate(trained)["concepts"]
    model = build_model(trained).eval()
    model.load_state_dict(torch.load(trained.MODEL.WEIGHTS, weights_only=True)["model"])
    expected = evaluate_concepts(model, concept_test_data(trained, tiny_concepts))["levels"]
    assert expected["unseen"] is None
    for level in ("mask", "box", "image"):
        for measure, value in expected[level].items():
            assert result[f"{measure}_{level}"] == pytest.approx(value, abs=1e-5)
    assert not any("unseen" in name for name in result)


def test_unseen_words_are_measured_by_their_vectors(
    trained, concept_files, tmp_path, monkeypatch, capsys
):
    trained.TEST.MASKX.UNSEEN_WORDS = str(concept_files / "unseen.safetensors")
    result = evaluate(trained)["concepts"]
    assert 1 <= result["num_concepts_unseen"] <= 5
    assert 0 <= result["pointing_unseen"] <= 1
    assert result["num_concepts_unseen_blended"] == result["num_concepts_unseen"]
    # The same words as the tool for word vectors folds them in.
    words, tags = (str(concept_files / name) for name in ("words.safetensors", "all_tags.jsonl"))
    arguments = ["learn_word_vectors.py", "--table", words, "--tags", tags, "--fold-in"]
    file = str(tmp_path / "new_words.safetensors")
    arguments += [*scene_concept_split().unseen, "--output", file]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(TOOLS / "learn_word_vectors.py"), run_name="__main__")
    trained.TEST.MASKX.UNSEEN_WORDS = file
    assert evaluate(trained)["concepts"] == pytest.approx(result, nan_ok=True)
    config = tmp_path / "run.yaml"
    trained.TEST.MASKX.UNSEEN_WORDS = ""
    config.write_text(trained.dump())
    photo = DatasetCatalog.get("tiny_concepts")[0]["file_name"]
    arguments = ["segment_concepts.py", photo, "--config-file", str(config), "--unseen-words", file]
    arguments += ["--concepts", "green plus", "--output", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--opts", "MODEL.WEIGHTS", trained.MODEL.WEIGHTS])
    runpy.run_path(str(TOOLS / "segment_concepts.py"), run_name="__main__")
    assert "| green plus |" in capsys.readouterr().out


def test_maps_of_eq_1_are_measured_after_stage_2_where_asked(
    make_concept_cfg, tiny_concepts, tmp_path
):
    """The row "finetuned" of the paper's Table 1."""
    cfg = make_concept_cfg(file=FILES[2])
    model = build_model(cfg).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS, cfg.DATASETS.TEST = str(tmp_path / "model.pth"), (tiny_concepts,)
    cfg.TEST.MASKX.ATTENTION_KIND = "initial"
    found = evaluate(cfg)["concepts"]
    expected = evaluate_concepts(model, concept_test_data(cfg, tiny_concepts), kind="initial")
    refined = evaluate_concepts(model, concept_test_data(cfg, tiny_concepts))
    for level in ("mask", "box", "image"):
        for measure in ("pointing", "soft_iou", "iou"):
            value = expected["levels"][level][measure]
            assert found[f"{measure}_{level}"] == pytest.approx(value, abs=1e-5)
    soft_iou = (each["levels"]["box"]["soft_iou"] for each in (expected, refined))
    assert len(set(soft_iou)) == 2


def test_the_evaluator_refuses_what_it_cannot_measure(trained, tiny_concepts):
    test = concept_test_data(trained, tiny_concepts)
    evaluator = MaskXConceptEvaluator(tiny_concepts, test=test)
    with pytest.raises(ValueError, match=r"Image 'x' is not among the 8 of data set 'tiny_con"):
        evaluator.process([{"image_id": "x"}], [{}])
    bare = concept_test_data(trained, tiny_concepts, with_records=False)
    with pytest.raises(ValueError, match=r"has no image with a true mask or a label map"):
        MaskXConceptEvaluator(tiny_concepts, test=bare)


def test_label_maps_are_evaluated(trained, concept_files, tmp_path):
    """A data set without any instance mask, as COCO-Stuff and ADE20K are."""
    folder = concept_files / "scenes"
    content = json.loads((folder / "concepts.json").read_text())
    categories = [{"id": 1, "name": "grass"}, {"id": 2, "name": "green"}]
    for number, each in enumerate(content["images"]):
        label_map = np.zeros((64, 64), np.uint8)
        label_map[:32], label_map[32:40] = 1, 2
        write_label_map(tmp_path / f"{number}.png", label_map, num_classes=2)
        each |= {"label_map_file_name": f"{number}.png", "image_labels": [1, 2]}
    content |= {"categories": categories, "annotations": []}
    (tmp_path / "maps.json").write_text(json.dumps(content))
    trained.DATASETS.MASKX.REGISTER = [["tiny_maps", str(tmp_path / "maps.json"), str(folder)]]
    trained.DATASETS.TEST = ("tiny_maps",)
    check_config(trained)
    found = evaluate(trained)["concepts"]
    assert found["num_concepts_image"] == 2
    assert found["chance_image"] == pytest.approx((1 / 2 + 1 / 8) / 2)


# --- prediction


def test_the_default_predictor_finds_the_concepts_of_the_config(trained, image):
    trained.TEST.MASKX.CONCEPTS = ("grass", "green")
    found = DefaultPredictor(trained)(image)
    assert found["concepts"] == ["grass", "green"]
    for key in ("masks", "masks_prob", "attention"):
        assert found[key].shape == (2, 50, 64)
    assert found["existence"].shape == found["exists"].shape == (2,)
    instances = found["instances"]
    assert torch.equal(instances.pred_masks, found["masks"])
    predictor = ConceptPredictor(trained)
    names = predictor.model.table.names
    assert [names[row] for row in instances.pred_classes] == ["grass", "green"]
    metadata = Metadata().set(thing_classes=list(names))
    drawn = Visualizer(image, metadata).draw_instance_predictions(instances).get_image()
    assert drawn.shape == image.shape
    predicted = predictor(image, ["green", "grass"])
    for row, name in enumerate(found["concepts"]):
        np.testing.assert_allclose(
            predicted[name].mask_prob, found["masks_prob"][row].numpy(), atol=1e-5
        )
        np.testing.assert_allclose(
            predicted[name].attention, found["attention"][row].numpy(), atol=1e-5
        )
        assert predicted[name].existence == pytest.approx(found["existence"][row].item(), abs=1e-5)


def test_the_predictor_finds_what_it_is_asked_for(trained, concept_files, image):
    trained.TEST.MASKX.UNSEEN_WORDS = str(concept_files / "unseen.safetensors")
    predictor = ConceptPredictor(trained)
    table = predictor.model.table
    vector = table.vectors[2]
    found = predictor(image, ["red_crescent", 3, vector, "green plus"])
    assert list(found) == ["red crescent", table.names[3], "vector 2", "green plus"]
    for each in found.values():
        assert each.mask.shape == each.initial.shape == each.attention.shape == (50, 64)
    for one in ("red crescent", "green plus"):
        alone = predictor(image, [one])[one]
        np.testing.assert_allclose(alone.mask_prob, found[one].mask_prob, atol=1e-5)
    predictor.model.set_fitted(existence_thresholds=torch.full((66,), 2.0))
    assert predictor(image) == {}


@pytest.mark.parametrize(
    ("concepts", "words"),
    [
        ([], r"list of concepts is empty"),
        ("grass", r"the text 'grass'. Allowed: a list"),
        (["gras"], r"'gras' is not among the 66 concepts.*Closest: 'grass'"),
        (["grass", 66], r"66 is no concept index"),
        ([np.ones(5)], r"vector of concept 0 has shape \(5,\).*\(12,\)"),
        (["grass", "grass"], r"'grass' is asked for twice"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused(concepts, words, trained, image):
    with pytest.raises(ValueError, match=words):
        ConceptPredictor(trained)(image, concepts)


def test_models_and_images_that_do_not_fit_are_refused(trained, image, make_cfg, concept_files):
    predictor = ConceptPredictor(trained)
    with pytest.raises(ValueError, match=r"shape \(50, 64\) and dtype uint8.*uint8, BGR"):
        predictor(image[:, :, 0])
    with pytest.raises(ValueError, match=r"5 x 64 pixels, less than the 8"):
        predictor(image[:5], ["grass"])
    with pytest.raises(ValueError, match=r"META_ARCHITECTURE is \w+, which finds no concepts"):
        ConceptPredictor(make_cfg())
    table = load_word_table(concept_files / "words.safetensors")
    path = concept_files / "known.safetensors"
    save_word_table(path, WordTable(("grass",), table.vectors[:1], np.ones(1)))
    trained.TEST.MASKX.UNSEEN_WORDS = str(path)
    with pytest.raises(ValueError, match=r"'grass' is among the unseen words, but the word table"):
        ConceptPredictor(trained)(image, ["green"])


# --- fitting


def test_fitted_values_are_written_into_the_checkpoint(trained, concept_files):
    folder = concept_files / "scenes"
    before = torch.load(trained.MODEL.WEIGHTS, weights_only=True)["model"]
    fitted = fit_checkpoint(trained, folder / "concepts.json", folder)
    after = torch.load(trained.MODEL.WEIGHTS, weights_only=True)["model"]
    assert after.keys() == before.keys()
    changed = {n for n, v in after.items() if not torch.equal(v, before[n])}
    thetas = {"theta_image", "theta_unseen"}
    assert changed <= {"existence_thresholds", "existence_threshold_unseen"} | thetas
    assert after["theta_image"] == pytest.approx(fitted["theta_image"])
    assert after["theta_unseen"] == pytest.approx(fitted["theta_unseen"])
    model = ConceptPredictor(trained).model
    assert torch.equal(model.existence_thresholds, after["existence_thresholds"])
    data = load_coco(folder / "concepts.json", folder)
    table = load_word_table(concept_files / "words.safetensors")
    test = concept_test(data.records, data.class_names, scene_concept_split(), table, source="x")

    assert fit_concepts(model, test) == fitted
    refitted = model.existence_thresholds
    torch.testing.assert_close(refitted, after["existence_thresholds"])


def test_the_tools_work_on_a_run_of_detectron2(
    trained, concept_files, tmp_path, monkeypatch, capsys
):
    folder = concept_files / "scenes"
    config = tmp_path / "run.yaml"
    config.write_text(trained.dump())
    weights = ["--opts", "MODEL.WEIGHTS", trained.MODEL.WEIGHTS]
    arguments = ["fit_concepts.py", str(folder / "concepts.json"), str(folder)]
    arguments += ["--config-file", str(config), "--device", "cpu", *weights]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(TOOLS / "fit_concepts.py"), run_name="__main__")
    assert "theta image: " in capsys.readouterr().out
    photo = next(folder.rglob("*.png"), None) or next(folder.rglob("*.jpg"))
    arguments = ["segment_concepts.py", str(photo), "--config-file", str(config), "--device", "cpu"]
    arguments += ["--output", str(tmp_path / "found"), *weights]
    monkeypatch.setattr(sys, "argv", [*arguments, "--concepts", "grass", "red"])
    runpy.run_path(str(TOOLS / "segment_concepts.py"), run_name="__main__")
    assert "| grass |" in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "found" / photo.stem / "grass.png")).shape == (64, 64, 3)
    monkeypatch.setattr(sys, "argv", [*arguments, "--concepts", "gras"])
    with pytest.raises(SystemExit, match=r"error: 'gras' is not among"):
        runpy.run_path(str(TOOLS / "segment_concepts.py"), run_name="__main__")


def test_a_run_without_weights_is_refused(trained, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(trained.dump())
    with pytest.raises(FileNotFoundError, match=r"model_final\.pth'\. Train the model to its end"):
        trained_config(config)


# --- the chain of stages


def chain(write_config, output, *opts, **files):
    left = {f"stage{stage}": stage for stage in FILES}.items()
    configs = {name: write_config(stage) for name, stage in left if name not in files} | files
    return concept_stages(**configs, output=output, opts=opts)


def run_tool(monkeypatch, output, *arguments):
    monkeypatch.setattr(
        sys, "argv", ["train_concept_mask.py", "--output", str(output), *map(str, arguments)]
    )
    runpy.run_path(str(TOOLS / "train_concept_mask.py"), run_name="__main__")


def test_the_chain_goes_on_where_it_was_interrupted(
    write_config, concept_files, tmp_path, monkeypatch, capsys
):
    configs = {stage: write_config(stage) for stage in FILES}
    arguments = [a for s, path in configs.items() for a in (f"--stage{s}", path)]
    pairs = ["SOLVER.CHECKPOINT_PERIOD", "1"]
    output = tmp_path / "chain"
    before_step = Trainer.before_step

    def interrupt(self):
        before_step(self)
        if self.cfg.MODEL.META_ARCHITECTURE == "MaskXConceptRefinement" and self.iter == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "before_step", interrupt)
    with pytest.raises(SystemExit, match=r"interrupted; the same command with --resume"):
        run_tool(monkeypatch, output, *arguments, *pairs)
    monkeypatch.setattr(Trainer, "before_step", before_step)
    with pytest.raises(SystemExit, match=r"holds an interrupted run\. Add --resume"):
        run_tool(monkeypatch, output, *arguments, *pairs)
    capsys.readouterr()
    run_tool(monkeypatch, output, "--resume", *arguments, *pairs)
    assert "stage1: finished before, not run again" in capsys.readouterr().out
    assert read_run(output / "stage3").results["concepts/iou_mask"] >= 0
    states = [
        torch.load(output / f"stage{stage}" / "model_final.pth", weights_only=True)["model"]
        for stage in FILES
    ]
    for name, value in states[1].items():
        if name.startswith("original."):
            trained = name.replace("original.", "embedding.")
            assert torch.equal(value, states[0][trained])
            assert torch.equal(states[2][trained], states[1][trained])
    assert (output / "overlap.npz").is_file()

    # What a training writes is fitted and asked.
    folder = concept_files / "scenes"
    cfg = trained_config(output / "stage3" / "config.yaml")
    fitted = fit_checkpoint(cfg, folder / "concepts.json", folder)
    network = ConceptPredictor(cfg).model
    assert network.theta_image.item() == pytest.approx(fitted["theta_image"])
    assert network.has_fitted_thresholds

    # Another chain starts from the first stage, and takes the table that lies beside it.
    shutil.copy(concept_files / "words.safetensors", output / "words.safetensors")
    other = tmp_path / "other"
    stages = concept_stages(
        output / "stage1" / "model_final.pth",
        write_config(2, KEYS + "DISCRIMINATION_WEIGHT", 0.0, KEYS + "WORD_TABLE", ""),
        write_config(3, KEYS + "WORD_TABLE", ""),
        output=other,
    )
    assert [stage.output.name for stage in stages] == ["stage2", "stage3"]
    assert check_concept_stages(stages) == [False, False]
    assert {s.cfg.MODEL.MASKX.CONCEPT_MASK.WORD_TABLE for s in stages} == {
        str((output / "words.safetensors").resolve())
    }
    assert not (other / "overlap.npz").exists()


def test_the_chain_makes_the_files_that_are_not_named(write_config, tmp_path):
    names = scene_concept_split().vocabulary
    lines = [{"file_name": f"{i}.png", "tags": names[i : i + 6]} for i in range(61)]
    tags = tmp_path / "tags.jsonl"
    tags.write_text("\n".join(map(json.dumps, lines)))
    unnamed = (KEYS + "WORD_TABLE", "")
    register = ("DATASETS.MASKX.REGISTER", [["all_tags", str(tags), str(tmp_path)]])
    first = write_config(1, *unnamed, *register, "DATASETS.TRAIN", ("all_tags",))
    configs = {f"stage{stage}": write_config(stage, *unnamed) for stage in (2, 3)}
    output = tmp_path / "out"
    stages = chain(write_config, output, stage1=first, **configs)
    assert check_concept_stages(stages) == [False] * 3
    keys = [stage.cfg.MODEL.MASKX.CONCEPT_MASK for stage in stages]
    assert {each.WORD_TABLE for each in keys} == {str((output / "words.safetensors").resolve())}
    assert str((output / "overlap.npz").resolve()) == keys[1].OVERLAP
    assert load_word_table(keys[0].WORD_TABLE).names == names


def test_a_table_that_one_stage_names_is_that_of_all(write_config, concept_files, tmp_path):
    configs = {f"stage{stage}": write_config(stage, KEYS + "WORD_TABLE", "") for stage in (1, 3)}
    stages = chain(write_config, tmp_path / "out", **configs)
    assert {stage.cfg.MODEL.MASKX.CONCEPT_MASK.WORD_TABLE for stage in stages} == {
        str(concept_files / "words.safetensors")
    }
    assert check_concept_stages(stages) == [False] * 3
    assert not (tmp_path / "out" / "words.safetensors").exists()


def test_the_record_knows_the_word_table(write_config, concept_files, tmp_path, monkeypatch):
    table = tmp_path / "words.safetensors"
    shutil.copy(concept_files / "words.safetensors", table)
    stages = chain(write_config, tmp_path / "out", KEYS + "WORD_TABLE", str(table))
    run_stage(stages[0])
    assert check_concept_stages(stages) == [True, False, False]
    with monkeypatch.context() as patch:
        finished = "maskx.detectron2.stagewise.stage_is_finished"
        patch.setattr(finished, lambda stage: stage == stages[1])
        with pytest.raises(ValueError, match=r"stage2' is finished, but the stage before it is"):
            check_concept_stages(stages)
    moved = shutil.move(table, tmp_path / "moved.safetensors")
    stages = chain(write_config, tmp_path / "out", KEYS + "WORD_TABLE", str(moved))
    assert check_concept_stages(stages) == [True, False, False]
    words = load_word_table(moved)
    save_word_table(moved, WordTable(words.names, 2 * words.vectors, words.idf))
    stages = chain(write_config, tmp_path / "out", KEYS + "WORD_TABLE", str(moved))
    with pytest.raises(ValueError, match=r"WORD_TABLE '.*moved.*' is not what the run"):
        check_concept_stages(stages)


def test_stages_that_do_not_fit_together_are_refused(write_config, tmp_path):
    output = tmp_path / "out"
    for opts, files, error, words in (
        (("MODEL.WEIGHTS", "x"), {}, ValueError, r"MODEL\.WEIGHTS is given for all stages"),
        (
            (),
            {"stage2": write_config(3)},
            ValueError,
            r"stage 2\. It must be MaskXConceptRef",
        ),
        ((), {"stage1": tmp_path / "gone.pth"}, FileNotFoundError, r"--stage1-weights '.*gone"),
        (
            (),
            {"stage1": ROOT / "configs" / "TransferNet" / "stage2_baseline_VGG_16.yaml"},
            ValueError,
            r"META_ARCHITECTURE is MaskXTransferNet .*must be MaskXConceptEmbedding",
        ),
    ):
        with pytest.raises(error, match=words):
            chain(write_config, output, *opts, **files)
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ValueError, match=r"WORD_TABLE is empty in .*which word table .*not known"):
        chain(
            write_config,
            output,
            stage1=tmp_path / "weights.pth",
            stage2=write_config(2, KEYS + "WORD_TABLE", ""),
            stage3=write_config(3, KEYS + "WORD_TABLE", ""),
        )
    stages = chain(write_config, output, stage3=write_config(3, KEYS + "HIDDEN_CHANNELS", 8))
    with pytest.raises(ValueError, match=r"HIDDEN_CHANNELS is 8 in .*but 16 in .*Set it alike"):
        check_concept_stages(stages)
    stages = chain(write_config, output, stage2=write_config(2, KEYS + "FINAL_RELU", True))
    with pytest.raises(ValueError, match=r"FINAL_RELU is True in .*but False in"):
        check_concept_stages(stages)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --stage2 or --stage2-weights"),
        (["--stage2", "b.yaml"], "give --stage1 or --stage1-weights"),
        (["--stage1", "a.yaml", "--stage2-weights", "b.pth"], "leave stage 1 out"),
    ],
)
def test_the_tool_says_what_is_missing(arguments, words, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, tmp_path, "--stage3", "c.yaml", *arguments)
    assert words in capsys.readouterr().err


def test_two_processes_train_and_measure_together(run_two_processes):
    run_two_processes(Path(__file__).with_name("two_concept_processes.py"))


def test_a_stage_takes_pairs_of_its_own(write_config, tmp_path):
    stages = concept_stages(
        **{f"stage{number}": write_config(number) for number in (1, 2, 3)},
        output=tmp_path / "out",
        opts=("SOLVER.MAX_ITER", 7),
        own_opts={"stage2": ["SOLVER.MAX_ITER", "9"]},
    )
    assert [stage.cfg.SOLVER.MAX_ITER for stage in stages] == [7, 9, 7]
