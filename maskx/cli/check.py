r"""Check annotations: what is there, what is wrong, and which system learns from it.

All problems are found at once. The exit status is 0 if there are none, else 1. Give the folder of
the images to look at their files too.

Examples:
    maskx check annotations.json
    maskx check annotations.json images --html check.html
    maskx check annotations.json images --split with_masks.txt
"""

import argparse
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a help text waits for none of these
    from maskx.data.coco_structure import Finding, Report
    from maskx.data.overview import Overview
    from maskx.engine.system import System

_MAX_CATEGORIES = 60  # in the text; the page has all
_HEAD = ("category", "images", "boxes", "masks", "tags")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="annotation file or folder")
    add("images", metavar="IMAGES", type=Path, nargs="?", help="folder of the images")
    add("--html", metavar="FILE", type=Path, help="write a page with sample pictures too")
    add(
        "--split",
        metavar="FILE",
        type=Path,
        help="write the names of the categories with masks, as --masks-for takes them",
    )
    add("--overwrite", action="store_true", help="replace files that exist")


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if there are problems."""
    from maskx.core.files import written_text
    from maskx.core.text import listed
    from maskx.data.formats.table import check_annotations
    from maskx.data.overview import overview_of

    for path in (args.html, args.split):
        if path is not None and path.exists() and not args.overwrite:
            raise FileExistsError(f"{path} exists. Name another file, or add --overwrite.")
    data, report, args.images = check_annotations(args.data, args.images)
    overview = None if data is None else overview_of(data.records, data.class_names)
    unused = [c.name for c in overview.categories if not c.images + c.tags] if overview else []
    if unused and len(unused) < len(overview.categories):
        report.warn("categories_unused", f"{len(unused)} categories are nowhere: {listed(unused)}")
    pictures = []
    if args.html and data is not None and args.images is not None:
        from maskx.evaluation.samples import sample_pictures

        pictures = list(sample_pictures(data, report))
    advice = [] if overview is None else _advice(args, overview, report)
    print(_as_text(args, overview, report, advice))
    if args.html:
        with written_text(args.html) as file:
            file.write(_as_html(args, overview, report, advice, pictures))
        print(f"Wrote {args.html}")
    if args.split and overview is not None:
        with written_text(args.split) as file:
            file.writelines(f"{c.name}\n" for c in overview.categories if c.has_pixels)
        print(f"Wrote {args.split}")
    return int(bool(report.problems))


def _advice(
    args: argparse.Namespace, overview: "Overview", report: "Report"
) -> list[tuple[str, str]]:
    """Say what kind of data it is and what comes next, as (tag, text)."""
    from maskx.data.overview import KINDS
    from maskx.engine.system import find_system, system_names

    lost = _lost(overview, report)
    if lost:
        return [("p", lost), ("p", "Correct them, and check again; nothing learns from the rest.")]
    kind = overview.kind
    systems = [s for s in map(find_system, system_names()) if kind in s.learns_from]
    lines = [("p", f"{KINDS[kind][0].upper()}{KINDS[kind][1:]}.")]
    if systems:
        titles = " or ".join(system.title for system in systems)
        lines.append(("p", f"{titles} ({', '.join(s.name for s in systems)}) learns from that."))
    elif kind == "boxes":
        lines.append(
            (
                "p",
                "Draw masks of some categories and train, or let GrabCut draw all in their boxes.",
            )
        )
    elif kind == "nothing":
        lines.append(("p", "Draw masks for a few categories, boxes or tags for the others."))
    refused = [k for k, finding in report.findings.items() if finding.done["refused"]]
    if refused:
        lines.append(("p", f"Correct first what no option passes over: {', '.join(refused)}."))
    elif systems:
        lines.append(("pre", _command(args, overview, systems[0], skip_bad=bool(report.problems))))
    elif kind == "boxes":
        lines.append(("pre", _completion(args, skip_bad=bool(report.problems))))
    return lines


def _lost(overview: "Overview", report: "Report") -> str:
    """Say which labels are gone once what is bad is left out; "" where some of each are left."""
    done = sum((finding.done for finding in report.findings.values()), Counter())
    boxes = sum(f.done["left out"] for k, f in report.findings.items() if k.startswith("box_"))
    if boxes and not any(c.boxes + c.crowds for c in overview.categories):
        return f"All {boxes} objects are bad: without them tags are left at most."
    if done["without their mask"] and not any(c.has_pixels for c in overview.categories):
        return "All masks are bad: without them boxes and tags are left at most."
    return ""


def _completion(args: argparse.Namespace, *, skip_bad: bool) -> str:
    """Return the commands that draw masks in boxes, which take COCO files."""
    from maskx.data.formats.table import find_format

    skip, lines = ["--skip-bad"] * skip_bad, []
    data, images = str(args.data), str(args.images or "IMAGES")
    if find_format(data) != "coco":
        words = ["maskx", "export", data, images, "--format", "coco", "--output", "coco", *skip]
        lines.append(shlex.join(words))
        data = "coco/annotations.json"
    words = ["maskx", "complete", data, images, "--teacher", "grabcut"]
    lines.append(shlex.join([*words, "--output", "completed.json", *skip]))
    return "\n".join(lines)


def _command(
    args: argparse.Namespace, overview: "Overview", system: "System", *, skip_bad: bool
) -> str:
    data = [str(args.data), str(args.images or "IMAGES")]
    words = ["maskx", "train", "--system", system.name]
    lines = []
    if "masks_for" in system.options and overview.kind not in ("boxes_and_masks", "masks"):
        split = args.split or Path("with_masks.txt")
        if args.split is None:
            lines.append(shlex.join(["maskx", "check", str(args.data), "--split", str(split)]))
        words += ["--masks-for", str(split)]
    words += ["--coco-train", *data, "--coco-val", "VALIDATION.json", "VALIDATION_IMAGES"]
    words += ["--skip-bad"] * skip_bad
    return "\n".join([*lines, shlex.join(words)])


def _rows(overview: "Overview") -> list[tuple[Any, ...]]:
    return [(c.name, c.images, c.boxes, c.masks, c.tags) for c in overview.categories]


def _summary(overview: "Overview") -> str:
    categories = overview.categories
    boxes, masks = sum(c.boxes for c in categories), sum(c.masks for c in categories)
    parts = [f"{overview.num_images} images", f"{len(categories)} categories"]
    parts += [f"{boxes} objects, {masks} of them with a mask"]
    extra = {
        "crowd regions": sum(c.crowds for c in categories),
        "tags of images without such an object": sum(c.tags for c in categories),
        "label maps": overview.num_label_maps,
        "images without any label": overview.num_unlabelled,
    }
    return ", ".join(parts + [f"{count} {what}" for what, count in extra.items() if count])


def _findings(report: "Report", level: str) -> list[tuple[str, "Finding"]]:
    found = [item for item in report.findings.items() if item[1].level == level]
    return sorted(found, key=lambda item: -item[1].count)


def _remedy(finding: "Finding") -> str:
    passed = {k: n for k, n in finding.done.items() if k != "refused"}
    done = ", ".join(f"{number} {what}" for what, number in passed.items())
    return finding.remedy + "." + (f" Else, with --skip-bad: {done}." if done else "")


def _as_text(
    args: argparse.Namespace,
    overview: "Overview | None",
    report: "Report",
    advice: list[tuple[str, str]],
) -> str:
    lines = [f"{args.data}: " + ("not readable" if overview is None else _summary(overview))]
    if overview is not None:
        rows = _rows(overview)
        shown = [_HEAD, *rows[:_MAX_CATEGORIES]]
        width = max(len(str(row[0])) for row in shown)
        lines.append("")
        for name, *numbers in shown:
            lines.append(f"  {name:<{width}}" + "".join(f"{number:>9}" for number in numbers))
        if len(rows) > _MAX_CATEGORIES:
            lines.append(f"  and {len(rows) - _MAX_CATEGORIES} more (--html has all)")
    problems = _findings(report, "problem")
    lines += ["", f"Problems: {sum(f.count for _, f in problems)}" if problems else "No problems."]
    for kind, finding in problems:
        lines.append(f"  {kind}: {finding.count}")
        lines += [f"    {example}" for example in finding.examples]
        if finding.count > len(finding.examples):
            lines.append(f"    and {finding.count - len(finding.examples)} more")
        lines.append(f"    -> {_remedy(finding)}")
    for title, level in (("Warnings:", "warning"), ("Read as it is meant:", "note")):
        found = _findings(report, level)
        lines += ["", title] if found else []
        for kind, finding in found:
            text = finding.examples[0]
            lines.append(
                f"  {text}" if level == "warning" else f"  {finding.count} x {kind}: {text}"
            )
    if args.images is None:
        lines += ["", "The image files were not looked at: give their folder too."]
    for tag, text in advice:
        lines += ["", *(f"  {line}" if tag == "pre" else line for line in text.splitlines())]
    return "\n".join(lines)


def _as_html(
    args: argparse.Namespace,
    overview: "Overview | None",
    report: "Report",
    advice: list[tuple[str, str]],
    pictures: list[str],
) -> str:
    from maskx.evaluation.html import bullets, page, paragraph, table

    parts = [paragraph("Not readable." if overview is None else f"{_summary(overview)}.")]
    parts += [paragraph(text, tag) for tag, text in advice]
    for title, level in (
        ("Problems", "problem"),
        ("Warnings", "warning"),
        ("Read as it is meant", "note"),
    ):
        found = _findings(report, level)
        if level == "problem" or found:
            parts.append(paragraph(title, "h2"))
        if level == "problem" and not found:
            parts.append(paragraph("None."))
        for kind, finding in found:
            parts.append(paragraph(f"{kind}: {finding.count}", "h3"))
            more = finding.count - len(finding.examples)
            parts.append(bullets([*finding.examples, *[f"and {more} more"] * (more > 0)]))
            parts += [paragraph(_remedy(finding))] * (level == "problem")
    if overview is not None:
        parts += [paragraph("Categories", "h2"), table(_HEAD, _rows(overview))]
    if pictures:
        parts += [paragraph("Samples", "h2")]
        parts += [paragraph("Green: the object has a mask. Red: a box alone."), *pictures]
    return page(f"{args.data}: annotations", parts)
