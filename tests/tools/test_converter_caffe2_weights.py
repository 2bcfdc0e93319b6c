import collections
import copyreg
import pickle
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from converters.caffe2_weights import (
    convert_caffe2_blobs,
    convert_caffe2_file,
    read_caffe2_file,
    save_detectron2_checkpoint,
)

CAFFE2 = runpy.run_path(str(Path(__file__).parents[1] / "support" / "caffe2_blobs.py"))
make_blobs, write_python2_pickle = CAFFE2["make_blobs"], CAFFE2["write_python2_pickle"]

ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big_endian": np.array([1.5, -2.0], dtype=">f4"),
    "half": np.array([[0.5]], dtype=np.float16),
    "int": np.array([-1, 300], dtype=np.int64),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), dtype=np.float32),
    "scalar": np.float32(2.5),
    "bytes_above_127": np.array([-1.234567e-30], dtype=np.float64),
}


def write(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model_final.pkl"


# Reading


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, "python 2"])
def test_arrays_are_read_as_they_were_written(path, protocol):
    content = {"blobs": {**ARRAYS, "none": None}, "cfg": "USE_LEAKYRELU: true"}
    if protocol == "python 2":
        write_python2_pickle(path, content)
        assert b"numpy.core.multiarray" in path.read_bytes()
    else:
        write(path, content, protocol)
    blobs, config_text = read_caffe2_file(path)
    assert config_text == "USE_LEAKYRELU: true"
    assert blobs.pop("none") is None
    assert set(blobs) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert blobs[name].dtype == array.dtype
        np.testing.assert_array_equal(blobs[name], array)


def test_plain_containers_are_read(path):
    extra = collections.OrderedDict(a=[1, (2.5, b"x"), {"b": True}], b="\u00e9", c=b"")
    write(path, {"blobs": collections.OrderedDict(x=ARRAYS["float"]), "extra": extra})
    blobs, config_text = read_caffe2_file(path)
    np.testing.assert_array_equal(blobs["x"], ARRAYS["float"])
    assert config_text == ""


def call(function, argument):
    """The opcodes of protocol 0 that call a function, given as "module name", with a string."""
    module, name = function.split()
    return f"c{module}\n{name}\n(V{argument}\ntR".encode()


FUNCTIONS = [
    "posix system",
    "os system",
    "subprocess getoutput",
    "runpy run_path",
    "pickle loads",
    "builtins eval",
    "__builtin__ eval",
    "builtins exec",
    "builtins getattr",
    "builtins open",
    "builtins bytes",
    "builtins __import__",
    "functools partial",
    "operator attrgetter",
    "numpy load",
    "numpy fromfile",
    "numpy.core.multiarray fromfile",
    "numpy.lib.npyio load",
    "_codecs decode",
    "codecs encode",
    "copy_reg _reconstructor",
    "torch load",
    "numpy matrix",
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_file_that_names_a_function_is_refused(path, function):
    path.write_bytes(b"(dVblobs\n" + call(function, "x") + b"s.")
    name = function.replace(" ", r"\.")
    with pytest.raises(ValueError, match=rf"model_final.pkl holds code: {name} would be called"):
        read_caffe2_file(path)


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w').close()",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_code_in_a_file_does_not_run(tmp_path, path, protocol):
    marker = tmp_path / "marker"
    write(path, {"blobs": {**ARRAYS, "conv1_w": Attack(marker)}}, protocol)
    with pytest.raises(ValueError, match=r"holds code: (__builtin__|builtins)\.eval would be"):
        convert_caffe2_file(path, allow_unknown=True)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # the attack is a real one


@pytest.mark.parametrize("opcode", [b"(Vx\nios\nsystem\n", b"\x8c\x02os\x8c\x06system\x93"])
def test_no_opcode_goes_round_the_check_of_names(path, opcode):
    path.write_bytes(b"(dVblobs\n(dVx\n" + opcode + b"ss.")
    with pytest.raises(ValueError, match=r"model_final.pkl holds code: os\.system would be called"):
        read_caffe2_file(path)


def test_what_the_process_knows_by_an_extension_code_is_not_called(path):
    called = []
    copyreg.add_extension("os", "system", 240)
    copyreg._extension_cache[240] = called.append  # as if an earlier pickle had used it
    try:
        path.write_bytes(b"(dVblobs\n(dVx\n\x82\xf0(Vx\ntRss.")
        with pytest.raises(ValueError, match="holds code: extension code 240 would be called"):
            read_caffe2_file(path)
        assert called == []
        pickle.loads(path.read_bytes())
        assert called == ["x"]  # the attack is a real one
    finally:
        copyreg.remove_extension("os", "system", 240)
        copyreg._extension_cache.clear()


REDUCTIONS = {
    "object array": (np.array([{"a": 1}], dtype=object), "type 'O8'; only numbers"),
    "text array": (np.array(["abc"]), "type 'U3'; only numbers"),
    "records": (np.zeros(2, dtype=[("a", "f4")]), "type 'V4'; only numbers"),
    "dates": (np.array(["2018-04-26"], dtype="M8[D]"), "type 'M8'; only numbers"),
}


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_an_array_of_anything_but_numbers_is_refused(path, kind):
    array, message = REDUCTIONS[kind]
    write(path, {"blobs": {"conv1_w": array}})
    with pytest.raises(ValueError, match=message):
        read_caffe2_file(path)


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
FLOAT = b"cnumpy\ndtype\n(Vf4\nI0\nI1\ntR"
CRAFTED = {
    # State of a function: an attribute that would stay changed after reading.
    "changes a function": RECONSTRUCT + b"}V__defaults__\n(I1\ntsb",
    # A type whose numbers are replaced by records or a sub-array in its state.
    "has records": FLOAT + b"(I3\nV<\nN(Va\nt}I4\nI4\nI0\ntb",
    "an array is made in an unknown way": b"cnumpy\nndarray\n(I2\ntR",
    # More elements than there are bytes.
    "cannot reshape": RECONSTRUCT + b"(NtR(I1\n(I1000000\nt" + FLOAT + b"I00\nVabcd\ntb",
    "encoded as 'rot13'": b"c_codecs\nencode\n(Vabc\nVrot13\ntR",
    "takes 0 positional arguments": b"c__builtin__\nbytes\n(I1000000000000\ntR",
    "persistent": b"Pevil\n",
    # An attribute that hides a method of the container.
    "'dict' object has no attribute": b"ccollections\nOrderedDict\n)R}Vitems\nI1\nsb",
    "X is not a type": b"cnumpy\ndtype\n(Vf4\nt\x81",
}


@pytest.mark.parametrize("message", CRAFTED)
def test_a_crafted_file_is_refused(path, message):
    path.write_bytes(b"(dVblobs\n(dVx\n" + CRAFTED[message] + b"ss.")
    with pytest.raises(ValueError, match=rf"model_final.pkl is no weights.*{message}"):
        read_caffe2_file(path)
    np.testing.assert_array_equal(
        read_caffe2_file(write(path, {"blobs": ARRAYS}))[0]["int"], [-1, 300]
    )


def test_a_damaged_or_foreign_file_is_refused(path):
    with pytest.raises(FileNotFoundError, match=r"model_final.pkl: there is no such weights file"):
        read_caffe2_file(path)
    whole = write(path, {"blobs": {"x": ARRAYS["float"]}}).read_bytes()
    cut_off = [whole[:length] for length in range(len(whole))]
    for damaged in (*cut_off, b"PK\x03\x04 a zip file", b"<html>404</html>"):
        path.write_bytes(damaged)
        # The name of a function, cut off, is that of another one.
        with pytest.raises(ValueError, match=r"is damaged: \w|holds code: "):
            read_caffe2_file(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"model": {}, "iteration": 3}, "'model', 'iteration'"),
        ({"blobs": {}}, "'blobs'"),
        ({"blobs": [1]}, "'blobs'"),
        ([1, 2], "no dictionary"),
        (np.zeros(3), "no dictionary"),
    ],
)
def test_a_file_without_blobs_is_refused(path, content, found):
    write(path, content)
    with pytest.raises(ValueError, match=rf"has no 'blobs'; it holds: {found}. Allowed: a model"):
        read_caffe2_file(path)


# Naming

REST = {
    "conv1_b": np.zeros(8, np.float32),
    "res2_0_branch2a_b": np.zeros(4, np.float32),
    "res2_0_branch1_b": np.zeros(16, np.float32),
    "fc1000_w": np.zeros((1000, 128), np.float32),
    "fc1000_b": np.zeros(1000, np.float32),
    "fc6_w_momentum": np.zeros((12, 8 * 49), np.float32),
    "_[mask]_fcn1_w_momentum": np.zeros((6, 8, 3, 3), np.float32),
    "lr": np.float32(0.02),
    "preserved": None,
}
ARCHITECTURES = {
    "full method": {"mlp": True},
    "R-101": {"depth": 101, "rows": 81, "mlp": True},
    "3 layers": {"layers": 3},
    "1 layer of cls": {"layers": 1, "masks": "cls"},
    "box": {"masks": "box"},
    "GloVe": {"masks": "v_glove"},
    "randn": {"masks": "v_randn_0"},
    "baseline": {"masks": "agnostic"},
    "baseline with MLP": {"masks": "agnostic", "mlp": True},
    "oracle": {"masks": "specific"},
    "Faster R-CNN": {"masks": None},
    "Fast R-CNN": {"masks": None, "rpn": False},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_architecture_is_read_off_the_blobs(name):
    arguments = ARCHITECTURES[name]
    blobs = make_blobs(**arguments)
    found = convert_caffe2_blobs(blobs | REST)
    masks, architecture = arguments.get("masks", "cls+box"), found.architecture
    assert architecture.depth == arguments.get("depth", 50)
    assert architecture.num_classes == arguments.get("rows", 5) - 1
    assert architecture.has_rpn == arguments.get("rpn", True)
    predictors = {"agnostic": "class_agnostic", "specific": "class_specific", None: None}
    assert architecture.predictor == predictors.get(masks, "transfer")
    assert architecture.num_convs == (0 if masks is None else 4)
    assert architecture.mlp == ("single_fc" if arguments.get("mlp") else "none")
    if architecture.predictor == "transfer":
        assert architecture.transfer_layers == arguments.get("layers", 2)
        inputs = {"v_glove": "vectors", "v_randn_0": "randn"}
        assert architecture.transfer_inputs == inputs.get(masks, masks)
    else:
        assert architecture.transfer_layers is architecture.transfer_inputs is None
    assert sorted(found.converted) == sorted(blobs)
    assert found.unknown == {}
    assert set(found.left_out) == set(REST)
    # Two statistics for each batch norm; everything is plain float32.
    norms = sum(name.endswith("_bn_s") for name in blobs)
    assert len(found.weights) == len(blobs) + 2 * norms
    assert {weight.dtype for weight in found.weights.values()} == {torch.float32}


@pytest.mark.parametrize("masks", [None, "cls+box"])
def test_a_box_predictor_that_was_cut_down_to_coco_has_all_its_rows_again(masks):
    whole = make_blobs(rows=9, masks=masks)
    names = [f"{layer}_{kind}" for layer in ("cls_score", "bbox_pred") for kind in "wb"]
    cut = whole | {f"{name}_jcvbackup": whole[name] for name in names}
    cut |= {name: whole[name][: len(whole[name]) * 5 // 9] for name in names}
    expected, found = convert_caffe2_blobs(whole), convert_caffe2_blobs(cut)
    assert found.architecture == expected.architecture
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[name], expected.weights[name]) for name in found.weights)
    assert set(found.converted) == set(cut) - set(names)
    reason = "rows of COCO, cut out of the backup that has all classes"
    assert found.left_out == dict.fromkeys(sorted(names), reason)
    del cut["bbox_pred_b_jcvbackup"]
    with pytest.raises(ValueError, match=r"missing \(1\): 'bbox_pred_b_jcvbackup'\. The file is"):
        convert_caffe2_blobs(cut)


def test_only_the_background_rows_move():
    blobs = make_blobs(rows=4)
    blobs["cls_score_b"] = np.array([0, 1, 2, 3], np.float32)
    blobs["bbox_pred_b"] = np.arange(16, dtype=np.float32)
    weights = convert_caffe2_blobs(blobs).weights
    predictor = "roi_heads.box_predictor"
    assert weights[f"{predictor}.cls_score.bias"].tolist() == [1, 2, 3, 0]
    assert weights[f"{predictor}.bbox_pred.bias"].tolist() == list(range(4, 16))
    for blob, weight in {
        "cls_score_w": weights[f"{predictor}.cls_score.weight"].roll(1, 0),
        "fc6_w": weights["roi_heads.box_head.fc1.weight"],
        "conv5_mask_w": weights["roi_heads.mask_head.deconv.weight"],
        "mask_fcn_logits_w_flat_w": weights["roi_heads.mask_head.predictor.layers.2.weight"],
        "fpn_inner_res4_5_sum_lateral_w": weights["backbone.fpn_lateral4.weight"],
        "rpn_bbox_pred_fpn2_w": weights["proposal_generator.rpn_head.anchor_deltas.weight"],
        "res3_0_branch1_bn_s": weights["backbone.bottom_up.res3.0.shortcut.norm.weight"],
    }.items():
        np.testing.assert_array_equal(weight, blobs[blob], err_msg=blob)

    # Detectron2's frozen batch norm, with its eps, must be the bare scale and bias.
    norm = "backbone.bottom_up.res3.0.shortcut.norm"
    assert weights[f"{norm}.running_mean"].tolist() == [0] * 32
    scale = (weights[f"{norm}.running_var"] + 1e-5).rsqrt()
    torch.testing.assert_close(scale, torch.ones(32), rtol=0, atol=1e-7)

    oracle = convert_caffe2_blobs(blobs := make_blobs(rows=4, masks="specific")).weights
    mask_weight = oracle["roi_heads.mask_head.predictor.weight"]
    np.testing.assert_array_equal(mask_weight, blobs["mask_fcn_logits_w"][1:])
    vectors = convert_caffe2_blobs(blobs := make_blobs(rows=4, masks="v_glove")).weights
    class_vectors = vectors["roi_heads.mask_head.predictor.class_vectors"]
    np.testing.assert_array_equal(class_vectors, blobs["v_glove"][1:])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dictitems: {BBOX2MASK_ON: true, USE_LEAKYRELU: true}", "leaky_relu"),
        ("  USE_LEAKYRELU:\n    false", "relu"),
        ("", None),
    ],
)
def test_the_activation_of_t_comes_from_the_configuration_of_the_file(path, text, expected):
    for layers in (1, 2):
        content = {"blobs": make_blobs(layers=layers), "cfg": text}
        found = convert_caffe2_file(write_python2_pickle(path, content)).architecture
        assert found.transfer_activation == (expected if layers == 2 else None)


def test_of_several_class_vectors_the_configuration_says_which():
    blobs = make_blobs(masks="v_glove")
    blobs["v_randn_0"] = 2 * blobs["v_glove"]
    for name, inputs in {"v_glove": "vectors", "v_randn_0": "randn"}.items():
        for text in (name, f"!!python/str '{name}'"):
            found = convert_caffe2_blobs(blobs, f"x: 1\nPRETRAINED_EMBED_NAME: {text}\ny: 2")
            assert found.architecture.transfer_inputs == inputs
            vectors = found.weights["roi_heads.mask_head.predictor.class_vectors"]
            np.testing.assert_array_equal(vectors, blobs[name][1:])
            assert list(found.left_out) == [({"v_glove", "v_randn_0"} - {name}).pop()]
    with pytest.raises(ValueError, match=r"reads 300 numbers .* are 2: 'v_glove', 'v_randn_0'\."):
        convert_caffe2_blobs(blobs)
    del blobs["v_glove"], blobs["v_randn_0"]
    with pytest.raises(ValueError, match=r"\('bbox2mask_mlp_l1_w'\).* of shape \(5, 300\).* none"):
        convert_caffe2_blobs(blobs)
    unused = convert_caffe2_blobs(make_blobs(masks=None) | {"v_glove": np.zeros((5, 300))})
    assert unused.left_out == {"v_glove": "class vectors that this mask head does not read"}


def test_an_unknown_blob_is_an_error_unless_allowed(path):
    blobs = make_blobs() | {"kps_score_w": np.zeros((3, 2), np.float32), "note": "text"}
    write(path, {"blobs": blobs})
    message = (
        r"pkl: Blobs .* not known \(2\): 'kps_score_w \(3, 2\)', 'note str'\..*--allow-unknown"
    )
    with pytest.raises(ValueError, match=message):
        convert_caffe2_file(path)
    found = convert_caffe2_file(path, allow_unknown=True)
    assert found.unknown == {"kps_score_w": "(3, 2)", "note": "str"}
    assert len(found.weights) == len(convert_caffe2_blobs(make_blobs()).weights)


@pytest.mark.parametrize(
    "lost",
    [
        "conv1_w",
        "res_conv1_bn_b",
        "res4_3_branch2b_bn_s",
        "res5_0_branch1_w",
        "fpn_res3_3_sum_b",
        "conv_rpn_fpn2_w",
        "fc7_b",
        "cls_score_w",
        "bbox_pred_b",
        "_[mask]_fcn2_w",
        "conv5_mask_w",
        "bbox2mask_mlp_l1_b",
        "mask_fcn_logits_w_flat_w",
        "mask_mlp_logits_raw_w",
    ],
)
def test_every_weight_of_a_layer_must_be_there(lost):
    blobs = make_blobs(mlp=True)
    del blobs[lost]
    with pytest.raises(ValueError, match="Blobs of a ResNet-50 FPN detector are missing") as error:
        convert_caffe2_blobs(blobs, allow_unknown=True)
    assert f"missing (1): '{lost}'. The file is incomplete" in str(error.value)


def test_missing_blobs_are_named_in_part():
    blobs = {n: b for n, b in make_blobs().items() if not n.startswith("fpn_")}
    with pytest.raises(
        ValueError, match=r"missing \(16\): 'fpn_inner_res2_2_sum_lateral_w'.* and 8 more"
    ):
        convert_caffe2_blobs(blobs)


def test_a_backbone_of_another_kind_is_refused():
    blobs = {n: b for n, b in make_blobs().items() if not n.startswith("res4_5")}
    with pytest.raises(
        ValueError, match=r"have \(3, 4, 5, 3\) blocks.*\(3, 4, 6, 3\) \(ResNet-50\)"
    ):
        convert_caffe2_blobs(blobs)


WRONG_SHAPES = {
    "res3_1_branch2b_w": ((8, 8, 1, 1), (8, 8, 3, 3)),
    "res3_1_branch2b_bn_s": ((9,), (8,)),
    "fpn_inner_res3_3_sum_lateral_w": ((8, 33, 1, 1), (8, 32, 1, 1)),
    "rpn_bbox_pred_fpn2_w": ((13, 8, 1, 1), (12, 8, 1, 1)),
    "fc6_w": ((12, 8 * 50), (12, 8 * 49)),
    "cls_score_w": ((5,), (5, 12)),
    "bbox_pred_w": ((8, 12), (20, 12)),  # class-agnostic box regression
    "conv5_mask_b": ((7,), (6,)),
    "mask_fcn_logits_w_flat_w": ((6, 12), (6, 6)),
    "mask_mlp_logits_raw_w": ((65, 6 * 64), (64, 6 * 64)),
}


@pytest.mark.parametrize("blob", WRONG_SHAPES)
def test_a_wrong_shape_is_refused(blob):
    wrong, expected = WRONG_SHAPES[blob]
    blobs = make_blobs(mlp=True) | {blob: np.ones(wrong, np.float32)}
    with pytest.raises(ValueError, match="has shape") as error:
        convert_caffe2_blobs(blobs)
    message = f"Blob '{blob}' has shape {wrong}, but {expected} goes with the other blobs."
    assert str(error.value) == message


@pytest.mark.parametrize("value", [np.float32("nan"), np.float32("inf"), np.int64(1)])
def test_a_weight_must_be_a_finite_number(value):
    blobs = make_blobs()
    blobs["fc7_w"] = np.full((12, 12), value)
    with pytest.raises(ValueError, match=r"Blob 'fc7_w' \(\w+\) holds something else than finite"):
        convert_caffe2_blobs(blobs)


def test_the_checkpoint_holds_tensors_alone_and_none_of_what_was_left_out(tmp_path):
    converted = convert_caffe2_blobs(make_blobs() | REST)
    target = tmp_path / "new" / "maskx.pth"
    save_detectron2_checkpoint(converted, target)
    content = torch.load(target, weights_only=True)
    assert content["__author__"] == "seg_every_thing"
    assert content["matching_heuristics"] is False
    assert content["model"].keys() == converted.weights.keys()
    for name, weight in content["model"].items():
        assert torch.equal(weight, converted.weights[name])
        assert weight.untyped_storage().nbytes() == 4 * weight.numel()
    with pytest.raises(ValueError, match=r"maskx.pkl must end in '.pth'"):
        save_detectron2_checkpoint(converted, tmp_path / "maskx.pkl")
