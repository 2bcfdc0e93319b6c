"""Dense CRF: label probabilities that follow the edges of the image.

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials"
(NeurIPS 2011). Every pair of pixels (i, j) with different labels costs (their Eq. 3)

    w_b exp(-|p_i - p_j|² / 2 s_b² - |I_i - I_j|² / 2 s_rgb²) + w_g exp(-|p_i - p_j|² / 2 s_g²)

where p are positions in pixels and I colours in [0, 255]; a label alone costs -log of its
probability. Inference is mean field, by the library pydensecrf2, which normalises both kernels
symmetrically (by the square roots of their sums at both pixels) and counts a pixel among its own
neighbours, both unlike the paper. It filters on the permutohedral lattice, which is approximate.
"""

from dataclasses import dataclass
from types import ModuleType

import numpy as np

__all__ = ["SEC_DSRG", "TRANSFERNET", "CrfSettings", "check_crf", "refine"]

_MIN_PROB = 1e-5  # a probability of 0 would cost more than any neighbours can outweigh
_ROUNDING = 1e-4  # by which resized probabilities may leave [0, 1]


@dataclass(frozen=True, kw_only=True)
class CrfSettings:
    """Pairwise terms and steps of a dense CRF. A term of weight 0 is left out.

    Attributes:
        gaussian_sxy: standard deviation of the smoothing kernel in pixels (s_g).
        gaussian_compat: its weight (w_g).
        bilateral_sxy: standard deviation of the appearance kernel in pixels (s_b).
        bilateral_srgb: its standard deviation in colour, of values in [0, 255] (s_rgb).
        bilateral_compat: its weight (w_b).
        iterations: steps of mean field.

    Raises:
        ValueError: a standard deviation is not above 0, a weight is negative, or there is no step.
    """

    gaussian_sxy: float
    gaussian_compat: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_compat: float
    iterations: int = 10

    def __post_init__(self) -> None:
        for name in ("gaussian_sxy", "bilateral_sxy", "bilateral_srgb"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}. Allowed: above 0, finite.")
        for name in ("gaussian_compat", "bilateral_compat"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}. Allowed: 0 (without this term) or above, "
                    "finite."
                )
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations!r}. Allowed: at least 1.")


SEC_DSRG = CrfSettings(
    gaussian_sxy=3,
    gaussian_compat=3,
    bilateral_sxy=80,
    bilateral_srgb=13,
    bilateral_compat=10,
)
"""What SEC and DSRG use on PASCAL VOC."""

TRANSFERNET = CrfSettings(
    gaussian_sxy=3,
    gaussian_compat=3,
    bilateral_sxy=20,
    bilateral_srgb=3,
    bilateral_compat=5,
)
"""What TransferNet uses on PASCAL VOC."""


def check_crf() -> None:
    """Raise the ImportError of `refine` now, before hours of other work.

    Raises:
        ImportError: pydensecrf2 is not installed.
    """
    _import_densecrf()


def check_no_crf(crf: bool) -> None:
    """Refuse to export a model that refines its predictions."""
    if crf:
        raise ValueError(
            "The model cannot be exported: it refines what it predicts by a dense CRF, which is no "
            "network. Train it without the CRF, or set model.crf False."
        )


def refine(image: np.ndarray, prob: np.ndarray, settings: CrfSettings = SEC_DSRG) -> np.ndarray:
    """Refine label probabilities by a dense CRF.

    Args:
        image: (H, W, 3) uint8. The colours weigh alike, so their order makes no difference.
        prob: (L, H, W) probabilities of the labels; they are clipped at 1e-5 and need not sum to 1.

    Returns:
        (L, H, W) float32 probabilities that sum to 1.

    Raises:
        ImportError: pydensecrf2 is not installed.
        ValueError: the arrays do not fit together, or a probability is not in [0, 1].
    """
    image, prob = np.asarray(image), np.asarray(prob, np.float32)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(
            f"The image has shape {image.shape} and dtype {image.dtype}. Allowed: (H, W, 3) uint8."
        )
    if prob.ndim != 3 or len(prob) == 0 or prob.shape[1:] != image.shape[:2]:
        raise ValueError(
            f"The probabilities have shape {prob.shape}, the image {image.shape}. Allowed: "
            "(L, H, W) with at least one label and the image's H and W."
        )
    if not (prob.min() >= -_ROUNDING and prob.max() <= 1 + _ROUNDING):  # also NaN
        raise ValueError(
            f"The probabilities go from {prob.min()} to {prob.max()}. Allowed: [0, 1]; of logits "
            "take the softmax."
        )
    densecrf = _import_densecrf()
    num_labels, height, width = prob.shape
    crf = densecrf.DenseCRF2D(width, height, num_labels)
    cost = -np.log(np.maximum(prob, _MIN_PROB)).reshape(num_labels, -1)
    crf.setUnaryEnergy(np.ascontiguousarray(cost))
    if settings.gaussian_compat:
        crf.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_compat)
    if settings.bilateral_compat:
        crf.addPairwiseBilateral(
            sxy=settings.bilateral_sxy,
            srgb=settings.bilateral_srgb,
            rgbim=np.require(image, requirements=["C", "W"]),  # the library asks for it
            compat=settings.bilateral_compat,
        )
    refined = np.array(crf.inference(settings.iterations), np.float32)
    return refined.reshape(num_labels, height, width)


def _import_densecrf() -> ModuleType:
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        raise ImportError(
            "The dense CRF needs pydensecrf2, which is compiled when it is installed. Install it "
            "with: pip install -e '.[crf]' or pip install pydensecrf2, or go without the CRF."
        ) from error
    return densecrf
