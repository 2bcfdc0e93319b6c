"""What the ablations of all systems share: settings x seeds, one result file each, tables.

Every result lies in ``OUTPUT/seed_S/SETTING/result.json``, with the options it was made with.
Several processes may work on one OUTPUT: a result, and what the results of a seed share, is made by
one of them while the others wait or do something else.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from filelock import FileLock, Timeout

from maskx.core.files import write_json, written_whole
from maskx.engine.options import check_frozen
from maskx.evaluation.plots import plot_settings
from studies.options import OWN_OPTIONS, StudyOptions
from studies.picture import PICTURE_NAME, Shown, draw_row, write_sheet

__all__ = [
    "Measure",
    "Ordering",
    "Study",
    "check_orderings",
    "format_orderings",
    "format_study",
    "make_study",
    "process_lock",
]

_RESULT = "result.json"
_RESULT_KEYS = {"run", "result"}

Report = Callable[[str], None]
Row = Mapping[str, Any]


class Measure(NamedTuple):
    """How a measure is shown."""

    title: str
    decimals: int = 1


class Ordering(NamedTuple):
    """One value that should be above another.

    Attributes:
        name: in words.
        better: setting and measure.
        worse: setting and measure, or a number.
    """

    name: str
    better: tuple[str, str]
    worse: tuple[str, str] | float


class SeedRuns(Protocol):
    """All runs of one seed and what they share.

    Attributes:
        shown: what the setting that ran last is drawn with; None where it made no model of masks.
    """

    shown: Shown | None

    def run(self, setting: str) -> dict[str, float]:
        """Train and evaluate a setting; go on with it if it was interrupted."""
        ...


@dataclass(frozen=True)
class Study:
    """What a system can compare.

    Attributes:
        settings: those of a study that names none.
        measures: all that a setting may have, in the order of the table. Settings that have the
            same first one share a table, which shows the range of that one.
        plotted: the measures in the picture.
        plot_label: what they are, with their unit.
        orderings: what the paper says of the measures.
        describe: returns what else the result of a setting depends on, as JSON can hold it; raises
            ValueError for a setting that is not known, and ImportError for one that needs a package
            that is not installed.
        open_seed: starts the runs of a seed.
        takes: names of the options that have a meaning for this system alone.
        of_options: returns fields that are others with these options, such as the measures of a
            backbone with other layers.
    """

    settings: Sequence[str]
    measures: Mapping[str, Measure]
    plotted: Sequence[str]
    plot_label: str
    orderings: Sequence[Ordering]
    describe: Callable[[StudyOptions, str], dict[str, Any]]
    open_seed: Callable[[StudyOptions, int, Report], SeedRuns]
    takes: frozenset[str] = frozenset()
    of_options: Callable[[StudyOptions], dict[str, Any]] = lambda options: {}


def make_study(system: Study, options: StudyOptions, report: Report) -> list[dict[str, Any]]:
    """Make the results that are missing, then tables, ``study.json`` and pictures.

    ``study.png`` has the measures, ``contact_sheet.png`` what models of the first seed predict.

    Args:
        system: what to compare.
        options: what to do.
        report: receives the lines for the reader.

    Returns:
        One row per setting, in order: ``setting``, and each of its measures by seed; None where it
        is not a number.

    Raises:
        ImportError: a setting that is named needs a package that is not installed.
        ValueError: a setting is not known, a seed stands twice, or a result or the study in the
            folder was made with other options.
    """
    for name in sorted(OWN_OPTIONS - system.takes):
        if getattr(options, name) != getattr(StudyOptions, name):
            raise ValueError(
                f"{name} has no meaning for a study of {options.system}. Leave it out."
            )
    _check_numbers(options)
    check_frozen(options.quickstart(seed=0))
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"A seed stands twice in {list(options.seeds)}. Name each once.")
    system = replace(system, **system.of_options(options))
    runs = _describe(system, options, report)
    study_json = options.output / "study.json"
    _check_system(study_json, options.system)
    results = _Results(system, options, runs, report).make()

    rows = []
    for setting in runs:
        of_seeds = [results[seed, setting] for seed in options.seeds]
        values = {name: [result[name] for result in of_seeds] for name in of_seeds[0]}
        rows.append({"setting": setting, **values})
    orderings = check_orderings(system.orderings, rows)
    study = {"system": options.system, "seeds": list(options.seeds), "rows": rows}
    study["orderings"] = orderings
    write_json(study_json, study)
    report("\n" + format_study(system.measures, rows))
    if orderings:
        report("\n" + format_orderings(system.measures, orderings))
    plotted = {
        (row["setting"], system.measures[name].title): _numbers(row, name)
        for row in rows
        for name in system.plotted
        if name in row
    }
    if plotted:
        label = system.plot_label
        # Where there is one measure, the label says what it is.
        parts = 1 if len(system.plotted) == 1 else 2
        named = {", ".join(key[:parts]): values for key, values in plotted.items()}
        with written_whole(options.output / "study.png") as scratch:
            plot_settings(scratch, named, label=label)
    write_sheet(options.seed_folder(options.seeds[0]), list(runs), options.output / PICTURE_NAME)
    return rows


def _check_numbers(options: StudyOptions) -> None:
    """Refuse now what would be refused after hours, once its stage begins."""
    for name in ("iterations", "stage2_iterations", "batch_size", "image_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}. Allowed: a whole number of at least 1.")
    if bad := [seed for seed in options.seeds if not 0 < seed + 1 < 2**31]:
        raise ValueError(f"seeds has {bad[0]}. Allowed: whole numbers from 0 to {2**31 - 2}.")


def check_orderings(orderings: Sequence[Ordering], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Say which orderings hold in the mean over the seeds, and in how many of the seeds.

    Args:
        orderings: those of settings that have no row are left out.
        rows: of :func:`make_study`.

    Returns:
        Of each ordering ``ordering``, its name; ``measure``, that of the better side; ``better``
        and ``worse``, the means, None if not a number; ``seeds_held`` of ``seeds``; and ``held``,
        whether the first mean is above.
    """
    by_setting = {row["setting"]: row for row in rows}
    checked = []
    for name, better, worse in orderings:
        sides = [better] if isinstance(worse, float) else [better, worse]
        if not all(measure in by_setting.get(setting, ()) for setting, measure in sides):
            continue
        values = _numbers(by_setting[better[0]], better[1])
        others = [worse] * len(values)
        if not isinstance(worse, float):
            others = _numbers(by_setting[worse[0]], worse[1])
        means = statistics.mean(values), statistics.mean(others)
        checked.append(
            {
                "ordering": name,
                "measure": better[1],
                "better": _or_none(means[0]),
                "worse": _or_none(means[1]),
                "seeds_held": sum(a > b for a, b in zip(values, others, strict=True)),
                "seeds": len(values),
                "held": means[0] > means[1],
            }
        )
    return checked


def format_orderings(
    measures: Mapping[str, Measure], orderings: Sequence[Mapping[str, Any]]
) -> str:
    """Make a Markdown table of what :func:`check_orderings` returns."""
    lines = ["| ordering | mean | mean of the other | seeds | |", "|---|---|---|---|---|"]
    for row in orderings:
        decimals = measures[row["measure"]].decimals
        means = [_cell(row[key], decimals) for key in ("better", "worse")]
        seeds = f"{row['seeds_held']} of {row['seeds']}"
        verdict = "held" if row["held"] else "not held"
        lines.append(f"| {' | '.join([row['ordering'], *means, seeds, verdict])} |")
    return "\n".join(lines)


def format_study(measures: Mapping[str, Measure], rows: Sequence[Row]) -> str:
    """Make Markdown tables: means over the seeds, for the first measure of a table the range."""
    tables: dict[str, list[Row]] = {}
    for row in rows:
        tables.setdefault(next(name for name in measures if name in row), []).append(row)
    return "\n\n".join(_format_table(measures, main, of_table) for main, of_table in tables.items())


def _format_table(measures: Mapping[str, Measure], main: str, rows: Sequence[Row]) -> str:
    others = [name for name in measures if name != main and any(name in row for row in rows)]
    titles = [measures[main].title, "lowest to highest", *(measures[name].title for name in others)]
    lines = [f"| setting | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for row in rows:
        values, decimals = _numbers(row, main), measures[main].decimals
        mean = statistics.mean(values)
        # Of values that are not all numbers there is neither mean nor range.
        ends = [math.nan if math.isnan(mean) else value for value in (min(values), max(values))]
        cells = [f"`{row['setting']}`", _cell(mean, decimals)]
        cells.append(" to ".join(_cell(value, decimals) for value in ends))
        for name in others:
            mean = statistics.mean(_numbers(row, name)) if name in row else None
            cells.append(_cell(mean, measures[name].decimals))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def process_lock(folder: Path, timeout: float = -1) -> FileLock:
    """Return a lock that one process holds at a time, to be used in a ``with`` statement.

    It is free again when its process ends, in whatever way.

    Args:
        folder: what is made in it; it is created.
        timeout: seconds to wait; -1 is for ever.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "lock", timeout=timeout)


@dataclass
class _Results:
    """The results of all seeds and settings; ``runs`` is what each setting is made with."""

    system: Study
    options: StudyOptions
    runs: Mapping[str, dict[str, Any]]
    report: Report
    seeds: dict[int, SeedRuns] = field(default_factory=dict)

    def make(self) -> dict[tuple[int, str], dict[str, float | None]]:
        jobs = [(seed, setting) for seed in self.options.seeds for setting in self.runs]
        # All are read before one is made: other options are refused before there is work.
        found = {job: result for job in jobs if (result := self._read(*job)) is not None}
        for timeout in (0, -1):  # first what no other process is at, then wait for the others
            for job in jobs:
                if job in found:
                    continue
                try:
                    with process_lock(self._path(*job).parent, timeout):
                        found[job] = self._read(*job) or self._run(*job)
                except Timeout:
                    self.report("seed {}: {} is being made by another process".format(*job))
        return found

    def _path(self, seed: int, setting: str) -> Path:
        return self.options.seed_folder(seed) / setting / _RESULT

    def _run(self, seed: int, setting: str) -> dict[str, float | None]:
        if seed not in self.seeds:
            self.seeds[seed] = self.system.open_seed(self.options, seed, self.report)
        made = self.seeds[seed].run(setting)
        shown = self.seeds[seed].shown
        if shown is not None and seed == self.options.seeds[0]:
            draw_row(shown, self.options.system, self.options.seed_folder(seed), setting)
        result = {name: _or_none(round(value, 4)) for name, value in made.items()}
        write_json(self._path(seed, setting), {"run": self.runs[setting], "result": result})
        self.report(f"seed {seed}: {setting} done")
        return result

    def _read(self, seed: int, setting: str) -> dict[str, float | None] | None:
        path, run = self._path(seed, setting), self.runs[setting]
        if not path.is_file():
            return None
        content = _read_json(path)
        if not content.keys() >= _RESULT_KEYS:
            raise ValueError(f"'{path}' is no result of a study. Delete it to make it again.")
        if content["run"] != run:
            raise ValueError(
                f"'{path}' was made with {content['run']}, now {run} is asked for. Give the same "
                "options, or another --output."
            )
        return content["result"]


def _describe(system: Study, options: StudyOptions, report: Report) -> dict[str, dict[str, Any]]:
    if options.settings is not None:
        return {setting: system.describe(options, setting) for setting in options.settings}
    runs, left_out, reason = {}, [], ""
    for setting in system.settings:
        try:
            runs[setting] = system.describe(options, setting)
        except ImportError as error:
            left_out.append(setting)
            reason = str(error)
    if left_out:
        report(f"Left out: {', '.join(left_out)}. {reason}")
    return runs


def _check_system(study_json: Path, system: str) -> None:
    # Studies from before there was a choice are of Mask^X.
    found = _read_json(study_json).get("system", "maskx") if study_json.is_file() else system
    if found != system:
        raise ValueError(
            f"'{study_json}' is a study of {found}, not of {system}. Name another --output."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged ({error}). Delete it to make it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds no dict. Delete it to make it again.")
    return content


def _numbers(row: Row, measure: str) -> list[float]:
    return [math.nan if value is None else value for value in row[measure]]


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cell(value: float | None, decimals: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{decimals}f}"
