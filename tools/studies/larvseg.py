"""Ablations of LarvSeg on generated scenes or own data; the settings are the names of its methods.

``supervised`` is the baseline with masks of the novel classes too, the upper bound of the paper.
A name may end with ``_w`` and the weight of the loss of image labels with attention (of the
baseline without), and begin with ``together/``: scenes whose categories mostly occur in pairs. All
settings of a seed share the data and the backbone that they start from.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from maskx.data.splits import resolve_split
from maskx.engine.quickstart import choose_image_size, load_split_data
from maskx.engine.runs import origins_of_data
from maskx.engine.training import select_device
from maskx.supervision import CategorySplit
from maskx.systems.larvseg.evaluation import evaluate_larvseg
from maskx.systems.larvseg.pipeline import LarvSegChain, LarvSegMethod, LarvSegSettings
from maskx.systems.larvseg.samples import labelled_images, sets_of_one_file, true_label_map
from maskx.systems.larvseg.system import SCENES
from studies.options import OWN_OPTIONS, StudyOptions
from studies.picture import Shown
from studies.study import Measure, Ordering, Report, Study, process_lock

_BASELINE, _CROSS = LarvSegMethod("baseline"), LarvSegMethod()
_SINGLE, _NORMALISED = LarvSegMethod(bank="single"), LarvSegMethod(pooling="normalised")
_SCORES = LarvSegMethod(bank="scores")
_SUPERVISED = "supervised"
METHODS: Mapping[str, LarvSegMethod] = {
    **{method.name: method for method in (_BASELINE, _CROSS, _SINGLE, _SCORES, _NORMALISED)},
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
        frozen=options.frozen,
        image_size=choose_image_size(options.quickstart(seed)),
        **(SCENES if options.coco_train is None else {}) | given,
    )


def _parts(setting: str) -> tuple[str, str, dict[str, float]]:
    """Style of the scenes, name of the method, and the weight where the setting names one.

    Raises:
        ValueError: it is not of the form that the module describes.
    """
    names = "|".join(sorted(METHODS, key=len, reverse=True))
    found = re.fullmatch(rf"(together/)?({names})(?:_w(\d+(?:\.\d+)?))?", setting)
    if not found:
        raise ValueError(
            f"Setting '{setting}' is not known. Allowed: {', '.join(METHODS)}, each perhaps with "
            "'together/' before it (scenes whose categories occur in pairs) and '_w' and a weight "
            "after it, as in larvseg_w0.1."
        )
    pairs, name, weight = found.groups()
    key = "image_weight" if METHODS[name] == _BASELINE else "attentive_weight"
    return "together" if pairs else "sparse", name, {key: float(weight)} if weight else {}


def _describe(options: StudyOptions, setting: str) -> dict[str, Any]:
    style, _, weights = _parts(setting)
    if style != "sparse" and options.coco_train is not None:
        raise ValueError(f"Setting '{setting}' is of generated scenes. Leave out 'together/'.")
    settings = asdict(_larvseg_settings(options)) | weights
    run = {name: value for name, value in settings.items() if name not in ("seed", "workers")}
    return run | options.own()


class _SeedRuns:
    """All runs of one seed."""

    shown: Shown | None = None

    def __init__(self, options: StudyOptions, seed: int, report: Report) -> None:
        self.runs_on = functools.cache(functools.partial(_DataRuns, options, seed))

    def run(self, setting: str) -> dict[str, float]:
        style, name, weights = _parts(setting)
        runs = self.runs_on(style)
        result = runs.run(name, weights)
        self.shown = runs.shown
        return result


class _DataRuns:
    """All runs of one seed on the same images."""

    def __init__(self, options: StudyOptions, seed: int, style: str) -> None:
        self.group = "" if style == "sparse" else style
        self.folder = options.seed_folder(seed) / self.group
        self.settings = _larvseg_settings(options, seed)
        self.device = select_device(options.device)
        quickstart = replace(options.quickstart(seed), output=self.folder)
        with process_lock(self.folder):
            self.train_data, val_data, self.split = load_split_data(quickstart, style=style)
        self.test = labelled_images(val_data)
        self.chain = self._open_chain(self.settings, self.split, "shared")

    def run(self, name: str, weights: Mapping[str, float]) -> dict[str, float]:
        with process_lock(self.folder):
            backbone = self.chain.backbone  # trained once
        chain = self.chain
        if name == _SUPERVISED or weights:
            everything = resolve_split("all", self.train_data.class_names)
            split = everything if name == _SUPERVISED else self.split
            words = [name if name == _SUPERVISED else "shared"]
            words += [f"{key}_{value:g}" for key, value in weights.items()]
            chain = self._open_chain(replace(self.settings, **weights), split, "_".join(words))
            chain.backbone = backbone
        model = chain.train_method(METHODS[name])
        names = self.test.class_names
        truth = functools.partial(true_label_map, class_names=names)
        self.shown = Shown(model, self.test.records, names, truth=truth, group=self.group)
        novel = self.split.without_masks
        found = evaluate_larvseg(model, self.test, novel, description=f"{name}: evaluation")
        return {group: found["mIoU"][group] for group in _GROUPS}

    def _open_chain(
        self, settings: LarvSegSettings, split: CategorySplit, name: str
    ) -> LarvSegChain:
        return LarvSegChain(
            sets_of_one_file(self.train_data, split, image_size=settings.image_size),
            settings,
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
    takes=OWN_OPTIONS - {"light", "vectors"},
)
"""LarvSeg; the orderings are of novel classes."""
