"""Files of the moments that class patterns are found from; see `maskx.core.tensor_files`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from maskx.core.tensor_files import read_content, read_tensors, write_tensors
from maskx.systems.class_patterns.pattern_moments import PatternMoments

_MOMENTS = "moments of class patterns"
_MOMENTS_CONTENT = {"identity": dict, "done": int, "total": int, "images": str, "sizes": dict}


def save_moments(
    path: Path, moments: Mapping[str, PatternMoments], content: Mapping[str, Any]
) -> None:
    """Write the moments of each layer.

    Args:
        path: file to write.
        moments: by layer.
        content: plain values: ``identity`` (a dictionary: what the moments are defined by),
            ``done`` and ``total`` (numbers of images) and ``images`` (hash of the images seen).
    """
    tensors = {
        f"{layer}/{name}": tensor
        for layer, of_layer in moments.items()
        for name, tensor in of_layer.state_dict().items()
    }
    sizes = {
        layer: {"num_classes": m.num_classes, "channels": m.channels, "seed": m.seed}
        for layer, m in moments.items()
    }
    write_tensors(path, tensors, _MOMENTS, {**content, "sizes": sizes})


def load_moments(
    path: Path, *, device: torch.device | str = "cpu"
) -> tuple[dict[str, PatternMoments], dict[str, Any]]:
    """Read the moments of each layer and what :func:`save_moments` was told of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not one with moments.
    """
    content = read_content(path, _MOMENTS, _MOMENTS_CONTENT)
    moments = {}
    tensors = read_tensors(path)
    for layer, sizes in content["sizes"].items():
        prefix = f"{layer}/"
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        try:
            moments[layer] = PatternMoments(**sizes, device=device)
            moments[layer].load_state_dict(state)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"'{path}' is damaged: layer '{layer}': {error}") from error
    return moments, content


def merge_moments(paths: Sequence[Path]) -> dict[str, PatternMoments]:
    """Merge the files of several shards of the images; two of them are in memory at a time.

    Args:
        paths: one finished file of
            :func:`~maskx.systems.class_patterns.patterns.discover_class_patterns`
            per shard.

    Returns:
        The moments by layer.

    Raises:
        ValueError: a shard is not finished, is there twice, or is of another network or layers.
    """
    merged, identity, seen = {}, None, {}
    for path in paths:
        moments, content = load_moments(path)
        if content["done"] != content["total"]:
            raise ValueError(
                f"'{path}' holds {content['done']} of the {content['total']} images of its shard. "
                "Resume that run and merge when all are finished."
            )
        if content["images"] in seen:
            raise ValueError(
                f"'{path}' holds the same images as '{seen[content['images']]}'. Give the file of "
                "every shard once."
            )
        seen[content["images"]] = path
        shared = {k: content["identity"].get(k) for k in ("network", "layers", "num_classes")}
        if identity is None:
            merged, identity = moments, shared
            continue
        check_identity(path, shared, identity, f"'{paths[0]}'")
        for layer, of_layer in moments.items():
            merged[layer].merge(of_layer)
    return merged


def check_identity(
    path: Path, found: Mapping[str, Any], expected: Mapping[str, Any], what: str
) -> None:
    """Refuse a file that is defined by other values than expected.

    Raises:
        ValueError: names the file, the first key that differs and both values.
    """
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            raise ValueError(
                f"'{path}' was made with {key} {_shortened(found.get(key))}, but {what} has {key} "
                f"{_shortened(expected.get(key))}. Use files of the same, or make it anew."
            )


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
