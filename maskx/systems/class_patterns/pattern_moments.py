"""Mean and covariance of a layer's features per class, in one pass over the images.

Shape legend:
    K: number of classes without background; L: labels of one image; d: channels of the layer;
    h, w: size of its feature map; n: number of pixels so far.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# So many feature vectors of a class are kept, to fix the sign where class activation maps do not.
_SAMPLE_SIZE = 1024
# Of a scatter matrix only blocks on and below the diagonal are computed; those on it are so large.
_BLOCK = 128

_MAP_DENSE = ("map_pixels", "map_features", "map_mean", "map_scatter", "cross")
_DENSE = ("num_images", "num_pixels", "mean", *_MAP_DENSE)


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
    Where that says nothing, a sample of 1024 feature vectors per class does, uniform over the
    pixels and drawn by a hash of the image's id, so it depends neither on the order of the images
    nor on how they are shared out.

    Memory is taken when a class occurs first: ``8 * d * d + 4096 * d`` bytes, whatever the number
    of images. That is 4 MB per class at d = 512 and 42 MB at d = 2048, so 3.4 GB per layer for 80
    classes.

    Attributes:
        num_classes: K.
        channels: d.
        num_images: (K,) images seen of each class, on the CPU.
        num_pixels: (K,) pixels seen of each class, on the CPU.
        mean: (K, d).
        scatter: (d, d) sum of the products about the mean, by class; the lower triangle holds,
            see :meth:`covariance`.
        map_pixels: (K,) pixels at which the class activation map counted, on the CPU.
        map_features: (K, d) mean of the features at these.
        map_mean: (K,) mean of the class activation map at these.
        map_scatter: (K,) its sum of squares about the mean.
        cross: (K, d) sum of the products of features and class activation map about their means.
        sample: keys (S,) and feature vectors (S, d) float32 by class.
        uses_maps: whether the images came with maps; None before the first.

    Args:
        num_classes: K.
        channels: d.
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
        self.sample: dict[int, tuple[Tensor, Tensor]] = {}
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
            image_id: what an error message calls the image, and what the sample is drawn by.

        Raises:
            ValueError: a label is out of range or there twice, the shapes do not fit, a feature or
                a map is not finite, or only some images have maps. Nothing was added then.
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
            self._add_to_sample(label, keys, pixels.T)
            scatter, shift = self._merge_mean(label, num_pixels, mean)
            scatters.append(scatter)
            shifts.append(shift)
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
        for label, other_scatter in other.scatter.items():
            mean = other.mean[label].to(self.device)
            scatter, shift = self._merge_mean(label, int(other.num_pixels[label]), mean)
            scatter.add_(other_scatter.to(self.device)).addr_(shift, shift)
            values = (getattr(other, name)[label].to(self.device) for name in _MAP_DENSE[1:])
            self._merge_map(label, _MapPart(int(other.map_pixels[label]), *values))
            self.num_images[label] += other.num_images[label]
        for label, (keys, vectors) in other.sample.items():
            self._add_to_sample(label, keys, vectors)

    def covariance(self, label: int) -> Tensor:
        """Return the (d, d) covariance of a class that has pixels, divided by their number."""
        lower = self.scatter[label].tril()
        lower += lower.tril(-1).T.clone()
        return lower.div_(int(self.num_pixels[label]))

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors by name, without copying them; see :meth:`load_state_dict`."""
        sign = {None: -1, False: 0, True: 1}[self.uses_maps]
        state = {name: getattr(self, name) for name in _DENSE}
        state["uses_maps"] = torch.tensor(sign)
        for label, scatter in self.scatter.items():
            state[f"scatter.{label}"] = scatter
        for label, (keys, vectors) in self.sample.items():
            state |= {f"sample_keys.{label}": keys, f"sample.{label}": vectors}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from copied tensors of :meth:`state_dict`: what follows is equal bit by bit.

        Raises:
            ValueError: the state is of another number of classes or channels, or incomplete.
        """
        missing = [name for name in (*_DENSE, "uses_maps") if name not in state]
        if missing:
            raise ValueError(f"The state of the moments lacks {missing}; it is incomplete.")
        expected = (self.num_classes, self.channels)
        if tuple(state["mean"].shape) != expected:
            raise ValueError(
                f"The state has moments of (classes, channels) {tuple(state['mean'].shape)}, "
                f"but these are of {expected}. Both must be of one layer of one classifier."
            )
        unfit = [name for name, tensor in state.items() if not self._fits(name, tensor)]
        if unfit:
            raise ValueError(
                f"The state has a tensor {unfit[0]} {tuple(state[unfit[0]].shape)} of "
                f"{state[unfit[0]].dtype}, which is none of moments of {expected}."
            )
        for name in _DENSE:
            getattr(self, name).copy_(state[name])
        self.uses_maps = {-1: None, 0: False, 1: True}[int(state["uses_maps"])]

        def of_class(prefix: str) -> dict[int, Tensor]:
            names = [name for name in state if name.startswith(f"{prefix}.")]
            return {
                int(name.rpartition(".")[2]): state[name].to(self.device, copy=True)
                for name in names
            }

        self.scatter = of_class("scatter")
        keys, vectors = of_class("sample_keys"), of_class("sample")
        if keys.keys() != vectors.keys():
            raise ValueError("The state has keys or vectors of a sample without the other.")
        self.sample = {label: (keys[label], vectors[label]) for label in keys}

    def _fits(self, name: str, tensor: Tensor) -> bool:
        if name == "uses_maps":
            return tensor.numel() == 1
        if name in _DENSE:
            own = getattr(self, name)
            return (tensor.shape, tensor.dtype) == (own.shape, own.dtype)
        kind, _, label = name.rpartition(".")
        rows, width = tensor.shape[:1], (self.channels,)
        shapes = {"scatter": width * 2, "sample": rows + width, "sample_keys": rows}
        return (
            label.isdecimal()
            and int(label) < self.num_classes
            and kind in shapes
            and tensor.shape == shapes[kind]
            and tensor.is_floating_point()
        )

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

    def _merge_mean(self, label: int, num_pixels: int, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Merge in pixels and their mean.

        Returns:
            The scatter matrix of the class, to which their products about their own mean and, of
            the vector (d,) that is returned too, the product with itself are still to be added.
        """
        if label not in self.scatter:
            self.scatter[label] = self.mean.new_zeros(self.channels, self.channels)
        before = int(self.num_pixels[label])
        total = before + num_pixels
        shift = mean - self.mean[label]
        self.mean[label] += num_pixels / total * shift
        self.num_pixels[label] = total
        return self.scatter[label], shift * (before * num_pixels / total) ** 0.5

    def _map_parts(
        self,
        maps: Tensor,
        counts: Tensor | None,
        mean: Tensor,
        centred: Tensor,
        size: tuple[int, int],
    ) -> tuple[list[_MapPart], Tensor]:
        """Return the moments of the maps of one image, and values to check for infinite ones.

        Args:
            maps: (L, ., .).
            counts: (L, ., .) bool or None.
            mean: (d,) of the features.
            centred: (d, n) features about it.
            size: (h, w) of the layer.
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
        """Keep the vectors of the smallest keys, which is a uniform sample of all of them."""
        keys = keys.to(self.device)
        if label in self.sample:
            old_keys, old_vectors = self.sample[label]
            if len(old_keys) == _SAMPLE_SIZE:
                self._replace_in_sample(label, keys, vectors)
                return
            vectors = vectors.to(old_vectors)
            keys, vectors = torch.cat([old_keys, keys]), torch.cat([old_vectors, vectors])
        order = keys.argsort()[:_SAMPLE_SIZE]
        self.sample[label] = keys[order], vectors[order].to(self.device, torch.float32)

    def _replace_in_sample(self, label: int, keys: Tensor, vectors: Tensor) -> None:
        """Let the few of smaller keys take the places of those of the largest."""
        old_keys, old_vectors = self.sample[label]
        order = torch.cat([old_keys, keys]).argsort()
        new = order[:_SAMPLE_SIZE]
        new = new[new >= _SAMPLE_SIZE] - _SAMPLE_SIZE
        old = order[_SAMPLE_SIZE:]
        old = old[old < _SAMPLE_SIZE]
        old_keys[old] = keys[new]
        old_vectors[old] = vectors[new.to(vectors.device)].to(old_vectors)


def check_labels(labels: Sequence[int], num_classes: int, what: str) -> None:
    """Refuse class indices outside the list of the classifier.

    Raises:
        ValueError: names the label, ``what`` has it and the indices that are allowed.
    """
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
