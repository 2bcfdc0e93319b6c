"""Exported programs, run as somebody without maskx runs them."""

import io
import json

import pytest
import torch


def run_program(path):
    """Return a function of tensors, by position, and what the file says of itself."""
    if path.suffix == ".pt2":
        extra = {"maskx.json": ""}
        program = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra)
        return program.module(), json.loads(extra["maskx.json"])
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `test` has it")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*tensors):
        found = session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
        return tuple(map(torch.from_numpy, found))

    said = session.get_modelmeta().custom_metadata_map
    said |= {key: json.loads(said[key]) for key in ("class_names", "inputs", "outputs", "about")}
    return run, said


def export_or_skip(run_folder, output):
    """Export by the command line; skipped where ONNX needs what is not installed."""
    from maskx.cli.main import main

    if output.suffix == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="the extra `export` is not installed")
    assert not main(["export-model", str(run_folder), "--output", str(output)])
    return run_program(output)


def some_images(sizes=((32, 32), (40, 75), (90, 33), (200, 150))):
    """Images (1, 3, H, W) of several sizes with coarse structure, and their pixels in uint8."""
    generator = torch.Generator().manual_seed(1)
    for size in sizes:
        coarse = torch.rand(1, 3, 6, 6, generator=generator) * 255
        image = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 255).round()
        yield image, image[0].permute(1, 2, 0).to(torch.uint8).numpy()
