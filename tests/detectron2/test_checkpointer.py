"""Files that a killed process, a full disk or an attacker leaves."""

import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from maskx.detectron2.checkpointer import MaskXCheckpointer
from maskx.detectron2.config import read_config


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["MASKX_TEST_EVIL"],)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A folder that exists only if hostile code ran."""
    folder = tmp_path / "code_ran"
    monkeypatch.setenv("MASKX_TEST_EVIL", str(folder))
    return folder


@pytest.fixture
def checkpointer(tmp_path):
    torch.manual_seed(0)
    return MaskXCheckpointer(nn.Linear(2, 2), str(tmp_path / "run"), save_to_disk=True)


@pytest.fixture
def run(checkpointer):
    folder = checkpointer.save_dir
    os.makedirs(folder)
    return folder


def test_a_key_that_a_base_repeats_is_an_error_but_a_child_may_override(tmp_path):
    base, child = tmp_path / "base.yaml", tmp_path / "child.yaml"
    base.write_text("SEED: 1\nMODEL: {DEVICE: cpu}\n")
    child.write_text("_BASE_: base.yaml\nSEED: 2\n")
    assert read_config(child).SEED == 2
    base.write_text("SEED: 1\nMODEL: {DEVICE: cpu}\nSEED: 3\n")
    with pytest.raises(ValueError, match="'SEED' stands twice"):
        read_config(child)


@pytest.mark.parametrize("where", ["itself", "base"])
def test_a_configuration_runs_no_code(tmp_path, evil, where):
    hostile = f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{evil}']\n"
    file = tmp_path / "evil.yaml"
    file.write_text(hostile)
    if where == "base":
        (tmp_path / "child.yaml").write_text("_BASE_: evil.yaml\nSEED: 1\n")
        file = tmp_path / "child.yaml"
    with pytest.raises(ValueError, match=r"not plain YAML: .*!!python are never run"):
        read_config(file)
    assert not evil.exists()


ANCHORS = "INPUT:\n  a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"  a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 20)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("_BASE_: bad.yaml", "is based on itself"),
        ("_BASE_: 5", "_BASE_ is no path"),
        ("_BASE_: none.yaml", r"none\.yaml': No such file"),
        ("", "holds no keys"),
        ("- a", r"holds \['a'\]"),
        ("hello", "holds 'hello'"),
        ("MODEL: 5", "MODEL is 5"),
        ("VERSION: x", "VERSION is 'x'"),
        ("null: 5", "has keys"),
        ("MODEL:\n  DEVICE: cpu\n  DEVICE: cuda\n", "'DEVICE' stands twice"),
        ("MODEL: " + "[" * 5000 + "]" * 5000, "nested too deep"),
        ("OUTPUT_DIR: caf\xe9", "not text in UTF-8"),
        (ANCHORS, "more than 100000 values"),
    ],
)
def test_a_configuration_that_is_none_is_named(tmp_path, text, words):
    file = tmp_path / "bad.yaml"
    file.write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=rf"bad\.yaml.*{words}"):
        read_config(file)


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml': there is no such config file"):
        read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("ending", [".pkl", ".pth", ".pyth"])
def test_weights_run_no_code(checkpointer, tmp_path, evil, ending):
    file = tmp_path / f"weights{ending}"
    if ending == ".pkl":
        file.write_bytes(pickle.dumps({"model": Evil(), "__author__": "x"}))
    else:
        torch.save({"model": Evil()}, file)
    with pytest.raises(ValueError, match=r"weights\.p\w+'? (holds code|is no checkpoint)"):
        checkpointer.load(str(file))
    assert not evil.exists()


def test_weights_of_the_model_zoo_load(checkpointer, tmp_path):
    weights = {"weight": np.full((2, 2), 3, np.float32), "bias": np.ones(2, np.float32)}
    file = tmp_path / "zoo.pkl"
    file.write_bytes(pickle.dumps({"model": weights, "__author__": "zoo"}))
    checkpointer.load(str(file))
    assert (checkpointer.model.weight == 3).all()
    assert (checkpointer.model.bias == 1).all()


def test_weights_of_pycls_load(checkpointer, tmp_path):
    weights = {"weight": torch.full((2, 2), 3.0), "bias": torch.ones(2)}
    torch.save({"model_state": weights}, tmp_path / "pycls.pyth")
    checkpointer.load(str(tmp_path / "pycls.pyth"))
    assert (checkpointer.model.weight == 3).all()


@pytest.mark.parametrize(
    ("ending", "content", "words"),
    [
        (".pth", {"model": 5}, "int in the place"),
        (".pth", {"model": {"a": 5}}, "'a': int in the place"),
        (".pkl", {"model": 5, "__author__": "x"}, "int in the place"),
        (".pkl", {"blobs": 5}, "int in the place"),
        (".pkl", {"model": {"a": ["text"]}, "__author__": "x"}, "'a': list in the place"),
        (".pyth", {"model": {}}, "NoneType in the place"),
    ],
)
def test_what_is_no_weights_is_named(checkpointer, tmp_path, ending, content, words):
    file = tmp_path / f"weights{ending}"
    if ending == ".pkl":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=rf"weights\{ending}' holds {words}"):
        checkpointer.load(str(file))


@pytest.mark.parametrize("kind", ["twice", "within"])
def test_a_pickle_costs_what_it_is_long(checkpointer, tmp_path, kind):
    content = ["text"]
    for _ in range(40):  # 10^12 values, of a file of 300 bytes
        content = [content, content]
    if kind == "within":
        content[0] = content
    file = tmp_path / "weights.pkl"
    file.write_bytes(pickle.dumps({"model": {"a": content}, "__author__": "x"}))
    with pytest.raises(ValueError, match=r"weights\.pkl"):
        checkpointer.load(str(file))


@pytest.mark.parametrize("named", [b"\0" * 16, b"caf\xe9", b"a" * 5000, b"."])
def test_whatever_last_checkpoint_holds_the_newest_is_found(checkpointer, run, named):
    checkpointer.save("model_0000001", iteration=1)
    with open(os.path.join(run, "last_checkpoint"), "wb") as file:
        file.write(named)
    assert checkpointer.get_checkpoint_file() == os.path.join(run, "model_0000001.pth")


def test_weights_that_are_not_finite_replace_nothing(checkpointer, run):
    checkpointer.save("model_0000001", iteration=1)
    with torch.no_grad():
        checkpointer.model.weight[0, 0] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"1 of 2 weights are not finite after iteration 3"
    ):
        checkpointer.save("model_0000003", iteration=3)
    assert checkpointer.get_checkpoint_file() == os.path.join(run, "model_0000001.pth")


@pytest.mark.parametrize("harm", ["empty last", "last is cut off", "last is missing", "bit"])
def test_the_newest_whole_checkpoint_is_gone_on_from(checkpointer, run, harm):
    checkpointer.save("model_0000001", iteration=1)
    os.utime(os.path.join(run, "model_0000001.pth"), (1, 1))
    checkpointer.save("model_final", iteration=3)
    final, expected = os.path.join(run, "model_final.pth"), "model_0000001.pth"
    if harm == "empty last":
        open(os.path.join(run, "last_checkpoint"), "w").close()
        expected = "model_final.pth"
    elif harm == "last is cut off":
        os.truncate(final, os.path.getsize(final) // 2)
    elif harm == "last is missing":
        os.remove(final)
    else:
        with open(final, "r+b") as file:
            content = file.read()
            place = content.index(checkpointer.model.weight.detach().numpy().tobytes())
            file.seek(place)
            file.write(bytes([content[place] ^ 1]))
    assert checkpointer.has_checkpoint()
    assert checkpointer.get_checkpoint_file() == os.path.join(run, expected)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] in (1, 3)


def test_without_a_whole_checkpoint_there_is_none(checkpointer, run):
    assert not checkpointer.has_checkpoint()
    open(os.path.join(run, "model_final.pth"), "w").close()
    assert not checkpointer.has_checkpoint()
