import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskx.core.backbones import SmallResNet
from maskx.core.image_classifier import ImageClassifier
from maskx.core.sample_models import SampleClassifier
from maskx.data import dense_crf
from maskx.data.images import ImageMapper
from maskx.data.label_maps import semantic_label_map
from maskx.engine.batches import training_batches
from maskx.engine.prediction import evaluate_label_maps, predict_image_labels
from maskx.engine.training import TrainingSettings, train
from maskx.evaluation.image_labels import evaluate_image_labels
from maskx.systems.class_patterns.model import (
    DeepLab,
    SampleSegmenter,
    predict_label_maps,
    restrict_to_labels,
)

K, SIZE = 8, 32
WIDTHS = (8, 8, 8, 8)


def make_classifier(**changes):
    torch.manual_seed(0)
    backbone = SmallResNet(widths=WIDTHS)
    network = ImageClassifier(backbone, in_feature="layer4", in_channels=8, num_classes=K)
    return SampleClassifier(network, **{"size": SIZE} | changes)


def make_segmenter(**changes):
    torch.manual_seed(0)
    network = DeepLab(
        SmallResNet(widths=WIDTHS),
        in_feature="layer4",
        in_channels=8,
        num_classes=K,
        hidden_channels=8,
        dilation=2,
    )
    return SampleSegmenter(network, **{"test_sizes": (SIZE,)} | changes)


MAKERS = {"loss_labels": make_classifier, "loss_pixels": make_segmenter}


@pytest.fixture
def samples(scenes):
    mapper = ImageMapper(K, size=SIZE, label_maps=True)
    return [mapper(record, np.random.RandomState(0)) for record in scenes.records[:3]]


def assert_all_have_gradients(model):
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_images_are_normalised_with_the_numbers_of_imagenet():
    model = make_classifier()
    image = torch.tensor([255, 0, 51], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 20, 30)
    (batch,) = model.preprocess([{"image": image}])
    assert batch.shape == (3, SIZE, SIZE)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    for channel, value in zip(batch, expected, strict=True):
        assert torch.allclose(channel, torch.tensor(value), atol=1e-5)
    assert model.preprocess([]).shape == (0, 3, SIZE, SIZE)
    assert not {"pixel_mean", "pixel_std"} & set(model.state_dict())


def test_inference_sees_an_image_as_training_did(scenes):
    """But for whole numbers: along rows, then along columns, warped bytes are off by 1/2 each."""
    record = scenes.records[0]
    mapper = ImageMapper(K, size=SIZE, flip=False, label_maps=False)
    model = make_classifier()
    trained = model.preprocess([mapper(record, np.random.RandomState(0))])
    inferred = model.preprocess([mapper.read_image(record)])
    assert (trained - inferred).abs().max() <= 1.01 / 255 / 0.224


def test_the_loss_of_labels_is_that_of_their_sigmoids(samples):
    model = make_classifier().train()
    losses = model(samples)
    assert set(losses) == {"loss_labels"}
    logits = model.classifier(model.preprocess(samples))
    total = 0.0
    for row, sample in zip(logits, samples, strict=True):
        for index, logit in enumerate(row.tolist()):
            prob = 1 / (1 + math.exp(-logit))
            total -= math.log(prob if index in sample["image_labels"] else 1 - prob)
    assert losses["loss_labels"].item() == pytest.approx(total / (3 * K), rel=1e-4)
    losses["loss_labels"].backward()
    assert_all_have_gradients(model)


def test_the_loss_of_pixels_ignores_unknown_ones(samples):
    model = make_segmenter().eval()  # without dropout
    for sample in samples:
        sample["sem_seg"][:4] = 255
    logits = model.network(model.training_images(samples))
    logits = F.interpolate(logits, (SIZE, SIZE), mode="bilinear", align_corners=False)
    truth = torch.stack([sample["sem_seg"] for sample in samples])
    log_prob = logits.log_softmax(dim=1).permute(0, 2, 3, 1)[truth != 255]
    expected = -log_prob.gather(1, truth[truth != 255][:, None]).mean()
    model.training = True  # the wrapper alone: batch norm and dropout stay as they are
    losses = model(samples)
    assert set(losses) == {"loss_pixels"}
    assert losses["loss_pixels"].item() == pytest.approx(expected.item(), rel=1e-5)
    losses["loss_pixels"].backward()
    assert_all_have_gradients(model)


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_to_learn_from_is_a_zero_loss_with_a_graph(name, samples):
    for sample in samples:
        sample["sem_seg"][:] = 255
    model = MAKERS[name]().train()
    loss = model(samples if name == "loss_pixels" else [])[name]
    assert loss.item() == 0
    loss.backward()
    assert_all_have_gradients(model)


def test_images_without_labels_teach_that_nothing_is_there(samples):
    model = make_classifier().train()
    for sample in samples:
        sample["image_labels"] = []
    model(samples)["loss_labels"].backward()
    assert (model.classifier.classifier.bias.grad > 0).all()


def test_labels_outside_the_class_list_are_refused(samples):
    samples[1]["image_labels"] = [K]
    with pytest.raises(ValueError, match=r"image_labels \[8\]"):
        make_classifier().train()(samples)


def test_images_and_label_maps_of_a_batch_have_one_size(samples, scenes):
    model = make_segmenter().train()
    other = ImageMapper(K, size=16, label_maps=True)(scenes.records[0], np.random.RandomState(0))
    with pytest.raises(ValueError, match=r"different sizes: \(16, 16\), \(32, 32\)\. Use a mapper"):
        model([samples[0], other])
    del samples[1]["sem_seg"]
    name = samples[1]["image_id"]
    with pytest.raises(ValueError, match=rf"of image {name} has no 'sem_seg'\. Use a mapper"):
        model(samples)


def test_a_size_below_one_is_refused():
    with pytest.raises(ValueError, match=r"size \(INPUT.MASKX.SIZE\) is 0"):
        make_classifier(size=0)
    for sizes in ((), (0,), (48, -1), (32.5,)):
        with pytest.raises(ValueError, match=r"test_sizes \(TEST\.MASKX\.SIZES\) is \(.*Allowed"):
            make_segmenter(test_sizes=sizes)


def sharpened(model):
    """Make predictions that differ from pixel to pixel."""
    with torch.no_grad():
        model.network.head[-1].weight.mul_(2000)
    return model.eval()


@pytest.fixture
def sample(scenes):
    sample = ImageMapper(K, size=None, label_maps=False).read_image(scenes.records[0])
    return {"image": sample["image"][:, :, :50]}


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(SIZE,), (24, 32, 40)])
@pytest.mark.parametrize("output_size", [(64, 50), (45, 61)])
def test_scores_of_several_sizes_are_averaged_at_the_size_of_the_file(sample, sizes, output_size):
    model = sharpened(make_segmenter(test_sizes=sizes))
    height, width = output_size
    (result,) = model([sample | {"height": height, "width": width}])
    scores = []
    for size in sizes:
        square = F.interpolate(
            model.normalise(sample)[None], (size, size), mode="bilinear", antialias=True
        )
        scores.append(F.interpolate(model.network(square), output_size, mode="bilinear")[0])
    expected = torch.stack(scores).mean(dim=0).softmax(dim=0)
    torch.testing.assert_close(result["sem_seg_prob"], expected)
    assert torch.equal(result["sem_seg"], result["sem_seg_prob"].argmax(dim=0))
    assert result["sem_seg"].dtype == torch.int64
    assert result["sem_seg_prob"].std(dim=(1, 2)).max() > 1e-3


@torch.no_grad()
def test_results_of_images_of_different_sizes(scenes, sample):
    other = ImageMapper(K, size=None, label_maps=False).read_image(scenes.records[1])
    results = make_classifier().eval()([sample, other])
    assert [result["image_labels_prob"].shape for result in results] == [(K,), (K,)]
    results = make_segmenter().eval()([sample, other])
    assert [result["sem_seg"].shape for result in results] == [(64, 50), (64, 64)]
    assert make_classifier().eval()([]) == make_segmenter().eval()([]) == []


@torch.no_grad()
def test_other_labels_can_be_ruled_out(sample):
    model = sharpened(make_segmenter())
    free, prob = model.predict(sample), model.predict(sample, [2, 0])
    assert prob[[2, *range(4, K + 1)]].abs().sum() == 0
    torch.testing.assert_close(prob[[0, 1, 3]], free[[0, 1, 3]] / free[[0, 1, 3]].sum(dim=0))
    assert (model.predict(sample, [])[0] == 1).all()
    with pytest.raises(
        ValueError, match=r"image_labels \[8\]; class indices of 8 classes are 0 to 7"
    ):
        model.predict(sample, [8])


@torch.no_grad()
@pytest.mark.parametrize("labels", [None, [2], []])
def test_the_crf_sees_the_image_and_the_labels_that_are_left(sample, labels):
    pytest.importorskip("pydensecrf", reason="the extra `crf` is not installed")
    model = sharpened(make_segmenter(crf=True))
    refined = model.predict(sample, labels)
    model.crf = False
    prob = model.predict(sample, labels)
    kept = [0, *(c + 1 for c in (range(K) if labels is None else labels))]
    pixels = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())
    expected = torch.from_numpy(dense_crf.refine(pixels, prob[kept].numpy()))
    assert labels == [] or (expected - prob[kept]).abs().max() > 0.01
    torch.testing.assert_close(refined[kept], expected)
    assert refined.sum() == pytest.approx(64 * 50, rel=1e-4)

    model.crf = True
    refined = model.predict(sample | {"height": 15, "width": 35}, labels)
    torch.testing.assert_close(refined.sum(dim=0), torch.ones(15, 35))


def test_a_missing_crf_is_named_before_the_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    make_segmenter()
    with pytest.raises(ImportError, match="needs pydensecrf2"):
        make_segmenter(crf=True)


def test_it_starts_from_the_backbone_of_an_image_classifier():
    model, classifier = make_segmenter(), make_classifier()
    with torch.no_grad():
        classifier.classifier.backbone.conv1.weight.normal_()
    head = {name: value.clone() for name, value in model.network.head.state_dict().items()}
    model.load_state_dict(classifier.state_dict(), strict=False)
    for name, value in classifier.classifier.backbone.state_dict().items():
        assert torch.equal(model.network.backbone.state_dict()[name], value)
    assert all(torch.equal(v, head[n]) for n, v in model.network.head.state_dict().items())
    state = classifier.state_dict()
    state["classifier.backbone.conv1.weight"] = torch.zeros(1)
    words = r"image classifier that .* lacks 1 of the weights of its backbone SmallResNet.*PRETR"
    with pytest.raises(ValueError, match=words):
        model.load_state_dict(state, strict=False)


def test_probabilities_of_labels_do_not_depend_on_the_batch(scenes):
    model = make_classifier()
    prob = predict_image_labels(model, scenes.records, batch_size=3)
    assert prob.shape == (len(scenes.records), K)
    assert prob.dtype == np.float32
    assert not model.training
    assert np.allclose(prob, predict_image_labels(model, scenes.records, batch_size=8), atol=1e-6)
    sample = ImageMapper(K, size=None, label_maps=False).read_image(scenes.records[4])
    with torch.no_grad():
        expected = model([sample])[0]["image_labels_prob"].numpy()
    assert np.allclose(prob[4], expected, atol=1e-6)
    assert predict_image_labels(model, []).shape == (0, K)


class Oracle(nn.Module):
    """Stands in for a segmenter; the truth is the second best where `wrong` is the best."""

    num_classes = K

    def __init__(self, records, wrong=None):
        super().__init__()
        self.records = {record["image_id"]: record for record in records}
        self.wrong = wrong

    def predict(self, sample, labels=None):
        truth = torch.from_numpy(semantic_label_map(self.records[sample["image_id"]], K)).long()
        truth[truth == 255] = 0
        scores = 5 * F.one_hot(truth, K + 1).permute(2, 0, 1).float()
        if self.wrong is not None:
            scores[self.wrong] += 7
        prob = scores.softmax(dim=0)
        return prob if labels is None else restrict_to_labels(prob, labels)


def evaluate(model, records, **options):
    predictions = predict_label_maps(model, records, **options)
    return evaluate_label_maps(predictions, records, K, {"A": range(4)})


def test_perfect_label_maps_score_100(scenes):
    result = evaluate(Oracle(scenes.records), scenes.records)
    assert result["mIoU"] == {"all": pytest.approx(100), "A": pytest.approx(100)}
    image_id, label_map = next(predict_label_maps(Oracle(scenes.records), scenes.records))
    assert image_id == scenes.records[0]["image_id"]
    assert label_map.dtype == np.uint8


def test_only_image_labels_are_predicted_where_asked_for(scenes):
    record = next(r for r in scenes.records if 5 not in r["image_labels"])
    model = Oracle([record], wrong=6)
    ((_, anything),) = predict_label_maps(model, [record])
    assert (anything == 6).all()
    assert evaluate(model, [record], only_image_labels=True)["pixel_accuracy"] == 100
    ((_, nothing),) = predict_label_maps(
        model, [record | {"image_labels": []}], only_image_labels=True
    )
    assert not nothing.any()


def test_inference_does_not_leak_into_the_callers_code(scenes):
    for _ in predict_label_maps(make_segmenter(), scenes.records[:2]):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_every_record_is_predicted_once(scenes):
    records = scenes.records[:3]
    truth = [(r["image_id"], np.zeros((64, 64), np.uint8)) for r in records]
    assert evaluate_label_maps(iter(truth[::-1]), records, K)["mIoU"]["all"] >= 0
    with pytest.raises(ValueError, match="2 of 3 images have no prediction, the first is"):
        evaluate_label_maps(truth[1:2], records, K)
    with pytest.raises(ValueError, match="or was predicted before"):
        evaluate_label_maps([*truth, truth[0]], records, K)
    with pytest.raises(ValueError, match="Image 'stranger' was predicted, but is not among the 3"):
        evaluate_label_maps([("stranger", truth[0][1])], records, K)


@pytest.mark.parametrize("name", MAKERS)
def test_the_training_loop_drives_both(name, scenes, tmp_path):
    part = {"loss_labels": "classifier", "loss_pixels": "network"}[name]
    settings = TrainingSettings(
        iterations=25,
        batch_size=8,
        learning_rate=1e-2,
        weight_decay=0.0,
        optimizer="adam",
        lr_multipliers={f"{part}.backbone.": 0.5},
    )
    mapper = ImageMapper(K, size=SIZE, flip=False, label_maps=name == "loss_pixels")

    def batches(start, stop):
        return training_batches(
            scenes.records, mapper, batch_size=8, seed=0, start=start, stop=stop
        )

    model = MAKERS[name]()
    history = train(model, batches, settings, output_dir=tmp_path)
    assert history[-1][name] < 0.8 * history[0][name]
    if name == "loss_labels":
        truth = np.zeros((len(scenes.records), K), bool)
        for row, record in zip(truth, scenes.records, strict=True):
            row[record["image_labels"]] = True
        prob = predict_image_labels(model, scenes.records)
        assert 0 <= evaluate_image_labels(prob, truth)["mAP"] <= 100
    else:
        assert 0 <= evaluate(model, scenes.records)["pixel_accuracy"] <= 100


# --- class lists of checkpoints

NAMES = tuple("abcdefgh")


@pytest.mark.parametrize("make", [make_classifier, make_segmenter])
def test_a_checkpoint_says_its_classes_and_is_refused_by_others(make):
    state = make(class_names=NAMES).state_dict()
    make(class_names=NAMES).load_state_dict(state)
    of_predictor = make()
    of_predictor.load_state_dict(state)
    assert of_predictor.class_names == NAMES
    others = make(class_names=(*NAMES[:6], "h", "g"))
    with pytest.raises(ValueError, match=r"Class 6 is 'g' in the checkpoint, but 'h' by the data"):
        others.load_state_dict(state)
    with pytest.raises(ValueError, match=r"Class 7 is 'h' in the checkpoint, but None by the data"):
        make(class_names=NAMES[:7]).load_state_dict(state)


@pytest.mark.parametrize("make", [make_classifier, make_segmenter])
def test_a_checkpoint_that_says_no_classes_is_taken_as_it_is(make):
    state = make(class_names=NAMES).state_dict()
    del state["_extra_state"]
    model = make(class_names=NAMES[::-1])
    model.load_state_dict(state)
    assert model.class_names == NAMES[::-1]


def test_the_backbone_of_a_classifier_of_other_classes_is_taken():
    start = make_classifier(class_names=NAMES[::-1])
    torch.nn.init.ones_(start.classifier.backbone.conv1.weight)
    model = make_segmenter(class_names=NAMES)
    model.load_state_dict(start.state_dict(), strict=False)
    assert (model.network.backbone.conv1.weight == 1).all()
    assert model.class_names == NAMES
