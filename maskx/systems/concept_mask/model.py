"""ConceptMask driven with samples, and how its network is built and opened."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskx.core.backbone_choice import build_backbone, choose_feature
from maskx.core.backbones import SmallResNet
from maskx.core.files import written_whole
from maskx.core.sample_models import Sample, SampleModel
from maskx.core.word_table import WordTable, load_word_table
from maskx.engine.training import CHECKPOINT_NAME, load_state, read_checkpoint
from maskx.systems.concept_mask.concept_sets import ConceptSplit
from maskx.systems.concept_mask.embedding import ConceptEmbedding
from maskx.systems.concept_mask.image_samples import Record, read_sample
from maskx.systems.concept_mask.network import ConceptMask, ConceptQuery, ConceptResults
from maskx.systems.concept_mask.segmenter import ConceptSegmenter
from maskx.systems.concept_mask.steps import batch_targets

__all__ = [
    "MODEL_NAME",
    "SEGMENTATION",
    "UNSEEN_NAME",
    "WORDS_NAME",
    "ConceptNetwork",
    "SampleConceptMask",
    "build_concept_mask",
    "check_table",
    "open_concept_mask",
    "save_fitted",
]

MODEL_NAME = "model.json"
"""File beside a checkpoint that says what network it is of."""
SEGMENTATION = "segmentation"
"""Folder of the last stage in that of a run."""
WORDS_NAME, UNSEEN_NAME = "words.safetensors", "unseen_words.safetensors"
"""Word tables in the folder of a run: of the vocabulary, and of unseen concepts if there are."""


@dataclass(frozen=True)
class ConceptNetwork:
    """What the networks of all three stages are built from.

    Attributes:
        backbone: of the embedding, ``small``, ``vgg16`` or the name of a torchvision ResNet.
        pretrained: start from ImageNet weights, which torchvision downloads; their norms stay.
        final_relu: the embedding ends with a ReLU, as the paper has it.
        image_size: side of the squares that images are warped to for the segmentation network.
        embedding_size: side of the squares that the embedding is trained on, in stages 1 and 2.
        attention_sizes: sides of the squares that the two attention maps are made of.
        hidden_channels: of the embedding's two hidden layers.
        refinement_channels: of the hidden layer of the refinement.
        encoder_widths: of the segmentation network's encoder.
        decoder_channels: of its decoder.
    """

    backbone: str = "small"
    pretrained: bool = False
    final_relu: bool = False
    image_size: int = 128
    embedding_size: int = 64
    attention_sizes: tuple[int, int] = (64, 128)
    hidden_channels: tuple[int, int] = (256, 256)
    refinement_channels: int = 256
    encoder_widths: tuple[int, int, int, int] = (16, 32, 48, 64)
    decoder_channels: tuple[int, int, int, int, int] = (64, 48, 32, 24, 16)


class SampleConceptMask(SampleModel):
    """Drives ConceptMask with samples, as Detectron2 drives its models.

    Args:
        network: one stage of ConceptMask.
        size: side in pixels of the squares that images are warped to in evaluation. Training
            samples have their size already.
        table_hash: of the word table it was built with.
    """

    def __init__(self, network: ConceptMask, *, size: int, table_hash: str) -> None:
        super().__init__(size)
        self.network = network
        self.table_hash = table_hash

    def forward(self, samples: list[Sample]) -> dict[str, Tensor] | list[ConceptResults]:
        """Compute losses in training, masks in evaluation.

        Args:
            samples: as of :class:`maskx.systems.concept_mask.image_samples.ConceptMapper`; in
                evaluation each with ``image`` and perhaps ``query``, what to look for: all that
                exists without.

        Returns:
            The losses of the stage, or the results of each sample, at the size of its image.
        """
        if not self.training:
            return [self.predict(sample, sample.get("query")) for sample in samples]
        images = torch.stack([self.normalise(sample) for sample in samples])
        if self.network.stage == 1:
            image_labels = [sample["image_labels"] for sample in samples]
            return self.network.losses(images, image_labels=image_labels)
        targets = batch_targets(samples)
        for name in targets.keys() - {"concepts"}:
            targets[name] = targets[name].to(images.device)
        return self.network.losses(images, **targets)

    def preprocess(self, samples: Sequence[Sample]) -> Tensor:
        """Make a batch of images; see :meth:`SampleModel.preprocess`.

        Raises:
            ValueError: an image is smaller than the stride of the embedding network.
        """
        # The network sees the squares alone, which are large enough.
        stride = self.network.embedding.stride
        for sample in samples:
            height, width = sample["image"].shape[-2:]
            if min(height, width) < stride:
                named = f"Image {sample['image_id']!r}" if "image_id" in sample else "The image"
                raise ValueError(
                    f"{named} has {height} x {width} pixels, less than the {stride} of one "
                    "position of an attention map. Leave it out or give a larger one."
                )
        return super().preprocess(samples)

    def read_image(self, record: Record) -> Tensor:
        """Read the image of a record as the network takes it, (3, S, S)."""
        return self.preprocess([read_sample(record)])[0]

    def predict(self, sample: Sample, query: ConceptQuery | None) -> ConceptResults:
        """Find concepts in one image; see :meth:`ConceptMask.predict`."""
        (image,) = self.preprocess([sample])
        return self.network.predict(image, query, output_size=tuple(sample["image"].shape[-2:]))


def build_concept_mask(
    content: Mapping[str, Any], table: WordTable, *, initial: bool = False, **losses: Any
) -> SampleConceptMask:
    """Build a model from the content of its `MODEL_NAME`, with initial weights.

    Args:
        content: ``stage``, ``network`` (the fields of :class:`ConceptNetwork`), ``boxed`` and
            ``masked``, names of the concepts with boxes and with masks.
        table: vectors of the vocabulary.
        initial: with the ImageNet weights, if the network starts from them; not if weights are
            loaded afterwards anyway.
        losses: arguments of :class:`ConceptMask` that training alone needs.
    """
    settings = ConceptNetwork(**content["network"])
    backbone = build_backbone(
        settings.backbone,
        frozen_norm=settings.pretrained,
        pretrained=settings.pretrained and initial,
    )
    in_feature, shape = choose_feature(backbone)
    embedding = ConceptEmbedding(
        backbone,
        in_feature=in_feature,
        in_channels=shape.channels,
        dim=table.vectors.shape[1],
        hidden_channels=settings.hidden_channels,
        final_relu=settings.final_relu,
    )
    segmenter = None
    if content["stage"] == 3:
        encoder = SmallResNet(widths=tuple(settings.encoder_widths), output_stride=16)
        segmenter = ConceptSegmenter(encoder, decoder_channels=settings.decoder_channels)
    boxed, masked = ([table.index_of(name) for name in content[key]] for key in ("boxed", "masked"))
    network = ConceptMask(
        embedding,
        vectors=torch.from_numpy(table.vectors),
        idf=torch.from_numpy(table.idf),
        boxed=boxed,
        masked=masked,
        stage=content["stage"],
        hidden_channels=settings.refinement_channels,
        segmenter=segmenter,
        attention_sizes=tuple(settings.attention_sizes),
        mask_size=settings.image_size,
        **losses,
    )
    return SampleConceptMask(network, size=settings.image_size, table_hash=table.hash)


def check_table(table: WordTable, expected_hash: str, where: Path) -> None:
    """Refuse a word table that a model was not made with.

    Raises:
        ValueError: it is another; the message names the model, ``where``.
    """
    if table.hash != expected_hash:
        raise ValueError(
            f"The model '{where}' was made with the word table {expected_hash[:12]}, but the one "
            f"given, from {table.source}, is {table.hash[:12]}. Vectors of another computation do "
            "not fit: give the table that lies beside the model, or train anew."
        )


def open_concept_mask(
    run: str | Path,
    stage: str = SEGMENTATION,
    *,
    table: WordTable | None = None,
    device: torch.device | str = "cpu",
) -> tuple[SampleConceptMask, WordTable, ConceptSplit]:
    """Open a model that :class:`maskx.systems.concept_mask.chain.ConceptMaskChain` trained.

    Args:
        run: folder of the run.
        stage: folder in it: ``embedding``, ``refinement`` or ``segmentation``.
        table: vectors of the vocabulary; those that lie in ``run`` without.
        device: where to compute.

    Returns:
        The model, in evaluation mode, the word table and the levels of its concepts.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another kind, or the word table is another.
    """
    run = Path(run)
    path = run / stage / MODEL_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file '{path}', which says what network the model is. Give the folder of "
            "a finished run: tools/quickstart.py --system concept_mask."
        )
    if table is None:
        table = load_word_table(run / WORDS_NAME)
    try:
        content = json.loads(path.read_bytes())
        check_table(table, content["word_table"], path)
        model = build_concept_mask(content, table)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' is damaged ({type(error).__name__}: {error}). Train the model again."
        ) from error
    checkpoint = run / stage / CHECKPOINT_NAME
    load_state(model, read_checkpoint(checkpoint, "cpu")["model"], checkpoint)
    split = ConceptSplit(table.names, tuple(content["boxed"]), tuple(content["masked"]))
    return model.eval().to(device), table, split


def save_fitted(model: SampleConceptMask, folder: Path) -> None:
    """Write what was fitted to a trained model into its checkpoint, whole or not at all.

    Args:
        model: with the weights of the checkpoint.
        folder: of the checkpoint.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged.
    """
    path = folder / CHECKPOINT_NAME
    content = read_checkpoint(path, "cpu")
    content["model"] = model.state_dict()
    with written_whole(path, durable=True) as scratch:
        torch.save(content, scratch)
