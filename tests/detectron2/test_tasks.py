import pytest
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.utils.registry import Registry

from maskx.detectron2 import Task, tasks
from maskx.detectron2.tasks import is_transfer, num_classes_of, task_of


@pytest.fixture
def registry(monkeypatch):
    """A registry of its own for the architectures of a test."""
    registry = Registry("META_ARCH")
    monkeypatch.setattr(tasks, "META_ARCH_REGISTRY", registry)
    return registry


@pytest.mark.parametrize(
    ("name", "task", "key", "num_classes"),
    [
        ("MaskXImageClassifier", Task.IMAGE_LABELS, "MODEL.MASKX.NUM_CLASSES", 4),
        ("MaskXDeepLab", Task.PIXELS, "MODEL.MASKX.NUM_CLASSES", 4),
        ("MaskXRCNN", Task.INSTANCES, "MODEL.ROI_HEADS.NUM_CLASSES", 80),
        ("GeneralizedRCNN", Task.INSTANCES, "MODEL.ROI_HEADS.NUM_CLASSES", 80),
        ("SemanticSegmentor", Task.INSTANCES, "MODEL.ROI_HEADS.NUM_CLASSES", 80),
    ],
)
def test_the_architecture_says_what_it_learns(make_classifier_cfg, name, task, key, num_classes):
    cfg = make_classifier_cfg("MODEL.META_ARCHITECTURE", name)
    assert name in META_ARCH_REGISTRY
    assert task_of(cfg) is task
    assert num_classes_of(cfg) == (key, num_classes)


def test_a_large_vocabulary_is_in_the_data_sets_and_in_no_key(make_joint_cfg):
    cfg = make_joint_cfg()
    assert task_of(cfg) is Task.LARGE_VOCABULARY
    assert not is_transfer(cfg)


def test_concepts_are_in_the_word_table_and_in_no_key(make_concept_cfg):
    cfg = make_concept_cfg()
    assert task_of(cfg) is Task.CONCEPTS
    assert not is_transfer(cfg)


def test_the_architecture_of_another_project_may_say_so_too(make_classifier_cfg, registry):
    @registry.register()
    class Plain(GeneralizedRCNN):
        task = "something of its own"

    @registry.register()
    class Pixels(GeneralizedRCNN):
        maskx_task = "pixels"

    assert task_of(make_classifier_cfg("MODEL.META_ARCHITECTURE", "Plain")) is Task.INSTANCES
    assert task_of(make_classifier_cfg("MODEL.META_ARCHITECTURE", "Pixels")) is Task.PIXELS


@pytest.mark.parametrize("ask", [task_of, is_transfer, num_classes_of])
def test_an_unknown_architecture_is_named(make_classifier_cfg, ask):
    cfg = make_classifier_cfg("MODEL.META_ARCHITECTURE", "MaskYDeepLab")
    words = r"META_ARCHITECTURE is 'MaskYDeepLab', .* Allowed: .*MaskXDeepLab, MaskXGrabCutRCNN"
    with pytest.raises(ValueError, match=words):
        ask(cfg)
