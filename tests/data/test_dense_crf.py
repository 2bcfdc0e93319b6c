import sys

import numpy as np
import pytest

from maskx.data.dense_crf import SEC_DSRG, TRANSFERNET, CrfSettings, check_crf, refine

WITHOUT_PAIRS = {"gaussian_compat": 0, "bilateral_compat": 0}
WIDE = CrfSettings(
    gaussian_sxy=3,
    gaussian_compat=3,
    bilateral_sxy=10,
    bilateral_srgb=30,
    bilateral_compat=3,
    iterations=5,
)


def change(settings, **changes):
    return CrfSettings(**(vars(settings) | changes))


@pytest.fixture
def pydensecrf():
    return pytest.importorskip("pydensecrf", reason="the extra `crf` is not installed")


def draw_scene(height=16, width=20):
    """A noisy image of a rectangle, and noisy probabilities of three labels."""
    random = np.random.default_rng(0)
    image = np.full((height, width, 3), 60.0)
    prob = np.full((3, height, width), 0.25)
    prob[0] = 0.5
    image[3:11, 4:14] = 200, 120, 40
    prob[:, 3:11, 4:14] = np.array([0.2, 0.5, 0.3])[:, None, None]
    image = np.clip(image + random.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
    prob *= np.exp(random.normal(0, 0.5, prob.shape))
    return image, (prob / prob.sum(0)).astype(np.float32)


def mean_field(image, prob, settings):
    """Algorithm 1 of Krähenbühl and Koltun over all pairs of pixels, in float64.

    As in the library, kernels are normalised symmetrically and pixels are their own neighbours.
    """
    num_labels, height, width = prob.shape
    pixels = [(y, x) for y in range(height) for x in range(width)]
    kernel = np.zeros((2, len(pixels), len(pixels)))
    for i, p in enumerate(pixels):
        for j, q in enumerate(pixels):
            far = (p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2
            unlike = ((image[p].astype(float) - image[q]) ** 2).sum()
            kernel[0, i, j] = -far / 2 / settings.gaussian_sxy**2
            kernel[1, i, j] = -far / 2 / settings.bilateral_sxy**2
            kernel[1, i, j] -= unlike / 2 / settings.bilateral_srgb**2
    kernel = np.exp(kernel)
    norm = np.sqrt(kernel.sum(2))
    kernel /= norm[:, :, None] * norm[:, None, :]
    weighted = settings.gaussian_compat * kernel[0] + settings.bilateral_compat * kernel[1]

    cost = -np.log(np.maximum(prob.reshape(num_labels, -1).astype(float), 1e-5))
    found = np.exp(-cost) / np.exp(-cost).sum(0)
    for _ in range(settings.iterations):
        # Potts: a label costs what other labels have around it, here less what all labels have.
        exponent = -cost + found @ weighted.T
        found = np.exp(exponent - exponent.max(0))
        found /= found.sum(0)
    return found.reshape(prob.shape)


@pytest.mark.parametrize(
    "settings",
    [
        WIDE,
        change(WIDE, iterations=1),
        change(WIDE, gaussian_compat=0),
        change(WIDE, bilateral_compat=0),
        SEC_DSRG,
        TRANSFERNET,
    ],
)
def test_it_is_mean_field_over_all_pairs(pydensecrf, settings):
    """The lattice is off by up to 0.032, where the CRF moves probabilities by 0.3 to 0.8.

    Kernels that are not normalised would be 0.14 off or more in some cases and 0.7 in others. At
    TransferNet's narrow rgb 3 noise isolates pixels, and most of what they get is their own
    message: without it, or with an rgb of 3.9, some pixel would be 0.95 off.
    """
    image, prob = draw_scene()
    found, expected = refine(image, prob, settings), mean_field(image, prob, settings)
    assert found.shape == prob.shape
    assert found.dtype == np.float32
    assert np.abs(found - prob).max() > 0.3
    np.testing.assert_allclose(found, expected, atol=0.04)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)


def test_without_pairs_probabilities_stay_clipped_and_normalised(pydensecrf):
    image, prob = draw_scene()
    found = refine(image, prob, change(SEC_DSRG, **WITHOUT_PAIRS))
    np.testing.assert_allclose(found, prob, atol=1e-6)
    np.testing.assert_allclose(
        refine(image, prob / 2, change(SEC_DSRG, **WITHOUT_PAIRS)), prob, atol=1e-6
    )
    certain = np.zeros((2, *image.shape[:2]))
    certain[1] = 1
    found = refine(image, certain, change(SEC_DSRG, **WITHOUT_PAIRS))
    np.testing.assert_allclose(found[0], 1e-5 / (1 + 1e-5), rtol=1e-3)


def test_an_isolated_pixel_is_removed_from_a_uniform_image(pydensecrf):
    image = np.full((20, 24, 3), 128, np.uint8)
    foreground = np.full((20, 24), 0.3)
    foreground[10, 12] = 0.9
    found = refine(image, np.stack([1 - foreground, foreground]), SEC_DSRG)
    assert (found[0] > 0.99).all()


def test_labels_end_at_edges_of_the_image(pydensecrf):
    """Every other row is undecided; its pixels go with their colour."""
    image = np.full((20, 24, 3), 30, np.uint8)
    image[:, 12:] = 220
    foreground = np.full((20, 24), 0.5)
    foreground[::2, :12], foreground[::2, 12:] = 0.2, 0.8
    found = refine(image, np.stack([1 - foreground, foreground]), SEC_DSRG)
    assert np.array_equal(found.argmax(0), image[..., 0] > 100)


def test_the_order_of_colours_and_of_bytes_makes_no_difference(pydensecrf):
    image, prob = draw_scene()
    expected = refine(image, prob, WIDE)
    # The lattice treats dimensions alike only approximately.
    np.testing.assert_allclose(refine(image[..., ::-1], prob, WIDE), expected, atol=0.04)
    strided = np.asfortranarray(prob.astype(np.float64))
    np.testing.assert_array_equal(refine(np.asfortranarray(image), strided, WIDE), expected)


def test_arrays_may_be_read_only(pydensecrf):
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (9, 11, 3), np.uint8)
    prob = random.random((2, 9, 11), np.float32)
    expected = refine(image, prob)
    for array in (image, prob):
        array.flags.writeable = False
    np.testing.assert_array_equal(refine(image, prob), expected)


@pytest.mark.parametrize(
    ("image", "prob", "message"),
    [
        (np.zeros((4, 5), np.uint8), np.ones((2, 4, 5)), r"image has shape \(4, 5\) and dtype uin"),
        (np.zeros((4, 5, 3)), np.ones((2, 4, 5)), r"dtype float64\. Allowed: \(H, W, 3\) uint8"),
        (np.zeros((4, 5, 3), np.uint8), np.ones((2, 5, 4)), r"have shape \(2, 5, 4\), the image"),
        (np.zeros((4, 5, 3), np.uint8), np.ones((0, 4, 5)), r"with at least one label"),
        (np.zeros((4, 5, 3), np.uint8), np.full((2, 4, 5), 3.5), r"go from 3.5 to 3.5\. .*softmax"),
        (np.zeros((4, 5, 3), np.uint8), np.full((2, 4, 5), np.nan), r"go from nan to nan"),
    ],
)
def test_bad_arrays_are_named(image, prob, message):
    with pytest.raises(ValueError, match=message):
        refine(image, prob)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("gaussian_sxy", 0, "above 0"),
        ("bilateral_srgb", np.inf, "above 0, finite"),
        ("bilateral_compat", -1, "0 .without this term. or above"),
        ("gaussian_compat", np.nan, "0 .without this term. or above"),
        ("iterations", 0, "at least 1"),
    ],
)
def test_bad_settings_are_named(name, value, allowed):
    with pytest.raises(ValueError, match=rf"{name} is {value}\. Allowed: {allowed}"):
        change(SEC_DSRG, **{name: value})


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    image, prob = draw_scene()
    for ask in (check_crf, lambda: refine(image, prob)):
        with pytest.raises(ImportError, match=r"needs pydensecrf2.* pip install -e '\.\[crf\]'"):
            ask()


def test_the_library_is_found(pydensecrf):
    check_crf()
