"""A trained TransferNet and its baseline as programs that need no maskx."""

import pytest
import torch
from exported import export_or_skip, some_images

import maskx
from maskx.data.coco import load_coco
from maskx.data.scenes.generator import generate_scenes
from maskx.data.splits import resolve_split
from maskx.systems.transfernet.pipeline import TransferChain, TransferMethod, TransferSettings
from maskx.systems.transfernet.samples import transfer_sets

TINY = {"image_size": 32, "num_factors": 8, "hidden_channels": 8, "batch_size": 4}
STEPS = {"iterations": 2, "attention_iterations": 2, "joint_iterations": 2}


@pytest.fixture(scope="module", params=["transfernet", "baseline"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    data = load_coco(
        generate_scenes(folder, count=16, size=64, seed=3, num_categories=12, style="sparse"),
        folder,
    )
    split = resolve_split("scenes_half", data.class_names)
    output = tmp_path_factory.mktemp("chain")
    settings = TransferSettings(**TINY, **STEPS)
    chain = TransferChain(transfer_sets(data.records, split), split, settings, output=output)
    method = TransferMethod(request.param)
    chain.train_masks(method)
    return output / method.name


@pytest.fixture
def predictor(run):
    return maskx.open_run(run, device="cpu")


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_the_program_predicts_what_the_run_does(run, predictor, tmp_path, ending, monkeypatch):
    # A classifier that was hardly trained finds one label at most, so that nothing is merged.
    model = predictor.model
    with torch.no_grad():
        model.classifier.classifier.bias[:3] += 3
    monkeypatch.setattr(maskx, "open_run", lambda *args, **options: predictor)
    program, said = export_or_skip(run, tmp_path / f"model{ending}")
    assert said["system"] == "transfernet"
    assert said["class_names"] == list(predictor.class_names)
    for image, pixels in some_images():
        label_map, scores = program(image)
        with torch.inference_mode():
            (expected,) = model([predictor.prepare(pixels)])
        masks, labels = expected["masks_prob"], expected["image_labels"].tolist()
        assert len(labels) >= 3
        best = masks.amax(dim=0)
        torch.testing.assert_close(scores, torch.maximum(best, 1 - best), atol=1e-4, rtol=0)
        prob = torch.stack([1 - best, *masks])
        rows = torch.full((len(said["class_names"]) + 1,), -1)
        rows[[0, *(label + 1 for label in labels)]] = torch.arange(len(labels) + 1)
        of_label = prob.gather(0, rows[label_map][None])[0]
        torch.testing.assert_close(of_label, scores, atol=1e-4, rtol=0)


def test_a_model_that_predicts_no_label_maps_is_refused(predictor):
    predictor.model.has_classifier.fill_(False)
    with pytest.raises(ValueError, match=r"cannot be exported: .* no trained classifier"):
        predictor.system.exportable(predictor.model, predictor.class_names)
