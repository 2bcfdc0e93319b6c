"""ConceptMask: the mask of any concept, from tags of many, boxes of some and masks of few.

"ConceptMask: Large-Scale Segmentation from Semantic Concepts" (Wang et al., ECCV 2018). A concept
is a word vector. Each stage starts from the one before and holds what inference needs of it.

A concept has a level: it is masked, boxed (every masked one is), an image-level one, of which only
tags were seen, or an unseen word, which is not in the table and has nothing but a vector.

Shape legend:
    N: images; V: concepts of the word table; k: length of a word vector; C: asked concepts;
    P: pairs of an image and a concept that is in it; H, W: size of an image; h, w: size of an
    attention map; M: side of the masks.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from maskx.core.checks import check_choice
from maskx.core.extra_state import EXTRA_STATE, pack_state, unpack_state
from maskx.core.sample_models import IMAGENET_MEAN, IMAGENET_STD, Sample, SampleModel
from maskx.core.word_table import WordTable
from maskx.systems.concept_mask.concept_sets import ConceptSplit, vocabulary_difference
from maskx.systems.concept_mask.losses import (
    box_loss,
    box_maps,
    discrimination_loss,
    matched_concepts,
    matching_loss,
    negative_concepts,
)
from maskx.systems.concept_mask.network import (
    AttentionRefinement,
    ConceptEmbedding,
    ConceptSegmenter,
    concept_segmentation_loss,
    embedding_loss,
    initial_attention,
    mean_maps,
    normalise_maps,
    resize_maps,
    soft_topics,
)
from maskx.systems.concept_mask.query import ConceptQuery, named_query

logger = logging.getLogger(__name__)

SYSTEM_NAME = "concept_mask"
ATTENTION_KINDS = ("blended", "own", "nearest", "initial")
_VERSION = 1  # of what checkpoints say of the network

# Concepts whose maps are made at a time when only their maxima are wanted.
_VOCABULARY_CHUNK = 2048
# Pairs whose masks are made at a time.
_SEGMENTED_PAIRS = 16
_MASK_THRESHOLD = 0.5
_EXISTENCE_THRESHOLD = 0.5  # until it is fitted


class EmbeddingModel(SampleModel):
    """Stage 1: images among word vectors, learned from tags; attention maps by Eq. 1.

    Checkpoints hold the word table and say which concepts have boxes and masks and how the network
    is built; another word table is refused on loading. In training mode a checkpoint of the stage
    before may be loaded as well, from which the training then starts; ``is_new`` says that none of
    this very stage was.

    Args:
        table: word vectors; concept indices count its names.
        split: which of its names have boxes, and which masks.
        attention_sizes: sides of the squares in pixels that the image is warped to for the
            attention maps of stage 3 and of inference.
        scored_sizes: those of the attention sizes whose maps are shown and measured; () for all.
            The segmentation network sees all of them.
        attention_kind: which maps are shown, measured and segmented, see :meth:`attention`.
        unseen: words that are not in the table, found by their vectors alone.
        query: what to look for in a sample that does not say; None for all that exists.
        architecture: what else the network is built from, as JSON can hold it, for its checkpoints.
        pixel_mean: by channel, in the order of the images, of values from 0 to 255.
    """

    stage: ClassVar[int] = 1
    # What a training sample must have, beside the image.
    targets: ClassVar[tuple[str, ...]] = ("image_labels",)

    def __init__(
        self,
        embedding: ConceptEmbedding,
        *,
        table: WordTable,
        split: ConceptSplit,
        attention_sizes: Sequence[int] = (300, 700),
        scored_sizes: Sequence[int] = (),
        attention_kind: str = "blended",
        unseen: WordTable | None = None,
        query: ConceptQuery | None = None,
        architecture: Mapping[str, Any] | None = None,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if not attention_sizes or min(attention_sizes) < embedding.stride:
            raise ValueError(
                f"attention_sizes of ConceptMask are {tuple(attention_sizes)}. Allowed: one or "
                f"more sides of a square of at least {embedding.stride} pixels, the stride of the "
                "embedding."
            )
        others = sorted(set(scored_sizes) - set(attention_sizes))
        if others:
            raise ValueError(
                f"scored_sizes of ConceptMask has {others}. Allowed: some of the attention_sizes "
                f"{tuple(attention_sizes)}, or () for all."
            )
        check_choice("attention_kind of ConceptMask", attention_kind, ATTENTION_KINDS)
        difference = vocabulary_difference(split.vocabulary, table.names)
        if difference is not None:
            raise ValueError(
                f"The split is of another vocabulary than the word table: {difference}."
            )
        if self.stage > 1 and not split.boxed:
            raise ValueError("ConceptMask has no boxed concept. Stages 2 and 3 need at least one.")
        super().__init__(max(attention_sizes), pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.table, self.split, self.unseen, self.query = table, split, unseen, query
        self.attention_sizes = tuple(attention_sizes)
        wanted = frozenset(scored_sizes or attention_sizes)
        self._scored = [n for n, size in enumerate(attention_sizes) if size in wanted]
        self.attention_kind = attention_kind
        self.architecture = None if architecture is None else dict(architecture)
        self.is_new = True
        self._has_warned = False

        self.embedding = embedding
        self.register_buffer("vectors", torch.from_numpy(table.vectors).clone())
        self.register_buffer("idf", torch.from_numpy(table.idf).clone())
        boxed = torch.zeros(len(table), dtype=torch.bool)
        boxed[list(split.boxed_indices)] = True
        self.register_buffer("is_boxed", boxed, persistent=False)
        self.register_buffer("theta_image", torch.ones(()))
        self.register_buffer("theta_unseen", torch.ones(()))
        thresholds = torch.full((len(table),), _EXISTENCE_THRESHOLD)
        self.register_buffer("existence_thresholds", thresholds)
        self.register_buffer("existence_threshold_unseen", torch.zeros(()))

    @property
    def has_fitted_thresholds(self) -> bool:
        """Whether the existence thresholds of the word table were fitted, on any images."""
        return self.stage > 1 and bool((self.existence_thresholds != _EXISTENCE_THRESHOLD).any())

    def forward(self, samples: list[Sample]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Compute losses in training, find concepts in evaluation.

        Args:
            samples: with ``image`` (3, H, W) from 0 to 255. In training those of
                :class:`maskx.systems.concept_mask.samples.ConceptMapper`, all of one size. In
                evaluation perhaps with ``query`` or ``concepts`` (see :meth:`ask`), what to look
                for, and with ``height`` and ``width`` of the result, those of the image without.

        Returns:
            In training ``loss_embedding`` (stage 1); ``loss_boxes``, ``loss_matching`` and, with
            `gamma`, ``loss_discrimination``, weighted (stage 2); ``loss_masks`` (stage 3). A loss
            for which there is no supervision is zero, with a graph. In evaluation what
            :meth:`predict` returns of each.
        """
        if not self.training:
            return [self.predict(sample) for sample in samples]
        for sample, key in itertools.product(samples, self.targets):
            if key not in sample:
                raise ValueError(
                    f"The training sample of {_named(sample)} has no '{key}'. Make samples with "
                    f"ConceptMapper of stage {self.stage}, as the trainings of maskx do."
                )
        for sample in samples:
            self._check_size(sample)
        images = [self.normalise(sample) for sample in samples]
        sizes = {tuple(image.shape[-2:]) for image in images}
        if len(sizes) > 1:
            raise ValueError(
                "The images of a training batch have different sizes: "
                f"{', '.join(map(str, sorted(sizes)))}. Warp all to one, as ConceptMapper does."
            )
        return self.losses(torch.stack(images), samples)

    def losses(self, images: Tensor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Compute the losses of (N, 3, H, W) normalised images and their samples."""
        topics = soft_topics([s["image_labels"] for s in samples], self.vectors, self.idf)
        return {"loss_embedding": embedding_loss(self.embedding(images), topics)}

    @torch.no_grad()
    def predict(
        self,
        sample: Sample,
        query: ConceptQuery | None = None,
        *,
        kind: str | None = None,
        segment: bool = True,
    ) -> dict[str, Any]:
        """Find concepts in one image; call it in evaluation mode.

        The image is embedded once per attention size, for however many concepts.

        Args:
            sample: see :meth:`forward`.
            query: concepts; None for those of the sample, or else of the model.
            kind: of attention, see :meth:`attention`; None for that of the model.
            segment: make masks with the segmentation network, if there is one, not of the
                attention.

        Returns:
            Of C concepts

            - ``concepts``: their names, "vector" and its place for one that was given as a vector;
            - ``concept_indices``: (C,) rows of the word table, -1 for unseen words;
            - ``masks_prob``: (C, height, width), and ``masks``, bool, where that is above 0.5.
              Without a segmentation network the mean of the attention maps, each brought to [0, 1];
            - ``attention``: (C, height, width) in [0, 1], what pointing and soft IoU are measured
              on: the mean of the sigmoid maps of the scored sizes, or the initial map where there
              is no other evidence, in stage 1 and for unseen words;
            - ``initial``: the mean of the maps of Eq. 1, brought to [0, 1];
            - ``own_share``: (C,) of the own map in the attention, theta; ``borrowed``: names of the
              boxed concepts that the rest was taken from, None where there is no rest;
            - ``existence``: (C,) see :meth:`existence`, and ``exists``, bool, above the threshold.
        """
        kind = self.attention_kind if kind is None else kind
        check_choice("kind of attention", kind, ATTENTION_KINDS)
        self._check_size(sample)
        image = self.normalise(sample)[None]
        size = (sample.get("height", image.shape[2]), sample.get("width", image.shape[3]))
        maps = self.embedding_maps(image)
        thresholds, threshold = self.existence_thresholds, self.existence_threshold_unseen
        if self.stage == 1:  # where all scores are cosines
            thresholds = threshold.expand(len(self.vectors))
        if query is None and "concepts" in sample:
            query = self.ask(sample["concepts"])
        asked = (query, sample.get("query"), self.query)
        query = next((each for each in asked if each is not None), None)
        if query is None:
            self._warn_of_thresholds()
            existence = self.vocabulary_existence(maps)[0]
            (indices,) = (existence > thresholds).nonzero(as_tuple=True)
            existence = existence[indices]
            query = ConceptQuery(indices, self.vectors[indices])
        else:
            existence = self.existence(maps, query)[0]
        query = query.checked(self.vectors)
        attention = self.attention(maps, query, kind=kind)
        initial = self.attention(maps, query, kind="initial")
        initial = normalise_maps(self._mean(initial, size))[0]
        share = self._own_share(query, kind)
        if segment and self.stage == 3:
            masks_prob = self.segment(image, attention, size)[0]
        else:
            masks_prob = mean_maps(attention, size)[0]
        known = query.indices >= 0
        thresholds = torch.where(known, thresholds[query.indices.clamp(min=0)], threshold)
        is_initial = (self.stage == 1 or kind == "initial") | (~known & (share == 1))
        return {
            "concepts": list(query.names or self._names(query.indices)),
            "concept_indices": query.indices,
            "masks_prob": masks_prob,
            "masks": masks_prob > _MASK_THRESHOLD,
            "attention": torch.where(
                is_initial[:, None, None], initial, self._mean(attention, size)[0]
            ),
            "initial": initial,
            "own_share": share,
            "borrowed": self._borrowed(query, share),
            "existence": existence,
            "exists": existence > thresholds,
        }

    def ask(self, concepts: Sequence[Any], *, blended: bool = False) -> ConceptQuery:
        """Resolve names, of unseen words too, indices or vectors; see :func:`named_query`."""
        return named_query(self.table, self.unseen, concepts, blended=blended)

    def embedding_maps(self, images: Tensor) -> list[Tensor]:
        """Warp (N, 3, H, W) normalised images to squares and embed their positions.

        This is all that inference takes from the images, whatever concepts are asked for. Squares
        are made of the images as they are, not of one another, which keeps what large ones show.

        Returns:
            For each attention size (N, k, h, w).
        """
        sizes = ((size, size) for size in self.attention_sizes)
        squares = (resize_maps(images, size, antialias=True) for size in sizes)
        return [self.embedding.embedding_map(square) for square in squares]

    def attention(
        self, maps: Sequence[Tensor], query: ConceptQuery, *, kind: str = "blended"
    ) -> list[Tensor]:
        """Make the attention maps of concepts.

        Args:
            kind: ``initial``: of Eq. 1, any values. All others are in [0, 1]. ``own``: the refined
                map; for an unseen word and in stage 1 the initial map brought to [0, 1].
                ``nearest``: the refined map of the boxed concept with the nearest word vector.
                ``blended``: section 4.4, for image-level concepts theta * own + (1 - theta) *
                nearest; also for unseen words whose query says so, others are by Eq. 1 alone, as
                in section 5.4.

        Returns:
            For each attention size (N, C, h, w).
        """
        if kind == "nearest":
            raise ValueError("Stage 1 of ConceptMask has no refined maps. Allowed: own, initial.")
        query = query.checked(self.vectors)
        maps = [initial_attention(each, query.vectors) for each in maps]
        return maps if kind == "initial" else [normalise_maps(each) for each in maps]

    def existence(self, maps: Sequence[Tensor], query: ConceptQuery) -> Tensor:
        """Score whether concepts are in the images of some :meth:`embedding_maps`.

        Returns:
            (N, C): the maximum of the refined maps of all attention sizes; for unseen words, and
            for all in stage 1, the largest cosine of the embedding of a position and the vector.
        """
        vectors = query.checked(self.vectors).vectors
        scores = [_maxima(initial_attention(each, vectors, cosine=True)) for each in maps]
        return torch.stack(scores).amax(dim=0)

    def vocabulary_existence(self, maps: Sequence[Tensor]) -> Tensor:
        """Score all V concepts of the word table, some maps at a time; see :meth:`existence`."""
        scores = [torch.cat([*map(_maxima, self._all_maps(each))], dim=1) for each in maps]
        return torch.stack(scores).amax(dim=0)

    def nearest_boxed(self, vectors: Tensor) -> Tensor:
        """Return the boxed concepts whose word vectors have the largest cosine to (C, k) others."""
        (boxed,) = self.is_boxed.nonzero(as_tuple=True)
        cosines = F.normalize(vectors, dim=1) @ F.normalize(self.vectors[boxed], dim=1).T
        return boxed[cosines.argmax(dim=1)]

    def set_fitted(
        self,
        *,
        theta_image: float | None = None,
        theta_unseen: float | None = None,
        existence_thresholds: Tensor | None = None,
        existence_threshold_unseen: float | None = None,
    ) -> None:
        """Store what was fitted on validation images; what is None or NaN stays as it is.

        Args:
            theta_image: in (0, 1], share of the own map of an image-level concept in its blend.
            theta_unseen: in (0, 1], the same for an unseen word, where it is blended.
            existence_thresholds: (V,).
            existence_threshold_unseen: a cosine.
        """
        # At a theta of 0 a concept would have no map of its own at all.
        for name, theta in (("theta_image", theta_image), ("theta_unseen", theta_unseen)):
            if theta is not None and not 0 < theta <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {theta}.")
        if existence_thresholds is not None and len(existence_thresholds) != len(self.vectors):
            raise ValueError(
                f"existence_thresholds has {len(existence_thresholds)} numbers for a word table of "
                f"{len(self.vectors)}."
            )
        for buffer, value in (
            (self.theta_image, theta_image),
            (self.theta_unseen, theta_unseen),
            (self.existence_thresholds, existence_thresholds),
            (self.existence_threshold_unseen, existence_threshold_unseen),
        ):
            if value is not None:
                values = torch.as_tensor(value, dtype=buffer.dtype, device=buffer.device)
                buffer.copy_(torch.where(values.isnan(), buffer, values))

    def _check_size(self, sample: Sample) -> None:
        height, width = sample["image"].shape[-2:]
        if min(height, width) < self.embedding.stride:
            raise ValueError(
                f"{_named(sample)} has {height} x {width} pixels, less than the "
                f"{self.embedding.stride} of one position of an attention map. Leave it out or "
                "give a larger one."
            )

    def _warn_of_thresholds(self) -> None:
        if self.has_fitted_thresholds or self._has_warned:
            return
        self._has_warned = True
        logger.warning(
            "All concepts that exist are asked for, but no threshold of existence was fitted: "
            "there may be maps and masks of most of the %d concepts. Fit a model of stage 2 or 3 "
            "with tools/fit_concepts.py, or name concepts.",
            len(self.table),
        )

    def _names(self, indices: Tensor) -> list[str]:
        return [
            self.table.names[index] if index >= 0 else f"vector {place}"
            for place, index in enumerate(indices.tolist())
        ]

    def _all_maps(self, embedding_map: Tensor) -> Iterator[Tensor]:
        """Yield the maps of all concepts that :meth:`existence` takes the maxima of, in chunks."""
        for vectors in self.vectors.split(_VOCABULARY_CHUNK):
            yield initial_attention(embedding_map, vectors, cosine=True)

    def _own_share(self, query: ConceptQuery, kind: str) -> Tensor:
        """Return the (C,) theta of each concept: nothing is blended without refined maps."""
        return query.vectors.new_ones(len(query))

    def _borrowed(self, query: ConceptQuery, share: Tensor) -> list[str | None]:
        """Name the boxed concepts that a part of the maps was taken from."""
        if not self.split.boxed or bool((share == 1).all()):
            return [None] * len(query)
        names = self._names(self.nearest_boxed(query.vectors))
        return [name if own < 1 else None for name, own in zip(names, share.tolist(), strict=True)]

    def _mean(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Average the maps of the scored sizes at one size."""
        return sum(resize_maps(maps[n], size) for n in self._scored) / len(self._scored)

    def get_extra_state(self) -> Tensor:
        """Say in the checkpoint what network this is."""
        content = {
            "system": SYSTEM_NAME,
            "stage": self.stage,
            "word_table": self.table.hash,
            "names": list(self.table.names),
            "boxed": list(self.split.boxed),
            "masked": list(self.split.masked),
            "attention_sizes": list(self.attention_sizes),
            "architecture": self.architecture,
        }
        return pack_state(content, version=_VERSION)

    def set_extra_state(self, state: Tensor) -> None:
        """Set nothing: what the checkpoint says was checked before its weights were taken."""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Refuse another word table or stage; start from the stage before in training mode."""
        self.is_new = prefix + EXTRA_STATE not in state_dict
        if not self.is_new:
            found = read_description(state_dict, prefix)
            if found["word_table"] != self.table.hash:
                raise ValueError(
                    f"The checkpoint was made with the word table {found['word_table'][:12]}, but "
                    f"the one given, from {self.table.source}, is {self.table.hash[:12]}. Give the "
                    "table of the checkpoint, or train anew."
                )
            if found["stage"] != self.stage:
                handed = self._handed_on(found, state_dict, prefix)
                for name in [name for name in state_dict if name.startswith(prefix)]:
                    del state_dict[name]
                state_dict.update({prefix + name: value for name, value in handed.items()})
                self.is_new = True
        super()._load_from_state_dict(state_dict, prefix, *args)

    # By prefix of a weight's name: its prefix in the stage before, or None for what is new.
    _before: ClassVar[Mapping[str, str | None]] = {}

    def _handed_on(
        self, found: Mapping[str, Any], state_dict: Mapping[str, Any], prefix: str
    ) -> dict[str, Any]:
        """Make the state dict that a training starts with of that of the stage before."""
        wrong = f"The checkpoint is of stage {found['stage']} of ConceptMask"
        if not self.training:
            raise ValueError(
                f"{wrong}, the network of stage {self.stage}. Build the network of stage "
                f"{found['stage']}, or give a checkpoint of stage {self.stage}."
            )
        if found["stage"] != self.stage - 1:
            raise ValueError(
                f"{wrong}. Stage {self.stage} starts from one of stage {self.stage - 1}."
                if self.stage > 1
                else f"{wrong}. Stage 1 is the first and starts from none."
            )
        if self.stage > 2 and tuple(found["boxed"]) != self.split.boxed:
            raise ValueError(
                f"{wrong}, trained with boxes of other concepts. Give stage {self.stage} the lists "
                "of stage 2."
            )
        before = {n.removeprefix(prefix): v for n, v in state_dict.items() if n.startswith(prefix)}
        handed, own = self.state_dict(), {"vectors", "idf", EXTRA_STATE}
        sources = {}  # names of weights in the stage before
        for name in handed.keys() - own:
            start = next((start for start in self._before if name.startswith(start)), "")
            if self._before.get(start, "") is not None:
                sources[name] = self._before.get(start, "") + name.removeprefix(start)
        left = before.keys() - own - set(sources.values())
        misfits = {name for name in left if not name.startswith("original.")}
        for name, source in sources.items():
            if source not in before or before[source].shape != handed[name].shape:
                misfits.add(name)
        if misfits:
            raise ValueError(
                f"{wrong}, but does not fit this network: {', '.join(sorted(misfits)[:5])}"
                f"{' ...' if len(misfits) > 5 else ''}. Build both stages with the same settings "
                "of embedding and refinement."
            )
        return handed | {name: before[source] for name, source in sources.items()}


class _RefinedModel(EmbeddingModel):
    """What stages 2 and 3 share: refined maps, blended where a concept has no boxes."""

    frozen: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, embedding: ConceptEmbedding, *, hidden_channels: int = 1024, **shared: Any
    ) -> None:
        super().__init__(embedding, **shared)
        self.refinement = AttentionRefinement(len(self.table), hidden_channels=hidden_channels)

    def train(self, mode: bool = True) -> "_RefinedModel":
        """Set the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).requires_grad_(False).eval()
        return self

    def attention(
        self, maps: Sequence[Tensor], query: ConceptQuery, *, kind: str = "blended"
    ) -> list[Tensor]:
        """See :meth:`EmbeddingModel.attention`."""
        query = query.checked(self.vectors)
        if kind == "initial":
            return super().attention(maps, query, kind=kind)
        known = query.indices >= 0
        nearest = self.nearest_boxed(query.vectors)
        rows = torch.cat([torch.where(known, query.indices, nearest), nearest])
        share = self._own_share(query, kind)[:, None, None]
        blended = []
        for each, initial in zip(maps, super().attention(maps, query, kind="own"), strict=True):
            own, neighbour = self._refined(each, rows).chunk(2, dim=1)
            own = torch.where(known[:, None, None], own, initial)
            blended.append(share * own + (1 - share) * neighbour)
        return blended

    def existence(self, maps: Sequence[Tensor], query: ConceptQuery) -> Tensor:
        """See :meth:`EmbeddingModel.existence`."""
        query = query.checked(self.vectors)
        cosines, rows = super().existence(maps, query), query.indices.clamp(min=0)
        refined = torch.stack([_maxima(self._refined(each, rows)) for each in maps]).amax(dim=0)
        return torch.where(query.indices >= 0, refined, cosines)

    def _refined(self, embedding_map: Tensor, rows: Tensor) -> Tensor:
        return self.refinement(embedding_map, self.vectors, rows).sigmoid()

    def _own_share(self, query: ConceptQuery, kind: str) -> Tensor:
        if kind != "blended":
            return query.vectors.new_full((len(query),), kind != "nearest")
        known = query.indices >= 0
        boxed = known & self.is_boxed[query.indices.clamp(min=0)]
        unseen = torch.where(query.blended, self.theta_unseen, 1)
        return torch.where(boxed, 1, torch.where(known, self.theta_image, unseen))

    def _all_maps(self, embedding_map: Tensor) -> Iterator[Tensor]:
        hidden = self.refinement.hidden(embedding_map, self.vectors)
        every_concept = torch.arange(len(self.vectors), device=hidden.device)
        for concepts in every_concept.split(_VOCABULARY_CHUNK):
            yield self.refinement.logits(hidden, concepts).sigmoid()

    def _pairs(self, samples: Sequence[Sample], level: str) -> tuple[Tensor, Tensor]:
        """Return the (P,) image and the (P,) concept of each pair."""
        pairs = [(n, int(concept)) for n, s in enumerate(samples) for concept in s["concepts"]]
        learned = self.split.boxed_indices if level == "boxed" else self.split.masked_indices
        others = sorted({concept for _, concept in pairs} - set(learned))
        if others:
            raise ValueError(
                f"The batch has the concept indices {others}, which are not among the {level} "
                f"concepts. Leave them out of the data, or list them as {level}."
            )
        both = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).to(self.device)
        return both[:, 0], both[:, 1]


class RefinementModel(_RefinedModel):
    """Stage 2: attention maps refined by what boxes teach.

    It trains the embedding and the refinement, and holds ``original``, the embedding network of
    stage 1, which does not change.

    Args:
        gamma: weights of Eq. 4 as the (indptr, indices, weights) of a sparse (V, V) matrix by
            rows; None trains without the spatial discrimination loss.
        num_matched: N of Eq. 2, at most half of V is used.
        matching_weight: c of Eq. 2.
        discrimination_weight: of the spatial discrimination loss. The paper names none; 1 costs
            pointing on generated scenes.
        shared: of :class:`EmbeddingModel`, and ``hidden_channels`` of the refinement.
    """

    stage = 2
    targets = ("concepts", "boxes", "box_rows")
    frozen = ("original",)
    _before: ClassVar = {"refinement.": None, "original.": "embedding."}

    def __init__(
        self,
        embedding: ConceptEmbedding,
        *,
        gamma: tuple[Any, Any, Any] | None = None,
        num_matched: int = 800,
        matching_weight: float = 1e-6,
        discrimination_weight: float = 0.1,
        **shared: Any,
    ) -> None:
        for name, value in (
            ("num_matched", num_matched),
            ("matching_weight", matching_weight),
            ("discrimination_weight", discrimination_weight),
        ):
            if value < 0:
                raise ValueError(f"{name} of ConceptMask must be at least 0, got {value}.")
        super().__init__(embedding, **shared)
        self.num_matched, self.matching_weight = num_matched, matching_weight
        self.discrimination_weight = discrimination_weight
        self.original = deepcopy(embedding)
        if gamma is not None and len(gamma[0]) != len(self.table) + 1:
            raise ValueError(
                f"gamma has {len(gamma[0]) - 1} rows for a word table of {len(self.table)}. "
                "Compute the overlaps again with this table."
            )
        # Statistics of the training data, whose size depends on the data: no part of the state.
        dtypes = {"indptr": torch.int64, "indices": torch.int64, "weights": torch.float32}
        for (name, dtype), values in zip(dtypes.items(), gamma or (None,) * 3, strict=True):
            values = None if values is None else torch.as_tensor(values, dtype=dtype)
            self.register_buffer(f"gamma_{name}", values, persistent=False)
        self.train()

    def losses(self, images: Tensor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Compute the losses of (N, 3, H, W) normalised images and samples of ConceptMapper."""
        refinement, vectors = self.refinement, self.vectors
        pair_images, pair_concepts = self._pairs(samples, "boxed")
        firsts = [0, *itertools.accumulate(len(sample["concepts"]) for sample in samples)]
        rows = [s["box_rows"] + first for s, first in zip(samples, firsts, strict=False)]
        boxes = torch.cat([sample["boxes"] for sample in samples]).to(images.device)
        hidden = refinement.hidden(self.embedding.embedding_map(images), vectors)
        with torch.no_grad():
            original = self.original.embedding_map(images)
        logits = refinement.pair_logits(hidden, pair_images, pair_concepts)
        size, map_size = tuple(images.shape[-2:]), tuple(hidden.shape[-2:])
        targets = box_maps(boxes, torch.cat(rows).to(boxes.device), len(logits), size, map_size)
        matched = matched_concepts(original, vectors, self.num_matched)
        matching = matching_loss(refinement.logits(hidden, matched), original, vectors, matched)
        losses = {
            "loss_boxes": box_loss(logits, targets),
            "loss_matching": self.matching_weight * matching,
        }
        if self.gamma_indptr is not None:
            gamma = (self.gamma_indptr, self.gamma_indices, self.gamma_weights)
            negatives, weights = negative_concepts(pair_concepts, gamma)
            losses["loss_discrimination"] = self.discrimination_weight * discrimination_loss(
                refinement.logits(hidden, negatives), targets, pair_images, weights
            )
        return losses


class SegmentationModel(_RefinedModel):
    """Stage 3: masks of an image and the attention maps of a concept, whichever it is.

    Embedding and refinement stay as they are.

    Args:
        segmenter: for as many maps as there are attention sizes.
        mask_size: M, side of the square that the image is warped to for the segmenter, best the
            side of the masks in training.
        shared: of :class:`EmbeddingModel`, and ``hidden_channels`` of the refinement.
    """

    stage = 3
    targets = ("concepts", "masks")
    frozen = ("embedding", "refinement")
    _before: ClassVar = {"segmenter.": None}

    def __init__(
        self,
        embedding: ConceptEmbedding,
        *,
        segmenter: ConceptSegmenter,
        mask_size: int = 320,
        **shared: Any,
    ) -> None:
        if mask_size < 1:
            raise ValueError(f"mask_size of ConceptMask must be at least 1, got {mask_size}.")
        super().__init__(embedding, **shared)
        if segmenter.num_maps != len(self.attention_sizes):
            raise ValueError(
                f"The segmenter takes {segmenter.num_maps} attention maps, but there are "
                f"{len(self.attention_sizes)} attention_sizes: {self.attention_sizes}."
            )
        self.size = mask_size
        self.segmenter = segmenter
        self.train()

    def losses(self, images: Tensor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Compute the loss of (N, 3, H, W) normalised images and samples of ConceptMapper.

        The segmenter sees the images at the size of the masks.
        """
        pair_images, pair_concepts = self._pairs(samples, "masked")
        masks = torch.cat([sample["masks"] for sample in samples]).to(images.device)
        size, maps = masks.shape[-2:], []
        with torch.no_grad():
            for each in self.embedding_maps(images):
                hidden = self.refinement.hidden(each, self.vectors)
                prob = self.refinement.pair_logits(hidden, pair_images, pair_concepts).sigmoid()
                maps.append(resize_maps(prob[:, None], size))
        images = resize_maps(images, size, antialias=True)
        logits = self.segmenter(images, normalise_maps(torch.cat(maps, dim=1)), pair_images)
        return {"loss_masks": concept_segmentation_loss(logits, masks)}

    def segment(
        self, images: Tensor, attention: Sequence[Tensor], size: tuple[int, int] | None = None
    ) -> Tensor:
        """Make (N, C, *size) probabilities of (N, C, h, w) attention maps by attention size.

        Args:
            images: (N, 3, H, W), normalised.
            attention: of :meth:`attention`.
            size: height and width of the result; None for those of the images.
        """
        size = tuple(images.shape[-2:]) if size is None else size
        side = (self.size, self.size)
        images = resize_maps(images, side, antialias=True)
        num_images, num_concepts = attention[0].shape[:2]
        rows = torch.arange(num_images, device=images.device).repeat_interleave(num_concepts)
        pairs = [each.flatten(0, 1)[:, None] for each in attention]
        prob = images.new_zeros(num_images * num_concepts, *size)
        for start in range(0, len(prob), _SEGMENTED_PAIRS):
            chosen = slice(start, start + _SEGMENTED_PAIRS)
            maps = torch.cat([resize_maps(each[chosen], side) for each in pairs], dim=1)
            logits = self.segmenter(images, normalise_maps(maps), rows[chosen])
            prob[chosen] = resize_maps(logits[:, None], size)[:, 0].sigmoid()
        return prob.unflatten(0, (num_images, num_concepts))


def read_description(state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Read what a checkpoint says of its network, see :meth:`EmbeddingModel.get_extra_state`."""
    if prefix + EXTRA_STATE not in state_dict:
        raise ValueError("The checkpoint does not say what network it is of.")
    what = "a network of ConceptMask"
    found = unpack_state(state_dict[prefix + EXTRA_STATE], version=_VERSION, what=what)
    if found.get("system") != SYSTEM_NAME:
        raise ValueError(
            f"The checkpoint is of the system {found.get('system', 'of another name')}, not of "
            f"{SYSTEM_NAME}. Give one of ConceptMask."
        )
    return found


def _maxima(maps: Tensor) -> Tensor:
    return maps.amax(dim=(-2, -1))


def _named(sample: Sample) -> str:
    return f"Image {sample['image_id']!r}" if "image_id" in sample else "The image"
