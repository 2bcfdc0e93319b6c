import pytest
import torch

from maskx.systems.concept_mask.stages import TABLE_KEYS, check_table, handed_on

BOXED = torch.tensor([True, False])


def make_state(stage, *, value=1.0, boxed=BOXED, masked=BOXED, width=2):
    state = {
        TABLE_KEYS[stage]: torch.eye(2),
        "embedding.weight": torch.full((width,), value),
        "theta_image": torch.tensor(value / 10),
        "idf": torch.full((2,), value),
        "is_boxed": boxed,
        "is_masked": masked,
    }
    if stage > 1:
        state["refinement.bias"] = torch.full((2,), value)
    if stage == 2:
        state["original.weight"] = torch.full((width,), value + 1)
    if stage == 3:
        state["segmenter.weight"] = torch.full((2,), value)
    return state


def test_stage_2_takes_the_embedding_twice_and_keeps_its_own_lists():
    before = make_state(1, value=5.0, boxed=~BOXED)
    found = handed_on(before, make_state(2, value=7.0), stage=2)
    assert set(found) == {
        "embedding.weight",
        "original.weight",
        "theta_image",
        "idf",
        "is_boxed",
        "is_masked",
    }
    for part in ("embedding", "original"):
        assert found[f"{part}.weight"].tolist() == [5, 5]
    assert found["theta_image"] == 0.5
    assert found["idf"].tolist() == [7, 7]
    assert torch.equal(found["is_boxed"], BOXED)


def test_stage_3_takes_what_stage_2_trained_and_leaves_its_memory():
    before = make_state(2, value=5.0, masked=~BOXED)
    found = handed_on(before, make_state(3, value=7.0), stage=3)
    assert found["refinement.bias"].tolist() == found["embedding.weight"].tolist() == [5, 5]
    assert not [name for name in found if name.startswith(("original", "segmenter"))]
    assert torch.equal(found["is_masked"], BOXED)


@pytest.mark.parametrize(
    ("before", "stage", "message"),
    [
        (make_state(1), 1, "Stage 1 of ConceptMask is the first"),
        (make_state(1), 3, "Stage 3 .* of stage 2, got one of stage 1"),
        (make_state(3), 3, "of stage 2, got one of stage 3"),
        ({"weight": torch.ones(2)}, 2, "got one of no stage"),
        (make_state(2, boxed=~BOXED), 3, "trained with boxes of other concepts"),
        (make_state(1, width=3), 2, r"does not fit this network: embedding\.weight, original\.we"),
        (make_state(1) | {"embedding.extra": BOXED}, 2, r"network: embedding\.extra, original\.ex"),
        ({n: v for n, v in make_state(2).items() if n != "refinement.bias"}, 3, "refinement.bias"),
    ],
)
def test_a_state_dict_that_does_not_fit(before, stage, message):
    with pytest.raises(ValueError, match=message):
        handed_on(before, make_state(stage), stage=stage)


def test_another_word_table_is_refused_by_value_and_by_size():
    check_table(torch.eye(2), torch.eye(2).double())
    with pytest.raises(ValueError, match="has other vectors of the same size"):
        check_table(torch.eye(2), torch.eye(2).flip(0))
    with pytest.raises(ValueError, match="it has 3 vectors of length 2, this network 2 of length"):
        check_table(torch.eye(2), torch.ones(3, 2))
