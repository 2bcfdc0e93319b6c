"""Ablations of LarvSeg on generated scenes or own data; the settings are the names of its methods.

``supervised`` is the baseline with masks of the novel classes too, the upper bound of the paper.
All settings of a seed share the data and the backbone that they start from.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from maskx.data.splits import resolve_split
from maskx.engine.quickstart import choose_image_size, load_split_data
from maskx.engine.runs import origins_of_data
from maskx.engine.training import select_device
from maskx.supervision import CategorySplit
from maskx.systems.larvseg.evaluation import evaluate_larvseg
from maskx.systems.larvseg.pipeline import LarvSegChain, LarvSegMethod, LarvSegSettings
from maskx.systems.larvseg.samples import labelled_images, sets_of_one_file
from maskx.systems.larvseg.system import SCENES
from studies.options import OWN_OPTIONS, StudyOptions
from studies.study import Measure, Ordering, Report, Study, process_lock

_BASELINE, _CROSS = LarvSegMethod("baseline"), LarvSegMethod()
_SINGLE, _NORMALISED = LarvSegMethod(bank="single"), LarvSegMethod(pooling="normalised")
_SUPERVISED = "supervised"
METHODS: Mapping[str, LarvSegMethod] = {
    **{method.name: method for method in (_BASELINE, _CROSS, _SINGLE, _NORMALISED)},
    _SUPERVISED: _BASELINE,
}
"""What can be compared, by name."""

_GROUPS = ("novel", "base", "all")


def _larvseg_settings(options: StudyOptions, seed: int = 0) -> LarvSegSettings:
    names = {"iterations": "start_iterations", "stage2_iterations": "iterations"}
    given = options.given(batch_size="batch_size", **names)
    return LarvSegSettings(
        seed=seed,
        backbone=options.backbone,
        pretrained=options.pretrained,
        image_size=choose_image_size(options.quickstart(seed)),
        **(SCENES if options.coco_train is None else {}) | given,
    )


def _describe(options: StudyOptions, setting: str) -> dict[str, Any]:
    if setting not in METHODS:
        raise ValueError(f"Setting '{setting}' is not known. Allowed: {', '.join(METHODS)}.")
    settings = asdict(_larvseg_settings(options))
    run = {name: value for name, value in settings.items() if name not in ("seed", "workers")}
    return run | options.own()


class _SeedRuns:
    """All runs of one seed."""

    def __init__(self, options: StudyOptions, seed: int, report: Report) -> None:
        self.folder = options.seed_folder(seed)
        self.settings = _larvseg_settings(options, seed)
        self.device = select_device(options.device)
        with process_lock(self.folder):
            data = load_split_data(options.quickstart(seed), sparse=True)
        self.train_data, val_data, split = data
        self.test = labelled_images(val_data)
        self.chain = self._open_chain(split, "shared")
        self.novel = split.without_masks

    def run(self, setting: str) -> dict[str, float]:
        with process_lock(self.folder):
            backbone = self.chain.backbone  # trained once
        chain = self.chain
        if setting == _SUPERVISED:
            everything = resolve_split("all", self.train_data.class_names)
            chain = self._open_chain(everything, _SUPERVISED)
            chain.backbone = backbone
        model = chain.train_method(METHODS[setting])
        found = evaluate_larvseg(model, self.test, self.novel, description=f"{setting}: evaluation")
        return {group: found["mIoU"][group] for group in _GROUPS}

    def _open_chain(self, split: CategorySplit, name: str) -> LarvSegChain:
        return LarvSegChain(
            sets_of_one_file(self.train_data, split, image_size=self.settings.image_size),
            self.settings,
            output=self.folder / name,
            resume=True,
            split=split,
            started_from=origins_of_data(self.train_data, self.folder / name),
            device=self.device,
        )


def _above(name: str, better: str, worse: str) -> Ordering:
    return Ordering(name, (better, "novel"), (worse, "novel"))


STUDY = Study(
    settings=tuple(METHODS),
    measures={group: Measure(f"{group} classes") for group in _GROUPS},
    plotted=("novel",),
    plot_label="mIoU of novel classes (percent)",
    orderings=(
        _above("masks of all classes above LarvSeg", _SUPERVISED, _CROSS.name),
        _above("LarvSeg above the baseline", _CROSS.name, _BASELINE.name),
        _above("cross-image above single-image attention", _CROSS.name, _SINGLE.name),
    ),
    describe=_describe,
    open_seed=_SeedRuns,
    takes=OWN_OPTIONS - {"vectors"},
)
"""LarvSeg; the orderings are of novel classes."""
