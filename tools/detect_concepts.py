r"""Measure a detector as ConceptMask is measured: Mask-RCNN* of its Table 2.

Mask-RCNN* has the boxes of all concepts and masks of some, whose mask branch is class-agnostic, so
that every box gets a mask. The mask of a concept is the union of those that it finds of it, or its
surest one where none is sure. Such a detector is the folder `class_agnostic` of a run of Mask^X on
COCO files with --compare, or a run of its `baseline` configs in Detectron2.

Example:
    python tools/quickstart.py --compare --masks-for masked.txt --output output/detector \
        --coco-train boxes.json images --coco-val held_out.json held_out
    python tools/detect_concepts.py output/detector/class_agnostic held_out.json held_out \
        --concept-split split.json
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from maskx.core.command_line import ended_in_one_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", help="folder of a run with boxes and masks, of either host")
    add("json", help="COCO-format file with masks of concepts")
    add("images", help="folder of its images")
    add("--concept-split", required=True, metavar="JSON", help="what has boxes and masks")
    add("--score", type=float, default=0.5, help="above which a find is sure (default: 0.5)")
    add("--skip-bad", action="store_true", help="leave bad annotations out, counted")
    return parser.parse_args()


def measure_detections(
    predict: Callable[[str], Any],
    records: Sequence[dict[str, Any]],
    class_names: Sequence[str],
    split: Any,
    *,
    found_names: Sequence[str],
    score: float = 0.5,
) -> tuple[dict[str, Any], list[str]]:
    """Measure the unions of what is found of each concept in the images that show it.

    Args:
        predict: makes a :class:`maskx.engine.results.Prediction` of an image file.
        class_names: by class index of the records.
        split: a :class:`maskx.systems.concept_mask.concept_sets.ConceptSplit`.
        found_names: classes of the detector.

    Returns:
        What :meth:`maskx.systems.concept_mask.evaluation.ConceptScores.evaluate` returns, and the
        concepts that the detector does not know, which are not measured.
    """
    import numpy as np

    from maskx.core.word_table import spelled
    from maskx.systems.concept_mask.evaluation import ConceptScores, concept_truths

    row = {name: index for index, name in enumerate(split.vocabulary)}
    names = [spelled(name) for name in class_names]
    known = set(map(spelled, found_names)) & set(names)
    measured = sorted(known)
    scores = ConceptScores(measured, [split.level_of(row.get(name, -1)) for name in measured])
    for record in records:
        truths = {names[c]: truth for c, truth in concept_truths(record, len(names))}
        truths = {name: truth for name, truth in truths.items() if name in known}
        if not truths:
            continue
        found = predict(record["file_name"])
        of_instances = [spelled(name) for name in found.names]
        for name, truth in truths.items():
            mask = np.zeros(truth.shape, bool)
            rows = [i for i, each in enumerate(of_instances) if each == name]
            sure = [i for i in rows if found.scores[i] >= score]
            for index in sure or sorted(rows, key=lambda i: -found.scores[i])[:1]:
                mask |= found.masks[index]
            values = {"attention": mask.astype(np.float32), "mask": mask, "truth": truth}
            scores.update(name, **values, image_id=record["image_id"])
    return scores.evaluate(), sorted(set(names) - known)


def main() -> None:
    """Measure and print the table; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line():
        import maskx
        from maskx.core.text import listed
        from maskx.systems.concept_mask.concept_sets import read_concept_split
        from maskx.systems.concept_mask.evaluation import format_concept_table

        data = maskx.load_coco(arguments.json, arguments.images, strict=not arguments.skip_bad)
        predictor = maskx.open_run(arguments.run)
        result, unknown = measure_detections(
            predictor,
            data.records,
            data.class_names,
            read_concept_split(arguments.concept_split),
            found_names=predictor.class_names,
            score=arguments.score,
        )
    print(format_concept_table(result))
    if unknown:
        print(f"Not among the classes of the detector: {len(unknown)}, {listed(unknown)}.")


if __name__ == "__main__":
    main()
