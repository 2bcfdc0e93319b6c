"""A trained ConceptMask as a network: image and concept indices in, masks out."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskx.engine.model_export import Exportable, example_image
from maskx.systems.concept_mask.model import EmbeddingModel, SegmentationModel
from maskx.systems.concept_mask.network import normalise_maps, resize_maps


class _ConceptMasks(nn.Module):
    """What :meth:`SegmentationModel.predict` finds of words of the table, without its checks."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("product", model.refinement.product(model.vectors))
        # Per word: what its map is blended with (section 4.4), and how much is its own.
        self.register_buffer("nearest", model.nearest_boxed(model.vectors))
        self.register_buffer("own_share", torch.where(model.is_boxed, 1, model.theta_image))

    def forward(self, image: Tensor, concept_indices: Tensor) -> tuple[Tensor, Tensor]:
        model, side = self.model, (self.model.size, self.model.size)
        # Two concepts more than are asked for: no size in here is then 0 or 1, which a trace
        # would take for something of its own.
        rows = F.pad(concept_indices, (0, 2))
        image_normalised = model.normalise({"image": image})
        share = self.own_share[rows][:, None, None]
        attention, existence = [], []
        for maps in model.embedding_maps(image_normalised):
            hidden = model.refinement.hidden_of_product(maps, self.product)
            own, nearest = (
                model.refinement.logits(hidden, each).sigmoid()
                for each in (rows, self.nearest[rows])
            )
            blended = (share * own + (1 - share) * nearest)[0, :, None]
            attention.append(resize_maps(blended, side))
            existence.append(own[0].amax(dim=(-2, -1)))
        square = resize_maps(image_normalised, side, antialias=True)
        attention = normalise_maps(torch.cat(attention, dim=1))
        logits = model.segmenter(square, attention, torch.zeros_like(rows))[:, None]
        masks = resize_maps(logits, image.shape[-2:])[:, 0].sigmoid()
        return masks[:-2], torch.stack(existence).amax(dim=0)[:-2]


def exportable(model: EmbeddingModel, class_names: Sequence[str]) -> Exportable:
    """Describe a trained model for :func:`maskx.engine.model_export.export_model`.

    It segments words of its table; unseen ones need the package.

    Raises:
        ValueError: the model is of a stage before the segmentation network, or segments other maps
            than the blended ones.
    """
    if model.attention_kind != "blended":
        raise ValueError(
            "The model cannot be exported: it segments the attention maps "
            f"'{model.attention_kind}' (TEST.MASKX.ATTENTION_KIND). Set it to 'blended'."
        )
    if not isinstance(model, SegmentationModel):
        raise ValueError(
            f"The model cannot be exported: it is of stage {model.stage} of ConceptMask, which "
            "makes no masks. Give the run folder of stage 3, 'segmentation'."
        )
    return Exportable(
        network=_ConceptMasks(model).eval(),
        inputs={"image": example_image(), "concept_indices": torch.tensor([0, 1, 0])},
        dynamic={
            "image": {2: "height", 3: "width"},
            "concept_indices": {0: "concepts"},
        },
        outputs={
            "masks": "(concepts, height, width) float32, probability of the mask of each concept",
            "existence": "(concepts,) float32 from 0 to 1, the largest attention of the concept",
        },
        class_names=tuple(class_names),
        about={"concept_indices": "int64, places in class_names"},
    )
