"""A trained LarvSeg as a program that needs no maskx."""

import pytest
import torch
from exported import export_or_skip, some_images

import maskx
from maskx.data.coco import load_coco
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.systems.larvseg.pipeline import LarvSegChain, LarvSegMethod, LarvSegSettings
from maskx.systems.larvseg.samples import sets_of_one_file

TINY = LarvSegSettings(
    image_size=32, start_iterations=2, iterations=2, batch_size=4, bank_size=2, top_tokens=4
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    data = load_coco(
        generate_scenes(folder, count=16, size=64, seed=3, num_categories=12, style="sparse"),
        folder,
    )
    split = resolve_split("scenes_half", data.class_names)
    output = tmp_path_factory.mktemp("chain")
    sets = sets_of_one_file(data, split, image_size=TINY.image_size)
    LarvSegChain(sets, TINY, output=output).train_method(LarvSegMethod())
    return output / "larvseg"


@pytest.fixture
def predictor(run):
    return maskx.open_run(run, device="cpu")


def logits_of(model, image, label_map):
    """The logits of a label map, dense, as the network defines them."""
    classes = model.test_classes
    squares = model.preprocess([{"image": image[0]}])
    network = model.network
    trained = network.classifier.trained[classes].nonzero()[:, 0]
    vectors = network.classifier.class_vectors(classes[trained])
    logits = network.classifier.factors(network(squares), vectors).dense()
    logits = torch.nn.functional.interpolate(logits, image.shape[-2:], mode="bilinear")[0]
    every = logits.new_full((len(classes), *image.shape[-2:]), float("-inf"))
    every[trained] = logits
    return every.gather(0, label_map[None] - 1)[0]


def check(program, predictor):
    for image, pixels in some_images():
        label_map, scores = program(image)
        with torch.inference_mode():
            (expected,) = predictor.model([predictor.prepare(pixels)])
            of_label = logits_of(predictor.model, image, label_map)
        torch.testing.assert_close(scores, expected["top_scores"][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(of_label, scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_the_program_predicts_what_the_run_does(run, predictor, tmp_path, ending):
    program, said = export_or_skip(run, tmp_path / f"model{ending}")
    assert said["system"] == "larvseg"
    assert said["class_names"] == list(predictor.class_names)
    check(program, predictor)


@pytest.mark.parametrize("logit_form", ["temperature", "layernorm"])
def test_chunks_of_a_class_list_without_untrained_classes(predictor, logit_form):
    """What is exported is no matter of the classes gone through at a time."""
    model = predictor.model
    classifier = model.network.classifier
    if logit_form == "layernorm":
        classifier.logit_form = logit_form
        classifier.scale, classifier.shift = (
            torch.nn.Parameter(torch.tensor(value)) for value in (3.0, 0.5)
        )
    model.test_classes = torch.tensor([7, 1, 2, 11, 5])
    classifier.trained[2] = False
    found = predictor.system.exportable(model, predictor.class_names)
    assert found.class_names == tuple(predictor.class_names[i] for i in (7, 1, 2, 11, 5))
    found.network.chunk = 2
    with torch.no_grad():
        check(found.network, predictor)
        assert not any((found.network(image)[0] == 3).any() for image, _ in some_images())


def test_sliding_windows_are_refused(predictor):
    predictor.model.window = 32
    with pytest.raises(ValueError, match="cannot be exported: it predicts by sliding windows"):
        predictor.system.exportable(predictor.model, predictor.class_names)
