import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "maskx"
# The host, and what imports it in the systems.
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if "detectron2" in p.with_suffix("").parts]


def run(code):
    """Run Python code in a fresh process, which must print JSON last."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_detectron2_there_is_one_import_error():
    error = run(
        "import json, sys\n"
        "sys.modules['detectron2'] = None\n"
        "import maskx, maskx.systems.maskx_rcnn.mask_head\n"
        "try:\n"
        "    maskx.get_cfg()\n"
        "except ImportError as error:\n"
        "    print(json.dumps([str(error), error.__cause__ is None, error.__context__ is None]))\n"
    )
    assert "maskx.detectron2 needs Detectron2" in error[0]
    assert "https://detectron2.readthedocs.io/en/latest/tutorials/install.html" in error[0]
    assert error[1:] == [True, True]


def test_importing_registers_our_model_components_and_no_data():
    registered, data = run(
        "import json\n"
        "from detectron2 import modeling\n"
        "from detectron2.data import DatasetCatalog, MetadataCatalog\n"
        "registries = {k: v for k, v in vars(modeling).items() if k.endswith('_REGISTRY')}\n"
        "names = lambda: {(k, n) for k, v in registries.items() for n, _ in v}\n"
        "data = lambda: [sorted(DatasetCatalog.list()), sorted(MetadataCatalog.list())]\n"
        "before, data_before = names(), data()\n"
        "import maskx.detectron2\n"
        "print(json.dumps([sorted(names() - before), data() == data_before]))\n"
    )
    assert registered == [
        ["BACKBONE_REGISTRY", "MaskXSmallResNet"],
        ["BACKBONE_REGISTRY", "MaskXTimm"],
        ["BACKBONE_REGISTRY", "MaskXTimmFPN"],
        ["BACKBONE_REGISTRY", "MaskXVGG16"],
        ["META_ARCH_REGISTRY", "MaskXConceptEmbedding"],
        ["META_ARCH_REGISTRY", "MaskXConceptRefinement"],
        ["META_ARCH_REGISTRY", "MaskXConceptSegmentation"],
        ["META_ARCH_REGISTRY", "MaskXDeepLab"],
        ["META_ARCH_REGISTRY", "MaskXGrabCutRCNN"],
        ["META_ARCH_REGISTRY", "MaskXImageClassifier"],
        ["META_ARCH_REGISTRY", "MaskXLarvSeg"],
        ["META_ARCH_REGISTRY", "MaskXRCNN"],
        ["META_ARCH_REGISTRY", "MaskXTransferClassifier"],
        ["META_ARCH_REGISTRY", "MaskXTransferNet"],
        ["PROPOSAL_GENERATOR_REGISTRY", "MaskXRPN"],
        ["ROI_HEADS_REGISTRY", "MaskXCascadeROIHeads"],
        ["ROI_HEADS_REGISTRY", "MaskXROIHeads"],
        ["ROI_MASK_HEAD_REGISTRY", "MaskXMaskHead"],
        ["ROI_MASK_HEAD_REGISTRY", "MaskXPointRendMaskHead"],
    ]
    assert data is True


def test_every_configuration_is_packaged(monkeypatch):
    package = {}
    monkeypatch.setattr("setuptools.setup", lambda **about: package.update(about))
    runpy.run_path(str(PACKAGE.parent / "setup.py"))
    configs = PACKAGE.parent / package["package_dir"]["maskx.configs"]
    patterns = package["package_data"]["maskx.configs"]
    packaged = {path for pattern in patterns for path in configs.glob(pattern)}
    shown = {".md", ".png", ".pyc"}  # the pages and their pictures stay in the checkout
    files = {path for path in configs.rglob("*") if path.is_file() and path.suffix not in shown}
    assert files
    assert not files - packaged


def test_only_public_names_of_detectron2_are_used():
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("detectron2"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                found += [(path.name, name) for name in names if name.startswith("_")]
    assert found == []
    overridden = {
        node.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_")
    }
    from detectron2.data import DatasetMapper
    from detectron2.engine import DefaultTrainer
    from detectron2.evaluation import DatasetEvaluator
    from detectron2.modeling import StandardROIHeads
    from torch import nn

    private = {
        name
        for cls in (DatasetMapper, DefaultTrainer, DatasetEvaluator, StandardROIHeads)
        for name in dir(cls)
        if name.startswith("_") and not name.startswith("__") and not hasattr(nn.Module, name)
    }
    # The one hook: Detectron2's own comments ask users to modify it.
    assert overridden & private == {"_transform_annotations"}
