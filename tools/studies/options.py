"""Options of a study, which a help text shows before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["StudyOptions"]


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
    """

    output: Path
    system: str = "maskx"
    settings: Sequence[str] | None = None
    seeds: Sequence[int] = (0, 1, 2)
    iterations: int | None = None
    stage2_iterations: int | None = None
    batch_size: int | None = None
    device: str = "auto"

    def seed_folder(self, seed: int) -> Path:
        """Folder of all runs of a seed."""
        return self.output / f"seed_{seed}"

    def given(self, **names: str) -> dict[str, int]:
        """Return those of the options that are not None, by the names that a system has for them.

        Args:
            names: of an option the name in the system's own settings.
        """
        values = {new: getattr(self, name) for name, new in names.items()}
        return {name: value for name, value in values.items() if value is not None}
