"""Backbones of timm: any of its models that returns feature maps, by name."""

import contextlib
import copy
import functools
import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.backbones import Backbone, FeatureShape, FrozenStages
from maskx.core.checks import check_choice
from maskx.core.pretrained import Pretrained, find_weights, no_download, timm_name

__all__ = ["TimmBackbone", "can_dilate", "expected_pixels", "make_traceable"]

OUTPUT_STRIDES = (8, 16, 32)

# What a model says that does not know an argument, or not this value of it.
_REFUSALS = (TypeError, AssertionError, NotImplementedError, RuntimeError)


class _PaddedToSame(nn.Module):
    """TensorFlow's "same" convolution of timm with another formula for its padding.

    The sum that timm makes of maximum, ceiling and the size of each layer before keeps a tracer
    with symbolic sizes busy: EfficientNet-Lite0 was not traced in three minutes. With this one, of
    the same value, it takes 11 s.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        conv, padding = self.convolution, []
        for side in (1, 0):  # from the last dimension on
            window = (conv.kernel_size[side] - 1) * conv.dilation[side] + 1
            stride = conv.stride[side]
            total = window - stride + -x.shape[2 + side] % stride
            if window < stride:  # in no network known; a tracer takes one of the two
                total = max(total, 0)
            padding += [total // 2, total - total // 2]
        weights = conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups
        return F.conv2d(F.pad(x, padding), *weights)


def make_traceable(network: nn.Module) -> nn.Module:
    """Return a copy that computes the same and can be traced with symbolic image sizes.

    Args:
        network: any; convolutions of timm with TensorFlow's "same" padding are replaced in it.
    """
    from timm.layers import Conv2dSame

    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv2dSame):
                setattr(module, name, _PaddedToSame(child))
    return network


class TimmBackbone(Backbone):
    """A model of timm as a backbone.

    Feature maps are called by the stride that they have in the network as published: ``layer1`` is
    that of stride 4, ``layer2`` of 8, ``layer3`` of 16, ``layer4`` of 32 (as the stages of a
    ResNet). With an output stride below 32 the last of them have dilation instead of strides and
    keep their names. Finer maps are not returned. A transformer whose layers all have one stride
    returns ``tokens``: those of its last layer after the last norm, without the class token.

    The blocks of the last stage are known as ``C41``, ``C42``, and so on.

    Args:
        name: of the model, with or without the tag of its weights, e.g. ``resnet50.a1_in1k``; or
            ``efficientnet_lite0`` to ``efficientnet_lite2``, whose weights come as a package.
        output_stride: stride of the last map: 8, 16 or 32; None for that of the network. Most
            convolutional networks can have each, transformers their own alone.
        frozen_norm: batch norm as a fixed affine map, for batches too small for statistics. Other
            norms stay as they are.
        frozen_stages: how much of the network stays as it is: 0 nothing; 1 what comes before the
            first map; 2 the first map, too; one more than there are maps, or ``all``: all.
        pretrained: True: start from weights of an installed package (see the extra ``photos``),
            else of timm's hub. Or a file to start from, safetensors or a state dict, with timm's
            names.
        drop_path: probability with which a block is skipped in training.

    Attributes:
        name: timm's.
        input_size: the only (H, W) that the network takes; None if it takes any.

    Raises:
        ValueError: timm has no such model, or the model does not have what is asked for.
    """

    def __init__(
        self,
        name: str,
        *,
        output_stride: int | None = None,
        frozen_norm: bool = False,
        frozen_stages: FrozenStages = 0,
        pretrained: Pretrained = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.name = name = timm_name(name)
        self._form = form = _describe(name, output_stride)
        self._frozen_norm = frozen_norm
        self._drop_path = {"drop_path_rate": drop_path} if drop_path else {}
        self.feature_shapes = dict(form.shapes)
        self.layer_aliases = dict(form.aliases)
        self.pixel_mean, self.pixel_std = expected_pixels(name)
        self.input_size = form.input_size
        # Every map passes one, so that there is a layer to tap that puts out (N, C, h, w).
        self.outputs = nn.ModuleDict({each: nn.Identity() for each in form.shapes})
        options = find_weights(name, pretrained)
        self.network = self._build(list(form.shapes), options)
        paths = [form.paths.get(each, "") for each in form.shapes]
        self._freeze(frozen_stages, [path and f"network.{path}" for path in paths])

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps of :meth:`forward`; see there."""
        if self.input_size is not None and tuple(images.shape[-2:]) != self.input_size:
            raise ValueError(
                f"The backbone {self.name!r} takes images of {self.input_size[0]} x "
                f"{self.input_size[1]} pixels only, got {images.shape[-2]} x {images.shape[-1]}. "
                "Resize to this, or name a backbone that takes any size."
            )
        maps = self.network(images)
        if self._form.channels_last:
            maps = [each.permute(0, 3, 1, 2) for each in maps]
        names = self.feature_shapes
        return {each: self.outputs[each](map_) for each, map_ in zip(names, maps, strict=True)}

    def _input_layer(self) -> str | None:
        path = self._form.input_layer
        return path and f"network.{path}"

    def _drop(self, names: list[str]) -> None:
        with torch.random.fork_rng(devices=[]):
            network = self._build(list(self.feature_shapes), {"pretrained": False})
        state = self.network.state_dict()
        network.load_state_dict({key: state[key] for key in network.state_dict()})
        like = next(self.network.parameters())
        trained = {key for key, value in self.network.named_parameters() if value.requires_grad}
        for key, value in network.named_parameters():
            value.requires_grad_(key in trained)
        self.network = network.to(like.device, like.dtype)
        for name in names:
            del self.outputs[name]

    def _build(self, names: list[str], weights: dict[str, Any]) -> nn.Module:
        import timm

        form, options = self._form, self._form.options | self._drop_path | weights
        if form.is_single:
            options |= {"num_classes": 0}
        else:
            options |= {"features_only": True, "out_indices": [form.indices[n] for n in names]}
        try:
            with _quiet_timm():
                network = timm.create_model(self.name, **options)
        except OSError as error:
            raise no_download(self.name, error) from error
        except TypeError as error:
            if "drop_path_rate" in str(error):
                raise ValueError(
                    f"The backbone {self.name!r} has no blocks to skip: set drop_path 0."
                ) from error
            raise
        if form.is_single:
            network = _LastTokens(network)
        else:
            _cut(network, form.paths.get(names[-1]))
        if self._frozen_norm:
            network = timm.layers.freeze_batch_norm_2d(network)
        return network


def can_dilate(name: str, output_stride: int) -> bool:
    """Whether a model of timm can have this output stride.

    Raises:
        ValueError: timm has no such model.
    """
    name = timm_name(name)
    _describe(name, None)
    try:
        _describe(name, output_stride)
    except ValueError:
        return False
    return True


def expected_pixels(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the images that a model of timm expects, RGB from 0 to 255.

    Raises:
        ValueError: timm has no such model.
    """
    import timm

    about = timm.get_pretrained_cfg(timm_name(name))
    mean, std = (tuple(round(255 * v, 3) for v in values) for values in (about.mean, about.std))
    return mean, std


@contextlib.contextmanager
def _quiet_timm() -> Iterator[None]:
    """Keep timm from warning that weights of the classifier are left over."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _LastTokens(nn.Module):
    """The normed tokens of the last layer of a transformer, as one feature map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if hasattr(model, "prune_intermediate_layers"):
            model.prune_intermediate_layers(1, prune_norm=False, prune_head=True)
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(
            images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )


class _Form(NamedTuple):
    """What is known of a model of timm without its weights."""

    options: dict[str, Any]
    shapes: dict[str, FeatureShape]
    indices: dict[str, int]
    paths: dict[str, str]
    aliases: dict[str, str]
    input_layer: str | None
    input_size: tuple[int, int] | None
    channels_last: bool
    is_single: bool


@functools.lru_cache(maxsize=32)
def _describe(name: str, output_stride: int | None) -> _Form:
    import timm

    options: dict[str, Any] = {}
    if output_stride is not None:
        check_choice(f"output_stride of {name}", output_stride, OUTPUT_STRIDES)
        natural = _describe(name, None)
        own = [shape.stride for shape in natural.shapes.values()][-1]
        if output_stride == own:
            return natural
        options = {"output_stride": output_stride}
    about = timm.get_pretrained_cfg(name)
    ways = [{}]
    if about.fixed_input_size:
        ways = [{"dynamic_img_size": True, "dynamic_img_pad": True}, {"strict_img_size": False}, {}]
    network, reason = None, None
    for way in ways:
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                network = timm.create_model(name, features_only=True, **way, **options)
        except _REFUSALS as error:
            reason = error
        else:
            break
    if network is None and output_stride is not None:
        raise ValueError(
            f"The backbone {name!r} cannot have the output stride {output_stride}: timm's network "
            f"has stride {own} and no dilation. Leave output_stride out, or name another backbone, "
            "such as a ResNet or EfficientNet."
        ) from reason
    if network is None:
        raise ValueError(
            f"timm's model {name!r} returns no feature maps (features_only): {reason}. Name "
            "another backbone."
        ) from reason
    info = network.feature_info
    strides, channels, modules = info.reduction(), info.channels(), info.module_name()
    is_single = len(strides) > 1 and len(set(strides)) == 1 and hasattr(network, "model")
    positions = {"tokens": len(strides) - 1} if is_single else dict(_named_positions(strides))
    paths = {} if is_single else {n: _path(network, modules[p]) for n, p in positions.items()}
    input_size = tuple(about.input_size[1:]) if about.fixed_input_size and not way else None
    first = about.first_conv
    *_, last = positions
    before = modules[positions[last] - 1] if positions[last] else ""
    channels_last = str(getattr(network, "output_fmt", "")).endswith("NHWC")
    aliases = {}
    if not is_single and not channels_last:
        aliases = _block_aliases(network, before, modules[positions[last]], about)
    return _Form(
        options=way | options,
        shapes={n: FeatureShape(channels[p], strides[p]) for n, p in positions.items()},
        indices={n: list(info.out_indices)[p] for n, p in positions.items()},
        paths=paths,
        aliases=aliases or {"C41": f"outputs.{last}"},
        input_layer=(_path(network, first) or None) if isinstance(first, str) else None,
        input_size=input_size,
        channels_last=channels_last,
        is_single=is_single,
    )


def _named_positions(strides: list[int]) -> Iterator[tuple[str, int]]:
    """Name the maps by the stride of the network as published; each doubles the one before."""
    for position in range(len(strides)):
        level = math.log2(strides[0]) + position
        if level >= 2:
            yield f"layer{round(level) - 1}", position


def _path(network: nn.Module, module: str) -> str:
    """Find a module of a model in the network of features that timm made of it."""
    modules = dict(network.named_modules())
    for path in (module, module.replace(".", "_", 1), f"model.{module}", f"body.{module}"):
        if path in modules:
            return path
    return ""


def _block_aliases(network: nn.Module, before: str, last: str, about: Any) -> dict[str, str]:
    """Find the blocks of the last stage, those whose outputs have the size of its map."""
    before, last = _path(network, before), _path(network, last)
    if not last:
        return {}
    parent, _, _ = last.rpartition(".")
    stages = [last]
    if parent and before.rpartition(".")[0] == parent:
        siblings = [f"{parent}.{n}" for n, _ in network.get_submodule(parent).named_children()]
        stages = siblings[siblings.index(before) + 1 : siblings.index(last) + 1]
    blocks = [block for stage in stages for block in _blocks(network, stage)]
    sizes: dict[str, tuple[int, ...]] = {}

    def keep(path: str, output: object) -> None:
        sizes[path] = tuple(output.shape[2:]) if isinstance(output, Tensor) else ()

    hooks = [
        network.get_submodule(path).register_forward_hook(
            lambda layer, inputs, output, path=path: keep(path, output)
        )
        for path in blocks
    ]
    with torch.no_grad():
        size = tuple(network.eval()(torch.empty(1, *about.input_size, device="meta"))[-1].shape[2:])
    for hook in hooks:
        hook.remove()
    found = [path for path in blocks if len(size) == 2 and sizes.get(path) == size]
    return {f"C4{i}": f"network.{path}" for i, path in enumerate(found, start=1)}


def _blocks(network: nn.Module, stage: str) -> list[str]:
    """Paths of the blocks that a stage runs one after another; of the stage if there are none."""
    module = network.get_submodule(stage)
    if isinstance(getattr(module, "blocks", None), nn.Sequential):
        module, stage = module.blocks, f"{stage}.blocks"
    children = list(module.named_children())
    kinds = {type(child) for _, child in children}
    if len(kinds) != 1 or isinstance(module, nn.ModuleDict | nn.ModuleList):
        return [stage]
    return [f"{stage}.{name}" for name, _ in children]


def _cut(network: nn.Module, last: str | None) -> None:
    """Take away what comes after the last map where timm leaves it, in a row of blocks."""
    parent, _, child = (last or "").rpartition(".")
    if not parent or not isinstance(network.get_submodule(parent), nn.Sequential):
        return
    blocks = network.get_submodule(parent)
    names = [name for name, _ in blocks.named_children()]
    for name in names[names.index(child) + 1 :]:
        delattr(blocks, name)
