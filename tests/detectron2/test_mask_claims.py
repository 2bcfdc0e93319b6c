"""What a split says of masks, compared with the annotations, for each system with a split."""

import json
import logging

import pytest

from maskx.detectron2 import Trainer, register_coco


@pytest.fixture
def make(request):
    """Make the tiny configuration of a system whose training data are named "claims"."""
    file = {"deeplab": (), "transfer": (), "larvseg": ("DATASETS.MASKX.JOINT.SUPERVISION", ())}

    def make(system, *opts):
        fixture = request.getfixturevalue(f"make_{'' if system == 'maskx' else system + '_'}cfg")
        split = ("DATASETS.MASKX.SPLIT", "scenes_half")
        return fixture(*split, "DATASETS.TRAIN", ("claims",), *file.get(system, ()), *opts)

    return make


def write_without_masks(scenes, path, names):
    content = json.loads(scenes[0].read_text(encoding="utf-8"))
    for image in content["images"]:
        image.pop("stuff_file_name", None)
    ids = {c["id"] for c in content["categories"] if names is None or c["name"] in names}
    for annotation in content["annotations"]:
        if annotation["category_id"] in ids:
            annotation.pop("segmentation", None)
    path.write_text(json.dumps(content), encoding="utf-8")
    register_coco("claims", path, scenes[1])


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ("maskx", "says that 2 .* no annotation of theirs has one: 'green thick ring"),
        ("deeplab", "says that 2 .* no annotation of theirs has one: 'green thick ring"),
        ("larvseg", "says that 2 .* no annotation of theirs has one: 'green thick ring"),
        ("transfer", "source images of category split 'scenes_half' has a mask"),
    ],
)
def test_a_split_without_any_mask_is_refused(system, words, make, sparse_scenes, tmp_path):
    write_without_masks(sparse_scenes, tmp_path / "claims.json", None)
    with pytest.raises(ValueError, match=words):
        Trainer.build_train_loader(make(system))


@pytest.mark.parametrize("system", ["maskx", "deeplab", "transfer", "larvseg"])
def test_a_split_without_some_masks_is_said(system, make, sparse_scenes, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    write_without_masks(sparse_scenes, tmp_path / "claims.json", ["green thick ring"])
    Trainer.build_train_loader(make(system))
    assert "'scenes_half' says that 2 categories have masks" in caplog.text
    assert "1 of them have none in the training data: 'green thick ring (" in caplog.text


def test_concepts_without_masks_are_said(make_concept_cfg, concept_files, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    scenes = concept_files / "scenes" / "concepts.json", concept_files / "scenes"
    write_without_masks(scenes, tmp_path / "claims.json", ["red lamp shade"])
    Trainer.build_train_loader(make_concept_cfg("DATASETS.TRAIN", ("claims",)))
    assert "'masked' says that" in caplog.text
    assert "'red lamp shade (" in caplog.text


def test_a_detector_of_boxes_and_a_classifier_ask_for_no_mask(
    make_cfg, make_classifier_cfg, sparse_scenes, tmp_path
):
    write_without_masks(sparse_scenes, tmp_path / "claims.json", None)
    train = ("DATASETS.TRAIN", ("claims",))
    Trainer.build_train_loader(make_classifier_cfg(*train))
    Trainer.build_train_loader(
        make_cfg(*train, "MODEL.MASK_ON", False, "MODEL.ROI_HEADS.NAME", "StandardROIHeads")
    )
