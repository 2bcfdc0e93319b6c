"""What a system is to the tools: a few callables, registered by name."""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a help text waits for none of these
    import torch
    from torch import Tensor, nn

    from maskx.data.masks import PastedMasks
    from maskx.engine.batches import RecordMapper
    from maskx.engine.model_export import Exportable
    from maskx.engine.options import QuickstartOptions
    from maskx.engine.results import Prediction
    from maskx.engine.runs import Run
    from maskx.supervision import CategorySplit

    Similarity = Callable[[nn.Module, Mapping[str, Any], Sequence[tuple[int, int]]], Tensor]
    MakeSamples = Callable[[Mapping[str, Any], Sequence[str], CategorySplit], RecordMapper]


class Scores(Protocol):
    """Counts of an evaluation, which stream and merge."""

    def update(self, record: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Take in the result of an image."""

    def merge(self, other: "Scores") -> None:
        """Take in what another process counted."""

    def results(self) -> dict[str, Any]:
        """Return the metrics, in percent, by task and name."""


@dataclass(frozen=True)
class PhotoRecipe:
    """What the quick start of a system does on photographs, tuned on them, and what came of it.

    Attributes:
        title: what is done, in a sentence.
        options: of the quick start, in place of its defaults; ``iterations``, ``batch_size`` and
            ``image_size`` are among them.
        step_seconds: of a photograph in a training step, on two CPU cores; of several trainings
            of as many steps, in a step of each.
        image_seconds: of what is done once with a photograph, such as its features, likewise.
        measured: what was measured, and on what, in a sentence.
        masks: of the data that this was measured on, in label maps one for each category in an
            image; 0 where they had no part in it.
        categories: with masks, of the same data.
    """

    title: str
    options: Mapping[str, Any]
    step_seconds: float
    image_seconds: float
    measured: str
    masks: int = 0
    categories: int = 0


@dataclass(frozen=True)
class System:
    """A system, as trainer, command line, quick start and studies see it.

    A model maps a list of samples to losses in training and to a list of results in evaluation.
    One that trains in one step gives ``build``, ``samples`` and ``scores``: then
    :func:`maskx.engine.pipeline.one_stage_system` makes all of it, and
    :func:`maskx.detectron2.adapters.hooks_of_system` trains it on Detectron2.

    Attributes:
        pipeline: the quick start: from data to ``metrics.json``, called with options and with what
            receives the lines for the reader.
        open: loads the trained model of a run folder of the embedded host onto a device. Its
            method ``prepare``, if it has one, makes its sample of an (H, W, 3) uint8 RGB image.
        prediction: turns the result of an image, with the class names, into what people expect.
        box_masks: segments given objects: called with the model, a sample, (R, 4) XYXY boxes in
            pixels of the file and (R,) class indices; None for a system that makes label maps.
        exportable: makes, of a trained model and its class names, a network of tensors; None where
            there is none.
        similarity: makes the figure of the paper that shows how alike features are: called with the
            model, a sample and P pixels (x, y) of its image, gives (P, h, w) numbers, how alike
            every position is to each of them; None where the paper has no such figure.
        has_background: whether its label maps have one; else pixels that nobody labelled are
            unknown.
        takes_concepts: whether a predictor can be asked for ``concepts`` by name.
        learns_from: kinds of half-labelled data that it is for, see
            :data:`maskx.data.overview.KINDS`.
        options: names of the options of the quick start that have a meaning for it alone.
        photos: its quick start on photographs; None where there are no settings for them.
        build: makes a model of settings and class names.
        samples: makes, of the same and the category split, what makes training samples.
        scores: makes, of class names and split, what counts an evaluation.
        words: what its stages, methods and measures are called where people read them, by the names
            in ``metrics.json`` and of the folders; others are read as they are.
    """

    name: str
    title: str
    pipeline: "Callable[[QuickstartOptions, Callable[[str], None]], dict[str, Any]]"
    open: "Callable[[Run, torch.device], nn.Module] | None" = None
    prediction: "Callable[[Mapping[str, Any], Sequence[str]], Prediction] | None" = None
    box_masks: "Callable[[nn.Module, Mapping[str, Any], Tensor, Tensor], PastedMasks] | None" = None
    exportable: "Callable[[nn.Module, Sequence[str]], Exportable] | None" = None
    similarity: "Similarity | None" = None
    has_background: bool = True
    takes_concepts: bool = False
    learns_from: tuple[str, ...] = ()
    options: frozenset[str] = frozenset()
    photos: PhotoRecipe | None = None
    build: "Callable[[Mapping[str, Any], Sequence[str]], nn.Module] | None" = None
    samples: "Callable[[Mapping[str, Any], Sequence[str], CategorySplit], RecordMapper] | None" = (
        None
    )
    scores: "Callable[[Sequence[str], CategorySplit], Scores] | None" = None
    words: Mapping[str, str] = field(default_factory=dict)


_SYSTEMS: dict[str, System | str] = {}


def register_system(name: str, system: System | str) -> None:
    """Make a system known; again with the same does nothing.

    Args:
        system: the system, or "module:attribute", which is imported when it is asked for.
    """
    if _SYSTEMS.setdefault(name, system) != system:
        raise ValueError(f"The system {name!r} is registered already, as {_SYSTEMS[name]!r}.")


def system_names() -> tuple[str, ...]:
    """Names of the systems that are registered, in the order of their registration."""
    return tuple(_SYSTEMS)


@functools.cache
def _imported(path: str) -> System:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def find_system(name: str) -> System:
    """Return a system."""
    if name not in _SYSTEMS:
        raise ValueError(
            f"There is no system {name!r}. Allowed: {', '.join(_SYSTEMS)}. One of another package "
            "is there once that is imported."
        )
    system = _SYSTEMS[name]
    return _imported(system) if isinstance(system, str) else system
