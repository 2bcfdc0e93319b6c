import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from maskx.core.backbones import SmallResNet
from maskx.core.image_classifier import ImageClassifier, LayerTaps
from maskx.systems.class_patterns import patterns as class_patterns
from maskx.systems.class_patterns.pattern_moments import load_moments, merge_moments
from maskx.systems.class_patterns.patterns import (
    ClassPatterns,
    PatternMoments,
    choose_images,
    discover_class_patterns,
    find_patterns,
    project,
    report_patterns,
)

D = 6


def two_clusters(seed=0, *, count=8, size=6, negate=False, offset=2.0):
    """Images with an object of 3 x 2 pixels: features, maps that are high on it, its mask."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, D)
    images = []
    for index in range(count):
        mask = torch.zeros(size, size, dtype=torch.bool)
        mask[index % 3 : index % 3 + 3, index % 4 : index % 4 + 2] = True
        features = offset + 0.1 * torch.randn(D, size, size, generator=generator)
        features += 2 * axis[:, None, None] * mask
        maps = mask.float() + 0.5 * torch.randn(1, size, size, generator=generator)
        images.append((-features if negate else features, maps, mask))
    return images


def stream(images, *, with_maps=True, flip_maps=False):
    moments = PatternMoments(1, D)
    for index, (features, maps, _) in enumerate(images):
        maps = (-maps if flip_maps else maps) if with_maps else None
        moments.update(features, maps, [0], image_id=index)
    return moments


def on_objects(patterns, images):
    """Share of the pixels whose projection has the right sign."""
    right = [(project(f, patterns, [0])[0] > 0) == mask for f, _, mask in images]
    return torch.stack(right).float().mean()


def slow_reference(images):
    """Eq. 1 to 3 with loops, up to the sign: projections (h, w) of each image, eigenvalues."""
    vectors = [
        f[:, y, x].double().numpy()
        for f, _, _ in images
        for y in range(f.shape[1])
        for x in range(f.shape[2])
    ]
    mean = sum(vectors) / len(vectors)
    sigma = sum(np.outer(t - mean, t - mean) for t in vectors) / len(vectors)
    # Power iteration, so that not the same solver is compared with itself.
    direction = np.ones(D)
    for _ in range(2000):
        direction = sigma @ direction
        direction /= np.linalg.norm(direction)
    projections = [
        np.array([[(t - mean) @ direction for t in row] for row in f.double().numpy().T]).T
        for f, _, _ in images
    ]
    return projections, sigma, mean, direction


def test_patterns_are_those_of_the_equations():
    images = two_clusters()
    patterns = find_patterns(stream(images))
    projections, sigma, mean, direction = slow_reference(images)
    eigenvalues = np.sort(np.linalg.eigvalsh(sigma))[::-1]

    np.testing.assert_allclose(patterns.mean[0], mean, rtol=1e-6)
    assert abs(patterns.direction[0].numpy() @ direction) == pytest.approx(1, abs=1e-6)
    assert float(patterns.std[0]) == pytest.approx(eigenvalues[0] ** 0.5, rel=1e-5)
    assert float(patterns.explained[0]) == pytest.approx(eigenvalues[0] / sigma.trace(), rel=1e-5)
    assert float(patterns.explained_second[0]) == pytest.approx(
        eigenvalues[1] / sigma.trace(), rel=1e-5
    )
    sign = np.sign(patterns.direction[0].numpy() @ direction)
    found = [project(f, patterns, [0])[0] for f, _, _ in images]
    np.testing.assert_allclose(np.stack(found), sign * np.stack(projections), atol=1e-5)
    assert found[0].dtype == torch.float32

    maps = np.concatenate([m.flatten() for _, m, _ in images])
    margin = abs(np.corrcoef(np.stack(projections).ravel(), maps)[0, 1])
    assert float(patterns.sign_margin[0]) == pytest.approx(margin, rel=1e-5)
    assert patterns.num_images.tolist() == [8]
    assert patterns.num_pixels.tolist() == [8 * 36]


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("with_maps", [True, False])
@pytest.mark.parametrize("flip_solver", [False, True])
def test_the_object_is_positive_whatever_the_sign_of_features_and_solver(
    negate, with_maps, flip_solver, monkeypatch
):
    images = two_clusters(negate=negate)
    moments = stream(images, with_maps=with_maps)
    if flip_solver:
        solve = torch.linalg.eigh
        monkeypatch.setattr(
            torch.linalg, "eigh", lambda matrix: (solve(matrix)[0], -solve(matrix)[1])
        )
    patterns = find_patterns(moments)
    assert on_objects(patterns, images) == 1
    if with_maps:
        assert 0.4 < patterns.sign_margin[0] < 1
    else:
        assert patterns.sign_margin.isnan().all()


def test_the_maps_decide_the_sign():
    images = two_clusters()
    one, other = (find_patterns(stream(images, flip_maps=flip)) for flip in (False, True))
    assert torch.equal(one.direction, -other.direction)
    assert torch.equal(one.sign_margin, other.sign_margin)


def test_the_margin_is_of_the_pixels_that_count():
    images, moments = two_clusters(), PatternMoments(1, D)
    generator = torch.Generator().manual_seed(3)
    counts = [torch.rand(1, 6, 6, generator=generator) < 0.3 for _ in images]
    for (features, maps, _), where in zip(images, counts, strict=True):
        moments.update(features, maps, [0], map_counts=where)
    patterns = find_patterns(moments)
    everywhere = torch.cat([project(f, patterns, [0]).flatten() for f, _, _ in images]).double()
    both = [
        torch.stack([project(f, patterns, [0])[where], m[where]])
        for (f, m, _), where in zip(images, counts, strict=True)
    ]
    q, values = torch.cat(both, dim=1).double()
    expected = torch.cov(torch.stack([q, values]), correction=0)[0, 1]
    expected /= values.std(correction=0) * everywhere.std(correction=0)
    assert expected > 0.3
    assert float(patterns.sign_margin[0]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("maps", ["count nowhere", "are constant"])
def test_maps_that_say_nothing_leave_the_sign_to_the_extremes(maps, negate):
    images = two_clusters(negate=negate)
    moments = PatternMoments(1, D)
    for features, of_image, _ in images:
        counts = torch.full(of_image.shape, maps == "are constant")
        moments.update(features, torch.ones_like(of_image), [0], map_counts=counts)
    patterns = find_patterns(moments)
    assert patterns.valid.tolist() == [True]
    assert patterns.sign_margin.tolist() == [0]
    assert on_objects(patterns, images) == 1
    both = ClassPatterns({"C41": patterns}, ("dog",), "")
    assert both.uncertain() == {"C41": ["dog"]}
    lines = report_patterns(both)
    assert lines[2].endswith("sign from the extremes, the class activation maps say nothing |")
    assert lines[3].startswith("C41: the patterns of 'dog' may point away from the class")


def hard_patterns():
    """Classes: 0 sound, 1 without images, 2 one pixel, 3 constant, 4 two equal components."""
    moments = PatternMoments(5, D)
    for features, maps, _ in two_clusters():
        moments.update(features, maps, [0])
    moments.update(torch.rand(D, 1, 1), torch.rand(1, 1, 1), [2])
    constant = torch.linspace(0.1, 1e3, D)[:, None, None].expand(D, 7, 7)
    for _ in range(3):
        moments.update(constant, torch.rand(1, 7, 7), [3])
    cross = torch.zeros(D, 2, 2)
    cross[0] = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    cross[1] = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    moments.update(cross, torch.rand(1, 2, 2), [4])
    return find_patterns(moments)


def test_classes_without_a_pattern_are_marked_and_nothing_fails():
    patterns = hard_patterns()
    assert patterns.valid.tolist() == [True, False, False, False, True]
    assert patterns.num_images.tolist() == [8, 0, 1, 3, 1]
    assert patterns.num_pixels.tolist() == [288, 0, 1, 147, 4]
    for name in ("direction", "std", "explained", "explained_second", "sign_margin"):
        values = getattr(patterns, name)
        assert values[~patterns.valid].isnan().all(), name
        assert values[patterns.valid].isfinite().all(), name
    assert patterns.explained[4] == patterns.explained_second[4] == 0.5
    torch.testing.assert_close(patterns.direction[4].norm(), torch.tensor(1.0))
    assert patterns.mean.isfinite().all()

    projections = project(torch.rand(D, 3, 4), patterns, [3, 0, 1, 4])
    assert projections.shape == (4, 3, 4)
    assert projections.isnan().all(dim=(1, 2)).tolist() == [True, False, True, False]


def test_the_rounding_of_features_is_no_variance():
    moments = PatternMoments(1, D)
    features = torch.full((D, 4, 4), 1000.0)
    features[:, ::2] = torch.nextafter(features[:, ::2], torch.tensor(2000.0))
    moments.update(features, torch.rand(1, 4, 4), [0])
    assert moments.covariance(0).trace() > 0
    assert find_patterns(moments).valid.tolist() == [False]


def test_one_channel_has_no_second_component():
    moments = PatternMoments(1, 1)
    moments.update(torch.tensor([[[0.0, 1.0, 5.0]]]), torch.tensor([[[0.0, 0.0, 1.0]]]), [0])
    patterns = find_patterns(moments)
    assert patterns.direction.tolist() == [[1.0]]
    assert patterns.explained.tolist() == [1.0]
    assert patterns.explained_second.tolist() == [0.0]


def test_the_report_names_what_to_look_at():
    layer = hard_patterns()
    names = ("dog", "cat", "bird", "sky", "train")
    patterns = ClassPatterns({"C41": layer}, names, "hash")
    lines = report_patterns(patterns, min_margin=0.05)[: 2 + 5]
    assert lines[0].startswith("| class | layer | images | pixels | explained 1 | explained 2 |")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert all(len(row) == 8 for row in cells)
    dog, cat, bird, sky, train = cells
    assert dog[:4] == ["dog", "C41", "8", "288"]
    assert dog[4] == f"{100 * float(layer.explained[0]):.1f} %"
    assert dog[6] == f"{float(layer.sign_margin[0]):.2f}"
    assert dog[7] == ""
    assert cat == ["cat", "C41", "0", "0", "-", "-", "-", "no pattern: no image"]
    assert bird[7] == "no pattern: one pixel"
    assert sky[7] == "no pattern: no variance"
    assert train[7].startswith("two equal components, the direction is not unique")

    margin = float(layer.sign_margin[0])
    lines = report_patterns(ClassPatterns({"C41": layer}, names, ""), min_margin=margin + 0.01)
    assert f"sign uncertain, margin below {margin + 0.01:g}" in lines[2]
    assert "dog" in patterns.uncertain(margin + 0.01)["C41"]
    assert "dog" not in patterns.uncertain(margin - 0.01)["C41"]
    without = find_patterns(stream(two_clusters(), with_maps=False))
    lines = report_patterns(ClassPatterns({"C42": without}, ("dog",), ""))
    assert lines[2].endswith("| - | sign from the extremes, no class activation maps |")
    assert "C42: the patterns of 'dog'" in lines[3]


def test_every_class_needs_a_name():
    patterns = find_patterns(stream(two_clusters()))
    with pytest.raises(ValueError, match="layer 'C41' are of 1 classes, but 2 names are given"):
        ClassPatterns({"C41": patterns}, ("dog", "cat"), "hash")


def test_projections_of_several_labels_are_those_of_each():
    moments = PatternMoments(3, D)
    for features, maps, _ in two_clusters():
        moments.update(features, maps, [0])
        moments.update(features.flip(0), maps, [2])
    patterns = find_patterns(moments)
    features = torch.rand(D, 3, 5)
    together = project(features, patterns, [2, 0])
    assert torch.equal(together, torch.cat([project(features, patterns, [c]) for c in (2, 0)]))
    expected = torch.einsum("d,dhw->hw", patterns.direction[2], features)
    expected -= patterns.direction[2] @ patterns.mean[2]
    torch.testing.assert_close(together[0], expected)
    assert project(features, patterns, []).shape == (0, 3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(project(features, patterns, [2, 0]), together)


def test_projection_refuses_what_does_not_fit():
    patterns = find_patterns(stream(two_clusters()))
    with pytest.raises(ValueError, match=r"Label 1 of an image .* indices 0 to 0"):
        project(torch.rand(D, 2, 2), patterns, [1])
    with pytest.raises(ValueError, match=r"\(5, 2, 2\), but the patterns are .* \(6, h, w\)"):
        project(torch.rand(5, 2, 2), patterns, [0])


def test_images_are_chosen_at_random_up_to_the_limit():
    image_labels = [[0], [0, 1], [1, 1, 0], [0], [], [0, 2], [0]] * 3
    used = choose_images(image_labels, 4, 5, seed=3)
    assert len(used) == len(image_labels)
    for labels, chosen in zip(image_labels, used, strict=True):
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(labels)
    counts = [sum(label in chosen for chosen in used) for label in range(4)]
    assert counts == [5, 5, 3, 0]
    assert used == choose_images(image_labels, 4, 5, seed=3)
    assert used != choose_images(image_labels, 4, 5, seed=4)

    alike = choose_images([[0, 1]] * 40, 2, 20, seed=3)
    assert any(len(labels) == 1 for labels in alike), "classes are drawn for independently"

    everything = choose_images(image_labels, 4, 1000, seed=3)
    assert everything == [sorted(set(labels)) for labels in image_labels]
    # Each image is chosen about equally often: 5 of 18, standard error 0.032.
    often = [
        sum(0 in choose_images(image_labels, 4, 5, seed)[image] for seed in range(200)) / 200
        for image in (0, 6, 20)
    ]
    assert all(abs(share - 5 / 18) < 0.13 for share in often)


def test_the_choice_of_images_refuses_unknown_labels_and_limits():
    with pytest.raises(ValueError, match=r"Label 4 of image number 1 \(from 0\) .* 0 to 3"):
        choose_images([[0], [1, 4]], 4, 5, seed=0)
    with pytest.raises(ValueError, match="max_images_per_class must be at least 1, got 0"):
        choose_images([[0]], 1, 0, seed=0)


# The pass over the images.

LAYERS = ("C41", "layer3")


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    backbone = SmallResNet(widths=(4, 4, 6, 8), output_stride=8)
    return ImageClassifier(backbone, in_feature="layer4", in_channels=8, num_classes=3)


def make_samples(count=10):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image_id": index,
            "image_labels": [index % 3] if index % 2 else [0, 2],
            "labels_used": [index % 3] if index % 2 else [0, 2],
            "image": torch.randn(3, 40, 48, generator=generator),
        }
        for index in range(count)
    ]


class Interrupted(Exception):
    pass


def discover(model, samples, layers=LAYERS, *, stop_at=None, seen=None, **options):
    def read(index):
        if index == stop_at:
            raise Interrupted
        if seen is not None:
            seen.append(index)
        return samples[index]

    return discover_class_patterns(
        model,
        read,
        layers,
        preprocess=lambda batch: torch.stack([sample["image"] for sample in batch]),
        **{"total": len(samples), "batch_size": 2} | options,
    )


def assert_equal_moments(one, other):
    assert one.keys() == other.keys()
    for layer in one:
        states = one[layer].state_dict(), other[layer].state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]), layer


def test_the_pass_streams_every_layer_and_the_map_of_each_label(classifier):
    samples = make_samples()
    forwards = []
    handle = classifier.backbone.register_forward_hook(lambda *_: forwards.append(1))
    found = discover(classifier, samples)
    handle.remove()
    assert len(forwards) == 5, "one forward pass per batch for all layers"

    expected = {"C41": PatternMoments(3, 8), "layer3": PatternMoments(3, 6)}
    for first in range(0, 10, 2):
        batch = samples[first : first + 2]
        with torch.no_grad(), LayerTaps(classifier.backbone, LAYERS) as taps:
            images = torch.stack([sample["image"] for sample in batch])
            features = classifier.backbone(images)["layer4"]
        weight = classifier.classifier.weight.detach()
        for row, sample in enumerate(batch):
            labels = sample["labels_used"]
            maps = torch.einsum("kc,chw->khw", weight, features[row])[labels].relu()
            counts = torch.ones_like(maps, dtype=torch.bool)
            if len(labels) == 2:  # where the other has more of its own, a map does not count
                counts = torch.stack([maps[0] >= maps[1], maps[1] >= maps[0]])
            for layer in LAYERS:
                features_of_image = taps.features[layer][row]
                image_id = sample["image_id"]
                expected[layer].update(
                    features_of_image, maps, labels, map_counts=counts, image_id=image_id
                )
    for layer in LAYERS:
        for name, tensor in expected[layer].state_dict().items():
            torch.testing.assert_close(
                found[layer].state_dict()[name], tensor, rtol=1e-5, atol=1e-6
            )
    assert found["C41"].num_images.tolist() == [7, 2, 6]


def test_a_resumed_pass_equals_one_that_was_not_interrupted(classifier, tmp_path):
    samples, path = make_samples(), tmp_path / "new" / "moments.safetensors"
    whole = discover(classifier, samples)
    options = {"checkpoint": path, "save_every": 4, "identity": {"images": "train"}}
    with pytest.raises(Interrupted):
        discover(classifier, samples, stop_at=6, **options)
    assert load_moments(path)[1]["done"] == 4
    seen = []
    resumed = discover(classifier, samples, seen=seen, **options)
    assert seen == list(range(4, 10))
    discover(classifier, samples, checkpoint=tmp_path / "whole")
    assert load_moments(path)[1]["images"] == load_moments(tmp_path / "whole")[1]["images"]
    assert_equal_moments(resumed, whole)

    # A finished pass is read from its file.
    again = discover(classifier, samples, stop_at=0, **options)
    assert_equal_moments(again, whole)
    assert [p.name for p in path.parent.iterdir()] == ["moments.safetensors"]


def test_a_checkpoint_of_another_run_is_refused(classifier, tmp_path):
    samples, path = make_samples(4), tmp_path / "moments.safetensors"
    identity = {"images": "train", "size": (40, 48)}
    discover(classifier, samples, checkpoint=path, identity=identity)
    discover(classifier, samples, checkpoint=path, identity=identity)

    with pytest.raises(ValueError, match="made with images train, but this run has images val"):
        discover(classifier, samples, checkpoint=path, identity=identity | {"images": "val"})
    with pytest.raises(ValueError, match=r"layers \['C41', 'layer3'\], but this run has .*C42"):
        discover(classifier, samples, ["C42"], checkpoint=path, identity=identity)
    with pytest.raises(ValueError, match="made with total 4, but this run has total 6"):
        discover(classifier, make_samples(6), checkpoint=path, identity=identity)
    other = ImageClassifier(classifier.backbone, in_feature="layer4", in_channels=8, num_classes=3)
    with pytest.raises(ValueError, match=r"made with network .*, but this run has network"):
        discover(other, samples, checkpoint=path, identity=identity)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"moments.safetensors' .* is damaged"):
        discover(classifier, samples, checkpoint=path, identity=identity)


def test_shards_merge_into_the_whole(classifier, tmp_path):
    samples, paths = make_samples(), [tmp_path / "0", tmp_path / "1", tmp_path / "2"]
    whole = discover(classifier, samples)
    for index, path in enumerate(paths):
        discover(classifier, samples[index::3], checkpoint=path)
    merged = merge_moments(paths)
    for layer in LAYERS:
        one, other = merged[layer], whole[layer]
        assert torch.equal(one.num_pixels, other.num_pixels)
        assert torch.equal(one.num_images, other.num_images)
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.cross, other.cross, rtol=1e-4, atol=1e-5)
        for label in range(3):
            torch.testing.assert_close(
                one.covariance(label), other.covariance(label), rtol=1e-4, atol=1e-6
            )


def test_shards_that_do_not_belong_together_are_refused(classifier, tmp_path):
    samples = make_samples()
    discover(classifier, samples[:4], checkpoint=tmp_path / "0")
    discover(classifier, samples[:4], checkpoint=tmp_path / "same")
    discover(classifier, samples[4:], ["C41"], checkpoint=tmp_path / "layers")
    with pytest.raises(ValueError, match=r"same' holds the same images as '.*0'"):
        merge_moments([tmp_path / "0", tmp_path / "same"])
    with pytest.raises(ValueError, match=r"layers' was made with layers \['C41'\], but '.*0' has"):
        merge_moments([tmp_path / "0", tmp_path / "layers"])
    weights = copy.deepcopy(classifier)
    torch.nn.init.zeros_(weights.classifier.bias)
    discover(weights, samples[4:], checkpoint=tmp_path / "network")
    with pytest.raises(ValueError, match=r"network' was made with network .*, but '.*0' has"):
        merge_moments([tmp_path / "0", tmp_path / "network"])
    with pytest.raises(Interrupted):
        discover(
            classifier,
            samples,
            checkpoint=tmp_path / "half",
            save_every=2,
            stop_at=6,
        )
    with pytest.raises(ValueError, match="half' holds 6 of the 10 images of its shard"):
        merge_moments([tmp_path / "half"])


def test_the_pass_refuses_wrong_images_and_arguments(classifier):
    samples = make_samples(4)
    with pytest.raises(ValueError, match="total must be at least 1 image, got 0"):
        discover(classifier, [])
    with pytest.raises(ValueError, match="save_every must be at least 1 image, got 0"):
        discover(classifier, samples, save_every=0)
    with pytest.raises(ValueError, match=r"Layers must be named, each once; got \['C41', 'C41'\]"):
        discover(classifier, samples, ["C41", "C41"])
    with pytest.raises(ValueError, match="no layer 'C49'"):
        discover(classifier, samples, ["C49"])
    wrong = [samples[0], samples[1] | {"image_labels": [0, 3]}]
    with pytest.raises(ValueError, match=r"Label 3 of image 1 is outside .* 0 to 2"):
        discover(classifier, wrong)
    wrong = [samples[0], samples[1] | {"image_labels": [2], "labels_used": [0, 2]}]
    with pytest.raises(ValueError, match=r"labels_used of image 1 holds 0, but .* are \[2\]"):
        discover(classifier, wrong)
    wrong = [samples[0], samples[1] | {"image": torch.full((3, 40, 48), math.nan)}]
    with pytest.raises(ValueError, match="image 1 hold NaN"):
        discover(classifier, wrong)


def test_images_of_no_class_are_passed_over(classifier):
    samples = make_samples(4)
    with_empty = [*samples, *({**sample, "labels_used": []} for sample in samples)]
    with_empty += [{**sample, "labels_used": [], "image_labels": []} for sample in samples]
    assert_equal_moments(discover(classifier, with_empty), discover(classifier, samples))


def test_patterns_of_a_classifier_that_sees_the_object_lie_on_the_object():
    class Identity(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Identity()

        def forward(self, images):
            return {"conv": self.conv(images)}

    model = ImageClassifier(Identity(), in_feature="conv", in_channels=D, num_classes=1)
    images = two_clusters(negate=True)
    with torch.no_grad():
        model.classifier.weight.copy_(-torch.linspace(-1, 1, D))
    samples = [
        {"image_id": i, "image_labels": [0], "labels_used": [0], "image": image[0]}
        for i, image in enumerate(images)
    ]
    patterns = find_patterns(discover(model, samples, ["conv"])["conv"])
    assert on_objects(patterns, images) == 1
    assert patterns.sign_margin[0] > 0.9


def test_the_object_of_another_label_does_not_turn_the_sign(classifier, monkeypatch):
    """The map of a label is far below zero on the other's object, the pattern is above there."""
    image = torch.zeros(2, 8, 8)  # channel 0: any object; channel 1: which one
    image[0, :7] = 5.0
    image[1, 0], image[1, 1:7] = 4.0, -4.0
    weight = torch.tensor([[1.0, 4.0], [1.0, -4.0]])
    plain = torch.einsum("kc,chw->khw", weight, image)
    moments = PatternMoments(2, 2)
    moments.update(image, plain, [0, 1])
    assert moments.cross[0, 0] < 0  # what must not fix the sign

    monkeypatch.setattr(classifier, "activation_maps", lambda features, labels: plain[None, labels])
    maps, counts = class_patterns._sign_maps(classifier, image, [0], [0, 1])
    assert maps.min() == 0
    assert counts[0].any(dim=1).tolist() == [True, *[False] * 6, True]
    moments = PatternMoments(2, 2)
    moments.update(image, maps, [0], map_counts=counts)
    assert moments.cross[0, 0] > 0
    # Of the labels that are used, in their order.
    both, counts_of_both = class_patterns._sign_maps(classifier, image, [1, 0], [0, 1])
    assert torch.equal(both[1], maps[0])
    assert torch.equal(counts_of_both[1], counts[0])
    assert counts_of_both[0].any(dim=1).tolist() == [False, *[True] * 7]

    plain[0, 3, 3] = -math.inf
    maps, _ = class_patterns._sign_maps(classifier, image, [0], [0, 1])
    with pytest.raises(ValueError, match="image 8 hold NaN"):
        moments.update(image, maps, [0], image_id=8)
