import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from maskx.data.masks import decode_segmentation, encode_masks


@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**16))
def test_encoding_and_decoding_are_inverse(count, height, width, seed):
    masks = np.random.RandomState(seed).random_sample((count, height, width)) > 0.5
    encoded = encode_masks(masks)
    assert len(encoded) == count
    for rle, mask in zip(encoded, masks, strict=True):
        assert isinstance(rle["counts"], str)
        assert np.array_equal(decode_segmentation(rle, height, width), mask)


def test_polygons_are_united():
    square = [1, 1, 3, 1, 3, 3, 1, 3]
    other = [4, 0, 6, 0, 6, 2, 4, 2]
    expected = np.zeros((5, 8), bool)
    expected[1:3, 1:3] = expected[0:2, 4:6] = True
    assert np.array_equal(decode_segmentation([square, other], 5, 8), expected)
