"""Ablations of Mask^X R-CNN on generated scenes.

The settings carry the names of ``configs/MaskX``: ``TRAINING/METHOD``, where the training is ``sw``
(stage-wise: every second stage of a seed on the same detector) or ``e2e`` (end to end), and the
method a list of words joined by ``_``. Before it may stand where masks are from: ``oracle/`` (all
categories have masks in training), ``grabcut/`` or ``u2netp/`` (that teacher draws those of B), or
``share_N/`` (N percent of the objects have masks, of whatever category, chosen by the seed).
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.models.detection import FasterRCNN

from maskx.core.word_vectors import load_class_vectors
from maskx.data.coco import load_coco
from maskx.data.splits import resolve_split
from maskx.engine.batches import training_batches
from maskx.engine.completion import CompletionOptions, complete
from maskx.engine.features import keep_features
from maskx.engine.options import QuickstartOptions
from maskx.engine.quickstart import choose_image_size, load_data
from maskx.engine.training import TrainingSettings, select_device, train
from maskx.evaluation.average_precision import evaluate_detections
from maskx.supervision import CategorySplit
from maskx.systems.maskx_rcnn.evaluation import by_model, mean_iou_of_boxes
from maskx.systems.maskx_rcnn.pipeline import LEARNING_RATES
from maskx.systems.maskx_rcnn.samples import InstanceMapper
from maskx.systems.maskx_rcnn.torchvision import (
    SampleDetector,
    detect,
    faster_rcnn,
    maskx_rcnn,
)
from studies.options import OWN_OPTIONS, StudyOptions
from studies.picture import Shown
from studies.study import Measure, Ordering, Report, Study, process_lock

# What each word of a method sets; those of configs/MaskX/README.md set the same there.
WORDS: Mapping[str, Mapping[str, Any]] = {
    "baseline": {"predictor": "class_agnostic"},
    "mask_rcnn": {"predictor": "class_specific"},
    "clsbox": {"predictor": "transfer", "transfer_inputs": "cls+box"},
    "cls": {"predictor": "transfer", "transfer_inputs": "cls"},
    "box": {"predictor": "transfer", "transfer_inputs": "box"},
    "randn": {"predictor": "transfer", "transfer_inputs": "randn"},
    "glove": {"predictor": "transfer", "transfer_inputs": "vectors"},
    "1_layer": {"transfer_layers": 1},
    "2_layer": {"transfer_layers": 2},
    "3_layer": {"transfer_layers": 3},
    "relu": {"transfer_activation": "relu"},
    "nostopgrad": {"stop_gradient": False},
    "dropout": {"transfer_dropout": 0.8},
    "normalised": {"transfer_normalise": True},
    "box_loss": {"box_loss": {"weight": 1.0}},
    "mlp": {"mlp": "single_fc"},
    "bottleneck": {"mlp": "bottleneck"},
    "gtboxes": {"gt_boxes_only": True},
    "mix": {"transfer_mix": 0.05},
    "residual": {"trunk": "residual", "num_convs": 4},
    "hourglass": {"trunk": "hourglass", "num_convs": 2},
}

# The rows of the paper's tables 3.1 to 3.4, then the gains of later papers one by one.
PAPER_SETTINGS = (
    "sw/baseline",
    "sw/randn_2_layer",
    "sw/cls_2_layer",
    "sw/box_2_layer",
    "sw/clsbox_2_layer",
    "sw/clsbox_1_layer",
    "sw/clsbox_2_layer_relu",
    "sw/clsbox_3_layer_relu",
    "sw/clsbox_3_layer",
    "sw/baseline_mlp",
    "sw/clsbox_2_layer_mlp",
    "sw/clsbox_2_layer_gtboxes",
    "sw/clsbox_2_layer_residual",
    "sw/clsbox_2_layer_hourglass",
    "sw/clsbox_2_layer_hourglass_gtboxes",
    "e2e/baseline",
    "e2e/clsbox_2_layer_nostopgrad",
    "e2e/clsbox_2_layer",
)

_TEACHERS = ("grabcut", "u2netp")
_MASKS = ("oracle", *_TEACHERS, r"share_\d+")

# What the RoI heads have beside a detector's.
_MASK_PARTS = ("mask_head", "box_loss", "ema_teacher")

_DEFAULTS = {"iterations": 1200, "stage2_iterations": 600, "batch_size": 8}


def mask_branch(setting: str) -> dict[str, Any]:
    """Decode a setting into arguments of :func:`maskx.torchvision.add_mask_branch`.

    Raises:
        ValueError: it is not of the form TRAINING/METHOD, a word is not known or contradicts
            another, or none says what predicts the masks.
    """
    training, method = _parts(setting)[1:]
    known = "|".join(sorted(WORDS, key=len, reverse=True))
    if training not in ("sw", "e2e") or not re.fullmatch(rf"({known})(_({known}))*", method):
        raise ValueError(
            f"Setting '{setting}' is not known. Allowed: sw/METHOD or e2e/METHOD, perhaps with "
            "oracle/, grabcut/, u2netp/ or share_N/ (N percent, 1 to 99) before it, and METHOD of "
            "the words "
            f"{', '.join(WORDS)}, joined by '_'."
        )
    branch: dict[str, Any] = {"freeze_detector": training == "sw"}
    for word in re.findall(rf"({known})(?:_|$)", method):
        if branch.keys() & WORDS[word].keys():
            raise ValueError(
                f"Setting '{setting}': '{word}' sets what an earlier word has set. Remove one."
            )
        branch |= WORDS[word]
    if "predictor" not in branch:
        predictors = [word for word, keys in WORDS.items() if "predictor" in keys]
        raise ValueError(
            f"Setting '{setting}' does not say what predicts the masks. Add one of "
            f"{', '.join(predictors)}."
        )
    return branch


def _parts(setting: str) -> tuple[str, str, str]:
    """Where the masks of B are from ("" for nowhere), the training, the method."""
    first, _, rest = setting.partition("/")
    masks = first if re.fullmatch("|".join(_MASKS), first) else ""
    training, _, method = (rest if masks else setting).partition("/")
    return masks, training, method


class _SeedRuns:
    """All runs of one seed; they share the scenes and the detector of the first stage."""

    shown: Shown | None = None

    def __init__(self, options: StudyOptions, seed: int, report: Report) -> None:
        self.options, self.seed, self.numbers = options, seed, _numbers_of(options)
        self.folder = options.seed_folder(seed)
        self.device = select_device(options.device)
        self.quickstart = options.quickstart(seed)
        with process_lock(self.folder):
            self.train_data, self.val_data = load_data(self.quickstart)
        own_data = options.coco_train is not None
        default_split = "all" if own_data else "scenes_half"
        names = self.train_data.class_names
        self.split = resolve_split(options.masks_for or default_split, names)
        size = choose_image_size(self.quickstart)
        self.detector = {
            "pretrained": options.pretrained,
            "frozen": options.frozen,
            "light": options.light or options.backbone == "small",
            "min_size": size,
            "max_size": 2 * size,
        }

    def run(self, setting: str) -> dict[str, float]:
        branch = mask_branch(setting)
        if branch.get("transfer_inputs") == "vectors":
            vectors = load_class_vectors(self.options.vectors, self.train_data.class_names)
            branch["class_vectors"] = torch.from_numpy(vectors)
        torch.manual_seed(self.seed)
        num_classes = len(self.train_data.class_names) + 1
        iterations = _describe(self.options, setting)["iterations"]
        if "box_loss" in branch:
            branch["box_loss"] = {**branch["box_loss"], "warm_up": iterations // 10}
        model = self._with_features(
            maskx_rcnn(
                num_classes, detector=self.detector, **branch, backbone=self.options.backbone
            )
        )
        if branch["freeze_detector"]:
            self._load_detector(model)
        records, split = self._with_masks(_parts(setting)[0])
        self._train(model, self.folder / setting, iterations, setting, records, split)
        names = self.train_data.class_names
        self.shown = Shown(model, self.val_data.records, names, self.split)
        return self._evaluate(model, setting)

    def _with_masks(self, source: str) -> tuple[Sequence[dict[str, Any]], CategorySplit]:
        """Training images, and which categories have masks in them."""
        everything = resolve_split("all", self.train_data.class_names)
        if source == "oracle":
            return self.train_data.records, everything
        if source.startswith("share_"):
            share = int(source.removeprefix("share_")) / 100
            return with_share_of_masks(self.train_data.records, share, self.seed), everything
        if source not in _TEACHERS:
            return self.train_data.records, self.split
        path = self.folder / f"{source}.json"
        images = self.options.coco_train[1] if self.options.coco_train else None
        images = images or self.train_data.json_file.parent
        with process_lock(self.folder / source):
            if not path.exists():
                complete(
                    CompletionOptions(
                        data=(self.train_data.json_file, images),
                        output=path,
                        teacher=source,
                        withhold=self.split.name,
                        skip_bad=self.options.skip_bad,
                    )
                )
        return load_coco(path, images).records, everything

    def _with_features(self, detector: FasterRCNN) -> SampleDetector:
        """Let a frozen backbone compute its features once for all runs of the seed."""
        if self.options.frozen:
            keep_features(detector.backbone.backbone, self.folder, QuickstartOptions.feature_cache)
        return SampleDetector(detector)

    def _load_detector(self, model: SampleDetector) -> None:
        """Give a model the detector of the first stage, which is trained when first needed."""
        torch.manual_seed(self.seed)
        num_classes = len(self.train_data.class_names) + 1
        detector = self._with_features(
            faster_rcnn(num_classes, backbone=self.options.backbone, **self.detector)
        )
        folder = self.folder / "stage1"
        with process_lock(folder):
            records = self.train_data.records
            self._train(detector, folder, self.numbers["iterations"], "stage1", records, self.split)
        detector.to("cpu")
        missing, unexpected = model.load_state_dict(detector.state_dict(), strict=False)
        own = tuple(f"detector.roi_heads.{part}." for part in _MASK_PARTS)
        outside = [name for name in missing if not name.startswith(own)]
        assert not outside, outside
        assert not unexpected, unexpected

    def _train(
        self,
        model: SampleDetector,
        folder: Path,
        iterations: int,
        description: str,
        records: Sequence[dict[str, Any]],
        split: CategorySplit,
    ) -> None:
        rate = LEARNING_RATES["light" if self.detector["light"] else "usual"]
        settings = TrainingSettings(
            iterations=iterations,
            batch_size=self.numbers["batch_size"],
            learning_rate=rate * self.numbers["batch_size"],
            seed=self.seed,
            checkpoint_every=max(100, iterations // 10),
        )
        batches = functools.partial(
            training_batches,
            records,
            InstanceMapper(split.indices_with_masks, pseudo_weight="one", sizes=model.sizes),
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        train(
            model,
            batches,
            settings,
            output_dir=folder,
            resume=True,
            device=self.device,
            description=f"seed {self.seed} {description}",
        )

    def _evaluate(self, model: SampleDetector, description: str) -> dict[str, float]:
        data = self.val_data
        detections = detect(
            model, data.records, data.category_ids, description=f"seed {self.seed} {description}"
        )
        results = evaluate_detections(
            data.json_file,
            detections,
            category_ids=data.category_ids,
            groups=self.split.groups(),
            max_detections=model.detector.roi_heads.detections_per_img,
        )
        found = {
            f"{name}_AP_{group}": results[task][group]["AP"]
            for name, task in (("mask", "segm"), ("box", "bbox"))
            for group in ("A", "B")
        }
        means = mean_iou_of_boxes(by_model(model), data, self.split, description=description)
        return found | {f"mask_IoU_{group}": 100 * means[group] for group in ("A", "B")}


def with_share_of_masks(
    records: Sequence[dict[str, Any]], share: float, seed: int
) -> list[dict[str, Any]]:
    """Keep the masks of a share of the objects, all the same with every larger share of a seed."""
    count = sum(len(record["annotations"]) for record in records)
    places = iter(np.random.RandomState(seed).permutation(count) < round(share * count))
    return [
        record
        | {
            "annotations": [
                each if next(places) else {k: v for k, v in each.items() if k != "segmentation"}
                for each in record["annotations"]
            ]
        }
        for record in records
    ]


def _numbers_of(options: StudyOptions) -> dict[str, int]:
    return _DEFAULTS | options.given(**{name: name for name in _DEFAULTS})


def _describe(options: StudyOptions, setting: str) -> dict[str, Any]:
    numbers = _numbers_of(options)
    run = {"iterations": numbers["iterations"], "batch_size": numbers["batch_size"]}
    branch = mask_branch(setting)
    if branch["freeze_detector"]:
        run["iterations"] = numbers["stage2_iterations"]
        run["detector_iterations"] = numbers["iterations"]
    if branch.get("transfer_inputs") == "vectors" and options.vectors is None:
        raise ValueError(f"Setting '{setting}' needs a file of word vectors. Give --vectors FILE.")
    return run | options.own()


def _above(name: str, better: str, worse: str) -> Ordering:
    return Ordering(name, (better, "mask_AP_B"), (worse, "mask_AP_B"))


STUDY = Study(
    settings=PAPER_SETTINGS,
    measures={
        "mask_AP_B": Measure("mask AP, B"),
        "mask_AP_A": Measure("mask AP, A"),
        "box_AP_B": Measure("box AP, B"),
        "box_AP_A": Measure("box AP, A"),
        "mask_IoU_B": Measure("IoU in true boxes, B"),
        "mask_IoU_A": Measure("IoU in true boxes, A"),
    },
    plotted=("mask_AP_B",),
    plot_label="Mask AP on B (percent)",
    orderings=(
        _above("3.1: transfer above class-agnostic", "sw/clsbox_2_layer", "sw/baseline"),
        _above("3.1: cls+box above box", "sw/clsbox_2_layer", "sw/box_2_layer"),
        _above("3.1: cls+box above cls", "sw/clsbox_2_layer", "sw/cls_2_layer"),
        _above("3.1: box above cls", "sw/box_2_layer", "sw/cls_2_layer"),
        _above("3.1: cls above class-agnostic", "sw/cls_2_layer", "sw/baseline"),
        _above("3.2: 2 layers above 1", "sw/clsbox_2_layer", "sw/clsbox_1_layer"),
        _above("3.2: LeakyReLU above ReLU", "sw/clsbox_2_layer", "sw/clsbox_2_layer_relu"),
        _above("3.2: 2 layers above 3", "sw/clsbox_2_layer", "sw/clsbox_3_layer"),
        _above("3.3: MLP above none, class-agnostic", "sw/baseline_mlp", "sw/baseline"),
        _above("3.3: MLP above none, transfer", "sw/clsbox_2_layer_mlp", "sw/clsbox_2_layer"),
        _above("3.4: transfer above class-agnostic", "e2e/clsbox_2_layer", "e2e/baseline"),
        _above(
            "3.4: stop-gradient above none", "e2e/clsbox_2_layer", "e2e/clsbox_2_layer_nostopgrad"
        ),
        _above(
            "Deep-MAC: ground-truth boxes above proposals",
            "sw/clsbox_2_layer_gtboxes",
            "sw/clsbox_2_layer",
        ),
        _above(
            "Deep-MAC: hourglass above 4 convolutions, ground-truth boxes",
            "sw/clsbox_2_layer_hourglass_gtboxes",
            "sw/clsbox_2_layer_gtboxes",
        ),
    ),
    describe=_describe,
    open_seed=_SeedRuns,
    takes=OWN_OPTIONS,
)
"""Mask^X R-CNN; the orderings are of its tables 3.1 to 3.4, and of Deep-MAC."""
