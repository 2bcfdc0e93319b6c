"""Ablations of class patterns on generated scenes: proxy masks, training on them, the patterns.

Settings: ``proxy/THRESHOLD_RESOLVE`` are proxy masks of all layers, measured on the training
images; ``train/LAYER_THRESHOLD_RESOLVE`` the segmentation network trained on those of one layer and
once more on its predictions; both take ``_crf`` at the end, for a dense CRF where the paper has it.
``cosine`` compares the patterns from few images with those from more. Of a seed all share the
scenes, the classifier, its patterns and projections.
"""

import dataclasses
import functools
import re
from collections import Counter
from itertools import product
from typing import Any

from maskx.core.digests import network_hash
from maskx.core.sample_models import SampleClassifier
from maskx.data.coco import load_coco
from maskx.data.dense_crf import check_crf
from maskx.data.scenes.generator import generate_scenes
from maskx.engine import quickstart
from maskx.engine.options import QuickstartOptions
from maskx.engine.quickstart import load_data
from maskx.engine.training import select_device
from maskx.systems.class_patterns.patterns import ClassPatterns
from maskx.systems.class_patterns.pipeline import TagRun, TagSettings, open_tagged_images
from maskx.systems.class_patterns.proxy_masks import ProxyMaskSettings
from maskx.systems.class_patterns.steps import (
    ClassifierSource,
    LayerMasks,
    discover,
    make_masks,
    project,
)
from studies.options import StudyOptions
from studies.study import Measure, Ordering, Report, Study, process_lock

_LAYERS = ("C41", "C42", "C43")
_PAPER, _DEFAULT = "zero_ignore", "otsu_standardised"
_MASKS = tuple("_".join(words) for words in product(("zero", "otsu"), ("ignore", "standardised")))
_SETTING = re.compile(
    rf"cosine|(?:proxy/|train/(?P<layer>{'|'.join(_LAYERS)})_)"
    r"(?P<threshold>zero|otsu)_(?P<resolve>ignore|standardised)(?P<crf>_crf)?"
)

# Patterns from so many images of a class are compared. With so many more scenes a class is in
# nearly 1,000 images.
_FEW_IMAGES, _MANY_IMAGES = 400, 800
_MORE_SCENES, _MORE_SCENES_SEED = 6600, 2**31


def _parse(setting: str) -> dict[str, str | None]:
    match = _SETTING.fullmatch(setting)
    if match is None:
        raise ValueError(
            f"Setting '{setting}' is not known. Allowed: proxy/THRESHOLD_RESOLVE, "
            "train/LAYER_THRESHOLD_RESOLVE, both also with _crf at the end, and cosine, with "
            f"THRESHOLD zero or otsu, RESOLVE ignore or standardised, LAYER {', '.join(_LAYERS)}."
        )
    return match.groupdict()


def _tag_settings(options: StudyOptions, seed: int = 0) -> TagSettings:
    names = {"iterations": "iterations", "stage2_iterations": "segmenter_iterations"}
    return TagSettings(seed=seed, **options.given(batch_size="batch_size", **names))


def _describe(options: StudyOptions, setting: str) -> dict[str, Any]:
    words = _parse(setting)
    if words["crf"]:
        check_crf()
    settings = _tag_settings(options)
    run = {
        name: getattr(settings, name)
        for name in ("iterations", "batch_size", "image_size", "max_images_per_class")
    }
    if words["layer"]:
        run["segmenter_iterations"] = settings.segmenter_iterations
    if setting == "cosine":
        run["max_images_per_class"] = [_FEW_IMAGES, _MANY_IMAGES]
    return run


class _SeedRuns:
    """All runs of one seed."""

    def __init__(self, options: StudyOptions, seed: int, report: Report) -> None:
        self.folder, self.seed, self.report = options.seed_folder(seed), seed, report
        self.shared = self.folder / "shared"
        self.settings = _tag_settings(options, seed)
        self.device = select_device(options.device)
        with process_lock(self.folder):
            self.train_data, self.val_data = load_data(
                QuickstartOptions(output=self.folder, seed=seed), style="sparse"
            )
        self.image_root = self.train_data.json_file.parent

    def run(self, setting: str) -> dict[str, float]:
        words = _parse(setting)
        if setting == "cosine":
            return self._compare_patterns()
        settings = ProxyMaskSettings(
            threshold=words["threshold"], resolve=words["resolve"], crf=bool(words["crf"])
        )
        masks = self._make_masks(settings)
        if words["layer"]:
            return self._train(setting, words["layer"], settings, masks[words["layer"]])
        result = {}
        for name, of_evaluation in (
            ("proxy", lambda found: found["undecided_missed"]["mIoU"]["all"]),
            ("decided", lambda found: found["decided_only"]["mIoU"]["all"]),
            ("undecided", lambda found: found["undecided"]),
        ):
            for layer in _LAYERS:
                result[f"{name}_{layer}"] = of_evaluation(masks[layer].evaluation)
        return result

    @functools.cached_property
    def _classifier(self) -> SampleClassifier:
        with process_lock(self.shared):
            return self._tag_run(self.settings, "shared").train_classifier()

    @functools.cached_property
    def _source(self) -> ClassifierSource:
        _ = self._classifier  # trained and on disk
        data = self.train_data.json_file, self.image_root
        return open_tagged_images(self.shared / "classifier", *data, device=self.device)[0]

    @functools.cached_property
    def _patterns(self) -> ClassPatterns:
        """The patterns; projections on them lie in ``proxy``."""
        source, settings, records = self._source, self.settings, self.train_data.records
        passes = {"batch_size": settings.batch_size, "report": self.report}
        with process_lock(self.shared):
            patterns = discover(
                source,
                records,
                self.train_data.class_names,
                _LAYERS,
                output=self.shared / "patterns",
                max_images_per_class=settings.max_images_per_class,
                seed=self.seed,
                **passes,
            )
            project(source, records, patterns, _LAYERS, self.shared / "proxy", **passes)
        return patterns

    def _make_masks(self, settings: ProxyMaskSettings) -> dict[str, LayerMasks]:
        patterns = self._patterns
        with process_lock(self.shared):  # proxy/M and train/L_M make the same files
            return make_masks(
                self.train_data.records,
                patterns,
                _LAYERS,
                self.shared / "proxy",
                image_root=self.image_root,
                category_ids=self.train_data.category_ids,
                settings=settings,
                report=self.report,
            )

    def _train(
        self, setting: str, layer: str, masks: ProxyMaskSettings, made: LayerMasks
    ) -> dict[str, float]:
        settings = dataclasses.replace(self.settings, layer=layer, masks=masks)
        run = self._tag_run(settings, setting)
        identity = {"patterns": self._patterns.network, "proxy masks": made.json_file.stem}
        trained = run.train_segmenter("segmenter", self._classifier, made.json_file, identity)
        predicted = run.predict_training_images(trained)
        identity |= {"predicted by": network_hash(trained.network)}
        retrained = run.train_segmenter("retrained", self._classifier, predicted, identity)
        return {
            "trained": run.evaluate(trained, "trained")["mIoU"]["all"],
            "retrained": run.evaluate(retrained, "retrained")["mIoU"]["all"],
        }

    def _compare_patterns(self) -> dict[str, float]:
        folder, names = self.folder / "cosine", self.train_data.class_names
        json_file = generate_scenes(
            folder / "scenes",
            count=_MORE_SCENES,
            size=quickstart.SCENE_SIZE,
            seed=_MORE_SCENES_SEED + self.seed,
            progress=True,
            **quickstart.SPARSE_STYLE,
        )
        more = load_coco(json_file, json_file.parent).records
        records = [
            *self.train_data.records,
            *({**record, "image_id": f"more-{record['image_id']}"} for record in more),
        ]
        counts = Counter(label for record in records for label in record["image_labels"])
        rarest = min(range(len(names)), key=lambda label: counts[label])
        if counts[rarest] < _MANY_IMAGES:
            raise ValueError(
                f"Only {counts[rarest]} of the {len(records)} scenes of seed {self.seed} show "
                f"'{names[rarest]}', but patterns from {_MANY_IMAGES} images of every class are to "
                "be compared. Name another seed, or leave the setting cosine out."
            )
        few, many = (
            discover(
                self._source,
                records,
                names,
                _LAYERS,
                output=folder / f"{number}_images",
                max_images_per_class=number,
                seed=self.seed,
                batch_size=self.settings.batch_size,
                report=self.report,
            )
            for number in (_FEW_IMAGES, _MANY_IMAGES)
        )
        result = {}
        for layer in _LAYERS:
            # NaN for a class without a pattern.
            cosines = (few.layers[layer].direction * many.layers[layer].direction).sum(1).abs()
            result[f"cosine_{layer}"] = float(cosines.mean())
            result[f"lowest_cosine_{layer}"] = float(cosines.min())
        return result

    def _tag_run(self, settings: TagSettings, name: str) -> TagRun:
        return TagRun(
            self.train_data,
            self.val_data,
            settings,
            image_root=self.image_root,
            output=self.folder / name,
            device=self.device,
            report=self.report,
        )


def _orderings() -> list[Ordering]:
    found = []
    for masks in (_PAPER, _DEFAULT):
        for better, worse in (("C41", "C42"), ("C42", "C43")):
            name = f"proxy masks, {masks}: {better} above {worse}"
            setting = f"proxy/{masks}"
            found.append(Ordering(name, (setting, f"proxy_{better}"), (setting, f"proxy_{worse}")))
    trained = f"train/C41_{_DEFAULT}"
    found.append(
        Ordering(
            "trained on C41 above trained on C43",
            (trained, "trained"),
            (f"train/C43_{_DEFAULT}", "trained"),
        )
    )
    for masks in (_PAPER, _DEFAULT):
        setting = f"train/C41_{masks}"
        name = f"{masks}: retrained above trained"
        found.append(Ordering(name, (setting, "retrained"), (setting, "trained")))

    def compare(name: str, better: str, worse: str) -> None:
        sides = ((f"proxy/{masks}", "proxy_C41") for masks in (better, worse))
        found.append(Ordering(f"proxy masks of C41, {name}", *sides))

    for masks in _MASKS:
        compare(f"{masks}: CRF above none", f"{masks}_crf", masks)
    for resolve in ("ignore", "standardised"):
        compare(f"{resolve}: otsu above zero", f"otsu_{resolve}", f"zero_{resolve}")
    for threshold in ("zero", "otsu"):
        name = f"{threshold}: standardised above ignore"
        compare(name, f"{threshold}_standardised", f"{threshold}_ignore")
    images = f"{_FEW_IMAGES} and {_MANY_IMAGES} images"
    for layer in _LAYERS:
        name = f"patterns of {layer} from {images}: cosine above 0.99"
        found.append(Ordering(name, ("cosine", f"cosine_{layer}"), 0.99))
    return found


STUDY = Study(
    settings=(
        *(f"proxy/{masks}" for masks in _MASKS),
        *(f"proxy/{masks}_crf" for masks in _MASKS),
        f"train/C41_{_PAPER}",
        f"train/C41_{_DEFAULT}",
        f"train/C43_{_DEFAULT}",
        "cosine",
    ),
    measures={
        **{f"proxy_{layer}": Measure(f"proxy masks of {layer}") for layer in _LAYERS},
        **{f"decided_{layer}": Measure(f"{layer}, decided pixels") for layer in _LAYERS},
        **{f"undecided_{layer}": Measure(f"{layer}, undecided") for layer in _LAYERS},
        "trained": Measure("trained"),
        "retrained": Measure("retrained"),
        **{f"cosine_{layer}": Measure(f"cosine, {layer}", 4) for layer in _LAYERS},
        **{f"lowest_cosine_{layer}": Measure(f"lowest, {layer}", 4) for layer in _LAYERS},
    },
    plotted=(*(f"proxy_{layer}" for layer in _LAYERS), "trained", "retrained"),
    plot_label="mIoU (percent)",
    orderings=_orderings(),
    describe=_describe,
    open_seed=_SeedRuns,
)
"""Class patterns; orderings of the paper, then of the choices that it does not have."""
