"""Trainings that start from the weights of a trained run, whatever its categories."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskx.core.extra_state import EXTRA_STATE
from maskx.core.text import listed
from maskx.engine.runs import Origin, origin_of, read_run
from maskx.engine.training import read_checkpoint

__all__ = ["Start", "read_start"]

Build = Callable[[Sequence[str]], nn.Module]
"""Builds the network of some categories."""


@dataclass(frozen=True)
class Start:
    """Weights of a trained run.

    Attributes:
        class_names: by class index, of the run.
        weights: its state dict.
        origin: of its weights, for the run that starts from it.
        source: where it was read.
    """

    class_names: tuple[str, ...]
    weights: dict[str, Tensor]
    origin: Origin
    source: str

    def describe(self, class_names: Sequence[str]) -> str:
        """Say in a line which categories of a training are known already."""
        new = [name for name in class_names if name not in self.class_names]
        known = len(class_names) - len(new)
        words = f"Starts from '{self.source}', which knows {known} of {len(class_names)} categories"
        return f"{words}; new: {listed(new)}." if new else f"{words}."

    def give_to(self, build: Build, class_names: Sequence[str]) -> nn.Module:
        """Build the network of a training and give it the weights of the run.

        What belongs to a category goes to the category of the same name; others, and what the run
        does not have, keep their initial values.

        Raises:
            ValueError: the network is another one.
        """
        model = build(class_names)
        own = model.state_dict()
        with torch.random.fork_rng(devices=[]):
            shapes = {
                key: value.shape for key, value in build([*class_names, ""]).state_dict().items()
            }
        misfits = []
        for key, value in own.items():
            found = self.weights.get(key)
            if found is None or key.endswith(EXTRA_STATE):  # which says what the network is
                continue
            if shapes[key] == value.shape:  # no matter of the categories
                if found.shape != value.shape:
                    misfits.append(f"{key} {tuple(found.shape)} instead of {tuple(value.shape)}")
                own[key] = found
            elif shapes[key][1:] == value.shape[1:] == found.shape[1:]:
                rows = shapes[key][0] - value.shape[0]
                own[key] = self._rows(found, value, rows, class_names)
        unused = [key for key in self.weights if key not in own]
        # An average of the weights, which some trainings keep, is half of a checkpoint.
        if misfits or len(unused) > 0.6 * len(self.weights):
            raise ValueError(
                f"'{self.source}' is of another network: {listed(misfits or unused)}. Give the "
                "same backbone and options, or a run of such a network."
            )
        model.load_state_dict(own)
        return model

    def _rows(self, found: Tensor, value: Tensor, rows: int, class_names: Sequence[str]) -> Tensor:
        """Take the rows of categories by name; those before them are of the background."""
        first = len(value) - rows * len(class_names)
        value = value.clone()
        value[:first] = found[:first]
        index_of = {name: index for index, name in enumerate(self.class_names)}
        for index, name in enumerate(class_names):
            if name in index_of:
                there = first + rows * index_of[name]
                here = first + rows * index
                value[here : here + rows] = found[there : there + rows]
        return value


def read_start(source: str | os.PathLike[str], system: str) -> Start:
    """Read the weights of a run folder, or of a model file.

    Raises:
        FileNotFoundError: there is no such run, or it has no weights.
        ValueError: the run is of another system or host, or its weights are damaged.
    """
    run = read_run(source)
    if (run.system, run.host) != (system, "pip"):
        raise ValueError(
            f"'{source}' holds a run of {run.system} on {run.host}. A training of {system} on pip "
            "starts from one of its own kind."
        )
    weights = read_checkpoint(run.weights_file, "cpu")["model"]
    return Start(run.class_names, weights, origin_of(run.weights_file), str(source))
