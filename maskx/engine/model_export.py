"""Trained runs as programs that need no maskx: of ``torch.export``, or ONNX."""

import importlib.util
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from maskx.core.checks import check_choice
from maskx.core.files import written_whole
from maskx.core.timm_backbones import make_traceable
from maskx.engine.predictor import Predictor
from maskx.engine.runs import MODEL_FILE_SUFFIX, Run
from maskx.engine.system import find_system

METADATA_NAME = "maskx.json"
"""The extra file of a ``.pt2`` program that says what it is."""
_ONNX_PACKAGES = ("onnx", "onnxscript")
_SMALLEST_SIDE = 8  # in pixels, of an image


@dataclass(frozen=True)
class Exportable:
    """A trained model as a network of tensors.

    Attributes:
        network: maps the inputs, in their order, to a tuple of the outputs.
        inputs: an example of each input by name, no dynamic side of it 0, 1 or like another.
        dynamic: by name of an input which of its dimensions are free, and how they are called.
        outputs: by name what each output is, in one sentence.
        class_names: by class index of the outputs, or of the inputs.
        about: what else the user of the program has to know, by name.
    """

    network: nn.Module
    inputs: Mapping[str, Tensor]
    dynamic: Mapping[str, Mapping[int, str]]
    outputs: Mapping[str, str]
    class_names: tuple[str, ...]
    about: Mapping[str, str] = field(default_factory=dict)


def export_label_maps(network: nn.Module, class_names: Sequence[str], score: str) -> Exportable:
    """Describe a network that maps an image (1, 3, H, W) to its label map and the scores of that.

    Args:
        score: what a score is.
    """
    return Exportable(
        network=network.eval(),
        inputs={"image": example_image()},
        dynamic={"image": {2: "height", 3: "width"}},
        outputs={
            "label_map": "(height, width) int64, 0 the background and c + 1 class index c",
            "scores": f"(height, width) float32, {score}",
        },
        class_names=tuple(class_names),
    )


def example_image() -> Tensor:
    """Make an image (1, 3, H, W) of RGB from 0 to 255, of sides that no setting is likely to be."""
    generator = torch.Generator().manual_seed(0)
    return 255 * torch.rand(1, 3, 75, 107, generator=generator)


def check_export(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse a file that could not be written, before a model is opened.

    Raises:
        FileExistsError: the file exists.
        ImportError: a package that ONNX needs is missing.
        ValueError: the file has another ending than ``.pt2``, ``.onnx`` and ``.safetensors``.
    """
    path = Path(path)
    check_choice(f"ending of '{path}'", path.suffix, (".pt2", ".onnx", MODEL_FILE_SUFFIX))
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise ImportError(
            f"'{path}' needs the package {' and '.join(missing)}. Install with: pip install "
            "'maskx-detectron2[export]', or write a .pt2 file."
        )
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists already. Add --overwrite to replace it, or name another file."
        )


def check_exportable(run: Run) -> None:
    """Refuse a run that cannot be exported, before its model is opened."""
    system = find_system(run.system)
    if system.exportable is None:
        raise ValueError(
            f"'{run.folder}' holds a run of {system.title}, which cannot be exported. Use "
            "maskx.open_run."
        )


def export_model(
    predictor: Predictor, path: str | os.PathLike[str], *, overwrite: bool = False
) -> Exportable:
    """Write the model of a run as a program of tensors in, tensors out.

    What it takes and gives and its class names are in the metadata of an ONNX file, and in the
    extra file :data:`METADATA_NAME` of a ``.pt2`` file.

    Args:
        predictor: of :func:`maskx.open_run`, on the CPU.
        path: a ``.pt2`` or ``.onnx`` file.
        overwrite: replace a file.

    Returns:
        What was written.

    Raises:
        FileExistsError: the file exists.
        ImportError: a package that ONNX needs is missing.
        ValueError: the model cannot be exported, or the file has another ending.
    """
    check_export(path, overwrite=overwrite)
    path, run, system = Path(path), predictor.run, predictor.system
    check_exportable(run)
    found = system.exportable(predictor.model, run.class_names)
    network = _OfRGB(make_traceable(found.network), _channel_order(predictor)).eval()
    # Not named: a name would refuse what follows from a padding to multiples.
    dynamic = {
        name: torch.export.Dim.DYNAMIC(min=_SMALLEST_SIDE if name in ("height", "width") else 0)
        for sides in found.dynamic.values()
        for name in sides.values()
    }
    shapes = tuple(
        {side: dynamic[name] for side, name in found.dynamic.get(key, {}).items()}
        for key in found.inputs
    )
    with torch.no_grad():
        program = torch.export.export(
            network,
            tuple(found.inputs.values()),
            # All but the image in one, as the network takes them.
            dynamic_shapes=(shapes[0], shapes[1:])[: len(shapes)],
        )
    metadata = {
        "system": run.system,
        "maskx_version": run.version,
        "class_names": list(found.class_names),
        "inputs": {
            key: [sides.get(side, size) for side, size in enumerate(example.shape)]
            for key, example in found.inputs.items()
            for sides in [found.dynamic.get(key, {})]
        },
        "outputs": dict(found.outputs),
        "about": {"image": "RGB from 0 to 255", **found.about},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as scratch:
        if path.suffix == ".pt2":
            with scratch.open("wb") as file:
                extra = {METADATA_NAME: json.dumps(metadata)}
                torch.export.save(program, file, extra_files=extra)
        else:
            _write_onnx(program, found, metadata, scratch)
    return found


class _OfRGB(nn.Module):
    """A network of RGB images, whatever order of channels its own has."""

    def __init__(self, network: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.network, self.order = network, list(order)

    def forward(self, image: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.order != sorted(self.order):
            image = image[:, self.order]
        return self.network(image, *others)


def _channel_order(predictor: Predictor) -> list[int]:
    """Read off a sample which channel of RGB each channel of the model is."""
    probe = np.tile(np.arange(3, dtype=np.uint8), (_SMALLEST_SIDE, _SMALLEST_SIDE, 1))
    return predictor.prepare(probe)["image"][:, 0, 0].tolist()


def _write_onnx(
    program: torch.export.ExportedProgram,
    found: Exportable,
    metadata: Mapping[str, object],
    path: Path,
) -> None:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    made = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=list(found.inputs),
        output_names=list(found.outputs),
    )
    for value in made.model.graph.inputs:
        for side, name in found.dynamic.get(value.name, {}).items():
            value.shape[side] = name
    for key, value in metadata.items():
        made.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    made.save(str(path))
