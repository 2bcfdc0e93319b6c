"""Mean and covariance of a layer's features per class, in one pass over the images; their files.

Shape legend:
    K: number of classes without background; L: labels of one image; d: channels of the layer;
    h, w: size of its feature map; S: size of the kept sample, 1024.
"""

import hashlib
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskx.core.tensor_files import read_content, read_tensors, write_tensors

# So many feature vectors of a class are kept, to fix the sign where class activation maps do not.
_SAMPLE_SIZE = 1024
# Of a scatter matrix only blocks on and below the diagonal are computed; those on it are so large.
_BLOCK = 128

_MAP_DENSE = ("map_pixels", "map_features", "map_mean", "map_scatter", "cross")
_DENSE = ("num_images", "num_pixels", "mean", *_MAP_DENSE)
_BY_CLASS = ("scatter", "sample_keys", "sample")

_KIND = "moments of class patterns"
_CONTENT = {"identity": dict, "done": int, "total": int, "images": str, "sizes": dict}


class _MapPart(NamedTuple):
    """Moments of features and class activation map over some pixels."""

    map_pixels: int
    map_features: Tensor
    map_mean: Tensor
    map_scatter: Tensor
    cross: Tensor


class PatternMoments:
    """Streaming mean and covariance of a layer's features, per class (class patterns, Eq. 2).

    All sums are float64. The mean and scatter matrix of one image are those about its own mean and
    are merged into those of its classes by the rule of Chan et al., so nothing is ever the
    difference of two large sums; the matrix of an image is computed once for all of its classes,
    of centred features that are rounded to ``product_dtype``.
    In the same pass the covariance of the features with the class activation map of the
    classifier is kept, at the pixels at which it counts; it later fixes the sign of the pattern.
    Where that says nothing, a sample of feature vectors does, uniform over the pixels and drawn by
    a hash of the image's id, so it depends neither on the order of the images nor on how they are
    shared out.

    Memory is taken when a class occurs first: ``8 * d * d + 4096 * d`` bytes, whatever the number
    of images. That is 4 MB per class at d = 512 and 42 MB at d = 2048, so 3.4 GB per layer for 80
    classes.

    Attributes:
        num_images: (K,) images seen of each class, on the CPU.
        num_pixels: (K,) pixels seen of each class, on the CPU.
        mean: (K, d).
        map_pixels: (K,) pixels at which the class activation map counted, on the CPU.
        map_features: (K, d) mean of the features at these.
        map_mean: (K,) mean of the class activation map at these.
        map_scatter: (K,) its sum of squares about the mean.
        cross: (K, d) sum of the products of features and class activation map about their means.
        scatter: (d, d) sum of the products about the mean, by class; the lower triangle holds,
            see :meth:`covariance`.
        sample_keys: (S,) random numbers of the vectors of the sample, by class; infinite where
            there is none yet.
        sample: (S, d) float32 feature vectors, by class.
        uses_maps: whether the images came with maps; None before the first.

    Args:
        device: where the moments are kept; features are moved there.
        seed: of the sample that is kept.
        product_dtype: of the products in the scatter matrix of an image. Float32 takes half the
            time of float64, and costs a relative error of 1e-7 of the covariance.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        product_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.num_classes, self.channels = num_classes, channels
        self.product_dtype = product_dtype
        self.device, self.seed = torch.device(device), seed
        exact = {"dtype": torch.float64, "device": self.device}
        self.num_images = torch.zeros(num_classes, dtype=torch.int64)
        self.num_pixels = torch.zeros(num_classes, dtype=torch.int64)
        self.mean = torch.zeros(num_classes, channels, **exact)
        self.map_pixels = torch.zeros(num_classes, dtype=torch.int64)
        self.map_features = torch.zeros(num_classes, channels, **exact)
        self.map_mean = torch.zeros(num_classes, **exact)
        self.map_scatter = torch.zeros(num_classes, **exact)
        self.cross = torch.zeros(num_classes, channels, **exact)
        self.scatter: dict[int, Tensor] = {}
        self.sample_keys: dict[int, Tensor] = {}
        self.sample: dict[int, Tensor] = {}
        self.uses_maps: bool | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that are held."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        activation_maps: Tensor | None,
        labels: Sequence[int],
        *,
        map_counts: Tensor | None = None,
        image_id: object = None,
    ) -> None:
        """Add one image.

        Args:
            features: (d, h, w), of any floating type.
            activation_maps: (L, ., .) class activation maps of the image's labels in their order;
                of another size than the features they are resized bilinearly. None: the
                classifier has none; then no image may have them.
            labels: L class indices, each once.
            map_counts: bool of the shape of the maps, the pixels at which they count; None: all.
            image_id: what the sample is drawn by.

        Raises:
            ValueError: labels, shapes or values do not fit. Nothing was added then.
        """
        self._check(features, activation_maps, labels, image_id)
        if not labels:
            return
        pixels = features.to(self.device, self.product_dtype).flatten(1)
        share = pixels.new_full((pixels.shape[1],), 1 / pixels.shape[1])
        rough = pixels @ share
        centred = pixels - rough[:, None]
        # What the rounding of the first mean left, some 1e-7 of it, differs between processors.
        left = centred @ share
        centred -= left[:, None]
        mean = rough.double() + left.double()
        parts = None
        values = [mean]  # one value that is not finite makes the mean so too
        if activation_maps is not None:
            parts, map_values = self._map_parts(
                activation_maps, map_counts, mean, centred, features.shape[1:]
            )
            values.append(map_values)
        if not torch.cat(values).isfinite().all():
            raise ValueError(
                f"Features or class activation maps of image {image_id!r} hold NaN or infinite "
                "values. Look at the image, at the classifier's weights and, in half precision, "
                "for an overflow; leave the image out or repair it."
            )

        self.uses_maps = parts is not None
        num_pixels = centred.shape[1]
        keys = self._sample_keys(num_pixels, image_id)
        scatters, shifts = [], []
        for row, label in enumerate(labels):
            if self.uses_maps:
                self._merge_map(label, parts[row])
            shifts.append(self._merge_mean(label, num_pixels, mean))
            scatters.append(self.scatter[label])
            self._add_to_sample(label, keys, pixels.T)
            self.num_images[label] += 1
        _add_products(scatters, centred, torch.stack(shifts), 0, self.channels)

    @torch.no_grad()
    def merge(self, other: "PatternMoments") -> None:
        """Add the moments of other images, such as those of another worker.

        Raises:
            ValueError: they are of another number of classes or channels, or only one of the two
                was made with class activation maps.
        """
        for key in ("num_classes", "channels"):
            if getattr(self, key) != getattr(other, key):
                raise ValueError(
                    f"Moments of {key} {getattr(other, key)} cannot be merged into moments of "
                    f"{key} {getattr(self, key)}. Both must come from one layer of one classifier."
                )
        if other.uses_maps is not None:
            self._check_maps(other.uses_maps, "the other moments")
            self.uses_maps = other.uses_maps
        for label, scatter in other.scatter.items():
            mean = other.mean[label].to(self.device)
            shift = self._merge_mean(label, int(other.num_pixels[label]), mean)
            self.scatter[label].add_(scatter.to(self.device)).addr_(shift, shift)
            values = (getattr(other, name)[label].to(self.device) for name in _MAP_DENSE[1:])
            self._merge_map(label, _MapPart(int(other.map_pixels[label]), *values))
            self._add_to_sample(label, other.sample_keys[label], other.sample[label])
            self.num_images[label] += other.num_images[label]

    def covariance(self, label: int) -> Tensor:
        """Return the (d, d) covariance of a class that has pixels, divided by their number."""
        lower = self.scatter[label].tril()
        lower += lower.tril(-1).T.clone()
        return lower.div_(int(self.num_pixels[label]))

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors by name, without copying them; see :meth:`load_state_dict`."""
        uses_maps = torch.tensor({None: -1, False: 0, True: 1}[self.uses_maps])
        state = {name: getattr(self, name) for name in _DENSE} | {"uses_maps": uses_maps}
        for name in _BY_CLASS:
            state |= {f"{name}.{label}": value for label, value in getattr(self, name).items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from copied tensors of :meth:`state_dict`: what follows is equal bit by bit.

        Raises:
            ValueError: the state is of another number of classes or channels, or incomplete.
        """
        self.scatter, self.sample_keys, self.sample = {}, {}, {}
        labels = {name.rpartition(".")[2] for name in state if "." in name}
        for label in range(self.num_classes):
            if str(label) in labels:
                self._start(label)
        own = self.state_dict()
        for name in sorted({*own, *state}):
            found, allowed = (
                f"{tuple(of[name].shape)} of {of[name].dtype}" if name in of else "nothing"
                for of in (state, own)
            )
            if found != allowed:
                raise ValueError(
                    f"The state of the moments has {found} as {name}. Allowed for "
                    f"{self.num_classes} classes and {self.channels} channels: {allowed}."
                )
            own[name].copy_(state[name])
        self.uses_maps = {-1: None, 0: False, 1: True}[int(own["uses_maps"])]

    def _check(
        self, features: Tensor, maps: Tensor | None, labels: Sequence[int], image_id: object
    ) -> None:
        if features.ndim != 3 or len(features) != self.channels or not features[0].numel():
            raise ValueError(
                f"Features of image {image_id!r} have the shape {tuple(features.shape)}, expected "
                f"({self.channels}, h, w)."
            )
        check_labels(labels, self.num_classes, f"image {image_id!r}")
        if len(set(labels)) != len(labels):
            raise ValueError(f"Labels {list(labels)} of image {image_id!r} must differ.")
        self._check_maps(maps is not None, f"image {image_id!r}")
        if maps is not None and (maps.ndim != 3 or len(maps) != len(labels)):
            raise ValueError(
                f"Class activation maps of image {image_id!r} have the shape "
                f"{tuple(maps.shape)}, expected ({len(labels)}, h, w): one for each of its labels."
            )

    def _check_maps(self, has_maps: bool, what: str) -> None:
        if self.uses_maps not in (None, has_maps):
            words = {True: "with", False: "without"}
            raise ValueError(
                f"{what[0].upper()}{what[1:]} came {words[has_maps]} class activation maps, those "
                f"before {words[self.uses_maps]}. Give them for all images or for none."
            )

    def _start(self, label: int) -> None:
        """Take the memory of a class."""
        new = self.mean.new_zeros
        self.scatter[label] = new(self.channels, self.channels)
        self.sample_keys[label] = new(_SAMPLE_SIZE) + torch.inf
        self.sample[label] = new(_SAMPLE_SIZE, self.channels, dtype=torch.float32)

    def _merge_mean(self, label: int, num_pixels: int, mean: Tensor) -> Tensor:
        """Merge in pixels and their mean.

        Returns:
            A vector (d,). The products of the pixels about their own mean and that of the vector
            with itself are still to be added to the scatter matrix of the class.
        """
        if label not in self.scatter:
            self._start(label)
        before = int(self.num_pixels[label])
        total = before + num_pixels
        shift = mean - self.mean[label]
        self.mean[label] += num_pixels / total * shift
        self.num_pixels[label] = total
        return shift * (before * num_pixels / total) ** 0.5

    def _map_parts(
        self,
        maps: Tensor,
        counts: Tensor | None,
        mean: Tensor,
        centred: Tensor,
        size: tuple[int, int],
    ) -> tuple[list[_MapPart], Tensor]:
        """Return the moments of (L, ., .) maps of an image, and values to check for infinite ones.

        ``mean`` (d,) is that of the features, ``centred`` (d, h * w) are these about it.
        """
        maps = maps.to(self.device, torch.float64)
        if counts is None:
            counts = torch.ones_like(maps)
        counts = counts.to(self.device, torch.float64)
        if maps.shape[1:] != size:
            maps = F.interpolate(maps[None], size, mode="bilinear")[0]
            counts = F.interpolate(counts[None], size, mode="nearest-exact")[0]
        maps, counts = maps.flatten(1), counts.flatten(1)
        totals = counts.sum(dim=1)
        shares = counts / totals.clamp(min=1)[:, None]
        map_means = (shares * maps).sum(dim=1)
        deviations = counts * (maps - map_means[:, None])
        scatters = deviations.square().sum(dim=1)
        # Means of the pixels that count, about the mean of all; and products, for which any centre
        # will do, as the deviations sum to 0.
        both = torch.cat([shares, deviations]).to(centred.dtype) @ centred.T
        shifts, crosses = both.double().chunk(2)
        numbers = totals.long().tolist()
        parts = zip(numbers, shifts + mean, map_means, scatters, crosses, strict=True)
        return [_MapPart(*part) for part in parts], maps.mean(dim=1)

    def _merge_map(self, label: int, part: _MapPart) -> None:
        if not part.map_pixels:
            return
        before = int(self.map_pixels[label])
        total = before + part.map_pixels
        share, weight = part.map_pixels / total, before * part.map_pixels / total
        shift = part.map_features - self.map_features[label]
        map_shift = part.map_mean - self.map_mean[label]

        self.cross[label] += part.cross + weight * map_shift * shift
        self.map_scatter[label] += part.map_scatter + weight * map_shift**2
        self.map_features[label] += share * shift
        self.map_mean[label] += share * map_shift
        self.map_pixels[label] = total

    def _sample_keys(self, num_pixels: int, image_id: object) -> Tensor:
        name = f"{self.seed}/{image_id}/{int(self.num_images.sum()) if image_id is None else ''}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(num_pixels, generator=generator, dtype=torch.float64)

    def _add_to_sample(self, label: int, keys: Tensor, vectors: Tensor) -> None:
        """Keep the vectors of the smallest keys, which is a uniform sample of all of them.

        The few that are new take the places of those of the largest keys.
        """
        kept_keys, kept = self.sample_keys[label], self.sample[label]
        keys = keys.to(self.device)
        order = torch.cat([kept_keys, keys]).argsort()
        new, old = order[:_SAMPLE_SIZE], order[_SAMPLE_SIZE:]
        new, old = new[new >= _SAMPLE_SIZE] - _SAMPLE_SIZE, old[old < _SAMPLE_SIZE]
        kept_keys[old] = keys[new]
        kept[old] = vectors[new.to(vectors.device)].to(kept)


def check_labels(labels: Sequence[int], num_classes: int, what: str) -> None:
    """Refuse class indices outside the list of the classifier; ``what`` has them."""
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(
            f"Label {wrong[0]} of {what} is outside the classifier's list: allowed are the class "
            f"indices 0 to {num_classes - 1}. Read the image's labels with the class list that "
            "the classifier was trained with."
        )


def _add_products(
    scatters: Sequence[Tensor], centred: Tensor, shifts: Tensor, start: int, stop: int
) -> None:
    """Add products of (d, n) features, and of each row of shifts (L, d), with themselves.

    Right on and below the diagonal only, from ``start`` to ``stop`` of it. Half by half, so that
    most products are those of large squares.
    """
    rows = columns = slice(start, stop)
    if stop - start > _BLOCK:
        middle = (start + stop) // 2
        rows, columns = slice(middle, stop), slice(start, middle)
        _add_products(scatters, centred, shifts, start, middle)
        _add_products(scatters, centred, shifts, middle, stop)
    products = torch.mm(centred[rows], centred[columns].T)
    for scatter, shift in zip(scatters, shifts, strict=True):
        scatter[rows, columns].add_(products).addcmul_(shift[rows, None], shift[None, columns])


# --- files


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
    write_tensors(path, tensors, _KIND, {**content, "sizes": sizes})


def load_moments(
    path: Path, *, device: torch.device | str = "cpu"
) -> tuple[dict[str, PatternMoments], dict[str, Any]]:
    """Read the moments of each layer and what :func:`save_moments` was told of them.

    Raises:
        ValueError: the file is damaged, or not one with moments.
    """
    content = read_content(path, _KIND, _CONTENT)
    moments, tensors = {}, read_tensors(path)
    for layer, sizes in content["sizes"].items():
        prefix = f"{layer}/"
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        try:
            moments[layer] = PatternMoments(**sizes, device=device)
            moments[layer].load_state_dict(state)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"'{path}' is damaged: layer '{layer}': {error} Make it again."
            ) from error
    return moments, content


def merge_moments(paths: Sequence[Path]) -> dict[str, PatternMoments]:
    """Merge the files of several shards of the images; two of them are in memory at a time.

    Args:
        paths: one finished file of
            :func:`~maskx.systems.class_patterns.patterns.discover_class_patterns`
            per shard.

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
        check_identity(f"'{path}'", shared, identity, f"'{paths[0]}'")
        for layer, of_layer in moments.items():
            merged[layer].merge(of_layer)
    return merged


def check_identity(
    made: str, found: Mapping[str, Any], expected: Mapping[str, Any], what: str
) -> None:
    """Refuse what was ``made`` with other values than those of ``what``."""
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            there, here = (textwrap.shorten(str(v.get(key)), 100) for v in (found, expected))
            raise ValueError(
                f"{made} was made with {key} {there}, but {what} has {key} {here}. Use files of "
                "the same, or name another folder to make them anew."
            )
