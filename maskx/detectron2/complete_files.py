"""Annotation files for COCO's own tools, which need keys that maskx does without."""

import os
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import NativePathHandler, get_cache_dir

from maskx.core.digests import sha256_of
from maskx.core.files import write_json
from maskx.data.coco import read_coco_json
from maskx.evaluation.average_precision import scored_annotations

__all__ = ["complete_when_asked"]


class _CompleteFile(NativePathHandler):
    """Gives a complete copy of one annotation file to those who ask Detectron2 for its place."""

    def __init__(self, json_file: str) -> None:
        super().__init__()
        self._json_file = json_file

    def _get_supported_prefixes(self) -> list[str]:
        return [self._json_file]

    def _get_local_path(self, path: str, force: bool = False, **options: Any) -> str:
        return str(_complete_copy(path)) if path == self._json_file else path


def complete_when_asked(json_file: str | os.PathLike[str]) -> None:
    """Let Detectron2's ``COCOEvaluator`` read a file with every ``iscrowd`` and ``area``.

    A missing ``iscrowd`` is 0; a missing ``area`` is that of the mask, or of the box where there is
    no mask. The copy is written into the cache folder of Detectron2 when it is first asked for.
    """
    PathManager.register_handler(_CompleteFile(os.fspath(json_file)), allow_override=True)


def _complete_copy(json_file: str) -> Path:
    copy = Path(get_cache_dir()) / "maskx" / f"{sha256_of(json_file)}.json"
    if not copy.exists():
        content = read_coco_json(json_file, strict=False)
        category_ids = [category["id"] for category in content["categories"]]
        annotations, _ = scored_annotations(content, category_ids, "bbox")
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_json(copy, {**content, "annotations": annotations}, compact=True)
    return copy
