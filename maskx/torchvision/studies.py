"""Ablations of Mask^X R-CNN on generated scenes: many settings and seeds, one table.

The settings carry the names of ``configs/MaskX``: ``TRAINING/METHOD``, where the training is ``sw``
(stage-wise: every second stage of a seed on the same detector) or ``e2e`` (end to end), and the
method a list of words joined by ``_``.
"""

import functools
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskx.data.json_files import write_json
from maskx.evaluation.average_precision import evaluate_detections
from maskx.evaluation.plots import check_matplotlib, plot_settings
from maskx.supervision import resolve_split
from maskx.torchvision.data import InstanceMapper, training_batches
from maskx.torchvision.detection import SampleDetector, detect
from maskx.torchvision.models import faster_rcnn_small, maskx_rcnn_small
from maskx.torchvision.quickstart import QuickstartOptions, load_data
from maskx.torchvision.training import TrainingSettings, select_device, train

# What each word of a method sets; those of configs/MaskX/README.md set the same there.
WORDS: Mapping[str, Mapping[str, Any]] = {
    "baseline": {"predictor": "class_agnostic"},
    "clsbox": {"predictor": "transfer", "transfer_inputs": "cls+box"},
    "cls": {"predictor": "transfer", "transfer_inputs": "cls"},
    "box": {"predictor": "transfer", "transfer_inputs": "box"},
    "randn": {"predictor": "transfer", "transfer_inputs": "randn"},
    "1_layer": {"transfer_layers": 1},
    "2_layer": {"transfer_layers": 2},
    "3_layer": {"transfer_layers": 3},
    "relu": {"transfer_activation": "relu"},
    "nostopgrad": {"stop_gradient": False},
    "mlp": {"mlp": "single_fc"},
    "bottleneck": {"mlp": "bottleneck"},
    "gtboxes": {"gt_boxes_only": True},
    "residual": {"trunk": "residual", "num_convs": 4},
    "hourglass": {"trunk": "hourglass", "num_convs": 2},
}

# The rows of the paper's tables 3.1 to 3.4, then the gains of later papers one by one.
PAPER_SETTINGS = (
    *("sw/baseline", "sw/randn_2_layer", "sw/cls_2_layer", "sw/box_2_layer", "sw/clsbox_2_layer"),
    *("sw/clsbox_1_layer", "sw/clsbox_2_layer_relu", "sw/clsbox_3_layer_relu", "sw/clsbox_3_layer"),
    *("sw/baseline_mlp", "sw/clsbox_2_layer_mlp"),
    *("sw/clsbox_2_layer_gtboxes", "sw/clsbox_2_layer_residual", "sw/clsbox_2_layer_hourglass"),
    "sw/clsbox_2_layer_hourglass_gtboxes",
    *("e2e/baseline", "e2e/clsbox_2_layer_nostopgrad", "e2e/clsbox_2_layer"),
)

_LEARNING_RATE_PER_IMAGE = 0.00375  # as in the quick start
_RESULT = "result.json"


@dataclass(frozen=True)
class StudyOptions:
    """Options of a study.

    Attributes:
        output: folder of all runs; a run whose result lies there is not made again.
        settings: what to compare.
        seeds: of scenes, initial weights and data order; every setting runs with each.
        iterations: steps of a detector, and of a model that trains end to end.
        stage2_iterations: steps of a mask branch on a frozen detector.
        batch_size: images per step.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    output: Path
    settings: Sequence[str] = PAPER_SETTINGS
    seeds: Sequence[int] = (0, 1, 2)
    iterations: int = 1200
    stage2_iterations: int = 600
    batch_size: int = 8
    device: str = "auto"


def mask_branch(setting: str) -> dict[str, Any]:
    """Decode a setting into arguments of :func:`maskx.torchvision.models.add_mask_branch`.

    Raises:
        ValueError: it is not of the form TRAINING/METHOD, a word is not known or contradicts
            another, or none says what predicts the masks.
    """
    training, _, method = setting.partition("/")
    known = "|".join(sorted(WORDS, key=len, reverse=True))
    if training not in ("sw", "e2e") or not re.fullmatch(rf"({known})(_({known}))*", method):
        raise ValueError(
            f"Setting '{setting}' is not known. Allowed: sw/METHOD or e2e/METHOD, with METHOD of "
            f"the words {', '.join(WORDS)}, joined by '_'."
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


def run_study(options: StudyOptions, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train and evaluate every setting with every seed; an interrupted study goes on.

    Args:
        options: what to do.
        report: receives the lines for the reader.

    Returns:
        One row per setting, in order: ``setting``, and by seed ``mask_AP_A``, ``mask_AP_B``,
        ``box_AP_A`` and ``box_AP_B`` in percent. They are written to ``study.json`` as well.

    Raises:
        ValueError: a setting is not known, a seed stands twice, or a folder holds a run with other
            options.
        ImportError: matplotlib is not installed, which the picture needs.
    """
    check_matplotlib()
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"A seed stands twice in {list(options.seeds)}. Name each once.")
    branches = {setting: mask_branch(setting) for setting in options.settings}
    rows: dict[str, dict[str, Any]] = {s: {"setting": s} for s in options.settings}
    for seed in options.seeds:
        runs = _SeedRuns(options, seed)
        for setting, branch in branches.items():
            result = runs.run(setting, branch)
            for name, value in result.items():
                rows[setting].setdefault(name, []).append(value)
        report(f"seed {seed}: {len(branches)} settings done")
    study = {"seeds": list(options.seeds), "rows": list(rows.values())}
    write_json(options.output / "study.json", study)
    report(format_study(study["rows"]))
    plot_settings(
        options.output / "study.png",
        {row["setting"]: row["mask_AP_B"] for row in study["rows"]},
        label="Mask AP on B (percent)",
    )
    return study["rows"]


def format_study(rows: Sequence[Mapping[str, Any]]) -> str:
    """Make a Markdown table: means over the seeds, for mask AP on B with the range."""
    lines = [
        "| setting | mask AP, B | lowest to highest | mask AP, A | box AP, B | box AP, A |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        b = row["mask_AP_B"]
        others = [f"{statistics.mean(row[n]):.1f}" for n in ("mask_AP_A", "box_AP_B", "box_AP_A")]
        cells = [
            f"`{row['setting']}`",
            f"{statistics.mean(b):.1f}",
            f"{min(b):.1f} to {max(b):.1f}",
        ]
        lines.append(f"| {' | '.join([*cells, *others])} |")
    return "\n".join(lines)


class _SeedRuns:
    """All runs of one seed; they share the scenes and the detector of the first stage."""

    def __init__(self, options: StudyOptions, seed: int) -> None:
        self.options, self.seed = options, seed
        self.folder = options.output / f"seed_{seed}"
        self.device = select_device(options.device)
        quickstart = QuickstartOptions(output=self.folder, seed=seed)
        self.train_data, self.val_data = load_data(quickstart)
        self.split = resolve_split("scenes_half", self.train_data.class_names)
        self.num_classes = len(self.train_data.class_names) + 1

    def run(self, setting: str, branch: dict[str, Any]) -> dict[str, float]:
        """Train and evaluate one setting, unless its result is there."""
        folder = self.folder / setting
        iterations = (
            self.options.stage2_iterations if branch["freeze_detector"] else self.options.iterations
        )
        run = {"iterations": iterations, "batch_size": self.options.batch_size}
        if branch["freeze_detector"]:
            run["detector_iterations"] = self.options.iterations
        path = folder / _RESULT
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["run"] != run:
                raise ValueError(
                    f"'{path}' was made with {content['run']}, now {run} is asked for. Give the "
                    "same options, or another --output."
                )
            return content["result"]
        torch.manual_seed(self.seed)
        model = SampleDetector(maskx_rcnn_small(self.num_classes, **branch))
        if branch["freeze_detector"]:
            self._load_detector(model)
        self._train(model, folder, iterations, setting)
        result = self._evaluate(model, setting)
        write_json(path, {"run": run, "result": result})
        return result

    def _load_detector(self, model: SampleDetector) -> None:
        """Give a model the detector of the first stage, which is trained when first needed."""
        torch.manual_seed(self.seed)
        detector = SampleDetector(faster_rcnn_small(self.num_classes))
        folder = self.folder / "stage1"
        self._train(detector, folder, self.options.iterations, "stage1")
        detector.to("cpu")
        missing, unexpected = model.load_state_dict(detector.state_dict(), strict=False)
        outside = [name for name in missing if not name.startswith("detector.roi_heads.mask_head.")]
        assert not outside, outside
        assert not unexpected, unexpected

    def _train(
        self, model: SampleDetector, folder: Path, iterations: int, description: str
    ) -> None:
        settings = TrainingSettings(
            iterations=iterations,
            batch_size=self.options.batch_size,
            learning_rate=_LEARNING_RATE_PER_IMAGE * self.options.batch_size,
            seed=self.seed,
            checkpoint_every=max(100, iterations // 10),
        )
        batches = functools.partial(
            training_batches,
            self.train_data.records,
            InstanceMapper(self.split.indices_with_masks),
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
            data.json_file, detections, category_ids=data.category_ids, groups=self.split.groups()
        )
        return {
            f"{name}_AP_{group}": round(results[task][group]["AP"], 4)
            for name, task in (("mask", "segm"), ("box", "bbox"))
            for group in ("A", "B")
        }
