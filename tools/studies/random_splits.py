"""The random-split protocol: what weight transfer gains on B, for many choices of A (Figure 3.1).

For each category split the class-agnostic baseline and weight transfer train as second stages on
one detector. Results lie in ``OUTPUT/<split>/<method>/result.json``, one per finished run.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog
from tqdm import tqdm

from maskx.core.files import write_json
from maskx.data.splits import split_names
from maskx.detectron2.datasets import split_from_config
from maskx.detectron2.runs import FREE_KEYS
from maskx.detectron2.stagewise import (
    Stage,
    check_stages,
    run_stage,
    stage_is_finished,
)
from maskx.engine.runs import Run, settings_difference
from maskx.evaluation.plots import plot_relative_gains

__all__ = [
    "BASELINE",
    "PAPER_SPLITS",
    "TRANSFER",
    "RandomSplits",
    "count_masks",
    "format_gains",
    "read_results",
    "relative_gains",
    "write_summary",
]

BASELINE, TRANSFER = "baseline", "transfer"

PAPER_SPLITS = tuple(name for name in split_names() if name.startswith("coco_random_"))

_RESULT = "result.json"


class RandomSplits:
    """All runs of the protocol.

    Args:
        splits: names or files; see :func:`maskx.data.splits.resolve_split`.
        configs: config files of the two methods, by ``BASELINE`` and ``TRANSFER``.
        detector: the first stage, or the weights of a trained detector.
        output: folder of the runs.
        opts: KEY VALUE pairs for all second stages.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: something does not fit, or the folder holds runs of another configuration.
    """

    def __init__(
        self,
        splits: Sequence[str],
        *,
        configs: Mapping[str, Path],
        detector: Stage | Path,
        output: Path,
        opts: Sequence[Any] = (),
    ) -> None:
        self._detector = detector
        weights = detector.final_weights if isinstance(detector, Stage) else detector
        folders = Counter(_folder_name(split) for split in splits)
        twice = [name for name, count in folders.items() if count > 1]
        if twice:
            raise ValueError(
                f"--splits has {folders[twice[0]]} splits '{twice[0]}', whose runs would share one "
                "folder. Name each split once, and files differently."
            )
        if "DATASETS.MASKX.SPLIT" in opts[::2]:
            raise ValueError("DATASETS.MASKX.SPLIT is set for each run. Use --splits instead.")
        self.runs = {
            (_folder_name(split), method): Stage(
                config_file,
                output / _folder_name(split) / method,
                (*opts, "DATASETS.MASKX.SPLIT", _absolute(split)),
                weights,
            )
            for split in splits
            for method, config_file in configs.items()
        }
        self._check()

    def run(self, *, num_gpus: int = 1, report: Callable[[str], None] = print) -> None:
        """Make the runs that have no result yet, one after the other.

        Args:
            num_gpus: processes of each run, one per GPU.
            report: told what happens, in sentences.
        """
        pending = {
            name: run for name, run in self.runs.items() if not (run.output / _RESULT).exists()
        }
        report(f"{len(self.runs) - len(pending)} of {len(self.runs)} runs have a result.")
        if not pending:
            return
        if isinstance(self._detector, Stage):
            run_stage(self._detector, num_gpus=num_gpus)
        cfg = next(iter(pending.values())).cfg
        masks = count_masks(cfg.DATASETS.TRAIN, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        bar = tqdm(total=len(self.runs), initial=len(self.runs) - len(pending), unit="run")
        with bar:
            for (split, method), run in pending.items():
                bar.set_description(f"{split} {method}")
                try:
                    record = run_stage(run, num_gpus=num_gpus)
                except BaseException:
                    report(f"Stopped in the run {split} {method}. The same command goes on there.")
                    raise
                write_json(run.output / _RESULT, _make_result(run, split, method, record, masks))
                bar.update()

    def _check(self) -> None:
        """Check all runs before the first, with as much as can be known then."""
        split, _ = next(iter(self.runs))  # but for the split, the runs of a method are alike
        baseline, transfer = (self.runs[split, method] for method in (BASELINE, TRANSFER))
        for run in (baseline, transfer):
            check_stages(self._detector, run)
            if len(run.cfg.DATASETS.TEST) != 1:
                raise ValueError(
                    f"DATASETS.TEST is {run.cfg.DATASETS.TEST} in {run.config_file}. Name one "
                    "data set, on which the methods are compared."
                )
        for key in ("TRAIN", "TEST"):
            names, others = (run.cfg.DATASETS[key] for run in (baseline, transfer))
            if names != others:
                raise ValueError(
                    f"DATASETS.{key} is {names} in {baseline.config_file}, but {others} in "
                    f"{transfer.config_file}: the methods could not be compared. Set it alike in "
                    "both."
                )
        for run in self.runs.values():
            split = split_from_config(run.cfg)
            if not split.without_masks:
                raise ValueError(
                    f"Category split '{split.name}' leaves no category without masks, so there is "
                    "no AP on B. Leave it out of --splits."
                )
            stage_is_finished(run)  # refuses a folder with another run
        if isinstance(self._detector, Stage):
            stage_is_finished(self._detector)


def count_masks(dataset_names: Sequence[str], num_classes: int) -> list[int]:
    """Count the annotations with a mask, without crowds.

    Args:
        dataset_names: registered data sets, which are read.
        num_classes: number of their classes.

    Returns:
        Counts by class index.
    """
    counts = Counter(
        annotation["category_id"]
        for name in dataset_names
        for record in DatasetCatalog.get(name)
        for annotation in record["annotations"]
        if not annotation.get("iscrowd", 0) and annotation.get("segmentation")
    )
    return [counts[index] for index in range(num_classes)]


def read_results(output: Path) -> list[dict[str, Any]]:
    """Read the results of all runs in a folder, and check that they may be compared.

    Raises:
        ValueError: there is none, or two differ in more than the split.
    """
    paths = sorted(output.glob(f"*/*/{_RESULT}"))
    if not paths:
        raise ValueError(f"'{output}' holds no result (<split>/<method>/{_RESULT}).")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    first_of_method: dict[str, int] = {}
    for index, (path, result) in enumerate(zip(paths, results, strict=True)):
        like = first_of_method.setdefault(result["method"], index)
        configs = results[like]["config"], result["config"]
        difference = settings_difference(*configs, FREE_KEYS)
        if difference is None and results[0]["weights"] != result["weights"]:
            like = 0  # one detector for both methods
            difference = ("the content of MODEL.WEIGHTS", results[0]["weights"], result["weights"])
        if difference is not None:
            key, one, other = difference
            raise ValueError(
                f"{paths[like]} and {path} cannot be compared: {key} is {one!r} in the one, "
                f"{other!r} in the other. Keep runs of different configurations in different "
                "folders (--output)."
            )
    return results


def relative_gains(
    results: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Compare weight transfer with the baseline, split by split.

    Args:
        results: of both methods, with ``split``, ``method``, ``num_with_masks``, ``mean_masks``,
            ``AP_A`` and ``AP_B`` (percent; None where it is not known).

    Returns:
        One entry per split, with ``relative_gain``, 100 (transfer - baseline) / baseline of the
        AP on B, in percent; and why the other splits were left out, by name.
    """
    by_split: dict[str, dict[str, Mapping[str, Any]]] = {}
    for result in results:
        by_split.setdefault(result["split"], {})[result["method"]] = result
    gains, left_out = [], {}
    for split, methods in by_split.items():
        missing = [method for method in (BASELINE, TRANSFER) if method not in methods]
        if missing:
            left_out[split] = f"no result of {missing[0]}"
            continue
        baseline, transfer = methods[BASELINE], methods[TRANSFER]
        if not baseline["AP_B"] or transfer["AP_B"] is None:
            left_out[split] = (
                f"AP on B is {_number(baseline['AP_B'])} (baseline) and "
                f"{_number(transfer['AP_B'])} (transfer), of which no relative gain can be made"
            )
            continue
        gains.append(
            {
                "split": split,
                "num_with_masks": baseline["num_with_masks"],
                "mean_masks": baseline["mean_masks"],
                **{
                    f"{method}_{metric}": methods[method][metric]
                    for metric in ("AP_B", "AP_A")
                    for method in (BASELINE, TRANSFER)
                },
                "relative_gain": 100 * (transfer["AP_B"] - baseline["AP_B"]) / baseline["AP_B"],
            }
        )
    return sorted(gains, key=lambda g: (g["num_with_masks"], g["split"])), left_out


def format_gains(gains: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]) -> str:
    """Make a table of :func:`relative_gains`."""
    width = max([5, *(len(gain["split"]) for gain in gains)])
    lines = [
        f"{'':{width}} {'':>4} {'masks per':>11} {'mask AP on B':>21} {'mask AP on A':>20}"
        f" {'gain on B':>11}",
        f"{'split':{width}} {'|A|':>4} {'class of A':>11} {'baseline':>10} {'transfer':>10}"
        f" {'baseline':>9} {'transfer':>10} {'%':>11}",
    ]
    for gain in gains:
        lines.append(
            f"{gain['split']:{width}} {gain['num_with_masks']:>4} {gain['mean_masks']:>11,.1f}"
            f" {_number(gain['baseline_AP_B']):>10} {_number(gain['transfer_AP_B']):>10}"
            f" {_number(gain['baseline_AP_A']):>9} {_number(gain['transfer_AP_A']):>10}"
            f" {gain['relative_gain']:>+11.1f}"
        )
    return "\n".join([*lines, *(f"left out: {s}: {why}" for s, why in left_out.items())])


def write_summary(output: Path) -> str:
    """Write ``random_splits.json`` and ``random_splits.png`` of all results in a folder.

    Returns:
        The table. Without any gain that could be drawn there is no figure, and it says so.
    """
    gains, left_out = relative_gains(read_results(output))
    write_json(output / "random_splits.json", {"gains": gains, "left_out": left_out})
    table = format_gains(gains, left_out)
    figure = output / "random_splits.png"
    if not gains:
        figure.unlink(missing_ok=True)
        return f"{table}\nno figure: no split has a relative gain"
    plot_relative_gains(
        figure,
        mean_masks=[gain["mean_masks"] for gain in gains],
        relative_gains=[gain["relative_gain"] for gain in gains],
        num_with_masks=[gain["num_with_masks"] for gain in gains],
    )
    return f"{table}\nfigure: {figure}"


def _make_result(
    run: Stage, split: str, method: str, record: Run, masks: Sequence[int]
) -> dict[str, Any]:
    with_masks = split_from_config(run.cfg).indices_with_masks
    return {
        "split": split,
        "method": method,
        "num_with_masks": len(with_masks),
        "mean_masks": sum(masks[index] for index in with_masks) / len(with_masks),
        "AP_A": record.results["segm_A/AP"],
        "AP_B": record.results["segm_B/AP"],
        "seconds": record.seconds,
        "classes_with_masks": list(record.split.with_masks),
        "weights": record.started_from["MODEL.WEIGHTS"].sha256,
        "config": record.settings,
    }


def _folder_name(split: str) -> str:
    """Name of a split: of a file without its folder and extension."""
    return Path(split).stem


def _absolute(split: str) -> str:
    """Path of a split file wherever the run is started; a named split as it is."""
    return os.path.abspath(split) if Path(split).is_file() else split


def _number(ap: float | None) -> str:
    return "NaN" if ap is None else f"{ap:.1f}"
