"""Options of a study, which a help text shows before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskx.engine.options import QuickstartOptions

__all__ = ["OWN_OPTIONS", "StudyOptions"]

# Options that only some systems take.
OWN_OPTIONS = frozenset(("coco_train", "coco_val", "masks_for", "skip_bad")) | frozenset(
    ("image_size", "backbone", "pretrained", "frozen", "light", "vectors")
)


@dataclass(frozen=True)
class StudyOptions:
    """Options of a study; what is None is the default of the system.

    Attributes:
        output: folder of all runs; a run whose result lies there is not made again.
        system: whose settings to compare.
        settings: what to compare.
        seeds: of scenes, initial weights and data order; every setting runs with each.
        iterations: steps of the detector (``maskx``; also of a model that trains end to end) or of
            the image classifier (``class_patterns``, ``transfernet``, ``larvseg``) or of the
            embedding network (``concept_mask``).
        stage2_iterations: steps of what is trained on that: a mask branch on a frozen detector
            (``maskx``); a segmentation network, in each of its two trainings
            (``class_patterns``); the second stage, of which the first has half as many
            (``transfernet``); each method (``larvseg``); the refinement, and the segmentation
            (``concept_mask``).
        batch_size: images per step.
        device: ``auto``, ``cpu`` or ``cuda``.
        coco_train: annotation file and image folder to train on instead of generated scenes, with
            the options that follow. Of ``class_patterns`` training images need true masks only
            where these are measured with.
        coco_val: annotation file and image folder to evaluate on.
        masks_for: category split, see :func:`maskx.data.splits.resolve_split`; not of
            ``class_patterns``, which learns from no masks.
        skip_bad: leave bad annotations out, counted, instead of stopping at them.
        image_size: shorter side of the images in pixels.
        backbone: see :func:`maskx.torchvision.faster_rcnn`.
        pretrained: start from ImageNet weights.
        frozen: see :class:`maskx.engine.options.QuickstartOptions`; features are computed once for
            all runs of a seed.
        light: of ``maskx``, see the same.
        vectors: file of vectors of the class names, for settings of ``maskx`` that transfer from
            vectors.
    """

    output: Path
    system: str = "maskx"
    settings: Sequence[str] | None = None
    seeds: Sequence[int] = (0, 1, 2)
    iterations: int | None = None
    stage2_iterations: int | None = None
    batch_size: int | None = None
    device: str = "auto"
    coco_train: tuple[str, str] | None = None
    coco_val: tuple[str, str] | None = None
    masks_for: str | None = None
    skip_bad: bool = False
    image_size: int | None = None
    backbone: str = "small"
    pretrained: bool = False
    frozen: bool = False
    light: bool = False
    vectors: Path | None = None

    def seed_folder(self, seed: int) -> Path:
        """Folder of all runs of a seed."""
        return self.output / f"seed_{seed}"

    def quickstart(self, seed: int) -> QuickstartOptions:
        """Return the options of the quick start that say data and backbone of a seed."""
        names = ("coco_train", "coco_val", "masks_for", "skip_bad", "image_size")
        names += ("backbone", "pretrained", "frozen")
        own = {name: getattr(self, name) for name in names}
        return QuickstartOptions(output=self.seed_folder(seed), seed=seed, **own)

    def own(self) -> dict[str, Any]:
        """Return those of the options of own data that are not the default, fit for JSON."""
        own = {name: getattr(self, name) for name in sorted(OWN_OPTIONS)}
        given = {name: value for name, value in own.items() if value != getattr(StudyOptions, name)}
        return {n: v if isinstance(v, bool | int) else str(v) for n, v in given.items()}

    def given(self, **names: str) -> dict[str, int]:
        """Return those of the options that are not None, by the names that a system has for them.

        Args:
            names: of an option the name in the system's own settings.
        """
        values = {new: getattr(self, name) for name, new in names.items()}
        return {name: value for name, value in values.items() if value is not None}
