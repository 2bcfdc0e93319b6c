"""A trained run as one file to pass on."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import maskx
from maskx.engine.checkpoints import write_checkpoint
from maskx.engine.model_files import write_model_file
from maskx.engine.runs import Origin, Run, link_run, read_run, write_run
from maskx.engine.training import CHECKPOINT_NAME
from maskx.supervision import split_one_side
from maskx.systems.maskx_rcnn.pipeline import build_detector

NAMES = ("cup", "bowl", "fork")
IMAGE = np.random.RandomState(0).randint(0, 255, (40, 56, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """What a quick start leaves, but for the training."""
    branch = {"predictor": "transfer", "transfer_inputs": "cls", "channels": 8, "num_convs": 1}
    settings = {"backbone": "small", "frozen_norm": False, "image_size": 32, "mask_branch": branch}
    run = Run(
        system="maskx",
        host="pip",
        class_names=NAMES,
        settings=settings,
        split=split_one_side("mine", NAMES, with_masks=("cup",)),
        started_from={"annotations": Origin("ab" * 32, "/home/somebody/secret/train.json")},
    )
    torch.manual_seed(0)
    content = {"model": build_detector(settings, NAMES).state_dict(), "optimizer": {}}
    (tmp_path / "output/maskx").mkdir(parents=True)
    write_run(tmp_path / "output/maskx", run)
    write_checkpoint(
        tmp_path / "output/maskx" / CHECKPOINT_NAME,
        {**content, "run": run.as_json(), "iteration": 1},
    )
    link_run(tmp_path / "output", "maskx")
    metrics = {"system": "maskx", "segm": {"B": {"AP": 12.34}}, "losses": {"end": 1.0}}
    (tmp_path / "output/metrics.json").write_text(json.dumps(metrics))
    return tmp_path / "output"


def test_the_file_opens_as_the_run_does_and_says_what_it_is(folder, tmp_path):
    path = tmp_path / "passed on/cups.safetensors"
    # A process of its own knows the systems only where the command makes them known.
    script = "import sys; from maskx.cli.main import main; sys.exit(main())"
    words = ["export-model", str(folder), "--output", str(path), "--licence", "CC BY 4.0"]
    finished = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True
    )
    assert "cups.md. Complete the card by hand." in finished.stdout, finished.stderr
    run, found = read_run(folder), read_run(path)
    assert (found.class_names, found.split, found.settings) == (NAMES, run.split, run.settings)
    predictions = [
        maskx.open_run(each, device="cpu").masks_of_boxes(IMAGE, [[4, 5, 30, 31]], ["bowl"]).numpy()
        for each in (folder, path)
    ]
    assert np.array_equal(*predictions)
    # A page for people, and where the data lay is nobody's business.
    card = path.with_suffix(".md").read_text()
    for words in (
        "# cups\n",
        "Mask^X R-CNN, trained by maskx",
        "With masks in training (A): cup. Without (B): bowl, fork.",
        "- annotations: train.json, sha256 abab",
        "Licence of the data: CC BY 4.0.",
        "| segm.B.AP | 12.34 |",
        "| mask_branch.predictor | transfer |",
        "No mask taught it the categories without masks (B)",
    ):
        assert words in card
    assert "losses" not in card
    assert "secret" not in card + path.read_bytes().decode("latin-1")


def test_a_card_says_what_was_not_said(folder, tmp_path):
    (folder / "metrics.json").unlink()
    run = read_run(folder)
    write_run(run.folder, replace(run, split=None, started_from={}))
    card = write_model_file(folder, tmp_path / "model.safetensors").read_text()
    assert "Licence of the data: not said; ask who gave you this file." in card
    assert "## Numbers\n\nNone." in card
    assert "## What it learned from\n\nNot said." in card
    assert "(B)" not in card


@pytest.mark.parametrize("name", ["model.safetensors", "model.md"])
def test_neither_file_nor_card_is_replaced_unless_that_is_asked_for(folder, tmp_path, name):
    (tmp_path / name).write_text("mine")
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileExistsError, match=rf"{name} exists already. Add --overwrite"):
        write_model_file(folder, path)
    assert [p.name for p in tmp_path.glob("model.*")] == [name]
    assert write_model_file(folder, path, overwrite=True).read_text().startswith("# model")


def test_a_flipped_bit_a_file_of_something_else_and_another_host_are_refused(folder, tmp_path):
    path = tmp_path / "model.safetensors"
    write_model_file(folder, path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors' is damaged: the values of"):
        maskx.open_run(path)
    path.write_text("no tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors' is no safetensors file"):
        maskx.open_run(path)
    run = read_run(folder)
    write_run(run.folder, replace(run, host="detectron2"))
    with pytest.raises(ValueError, match=r"a run trained with detectron2.*Pass on its folder"):
        write_model_file(folder, tmp_path / "other.safetensors")
