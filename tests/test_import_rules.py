"""The rooms of the package: who may import what, and that importing stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "maskx"
MODULES = sorted(PACKAGE.rglob("*.py"))
SYSTEMS = {p.name for p in (PACKAGE / "systems").iterdir() if (p / "__init__.py").is_file()}

# What a room may import of the others; all may import `maskx.supervision`.
ALLOWED = {
    "__init__.py": set(),  # it imports what is asked for, by name
    "__main__.py": {"cli"},
    "supervision.py": {"core"},
    "core": set(),
    "data": {"core"},
    "evaluation": {"core", "data"},
    "engine": {"core", "data", "evaluation"},
    "systems": {"core", "data", "evaluation", "engine", "detectron2"},
    "detectron2": {"core", "data", "evaluation", "engine", "systems"},
    "torchvision": {"systems"},
    "cli": {"core", "data", "evaluation", "engine", "systems"},
}


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


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def parts_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts


def room(path):
    return path.relative_to(PACKAGE).parts[0]


def is_host(path, host):
    """Whether a module may import a host: it, or a folder above it, has its name."""
    return host in parts_of(path)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path):
    own = room(path)
    names = imported_names(path)
    rooms = {name.split(".")[1] for name in names if name.startswith("maskx.")}
    assert rooms - {"supervision", "__version__", own} <= ALLOWED[own]
    if own == "systems":
        systems = {n.split(".")[2] for n in names if n.startswith("maskx.systems.")}
        others = (systems & SYSTEMS) - {parts_of(path)[1]}
        assert not others or len(parts_of(path)) == 2, f"imports the systems {sorted(others)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_hosts_are_imported_only_under_their_names(path):
    names = imported_names(path)
    for host, packages in (
        ("detectron2", ("detectron2", "maskx.detectron2")),
        ("torchvision", ("torchvision.models.detection", "maskx.torchvision")),
    ):
        # The lazy add_maskx_config is the one door from the front into a host.
        if not is_host(path, host) and path != PACKAGE / "__init__.py":
            assert not {name for name in names if within(name, packages)}


def test_every_room_is_known():
    assert {room(path) for path in MODULES} == set(ALLOWED)
    assert {"class_patterns", "concept_mask", "larvseg", "maskx_rcnn", "transfernet"} == SYSTEMS


def test_no_import_cycle_between_rooms():
    graph = {own: allowed - {"detectron2"} for own, allowed in ALLOWED.items()}
    # Systems and the Detectron2 host meet in modules named after the host only, see above.
    order = []
    while graph:
        free = [own for own, needs in graph.items() if not needs & (graph.keys() - {own})]
        assert free, f"a cycle between {sorted(graph)}"
        order += free
        graph = {own: needs for own, needs in graph.items() if own not in free}
    assert order.index("core") < order.index("data") < order.index("systems")


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
        "maskx.systems.maskx_rcnn.mask_head",
        "maskx.data.scenes.generator",
        "maskx.evaluation.average_precision",
        "maskx.systems.class_patterns.steps",
        "maskx.systems.concept_mask.evaluation",
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
