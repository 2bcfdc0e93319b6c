"""A trained ConceptMask as a program that needs no maskx."""

import pytest
import torch
from exported import export_or_skip, some_images
from tiny_concept_mask import TINY

import maskx
from maskx.engine.model_export import export_model
from maskx.systems.concept_mask.pipeline import ConceptMaskChain, scene_concept_data
from maskx.systems.concept_mask.query import ConceptQuery


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    scenes, output = (tmp_path_factory.mktemp(name) for name in ("scenes", "run"))
    data = scene_concept_data(scenes, num_train=20, num_val=5, num_tags=400, size=64, seed=0)
    ConceptMaskChain(data, TINY, output=output).model(3)
    return output


@pytest.fixture
def predictor(run):
    predictor = maskx.open_run(run / "segmentation", device="cpu")
    model = predictor.model
    # As two steps leave it, the last layer hardly heeds its input, and theta is 1.
    torch.nn.init.normal_(
        model.segmenter.classify.weight, generator=torch.Generator().manual_seed(0)
    )
    model.set_fitted(theta_image=0.3)
    return predictor


def test_the_command_writes_what_the_run_finds(run, tmp_path):
    program, said = export_or_skip(run / "segmentation", tmp_path / "model.onnx")
    predictor = maskx.open_run(run / "segmentation", device="cpu")
    assert said["system"] == "concept_mask"
    assert said["class_names"] == list(predictor.model.table.names)
    compare(program, predictor)


def test_blended_maps_and_any_number_of_concepts(predictor, tmp_path):
    export_model(predictor, tmp_path / "model.pt2")
    compare(torch.export.load(tmp_path / "model.pt2").module(), predictor)


def compare(program, predictor):
    model = predictor.model
    boxed = model.is_boxed.nonzero()[:, 0].tolist()
    others = (~model.is_boxed).nonzero()[:, 0].tolist()
    asked = [[boxed[0], others[0], others[1]], [], [others[2]], [*others, *boxed, *others][:100]]
    for (image, pixels), concepts in zip(some_images(), asked, strict=True):
        indices = torch.tensor(concepts, dtype=torch.int64)
        masks, existence = program(image, indices)
        query = ConceptQuery(indices, model.vectors[indices])
        with torch.inference_mode():
            expected = model.predict(predictor.prepare(pixels), query)
        assert masks.shape == (len(concepts), *image.shape[-2:])
        torch.testing.assert_close(masks, expected["masks_prob"], atol=1e-4, rtol=0)
        torch.testing.assert_close(existence, expected["existence"], atol=1e-4, rtol=0)
        assert not concepts or masks.std() > 1e-4


def test_a_model_of_other_maps_is_refused(run, tmp_path):
    predictor = maskx.open_run(run / "segmentation", device="cpu")
    predictor.model.attention_kind = "own"
    with pytest.raises(ValueError, match="it segments the attention maps 'own'"):
        export_model(predictor, tmp_path / "model.pt2")


def test_a_model_without_masks_is_refused(run, tmp_path):
    predictor = maskx.open_run(run / "refinement", device="cpu")
    with pytest.raises(ValueError, match="cannot be exported: it is of stage 2 of ConceptMask"):
        export_model(predictor, tmp_path / "model.pt2")
