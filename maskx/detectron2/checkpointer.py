"""Checkpoints of Detectron2: written whole, read without running code, never stuck on a bad one."""

import logging
import os
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from maskx.core.array_pickles import read_array_pickle
from maskx.core.files import written_text
from maskx.engine.checkpoints import (
    check_finite,
    find_damage,
    newest_whole,
    read_archive,
    write_checkpoint,
)

__all__ = ["MaskXCheckpointer"]

logger = logging.getLogger(__name__)

_LAST = "last_checkpoint"


class MaskXCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, for files that may be damaged or hostile.

    A checkpoint is written beside, read back and checked to be finite before it takes its name.
    Of those that lie in the folder the newest whole one is gone on from. ``.pth`` files hold plain
    values and tensors, ``.pkl`` files of the model zoo and of Caffe2 arrays: whatever else they
    hold is refused and not run.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write a checkpoint.

        Raises:
            FloatingPointError: a weight is not finite; the checkpoint before stays.
            OSError: it cannot be written; likewise.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        weights = self.model.state_dict()
        iteration = kwargs.get("iteration")
        check_finite(weights, when=f"after iteration {iteration}" if iteration else "at the end")
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
        named = last.read_text().strip() if last.is_file() else ""
        if named and (folder / named).is_file() and find_damage(folder / named) is None:
            return str(folder / named)
        found = newest_whole(folder.glob("model_*.pth")) if folder.is_dir() else None
        if found is not None:
            logger.warning(
                "%s names %s, which is missing or damaged. Going on from %s, the newest that is "
                "whole.",
                *(last, repr(named) if named else "nothing", found),
            )
        return "" if found is None else str(found)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            return _zoo_weights(filename)
        return super()._load_file(filename)

    def _torch_load(self, f: str) -> Any:
        content = read_archive(f)
        if not isinstance(content, dict):
            raise ValueError(
                f"'{f}' holds a {type(content).__name__}, so it is no checkpoint. Give the "
                "model_final.pth of a training."
            )
        return content


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
    weights = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
