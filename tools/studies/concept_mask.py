"""Ablations of ConceptMask on generated scenes or own data.

Settings are attention maps, measured as in Table 1 of the paper, and masks. All settings of a seed
share the data, the word vectors and the stages that do not differ. Of own data all categories have
tags and boxes, so there is nothing to measure of concepts with tags only and of unseen ones.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from maskx.engine.training import select_device
from maskx.systems.concept_mask.evaluation import NOT_ASKED, evaluate_concepts, fit_concepts
from maskx.systems.concept_mask.pipeline import (
    ConceptMaskChain,
    ConceptMaskMethod,
    ConceptMaskSettings,
    check_own_data,
    load_concept_data,
    quick_settings,
)
from studies.options import OWN_OPTIONS, StudyOptions
from studies.picture import Shown
from studies.study import Measure, Ordering, Report, Study, process_lock

_DEFAULT = ConceptMaskMethod()


@dataclass(frozen=True)
class _Setting:
    """What is measured: a stage, how it was trained, and which maps or masks of it.

    Attributes:
        stage: 1 and 2 for attention maps, 3 for masks.
        method: of the training.
        kind: of attention.
        segment: make masks with the segmentation network, not of the attention.
    """

    stage: int
    method: ConceptMaskMethod = _DEFAULT
    kind: str = "own"
    segment: bool = False


_MASKS = {"kind": "blended", "segment": True}
SETTINGS: Mapping[str, _Setting] = {
    "original": _Setting(1),
    "original_final_relu": _Setting(1, ConceptMaskMethod(final_relu=True)),
    "finetuned": _Setting(2, kind="initial"),
    "refined_no_negatives": _Setting(2, ConceptMaskMethod(discrimination_weight=0)),
    "refined": _Setting(2),
    "refined_weight_1": _Setting(2, ConceptMaskMethod(discrimination_weight=1)),
    "segmentation": _Setting(3, **_MASKS),
    "one_size": _Setting(3, ConceptMaskMethod(two_sizes=False), **_MASKS),
    "no_blending": _Setting(3, kind="own", segment=True),
    "thresholded_attention": _Setting(3, kind="blended"),
}
"""What can be compared, by name."""

# Of attention maps: those of concepts with boxes (the paper's evaluation set), of the others.
_GROUPS = {"boxed": ("mask", "box"), "image": ("image",), "unseen": ("unseen",)}
_LEVELS = ("mask", "box", "image", "unseen")


def _concept_settings(options: StudyOptions, seed: int = 0) -> ConceptMaskSettings:
    steps = options.given(
        iterations="embedding_iterations",
        stage2_iterations="refinement_iterations",
        batch_size="batch_size",
    )
    if options.stage2_iterations is not None:
        steps["segmentation_iterations"] = options.stage2_iterations
    return replace(quick_settings(options.quickstart(seed)), **steps)


def _describe(options: StudyOptions, setting: str) -> dict[str, Any]:
    if setting not in SETTINGS:
        raise ValueError(f"Setting '{setting}' is not known. Allowed: {', '.join(SETTINGS)}.")
    check_own_data(options.quickstart(seed=0))
    settings = asdict(_concept_settings(options))
    settings["network"] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings["network"].items()
    }
    settings |= asdict(SETTINGS[setting].method)
    run = {name: value for name, value in settings.items() if name not in ("seed", "workers")}
    return run | options.own()


class _SeedRuns:
    """All runs of one seed."""

    shown: Shown | None = None

    def __init__(self, options: StudyOptions, seed: int, report: Report) -> None:
        self.folder = options.seed_folder(seed)
        with process_lock(self.folder):
            self.data = load_concept_data(options.quickstart(seed))
        self.test = self.data.test(self.data.val)
        pairs = zip(self.test.levels, self.test.indices, strict=True)
        self.levels = {level for level, index in pairs if index != NOT_ASKED}
        self._fitted: set[ConceptMaskMethod] = set()
        self.chain = ConceptMaskChain(
            self.data,
            _concept_settings(options, seed),
            output=self.folder / "shared",
            resume=True,
            device=select_device(options.device),
        )

    def run(self, setting: str) -> dict[str, float]:
        stage, method, kind, segment = vars(SETTINGS[setting]).values()
        self.shown = None
        # Stages are shared: one process trains while the others wait.
        with process_lock(self.folder):
            model = self.chain.model(stage, method)
        if kind == "blended" and method not in self._fitted:
            fit_concepts(model, self.data.test(self.data.fitting))
            self._fitted.add(method)
        found = evaluate_concepts(
            model, self.test, kind=kind, segment=segment, description=f"{setting}: evaluation"
        )
        if stage == 3:
            if segment and kind == "blended":  # as the model is used
                self.shown = Shown(model, self.data.val.records, self.data.val.class_names)
            levels = (level for level in _LEVELS if level in self.levels)
            return {f"iou_{level}": _mean_of_levels(found, "iou", (level,)) for level in levels}
        return {
            f"{measure}_{group}": _mean_of_levels(found, measure, levels)
            for group, levels in _GROUPS.items()
            if self.levels.intersection(levels)
            for measure in ("pointing", "soft_iou")
        }


def _mean_of_levels(found: Mapping[str, Any], measure: str, levels: tuple[str, ...]) -> float:
    values = [each[measure] for each in found["concepts"].values() if each["level"] in levels]
    return sum(values) / len(values) if values else math.nan


def _above(better: str, worse: str, measure: str) -> Ordering:
    title = f"{better} above {worse}".replace("_", " ")
    return Ordering(f"{title}: {_MEASURES[measure].title}", (better, measure), (worse, measure))


_MEASURES = {
    "pointing_boxed": Measure("pointing, boxed", 3),
    "soft_iou_boxed": Measure("soft IoU, boxed", 3),
    "pointing_image": Measure("pointing, tags only", 3),
    "soft_iou_image": Measure("soft IoU, tags only", 3),
    "pointing_unseen": Measure("pointing, unseen", 3),
    "soft_iou_unseen": Measure("soft IoU, unseen", 3),
    "iou_mask": Measure("IoU, masks", 3),
    "iou_box": Measure("IoU, boxes", 3),
    "iou_image": Measure("IoU, tags only", 3),
    "iou_unseen": Measure("IoU, unseen", 3),
}

STUDY = Study(
    settings=tuple(SETTINGS),
    measures=_MEASURES,
    plotted=("soft_iou_boxed", "iou_mask", "iou_box", "iou_image", "iou_unseen"),
    plot_label="soft IoU of maps, IoU of masks",
    orderings=(
        *(
            _above(better, worse, measure)
            for measure in ("pointing_boxed", "soft_iou_boxed")
            for better, worse in (
                ("finetuned", "original"),
                ("refined_no_negatives", "finetuned"),
                ("refined", "refined_no_negatives"),
            )
        ),
        _above("original", "original_final_relu", "pointing_boxed"),
        *(_above("segmentation", "one_size", f"iou_{level}") for level in _LEVELS),
        _above("segmentation", "no_blending", "iou_image"),
        _above("segmentation", "no_blending", "iou_unseen"),
        *(_above("segmentation", "thresholded_attention", f"iou_{level}") for level in _LEVELS),
        *(
            Ordering(
                f"{better} above {worse}",
                ("segmentation", f"iou_{better}"),
                ("segmentation", f"iou_{worse}"),
            )
            for better, worse in itertools.pairwise(_LEVELS)
        ),
    ),
    describe=_describe,
    open_seed=_SeedRuns,
    takes=OWN_OPTIONS - {"light", "vectors"},
)
"""ConceptMask; the order of attention maps is that of Table 1."""
