import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskx.systems.class_patterns import pattern_moments
from maskx.systems.class_patterns.pattern_moments import PatternMoments

K, D = 3, 5


def make_images(seed, count, *, offset=0.0):
    """Images of different sizes with their labels: (features, maps, labels)."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        height, width = generator.integers(1, 6, size=2)
        labels = sorted(generator.choice(K, size=generator.integers(1, K + 1), replace=False))
        features = torch.from_numpy(generator.normal(offset, 1, (D, height, width))).float()
        maps = torch.from_numpy(generator.normal(-1, 2, (len(labels), height, width))).float()
        images.append((features, maps, [int(label) for label in labels]))
    return images


def stream(images, **options):
    moments = PatternMoments(K, D, **({"product_dtype": torch.float64} | options))
    for index, (features, maps, labels) in enumerate(images):
        moments.update(features, maps, labels, image_id=index)
    return moments


def pixels_of(images, label):
    """All (n, d) feature vectors of a class, and its (n,) map values, as float64."""
    vectors = [f.flatten(1).T for f, _, labels in images if label in labels]
    maps = [m[labels.index(label)].flatten() for _, m, labels in images if label in labels]
    return torch.cat(vectors).double().numpy(), torch.cat(maps).double().numpy()


def assert_close(found, expected):
    scale = np.abs(expected).max() + 1e-300
    assert np.abs(np.asarray(found) - expected).max() <= 1e-10 * scale


def assert_exact(moments, images):
    """Compare with numpy's mean and covariance of all pixels at once."""
    for label in range(K):
        if not any(label in labels for _, _, labels in images):
            assert moments.num_pixels[label] == moments.num_images[label] == 0
            assert label not in moments.scatter
            continue
        vectors, maps = pixels_of(images, label)
        assert moments.num_pixels[label] == len(vectors)
        assert moments.num_images[label] == sum(label in labels for _, _, labels in images)
        joint = np.atleast_2d(np.cov(np.column_stack([vectors, maps]).T, bias=True))
        assert_close(moments.mean[label], vectors.mean(axis=0))
        if len(vectors) > 1:
            assert_close(moments.covariance(label), joint[:-1, :-1])
            pixels = len(vectors)
            assert_close(moments.cross[label] / pixels, joint[-1, :-1])
            assert_close(moments.map_scatter[label] / pixels, joint[-1, -1])
        assert_close(moments.map_mean[label], maps.mean())


@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), cut=st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_moments_are_those_of_numpy_in_one_stream_and_merged(seed, count, cut):
    images = make_images(seed, count, offset=3.0)
    assert_exact(stream(images), images)

    merged = stream(images[cut:])
    merged.merge(stream(images[:cut]))
    assert_exact(merged, images)


def test_the_map_moments_are_those_of_the_pixels_that_count():
    images = make_images(11, 8, offset=3.0)
    generator = torch.Generator().manual_seed(2)
    counts = [torch.rand(maps.shape, generator=generator) < 0.5 for _, maps, _ in images]
    parts = []
    for start, stop in ((0, 3), (3, 8)):
        moments = PatternMoments(K, D, product_dtype=torch.float64)
        for (features, maps, labels), mask in zip(
            images[start:stop], counts[start:stop], strict=True
        ):
            moments.update(features, maps, labels, map_counts=mask)
        parts.append(moments)
    moments = parts[0]
    moments.merge(parts[1])
    for label in range(K):
        rows = []
        for (features, maps, labels), mask in zip(images, counts, strict=True):
            if label in labels:
                row = labels.index(label)
                both = torch.cat([features, maps[row : row + 1]])
                rows.append(both[:, mask[row]].T.double())
        joined = torch.cat(rows).numpy()
        assert moments.map_pixels[label] == len(joined)
        assert_close(moments.map_features[label], joined.mean(axis=0)[:-1])
        assert_close(moments.map_mean[label], joined.mean(axis=0)[-1])
        scatter = np.cov(joined.T, bias=True) * len(joined)
        assert_close(moments.cross[label], scatter[-1, :-1])
        assert_close(moments.map_scatter[label], scatter[-1, -1])
        vectors, _ = pixels_of(images, label)
        assert_close(moments.mean[label], vectors.mean(axis=0))  # of all pixels


def test_an_image_in_which_no_pixel_counts_leaves_the_map_moments():
    images = make_images(12, 4)
    moments = stream(images)
    before = {name: getattr(moments, name).clone() for name in pattern_moments._MAP_DENSE}
    maps = torch.rand(1, 3, 3)
    nowhere = torch.zeros_like(maps, dtype=torch.bool)
    moments.update(torch.rand(D, 3, 3), maps, [1], map_counts=nowhere)
    assert all(torch.equal(before[name], getattr(moments, name)) for name in before)


def test_a_mean_far_from_zero_costs_no_precision():
    generator = torch.Generator().manual_seed(0)
    features = 4096 + torch.rand(40, D, 3, 3, generator=generator)
    images = [(f, torch.rand(1, 3, 3, generator=generator), [0]) for f in features]
    moments = stream(images)
    assert_exact(moments, images)

    # The textbook formula in float32 is what this must not be: it loses everything here.
    vectors = torch.from_numpy(pixels_of(images, 0)[0]).float()
    naive = vectors.T @ vectors / len(vectors) - torch.outer(vectors.mean(0), vectors.mean(0))
    exact = torch.from_numpy(np.cov(vectors.numpy().T, bias=True))
    assert (naive - exact).abs().max() > 10 * exact.abs().max()


@pytest.mark.parametrize("block", [1, 2, 3, 64])
def test_the_blocks_of_the_product_do_not_matter(monkeypatch, block):
    monkeypatch.setattr(pattern_moments, "_BLOCK", block)
    images = make_images(5, 6)
    moments = stream(images)
    assert_exact(moments, images)
    covariance = moments.covariance(1)
    assert torch.equal(covariance, covariance.T)


def test_the_scatter_matrix_of_an_image_is_computed_once(monkeypatch):
    calls, multiply = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: calls.append(a.shape) or multiply(a, b))
    stream([(torch.rand(D, 2, 2), torch.rand(3, 2, 2), [0, 1, 2])])
    assert calls == [(D, 4)]


def test_products_in_float32_cost_as_much_as_their_rounding():
    generator = torch.Generator().manual_seed(0)
    images = [
        (torch.randn(32, 20, 20, generator=generator).relu() * 3 + 50, None, [0]) for _ in range(30)
    ]
    exact, fast = (
        PatternMoments(1, 32, product_dtype=dtype) for dtype in (torch.float64, torch.float32)
    )
    for features, _, labels in images:
        for moments in (exact, fast):
            moments.update(features, None, labels)
    covariances = [moments.covariance(0) for moments in (exact, fast)]
    error = (covariances[1] - covariances[0]).abs().max() / covariances[0].abs().max()
    assert 0 < error < 1e-6
    torch.testing.assert_close(exact.mean, fast.mean, rtol=1e-7, atol=0)


def test_memory_does_not_grow_with_the_images():
    images = [(torch.rand(D, 40, 40), torch.rand(1, 40, 40), [label]) for label in range(K)]
    moments = stream(images)
    held = moments.num_bytes
    for features, maps, labels in images:
        moments.update(features, maps, labels)
    assert moments.num_bytes == held
    # Two classes that do not occur take nothing but their row of means.
    assert held - stream(images[:1]).num_bytes == 2 * (8 * D * D + 1024 * (4 * D + 8))


def test_maps_of_another_size_are_resized_bilinearly():
    features, small = torch.rand(D, 6, 6), torch.tensor([[[0.0, 4.0], [4.0, 8.0]]])
    # Pixel centres of the 6 lie at (i + 0.5) / 3 - 0.5 of the 2, clamped to [0, 1].
    steps = torch.tensor([0.0, 0.0, 1 / 3, 2 / 3, 1.0, 1.0])
    large = 4 * (steps[:, None] + steps[None, :])[None]
    by_size = [stream([(features, maps, [1])]) for maps in (small, large)]
    for name in ("cross", "map_mean", "map_scatter"):
        one, other = (getattr(moments, name).float() for moments in by_size)
        torch.testing.assert_close(one, other)


def test_where_small_maps_count_is_resized_to_nearest_centres():
    features, maps = torch.rand(D, 5, 5), torch.rand(1, 2, 2)
    counts = torch.tensor([[[True, False], [False, True]]])
    small, large = PatternMoments(K, D), PatternMoments(K, D)
    small.update(features, maps, [1], map_counts=counts)
    # The third of 5 pixels has its centre at that of the image, and goes to the second of 2.
    nearest = torch.tensor([0, 0, 1, 1, 1])
    maps = torch.nn.functional.interpolate(maps[None].double(), (5, 5), mode="bilinear")[0]
    large.update(features, maps, [1], map_counts=counts[:, nearest][:, :, nearest])
    assert small.map_pixels.tolist() == [0, 4 + 9, 0]
    assert state_equal(small, large)


def test_features_keep_their_values_and_may_require_a_gradient():
    features = torch.rand(D, 2, 2, dtype=torch.float64, requires_grad=True)
    before = features.detach().clone()
    moments = stream([(features, torch.rand(1, 2, 2, requires_grad=True), [0])])
    assert torch.equal(features, before)
    assert not any(tensor.requires_grad for tensor in moments.state_dict().values())


def state_equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("with_maps", [True, False])
def test_a_restored_state_goes_on_bit_by_bit(with_maps):
    images = [(f, m if with_maps else None, labels) for f, m, labels in make_images(2, 9)]
    whole, first = stream(images), stream(images[:4])
    restored = PatternMoments(K, D, product_dtype=torch.float64)
    restored.load_state_dict(first.state_dict())
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    for index, (features, maps, labels) in enumerate(images[4:], 4):
        restored.update(features, maps, labels, image_id=index)
    assert state_equal(restored, whole)
    assert all(torch.equal(before[n], t) for n, t in first.state_dict().items()), "state is copied"


def test_an_empty_state_can_be_restored_and_merged():
    restored = PatternMoments(K, D)
    restored.load_state_dict(PatternMoments(K, D).state_dict())
    assert restored.uses_maps is None
    restored.merge(PatternMoments(K, D))
    images = make_images(3, 3)
    restored.merge(stream(images))
    assert restored.uses_maps is True
    assert_exact(restored, images)


def test_the_sample_depends_on_neither_order_nor_shards(monkeypatch):
    monkeypatch.setattr(pattern_moments, "_SAMPLE_SIZE", 20)
    images = [(i, f, labels) for i, (f, _, labels) in enumerate(make_images(4, 15))]

    def sample_of(parts):
        merged = PatternMoments(K, D, seed=7)
        for part in parts:
            moments = PatternMoments(K, D, seed=7)
            for image_id, features, labels in part:
                moments.update(features, None, labels, image_id=image_id)
            merged.merge(moments)
        return {label: (merged.sample_keys[label], merged.sample[label]) for label in merged.sample}

    samples = [sample_of([images]), sample_of([images[8:][::-1], images[:8]])]
    for label, (keys, vectors) in samples[0].items():
        other_keys, other_vectors = samples[1][label]
        assert len(keys) == 20
        assert torch.equal(other_keys.sort()[0], keys.sort()[0])
        assert torch.equal(other_vectors[other_keys.argsort()], vectors[keys.argsort()])


def test_the_sample_is_uniform_over_pixels(monkeypatch):
    monkeypatch.setattr(pattern_moments, "_SAMPLE_SIZE", 500)
    moments = PatternMoments(1, 1)
    # Large and small images: each pixel holds the number of its image.
    sizes = [200, 1] * 50
    for image, size in enumerate(sizes):
        moments.update(torch.full((1, size, 5), float(image)), None, [0], image_id=image)
    vectors = moments.sample[0][:, 0]
    assert len(vectors) == 500
    small = (vectors % 2 == 1).float().mean()
    assert small < 0.03  # 1 / 201 expected
    assert abs(vectors.mean() - 49) < 5  # standard error 1.3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["features", "maps"])
def test_values_that_are_not_finite_are_refused_by_image_and_not_added(value, where):
    moments = stream(make_images(0, 2))
    before = {name: tensor.clone() for name, tensor in moments.state_dict().items()}
    features, maps = torch.rand(D, 3, 3), torch.rand(1, 3, 3)
    {"features": features, "maps": maps}[where][0, 1, 2] = value
    with pytest.raises(ValueError, match=r"image 'cat\.jpg' hold NaN or infinite"):
        moments.update(features, maps, [1], image_id="cat.jpg")
    assert all(torch.equal(before[n], t) for n, t in moments.state_dict().items())


@pytest.mark.parametrize(
    ("features", "maps", "labels", "message"),
    [
        ((D, 2, 2), (1, 2, 2), [3], "Label 3 of image 17 is outside .* indices 0 to 2"),
        ((D, 2, 2), (1, 2, 2), [-1], "Label -1 of image 17"),
        ((D, 2, 2), (2, 2, 2), [1, 1], r"Labels \[1, 1\] of image 17 must differ"),
        ((4, 2, 2), (1, 2, 2), [1], r"image 17 have the shape \(4, 2, 2\), expected \(5, h, w\)"),
        ((D, 0, 2), (1, 2, 2), [1], r"the shape \(5, 0, 2\)"),
        ((D, 2, 2), (1, 2, 2), [0, 1], r"\(1, 2, 2\), expected \(2, h, w\): one for each"),
    ],
)
def test_bad_images_are_refused(features, maps, labels, message):
    moments = PatternMoments(K, D)
    with pytest.raises(ValueError, match=message):
        moments.update(torch.rand(features), torch.rand(maps), labels, image_id=17)


def test_images_with_and_without_maps_are_not_mixed():
    moments = stream(make_images(0, 1))
    with pytest.raises(ValueError, match="Image 5 came without class activation maps, those befor"):
        moments.update(torch.rand(D, 2, 2), None, [0], image_id=5)
    other = PatternMoments(K, D)
    other.update(torch.rand(D, 2, 2), None, [0])
    with pytest.raises(ValueError, match="The other moments came without class activation maps"):
        moments.merge(other)


def test_moments_of_another_size_are_refused():
    with pytest.raises(ValueError, match="channels 4 cannot be merged into moments of channels 5"):
        PatternMoments(K, D).merge(PatternMoments(K, 4))
    message = (
        r"has \(3, 4\) of torch.float64 as cross\. Allowed for 3 classes and 5 channels: \(3, 5\)"
    )
    with pytest.raises(ValueError, match=message):
        PatternMoments(K, D).load_state_dict(PatternMoments(K, 4).state_dict())
    state = PatternMoments(K, D).state_dict()
    del state["cross"]
    with pytest.raises(ValueError, match="has nothing as cross"):
        PatternMoments(K, D).load_state_dict(state)
