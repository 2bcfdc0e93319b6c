"""Ablations of TransferNet on scenes or own data; the settings are the names of its methods.

All settings of a seed share the data, the classifier with its encoder, and those of TransferNet
the first stage. A share of the source is that of the images with masks: the classifier and the
first stage, which need no masks, learn from the labels of all source images.
"""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from maskx.engine.quickstart import choose_image_size, load_split_data
from maskx.engine.runs import origins_of_data
from maskx.engine.training import select_device
from maskx.systems.transfernet.evaluation import evaluate_transfer
from maskx.systems.transfernet.pipeline import TransferChain, TransferMethod, TransferSettings
from maskx.systems.transfernet.samples import SOURCE_FRACTIONS, labelled_records, transfer_sets
from studies.options import OWN_OPTIONS, StudyOptions
from studies.picture import Shown
from studies.study import Measure, Ordering, Report, Study, process_lock

_FULL = TransferMethod()
_BASELINE, _DECOUPLED = TransferMethod("baseline"), TransferMethod("decoupled")
_RAW = TransferMethod(decoder_input="attention")
_FROZEN = TransferMethod(freeze_attention=True)
_FRACTIONS = {share: TransferMethod(source_fraction=share) for share in SOURCE_FRACTIONS}
METHODS: Mapping[str, TransferMethod] = {
    method.name: method
    for method in (_FULL, _BASELINE, _DECOUPLED, _RAW, _FROZEN, *_FRACTIONS.values())
}
"""What can be compared, by name."""

_GROUPS = ("target", "source", "all")
_LABELS = {"": "predicted labels", "_gt": "true labels"}


def _transfer_settings(options: StudyOptions, seed: int = 0) -> TransferSettings:
    names = {"iterations": "iterations", "stage2_iterations": "joint_iterations"}
    given = options.given(batch_size="batch_size", **names)
    if "joint_iterations" in given:
        given["attention_iterations"] = max(1, given["joint_iterations"] // 2)
    return TransferSettings(
        seed=seed,
        backbone=options.backbone,
        pretrained=options.pretrained,
        frozen=options.frozen,
        image_size=choose_image_size(options.quickstart(seed)),
        **given,
    )


def _describe(options: StudyOptions, setting: str) -> dict[str, Any]:
    if setting not in METHODS:
        raise ValueError(f"Setting '{setting}' is not known. Allowed: {', '.join(METHODS)}.")
    settings = asdict(_transfer_settings(options))
    run = {name: value for name, value in settings.items() if name not in ("seed", "workers")}
    return run | options.own()


class _SeedRuns:
    """All runs of one seed."""

    shown: Shown | None = None

    def __init__(self, options: StudyOptions, seed: int, report: Report) -> None:
        self.folder = options.seed_folder(seed)
        with process_lock(self.folder):
            train_data, val_data, split = load_split_data(options.quickstart(seed), style="sparse")
        records, self.val_records = (
            labelled_records(data.records, len(split.class_names))
            for data in (train_data, val_data)
        )
        sets = transfer_sets(records, split)
        report(f"seed {seed}: {sets.counted()}")
        self.groups = {
            "target": split.indices_without_masks,
            "source": split.indices_with_masks,
            "all": range(len(split.class_names)),
        }
        self.chain = TransferChain(
            sets,
            split,
            _transfer_settings(options, seed),
            output=self.folder,
            resume=True,
            started_from=origins_of_data(train_data, self.folder / "run"),
            device=select_device(options.device),
        )

    def run(self, setting: str) -> dict[str, float]:
        method = METHODS[setting]
        with process_lock(self.folder):
            _ = self.chain.classifier
            if method.method == _FULL.method:
                _ = self.chain.attention  # the first stage, trained once
        model = self.chain.train_masks(method)
        split = self.chain.split
        self.shown = Shown(model, self.val_records, split.class_names, split)
        result = {}
        for suffix in _LABELS:
            found = evaluate_transfer(
                model,
                self.val_records,
                self.groups,
                gt_labels=bool(suffix),
                description=f"{setting}: {_LABELS[suffix]}",
            )
            result |= {f"{group}{suffix}": found["mIoU"][group] for group in _GROUPS}
        if "attention_entropy" in found:
            result["attention_entropy"] = found["attention_entropy"]
        return result


def _orderings() -> list[Ordering]:
    pairs = [
        ("TransferNet above BaselineNet", _FULL, _BASELINE),
        ("BaselineNet above DecoupledNet", _BASELINE, _DECOUPLED),
        ("densified above raw attention", _FULL, _RAW),
        ("joint above frozen attention", _FULL, _FROZEN),
        *(
            (f"{more:.0%} above {fewer:.0%} of the source", _FRACTIONS[more], _FRACTIONS[fewer])
            for more, fewer in pairwise(SOURCE_FRACTIONS)
        ),
    ]
    name = _FULL.name
    return [
        Ordering("TransferNet: true above predicted labels", (name, "target_gt"), (name, "target")),
        *(
            Ordering(
                f"{words}, {of_labels}",
                (better.name, f"target{suffix}"),
                (worse.name, f"target{suffix}"),
            )
            for words, better, worse in pairs
            for suffix, of_labels in _LABELS.items()
        ),
    ]


STUDY = Study(
    settings=tuple(METHODS),
    measures={
        **{
            f"{group}{suffix}": Measure(f"{group}, {of_labels}")
            for suffix, of_labels in _LABELS.items()
            for group in _GROUPS
        },
        "attention_entropy": Measure("attention entropy", 2),
    },
    plotted=("target", "target_gt"),
    plot_label="mIoU of target categories (percent)",
    orderings=_orderings(),
    describe=_describe,
    open_seed=_SeedRuns,
    takes=OWN_OPTIONS - {"light", "vectors"},
)
"""TransferNet; the orderings are of target categories."""
