import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maskx.systems.concept_mask.network import AttentionRefinement, initial_attention

NUM_CONCEPTS, DIM, HIDDEN = 40, 6, 9


class Refinement(AttentionRefinement):
    """With the word vectors, which a model holds."""

    def __init__(self, vectors, hidden):
        super().__init__(len(vectors), hidden_channels=hidden)
        self.register_buffer("vectors", vectors)

    def forward(self, maps, concepts=None):
        return super().forward(maps, self.vectors, concepts)


def make_refinement(num_concepts=NUM_CONCEPTS, dim=DIM, hidden=HIDDEN):
    torch.manual_seed(0)
    refinement = Refinement(torch.randn(num_concepts, dim), hidden)
    with torch.no_grad():
        refinement.conv2.weight.normal_()
        refinement.conv1.bias.normal_()
        refinement.conv2.bias.normal_()
    return refinement.eval()


def unfolded(refinement, embedding_map):
    """The paper's form: V coarse maps, then two convolutions over all of them."""
    coarse = F.conv2d(embedding_map, refinement.vectors[:, :, None, None])
    return refinement.conv2(refinement.conv1(coarse).relu())


def embedding_maps(dim=DIM, size=(4, 5), num_images=2):
    return torch.randn(num_images, dim, *size, generator=torch.Generator().manual_seed(1))


def test_initial_attention_is_the_inner_product_at_every_position():
    maps, vectors = embedding_maps(), torch.randn(3, DIM)
    found = initial_attention(maps, vectors)
    cosines = initial_attention(maps, vectors, cosine=True)
    assert found.shape == (2, 3, 4, 5)
    for image in range(2):
        for concept in range(3):
            for i in range(4):
                for j in range(5):
                    e, w = maps[image, :, i, j], vectors[concept]
                    dot = sum(a * b for a, b in zip(e.tolist(), w.tolist(), strict=True))
                    index = (image, concept, i, j)
                    assert found[index].item() == pytest.approx(dot, abs=1e-5)
                    assert cosines[index].item() == pytest.approx(
                        dot / (e.norm() * w.norm()).item(), abs=1e-5
                    )


def test_initial_attention_takes_other_concepts_for_each_image():
    maps, vectors = embedding_maps(), torch.randn(2, 3, DIM)
    for cosine in (False, True):
        found = initial_attention(maps, vectors, cosine=cosine)
        for image in range(2):
            expected = initial_attention(maps[image, None], vectors[image], cosine=cosine)
            torch.testing.assert_close(found[image, None], expected)


def test_the_cosine_of_a_zero_embedding_is_finite():
    assert not initial_attention(torch.zeros(1, DIM, 2, 2), torch.ones(1, DIM), cosine=True).any()


@given(
    num_concepts=st.integers(1, 60),
    dim=st.integers(1, 9),
    hidden=st.integers(1, 12),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    training=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_folded_equals_unfolded(num_concepts, dim, hidden, size, training):
    refinement = make_refinement(num_concepts, dim, hidden).train(training)
    maps = embedding_maps(dim, size)
    with torch.no_grad():
        expected = unfolded(refinement, maps)
        torch.testing.assert_close(refinement(maps), expected, atol=1e-4, rtol=1e-5)
        refinement.double()
        expected = unfolded(refinement, maps.double())
        found = refinement(maps.double())
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_folded_equals_unfolded_to_five_digits_at_a_large_vocabulary():
    torch.manual_seed(0)
    refinement = Refinement(F.normalize(torch.randn(2000, 64)), 128)
    maps = F.normalize(embedding_maps(64), dim=1)
    with torch.no_grad():
        found, expected = refinement.eval()(maps).sigmoid(), unfolded(refinement, maps).sigmoid()
    assert (found - expected).abs().max() <= 1e-5


def test_only_the_rows_that_are_asked_for_are_computed():
    refinement, maps = make_refinement(), embedding_maps()
    every = refinement(maps)
    assert every.shape == (2, NUM_CONCEPTS, 4, 5)
    concepts = torch.tensor([7, 0, 39, 7])
    torch.testing.assert_close(refinement(maps, concepts), every[:, concepts])
    each = torch.tensor([[3, 8, 1], [8, 8, 20]])
    found = refinement(maps, each)
    for image in range(2):
        torch.testing.assert_close(found[image], every[image, each[image]])
    assert refinement(maps, torch.empty(0, dtype=torch.int64)).shape == (2, 0, 4, 5)


def test_pairs_are_the_maps_of_one_concept_in_one_image():
    refinement, maps = make_refinement(), embedding_maps()
    images, concepts = torch.tensor([1, 0, 1, 1]), torch.tensor([5, 5, 0, 33])
    found = refinement.pair_logits(refinement.hidden(maps, refinement.vectors), images, concepts)
    torch.testing.assert_close(found, refinement(maps)[images, concepts])


def test_no_map_of_the_whole_vocabulary_is_made():
    refinement, maps = make_refinement(), embedding_maps()
    made = []

    def full_maps():
        shapes = [s for s in made if s.numel() >= 2 * NUM_CONCEPTS * 20 and NUM_CONCEPTS in s]
        made.clear()
        return shapes

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                made.append(result.shape)
            return result

    with Watch():
        unfolded(refinement, maps)
        assert full_maps()
        for mode in (True, False):
            refinement.train(mode)(maps, torch.tensor([1, 2]))
            assert made
            assert not full_maps()


def test_an_unseen_or_unknown_concept_is_refused():
    refinement, maps = make_refinement(), embedding_maps()
    for wrong in (-1, NUM_CONCEPTS):
        with pytest.raises(IndexError, match="out of range"):
            refinement(maps, torch.tensor([0, wrong]))


@pytest.mark.parametrize("training", [True, False])
def test_the_gradients_are_those_of_the_unfolded_form(training):
    refinement = make_refinement().double().train(training)
    maps = embedding_maps().double().requires_grad_()
    weights = torch.randn(2, NUM_CONCEPTS, 4, 5).double()
    # A product kept without gradients must not be used where one is wanted.
    with torch.no_grad():
        refinement(maps)
    inputs = [maps, *refinement.parameters()]
    found = torch.autograd.grad((refinement(maps).sigmoid() * weights).sum(), inputs)
    expected = torch.autograd.grad((unfolded(refinement, maps).sigmoid() * weights).sum(), inputs)
    assert all(grad.any() for grad in found)
    torch.testing.assert_close(found, expected)


def test_only_the_rows_that_are_asked_for_get_a_gradient():
    refinement = make_refinement()
    refinement(embedding_maps(), torch.tensor([3, 11])).sum().backward()
    assert refinement.conv2.weight.grad.flatten(1).any(dim=1).nonzero().flatten().tolist() == [
        3,
        11,
    ]
    assert refinement.conv1.weight.grad.any()


def test_a_frozen_refinement_passes_gradients_to_the_embeddings():
    refinement = make_refinement().requires_grad_(False)
    with torch.inference_mode():
        refinement(embedding_maps())
    maps = embedding_maps().requires_grad_()
    (found,) = torch.autograd.grad(refinement(maps).sum(), maps)
    (expected,) = torch.autograd.grad(unfolded(refinement, maps).sum(), maps)
    torch.testing.assert_close(found, expected)


def test_the_product_is_made_once_and_kept_out_of_the_state_dict():
    refinement, maps = make_refinement(), embedding_maps()
    made = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape == (HIDDEN, DIM):
                made.append(function)
            return result

    with torch.no_grad(), Watch():
        refinement(maps)
        assert made
        made.clear()
        refinement(maps)
        assert not made
    names = {"vectors", "conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"}
    assert set(refinement.state_dict()) == names


def optimiser_step(refinement, make, maps):
    optimiser = make(refinement.parameters())
    refinement(maps).square().sum().backward()
    optimiser.step()


def load_other_weights(refinement, **kwargs):
    other = {name: torch.randn_like(value) for name, value in refinement.state_dict().items()}
    refinement.load_state_dict(other, **kwargs)


def through_half(refinement):
    # The weights come back to their old type, rounded, perhaps to their old address.
    refinement.half().float()


def replace_parameter(refinement):
    refinement.conv1.weight = torch.nn.Parameter(torch.randn_like(refinement.conv1.weight))


def replace_data(refinement):
    refinement.conv1.weight.data = torch.randn_like(refinement.conv1.weight)


@torch.no_grad()
def edit_in_place(refinement):
    refinement.conv1.weight[3, 4] += 1


@torch.inference_mode()
def edit_in_inference_mode(refinement):
    refinement.conv1.weight[3, 4] += 1


@torch.no_grad()
def edit_vectors(refinement):
    refinement.vectors[7, 2] += 1


def edit_uncounted_then_set_the_mode(refinement):
    refinement.conv1.weight.data[2, 5] += 3
    refinement.vectors.numpy()[1] += 1
    refinement.eval()


def toggle_and_train(refinement):
    refinement.train()
    optimiser_step(
        refinement, lambda parameters: torch.optim.SGD(parameters, lr=0.1), embedding_maps()
    )
    refinement.eval()


def look_between_gradient_and_fused_step(refinement):
    # Fused steps are not counted, and the look comes after the graph was made.
    optimiser = torch.optim.Adam(refinement.train().parameters(), lr=0.1, fused=True)
    refinement(embedding_maps()).square().sum().backward()
    with torch.no_grad():
        refinement(embedding_maps())
    optimiser.step()


CHANGES = {
    "look_before_fused_step": look_between_gradient_and_fused_step,
    "sgd": lambda r: optimiser_step(r, lambda p: torch.optim.SGD(p, lr=0.1), embedding_maps()),
    "adam_foreach": lambda r: optimiser_step(
        r, lambda p: torch.optim.Adam(p, lr=0.1, foreach=True), embedding_maps()
    ),
    "adam_fused": lambda r: optimiser_step(
        r, lambda p: torch.optim.Adam(p, lr=0.1, fused=True), embedding_maps()
    ),
    "load_state_dict": load_other_weights,
    "load_state_dict_assign": lambda r: load_other_weights(r, assign=True),
    "double": lambda r: r.double(),
    "to_double_and_back": lambda r: r.to(torch.float64).to(torch.float32),
    "half_and_back": through_half,
    "new_parameter": replace_parameter,
    "new_data": replace_data,
    "in_place": edit_in_place,
    "in_place_in_inference_mode": edit_in_inference_mode,
    "in_place_vectors": edit_vectors,
    "uncounted_then_eval": edit_uncounted_then_set_the_mode,
    "train_step_eval": toggle_and_train,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("before", [torch.no_grad, torch.inference_mode])
def test_no_change_of_the_weights_leaves_a_stale_product(change, before):
    refinement, maps = make_refinement(), embedding_maps()
    with before():
        refinement(maps)
    CHANGES[change](refinement)
    with torch.no_grad():
        maps = maps.to(refinement.conv1.weight.dtype)
        found = refinement(maps)
        torch.testing.assert_close(found, unfolded(refinement, maps), atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_no_other_weight_gets_the_address_of_one_whose_product_is_kept():
    refinement = make_refinement()
    refinement(embedding_maps())
    address, shape = refinement.conv1.weight.data_ptr(), refinement.conv1.weight.shape
    del refinement.conv1.weight
    others = [torch.empty(shape) for _ in range(50)]
    assert address not in [other.data_ptr() for other in others]


@torch.no_grad()
def test_a_copy_shares_nothing_with_its_original():
    refinement, maps = make_refinement().double(), embedding_maps().double()
    before = refinement(maps)
    copied = copy.deepcopy(refinement)
    copied.conv1.weight.mul_(2)
    torch.testing.assert_close(copied(maps), unfolded(copied, maps))
    torch.testing.assert_close(refinement(maps), before)
    refinement.conv1.weight.mul_(3)
    torch.testing.assert_close(refinement(maps), unfolded(refinement, maps))
    torch.testing.assert_close(copied(maps), unfolded(copied, maps))


@torch.no_grad()
def test_pickles_leave_the_product_out():
    refinement, maps = make_refinement(), embedding_maps()
    size = len(pickle.dumps(refinement))
    before = refinement(maps)
    assert len(pickle.dumps(refinement)) == size
    stream = io.BytesIO()
    torch.save(refinement, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.load(stream, weights_only=False)(maps), before)


def test_a_model_made_in_inference_mode_works():
    with torch.inference_mode():
        refinement, maps = make_refinement(), embedding_maps()
        torch.testing.assert_close(refinement(maps), unfolded(refinement, maps))
        refinement.conv1.weight.mul_(2)
        torch.testing.assert_close(refinement(maps), unfolded(refinement, maps))
    with torch.no_grad():
        torch.testing.assert_close(refinement(maps), unfolded(refinement, maps))


def test_bfloat16_autocast_is_finite():
    refinement, maps = make_refinement(), embedding_maps().requires_grad_()
    with torch.no_grad():
        expected = unfolded(refinement, maps)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        evaluated = refinement(maps)
    with torch.autocast("cpu", torch.bfloat16):
        trained = refinement.train()(maps)
    for found in (evaluated, trained):
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    trained.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in [maps, *refinement.parameters()])


@pytest.mark.parametrize(("concepts", "hidden"), [(0, 4), (2, 0)])
def test_arguments_out_of_range_are_named(concepts, hidden):
    message = f"num_concepts is {concepts}, hidden_channels {hidden}. Allowed: at least 1"
    with pytest.raises(ValueError, match=message):
        AttentionRefinement(concepts, hidden_channels=hidden)
