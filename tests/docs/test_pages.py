"""The examples of the pages, run one after another, and the API reference."""

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from maskx.cli.main import main
from maskx.data.scenes.generator import generate_scenes

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the page has it."""
    root = tmp_path_factory.mktemp("page")
    for seed, name in enumerate(("train", "val")):
        path = generate_scenes(root / name, count=4, size=64, num_categories=4, seed=seed)
        content = json.loads(path.read_text())
        for image in content["images"]:
            del image["stuff_file_name"]
        (root / f"{name}.json").write_text(json.dumps(content))
    names = [category["name"] for category in content["categories"]]
    (root / "with_masks.txt").write_text("\n".join(names[:2]))
    content = json.loads((root / "train.json").read_text())
    for annotation in content["annotations"]:
        if annotation["category_id"] > 2:
            del annotation["segmentation"]
    (root / "train.json").write_text(json.dumps(content))
    cv2.imwrite(str(root / "photo.jpg"), cv2.imread(str(next((root / "val").rglob("*.png")))))
    words = ["--masks-for", str(root / "with_masks.txt"), "--output", str(root / "run")]
    for name in ("train", "val"):
        words += [f"--coco-{name}", str(root / f"{name}.json"), str(root / name)]
    small = ["--image-size", "64", "--iterations", "1", "--batch-size", "2", "--device", "cpu"]
    assert main(["train", *words, *small]) == 0
    return root


def test_the_examples_in_your_own_code(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    has_detectron2 = importlib.util.find_spec("detectron2") is not None
    page = (DOCS / "in_your_own_code.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) > 8
    names = {}
    for block in blocks:
        if has_detectron2 or not block.startswith("# needs Detectron2"):
            exec(compile(block, str(DOCS / "in_your_own_code.md"), "exec"), names)
    assert names["picture"].shape[2] == 3
    assert names["sure"].masks.shape[1:] == (64, 64)
    assert names["completion"].masks
    assert Path("photo_masks.png").is_file()
    assert "segm" in capsys.readouterr().out


def test_the_notebook_completes_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = json.loads((DOCS / "half_labelled.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == "code"]
    names = {}
    for cell in cells:  # as nbclient does, without a kernel
        small = cell.replace("ITERATIONS = 300", "ITERATIONS = 1").replace("count=40", "count=6")
        exec(compile(small, "half_labelled.ipynb", "exec"), names)
    assert names["ITERATIONS"] == 1
    assert names["made"]
    assert all("segmentation" in a for a in names["completed"]["annotations"])
    assert names["picture"].shape[2] == 3
    assert list(Path("labelme").rglob("*.json"))


def documented():
    """Modules of the reference, each with the names that it shows; None for all public ones."""
    text = "".join(p.read_text(encoding="utf-8") for p in sorted(DOCS.glob("api*.md")))
    found = re.findall(r"automodule:: (\S+)\n(?:   :members: (.+)\n)?", text)
    return [(module, names.split(", ") if names else None) for module, names in found]


@pytest.mark.parametrize(("name", "names"), documented())
def test_every_public_name_of_the_reference_has_a_docstring(name, names):
    if name.startswith("maskx.detectron2"):
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    module = importlib.import_module(name)
    assert module.__doc__
    if names is None:
        own = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
        kinds = (ast.FunctionDef, ast.ClassDef)
        names = [node.name for node in own if isinstance(node, kinds)]
        names = getattr(module, "__all__", [each for each in names if not each.startswith("_")])
    assert names
    for each in names:
        thing = getattr(module, each)
        assert not callable(thing) or thing.__doc__, f"{name}.{each}"


def test_the_reference_is_built_without_warnings(tmp_path):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", str(DOCS), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "open_run" in (tmp_path / "api.html").read_text(encoding="utf-8")
