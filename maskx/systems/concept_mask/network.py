"""ConceptMask: the mask of any concept, from tags of many, boxes of some and masks of few.

"ConceptMask: Large-Scale Segmentation from Semantic Concepts" (Wang et al., ECCV 2018). A concept
is a word vector. Stage 1 learns from tags to embed images among the word vectors, which gives an
attention map for each; stage 2 learns from boxes to refine these maps; stage 3 learns from masks to
make a mask of an image and a map.

A concept has a level: it is masked, boxed (every masked one is), an image-level one, of which only
tags were seen, or an unseen word, which is not in the table and has nothing but a vector.

Shape legend:
    N: images; V: concepts of the word table; k: length of a word vector; C: asked concepts;
    P: pairs of an image and a concept that is in it; B: boxes; A: attention sizes;
    H, W: size of an image; h, w: size of an attention map; M: side of the masks.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.core.checks import check_choice
from maskx.systems.concept_mask.attention import AttentionRefinement, initial_attention
from maskx.systems.concept_mask.embedding import ConceptEmbedding, embedding_loss, soft_topics
from maskx.systems.concept_mask.losses import (
    box_loss,
    box_maps,
    discrimination_loss,
    matched_concepts,
    matching_loss,
    negative_concepts,
)
from maskx.systems.concept_mask.query import (
    ConceptQuery,
    ConceptResults,
    checked_query,
    concept_query,
)
from maskx.systems.concept_mask.segmenter import (
    ConceptSegmenter,
    concept_segmentation_loss,
    mean_maps,
    normalise_maps,
    resize_maps,
)
from maskx.systems.concept_mask.stages import TABLE_KEYS, check_table, handed_on

STAGES = (1, 2, 3)
ATTENTION_KINDS = ("blended", "own", "nearest", "initial")

# Concepts whose maps are made at a time when only their maxima are wanted.
_VOCABULARY_CHUNK = 2048
# Pairs whose masks are made at a time.
_SEGMENTED_PAIRS = 16
_MASK_THRESHOLD = 0.5
_EXISTENCE_THRESHOLD = 0.5  # until it is fitted


class ConceptMask(nn.Module):
    """The networks and losses of one of the three stages, and inference.

    Every stage holds what inference needs of the stages before, frozen and in evaluation mode where
    it is not trained. Stage 2 also holds ``original``, the embedding network of stage 1, which does
    not change. The word table is part of the state dict, and another table is refused on loading.

    Args:
        embedding: the network of stage 1.
        vectors: (V, k) the word table.
        idf: (V,) weight of each tag in a soft topic.
        boxed: concepts with boxes; needed from stage 2 on.
        masked: concepts with masks, all of them boxed.
        stage: what is trained: 1 the embedding, 2 the embedding and the refinement, 3 the
            segmenter.
        hidden_channels: of the refinement.
        segmenter: needed in stage 3, for as many maps as there are attention sizes.
        attention_sizes: sides of the squares in pixels that the image is warped to for the
            attention maps of stage 3 and of inference.
        mask_size: side of the square that the image is warped to for the segmenter at inference,
            best the side of the masks in training.
        gamma: weights of Eq. 4 as the (indptr, indices, weights) of a sparse (V, V) matrix by
            rows; None trains without the spatial discrimination loss.
        num_matched: N of Eq. 2, at most half of V is used.
        matching_weight: c of Eq. 2.
        discrimination_weight: of the spatial discrimination loss.

    Raises:
        ValueError: an argument is out of range or does not fit the others.
    """

    def __init__(
        self,
        embedding: ConceptEmbedding,
        *,
        vectors: Tensor,
        idf: Tensor,
        boxed: Sequence[int] = (),
        masked: Sequence[int] = (),
        stage: int,
        hidden_channels: int = 1024,
        segmenter: ConceptSegmenter | None = None,
        attention_sizes: Sequence[int] = (300, 700),
        mask_size: int = 320,
        gamma: tuple[Tensor, Tensor, Tensor] | None = None,
        num_matched: int = 800,
        matching_weight: float = 1e-6,
        discrimination_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("stage of ConceptMask", stage, STAGES)
        num_concepts = len(vectors)
        if len(idf) != num_concepts:
            raise ValueError(f"idf has {len(idf)} numbers for a word table of {num_concepts}.")
        _check_levels(boxed, masked, num_concepts, needs_boxed=stage > 1)
        if not attention_sizes or min(attention_sizes) < embedding.stride:
            raise ValueError(
                f"attention_sizes of ConceptMask are {tuple(attention_sizes)}. Allowed: one or "
                f"more sides of a square of at least {embedding.stride} pixels, the stride of the "
                "embedding."
            )
        if (segmenter is None) == (stage == 3):
            raise ValueError("ConceptMask needs a segmenter in stage 3, and takes none before.")
        if segmenter is not None and segmenter.num_maps != len(attention_sizes):
            raise ValueError(
                f"The segmenter takes {segmenter.num_maps} attention maps, but there are "
                f"{len(attention_sizes)} attention_sizes: {tuple(attention_sizes)}."
            )
        for name, value, least in (
            ("mask_size", mask_size, 1),
            ("num_matched", num_matched, 0),
            ("matching_weight", matching_weight, 0),
            ("discrimination_weight", discrimination_weight, 0),
        ):
            if value < least:
                raise ValueError(f"{name} of ConceptMask must be at least {least}, got {value}.")
        self.stage = stage
        self.attention_sizes = tuple(attention_sizes)
        self.mask_size = mask_size
        self.num_matched = num_matched
        self.matching_weight = matching_weight
        self.discrimination_weight = discrimination_weight

        self.embedding = embedding
        self.refinement = self.original = None
        if stage == 1:
            self.register_buffer("table", vectors.float().clone())
        else:
            self.refinement = AttentionRefinement(vectors.float(), hidden_channels=hidden_channels)
        if stage == 2:
            self.original = deepcopy(embedding)
        self.segmenter = segmenter
        self._supervised = frozenset(masked if stage == 3 else boxed)
        self.register_buffer("idf", idf.float().clone())
        for name, chosen in (("is_boxed", boxed), ("is_masked", masked)):
            flags = torch.zeros(num_concepts, dtype=torch.bool)
            flags[list(chosen)] = True
            self.register_buffer(name, flags)
        if gamma is not None and len(gamma[0]) != num_concepts + 1:
            raise ValueError(
                f"gamma has {len(gamma[0]) - 1} rows for a word table of {num_concepts}. Compute "
                "the overlaps again with this table."
            )
        # Statistics of the training data, whose size depends on the data: no part of the state.
        dtypes = {"indptr": torch.int64, "indices": torch.int64, "weights": torch.float32}
        for (name, dtype), values in zip(dtypes.items(), gamma or (None,) * 3, strict=True):
            values = None if values is None else torch.as_tensor(values, dtype=dtype)
            self.register_buffer(f"gamma_{name}", values, persistent=False)
        self.register_buffer("theta_image", torch.ones(()))
        self.register_buffer("theta_unseen", torch.ones(()))
        thresholds = torch.full((num_concepts,), _EXISTENCE_THRESHOLD)
        self.register_buffer("existence_thresholds", thresholds)
        self.register_buffer("existence_threshold_unseen", torch.zeros(()))
        for module in self._frozen():
            module.requires_grad_(False)
        self.train()

    @property
    def vectors(self) -> Tensor:
        """The (V, k) word table."""
        return self.table if self.stage == 1 else self.refinement.vectors

    @property
    def has_fitted_thresholds(self) -> bool:
        """Whether the existence thresholds of the word table were fitted, on any images."""
        return self.stage > 1 and bool((self.existence_thresholds != _EXISTENCE_THRESHOLD).any())

    def train(self, mode: bool = True) -> "ConceptMask":
        """Set training or evaluation mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def load_previous_stage(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over what the stage before has learned.

        Stage 2 starts from the embedding network of stage 1, which it also keeps as ``original``;
        stage 3 from the embedding network and the refinement of stage 2.

        Args:
            state_dict: of a :class:`ConceptMask` of the stage before.

        Raises:
            ValueError: `state_dict` is of another stage, word table or list of boxed concepts, or
                does not fit.
        """
        weights = handed_on(state_dict, self.state_dict(), stage=self.stage)
        self.load_state_dict(weights, strict=False)

    def set_fitted(
        self,
        *,
        theta_image: float | None = None,
        theta_unseen: float | None = None,
        existence_thresholds: Tensor | None = None,
        existence_threshold_unseen: float | None = None,
    ) -> None:
        """Store what was fitted on validation images; what is None stays as it is.

        Args:
            theta_image: in [0, 1], share of the own map of an image-level concept in its blend.
            theta_unseen: in [0, 1], the same for an unseen word.
            existence_thresholds: (V,); NaN leaves the threshold of that concept as it is.
            existence_threshold_unseen: a cosine; NaN leaves it as it is.

        Raises:
            ValueError: a value is out of range.
        """
        for name, theta in (("theta_image", theta_image), ("theta_unseen", theta_unseen)):
            if theta is None:
                continue
            if not 0 <= theta <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {theta}.")
            getattr(self, name).fill_(theta)
        if existence_thresholds is not None:
            if len(existence_thresholds) != len(self.vectors):
                raise ValueError(
                    f"existence_thresholds has {len(existence_thresholds)} numbers for a word "
                    f"table of {len(self.vectors)}."
                )
            _fill_known(self.existence_thresholds, existence_thresholds)
        if existence_threshold_unseen is not None:
            _fill_known(self.existence_threshold_unseen, existence_threshold_unseen)

    # Training

    def losses(
        self,
        images: Tensor,
        *,
        image_labels: Sequence[Sequence[int]] | None = None,
        concepts: Sequence[Sequence[int]] | None = None,
        boxes: Tensor | None = None,
        box_rows: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of the stage.

        A loss for which there is no supervision is zero, with a graph.

        Args:
            images: (N, 3, H, W), normalised.
            image_labels: stage 1: the tags of each image.
            concepts: stage 2: the boxed concepts of each image; stage 3: its masked ones. One list
                after the other they are the P pairs.
            boxes: stage 2: (B, 4) XYXY in pixels of `images`.
            box_rows: stage 2: (B,) the pair of each box.
            masks: stage 3: (P, M, M) bool or {0, 1}; the segmenter sees the images at their size.

        Returns:
            Stage 1: ``loss_embedding``. Stage 2: ``loss_boxes``, ``loss_matching`` and, with
            `gamma`, ``loss_discrimination``, weighted. Stage 3: ``loss_masks``.

        Raises:
            ValueError: a concept is not one of those with tags, boxes or masks, or the images are
                smaller than the stride.
        """
        if self.stage == 1:
            topics = soft_topics(image_labels, self.vectors, self.idf)
            return {"loss_embedding": embedding_loss(self.embedding(images), topics)}
        pairs = self._pairs(concepts, images.device)
        if self.stage == 2:
            return self._refinement_losses(images, *pairs, boxes, box_rows)
        with torch.no_grad():
            attention = self._pair_attention(images, *pairs, masks.shape[-2:])
        images = resize_maps(images, masks.shape[-2:], antialias=True)
        logits = self.segmenter(images, attention, pairs[0])
        return {"loss_masks": concept_segmentation_loss(logits, masks)}

    def _pairs(
        self, concepts: Sequence[Sequence[int]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the (P,) image and the (P,) concept of each pair."""
        pairs = [(image, int(concept)) for image, each in enumerate(concepts) for concept in each]
        others = sorted({concept for _, concept in pairs} - self._supervised)
        if others:
            level = "boxed" if self.stage == 2 else "masked"
            raise ValueError(
                f"The batch has the concept indices {others}, which are not among the {level} "
                f"concepts. Leave them out of the data, or list them as {level}."
            )
        images, concepts = (
            torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).to(device).unbind(1)
        )
        return images, concepts

    def _refinement_losses(
        self,
        images: Tensor,
        pair_images: Tensor,
        pair_concepts: Tensor,
        boxes: Tensor,
        box_rows: Tensor,
    ) -> dict[str, Tensor]:
        refinement, vectors = self.refinement, self.vectors
        hidden = refinement.hidden(self.embedding.embedding_map(images))
        with torch.no_grad():
            original = self.original.embedding_map(images)
        logits = refinement.pair_logits(hidden, pair_images, pair_concepts)
        size = tuple(images.shape[-2:])
        targets = box_maps(boxes, box_rows, len(logits), size, tuple(hidden.shape[-2:]))
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

    def _pair_attention(
        self, images: Tensor, pair_images: Tensor, pair_concepts: Tensor, size: Sequence[int]
    ) -> Tensor:
        """Make the (P, A, *size) maps of pairs of boxed concepts that the segmenter takes."""
        refinement = self.refinement
        maps = []
        for each in self.embedding_maps(images):
            logits = refinement.pair_logits(refinement.hidden(each), pair_images, pair_concepts)
            maps.append(resize_maps(logits.sigmoid()[:, None], size))
        return normalise_maps(torch.cat(maps, dim=1))

    # Inference

    def embedding_maps(self, images: Tensor) -> list[Tensor]:
        """Warp (N, 3, H, W) normalised images to squares and embed them.

        This is all that inference takes from the images, whatever concepts are asked for.

        Returns:
            For each attention size the (N, k, h, w) embeddings of the positions.

        Raises:
            ValueError: the images are smaller than the stride.
        """
        height, width = images.shape[-2:]
        if min(height, width) < self.embedding.stride:
            raise ValueError(
                f"An image has {height} x {width} pixels, less than the {self.embedding.stride} of "
                "one position of an attention map. Leave the image out or give a larger one."
            )
        sizes = ((size, size) for size in self.attention_sizes)
        return [
            self.embedding.embedding_map(resize_maps(images, size, antialias=True))
            for size in sizes
        ]

    def attention(
        self, maps: Sequence[Tensor], query: ConceptQuery, *, kind: str = "blended"
    ) -> list[Tensor]:
        """Make the attention maps of concepts (section 4.4).

        Args:
            maps: of :meth:`embedding_maps`.
            query: C concepts.
            kind: ``initial``: of Eq. 1, any values. All others are in [0, 1]. ``own``: the refined
                map; for an unseen word and in stage 1 the normalised initial map. ``nearest``: the
                refined map of the boxed concept with the nearest word vector. ``blended``: that of
                boxed concepts is their own, that of others theta * own + (1 - theta) * nearest.

        Returns:
            For each attention size (N, C, h, w).
        """
        check_choice("kind of attention", kind, ATTENTION_KINDS)
        if kind == "nearest" and self.stage == 1:
            raise ValueError("Stage 1 of ConceptMask has no refined maps. Allowed: own, initial.")
        query = checked_query(query, self.vectors)
        if kind == "initial":
            return [initial_attention(each, query.vectors) for each in maps]
        if self.stage == 1:
            return [normalise_maps(initial_attention(each, query.vectors)) for each in maps]
        if kind == "blended":
            theta = self._theta(query)
        else:
            theta = query.vectors.new_full((len(query),), kind == "own")
        return [self._blend(each, query, theta) for each in maps]

    def existence(self, maps: Sequence[Tensor], query: ConceptQuery) -> Tensor:
        """Score whether concepts are in the images.

        Args:
            maps: of :meth:`embedding_maps`.
            query: C concepts.

        Returns:
            (N, C): the maximum of the refined maps of all attention sizes, before they are
            normalised; for unseen words, and for all in stage 1, the largest cosine of the
            embedding of a position and the word vector.
        """
        query = checked_query(query, self.vectors)
        scores = [_maxima(initial_attention(each, query.vectors, cosine=True)) for each in maps]
        if self.stage > 1:
            rows = query.indices.clamp(min=0)
            known = (query.indices >= 0).expand_as(scores[0])
            refined = (_maxima(self.refinement(each, rows).sigmoid()) for each in maps)
            scores = [torch.where(known, *both) for both in zip(refined, scores, strict=True)]
        return torch.stack(scores).amax(dim=0)

    def vocabulary_existence(self, maps: Sequence[Tensor]) -> Tensor:
        """Score all concepts of the word table; see :meth:`existence`.

        No more than 2048 maps are there at a time.

        Returns:
            (N, V).
        """
        best = None
        for each in maps:
            scores = torch.cat([_maxima(chunk) for chunk in self._all_maps(each)], dim=1)
            best = scores if best is None else torch.maximum(best, scores)
        return best

    def segment(
        self, images: Tensor, attention: Sequence[Tensor], size: tuple[int, int] | None = None
    ) -> Tensor:
        """Make masks of attention maps.

        Before stage 3 the mean of the normalised attention maps takes the place of the masks.

        Args:
            images: (N, 3, H, W), normalised.
            attention: for each attention size (N, C, h, w) in [0, 1].
            size: height and width of the result; None for those of the images.

        Returns:
            (N, C, *size) probabilities.
        """
        size = images.shape[-2:] if size is None else size
        if self.segmenter is None:
            return mean_maps(attention, size)
        side = (self.mask_size, self.mask_size)
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

    @torch.no_grad()
    def predict(
        self,
        image: Tensor,
        query: ConceptQuery | None = None,
        *,
        output_size: tuple[int, int] | None = None,
    ) -> ConceptResults:
        """Predict the masks of concepts in one image; call it in evaluation mode.

        The image is embedded once per attention size, for however many concepts.

        Args:
            image: (3, H, W), normalised.
            query: concepts; None for all of the word table that exist in the image.
            output_size: height and width of the masks, those of the image's file; None for those
                of `image`.

        Raises:
            ValueError: the image is smaller than the stride, or the query does not fit the table.
        """
        size = tuple(image.shape[-2:]) if output_size is None else output_size
        maps = self.embedding_maps(image[None])
        if query is None:
            existence = self.vocabulary_existence(maps)[0]
            (indices,) = (existence > self._thresholds()).nonzero(as_tuple=True)
            existence = existence[indices]
            query = concept_query(indices, self.vectors[indices])
        else:
            existence = self.existence(maps, query)[0]
        query = checked_query(query, self.vectors)
        known = query.indices >= 0
        thresholds = self._thresholds()[query.indices.clamp(min=0)]
        thresholds = torch.where(known, thresholds, self.existence_threshold_unseen)
        attention = self.attention(maps, query)
        initial = self.attention(maps, query, kind="initial")
        mask_prob = self.segment(image[None], attention, size)[0]
        return ConceptResults(
            indices=query.indices,
            attention=mean_maps(attention, size)[0],
            initial=mean_maps(initial, size)[0],
            mask_prob=mask_prob,
            masks=mask_prob > _MASK_THRESHOLD,
            existence=existence,
            exists=existence > thresholds,
        )

    def nearest_boxed(self, vectors: Tensor) -> Tensor:
        """Return the (C,) boxed concepts whose word vectors have the largest cosine.

        Args:
            vectors: (C, k) word vectors.
        """
        (boxed,) = self.is_boxed.nonzero(as_tuple=True)
        cosines = F.normalize(vectors, dim=1) @ F.normalize(self.vectors[boxed], dim=1).T
        return boxed[cosines.argmax(dim=1)]

    def _blend(self, embedding_map: Tensor, query: ConceptQuery, theta: Tensor) -> Tensor:
        """Return theta * own + (1 - theta) * nearest, with theta (C,)."""
        known = query.indices >= 0
        nearest = self.nearest_boxed(query.vectors)
        rows = torch.cat([torch.where(known, query.indices, nearest), nearest])
        own, neighbour = self.refinement(embedding_map, rows).sigmoid().chunk(2, dim=1)
        initial = normalise_maps(initial_attention(embedding_map, query.vectors))
        own = torch.where(known[:, None, None], own, initial)
        theta = theta[:, None, None]
        return theta * own + (1 - theta) * neighbour

    def _theta(self, query: ConceptQuery) -> Tensor:
        known = query.indices >= 0
        boxed = known & self.is_boxed[query.indices.clamp(min=0)]
        return torch.where(boxed, 1, torch.where(known, self.theta_image, self.theta_unseen))

    def _thresholds(self) -> Tensor:
        """Return the (V,) existence thresholds; in stage 1 all scores are cosines."""
        if self.stage > 1:
            return self.existence_thresholds
        return self.existence_threshold_unseen.expand(len(self.vectors))

    def _all_maps(self, embedding_map: Tensor) -> Iterator[Tensor]:
        """Yield the maps of all concepts that :meth:`existence` takes the maxima of, in chunks."""
        if self.stage == 1:
            for vectors in self.vectors.split(_VOCABULARY_CHUNK):
                yield initial_attention(embedding_map, vectors, cosine=True)
            return
        hidden = self.refinement.hidden(embedding_map)
        every_concept = torch.arange(len(self.vectors), device=hidden.device)
        for concepts in every_concept.split(_VOCABULARY_CHUNK):
            yield self.refinement.logits(hidden, concepts).sigmoid()

    def _frozen(self) -> list[nn.Module]:
        """List what this stage does not train."""
        if self.stage == 3:
            return [self.embedding, self.refinement]
        return [self.original] if self.stage == 2 else []

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        found = state_dict.get(prefix + TABLE_KEYS[self.stage])
        if found is not None:
            check_table(self.vectors, found)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_levels(
    boxed: Sequence[int], masked: Sequence[int], num_concepts: int, *, needs_boxed: bool
) -> None:
    for name, chosen in (("boxed", boxed), ("masked", masked)):
        outside = sorted(i for i in set(chosen) if not 0 <= i < num_concepts)
        if outside:
            raise ValueError(
                f"The {name} concepts have the indices {outside}. Allowed: 0 to {num_concepts - 1}."
            )
    without_boxes = sorted(set(masked) - set(boxed))
    if without_boxes:
        raise ValueError(
            f"The concepts {without_boxes} are masked but not boxed. Add them to the boxed ones."
        )
    if needs_boxed and not boxed:
        raise ValueError("ConceptMask has no boxed concept. Stages 2 and 3 need at least one.")


def _fill_known(buffer: Tensor, values: Tensor | float) -> None:
    """Write the values that are not NaN."""
    values = torch.as_tensor(values, dtype=buffer.dtype, device=buffer.device)
    buffer.copy_(torch.where(values.isnan(), buffer, values))


def _maxima(maps: Tensor) -> Tensor:
    return maps.amax(dim=(-2, -1))
