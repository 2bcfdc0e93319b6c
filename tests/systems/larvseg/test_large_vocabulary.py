import pytest
import torch
import torch.nn.functional as F
from benchmarks.measure import peak_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from maskx.systems.larvseg import large_vocabulary
from maskx.systems.larvseg.large_vocabulary import predict_label_map


def dense_top_k(tokens, class_vectors, size, top_k):
    """The logits of every class at every pixel, sorted; of equal ones the lowest class first."""
    logits = torch.einsum("chw,kc->khw", tokens, class_vectors)[None]
    logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)[0]
    scores, classes = logits.sort(dim=0, descending=True, stable=True)
    return classes[:top_k], scores[:top_k]


def assert_same(tokens, class_vectors, size, *, top_k=1, chunk=512):
    found, scores = predict_label_map(tokens, class_vectors, size, top_k=top_k, chunk=chunk)
    classes, values = dense_top_k(tokens, class_vectors, size, top_k)
    assert torch.equal(found, classes)
    torch.testing.assert_close(scores, values)


sides = st.integers(1, 5)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 5), sides, sides),
    num_classes=st.integers(1, 40),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    top_k=st.integers(1, 5),
    chunk=st.integers(1, 20),
)
def test_label_maps_are_those_of_the_dense_logits(seed, shape, num_classes, size, top_k, chunk):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(shape, generator=generator, dtype=torch.float64)
    vectors = torch.randn(num_classes, shape[0], generator=generator, dtype=torch.float64)
    assert_same(tokens, vectors, size, top_k=top_k, chunk=chunk)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    token_sides=st.tuples(sides, sides),
    scales=st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8, 16])),
    largest=st.integers(0, 2),
    top_k=st.integers(1, 5),
    chunk=st.integers(1, 20),
)
def test_of_equal_scores_the_lowest_class_comes_first(
    seed, token_sides, scales, largest, top_k, chunk
):
    # Small whole numbers and steps of powers of two: every score is exact, and many are equal.
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-largest, largest + 1, (3, *token_sides), generator=generator).float()
    vectors = torch.randint(-1, 2, (30, 3), generator=generator).float()
    size = tuple(side * scale for side, scale in zip(token_sides, scales, strict=True))
    assert_same(tokens, vectors, size, top_k=top_k, chunk=chunk)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("same", ["tokens", "classes", "both", "zero"])
def test_constant_maps(same, top_k):
    torch.manual_seed(0)
    tokens, vectors = torch.randn(4, 3, 5).double(), torch.randn(50, 4).double()
    if same in ("tokens", "both"):
        tokens = tokens[:, :1, :1].expand(4, 3, 5)
    if same in ("classes", "both"):
        vectors = vectors[:1].expand(50, 4)
    if same == "zero":
        tokens = 0 * tokens
    if same == "tokens":
        # Interpolation of equal numbers rounds; the order of distinct ones stays.
        assert_same(tokens, vectors, (12, 20), top_k=top_k, chunk=7)
    else:
        found, _ = predict_label_map(tokens, vectors, (12, 20), top_k=top_k, chunk=7)
        assert (found == torch.arange(top_k)[:, None, None]).all()


def test_a_class_that_wins_only_between_the_tokens_is_found():
    # Classes 0 to 3 win at one token each, class 4 nowhere but in the middle.
    tokens = torch.eye(4).reshape(4, 2, 2)
    vectors = torch.cat((torch.eye(4), torch.full((1, 4), 0.4)))
    found, scores = predict_label_map(tokens, vectors, (16, 16))
    assert found[0, [0, 0, 15, 15], [0, 15, 0, 15]].tolist() == [0, 1, 2, 3]
    assert (found[0, 7:9, 7:9] == 4).all()
    assert scores[0, 7, 7] == pytest.approx(0.4)
    assert_same(tokens, vectors, (16, 16))


@pytest.mark.parametrize("size", [(64, 64), (50, 77), (3, 2), (1, 1)])
@pytest.mark.parametrize("peaked", [False, True])
def test_larger_vocabularies_with_and_without_peaks(size, peaked):
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(900, 32).double(), dim=1)
    tokens = F.normalize(torch.randn(32, 4, 6).double(), dim=0)
    if peaked:
        layout = torch.randint(0, 900, (4, 6))
        layout[:2, :3] = 5
        tokens = F.normalize(vectors[layout].permute(2, 0, 1) + 0.5 * tokens, dim=0)
    for top_k in (1, 5):
        assert_same(tokens, vectors, size, top_k=top_k, chunk=128)


def test_parts_of_the_candidates_change_nothing(monkeypatch):
    torch.manual_seed(0)
    tokens, vectors = torch.randn(3, 4, 4).double(), torch.randn(60, 3).double()
    monkeypatch.setattr(large_vocabulary, "_MAX_CANDIDATES", 5)
    monkeypatch.setattr(large_vocabulary, "_MAX_BLOCKS", 3)
    for waiting in (1, 200):
        monkeypatch.setattr(large_vocabulary, "_MAX_WAITING", waiting)
        for top_k in (1, 4):
            assert_same(tokens, vectors, (16, 16), top_k=top_k)


def test_no_more_labels_than_classes_are_returned():
    classes, scores = predict_label_map(torch.randn(2, 3, 3), torch.randn(3, 2), (5, 4), top_k=5)
    assert classes.shape == scores.shape == (3, 5, 4)
    assert (classes.sort(dim=0).values == torch.arange(3)[:, None, None]).all()


def test_half_precision_is_scored_in_single_precision():
    tokens, vectors = torch.randn(4, 3, 3).bfloat16(), torch.randn(9, 4).bfloat16()
    classes, scores = predict_label_map(tokens, vectors, (12, 12))
    assert scores.dtype == torch.float32
    assert torch.equal(classes, dense_top_k(tokens.float(), vectors.float(), (12, 12), 1)[0])


def test_automatic_mixed_precision_changes_nothing():
    torch.manual_seed(0)
    tokens, vectors = torch.randn(16, 3, 3), torch.randn(200, 16)
    expected = predict_label_map(tokens, vectors, (24, 24), top_k=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = predict_label_map(tokens, vectors, (24, 24), top_k=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_memory_is_bounded_by_the_chunk_and_not_by_the_classes():
    torch.manual_seed(0)
    tokens = F.normalize(torch.randn(16, 8, 8), dim=0)
    peaks = []
    for num_classes in (2000, 8000):
        vectors = F.normalize(torch.randn(num_classes, 16), dim=1)
        step = lambda v=vectors: predict_label_map(tokens, v, (128, 128), chunk=256)  # noqa: E731
        peaks.append(peak_bytes(step, torch.device("cpu")))
    # Dense logits take 131 and 524 MB.
    assert max(peaks) < 8e6
    assert peaks[1] < 1.3 * peaks[0]


@pytest.mark.parametrize(
    ("tokens", "vectors", "options", "message"),
    [
        ((2, 3, 3), (4, 3), {}, r"tokens must be \(C, h, w\).*got \(2, 3, 3\) and \(4, 3\)"),
        ((2, 3), (4, 2), {}, r"tokens must be \(C, h, w\)"),
        ((2, 3, 3), (4, 2), {"top_k": 0}, "must be at least 1, got .* top_k 0"),
        ((2, 3, 3), (4, 2), {"size": (0, 4)}, r"must be at least 1, got size \(0, 4\)"),
        ((2, 3, 3), (0, 2), {}, r"class_vectors \(0, 2\)"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tokens, vectors, options, message):
    options = {"size": (4, 4), **options}
    with pytest.raises(ValueError, match=message):
        predict_label_map(torch.zeros(tokens), torch.zeros(vectors), **options)


def test_values_that_are_not_finite_are_refused():
    tokens = torch.full((2, 3, 3), float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        predict_label_map(tokens, torch.ones(4, 2), (6, 6))
