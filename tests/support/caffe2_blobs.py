"""Synthetic weights files as Detectron on Caffe2 saved them: same names and layouts, any width.

Tests read this file with ``runpy``.
"""

import io
import pickle

import numpy as np

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
FULL = {"stem": 64, "inner": 64, "res2": 256, "fpn": 256, "fc": 1024, "mask": 256, "pool": 14}
NARROW = {"stem": 8, "inner": 4, "res2": 16, "fpn": 8, "fc": 12, "mask": 6, "pool": 4}


def make_blobs(
    *, depth=50, rows=5, masks="cls+box", layers=2, mlp=False, rpn=True, widths=NARROW, fill=None
):
    """Blobs of a detector with ``rows`` classes, background included.

    ``masks``: an input of T ("cls", "box", "cls+box", "v_glove", "v_randn_0"), "agnostic",
    "specific" or None. ``fill``: one value for all weights, to be fast.
    """
    generator, blobs = np.random.default_rng(0), {}
    stem, inner, fpn, fc, mask = (widths[n] for n in ("stem", "inner", "fpn", "fc", "mask"))

    def param(name, shape, std, mean=0.0):
        if fill is not None:
            blobs[name] = np.full(shape, fill, np.float32)
        else:
            blobs[name] = (mean + std * generator.standard_normal(shape)).astype(np.float32)

    def layer(name, *shape, gain=2.0):
        param(f"{name}_w", shape, (gain / np.prod(shape[1:])) ** 0.5)
        param(f"{name}_b", shape[:1], 0.1)

    def conv_affine(name, *shape, norm=None, scale=1.0):
        param(f"{name}_w", shape, (2 / np.prod(shape[1:])) ** 0.5)
        param(f"{norm or name + '_bn'}_s", shape[:1], 0.1, scale)
        param(f"{norm or name + '_bn'}_b", shape[:1], 0.1)

    # 0.01: the image has values in the hundreds.
    conv_affine("conv1", stem, 3, 7, 7, norm="res_conv1_bn", scale=0.01)
    previous = stem
    for stage, blocks in zip((2, 3, 4, 5), BLOCKS[depth], strict=True):
        dim, out = inner * 2 ** (stage - 2), widths["res2"] * 2 ** (stage - 2)
        for block in range(blocks):
            name = f"res{stage}_{block}_branch"
            conv_affine(f"{name}2a", dim, previous, 1, 1)
            conv_affine(f"{name}2b", dim, dim, 3, 3)
            conv_affine(f"{name}2c", out, dim, 1, 1, scale=0.2)
            if block == 0:
                conv_affine(f"{name}1", out, previous, 1, 1)
            previous = out
        top = f"res{stage}_{blocks - 1}_sum"
        layer(f"fpn_inner_{top}" + ("" if stage == 5 else "_lateral"), fpn, out, 1, 1)
        layer(f"fpn_{top}", fpn, fpn, 3, 3)
    if rpn:
        layer("conv_rpn_fpn2", fpn, fpn, 3, 3)
        layer("rpn_cls_logits_fpn2", 3, fpn, 1, 1)
        layer("rpn_bbox_pred_fpn2", 12, fpn, 1, 1)

    layer("fc6", fc, fpn * 49)
    layer("fc7", fc, fc)
    layer("cls_score", rows, fc)
    layer("bbox_pred", rows * 4, fc)
    if masks is None:
        return blobs

    for index in (1, 2, 3, 4):
        layer(f"_[mask]_fcn{index}", mask, fpn if index == 1 else mask, 3, 3)
    layer("conv5_mask", mask, mask, 2, 2)
    if masks == "agnostic":
        layer("mask_fcn_logits", 1, mask, 1, 1)
    elif masks == "specific":
        layer("mask_fcn_logits", rows, mask, 1, 1)
    else:
        length = {"cls": fc, "box": 4 * fc, "cls+box": 5 * fc}.get(masks, 300)
        if masks.startswith("v_"):
            param(masks, (rows, length), 0.3)
            blobs[masks][0] = 0
        names = {
            1: ["mask_fcn_logits_w_flat"],
            2: ["bbox2mask_mlp_l1", "mask_fcn_logits_w_flat"],
            3: ["bbox2mask_mlp_l1", "bbox2mask_mlp_l2", "mask_fcn_logits_w_flat"],
        }[layers]
        for name in names:
            layer(name, mask, length)
            length = mask
    if mlp:
        pixels = (2 * widths["pool"]) ** 2
        layer("mask_mlp_logits_raw", pixels, mask * pixels)
    return blobs


def write_python2_pickle(path, content):
    """Pickle as Python 2 with numpy 1 did: protocol 2, every string a byte string."""
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(content)
    path.write_bytes(buffer.getvalue().replace(b"numpy._core.", b"numpy.core."))
    return path


class _Python2Pickler(pickle._Pickler):
    def save_string(self, value):
        data = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}
