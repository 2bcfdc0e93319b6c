"""A trained segmentation network as a program that needs no maskx."""

import pytest
import torch
from exported import export_or_skip, some_images

import maskx
from maskx.data.coco import load_coco
from maskx.data.scenes.generator import generate_scenes
from maskx.systems.class_patterns.pipeline import TagSettings, learn_from_tags


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("train", "val", "run")]
    for seed, folder in enumerate(folders[:2]):
        generate_scenes(folder, count=6, size=64, num_categories=4, style="sparse", seed=seed)
    train, val = (load_coco(folder / "annotations.json", folder) for folder in folders[:2])
    settings = TagSettings(image_size=64, iterations=2, segmenter_iterations=2, batch_size=2)
    learn_from_tags(
        train,
        val,
        settings,
        image_root=folders[0],
        output=folders[2],
        resume=False,
        device=torch.device("cpu"),
        report=lambda line: None,
    )
    return folders[2]


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_the_program_predicts_what_the_run_does(run, tmp_path, ending):
    program, said = export_or_skip(run, tmp_path / f"model{ending}")
    predictor = maskx.open_run(run, device="cpu")
    assert said["system"] == predictor.run.system
    assert said["class_names"] == list(predictor.class_names)
    assert said["inputs"] == {"image": [1, 3, "height", "width"]}
    for image, pixels in some_images():
        label_map, scores = program(image)
        with torch.inference_mode():
            (expected,) = predictor.model([predictor.prepare(pixels)])
        prob = expected["sem_seg_prob"]
        assert label_map.shape == image.shape[-2:]
        torch.testing.assert_close(scores, prob.amax(dim=0), atol=1e-4, rtol=0)
        torch.testing.assert_close(prob.gather(0, label_map[None])[0], scores, atol=1e-4, rtol=0)


def test_a_model_with_a_crf_is_refused(run):
    predictor = maskx.open_run(run, device="cpu")
    predictor.model.crf = True
    with pytest.raises(ValueError, match=r"cannot be exported: it refines .* CRF"):
        predictor.system.exportable(predictor.model, predictor.class_names)
