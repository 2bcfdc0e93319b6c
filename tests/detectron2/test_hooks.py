import pytest
from detectron2.modeling import META_ARCH_REGISTRY

from maskx.detectron2.hooks import hooks_of


@pytest.mark.parametrize(
    ("name", "system", "learns_label_maps"),
    [
        ("MaskXImageClassifier", "image_classifier", False),
        ("MaskXDeepLab", "class_patterns", True),
        ("MaskXTransferClassifier", "transfernet", False),
        ("MaskXTransferNet", "transfernet", True),
        ("MaskXLarvSeg", "larvseg", False),
        ("MaskXConceptSegmentation", "concept_mask", False),
        ("MaskXRCNN", "maskx", False),
        ("GeneralizedRCNN", "maskx", False),
        ("SemanticSegmentor", "maskx", False),
    ],
)
def test_the_architecture_says_how_it_is_trained(
    make_classifier_cfg, name, system, learns_label_maps
):
    assert name in META_ARCH_REGISTRY
    hooks = hooks_of(make_classifier_cfg("MODEL.META_ARCHITECTURE", name))
    assert (hooks.system, hooks.learns_label_maps) == (system, learns_label_maps)


def test_an_unknown_architecture_is_named(make_classifier_cfg):
    cfg = make_classifier_cfg("MODEL.META_ARCHITECTURE", "MaskYDeepLab")
    words = r"META_ARCHITECTURE is 'MaskYDeepLab', .* Allowed: .*MaskXDeepLab, MaskXGrabCutRCNN"
    with pytest.raises(ValueError, match=words):
        hooks_of(cfg)
