"""Weights of the reference implementation of Mask^X R-CNN, under the names of Detectron2.

The authors of "Learning to Segment Every Thing" (Hu et al., CVPR 2018) trained with Detectron on
Caffe2. Its files are pickles of Python 2: ``{"blobs": {name: array}, "cfg": text}``. Here they are
read without running code, every blob is named and its shape checked, and the rows of the classes
are put in Detectron2's order: Caffe2's background is the first row everywhere, Detectron2's the
last row of the classifier and absent elsewhere. The other rows keep their order.

For lack of memory the authors cut the box predictor of Visual Genome, 3002 rows, down to 81 to
train masks, and kept all rows in blobs "..._jcvbackup". Where there are such blobs, they are taken.

Legend of sizes:
    K: number of foreground classes; D: channels that enter the box predictor; C: channels of the
    mask head; M: resolution of the masks; E: length of the input of T for one class.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskx.core.array_pickles import read_array_pickle
from maskx.core.text import listed

# Bottleneck blocks of the stages res2 to res5, by depth.
_RESNETS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_STAGES = (2, 3, 4, 5)

_MASK_HEAD = "roi_heads.mask_head"
_BACKUP = "_jcvbackup"

# Detectron2's eps: with this variance its frozen batch norm is exactly Caffe2's scale and bias.
_BATCH_NORM_EPS = 1e-5

# Blobs that a trained model has no use for, and why. Detectron saves whatever was in the file that
# a run started from, so the remains of ImageNet training and of earlier stages come along.
_EXPECTED_REST = {
    r".+_momentum": "momentum of the optimiser",
    r"lr|iter|.+_iter(ation)?": "state of the optimiser",
    r"fc1000_[wb]": "ImageNet classifier",
    r"(conv1|res[2-5]_\d+_branch(1|2[abc]))_b": "bias of the ImageNet model, not used by Detectron",
    r"(cls_score|bbox_pred)_[wb]": "rows of COCO, cut out of the backup that has all classes",
    r"v_\w+": "class vectors that this mask head does not read",
}


@dataclass(frozen=True)
class Caffe2Architecture:
    """What a file holds; the values are those of `maskx.systems.maskx_rcnn.mask_head.MaskXHead`.

    Attributes:
        depth: of the ResNet.
        num_classes: K.
        has_rpn: False for a Fast R-CNN, which takes its proposals from elsewhere.
        predictor: of masks; None for a detector without masks.
        num_convs: convolutions of the mask head.
        mlp: ``single_fc`` or ``none``.
        transfer_inputs: what T reads; None without T, as below.
        transfer_layers: number of layers of T.
        transfer_activation: activation between them; None as well where the file does not say or
            there is a single layer. The authors' default is ``leaky_relu``.
    """

    depth: int
    num_classes: int
    has_rpn: bool
    predictor: str | None = None
    num_convs: int = 0
    mlp: str = "none"
    transfer_inputs: str | None = None
    transfer_layers: int | None = None
    transfer_activation: str | None = None


@dataclass(frozen=True)
class ConvertedWeights:
    """Weights under Detectron2's names, and what became of every blob.

    Attributes:
        weights: float32, by the parameter names of Detectron2's ``GeneralizedRCNN``.
        architecture: what the file holds.
        converted: names of the blobs that are in ``weights``.
        left_out: blobs that no model needs, with the reason.
        unknown: blobs that are not known, with their shape; empty unless they were allowed.
    """

    weights: dict[str, Tensor]
    architecture: Caffe2Architecture
    converted: list[str]
    left_out: dict[str, str]
    unknown: dict[str, str]


def convert_caffe2_file(
    path: str | os.PathLike, *, allow_unknown: bool = False
) -> ConvertedWeights:
    """Read a weights file of the reference implementation and rename its weights.

    Args:
        path: a ``.pkl`` file: a detector, or a Mask^X R-CNN or baseline, with a ResNet and FPN.
        allow_unknown: leave blobs out that are not known, instead of refusing the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds more than data, lacks a weight, has one of a wrong
            shape or one that is not known. The message names it.
    """
    blobs, config_text = read_caffe2_file(path)
    try:
        return convert_caffe2_blobs(blobs, config_text, allow_unknown=allow_unknown)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_detectron2_checkpoint(converted: ConvertedWeights, path: str | os.PathLike) -> None:
    """Write a checkpoint that Detectron2 loads by plain names and that holds tensors alone.

    Args:
        converted: what to write.
        path: must end in ``.pth``: Detectron2 goes by the ending. Its folder is made.
    """
    path = Path(path)
    if path.suffix != ".pth":
        raise ValueError(
            f"{path} must end in '.pth': Detectron2 would read another ending in another way."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "model": converted.weights,
        "__author__": "seg_every_thing",
        "matching_heuristics": False,  # the names are complete
    }
    torch.save(content, path)


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def read_caffe2_file(path: str | os.PathLike) -> tuple[dict[str, Any], str]:
    """Read the blobs of a Caffe2 weights file without running code from it.

    Args:
        path: a pickle of any protocol up to 4, written by Python 2 or 3.

    Returns:
        The blobs by name, read-only arrays as they are in the file, and the text of the
        configuration that the file was trained with ("" where it has none).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no pickle, is damaged, or holds more than arrays of numbers and
            plain containers. The message names what.
    """
    content = read_array_pickle(path)
    content = content if isinstance(content, dict) else {}
    blobs = content.get("blobs")
    if not isinstance(blobs, dict) or not blobs:
        found = ", ".join(map(repr, list(content)[:5])) or "no dictionary"
        raise ValueError(
            f"{path} has no 'blobs'; it holds: {found}. Allowed: a model saved by Detectron, that "
            "is a pickled dictionary with 'blobs' (arrays by name) and 'cfg'."
        )
    config_text = content.get("cfg", "")
    return blobs, config_text if isinstance(config_text, str) else ""


# --------------------------------------------------------------------------------------------------
# Naming
# --------------------------------------------------------------------------------------------------


def _as_is(weight: Tensor) -> Tensor:
    return weight


def _background_last(weight: Tensor) -> Tensor:
    return torch.cat([weight[1:], weight[:1]])


def _without_background(rows: int) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight[rows:].clone()  # a view would be saved with what it leaves out


class _Entry(NamedTuple):
    """One blob, the weight that it becomes, its shape (see ``_sizes``), and what is done to it."""

    blob: str
    weight: str
    shape: tuple[str | int, ...]
    change: Callable[[Tensor], Tensor] = _as_is


def convert_caffe2_blobs(
    blobs: Mapping[str, Any], config_text: str = "", *, allow_unknown: bool = False
) -> ConvertedWeights:
    """Rename the weights of a model of the reference implementation.

    Args:
        blobs: arrays by Caffe2's names.
        config_text: the configuration saved beside them; two facts that the blobs do not show are
            taken from it: the activation of T and the name of the class vectors.
        allow_unknown: leave blobs out that are not known, instead of refusing them.

    Raises:
        ValueError: as in :func:`convert_caffe2_file`.
    """
    arrays = {name: blob for name, blob in blobs.items() if isinstance(blob, np.ndarray)}
    backup = _BACKUP if f"cls_score_w{_BACKUP}" in arrays else ""
    found = _architecture(arrays, backup)
    entries = [*_backbone(found.depth), *_box_head(backup)]
    if found.has_rpn:
        entries += _rpn()
    if found.predictor is not None:
        entries += _mask_head(found)
    missing = [entry.blob for entry in entries if entry.blob not in arrays]
    if missing:
        raise ValueError(
            f"Blobs of a ResNet-{found.depth} FPN detector are missing ({len(missing)}): "
            f"{listed(missing)}. The file is incomplete, or its model is of a kind that is not "
            "converted."
        )
    sizes = _sizes(arrays, backup)
    if found.predictor == "transfer":
        found, vectors = _transfer_facts(found, arrays, sizes, config_text)
        entries += vectors

    converted = [entry.blob for entry in entries]
    left_out, unknown = _explain({name: blobs[name] for name in blobs.keys() - set(converted)})
    if unknown and not allow_unknown:
        shown = listed([f"{name} {shape}" for name, shape in unknown.items()])
        raise ValueError(
            f"Blobs of the file are not known ({len(unknown)}): {shown}. A model that reads them "
            "computes something else than the converted one. If none does, leave them out with "
            "--allow-unknown (allow_unknown=True)."
        )
    weights = dict(_converted(entries, arrays, sizes))
    return ConvertedWeights(weights, found, converted, left_out, unknown)


def _architecture(arrays: Mapping[str, np.ndarray], backup: str) -> Caffe2Architecture:
    """Tell by the names of the blobs what model they are of."""
    blocks = tuple(_count(arrays, rf"res{stage}_(\d+)_branch2a_w", first=0) for stage in _STAGES)
    depths = [depth for depth, its_blocks in _RESNETS.items() if its_blocks == blocks]
    if not depths:
        allowed = "; ".join(f"{b} (ResNet-{depth})" for depth, b in _RESNETS.items())
        raise ValueError(
            f"The stages res2 to res5 have {blocks} blocks with a blob 'res*_*_branch2a_w'. "
            f"Allowed: {allowed}."
        )
    detector = Caffe2Architecture(
        depth=depths[0],
        num_classes=_size(arrays, f"cls_score_w{backup}", 0) - 1,
        has_rpn=_any(arrays, "conv_rpn", "rpn_"),
    )
    if not _any(arrays, "_[mask]_", "conv5_mask", "mask_", "bbox2mask_"):
        return detector
    transfer_layers = None
    if _any(arrays, "bbox2mask_", "mask_fcn_logits_w_flat"):
        predictor = "transfer"
        transfer_layers = 1 + _count(arrays, r"bbox2mask_mlp_l(\d+)_w")
    elif _size(arrays, "mask_fcn_logits_w", 0) == 1:
        predictor = "class_agnostic"
    else:
        predictor = "class_specific"
    return replace(
        detector,
        predictor=predictor,
        num_convs=_count(arrays, r"_\[mask\]_fcn(\d+)_w") or 4,  # 4: then all are missing
        mlp="single_fc" if _any(arrays, "mask_mlp_") else "none",
        transfer_layers=transfer_layers,
    )


def _backbone(depth: int) -> Iterator[_Entry]:
    bottom_up = "backbone.bottom_up"
    yield from _conv_norm("conv1", "res_conv1_bn", f"{bottom_up}.stem.conv1", ("stem", 3, 7, 7))
    previous = "stem"
    for stage, num_blocks in zip(_STAGES, _RESNETS[depth], strict=True):
        inner, outer = f"res{stage} inner", f"res{stage}"
        for block in range(num_blocks):
            convs = {
                "2a": ("conv1", (inner, previous, 1, 1)),
                "2b": ("conv2", (inner, inner, 3, 3)),
                "2c": ("conv3", (outer, inner, 1, 1)),
            }
            if block == 0:
                convs["1"] = ("shortcut", (outer, previous, 1, 1))
            for branch, (name, shape) in convs.items():
                blob = f"res{stage}_{block}_branch{branch}"
                weight = f"{bottom_up}.res{stage}.{block}.{name}"
                yield from _conv_norm(blob, f"{blob}_bn", weight, shape)
            previous = outer
        top = f"res{stage}_{num_blocks - 1}_sum"
        # The coarsest level is not added to anything: its name says no "lateral".
        lateral = f"fpn_inner_{top}" if stage == _STAGES[-1] else f"fpn_inner_{top}_lateral"
        yield from _layer(lateral, f"backbone.fpn_lateral{stage}", ("fpn", outer, 1, 1))
        yield from _layer(f"fpn_{top}", f"backbone.fpn_output{stage}", ("fpn", "fpn", 3, 3))


def _rpn() -> Iterator[_Entry]:
    # Its weights are named after the finest level and shared by all.
    head = "proposal_generator.rpn_head"
    yield from _layer("conv_rpn_fpn2", f"{head}.conv", ("fpn", "fpn", 3, 3))
    yield from _layer("rpn_cls_logits_fpn2", f"{head}.objectness_logits", ("anchors", "fpn", 1, 1))
    yield from _layer("rpn_bbox_pred_fpn2", f"{head}.anchor_deltas", ("anchors x 4", "fpn", 1, 1))


def _box_head(backup: str) -> Iterator[_Entry]:
    head, predictor = "roi_heads.box_head", "roi_heads.box_predictor"
    yield from _layer("fc6", f"{head}.fc1", ("fc6", "box features"))
    yield from _layer("fc7", f"{head}.fc2", ("fc7", "fc6"))
    for name, rows, change in (
        ("cls_score", "classes", _background_last),
        ("bbox_pred", "classes x 4", _without_background(4)),
    ):
        for entry in _layer(name, f"{predictor}.{name}", (rows, "fc7"), change):
            yield entry._replace(blob=f"{entry.blob}{backup}")


def _mask_head(found: Caffe2Architecture) -> Iterator[_Entry]:
    for conv in range(1, found.num_convs + 1):
        shape = ("mask", "fpn" if conv == 1 else "mask", 3, 3)
        yield from _layer(f"_[mask]_fcn{conv}", f"{_MASK_HEAD}.mask_fcn{conv}", shape)
    # A transposed convolution: input channels first, as in PyTorch.
    yield from _layer("conv5_mask", f"{_MASK_HEAD}.deconv", ("mask", "mask", 2, 2))

    predictor = f"{_MASK_HEAD}.predictor"
    if found.predictor == "transfer":
        layers = [f"bbox2mask_mlp_l{layer}" for layer in range(1, found.transfer_layers)]
        for layer, blob in enumerate([*layers, "mask_fcn_logits_w_flat"]):
            # Between the layers of the sequence are activations, hence every other number.
            shape = ("mask", "class inputs" if layer == 0 else "mask")
            yield from _layer(blob, f"{predictor}.layers.{2 * layer}", shape)
    elif found.predictor == "class_agnostic":
        yield from _layer("mask_fcn_logits", predictor, (1, "mask", 1, 1))
    else:
        shape = ("classes", "mask", 1, 1)
        yield from _layer("mask_fcn_logits", predictor, shape, _without_background(1))
    if found.mlp == "single_fc":
        shape = ("mask pixels", "mask features")
        yield from _layer("mask_mlp_logits_raw", f"{_MASK_HEAD}.mlp.fc", shape)


def _conv_norm(blob: str, norm: str, weight: str, shape: tuple) -> Iterator[_Entry]:
    """A convolution without bias, and batch norm that was folded to a scale and a bias."""
    yield _Entry(f"{blob}_w", f"{weight}.weight", shape)
    yield _Entry(f"{norm}_s", f"{weight}.norm.weight", shape[:1])
    yield _Entry(f"{norm}_b", f"{weight}.norm.bias", shape[:1])


def _layer(
    blob: str, weight: str, shape: tuple, change: Callable[[Tensor], Tensor] = _as_is
) -> Iterator[_Entry]:
    """A layer with a bias."""
    yield _Entry(f"{blob}_w", f"{weight}.weight", shape, change)
    yield _Entry(f"{blob}_b", f"{weight}.bias", shape[:1], change)


def _sizes(arrays: Mapping[str, np.ndarray], backup: str) -> dict[str, int]:
    """The sizes that shapes are checked against, each read off one blob.

    They are checked against each other, not against those of the paper, so that models of any
    width convert.
    """
    sizes = {
        "stem": _size(arrays, "conv1_w", 0),
        "fpn": _size(arrays, "fpn_res2_2_sum_w", 0),
        "anchors": _size(arrays, "rpn_cls_logits_fpn2_w", 0),
        "fc6": _size(arrays, "fc6_w", 0),
        "fc7": _size(arrays, "fc7_w", 0),
        "classes": _size(arrays, f"cls_score_w{backup}", 0),  # with background
        "mask": _size(arrays, "conv5_mask_w", 0),
    }
    for stage in _STAGES:
        sizes[f"res{stage} inner"] = _size(arrays, f"res{stage}_0_branch2a_w", 0)
        sizes[f"res{stage}"] = _size(arrays, f"res{stage}_0_branch2c_w", 0)
    sizes["anchors x 4"], sizes["classes x 4"] = 4 * sizes["anchors"], 4 * sizes["classes"]
    # Pooled features and masks are square.
    pool_size = math.isqrt(_size(arrays, "fc6_w", 1) // max(sizes["fpn"], 1))
    mask_size = math.isqrt(_size(arrays, "mask_mlp_logits_raw_w", 0))
    sizes["box features"] = sizes["fpn"] * pool_size**2
    sizes["mask pixels"], sizes["mask features"] = mask_size**2, sizes["mask"] * mask_size**2
    return sizes


def _transfer_facts(
    found: Caffe2Architecture,
    arrays: Mapping[str, np.ndarray],
    sizes: dict[str, int],
    config_text: str,
) -> tuple[Caffe2Architecture, list[_Entry]]:
    """Tell what T reads by the length of its input, which is added to ``sizes``."""
    first = "mask_fcn_logits_w_flat_w" if found.transfer_layers == 1 else "bbox2mask_mlp_l1_w"
    length = sizes["class inputs"] = _size(arrays, first, 1)
    activation = None
    says = re.search(r"\bUSE_LEAKYRELU:\s*(true|false)", config_text)
    if says and found.transfer_layers > 1:
        activation = "leaky_relu" if says[1] == "true" else "relu"
    channels = sizes["fc7"]
    inputs = {channels: "cls", 4 * channels: "box", 5 * channels: "cls+box"}.get(length)
    entries = []
    if inputs is None:
        blob = _class_vectors_blob(arrays, (sizes["classes"], length), first, config_text)
        inputs = "randn" if "randn" in blob else "vectors"
        weight, shape = f"{_MASK_HEAD}.predictor.class_vectors", ("classes", "class inputs")
        entries = [_Entry(blob, weight, shape, _without_background(1))]
    return replace(found, transfer_inputs=inputs, transfer_activation=activation), entries


def _class_vectors_blob(
    arrays: Mapping[str, np.ndarray], shape: tuple[int, int], first: str, config_text: str
) -> str:
    """Find the fixed vectors that T reads. A file may hold several of one shape."""
    says = re.search(r"\bPRETRAINED_EMBED_NAME:\s*(?:!!\S+\s+)?['\"]?(\w+)", config_text)
    fits = [n for n, a in arrays.items() if re.fullmatch(r"v_\w+", n) and a.shape == shape]
    if says and says[1] in arrays:
        return says[1]
    if len(fits) != 1:
        raise ValueError(
            f"The weight transfer reads {shape[1]} numbers per class ('{first}'). That fits "
            "neither the box predictor nor a single blob of class vectors 'v_*' of shape "
            f"{shape}, of which there are {len(fits)}: {listed(fits) or 'none'}."
        )
    return fits[0]


def _explain(rest: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Sort the blobs that are not converted into expected ones (why) and unknown ones (shape)."""
    left_out, unknown = {}, {}
    for name, blob in sorted(rest.items()):
        reasons = [why for pattern, why in _EXPECTED_REST.items() if re.fullmatch(pattern, name)]
        if reasons:
            left_out[name] = reasons[0]
        elif blob is None:
            left_out[name] = "empty"
        else:
            unknown[name] = str(getattr(blob, "shape", type(blob).__name__))
    return left_out, unknown


def _converted(
    entries: list[_Entry], arrays: Mapping[str, np.ndarray], sizes: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    for blob, weight, symbols, change in entries:
        array = arrays[blob]
        expected = tuple(sizes.get(symbol, symbol) for symbol in symbols)
        if array.shape != expected:
            raise ValueError(
                f"Blob '{blob}' has shape {array.shape}, but {expected} goes with the other blobs."
            )
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(
                f"Blob '{blob}' ({array.dtype}) holds something else than finite floating-point "
                "numbers. The file is damaged, or its training diverged."
            )
        yield weight, change(torch.from_numpy(array.astype(np.float32)))
        if weight.endswith(".norm.weight"):
            channels, norm = array.shape, weight.removesuffix(".weight")
            yield f"{norm}.running_mean", torch.zeros(channels)
            yield f"{norm}.running_var", torch.full(channels, 1 - _BATCH_NORM_EPS)


def _any(names: Iterable[str], *prefixes: str) -> bool:
    """Whether there is a blob of such a name, apart from those that nothing reads."""
    return any(name.startswith(prefixes) and not name.endswith("_momentum") for name in names)


def _count(names: Iterable[str], pattern: str, first: int = 1) -> int:
    """Number of layers that are numbered in the names of blobs, from the highest number."""
    matches = (re.fullmatch(pattern, name) for name in names)
    return max((int(match[1]) + 1 - first for match in matches if match), default=0)


def _size(arrays: Mapping[str, np.ndarray], blob: str, axis: int) -> int:
    """A dimension of a blob; 0 where there is none, which no shape of a weight agrees with."""
    shape = arrays[blob].shape if blob in arrays else ()
    return shape[axis] if axis < len(shape) else 0
