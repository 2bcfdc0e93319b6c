"""State dicts of the stages of ConceptMask, and what one stage takes over from the one before."""

from collections.abc import Mapping

import torch
from torch import Tensor

TABLE_KEYS = {1: "table", 2: "refinement.vectors", 3: "refinement.vectors"}
"""Name of the word table in the state dict of each stage."""


def handed_on(
    state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], *, stage: int
) -> dict[str, Tensor]:
    """Make what a stage loads of the state dict of the stage before.

    Stage 2 takes the embedding network twice, once as ``original``; stage 3 the embedding network
    and the refinement. What was fitted goes along; the lists of concepts stay those of the stage.

    Args:
        state_dict: of the stage before.
        own: state dict of the stage.
        stage: its number.

    Raises:
        ValueError: `state_dict` is of another stage, word table or list of boxed concepts, or
            does not fit.
    """
    if stage == 1:
        raise ValueError("Stage 1 of ConceptMask is the first: there is none to load.")
    found = stage_of(state_dict)
    if found != stage - 1:
        raise ValueError(
            f"Stage {stage} of ConceptMask starts from a checkpoint of stage {stage - 1}, got one "
            f"of {'no stage' if found is None else f'stage {found}'}."
        )
    check_table(own[TABLE_KEYS[stage]], state_dict[TABLE_KEYS[found]])
    if stage == 2:
        part = "embedding."
        originals = {
            f"original.{name.removeprefix(part)}": value
            for name, value in state_dict.items()
            if name.startswith(part)
        }
        handed = {**state_dict, **originals}
        del handed[TABLE_KEYS[1]]
        fresh = "refinement."
    else:
        if not torch.equal(state_dict["is_boxed"].to(own["is_boxed"].device), own["is_boxed"]):
            raise ValueError(
                "The checkpoint of stage 2 was trained with boxes of other concepts. Give stage 3 "
                "the lists of stage 2."
            )
        handed = {n: value for n, value in state_dict.items() if not n.startswith("original.")}
        fresh = "segmenter."
    handed |= {name: own[name] for name in ("is_boxed", "is_masked", "idf")}
    missing = {name for name in own if not name.startswith(fresh)} - set(handed)
    wrong = sorted(missing | (set(handed) - set(own)))
    wrong += [n for n in handed if n in own and handed[n].shape != own[n].shape]
    if wrong:
        raise ValueError(
            f"The checkpoint of stage {found} does not fit this network: "
            f"{', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}. Build both stages "
            "with the same settings of embedding and refinement."
        )
    return handed


def check_table(own: Tensor, found: Tensor) -> None:
    """Refuse the word table of a checkpoint that is not the network's own.

    Args:
        own: (V, k) word vectors of the network.
        found: those of the checkpoint.

    Raises:
        ValueError: they differ.
    """
    if own.shape == found.shape:
        if torch.equal(own, found.to(own.device, own.dtype)):
            return
        difference = "other vectors of the same size"
    else:
        difference = f"{found.shape[0]} vectors of length {found.shape[1]}"
        difference += f", this network {own.shape[0]} of length {own.shape[1]}"
    raise ValueError(
        f"The checkpoint was made with another word table: it has {difference}. Use the table "
        "that the checkpoint was trained with, or train again with this one."
    )


def stage_of(state_dict: Mapping[str, Tensor]) -> int | None:
    """Tell of which stage a state dict is; None for that of another network."""
    for stage, part in ((3, "segmenter."), (2, "original."), (1, "table")):
        if any(name.startswith(part) for name in state_dict):
            return stage
    return None
