"""ConceptMask as a system: how its networks are built from settings, and opened from a run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskx.core.backbone_choice import build_backbone, choose_feature
from maskx.core.checks import check_choice, default_of
from maskx.core.pretrained import Pretrained
from maskx.core.word_table import WordTable, load_word_table
from maskx.data.masks import encode_masks
from maskx.engine.options import QuickstartOptions
from maskx.engine.results import Prediction
from maskx.engine.system import PhotoRecipe, System
from maskx.engine.training import CHECKPOINT_NAME, load_state, read_checkpoint
from maskx.systems.concept_mask.concept_sets import ConceptSplit
from maskx.systems.concept_mask.export import exportable
from maskx.systems.concept_mask.model import (
    SYSTEM_NAME,
    EmbeddingModel,
    RefinementModel,
    SegmentationModel,
    read_description,
)
from maskx.systems.concept_mask.network import ConceptEmbedding, ConceptSegmenter, build_encoder
from maskx.systems.concept_mask.predictor import ConceptPredictor, said_of_map

STAGES = (EmbeddingModel, RefinementModel, SegmentationModel)
"""The networks of stage 1, 2 and 3."""
STAGE_FOLDERS = ("embedding", "refinement", "segmentation")
"""Folders of the stages in that of a run."""
WORDS_NAME, UNSEEN_NAME = "words.safetensors", "unseen_words.safetensors"
"""Word tables in the folder of a run: of the vocabulary, and of unseen concepts if there are."""


@dataclass(frozen=True)
class ConceptNetwork:
    """What the networks of all three stages are built from.

    Attributes:
        backbone: of the embedding, see :func:`maskx.core.backbone_choice.build_backbone`.
        pretrained: start from ImageNet weights, or from a file; their norms stay.
        frozen: keep the backbone of the embedding as it is.
        final_relu: the embedding ends with a ReLU, as the paper has it.
        image_size: side of the squares that images are warped to for the segmentation network.
        embedding_size: side of the squares that the embedding is trained on, in stages 1 and 2.
        attention_sizes: see :class:`maskx.systems.concept_mask.model.EmbeddingModel`.
        encoder: see :func:`maskx.systems.concept_mask.network.build_encoder`.
    """

    backbone: str = "resnet50"
    pretrained: Pretrained = False
    frozen: bool = False
    final_relu: bool = default_of(ConceptEmbedding, "final_relu")
    hidden_channels: tuple[int, ...] = default_of(ConceptEmbedding, "hidden_channels")
    refinement_channels: int = default_of(RefinementModel.__base__, "hidden_channels")
    image_size: int = default_of(SegmentationModel, "mask_size")
    embedding_size: int = 300
    attention_sizes: tuple[int, ...] = default_of(EmbeddingModel, "attention_sizes")
    scored_sizes: tuple[int, ...] = default_of(EmbeddingModel, "scored_sizes")
    encoder: str = default_of(build_encoder, "name")
    encoder_widths: tuple[int, ...] = default_of(build_encoder, "widths")
    decoder_channels: tuple[int, ...] = default_of(ConceptSegmenter, "decoder_channels")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):  # of a file
                object.__setattr__(self, name, tuple(value))


def build_model(
    settings: ConceptNetwork,
    stage: int,
    table: WordTable,
    split: ConceptSplit,
    *,
    initial: bool = False,
    **losses: Any,
) -> EmbeddingModel:
    """Build the network of stage 1, 2 or 3.

    Args:
        initial: with the ImageNet weights, if the network starts from them; not if weights are
            loaded afterwards anyway.
        losses: arguments of :class:`RefinementModel` that training alone needs.
    """
    check_choice("stage of ConceptMask", stage, (1, 2, 3))
    pretrained = settings.pretrained
    backbone = build_backbone(
        settings.backbone,
        frozen_norm=bool(pretrained),
        frozen_stages="all" if settings.frozen else 0,
        pretrained=pretrained if initial else False,
    )
    in_feature, shape = choose_feature(backbone)
    embedding = ConceptEmbedding(
        backbone,
        in_feature=in_feature,
        in_channels=shape.channels,
        dim=table.dim,
        hidden_channels=settings.hidden_channels,
        final_relu=settings.final_relu,
    )
    pixels = {"pixel_mean": backbone.pixel_mean, "pixel_std": backbone.pixel_std}
    parts: dict[str, Any] = losses | pixels
    if stage > 1:
        parts["hidden_channels"] = settings.refinement_channels
    if stage == 3:
        parts["mask_size"] = settings.image_size
        parts["segmenter"] = ConceptSegmenter(
            build_encoder(settings.encoder, widths=settings.encoder_widths),
            num_maps=len(settings.attention_sizes),
            decoder_channels=settings.decoder_channels,
        )
    return STAGES[stage - 1](
        embedding,
        table=table,
        split=split,
        attention_sizes=settings.attention_sizes,
        scored_sizes=settings.scored_sizes,
        architecture=asdict(settings),
        **parts,
    )


def open_model(
    run: str | Path, stage: int = 3, *, device: torch.device | str = "cpu"
) -> EmbeddingModel:
    """Open the model of a stage of the quick start, see :func:`open_checkpoint`."""
    path = Path(run) / STAGE_FOLDERS[stage - 1] / CHECKPOINT_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file '{path}'. Give the folder of a finished run: "
            "tools/quickstart.py --system concept_mask."
        )
    return open_checkpoint(path, device=device)


def open_checkpoint(path: Path, *, device: torch.device | str = "cpu") -> EmbeddingModel:
    """Open the model of any stage, in evaluation mode; all that it is made of is in its checkpoint.

    Unseen words, if there are any, lie beside its folder.
    """
    state = read_checkpoint(path, "cpu")["model"]
    try:
        found = read_description(state)
        table = WordTable(
            found["names"], state["vectors"].numpy(), state["idf"].numpy(), source=str(path)
        )
        split = ConceptSplit(table.names, found["boxed"], found["masked"])
        model = build_model(ConceptNetwork(**found["architecture"]), found["stage"], table, split)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{path}' cannot be opened: {error} Train the model again.") from error
    load_state(model.eval(), state, path)
    unseen = path.parent.parent / UNSEEN_NAME
    model.unseen = load_word_table(unseen) if unseen.is_file() else None
    return model.to(device)


def open_predictor(run: str | Path, *, device: torch.device | str = "cpu") -> ConceptPredictor:
    """Open the model of a finished run, to find concepts by name."""
    return ConceptPredictor(open_model(run, device=device))


PHOTOS = PhotoRecipe(
    title="maps of where a concept is are learned from tags, then from boxes, and masks of any "
    "concept from the masks that there are.",
    options={"iterations": 300, "batch_size": 16, "image_size": 224},
    step_seconds=0.06,
    image_seconds=0.12,
    measured="on 302 photographs of 78 categories, the strongest place of the map of a concept was "
    "on it in 19 percent of the cases, in the mean of three runs, and would be in 8.5 at random; "
    "masks were not measured.",
)


def _pipeline(options: QuickstartOptions, report: Callable[[str], None]) -> dict[str, Any]:
    # Which builds its networks here.
    from maskx.systems.concept_mask.pipeline import quickstart_concept_mask

    return quickstart_concept_mask(options, report)


def _prediction(result: Mapping[str, Any], class_names: Sequence[str]) -> Prediction:
    """Make an instance of the mask of each concept, which may be one that is not in the list."""
    shares = zip(result["borrowed"], result["own_share"].tolist(), strict=True)
    return Prediction(
        class_names=tuple(result["concepts"]),
        segmentations=encode_masks(result["masks"].cpu().numpy()),
        scores=result["existence"].clamp(0, 1).cpu().numpy(),
        class_indices=np.arange(len(result["concepts"])),
        remarks=[said_of_map(name, own_share) for name, own_share in shares],
    )


SYSTEM = System(
    name=SYSTEM_NAME,
    title="ConceptMask",
    pipeline=_pipeline,
    open=lambda run, device: open_checkpoint(run.weights_file, device=device),
    prediction=_prediction,
    learns_from=("tags_boxes_and_masks",),
    takes_concepts=True,
    exportable=exportable,
    options=frozenset(["masks_for", "concept_split", "tags"]),
    photos=PHOTOS,
    words={
        "embedding": "stage 1, embedding",
        "refinement": "stage 2, refinement of the maps",
        "segmentation": "stage 3, segmentation",
        "levels": "masks, and the attention maps they are made from",
        "original": "attention maps of stage 1, masks above 0.5 of them",
        "concepts": "by concept",
        "soft_iou": "soft IoU",
        "iou": "IoU",
        "chance": "pointing at random",
        "unseen_blended": "unseen, blended",
        "existence": "concepts said to exist",
        "fitted": "fitted on other images",
        "theta_image": "theta, tags only",
        "theta_unseen": "theta, unseen words",
    },
)
