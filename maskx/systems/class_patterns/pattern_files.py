"""Files of class patterns and of the moments they are found from: safetensors, whole or not at all.

Each file is one safetensors file: tensors, and in the metadata one JSON text that says what they
are. Reading a file executes no code.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskx.core.files import written_whole
from maskx.systems.class_patterns.pattern_moments import PatternMoments

# The metadata keeps no order among its keys, so one key holds everything.
_METADATA_KEY = "maskx"
_MOMENTS = "moments of class patterns"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], kind: str, content: Any) -> None:
    """Write tensors and a JSON text, whole or not at all, whenever the process is killed.

    Args:
        path: file to write; a file of this name is replaced.
        tensors: by name; a tensor on another device is copied.
        kind: what the file is, in words; see :func:`open_tensors`.
        content: plain values.
    """
    metadata = {_METADATA_KEY: json.dumps({"kind": kind, **content})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as scratch:
        save_file(tensors, str(scratch), metadata)


def read_content(path: Path, kind: str) -> dict[str, Any]:
    """Read what a file of :func:`write_tensors` says of its tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not of this kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}' with {kind}. Make it, or correct it.")
    try:
        with safe_open(str(path), framework="pt") as file:
            content = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"'{path}' is no safetensors file, or is damaged: {error}. Make it again."
        ) from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ValueError(
            f"'{path}' is a safetensors file, but not one with {kind}. Give the file that was "
            "written for them."
        )
    return content


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read the named tensors of a file, or all.

    Raises:
        ValueError: the file lacks one of them.
    """
    with safe_open(str(path), framework="pt") as file:
        there = set(file.keys())
        names = sorted(there) if names is None else list(names)
        missing = [name for name in names if name not in there]
        if missing:
            raise ValueError(f"'{path}' is damaged: it lacks the tensors {missing}. Make it again.")
        return {name: file.get_tensor(name) for name in names}


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
    content = read_content(path, _MOMENTS)
    moments = {}
    tensors = read_tensors(path)
    for layer, sizes in content["sizes"].items():
        moments[layer] = PatternMoments(**sizes, device=device)
        prefix = f"{layer}/"
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        try:
            moments[layer].load_state_dict(state)
        except ValueError as error:
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
        shared = {key: content["identity"][key] for key in ("network", "layers", "num_classes")}
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
