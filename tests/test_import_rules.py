"""The rooms of the package: who may import what, and that importing stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "maskx"
MODULES = sorted(PACKAGE.rglob("*.py"))

HOSTS = ("detectron2", "torchvision.models.detection", "maskx.detectron2", "maskx.torchvision")
HOST_ROOMS = ("detectron2", "torchvision")


def imported_names(path):
    """Dotted names of everything a module imports, at any depth of the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path):
    return path.relative_to(PACKAGE).parts[0]


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path):
    names = imported_names(path)
    forbidden = {
        "detectron2": ("maskx.torchvision", "torchvision.models.detection"),
        "torchvision": ("detectron2", "maskx.detectron2"),
        "modeling": (*HOSTS, "fvcore.common.config", "yacs", "maskx.data", "maskx.evaluation"),
        "data": (*HOSTS, "maskx.modeling", "maskx.evaluation"),
        "evaluation": (*HOSTS, "maskx.modeling"),
        "supervision.py": HOSTS,
        # Science of several rooms, for both hosts.
        "class_patterns.py": HOSTS,
        "concept_mask.py": HOSTS,
        # The lazy add_maskx_config is the one door from here into a host.
        "__init__.py": ("detectron2", "torchvision", "maskx.torchvision"),
    }[room(path)]
    assert not {name for name in names if within(name, forbidden)}


def test_every_room_is_known():
    rooms = {room(path) for path in MODULES}
    assert rooms == {
        "__init__.py",
        "supervision.py",
        "class_patterns.py",
        "concept_mask.py",
        "modeling",
        "data",
        "evaluation",
        *HOST_ROOMS,
    }


def run_python(code):
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.split()


def test_importing_maskx_loads_neither_torch_nor_a_host():
    loaded = run_python("import maskx, sys; print(*sys.modules)")
    heavy = {"torch", "torchvision", "numpy", "cv2", "detectron2", "fvcore"}
    assert not heavy & {name.partition(".")[0] for name in loaded}


@pytest.mark.parametrize(
    "module",
    [
        "maskx.modeling.mask_head",
        "maskx.data.scenes",
        "maskx.evaluation.average_precision",
        "maskx.class_patterns",
        "maskx.concept_mask",
    ],
)
def test_plain_rooms_work_without_detectron2(module):
    loaded = run_python(
        f"import sys; sys.modules['detectron2'] = None\nimport {module}; print(*sys.modules)"
    )
    assert not {"maskx.detectron2", "maskx.torchvision"} & set(loaded)


def test_the_detectron2_room_says_what_it_needs():
    code = """
import sys
sys.modules['detectron2'] = None
import maskx
for ask in (lambda: maskx.add_maskx_config, lambda: __import__('maskx.detectron2')):
    try:
        ask()
    except ImportError as error:
        print('https://detectron2.readthedocs.io' in str(error), 'maskx.detectron2' in str(error))
"""
    assert run_python(code) == ["True"] * 4


def test_unknown_attribute():
    import maskx

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = maskx.nothing
    assert "add_maskx_config" in dir(maskx)
