"""Class patterns on Detectron2: from tagged images to a segmentation network.

Luo and Yang, "Learning Saliency-Free Model with Generic Features for Weakly-Supervised Semantic
Segmentation" (AAAI 2020), in the steps of :class:`TagChain`. What a training image shows is known
by its image labels alone: true masks, where a data set has them, are read by evaluations only.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from maskx.core.files import write_json
from maskx.core.image_classifier import LayerTaps
from maskx.core.sample_models import take_classifier_backbone
from maskx.data.dense_crf import check_crf
from maskx.detectron2.adapters import in_format
from maskx.detectron2.config import read_config
from maskx.detectron2.datasets import (
    records_of,
    training_class_names,
)
from maskx.detectron2.known_datasets import register_all
from maskx.detectron2.stagewise import (
    MadeData,
    Stage,
    build_on_cpu,
    config_values,
    run_stage,
    stage_is_finished,
)
from maskx.detectron2.trainer import check_config, load_trained
from maskx.detectron2.whole_images import MaskXImageClassifier, image_mapper
from maskx.engine.runs import Run, origin_of
from maskx.engine.stages import run_stage as run_work
from maskx.engine.stages import stage_state
from maskx.evaluation.figures import varied_records
from maskx.systems.class_patterns.detectron2 import MaskXDeepLab
from maskx.systems.class_patterns.evaluation import draw_steps
from maskx.systems.class_patterns.model import predict_label_maps
from maskx.systems.class_patterns.patterns import load_patterns
from maskx.systems.class_patterns.proxy_masks import ProxyMaskSettings, write_proxy_json
from maskx.systems.class_patterns.steps import (
    PATTERNS_NAME,
    ClassifierSource,
    discover,
    make_masks,
    masks_folder,
    predict_masks,
    project,
    projections_folder,
)

logger = logging.getLogger(__name__)

_PICTURE = "predictions.png"
_DATA = ("maskx_tag_chain_proxy", "maskx_tag_chain_predicted")

# What changes the features of a network beside its weights; a key stands for those below it.
_INPUT_KEYS = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
_FEATURE_KEYS = (
    *_INPUT_KEYS,
    "INPUT.MASKX.SIZE",
    "MODEL.BACKBONE.NAME",
    "MODEL.RESNETS",
    "MODEL.FPN",
    "MODEL.MASKX.BACKBONE.OUTPUT_STRIDE",
    "MODEL.MASKX.BACKBONE.NAME",
)

Record = Mapping[str, Any]
Report = Callable[[str], None]


# --- the classifier and its images


def open_classifier(
    config_file: str | Path, weights: str | Path, opts: Sequence[Any] = ()
) -> tuple[ClassifierSource, list[dict[str, Any]], tuple[str, ...]]:
    """Open a trained image classifier and the images of the first data set it was trained on.

    Args:
        config_file: YAML file that it was trained with.
        weights: its ``model_final.pth``.
        opts: KEY VALUE pairs over the file, as on a command line.

    Returns:
        The classifier on ``MODEL.DEVICE``, the records in the form of
        :func:`maskx.data.coco.load_coco`, and the names of the classes.
    """
    cfg = read_config(Path(config_file), opts)
    register_all()
    source = _open_source(cfg, Path(weights))
    return source, _tagged_records(cfg), tuple(training_class_names(cfg))


def _open_source(cfg: CfgNode, weights: Path) -> ClassifierSource:
    _check_architecture(cfg, MaskXImageClassifier)
    model = _load_trained(cfg, weights)
    settings = config_values(cfg, _FEATURE_KEYS)
    return ClassifierSource(
        model=model,
        read_image=_read_image(cfg),
        name=f"the classifier '{weights}'",
        # Plain values: lists are written out.
        settings={
            key: value if isinstance(value, str | int | float) else json.dumps(value)
            for key, value in settings.items()
        },
    )


def _load_trained(cfg: CfgNode, weights: Path) -> nn.Module:
    """Build the model with all weights of a file, in evaluation mode on ``MODEL.DEVICE``."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(weights)  # in place of those that the training starts from
    check_config(cfg)
    return load_trained(cfg, exact=True)


def _read_image(cfg: CfgNode) -> Callable[[Record], dict[str, Any]]:
    """Function from a record of ``load_coco`` to a sample; processes can take it along."""
    return in_format(image_mapper(cfg).read_image, cfg.INPUT.FORMAT)


def _tagged_records(cfg: CfgNode) -> list[dict[str, Any]]:
    name, *others = cfg.DATASETS.TRAIN
    if others:
        logger.warning(
            "Class patterns and masks are made of '%s' alone, the first of DATASETS.TRAIN; not "
            "of %s.",
            name,
            ", ".join(others),
        )
    all_records = records_of(name)
    records = [record for record in all_records if "image_labels" in record]
    if not records:
        raise ValueError(
            f"None of the {len(all_records)} images of '{name}' (DATASETS.TRAIN) has image labels "
            "or annotations, to learn from. Choose another data set."
        )
    if len(records) < len(all_records):
        logger.warning(
            "%d of the %d images of '%s' are left out: their labels are not known.",
            len(all_records) - len(records),
            len(all_records),
            name,
        )
    for record in records:
        if "image_id" not in record:
            raise ValueError(
                f"Data set '{name}' has a record ({record['file_name']}) without image_id, which "
                "its files are named by. Give each record its own."
            )
    return records


# --- the chain


class TagChain:
    """Learn to segment from image labels, step by step, each in a folder of its own.

    1. ``classifier``: train an image classifier;
    2. ``patterns`` and ``proxy``: find its class patterns, make proxy masks of its training images;
    3. ``segmenter``: train a segmentation network on them;
    4. ``retraining``: predict the training images by it, nothing but the labels of each image;
    5. ``retrained``: train the segmentation network again, from the start, on these predictions.

    A step says in its folder what it was made with, and refuses to go on with anything else. To try
    other masks on the same classifier, copy the folder ``classifier``.

    Trainings are evaluated on ``DATASETS.TEST``. Steps 2 and 4 run in one process, on
    ``MODEL.DEVICE``, whatever the number of GPUs.

    Args:
        classifier_config: YAML file of the image classifier; the training images are those of the
            first data set of its ``DATASETS.TRAIN``.
        segmenter_config: YAML file of the segmentation network, whose ``DATASETS.TRAIN`` gives way
            to what is made here. Both trainings start from its ``MODEL.WEIGHTS`` or, with
            ``MODEL.MASKX.BACKBONE.PRETRAINED``, from ImageNet weights; without both, from the
            backbone of the trained classifier. Its ``TEST.MASKX`` says how to predict.
        output: folder of the steps.
        layer: of the classifier's backbone whose patterns are used, see
            :class:`maskx.core.image_classifier.LayerTaps`.
        masks: how proxy masks are made.
        max_images_per_class: see :func:`maskx.systems.class_patterns.steps.discover`.
        classifier_opts: KEY VALUE pairs over its file.
        segmenter_opts: KEY VALUE pairs over its file.
    """

    def __init__(
        self,
        classifier_config: Path,
        segmenter_config: Path,
        output: Path,
        *,
        layer: str = "C41",
        masks: ProxyMaskSettings,
        max_images_per_class: int = 800,
        classifier_opts: Sequence[Any] = (),
        segmenter_opts: Sequence[Any] = (),
    ) -> None:
        if max_images_per_class < 1:
            raise ValueError(
                f"max_images_per_class is {max_images_per_class}. Allowed: 1 or more; 800 (VOC) "
                "or 2000 (COCO) in the paper."
            )
        self.output, self._proxy = output, output / "proxy"
        self._layer, self._masks = layer, masks
        self._max_images_per_class = max_images_per_class
        self._segmenter_config, self._segmenter_opts = segmenter_config, tuple(segmenter_opts)
        self.classifier = Stage(classifier_config, output / "classifier", tuple(classifier_opts))
        self._check()

        proxy_masks = self._proxy / f"{layer}-{masks.name}.json"
        self.segmenter = self._segmenter_stage("segmenter", _DATA[0], proxy_masks)
        predicted = output / "retraining" / "masks.json"
        self.retrained = self._segmenter_stage("retrained", _DATA[1], predicted)

    def run(
        self, *, num_gpus: int = 1, resume: bool = False, report: Report = print
    ) -> dict[str, dict[str, float | None]]:
        """Do the steps that are not finished.

        Args:
            num_gpus: processes of each training, one per GPU.
            resume: whether an interrupted step may go on; otherwise it is an error.
            report: told what happens, in sentences.

        Returns:
            Measures in percent by folder, None for NaN; also written to ``results.json``. Those of
            ``proxy`` are of the training images, if those have true masks: ``mIoU`` (an undecided
            pixel is missed), ``mIoU_decided_only`` and ``undecided``.
        """
        stages = (self.classifier, self.segmenter, self.retrained)
        with _forgotten_afterwards(_DATA):
            # All folders, before hours go into one.
            if self.classifier.final_weights.is_file():
                stage_state(self._proxy, self._proxy_run())
            finished = {stage.output: stage_is_finished(stage) for stage in stages}

            def train(stage: Stage) -> dict[str, float | None]:
                if finished[stage.output]:
                    report(f"{stage.output}: finished before, not run again")
                return run_stage(stage, num_gpus=num_gpus, resume=resume).results

            shared = {"resume": resume, "report": report}
            results = {"classifier": train(self.classifier)}
            results["proxy"] = self._make_proxy_masks(**shared)
            results["segmenter"] = train(self.segmenter)
            self._predict_training_images(**shared)
            results["retrained"] = train(self.retrained)
            if not (self.output / _PICTURE).is_file():
                self._draw()
        write_json(self.output / "results.json", results)
        return results

    def _segmenter_stage(self, folder: str, data_name: str, json_file: Path) -> Stage:
        return Stage(
            self._segmenter_config,
            self.output / folder,
            self._segmenter_opts,
            weights=self.classifier.final_weights if self._starts_from_classifier else None,
            data=MadeData(data_name, json_file, self._image_root),
        )

    def _make_proxy_masks(self, *, resume: bool, report: Report) -> dict[str, float | None]:
        cfg, folder, layers = self.classifier.cfg, self._proxy, [self._layer]
        run = self._proxy_run()

        def work() -> dict[str, float | None]:
            source = _open_source(cfg, self.classifier.final_weights)
            patterns = discover(
                source,
                self._records,
                self._class_names,
                layers,
                output=self.output / "patterns",
                max_images_per_class=self._max_images_per_class,
                seed=max(0, cfg.SEED),
                report=report,
            )
            project(source, self._records, patterns, layers, folder, report=report)
            made = make_masks(
                self._records,
                patterns,
                layers,
                folder,
                image_root=self._image_root,
                settings=self._masks,
                made_with=_about(run),
                workers=max(1, cfg.DATALOADER.NUM_WORKERS),
                report=report,
            )
            found = made[self._layer].evaluation
            if found is None:
                return {}
            scores = {
                "mIoU": found["undecided_missed"]["mIoU"]["all"],
                "mIoU_decided_only": found["decided_only"]["mIoU"]["all"],
                "undecided": found["undecided"],
            }
            return {key: None if math.isnan(value) else value for key, value in scores.items()}

        return dict(run_work(folder, run, work, resume=resume, report=report))

    def _proxy_run(self) -> Run:
        json_file = self.segmenter.data.json_file.name
        settings = {"layer": self._layer, "masks": self._masks.name}
        settings["max_images_per_class"] = self._max_images_per_class
        return self._made_run(json_file, settings, "classifier", self.classifier)

    def _made_run(self, json_file: str, settings: dict[str, Any], name: str, stage: Stage) -> Run:
        """Describe a step that makes label maps with the network of a stage."""
        return Run(
            system="class_patterns",
            host="detectron2",
            class_names=self._class_names,
            settings=settings,
            started_from={name: origin_of(stage.final_weights, stage.output)},
            weights=json_file,
        )

    def _predict_training_images(self, *, resume: bool, report: Report) -> None:
        cfg, folder = self.segmenter.cfg, self.output / "retraining"
        weights, json_file = self.segmenter.final_weights, self.retrained.data.json_file

        def work() -> dict[str, int]:
            masks = folder / "label_maps"
            model = _load_trained(cfg, weights)
            predict_masks(model, self._records, masks, read_image=_read_image(cfg))
            write_proxy_json(
                json_file,
                self._records,
                masks,
                image_root=self._image_root,
                class_names=self._class_names,
                made_with=_about(run),
            )
            return {"images": len(self._records)}

        settings = {"crf": cfg.TEST.MASKX.CRF, "sizes": list(cfg.TEST.MASKX.SIZES)}
        run = self._made_run(json_file.name, settings, "segmenter", self.segmenter)
        run_work(folder, run, work, resume=resume, report=report)

    def _draw(self) -> None:
        cfg, patterns = self.retrained.cfg, self.output / "patterns" / PATTERNS_NAME
        model, records = _load_trained(cfg, self.retrained.final_weights), self._records
        records = varied_records(records, num_labels=2.5)
        predicted = predict_label_maps(
            model, records, read_image=_read_image(cfg), description="picture"
        )
        found = load_patterns(patterns, network=None, class_names=self._class_names)
        draw_steps(
            self.output / _PICTURE,
            records,
            dict(predicted),
            class_names=self._class_names,
            layer=self._layer,
            projections=projections_folder(self._proxy, self._layer),
            masks=masks_folder(self._proxy, self._layer, self._masks),
            stds=found.layers[self._layer].std,
        )

    def _check(self) -> None:
        """Check all configurations before hours are spent, and read the training images."""
        register_all()
        if self._masks.crf:
            check_crf()
        first = self.classifier.cfg
        second = read_config(self._segmenter_config, self._segmenter_opts)
        _check_architecture(first, MaskXImageClassifier)
        _check_architecture(second, MaskXDeepLab)
        check_config(first)
        second.DATASETS.TRAIN = first.DATASETS.TRAIN  # the classes of what is made of it
        check_config(second)
        classifier, segmenter = build_on_cpu(first), build_on_cpu(second)
        with LayerTaps(classifier.classifier.backbone, [self._layer]):
            pass  # refuses a layer that is not there
        has_weights = second.MODEL.WEIGHTS or second.MODEL.MASKX.BACKBONE.PRETRAINED
        self._starts_from_classifier = not has_weights
        if self._starts_from_classifier:
            take_classifier_backbone(segmenter.network.backbone, classifier.state_dict())
            found = config_values(second, _INPUT_KEYS)
            for key, value in config_values(first, _INPUT_KEYS).items():
                if found[key] != value:
                    raise ValueError(
                        f"{key} is {found[key]!r} in {self._segmenter_config}, but {value!r} in "
                        f"{self.classifier.config_file}, whose backbone it starts from. Set it "
                        "alike in both, or start from other weights: MODEL.WEIGHTS, or "
                        "MODEL.MASKX.BACKBONE.PRETRAINED True."
                    )
        self._class_names = tuple(training_class_names(first))
        self._records = _tagged_records(first)
        folders = [os.path.dirname(record["file_name"]) for record in self._records]
        self._image_root = Path(os.path.commonpath(folders))


def format_results(results: Mapping[str, Mapping[str, float | None]]) -> str:
    """Lay out mAP and mIoU of the steps in a table."""
    measured_on = {"proxy": "training images"}
    lines = ["| step | measure | percent | measured on |", "|---|---|---|---|"]
    for step, values in results.items():
        for name, value in values.items():
            if name.rpartition("/")[2] in ("mAP", "mIoU"):
                text = "-" if value is None else f"{value:.1f}"
                where = measured_on.get(step, "DATASETS.TEST")
                lines.append(f"| {step} | {name} | {text} | {where} |")
    return "\n".join(lines)


def _about(run: Run) -> dict[str, Any]:
    """What label maps were made with: whoever trains on them compares the file that says it."""
    origins = {name: origin.sha256 for name, origin in run.started_from.items()}
    return {**run.settings, **origins}


@contextmanager
def _forgotten_afterwards(names: Sequence[str]) -> Iterator[None]:
    """Forget data sets at the end, so that other folders can stand for the same names."""
    try:
        yield
    finally:
        for name in names:
            if name in DatasetCatalog:
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)


def _check_architecture(cfg: CfgNode, needed: type) -> None:
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY or not issubclass(META_ARCH_REGISTRY.get(name), needed):
        what = "an image classifier" if needed is MaskXImageClassifier else "a segmentation network"
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {name}, but the config of {what} is asked for. Set "
            f"{needed.__name__}, or give another config; those of configs/ClassPatterns fit."
        )
