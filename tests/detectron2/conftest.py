import contextlib
import functools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from settings import TINY_DETECTOR, pairs
from two_ranks import run_as_two

from maskx.core.word_table import save_word_table
from maskx.data.coco import load_coco
from maskx.data.scenes.concepts import generate_concept_scenes, write_scene_tags
from maskx.data.scenes.generator import generate_scenes
from maskx.data.tag_lists import read_tag_list
from maskx.detectron2 import get_cfg, register_all, register_coco
from maskx.detectron2.known_datasets import KNOWN_DATASETS, scene_dataset
from maskx.systems.concept_mask.concept_sets import concept_sets, scene_concept_split
from maskx.systems.concept_mask.overlap import concept_overlap, save_overlap
from maskx.systems.concept_mask.tag_vectors import fold_in_words, learn_word_vectors

ROOT = Path(__file__).parents[2]

# What all have: a network with random weights, two steps of two images, without processes.
SHORT = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SEED": 1,
}
RESNET = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.MASKX.BACKBONE.NAME": "test_resnet",
    "MODEL.MASKX.BACKBONE.PRETRAINED": False,
    "MODEL.MASKX.BACKBONE.FROZEN_NORM": False,
}

# Every config builds and trains on these: 0.05 s to build, 0.1 s for a step of two images.
TINY = (
    TINY_DETECTOR
    | SHORT
    | {
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "TEST.DETECTIONS_PER_IMAGE": 5,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
        "DATASETS.TRAIN": ("tiny_train",),
        "DATASETS.TEST": ("tiny_train",),
        "DATASETS.MASKX.SPLIT": "scenes_half",
        "SOLVER.BASE_LR": 1e-3,
    }
)

# The same for image classifiers and semantic segmentation, from the files of ClassPatterns.
TINY_IMAGES = (
    SHORT
    | RESNET
    | {
        "MODEL.MASKX.NUM_CLASSES": 4,
        "MODEL.MASKX.LARGE_FOV.HIDDEN_CHANNELS": 8,
        "MODEL.MASKX.LARGE_FOV.DILATION": 2,
        "INPUT.MASKX.SIZE": 48,
        "TEST.MASKX.SIZES": (32, 48),
        "TEST.MASKX.CRF": False,
        "DATASETS.TRAIN": ("tiny_train",),
        "DATASETS.TEST": ("tiny_train",),
    }
)

# And for TransferNet, from the files of TransferNet. The feature map is the last of any backbone.
TINY_TRANSFER = (
    SHORT
    | RESNET
    | {
        "MODEL.MASKX.NUM_CLASSES": 4,
        "MODEL.MASKX.IN_FEATURE": "",
        "MODEL.MASKX.TRANSFERNET.CLASSIFIER_WEIGHTS": "",
        "INPUT.MASKX.SIZE": 32,
        "MODEL.MASKX.TRANSFERNET.NUM_FACTORS": 8,
        "MODEL.MASKX.TRANSFERNET.HIDDEN_CHANNELS": 8,
        "DATASETS.TRAIN": ("tiny_sparse",),
        "DATASETS.TEST": ("tiny_sparse",),
        "DATASETS.MASKX.SPLIT": "scenes_half",
        "TEST.MASKX.CRF": False,
        "SOLVER.IMS_PER_BATCH": 4,
    }
)


# And for LarvSeg: masks of 2 of 4 things and of the ground, tags of all things.
TINY_JOINT = SHORT | {
    "MODEL.META_ARCHITECTURE": "MaskXLarvSeg",
    "MODEL.BACKBONE.NAME": "MaskXSmallResNet",
    "INPUT.MASKX.SIZE": 48,
    "INPUT.FORMAT": "RGB",
    "DATASETS.TRAIN": ("maskx_scenes_sparse_stuff_train", "maskx_scenes_sparse_train"),
    "DATASETS.TEST": ("maskx_scenes_sparse_stuff_val",),
    "DATASETS.MASKX.SPLIT": "scenes_half",
    "DATASETS.MASKX.JOINT.SUPERVISION": ("mask", "image"),
    "MODEL.MASKX.LARVSEG.BANK_SIZE": 2,
    "MODEL.MASKX.LARVSEG.TOP_TOKENS": 4,
}

# And for LarvSeg, from the files of LarvSeg, with as many data sets as the file has.
TINY_LARVSEG = SHORT | {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.MASKX.BACKBONE.NAME": "test_vit",
    "MODEL.MASKX.BACKBONE.PRETRAINED": False,
    "MODEL.MASKX.LARVSEG.BANK_SIZE": 2,
    "MODEL.MASKX.LARVSEG.TOP_TOKENS": 4,
    "INPUT.MASKX.SIZE": 32,
    "DATASETS.TEST": ("tiny_sparse",),
    "DATASETS.MASKX.SPLIT": "scenes_half",
}

# And for ConceptMask, from the files of ConceptMask.
TINY_CONCEPTS = (
    SHORT
    | RESNET
    | {
        "MODEL.MASKX.CONCEPT_MASK.EMBEDDING_CHANNELS": (16, 16),
        "MODEL.MASKX.CONCEPT_MASK.HIDDEN_CHANNELS": 16,
        "MODEL.MASKX.CONCEPT_MASK.NUM_MATCHED": 8,
        "MODEL.MASKX.CONCEPT_MASK.ENCODER_PRETRAINED": False,
        "MODEL.MASKX.CONCEPT_MASK.DECODER_CHANNELS": (8, 8, 8, 8, 8),
        "MODEL.MASKX.CONCEPT_MASK.SPLIT": "scenes_concepts",
        "INPUT.MASKX.SIZE": 32,
        "DATASETS.TRAIN": ("tiny_concepts",),
        "DATASETS.TEST": ("tiny_concepts",),
    }
)
LARVSEG_SETS = ("tiny_sparse", "tiny_train", "tiny_tags")


@pytest.fixture(autouse=True)
def clean_state():
    """Seed everything and forget the data sets that a test registers."""
    torch.manual_seed(0)
    np.random.seed(0)
    with _forgotten_data_sets():
        yield


@pytest.fixture(autouse=True, scope="module")
def clean_module():
    """Forget the data sets that fixtures of a module register."""
    with _forgotten_data_sets():
        yield


@pytest.fixture(autouse=True, scope="module")
def yaml_in_c():
    """Take libyaml where it is there: each training reads and writes its configuration ten times.

    The loader of maskx, which says what is wrong in a file, stays as it is.
    """
    with pytest.MonkeyPatch.context() as patch:
        if yaml.__with_libyaml__:
            patch.setattr(yaml, "SafeLoader", yaml.CSafeLoader)
            patch.setattr(yaml, "SafeDumper", yaml.CSafeDumper)
        yield


@contextlib.contextmanager
def _forgotten_data_sets():
    catalogs = (DatasetCatalog, MetadataCatalog)
    known = [set(catalog.list()) for catalog in catalogs]
    yield
    for catalog, names in zip(catalogs, known, strict=True):
        for name in set(catalog.list()) - names:
            catalog.remove(name)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Annotation file and image root of 6 generated images with 4 classes, 2 of them in A."""
    root = tmp_path_factory.mktemp("scenes")
    return generate_scenes(root, count=6, size=64, num_categories=4, seed=0), root


@pytest.fixture
def tiny_train(scenes):
    """The scenes, registered as the data set of the tiny configurations."""
    register_coco("tiny_train", *scenes)
    return "tiny_train"


@pytest.fixture
def run_two_processes():
    """Run a script of this folder, or any, as two processes: ``run_two_processes(path)``."""
    return lambda name: run_as_two(Path(__file__).parent / name)


@pytest.fixture
def make_cfg(tmp_path):
    """Make a tiny configuration: ``make_cfg(*opts, file=<under configs/MaskX>)``."""

    def make(*opts, file="voc2nonvoc/e2e/clsbox_2_layer_mlp_R_50_FPN_1x.yaml"):
        cfg = get_cfg()
        cfg.merge_from_file(str(ROOT / "configs" / "MaskX" / file))
        cfg.merge_from_list([*pairs(TINY), "OUTPUT_DIR", str(tmp_path / "output"), *opts])
        return cfg

    return make


@pytest.fixture
def make_image_cfg(tmp_path):
    """The same for image models: ``make_image_cfg(*opts, file=<under configs/ClassPatterns>)``."""

    def make(*opts, file):
        cfg = get_cfg()
        cfg.merge_from_file(str(ROOT / "configs" / "ClassPatterns" / file))
        cfg.merge_from_list([*pairs(TINY_IMAGES), "OUTPUT_DIR", str(tmp_path / "output"), *opts])
        return cfg

    return make


@pytest.fixture
def make_classifier_cfg(make_image_cfg):
    """Make a tiny configuration of an image classifier: ``make_classifier_cfg(*opts)``."""
    return functools.partial(make_image_cfg, file="quick_schedules/classifier_scenes_cpu.yaml")


@pytest.fixture
def make_deeplab_cfg(make_image_cfg):
    """Make a tiny configuration of a segmentation network: ``make_deeplab_cfg(*opts)``."""
    return functools.partial(make_image_cfg, file="quick_schedules/deeplab_scenes_cpu.yaml")


@pytest.fixture(scope="session")
def sparse_scenes(tmp_path_factory):
    """Annotation file and image root of 12 images of one or two objects with 4 classes, 2 in A."""
    root = tmp_path_factory.mktemp("sparse_scenes")
    scenes = generate_scenes(root, count=12, size=64, num_categories=4, seed=0, style="sparse")
    return scenes, root


@pytest.fixture
def tiny_sparse(sparse_scenes):
    """These scenes, registered as the data set of the tiny configurations of TransferNet."""
    register_coco("tiny_sparse", *sparse_scenes)
    return "tiny_sparse"


@pytest.fixture
def make_transfer_cfg(tmp_path):
    """The same for TransferNet: ``make_transfer_cfg(*opts, file=<under configs/TransferNet>)``."""

    def make(*opts, file="quick_schedules/stage2_joint_scenes_cpu.yaml"):
        cfg = get_cfg()
        cfg.merge_from_file(str(ROOT / "configs" / "TransferNet" / file))
        cfg.merge_from_list([*pairs(TINY_TRANSFER), "OUTPUT_DIR", str(tmp_path / "output"), *opts])
        return cfg

    return make


@pytest.fixture(scope="session")
def joint_root(tmp_path_factory):
    """Folder of the data sets of ``tiny_joint``, which are written when first used."""
    return tmp_path_factory.mktemp("joint")


@pytest.fixture
def tiny_joint(joint_root, monkeypatch):
    """Register the generated data sets of LarvSeg with 4 things and 6, 8 and 4 images."""
    tiny = {"size": 64, "num_categories": 4, "style": "sparse"}
    for name, count, seed in (
        ("maskx_scenes_sparse_stuff_train", 6, 2),
        ("maskx_scenes_sparse_train", 8, 0),
        ("maskx_scenes_sparse_stuff_val", 4, 1),
    ):
        known = scene_dataset(name, with_ground="stuff" in name, **tiny, count=count, seed=seed)
        monkeypatch.setitem(KNOWN_DATASETS, name, known)
    register_all(joint_root)


@pytest.fixture
def make_joint_cfg(tmp_path, tiny_joint):
    """The same for LarvSeg: ``make_joint_cfg(*opts)``."""

    def make(*opts):
        cfg = get_cfg()
        cfg.merge_from_list([*pairs(TINY_JOINT), "OUTPUT_DIR", str(tmp_path / "output"), *opts])
        return cfg

    return make


@pytest.fixture
def make_larvseg_cfg(tmp_path, tiny_train, tiny_sparse, scenes):
    """The same from the files: ``make_larvseg_cfg(*opts, file=<under configs/LarvSeg>)``."""
    register_coco("tiny_tags", *scenes)

    def make(*opts, file="quick_schedules/larvseg_scenes_cpu.yaml"):
        cfg = get_cfg()
        cfg.merge_from_file(str(ROOT / "configs" / "LarvSeg" / file))
        names = LARVSEG_SETS[: len(cfg.DATASETS.TRAIN) or 1]
        cfg.merge_from_list([*pairs(TINY_LARVSEG), "DATASETS.TRAIN", names])
        if cfg.DATASETS.MASKX.JOINT.SIZES:
            cfg.DATASETS.MASKX.JOINT.SIZES = (32,) * len(names)
        if cfg.TEST.MASKX.WINDOW:
            cfg.TEST.MASKX.WINDOW = cfg.TEST.MASKX.STRIDE = 32
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / "output"), *opts])
        return cfg

    return make


@pytest.fixture(scope="session")
def concept_files(tmp_path_factory):
    """Files of 8 scenes with concepts: annotations, images, word table, overlaps, unseen words."""
    root = tmp_path_factory.mktemp("concepts")
    scenes = generate_concept_scenes(root / "scenes", count=8, size=64, seed=0)
    split = scene_concept_split()
    tags, all_tags = (
        write_scene_tags(root / name, count=300, seed=2, unseen=unseen)
        for name, unseen in (("tags.jsonl", False), ("all_tags.jsonl", True))
    )
    table = learn_word_vectors(read_tag_list(tags, vocabulary=split.vocabulary), dim=12)
    save_word_table(root / "words.safetensors", table)
    unseen = fold_in_words(table, read_tag_list(all_tags), split.unseen).table
    save_word_table(root / "unseen.safetensors", unseen)
    boxed = concept_sets(split, boxes=load_coco(scenes, scenes.parent)).boxed
    overlap = concept_overlap(boxed, len(split.vocabulary))
    save_overlap(root / "overlap.npz", overlap, split.vocabulary)
    return root


@pytest.fixture
def tiny_concepts(concept_files):
    """These scenes, registered as the data set of the tiny configurations of ConceptMask."""
    root = concept_files / "scenes"
    register_coco("tiny_concepts", root / "concepts.json", root)
    return "tiny_concepts"


@pytest.fixture
def make_concept_cfg(tmp_path, concept_files, tiny_concepts):
    """The same for ConceptMask: ``make_concept_cfg(*opts, file=<under configs/ConceptMask>)``."""

    def make(*opts, file="quick_schedules/stage3_segmentation_scenes_cpu.yaml"):
        cfg = get_cfg()
        cfg.merge_from_file(str(ROOT / "configs" / "ConceptMask" / file))
        cfg.merge_from_list(pairs(TINY_CONCEPTS))
        keys = cfg.MODEL.MASKX.CONCEPT_MASK
        keys.ATTENTION_SIZES = (32, 48)[: len(keys.ATTENTION_SIZES)]
        keys.ENCODER = "small" if keys.ENCODER == "small" else "test_resnet"
        keys.WORD_TABLE = str(concept_files / "words.safetensors")
        if cfg.MODEL.META_ARCHITECTURE == "MaskXConceptRefinement" and keys.DISCRIMINATION_WEIGHT:
            keys.OVERLAP = str(concept_files / "overlap.npz")
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / "output"), *opts])
        return cfg

    return make


@pytest.fixture
def make_model(make_cfg):
    """Build a tiny model in training mode: ``make_model(*opts)``."""

    def make(*opts):
        torch.manual_seed(0)
        return build_model(make_cfg(*opts)).train()

    return make


@pytest.fixture
def make_sample():
    """Make a training sample: ``make_sample(has_mask)`` with one instance per flag."""

    def make(has_mask, *, size=64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        count = len(has_mask)
        instances = Instances((size, size))
        corner = torch.rand(count, 2, generator=generator) * size / 2
        extent = 12 + torch.rand(count, 2, generator=generator) * size / 4
        instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
        instances.gt_classes = torch.arange(count) % 4
        instances.gt_has_mask = torch.tensor(has_mask, dtype=torch.bool)
        masks = torch.zeros(count, size, size, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, instances.gt_boxes.tensor.int(), strict=True):
            mask[y0 : (y0 + y1) // 2, x0:x1] = True
        instances.gt_masks = BitMasks(masks & instances.gt_has_mask[:, None, None])
        image = torch.randint(256, (3, size, size), generator=generator).float()
        return {"image": image, "height": size, "width": size, "instances": instances}

    return make


@pytest.fixture
def write_coco(tmp_path):
    """Write an annotation file: ``write_coco(annotations, size=(H, W))`` for one grey image."""

    def write(annotations, *, size=(40, 60), categories=("cat", "dog", "owl", "yak")):
        root = tmp_path / "images"
        root.mkdir(exist_ok=True)
        cv2.imwrite(str(root / "1.png"), np.full((*size, 3), 127, np.uint8))
        path = tmp_path / "annotations.json"
        content = {
            "images": [{"id": 7, "file_name": "1.png", "height": size[0], "width": size[1]}],
            "categories": [{"id": 10 * i, "name": n} for i, n in enumerate(categories, start=1)],
            "annotations": [{"image_id": 7, "id": i, **a} for i, a in enumerate(annotations, 1)],
        }
        path.write_text(json.dumps(content), encoding="utf-8")
        return path, root

    return write
