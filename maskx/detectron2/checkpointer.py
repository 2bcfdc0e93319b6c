"""Checkpoints of Detectron2: written whole, read without running code, never stuck on a bad one."""

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from maskx.core.archives import find_damage, read_archive
from maskx.core.array_pickles import read_array_pickle
from maskx.core.files import written_text, written_whole
from maskx.engine.checkpoints import (
    check_finite,
    newest_whole,
    write_checkpoint,
)

logger = logging.getLogger(__name__)

FINAL_NAME = "model_final.pth"
_LAST = "last_checkpoint"


class MaskXCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, for files that may be damaged or hostile.

    A checkpoint is written beside, read back and checked to be finite before it takes its name.
    Of those that lie in the folder the newest whole one is gone on from. ``.pth`` files hold plain
    values and tensors, ``.pkl`` files of the model zoo and of Caffe2 arrays: whatever else they
    hold is refused and not run.

    Args:
        images: names the images that were learned from last, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        images: Callable[[], Iterable[Any]] = tuple,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._images = images

    def save(self, name: str, **kwargs: Any) -> None:
        """Write a checkpoint; where that fails, or a weight is not finite, the last one stays."""
        if not self.save_dir or not self.save_to_disk:
            return
        weights = self.model.state_dict()
        iteration = kwargs.get("iteration")
        when = "at the end" if iteration is None else f"after iteration {iteration}"
        check_finite(weights, when=when, images=self._images())
        content = {"model": weights}
        content |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        write_checkpoint(path, content | kwargs)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write down, in one step, which checkpoint is the last."""
        with written_text(os.path.join(self.save_dir, _LAST)) as file:
            file.write(last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Whether there is a whole checkpoint of a training in the folder."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Return the last checkpoint, the newest whole one where that is damaged, or ""."""
        folder = Path(self.save_dir)
        last = folder / _LAST
        # A loss of power may leave anything in it; names of checkpoints are short.
        named = last.read_text(errors="replace")[:255].strip() if last.is_file() else ""
        if named and os.path.isfile(folder / named) and find_damage(folder / named) is None:
            return str(folder / named)
        saved = list(folder.glob("model_*.pth"))
        found = newest_whole(saved)
        if found is None and saved:
            logger.warning("All %d checkpoints in '%s' are damaged.", len(saved), folder)
        if found is not None:
            logger.warning(
                "%s names %s, which is missing or damaged. Going on from %s, the newest that is "
                "whole.",
                last,
                repr(named) if named else "nothing",
                found,
            )
        return "" if found is None else str(found)

    def write_final(self) -> None:
        """Make the final checkpoint of the last one where a kill left it damaged or unwritten.

        A training that resumes at its end makes no step, so Detectron2 would not write it again.
        """
        final, source = Path(self.save_dir) / FINAL_NAME, self.get_checkpoint_file()
        if source and Path(source) != final:
            with written_whole(final, durable=True) as scratch:
                shutil.copyfile(source, scratch)
        self.tag_last_checkpoint(FINAL_NAME)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            content = _zoo_weights(filename)
        elif filename.endswith(".pyth"):  # Detectron2 would run code that it holds
            content = _pycls_weights(self._torch_load(filename), filename)
        else:
            content = super()._load_file(filename)
        _check_weights(content["model"], filename)
        return content

    def _torch_load(self, f: str) -> Any:
        content = read_archive(f)
        if not isinstance(content, dict):
            raise ValueError(
                f"'{f}' holds a {type(content).__name__}, so it is no checkpoint. Give the "
                "model_final.pth of a training."
            )
        return content


def read_weights(filename: str) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, or of a state dict alone, without a model for them."""
    content = read_archive(PathManager.get_local_path(filename.partition("?")[0]))
    weights = content.get("model", content) if isinstance(content, dict) else content
    _check_weights(weights, filename)
    return weights


def _zoo_weights(filename: str) -> dict[str, Any]:
    """Arrange the arrays of a file of the model zoo, or of Caffe2, as Detectron2 expects them."""
    content = read_array_pickle(filename)
    if not isinstance(content, dict):
        raise ValueError(
            f"'{filename}' holds a {type(content).__name__}. Allowed: a dictionary of weights."
        )
    if "model" in content and "__author__" in content:
        return content
    blobs = content.get("blobs", content)
    _check_weights(blobs, filename)
    weights = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _pycls_weights(content: dict[str, Any], filename: str) -> dict[str, Any]:
    """Arrange the weights of a file of pycls as Detectron2 expects them."""
    weights = content.get("model_state")
    _check_weights(weights, filename)
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def _check_weights(weights: Any, filename: str) -> None:
    """Refuse what is no table of tensors or arrays by name."""
    found: Any = type(weights).__name__
    if isinstance(weights, dict):
        found = next(
            (
                f"{name!r:.80}: {type(value).__name__}"
                for name, value in weights.items()
                if not (isinstance(name, str) and isinstance(value, Tensor | np.ndarray))
            ),
            None,
        )
    if found is not None:
        raise ValueError(
            f"'{filename}' holds {found} in the place of weights. Allowed: tensors or arrays by "
            "name. Give the model_final.pth of a training."
        )
