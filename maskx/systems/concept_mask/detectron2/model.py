"""ConceptMask: masks of the concepts of a word table, learned from tags, boxes and masks."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.utils.logger import log_first_n
from torch import Tensor

from maskx.core.backbones import SmallResNet
from maskx.core.sample_models import SampleModel, required
from maskx.core.timm_backbones import TimmBackbone
from maskx.core.word_table import WordTable
from maskx.detectron2.backbones import check_images
from maskx.detectron2.hooks import hooks_of
from maskx.detectron2.image_model import choose_feature, pixel_arguments
from maskx.systems.concept_mask.detectron2.data import concept_split, concept_table, unseen_words
from maskx.systems.concept_mask.embedding import ConceptEmbedding
from maskx.systems.concept_mask.network import STAGES, ConceptMask, ConceptQuery
from maskx.systems.concept_mask.overlap import load_overlap, negative_weights
from maskx.systems.concept_mask.query import ConceptResults
from maskx.systems.concept_mask.segmenter import ConceptSegmenter
from maskx.systems.concept_mask.stages import stage_of
from maskx.systems.concept_mask.steps import batch_targets, named_query

__all__ = ["MaskXConceptMask", "check_concept_mask", "check_started"]

_KEYS = "MODEL.MASKX.CONCEPT_MASK"
_MAPPER = "Use MaskXConceptMapper, as the Trainer of maskx does."
# Targets that a training sample of each stage must have.
_TARGETS = {1: ("image_labels",), 2: ("concepts", "boxes", "box_rows"), 3: ("concepts", "masks")}
_HASH, _NETWORK = "table_hash", "network."


@META_ARCH_REGISTRY.register()
class MaskXConceptMask(SampleModel):
    """One of the three stages of ConceptMask, and inference.

    Wang et al., "ConceptMask: Large-Scale Segmentation from Semantic Concepts" (ECCV 2018). In
    training mode the checkpoint of the stage before may be loaded too, which is then the start.
    Checkpoints hold the hash of their word table, and another table is refused.

    Args:
        network: the plain network; the backbone of its embedding is one of Detectron2.
        table: word table of the network.
        unseen: words that are not in it, found by their vectors alone; None without.
        concepts: names to find where a sample does not say; () for all that exist in the image.
        pixel_mean: by channel, in the order of the images.
        pixel_std: by channel.

    Attributes:
        is_new: no checkpoint of its own stage was loaded.

    Raises:
        ValueError: the table is not that of the network, or a concept is not known.
    """

    @configurable
    def __init__(
        self,
        *,
        network: ConceptMask,
        table: WordTable,
        unseen: WordTable | None = None,
        concepts: Sequence[str] = (),
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std)
        own = network.vectors.cpu()
        if not torch.equal(own, torch.from_numpy(table.vectors)):
            raise ValueError(
                f"The word table has {len(table)} vectors of length {table.dim}, which are not the "
                f"{len(own)} of length {own.shape[1]} that the network was made with. Give that."
            )
        self.network = network
        self.table, self.unseen = table, unseen
        self.is_new = True
        self.concepts = tuple(concepts)
        if self.concepts:
            self.ask(self.concepts)  # refuses names that are not known
        digest = torch.tensor(list(bytes.fromhex(table.hash)), dtype=torch.uint8)
        self.register_buffer(_HASH, digest)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments from a configuration.

        Raises:
            FileNotFoundError: a file that it names is missing.
            ValueError: keys or files do not fit together.
        """
        keys = cfg.MODEL.MASKX.CONCEPT_MASK
        table, split = concept_table(cfg), concept_split(cfg)
        backbone = build_backbone(cfg)
        in_feature, in_channels = choose_feature(backbone, cfg.MODEL.MASKX.IN_FEATURE)
        _check_sizes(cfg, backbone.size_divisibility or 1)
        embedding = ConceptEmbedding(
            backbone,
            in_feature=in_feature,
            in_channels=in_channels,
            dim=table.dim,
            hidden_channels=keys.EMBEDDING_CHANNELS,
            final_relu=keys.FINAL_RELU,
        )
        embedding.stride = backbone.output_shape()[in_feature].stride
        gamma = segmenter = None
        if keys.STAGE == 2 and keys.DISCRIMINATION_WEIGHT and keys.OVERLAP:
            gamma = negative_weights(load_overlap(keys.OVERLAP, table.names))
        if keys.STAGE == 3:
            segmenter = ConceptSegmenter(
                _build_encoder(keys.ENCODER_DEPTH),
                num_maps=len(keys.ATTENTION_SIZES),
                decoder_channels=keys.DECODER_CHANNELS,
            )
        network = ConceptMask(
            embedding,
            vectors=torch.from_numpy(table.vectors),
            idf=torch.from_numpy(table.idf),
            boxed=split.boxed_indices,
            masked=split.masked_indices,
            stage=keys.STAGE,
            hidden_channels=keys.HIDDEN_CHANNELS,
            segmenter=segmenter,
            attention_sizes=keys.ATTENTION_SIZES,
            mask_size=cfg.INPUT.MASKX.SIZE,
            gamma=gamma,
            num_matched=keys.NUM_MATCHED,
            matching_weight=keys.MATCHING_WEIGHT,
            discrimination_weight=keys.DISCRIMINATION_WEIGHT,
        )
        return {
            "network": network,
            "table": table,
            "unseen": unseen_words(cfg),
            "concepts": cfg.TEST.MASKX.CONCEPTS,
            **pixel_arguments(cfg),
        }

    def ask(self, concepts: Sequence[Any]) -> tuple[list[str], ConceptQuery]:
        """Resolve names, concept indices or vectors; see :func:`named_query`."""
        return named_query(self.table, self.unseen, concepts)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute the losses of the stage, or find concepts in images.

        Args:
            batched_inputs: samples with ``image`` (3, H, W) from 0 to 255. In training all of one
                size, with the targets of
                :class:`maskx.systems.concept_mask.detectron2.data.MaskXConceptMapper`. In
                evaluation ``height`` and ``width``, the size of the output, are those of the
                image, and ``query``, what to look for, that of ``concepts`` where they are not
                given.

        Returns:
            In training a dict of losses, see
            :meth:`maskx.systems.concept_mask.network.ConceptMask.losses`. Otherwise per sample, of
            C concepts,

            - ``concepts``: their names, but for those of a ``query``;
            - ``concept_indices``: (C,) rows of the word table, -1 for unseen words;
            - ``masks_prob`` (C, height, width), and ``masks``, bool, where that is above 0.5;
            - ``attention``: (C, height, width) in [0, 1], the normalised maps that the masks are
              made from;
            - ``existence``: (C,) how much each seems to be in the image, and ``exists``, bool.

        Raises:
            ValueError: a sample lacks a target, the sizes differ, or an image is too small.
        """
        if not self.training:
            return [self.predict(sample) for sample in batched_inputs]
        for key in _TARGETS[self.network.stage]:
            for sample in batched_inputs:
                required(sample, key, _MAPPER)
        images = [self.normalise(sample) for sample in batched_inputs]
        sizes = {tuple(image.shape[-2:]) for image in images}
        if len(sizes) > 1:
            raise ValueError(
                "The images of a training batch have different sizes: "
                f"{', '.join(map(str, sorted(sizes)))}. {_MAPPER}"
            )
        if self.network.stage == 1:
            targets = {"image_labels": [sample["image_labels"] for sample in batched_inputs]}
        else:
            targets = batch_targets(batched_inputs)
            for name in targets.keys() - {"concepts"}:
                targets[name] = targets[name].to(self.device)
        return self.network.losses(torch.stack(images), **targets)

    def predict(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Find concepts in one image, in evaluation mode; see :meth:`forward`."""
        names, query = None, sample.get("query")
        if query is None and self.concepts:
            names, query = self.ask(self.concepts)
        image = sample["image"]
        size = (sample.get("height", image.shape[1]), sample.get("width", image.shape[2]))
        own_names, found = self.find(image, query, size)
        return {
            "concepts": own_names if names is None else names,
            "concept_indices": found.indices,
            "masks_prob": found.mask_prob,
            "masks": found.masks,
            "attention": found.attention,
            "existence": found.existence,
            "exists": found.exists,
        }

    @torch.no_grad()
    def find(
        self, image: Tensor, query: ConceptQuery | None, size: tuple[int, int]
    ) -> tuple[list[str], ConceptResults]:
        """Find concepts in one image, in evaluation mode.

        Args:
            image: (3, H, W) from 0 to 255.
            query: of :meth:`ask`; None for all of the word table that exist in the image.
            size: height and width of the result.

        Returns:
            Their names, "vector" and its position for one that was given as a vector; and what was
            found.
        """
        if query is None and not self.network.has_fitted_thresholds:
            log_first_n(
                logging.WARNING,
                "All concepts that exist are asked for, but no threshold of existence was fitted: "
                f"there may be maps and masks of most of the {len(self.table)} concepts. Fit a "
                "model of stage 2 or 3 with tools/fit_concepts.py, or name concepts, as in "
                "TEST.MASKX.CONCEPTS.",
                name=__name__,
            )
        found = self.network.predict(self.normalise({"image": image}), query, output_size=size)
        names = [
            self.table.names[index] if index >= 0 else f"vector {place}"
            for place, index in enumerate(found.indices.tolist())
        ]
        return names, found

    def start_encoder(self, depth: int) -> None:
        """Start the encoder of the segmentation network from ImageNet weights.

        Args:
            depth: of the encoder.
        """
        segmenter = self.network.segmenter
        trained = TimmBackbone(f"resnet{depth}", pretrained=True)
        segmenter.image_stem.load_state_dict(trained.take_input_convolution().state_dict())
        segmenter.encoder.load_state_dict(trained.state_dict())

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Refuse another word table or stage; start from the stage before in training mode."""
        found = state_dict.get(prefix + _HASH)
        if found is not None and not torch.equal(found.cpu(), self.table_hash.cpu()):
            was, now = (bytes(each.tolist()).hex()[:12] for each in (found, self.table_hash))
            raise ValueError(
                f"The checkpoint was made with the word table {was}, but the one from "
                f"{self.table.source}, {_KEYS}.WORD_TABLE, is {now}. Vectors of another "
                "computation do not fit: name the table of the checkpoint, or train anew."
            )
        start = prefix + _NETWORK
        network = {n.removeprefix(start): v for n, v in state_dict.items() if n.startswith(start)}
        stage = stage_of(network) if found is not None else self.network.stage
        self.is_new = found is None or stage != self.network.stage
        if stage != self.network.stage:
            if not self.training:
                raise ValueError(
                    f"The checkpoint is of stage {stage} of ConceptMask, the model of stage "
                    f"{self.network.stage}. Set {_KEYS}.STAGE {stage}, or give a checkpoint of "
                    f"stage {self.network.stage}."
                )
            self.network.load_previous_stage(network)
            for name in network:
                del state_dict[start + name]
            state_dict.update({start + n: v for n, v in self.network.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_concept_mask(cfg: CfgNode) -> None:
    """Check the keys of ConceptMask that its modules do not check.

    Raises:
        ValueError: a key is out of range, or a file that is needed is not named.
    """
    if hooks_of(cfg).system != "concept_mask":
        return
    keys = cfg.MODEL.MASKX.CONCEPT_MASK
    if keys.STAGE not in STAGES:
        raise ValueError(f"{_KEYS}.STAGE is {keys.STAGE}. Allowed: {', '.join(map(str, STAGES))}.")
    if min(keys.MATCHING_WEIGHT, keys.DISCRIMINATION_WEIGHT) < 0 or keys.NUM_MATCHED < 1:
        raise ValueError(
            f"{_KEYS}.NUM_MATCHED is {keys.NUM_MATCHED}, MATCHING_WEIGHT {keys.MATCHING_WEIGHT} "
            f"and DISCRIMINATION_WEIGHT {keys.DISCRIMINATION_WEIGHT}. Allowed: the first from 1, "
            "the others from 0."
        )
    if keys.ENCODER_PRETRAINED and keys.STAGE == 3:
        if keys.ENCODER_DEPTH == 0:
            raise ValueError(
                f"{_KEYS}.ENCODER_PRETRAINED is True, but ENCODER_DEPTH is 0, the small network, "
                "for which there are no weights. Set it False, or a depth of a ResNet."
            )
        check_images(cfg, f"resnet{keys.ENCODER_DEPTH}", f"{_KEYS}.ENCODER_PRETRAINED")


def check_started(cfg: CfgNode, missing: Sequence[str]) -> None:
    """Check, before a training starts, that it has what it starts from.

    Args:
        cfg: the configuration.
        missing: names of the weights that ``MODEL.WEIGHTS`` does not have.

    Raises:
        ValueError: weights of the stage before are missing, or the overlaps of stage 2.
    """
    keys, weights = cfg.MODEL.MASKX.CONCEPT_MASK, cfg.MODEL.WEIGHTS
    if keys.STAGE > 1:
        lacking = [name for name in missing if name.startswith(f"{_NETWORK}embedding.")]
        if lacking or not weights:
            lacks = f"lacks {', '.join(lacking[:3])}" if lacking else "is empty"
            raise ValueError(
                f"{_KEYS}.STAGE is {keys.STAGE}, which starts from stage {keys.STAGE - 1}, but "
                f"MODEL.WEIGHTS '{weights}' {lacks}. Set it to the model_final.pth of that stage, "
                "or train all stages with tools/train_concept_mask.py."
            )
    if keys.STAGE == 2 and keys.DISCRIMINATION_WEIGHT and not keys.OVERLAP:
        raise ValueError(
            f"{_KEYS}.OVERLAP is empty, which the spatial discrimination loss needs. Make the file "
            "with tools/concept_overlap.py, train with tools/train_concept_mask.py, which does, or "
            "set DISCRIMINATION_WEIGHT 0."
        )


def _check_sizes(cfg: CfgNode, divisor: int) -> None:
    """Refuse sides of images that the backbone does not take."""
    keys = cfg.MODEL.MASKX.CONCEPT_MASK
    sizes = [(f"{_KEYS}.ATTENTION_SIZES", side) for side in keys.ATTENTION_SIZES]
    if keys.STAGE < 3:
        sizes.append(("INPUT.MASKX.SIZE", cfg.INPUT.MASKX.SIZE))
    for key, side in sizes:
        if side % divisor:
            raise ValueError(
                f"{key} has the side {side}, but {cfg.MODEL.BACKBONE.NAME} takes multiples of "
                f"{divisor}, such as {max(side // divisor, 1) * divisor}."
            )


def _build_encoder(depth: int) -> torch.nn.Module:
    return TimmBackbone(f"resnet{depth}") if depth else SmallResNet(output_stride=16)
