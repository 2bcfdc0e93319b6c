"""Ablations of class patterns on scenes or own data: proxy masks, training on them, the patterns.

Settings: ``proxy/THRESHOLD_RESOLVE`` are proxy masks of all layers, measured on the training
images; ``train/LAYER_THRESHOLD_RESOLVE`` the segmentation network trained on those of one layer and
once more on its predictions; both take ``_crf`` at the end, for a dense CRF where the paper has it.
``cam`` and ``train/cam`` are the same with class activation maps of the classifier in place of
patterns, ``oracle`` the network trained on true masks. ``cosine`` compares the patterns from few
scenes with those from more. Of a seed all share the data, the classifier with the features of a
frozen backbone, its patterns and projections.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskx.core.digests import network_hash
from maskx.core.sample_models import SampleClassifier
from maskx.data.coco import load_coco
from maskx.data.dense_crf import check_crf
from maskx.data.images import read_image_sample
from maskx.data.label_maps import has_pixels, semantic_label_map, write_label_map
from maskx.data.scenes.generator import generate_scenes
from maskx.engine import quickstart
from maskx.engine.quickstart import choose_image_size, load_data
from maskx.engine.training import select_device
from maskx.systems.class_patterns.evaluation import evaluate_proxy_masks
from maskx.systems.class_patterns.patterns import ClassPatterns
from maskx.systems.class_patterns.pipeline import (
    TagRun,
    TagSettings,
    layers_of,
    open_tagged_images,
    write_masks_json,
)
from maskx.systems.class_patterns.projections import (
    projections_path,
    start_projections,
    write_projections,
)
from maskx.systems.class_patterns.proxy_masks import (
    ProxyMaskSettings,
    make_proxy_masks,
    mask_path,
)
from maskx.systems.class_patterns.steps import (
    ClassifierSource,
    LayerMasks,
    discover,
    make_masks,
    masks_folder,
    project,
    projections_folder,
)
from studies.options import OWN_OPTIONS, StudyOptions
from studies.picture import Shown
from studies.study import Measure, Ordering, Report, Study, process_lock

_PAPER, _DEFAULT = "zero_ignore", "otsu_standardised"
_MASKS = tuple("_".join(words) for words in product(("zero", "otsu"), ("ignore", "standardised")))
_CAM, _ORACLE, _COSINE = "cam", "oracle", "cosine"

# Share of the largest value of a class activation map in its image, above which its class is seen:
# that of Zhou et al., "Learning Deep Features for Discriminative Localization" (CVPR 2016).
_CAM_THRESHOLD = 0.2
# Maps are written less that share; of several classes the one with the largest is taken.
_CAM_MASKS = ProxyMaskSettings(threshold="zero", resolve="standardised", crf=False)

# Patterns from so many images of a class are compared. With so many more scenes a class is in
# nearly 1,000 images.
_FEW_IMAGES, _MANY_IMAGES = 400, 800
_MORE_SCENES, _MORE_SCENES_SEED = 6600, 2**31


def _parse(options: StudyOptions, setting: str) -> dict[str, str | None]:
    layers = layers_of(options.backbone)
    match = re.fullmatch(
        rf"{_CAM}|train/{_CAM}|{_ORACLE}|{_COSINE}|"
        rf"(?:proxy/|train/(?P<layer>{'|'.join(map(re.escape, layers))})_)"
        r"(?P<threshold>zero|otsu)_(?P<resolve>ignore|standardised)(?P<crf>_crf)?",
        setting,
    )
    if match is None:
        raise ValueError(
            f"Setting '{setting}' is not known. Allowed: proxy/THRESHOLD_RESOLVE, "
            "train/LAYER_THRESHOLD_RESOLVE, both also with _crf at the end, cam, train/cam, oracle "
            "and cosine, with THRESHOLD zero or otsu, RESOLVE ignore or standardised, LAYER "
            f"{', '.join(layers)}."
        )
    return match.groupdict()


def _is_trained(setting: str) -> bool:
    return setting.startswith("train/") or setting == _ORACLE


def _tag_settings(options: StudyOptions, seed: int = 0) -> TagSettings:
    names = {"iterations": "iterations", "stage2_iterations": "segmenter_iterations"}
    return TagSettings(
        seed=seed,
        backbone=options.backbone,
        pretrained=options.pretrained,
        frozen=options.frozen,
        image_size=choose_image_size(options.quickstart(seed)),
        **options.given(batch_size="batch_size", **names),
    )


def _describe(options: StudyOptions, setting: str) -> dict[str, Any]:
    words = _parse(options, setting)
    if words["crf"]:
        check_crf()
    if setting == _COSINE and options.coco_train is not None:
        raise ValueError(f"Setting '{setting}' is of generated scenes. Leave it out.")
    settings = _tag_settings(options)
    run = {
        name: getattr(settings, name)
        for name in ("iterations", "batch_size", "image_size", "max_images_per_class")
    }
    if _is_trained(setting):
        run["segmenter_iterations"] = settings.segmenter_iterations
    if setting == _COSINE:
        run["max_images_per_class"] = [_FEW_IMAGES, _MANY_IMAGES]
    return run | options.own()


class _SeedRuns:
    """All runs of one seed."""

    shown: Shown | None = None

    def __init__(self, options: StudyOptions, seed: int, report: Report) -> None:
        self.options, self.seed, self.report = options, seed, report
        self.folder = options.seed_folder(seed)
        self.shared = self.folder / "shared"
        self.proxy = self.shared / "proxy"
        self.layers = layers_of(options.backbone)
        self.settings = _tag_settings(options, seed)
        self.device = select_device(options.device)
        with process_lock(self.folder):
            self.train_data, self.val_data = load_data(options.quickstart(seed), style="sparse")
        own_images = options.coco_train[1] if options.coco_train else None
        self.image_root = Path(own_images or self.train_data.json_file.parent)

    def run(self, setting: str) -> dict[str, float]:
        words, self.shown = _parse(self.options, setting), None
        if setting == _COSINE:
            return self._compare_patterns()
        if not setting.startswith("train/"):
            self._check_truth(setting)
        if setting == _ORACLE:
            return self._train(setting, self.settings, self._write_true_masks(), again=False)
        if setting.endswith(_CAM):
            json_file, masks = self._make_cam_masks()
            if _is_trained(setting):
                return self._train(setting, self.settings, json_file)
            known = [record for record in self.train_data.records if has_pixels(record)]
            found = evaluate_proxy_masks(known, masks, len(self.train_data.class_names))
            return {_CAM: found["undecided_missed"]["mIoU"]["all"]}
        settings = ProxyMaskSettings(
            threshold=words["threshold"], resolve=words["resolve"], crf=bool(words["crf"])
        )
        masks = self._make_masks(settings)
        if layer := words["layer"]:
            settings = dataclasses.replace(self.settings, layer=layer, masks=settings)
            return self._train(setting, settings, masks[layer].json_file)
        result = {}
        for name, of_evaluation in (
            ("proxy", lambda found: found["undecided_missed"]["mIoU"]["all"]),
            ("decided", lambda found: found["decided_only"]["mIoU"]["all"]),
            ("undecided", lambda found: found["undecided"]),
        ):
            for layer in self.layers:
                result[f"{name}_{layer}"] = of_evaluation(masks[layer].evaluation)
        return result

    def _check_truth(self, setting: str) -> None:
        """Refuse own data without true masks where these are what a setting is about."""
        records = self.train_data.records
        if not any(map(has_pixels, records)):
            raise ValueError(
                f"None of the {len(records)} training images of '{self.train_data.json_file}' has "
                f"a true mask, which setting '{setting}' needs. Leave it out (train/ settings need "
                "none), or give masks."
            )

    @functools.cached_property
    def _classifier(self) -> SampleClassifier:
        with process_lock(self.shared):
            return self._tag_run(self.settings, "shared").train_classifier()

    @functools.cached_property
    def _source(self) -> ClassifierSource:
        trained = self._classifier  # and on disk
        data = self.train_data.json_file, self.image_root
        read = {"device": self.device, "strict": not self.options.skip_bad}
        source, _, _ = open_tagged_images(self.shared / "classifier", *data, **read)
        source.classifier.backbone.cache = trained.classifier.backbone.cache
        return source

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
                self.layers,
                output=self.shared / "patterns",
                max_images_per_class=settings.max_images_per_class,
                seed=self.seed,
                **passes,
            )
            project(source, records, patterns, self.layers, self.proxy, **passes)
        return patterns

    def _make_masks(self, settings: ProxyMaskSettings) -> dict[str, LayerMasks]:
        patterns = self._patterns
        with process_lock(self.shared):  # proxy/M and train/L_M make the same files
            return make_masks(
                self.train_data.records,
                patterns,
                self.layers,
                self.proxy,
                image_root=self.image_root,
                category_ids=self.train_data.category_ids,
                settings=settings,
                report=self.report,
            )

    def _make_cam_masks(self) -> tuple[Path, Path]:
        """Make masks of class activation maps, as of projections; return their file and folder."""
        classifier, records = self._classifier, self.train_data.records
        names = self.train_data.class_names
        maps = projections_folder(self.proxy, _CAM)
        masks = masks_folder(self.proxy, _CAM, _CAM_MASKS)
        with process_lock(self.shared):
            network = network_hash(classifier.classifier)
            about = {"threshold": _CAM_THRESHOLD, "image_size": self.settings.image_size}
            start_projections(maps, class_names=names, patterns=network, layer=_CAM, **about)
            for record in records:
                image_id, labels = record["image_id"], record["image_labels"]
                if labels and not projections_path(maps, image_id).is_file():
                    found = scaled_activation_maps(classifier, record) - _CAM_THRESHOLD
                    write_projections(maps, image_id, labels, found)
            make_proxy_masks(
                records,
                maps,
                masks,
                class_names=names,
                stds=np.ones(len(names)),
                settings=_CAM_MASKS,
                progress=True,
            )
            return self._write_json(masks), masks

    def _write_true_masks(self) -> Path:
        """Write true masks as proxy masks are written, so that the same is trained on them."""
        masks, num_classes = self.proxy / "masks" / _ORACLE, len(self.train_data.class_names)
        with process_lock(self.shared):
            masks.mkdir(parents=True, exist_ok=True)
            for record in self.train_data.records:
                truth = semantic_label_map(record, num_classes)
                path = mask_path(masks, record["image_id"])
                write_label_map(path, truth, num_classes=num_classes)
            return self._write_json(masks)

    def _write_json(self, masks: Path) -> Path:
        json_file = self.proxy / f"{masks.name}.json"
        return write_masks_json(json_file, self.train_data, masks, self.image_root)

    def _train(
        self, setting: str, settings: TagSettings, json_file: Path, *, again: bool = True
    ) -> dict[str, float]:
        """Train the network on masks and, if asked to, again on what it predicts."""
        run, start = self._tag_run(settings, setting), self._classifier
        identity = {"patterns": network_hash(start.classifier), "proxy masks": json_file.stem}
        trained = run.train_segmenter("segmenter", start, json_file, identity)
        result = {"trained": run.evaluate(trained, "trained")["mIoU"]["all"]}
        if again:
            predicted = run.predict_training_images(trained)
            identity |= {"predicted by": network_hash(trained.network)}
            retrained = run.train_segmenter("retrained", start, predicted, identity)
            result["retrained"] = run.evaluate(retrained, "retrained")["mIoU"]["all"]
        last, data = retrained if again else trained, self.val_data
        self.shown = Shown(last, data.records, data.class_names)
        return result

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
                self.layers,
                output=folder / f"{number}_images",
                max_images_per_class=number,
                seed=self.seed,
                batch_size=self.settings.batch_size,
                report=self.report,
            )
            for number in (_FEW_IMAGES, _MANY_IMAGES)
        )
        result = {}
        for layer in self.layers:
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


@torch.inference_mode()
def scaled_activation_maps(model: SampleClassifier, record: Mapping[str, Any]) -> np.ndarray:
    """Make the class activation maps of the labels of an image, (L, h, w) up to 1.

    What is below zero is 0, and so is all of a map that is nowhere above.
    """
    network, labels = model.eval().classifier, record["image_labels"]
    features = network.backbone(model.preprocess([read_image_sample(record)]))[network.in_feature]
    maps = network.activation_maps(features, labels)[0].clamp(min=0)
    return (maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)).cpu().numpy()


def _orderings(layers: Sequence[str]) -> list[Ordering]:
    found, first, last = [], layers[0], layers[-1]
    for masks in (_PAPER, _DEFAULT):
        for better, worse in pairwise(layers):
            name = f"proxy masks, {masks}: {better} above {worse}"
            setting = f"proxy/{masks}"
            found.append(Ordering(name, (setting, f"proxy_{better}"), (setting, f"proxy_{worse}")))
    trained = (f"train/{first}_{_DEFAULT}", "trained")
    if first != last:
        worse = (f"train/{last}_{_DEFAULT}", "trained")
        found.append(Ordering(f"trained on {first} above trained on {last}", trained, worse))
    for masks in (_PAPER, _DEFAULT):
        setting = f"train/{first}_{masks}"
        name = f"{masks}: retrained above trained"
        found.append(Ordering(name, (setting, "retrained"), (setting, "trained")))

    def compare(name: str, better: str, worse: str) -> None:
        sides = ((f"proxy/{masks}", f"proxy_{first}") for masks in (better, worse))
        found.append(Ordering(f"proxy masks of {first}, {name}", *sides))

    for masks in _MASKS:
        compare(f"{masks}: CRF above none", f"{masks}_crf", masks)
    for resolve in ("ignore", "standardised"):
        compare(f"{resolve}: otsu above zero", f"otsu_{resolve}", f"zero_{resolve}")
    for threshold in ("zero", "otsu"):
        name = f"{threshold}: standardised above ignore"
        compare(name, f"{threshold}_standardised", f"{threshold}_ignore")
    masks = (f"proxy/{_DEFAULT}", f"proxy_{first}")
    found += [
        Ordering(f"masks of patterns of {first} above those of CAM", masks, (_CAM, _CAM)),
        Ordering("trained on patterns above trained on CAM", trained, (f"train/{_CAM}", "trained")),
        Ordering("trained on true masks above trained on patterns", (_ORACLE, "trained"), trained),
    ]
    images = f"{_FEW_IMAGES} and {_MANY_IMAGES} images"
    for layer in layers:
        name = f"patterns of {layer} from {images}: cosine above 0.99"
        found.append(Ordering(name, (_COSINE, f"cosine_{layer}"), 0.99))
    return found


def _of_layers(layers: Sequence[str]) -> dict[str, Any]:
    """What a study compares and shows on a backbone with these layers in its last stage."""
    trained = [f"train/{layers[0]}_{_PAPER}"]
    # One layer may be first and last.
    trained += [f"train/{layer}_{_DEFAULT}" for layer in dict.fromkeys((layers[0], layers[-1]))]
    return {
        "settings": (
            *(f"proxy/{masks}" for masks in _MASKS),
            *(f"proxy/{masks}_crf" for masks in _MASKS),
            _CAM,
            *trained,
            f"train/{_CAM}",
            _ORACLE,
            _COSINE,
        ),
        "measures": {
            **{f"proxy_{layer}": Measure(f"proxy masks of {layer}") for layer in layers},
            **{f"decided_{layer}": Measure(f"{layer}, decided pixels") for layer in layers},
            **{f"undecided_{layer}": Measure(f"{layer}, undecided") for layer in layers},
            _CAM: Measure("masks of class activation maps"),
            "trained": Measure("trained"),
            "retrained": Measure("retrained"),
            **{f"cosine_{layer}": Measure(f"cosine, {layer}", 4) for layer in layers},
            **{f"lowest_cosine_{layer}": Measure(f"lowest, {layer}", 4) for layer in layers},
        },
        "plotted": (*(f"proxy_{layer}" for layer in layers), _CAM, "trained", "retrained"),
        "orderings": _orderings(layers),
    }


def _of_options(options: StudyOptions) -> dict[str, Any]:
    fields = _of_layers(layers_of(options.backbone))
    if options.coco_train is not None:
        fields["settings"] = [each for each in fields["settings"] if each != _COSINE]
    return fields


STUDY = Study(
    **_of_layers(layers_of(StudyOptions.backbone)),
    plot_label="mIoU (percent)",
    describe=_describe,
    open_seed=_SeedRuns,
    takes=OWN_OPTIONS - {"masks_for", "light", "vectors"},
    of_options=_of_options,
)
"""Class patterns; orderings of the paper, then of the choices that it does not have."""
