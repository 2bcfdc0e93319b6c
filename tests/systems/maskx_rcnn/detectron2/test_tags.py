"""Detectron2's host: images of which labels alone are known teach the detector's classes."""

import json

import pytest
import torch
from detectron2.utils.events import EventStorage

from maskx.detectron2 import Trainer, register_coco

ON = ("MODEL.MASKX.TAG_LOSS_WEIGHT", 0.1, "MODEL.PROPOSAL_GENERATOR.NAME", "MaskXRPN")


def losses_of(model, batch):
    torch.manual_seed(0)  # proposals are sampled at random
    with EventStorage():
        return model(batch)


@pytest.fixture
def make_tagged(make_sample):
    def make(*tags):
        sample = make_sample([])
        sample["instances"].gt_boxes_complete = torch.zeros(0, dtype=torch.bool)
        return sample | {"tags": torch.tensor(tags)}

    return make


def test_tags_teach_the_classifier_and_what_is_below_it_alone(make_model, make_tagged):
    model = make_model(*ON)
    losses = losses_of(model, [make_tagged(1, 3), make_tagged(2)])
    tag_loss = losses.pop("loss_tags")
    assert tag_loss > 0
    assert all(value == 0 for value in losses.values())
    tag_loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    names = {name for name, gradient in gradients.items() if gradient.abs().sum() > 0}
    assert "roi_heads.box_predictor.cls_score.weight" in names
    assert any(name.startswith("backbone.") for name in names)
    for part in ("proposal_generator.", "roi_heads.box_predictor.bbox_pred", "roi_heads.mask_head"):
        assert not any(name.startswith(part) for name in names)


def test_the_loss_is_that_of_the_largest_proposal(make_model, make_tagged, monkeypatch):
    model, sample = make_model(*ON), make_tagged(1)
    seen, forward = [], type(model.proposal_generator).forward

    def record(self, *args):
        found = forward(self, *args)
        seen.append(found[0][0].proposal_boxes)
        return found

    monkeypatch.setattr(type(model.proposal_generator), "forward", record)
    losses = losses_of(model, [sample])
    largest = seen[0][seen[0].area().argmax().item()]
    heads = model.roi_heads
    features = model.backbone(model.preprocess_image([sample]).tensor)
    pooled = heads.box_pooler([features[name] for name in heads.box_in_features], [largest])
    chances = heads.box_predictor(heads.box_head(pooled))[0].softmax(1)
    torch.testing.assert_close(losses["loss_tags"], -0.1 * chances[0, 1].log())


def test_it_changes_no_other_loss_and_is_off_by_default(make_model, make_sample):
    batch = [make_sample([True, False]), make_sample([False])]
    plain, tagged = make_model(*ON[2:]), make_model(*ON)
    expected, losses = losses_of(plain, batch), losses_of(tagged, batch)
    assert losses.pop("loss_tags") == 0
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


@pytest.fixture
def with_tags(sparse_scenes):
    """Scenes, of one of which the labels alone are known."""
    json_file, root = sparse_scenes
    content = json.loads(json_file.read_text(encoding="utf-8"))
    image = content["images"][0]
    own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != image["id"]]
    image["image_labels"] = sorted({a["category_id"] for a in own})
    path = root / "with_tags.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    register_coco("with_tags", path, root)
    return "with_tags", image["id"]


@pytest.mark.parametrize("is_on", [False, True])
def test_images_with_tags_are_trained_on_where_they_teach(make_cfg, with_tags, is_on):
    name, image_id = with_tags
    cfg = make_cfg(*(ON if is_on else ()), "DATASETS.TRAIN", (name,), "SOLVER.MAX_ITER", 40)
    loader, found = iter(Trainer.build_train_loader(cfg)), {}
    for _ in range(20):
        found |= {sample["image_id"]: sample for sample in next(loader)}
    assert (image_id in found) == is_on
    if is_on:
        sample = found[image_id]
        assert len(sample["tags"]) > 0
        assert len(sample["instances"]) == 0
        assert sample["instances"].has("gt_boxes_complete")


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.PROPOSAL_GENERATOR.NAME", "RPN"), r"TAG_LOSS_WEIGHT is 0\.1.*RPN.*MaskXRPN"),
        (("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"), r"TAG_LOSS_WEIGHT is 0\.1.*MaskXRCNN"),
        (("MODEL.MASKX.TAG_LOSS_WEIGHT", -1.0), r"TAG_LOSS_WEIGHT\) is -1"),
    ],
)
def test_what_does_not_fit_is_refused(make_cfg, tiny_train, opts, message):
    with pytest.raises(ValueError, match=message):
        Trainer(make_cfg(*ON, *opts))
