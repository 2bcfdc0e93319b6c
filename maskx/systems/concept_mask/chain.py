"""The three trainings of ConceptMask, each from the one before, each made once."""

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from maskx.core.digests import network_hash
from maskx.core.files import write_json
from maskx.core.word_table import WordTable, save_word_table
from maskx.engine.batches import training_batches
from maskx.engine.training_chain import TrainingChain
from maskx.systems.concept_mask.concept_sets import ConceptSets
from maskx.systems.concept_mask.image_samples import ConceptMapper
from maskx.systems.concept_mask.model import (
    MODEL_NAME,
    UNSEEN_NAME,
    WORDS_NAME,
    ConceptNetwork,
    SampleConceptMask,
    build_concept_mask,
    save_fitted,
)
from maskx.systems.concept_mask.overlap import concept_overlap, negative_weights

__all__ = ["ConceptMaskChain", "ConceptMaskMethod", "ConceptMaskSettings"]

# Peaks of Adam: of the embedding from random weights and from ImageNet's, in stage 1 and in stage
# 2; of the refinement; of the segmentation. At 1e-3 in stage 2 the embedding forgets its words: of
# unseen ones 8.5% of the maps of Eq. 1 then point right, by chance 10%, at 1e-4 30%.
_EMBEDDING_RATES = {"random": 4e-3, "imagenet": 1e-4}
_FINE_TUNING_RATES = {"random": 3e-4, "imagenet": 3e-5}
_REFINEMENT_RATE, _SEGMENTATION_RATE = 2e-3, 1e-3


@dataclass(frozen=True)
class ConceptMaskSettings:
    """What a chain of trainings is defined by.

    Attributes:
        network: of all stages.
        embedding_iterations: steps of stage 1.
        refinement_iterations: steps of stage 2.
        segmentation_iterations: steps of stage 3.
        batch_size: images per step.
        max_concepts: most concepts of an image in a step of stage 3.
        matching_weight: c of Eq. 2. The paper's 1e-6 is for 800 maps; half of a vocabulary of 66
            and maps of 64 cells have a hundredth of their terms.
        discrimination_weight: of the spatial discrimination loss, of which the paper does not say
            any.
        seed: of weights and data order.
        workers: processes that read training images; 0 reads them in the process that trains.
    """

    network: ConceptNetwork = field(default_factory=ConceptNetwork)
    embedding_iterations: int = 1200
    refinement_iterations: int = 1000
    segmentation_iterations: int = 400
    batch_size: int = 16
    max_concepts: int = 2
    matching_weight: float = 1e-4
    discrimination_weight: float = 1.0
    seed: int = 0
    workers: int = 0


@dataclass(frozen=True)
class ConceptMaskMethod:
    """What may be different between the chains of a study.

    Attributes:
        final_relu: the embedding ends with a ReLU, as the paper has it.
        negatives: stage 2 has the spatial discrimination loss.
        two_sizes: the segmentation network sees attention maps of two image sizes, or the map of
            the first twice.
    """

    final_relu: bool = False
    negatives: bool = True
    two_sizes: bool = True

    def folder(self, stage: int) -> str:
        """Name of a stage's folder: the stage and what differs from the default up to it."""
        words = [("embedding", "refinement", "segmentation")[stage - 1]]
        if self.final_relu:
            words.append("final_relu")
        if stage >= 2 and not self.negatives:
            words.append("no_negatives")
        if stage >= 3 and not self.two_sizes:
            words.append("one_size")
        return "_".join(words)


class ConceptMaskChain(TrainingChain):
    """The trainings of one seed.

    Stage 1 learns from tags, stage 2 from boxes, stage 3 from masks. Each leaves its checkpoint in
    a folder of its own, and methods that do not differ up to a stage share it. The word tables are
    saved beside them.

    Args:
        sets: images by what is known of them.
        table: vectors of the vocabulary, in the order of that of the sets.
        settings: what to do.
        output: folder of the checkpoints.
        resume: go on from the checkpoints that are there.
        unseen: vectors of words that are not in the vocabulary, to be kept with the run.
        identity: what else a checkpoint belongs to, such as its annotation file.
        device: where to compute.

    Attributes:
        seconds: what each step took.

    Raises:
        ValueError: the table is of another vocabulary, or there is nothing to learn from.
    """

    def __init__(
        self,
        sets: ConceptSets,
        table: WordTable,
        settings: ConceptMaskSettings,
        *,
        output: Path,
        resume: bool = False,
        unseen: WordTable | None = None,
        identity: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if tuple(table.names) != tuple(sets.split.vocabulary):
            raise ValueError(
                f"The word table from {table.source} has {len(table.names)} names, the vocabulary "
                f"{len(sets.split.vocabulary)}, or they are in another order. Make a table of this "
                "vocabulary."
            )
        for name in ("tagged", "boxed", "masked"):
            if not getattr(sets, name):
                raise ValueError(f"There is no {name} image to train on. Give at least one.")
        self.sets, self.table = sets, table
        identity = dict(identity or {}) | {
            "word table": table.hash,
            "boxed concepts": list(sets.split.boxed),
            "masked concepts": list(sets.split.masked),
            "images": [len(sets.tagged), len(sets.boxed), len(sets.masked)],
        }
        super().__init__(settings, output=output, resume=resume, identity=identity, device=device)
        self._tables = {WORDS_NAME: table, UNSEEN_NAME: unseen}
        self._models: dict[str, SampleConceptMask] = {}
        self._hashes: dict[str, str] = {}

    def model(self, stage: int, method: ConceptMaskMethod | None = None) -> SampleConceptMask:
        """Return the trained model of a stage, in evaluation mode; what it needs is trained first.

        Args:
            stage: 1, 2 or 3.
            method: what differs from the default.
        """
        method = method or ConceptMaskMethod()
        name = method.folder(stage)
        if name not in self._models:
            self._models[name] = self._train_stage(stage, method)
        return self._models[name]

    def folder(self, stage: int, method: ConceptMaskMethod | None = None) -> Path:
        """Return where the checkpoint of a stage is."""
        return self.output / (method or ConceptMaskMethod()).folder(stage)

    def save_fitted(self, stage: int = 3, method: ConceptMaskMethod | None = None) -> None:
        """Write the values fitted to a trained model into its checkpoint."""
        save_fitted(self.model(stage, method), self.folder(stage, method))

    @functools.cached_property
    def _gamma(self) -> Any:
        """Weights of Eq. 4, as CSR."""
        overlap = concept_overlap(self.sets.boxed, len(self.table.names))
        return tuple(torch.from_numpy(part) for part in negative_weights(overlap))

    def _train_stage(self, stage: int, method: ConceptMaskMethod) -> SampleConceptMask:
        settings, name = self.settings, method.folder(stage)
        before = self.model(stage - 1, method) if stage > 1 else None
        network = replace(settings.network, final_relu=method.final_relu)
        if stage == 3 and not method.two_sizes:
            network = replace(network, attention_sizes=(network.attention_sizes[0],) * 2)
        content = {
            "stage": stage,
            "network": asdict(network),
            "boxed": list(self.sets.split.boxed),
            "masked": list(self.sets.split.masked),
            "word_table": self.table.hash,
        }
        losses: dict[str, Any] = {}
        if stage == 2:
            losses["matching_weight"] = settings.matching_weight
            if method.negatives:
                losses["discrimination_weight"] = settings.discrimination_weight
        gamma = self._gamma if "discrimination_weight" in losses else None
        torch.manual_seed(settings.seed)
        model = build_concept_mask(content, self.table, initial=stage == 1, gamma=gamma, **losses)
        identity = self.identity | {"network": content["network"], **losses}
        if before is not None:
            model.network.load_previous_stage(before.network.state_dict())
            identity["start"] = self._hashes[method.folder(stage - 1)]
        if stage == 3:
            identity["max_concepts"] = settings.max_concepts
        records = (self.sets.tagged, self.sets.boxed, self.sets.masked)[stage - 1]
        mapper = ConceptMapper(
            stage,
            size=network.image_size if stage == 3 else network.embedding_size,
            masked=self.sets.split.masked_indices,
            max_concepts=settings.max_concepts,
        )
        self._train(
            model,
            name,
            functools.partial(training_batches, records, mapper),
            json.loads(json.dumps(identity)),
            **self._schedule(stage),
            description=f"stage {stage}: {name}",
        )
        # Not before: a checkpoint of another table would lose its own.
        for file_name, table in self._tables.items():
            if table is not None:
                save_word_table(self.output / file_name, table)
        write_json(self.output / name / MODEL_NAME, content)
        # Before anything is fitted, which is no part of what the next stage starts from.
        self._hashes[name] = network_hash(model.network)
        return model

    def _schedule(self, stage: int) -> dict[str, Any]:
        """Steps and learning rates of a stage."""
        settings = self.settings
        steps = (
            settings.embedding_iterations,
            settings.refinement_iterations,
            settings.segmentation_iterations,
        )
        start = "imagenet" if settings.network.pretrained else "random"
        rates = (_EMBEDDING_RATES[start], _REFINEMENT_RATE, _SEGMENTATION_RATE)
        factor = _FINE_TUNING_RATES[start] / _REFINEMENT_RATE
        return {
            "iterations": steps[stage - 1],
            "rate": rates[stage - 1],
            "lr_multipliers": {"network.embedding.": factor} if stage == 2 else {},
        }
