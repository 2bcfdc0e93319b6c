import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import maskx.systems  # noqa: F401  registers them
from maskx.data.coco import load_coco
from maskx.data.images import ImageMapper
from maskx.data.scenes.generator import generate_scenes
from maskx.engine.prediction import predict_image_labels
from maskx.engine.predictor import open_run
from maskx.systems.class_patterns import pipeline as class_patterns
from maskx.systems.class_patterns import steps
from maskx.systems.class_patterns.pipeline import (
    TagSettings,
    learn_from_tags,
    open_tagged_images,
)
from maskx.systems.class_patterns.proxy_masks import ProxyMaskSettings

TINY = {"image_size": 64, "iterations": 2, "segmenter_iterations": 2, "batch_size": 2}
LAYERS = ("C41", "C42", "C43")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("train", "val")]
    for seed, folder in enumerate(folders):
        generate_scenes(folder, count=6, size=64, num_categories=4, style="sparse", seed=seed)
    return folders


def learn(scenes, output, *, resume=False, train_json="annotations.json", lines=None, **changes):
    train_data = load_coco(scenes[0] / train_json, scenes[0])
    return learn_from_tags(
        train_data,
        load_coco(scenes[1] / "annotations.json", scenes[1]),
        TagSettings(**(TINY | changes)),
        image_root=scenes[0],
        output=output,
        resume=resume,
        device=torch.device("cpu"),
        report=(lines if lines is not None else []).append,
    )


def write_changed(path, scenes, change):
    content = json.loads((scenes[0] / "annotations.json").read_text())
    for image in content["images"]:
        del image["stuff_file_name"]  # relative to the file
    change(content)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def without_seconds(metrics):
    return {key: value for key, value in metrics.items() if key != "step_seconds"}


def weights_of(output, name):
    return torch.load(output / name / "checkpoint.pth", weights_only=True)["model"]


def assert_same_weights(first, second, names=("classifier", "segmenter", "retrained")):
    for name in names:
        found = weights_of(second, name)
        for key, value in weights_of(first, name).items():
            assert torch.equal(value, found[key]), (name, key)


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    lines = []
    return output, learn(scenes, output, lines=lines), lines


def test_from_tags_to_measures_and_picture(finished):
    output, metrics, lines = finished
    assert set(metrics["mIoU"]) == {"proxy", "trained", "retrained"}
    for key in ("proxy_decided_only", "proxy_undecided", "proxy_paper"):
        assert tuple(metrics[key]) == tuple(metrics["mIoU"]["proxy"]) == LAYERS
    # Both settings leave different pixels; with conflicts resolved none is left.
    assert metrics["proxy_undecided"] == dict.fromkeys(LAYERS, 0.0)
    assert metrics["proxy_decided_only"] == metrics["mIoU"]["proxy"]
    assert 0 < metrics["tag_mAP"] <= 100
    steps = ["classifier", "patterns", "projections", "proxy masks", "segmenter", "predictions"]
    assert list(metrics["step_seconds"])[:7] == [*steps, "retrained"]
    picture = cv2.imread(str(output / "predictions.png"))
    assert picture.shape[1] == 5 * 256
    table = lines[-1]
    assert f"| proxy masks of C41 | {metrics['mIoU']['proxy']['C41']:.1f} |" in table
    assert f"| network, retrained | {metrics['mIoU']['retrained']:.1f} |" in table


def test_the_networks_start_from_the_classifier_and_end_apart(finished):
    output, _, _ = finished
    first, second = weights_of(output, "segmenter"), weights_of(output, "retrained")
    assert any(not torch.equal(value, second[name]) for name, value in first.items())
    # Steps of Adam are about as long as its rate: 2 of 2e-4 here, 2 of 2e-3 in the classifier.
    start = weights_of(output, "classifier")
    for network in (first, second):
        for name, value in network.items():
            if name.startswith("network.backbone.") and value.ndim == 4:
                moved = value - start[name.replace("network", "classifier", 1)]
                assert moved.abs().max() < 6e-4, name


def test_predictions_to_retrain_on_hold_only_the_tags(scenes, finished):
    output, _, _ = finished
    retraining = load_coco(output / "retraining" / "annotations.json", scenes[0])
    mapper = ImageMapper(4, size=None, flip=False, label_maps=True)
    for record in retraining.records:
        found = set(mapper(record, None)["sem_seg"].unique().tolist())
        assert found <= {0, *(label + 1 for label in record["image_labels"])}


def test_a_finished_run_is_only_measured_again(scenes, finished, monkeypatch):
    output, metrics, _ = finished

    def read_nothing(self, record, random_state):
        raise AssertionError("a training image was read")

    monkeypatch.setattr(ImageMapper, "__call__", read_nothing)
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*.p*") if "predictions" not in p.name}
    assert any(p.suffix == ".pth" for p in before)
    again = learn(scenes, output, resume=True)
    assert without_seconds(again) == without_seconds(metrics)
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.parametrize("step", ["discover", "project", "make_masks", "write_label_map"])
def test_an_interrupted_run_goes_on(scenes, finished, tmp_path, monkeypatch, step):
    whole, metrics, _ = finished
    module = steps if step == "write_label_map" else class_patterns
    function, calls = getattr(module, step), []

    def interrupted(*args, **kwargs):
        calls.append(step)
        if len(calls) == (3 if step == "write_label_map" else 1):
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(module, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(scenes, tmp_path)
    resumed = learn(scenes, tmp_path, resume=True)
    assert without_seconds(resumed) == without_seconds(metrics)
    assert_same_weights(whole, tmp_path)


def test_a_new_run_keeps_the_old_one_apart(scenes, finished, tmp_path):
    whole, metrics, _ = finished
    learn(scenes, tmp_path, seed=5)
    old = weights_of(tmp_path, "classifier")
    assert without_seconds(learn(scenes, tmp_path)) == without_seconds(metrics)
    assert_same_weights(whole, tmp_path)
    kept = weights_of(tmp_path / "previous_run", "classifier")
    assert all(torch.equal(value, kept[name]) for name, value in old.items())


def test_the_truth_of_training_images_changes_nothing_that_is_learned(scenes, finished, tmp_path):
    whole, metrics, _ = finished

    def spoil(content):
        for annotation in content["annotations"]:
            annotation["segmentation"] = [[0, 0, 9, 0, 9, 9, 0, 9]]
            annotation["bbox"] = [0, 0, 9, 9]

    # Of the same name, as a run is known by it.
    write_changed(scenes[0] / "spoilt" / "annotations.json", scenes, spoil)
    blind = learn(scenes, tmp_path, train_json="spoilt/annotations.json")
    assert blind["mIoU"]["proxy"] != metrics["mIoU"]["proxy"]
    for key in ("trained", "retrained"):
        assert blind["mIoU"][key] == metrics["mIoU"][key]
    assert_same_weights(whole, tmp_path)


def test_tags_without_any_annotation_are_enough(scenes, finished, tmp_path):
    whole, metrics, _ = finished
    write_changed(
        scenes[0] / "tags" / "annotations.json",
        scenes,
        lambda content: content["annotations"].clear(),
    )
    tags = learn(scenes, tmp_path, train_json="tags/annotations.json")
    assert set(tags["mIoU"]) == {"trained", "retrained"}
    assert "proxy_paper" not in tags
    assert tags["mIoU"]["retrained"] == metrics["mIoU"]["retrained"]
    assert_same_weights(whole, tmp_path)


def test_resuming_with_other_settings_is_refused(scenes, finished):
    output, _, _ = finished
    with pytest.raises(ValueError, match=r"training\.batch_size is 3, but the run .* with 2"):
        learn(scenes, output, resume=True, batch_size=3)
    words = r"chain\.proxy masks is 'C41-zero-ignore', but the run .* with 'C41-otsu-standardised'"
    with pytest.raises(ValueError, match=words):
        learn(scenes, output, resume=True, masks=ProxyMaskSettings(crf=False))


def test_a_run_with_another_class_list_than_its_weights_is_refused(finished, tmp_path):
    shutil.copytree(finished[0] / "retrained", tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    content["class_names"] = content["class_names"][::-1]
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"Class 0 is '.*' in the checkpoint, but '.*' by the data"
    ):
        open_run(tmp_path / "run")


def test_the_papers_masks_are_not_made_twice(scenes, tmp_path):
    metrics = learn(scenes, tmp_path, masks=ProxyMaskSettings(crf=False))
    assert metrics["proxy_paper"] == metrics["mIoU"]["proxy"]
    assert len(list((tmp_path / "proxy" / "masks").iterdir())) == 3


def test_the_crf_refines_masks_and_predictions(scenes, tmp_path):
    pytest.importorskip("pydensecrf", reason="the extra `crf` is not installed")
    lines = []
    learn(scenes, tmp_path, masks=ProxyMaskSettings(crf=True), lines=lines)
    records = load_coco(scenes[0] / "annotations.json", scenes[0]).records
    single = sum(len(record["image_labels"]) == 1 for record in records)
    assert single > 0
    assert f"6 images, {single} of them refined by the CRF" in "\n".join(lines)
    header = json.loads((tmp_path / "retraining/label_maps/predictions.json").read_text())
    assert header["crf"] is True


def test_a_classifier_is_opened_as_it_was_trained(scenes, finished):
    output, _, _ = finished
    source, records, class_names = open_tagged_images(
        output / "classifier", scenes[1] / "annotations.json", scenes[1]
    )
    assert source.settings == {"image_size": 64}
    assert len(class_names) == 4
    state = weights_of(output, "classifier")
    for name, value in source.classifier.state_dict().items():
        assert torch.equal(value, state[f"classifier.{name}"])
    expected = predict_image_labels(source.model, records)
    samples = [source.read_image(record) for record in records]
    with torch.no_grad():
        prob = source.classifier(source.model.preprocess(samples)).sigmoid()
    torch.testing.assert_close(prob, torch.from_numpy(expected))


def test_the_run_folder_opens_as_the_network_that_was_trained_last(finished):
    output, metrics, _ = finished
    predictor = open_run(output, "cpu")
    assert predictor.run.folder.name == "retrained"
    for name, value in weights_of(output, "retrained").items():
        assert torch.equal(predictor.model.state_dict()[name], value)
    assert predictor(np.zeros((20, 30, 3), np.uint8)).label_map.shape == (20, 30)
    assert len(metrics["IoU"]) == len(predictor.class_names) + 1
    with pytest.raises(ValueError, match=r"part 'classifier', not 'network' of class_patterns"):
        open_run(output / "classifier", "cpu")


def test_classifiers_that_cannot_be_opened_are_named(scenes, finished, tmp_path):
    output, _, _ = finished
    images = scenes[1] / "annotations.json", scenes[1]
    with pytest.raises(FileNotFoundError, match=r"has no run\.json"):
        open_tagged_images(tmp_path, *images)
    with pytest.raises(
        ValueError,
        match=r"'network', not 'classifier' of .*Give the folder 'cl",
    ):
        open_tagged_images(output, *images)
    content = json.loads((output / "classifier" / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match="there are no weights of the run"):
        open_tagged_images(tmp_path, *images)
    del content["settings"]["image_size"]
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"none of a step of class patterns \(KeyError"):
        open_tagged_images(tmp_path, *images)
    write_changed(
        tmp_path / "other.json",
        scenes,
        lambda content: content["categories"][0].update(name="teapot"),
    )
    with pytest.raises(ValueError, match=r"4 classes of the classifier .* them: \['teapot'\]"):
        open_tagged_images(output / "classifier", tmp_path / "other.json", scenes[0])


def test_backbones_out_of_the_list_are_named(scenes, tmp_path):
    with pytest.raises(ValueError, match=r"'vgg'"):
        learn(scenes, tmp_path, backbone="vgg")
    with pytest.raises(ValueError, match="no pretrained weights of the backbone 'small'"):
        learn(scenes, tmp_path, pretrained=True)
    with pytest.raises(
        ValueError, match="layer of small must be one of 'C41', 'C42', 'C43', got 'C44'"
    ):
        learn(scenes, tmp_path, layer="C44")
    assert not Path(tmp_path / "classifier" / "checkpoint.pth").exists()


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [("resnet18", {"C41", "C42"}), ("vgg16", {"conv5_1", "conv5_2", "conv5_3"})],
)
def test_other_backbones_go_the_whole_way(scenes, tmp_path, backbone, layers):
    changes = {"iterations": 1, "segmenter_iterations": 1, "image_size": 32}
    metrics = learn(scenes, tmp_path, backbone=backbone, **changes)
    assert set(metrics["mIoU"]["proxy"]) == layers


def test_the_sizes_of_the_multi_scale_test_are_those_of_the_paper():
    assert TagSettings(image_size=328, multi_scale=True).test_sizes == (241, 328, 401)
    assert TagSettings(image_size=128, multi_scale=True).test_sizes == (94, 128, 156)
    assert TagSettings(image_size=128).test_sizes == (128,)
