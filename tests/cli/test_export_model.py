"""`maskx export-model`: what it writes and refuses; see also tests/systems/*/test_export.py."""

import re
import sys
from dataclasses import replace

import pytest
import torch
from exported import export_or_skip, some_images

import maskx
from maskx.cli.main import main
from maskx.core.sample_models import SampleModel
from maskx.engine.model_export import export_label_maps
from maskx.engine.results import label_map_prediction
from maskx.engine.runs import Run
from maskx.engine.system import System, register_system
from maskx.engine.training import TrainingSettings, load_weights, train

NAMES = ("dark", "bright")


class Brightness(SampleModel):
    """Tells dark pixels from bright ones."""

    def __init__(self):
        super().__init__(8)
        self.level = torch.nn.Parameter(torch.tensor(128.0))

    def forward(self, samples):
        return {"loss": self.level**2}


class Network(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        scores = image[0].mean(dim=0) - self.model.level
        return (scores > 0).long() + 1, scores.abs()


def open_brightness(run, device):
    model = Brightness().to(device)
    load_weights(model, run.weights_file)
    return model


SYSTEM = System(
    "brightness",
    "Brightness",
    lambda options, report: {},
    open=open_brightness,
    prediction=label_map_prediction,
    exportable=lambda model, names: export_label_maps(Network(model), names, "the distance"),
)
register_system("brightness", SYSTEM)
register_system("opaque", replace(SYSTEM, name="opaque", title="Opaque", exportable=None))


@pytest.fixture
def make_run(tmp_path):
    def make(system="brightness"):
        run = Run(system=system, host="pip", class_names=NAMES, settings={})
        settings = TrainingSettings(iterations=1, batch_size=1, learning_rate=1e-3)
        folder = tmp_path / system
        train(Brightness(), lambda start, stop: [[{}]], settings, output_dir=folder, run=run)
        return folder

    return make


def refusal(*words):
    with pytest.raises(SystemExit) as ending:
        main(["export-model", *map(str, words)])
    return str(ending.value.code)


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_a_program_of_any_system_says_what_it_is(make_run, tmp_path, ending, capsys):
    run = make_run()
    program, said = export_or_skip(run, tmp_path / "new" / f"model{ending}")
    level = maskx.open_run(run, device="cpu").model.level.detach()
    assert "image to label_map, scores, 2 classes" in capsys.readouterr().out
    for image, _ in some_images():
        label_map, scores = program(image)
        assert torch.equal(label_map, (image[0].mean(dim=0) > level).long() + 1)
        assert scores.shape == image.shape[-2:]
    assert said["system"] == "brightness"
    assert said["class_names"] == list(NAMES)
    assert said["inputs"] == {"image": [1, 3, "height", "width"]}
    assert said["outputs"]["scores"] == "(height, width) float32, the distance"
    assert said["about"] == {"image": "RGB from 0 to 255"}


def test_a_file_is_replaced_only_when_that_is_asked_for(make_run, tmp_path):
    output = tmp_path / "model.pt2"
    output.write_text("mine")
    words = [make_run(), "--output", output]
    assert re.search(r"model\.pt2 exists already\. Add --overwrite", refusal(*words))
    assert output.read_text() == "mine"
    assert not main(["export-model", *map(str, words), "--overwrite"])
    assert output.read_bytes()[:2] == b"PK"


@pytest.mark.parametrize("name", ["model.pth", "model"])
def test_another_ending_is_refused(make_run, tmp_path, name):
    said = refusal(make_run(), "--output", tmp_path / name)
    assert re.search(
        rf"ending of '\S+{name}' must be one of '\.pt2', '\.onnx', '\.safetensors'", said
    )


def test_a_system_that_cannot_be_exported_is_named(make_run, tmp_path):
    output = tmp_path / "model.pt2"
    said = refusal(make_run("opaque"), "--output", output)
    assert re.search(r"opaque' holds a run of Opaque, which cannot be exported", said)
    assert not output.exists()


def test_a_missing_package_is_named(make_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    said = refusal(make_run(), "--output", tmp_path / "model.onnx")
    assert re.search(r"package .*onnxscript\. Install with: .*\[export\]", said)
