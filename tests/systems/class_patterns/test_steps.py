import json
import sys

import cv2
import numpy as np
import pytest
import torch

from maskx.core.backbones import SmallResNet
from maskx.core.image_classifier import ImageClassifier, LayerTaps
from maskx.core.sample_models import SampleClassifier
from maskx.data.coco import load_coco
from maskx.data.images import ImageMapper
from maskx.data.label_maps import read_label_map
from maskx.data.scenes.generator import generate_scenes
from maskx.systems.class_patterns.components import draw_components
from maskx.systems.class_patterns.patterns import accumulate_moments, find_patterns
from maskx.systems.class_patterns.projections import projections_path, read_projections
from maskx.systems.class_patterns.proxy_masks import ProxyMaskSettings, mask_path, proxy_label_map
from maskx.systems.class_patterns.steps import (
    PATTERNS_NAME,
    ClassifierSource,
    discover,
    make_masks,
    project,
    projections_folder,
)

LAYERS = ("C41", "layer3")
PLAIN = ProxyMaskSettings(crf=False)


def make_source(num_classes=4, seed=0):
    torch.manual_seed(seed)
    backbone = SmallResNet(widths=(4, 4, 6, 8))
    classifier = ImageClassifier(
        backbone, in_feature="layer4", in_channels=8, num_classes=num_classes
    )
    model = SampleClassifier(classifier, size=64)
    mapper = ImageMapper(num_classes, size=None, label_maps=False)
    source = ClassifierSource(model, mapper.read_image, "the test", {"image_size": 64})
    model.eval()
    return source


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    json_file = generate_scenes(folder, count=10, size=64, num_categories=4, style="sparse", seed=3)
    return load_coco(json_file, folder)


@pytest.fixture
def found(data, tmp_path):
    """A classifier, its patterns and its projections."""
    source = make_source()
    patterns = run_discovery(source, data, tmp_path / "patterns")
    project(source, data.records, patterns, LAYERS, tmp_path / "proxy", report=lambda line: None)
    return source, patterns, tmp_path / "proxy"


def run_discovery(source, data, output, **options):
    options = {"batch_size": 3, "save_every": 3, "report": lambda line: None} | options
    return discover(source, data.records, data.class_names, LAYERS, output=output, **options)


def assert_same_patterns(first, second):
    for layer in LAYERS:
        for name, value in vars(first.layers[layer]).items():
            torch.testing.assert_close(
                getattr(second.layers[layer], name), value, equal_nan=True, atol=1e-5, rtol=1e-4
            )


def features_of(source, record, layer):
    with LayerTaps(source.classifier.backbone, (layer,)) as taps, torch.no_grad():
        source.classifier(source.model.preprocess([source.read_image(record)]))
    return taps.features[layer][0]


def test_patterns_are_the_principal_components_of_the_tagged_images(data, tmp_path):
    source = make_source()
    lines = []
    patterns = run_discovery(source, data, tmp_path, report=lines.append)
    moments = {}  # for the sign, of one image at a time
    for record in data.records:
        images = source.model.preprocess([source.read_image(record)])
        labels = record["image_labels"]
        sample = {"image_id": record["image_id"], "image_labels": labels, "labels_used": labels}
        accumulate_moments(source.classifier, images, [sample], LAYERS, moments)
    for layer in LAYERS:
        signed = find_patterns(moments[layer]).direction
        for label in range(4):
            records = [r for r in data.records if label in r["image_labels"]]
            pixels = [features_of(source, record, layer).flatten(1).T for record in records]
            pixels = torch.cat(pixels).double().numpy()
            _, vectors = np.linalg.eigh(np.cov(pixels.T, bias=True))
            direction = vectors[:, -1] * np.sign(vectors[:, -1] @ signed[label].numpy())
            of_layer = patterns.layers[layer]
            np.testing.assert_allclose(of_layer.mean[label], pixels.mean(0), atol=1e-5)
            np.testing.assert_allclose(of_layer.direction[label], direction, atol=1e-3)
            assert of_layer.num_images[label] == len(records)
    assert [p.name for p in tmp_path.iterdir()] == [PATTERNS_NAME]
    assert data.class_names[0] in "\n".join(lines)


def test_shards_and_processes_find_what_one_pass_finds(data, tmp_path):
    source = make_source()
    whole = run_discovery(source, data, tmp_path / "whole")
    for index in (2, 0, 1):
        assert run_discovery(source, data, tmp_path / "parts", shard=(index, 3)) is None
    assert_same_patterns(whole, run_discovery(source, data, tmp_path / "parts", merge=True))
    assert_same_patterns(whole, run_discovery(source, data, tmp_path / "two", workers=2))
    assert [p.name for p in (tmp_path / "parts").iterdir()] == [PATTERNS_NAME]


def test_missing_shards_are_named(data, tmp_path):
    source = make_source()
    with pytest.raises(ValueError, match="holds shards of no runs with this classifier"):
        run_discovery(source, data, tmp_path, merge=True)
    run_discovery(source, data, tmp_path, shard=(1, 3))
    with pytest.raises(ValueError, match=r"lacks the shards \[0, 2\] of 3"):
        run_discovery(source, data, tmp_path, merge=True)
    # Shards of another choice of images are no part of this one.
    with pytest.raises(ValueError, match="holds shards of no runs"):
        run_discovery(source, data, tmp_path, merge=True, max_images_per_class=1)
    with pytest.raises(ValueError, match="Shard 3 of 3 does not exist"):
        run_discovery(source, data, tmp_path, shard=(3, 3))
    with pytest.raises(ValueError, match="workers of at least 1"):
        run_discovery(source, data, tmp_path, workers=0)


def test_an_interrupted_pass_goes_on(data, tmp_path):
    source = make_source()
    whole = run_discovery(source, data, tmp_path / "whole")
    read, seen = source.read_image, []

    def stop_late(record):
        seen.append(record["image_id"])
        if len(seen) == 8:
            raise KeyboardInterrupt
        return read(record)

    source.read_image = stop_late
    with pytest.raises(KeyboardInterrupt):
        run_discovery(source, data, tmp_path / "again")
    assert not (tmp_path / "again" / PATTERNS_NAME).exists()
    resumed = run_discovery(source, data, tmp_path / "again")
    assert seen[8] == data.records[6]["image_id"]  # after the last checkpoint
    for layer in LAYERS:
        for name, value in vars(whole.layers[layer]).items():
            assert torch.equal(value.nan_to_num(), vars(resumed.layers[layer])[name].nan_to_num())


def test_finished_patterns_are_kept_and_others_refused(data, tmp_path):
    source = make_source()
    first = run_discovery(source, data, tmp_path)
    source.read_image = None  # nothing is read again
    assert_same_patterns(first, run_discovery(source, data, tmp_path))
    with pytest.raises(ValueError, match=r"made with images .* but this run has images"):
        run_discovery(source, data, tmp_path, max_images_per_class=1)
    with pytest.raises(ValueError, match="found with the network"):
        run_discovery(make_source(seed=1), data, tmp_path)


def test_bad_layers_and_labels_are_named(data, tmp_path):
    source = make_source()
    arguments = (source, data.records, data.class_names)
    with pytest.raises(ValueError, match=r"no layer 'C44'; it has C41, C42, C43, conv1"):
        discover(*arguments, ("C44",), output=tmp_path)
    with pytest.raises(ValueError, match="have 3 classes, but the test has 4"):
        discover(source, data.records, data.class_names[:3], LAYERS, output=tmp_path)
    bad = [data.records[0] | {"image_id": "holiday", "image_labels": [1, 4]}]
    with pytest.raises(ValueError, match="Label 4 of image 'holiday' is outside the classifier"):
        discover(source, bad, data.class_names, LAYERS, output=tmp_path)
    nothing = [record | {"image_labels": []} for record in data.records]
    with pytest.raises(ValueError, match="None of the 10 images has an image label"):
        discover(source, nothing, data.class_names, LAYERS, output=tmp_path)


def break_image(source, image_id):
    preprocess = source.model.preprocess

    def broken(samples):
        images = preprocess(samples)
        for index, sample in enumerate(samples):
            if sample["image_id"] == image_id:
                images[index] = float("nan")
        return images

    source.model.preprocess = broken


def test_the_image_with_features_that_are_not_finite_is_named(data, found, tmp_path):
    source, patterns, _ = found
    break_image(source, data.records[4]["image_id"])
    image_id = data.records[4]["image_id"]
    with pytest.raises(ValueError, match=f"of image {image_id} hold NaN or infinite"):
        run_discovery(source, data, tmp_path / "new")
    with pytest.raises(ValueError, match=f"Features of layer C41 of image {image_id} hold NaN"):
        project(source, data.records, patterns, LAYERS, tmp_path / "new proxy")


def test_projections_follow_equation_3(data, found):
    source, patterns, folder = found
    for layer in LAYERS:
        header = json.loads((projections_folder(folder, layer) / "projections.json").read_text())
        assert (header["layer"], header["image_size"]) == (layer, 64)
    for record in data.records:
        for layer in LAYERS:
            labels, q = read_projections(projections_folder(folder, layer), record["image_id"])
            assert labels == record["image_labels"]
            features = features_of(source, record, layer).numpy()
            of_layer = patterns.layers[layer]
            for row, label in enumerate(labels):
                centred = features - of_layer.mean[label].numpy()[:, None, None]
                expected = np.tensordot(of_layer.direction[label].numpy(), centred, 1)
                np.testing.assert_allclose(q[row], expected, atol=1e-4)


def test_projections_are_made_once_and_damaged_ones_again(data, found):
    source, patterns, folder = found
    first, other = (r["image_id"] for r in data.records[:2])
    path = projections_path(projections_folder(folder, "C41"), first)
    content = path.read_bytes()
    path.write_bytes(content[:100])
    projections_path(projections_folder(folder, "layer3"), other).unlink()
    calls, lines = [], []
    handle = source.classifier.backbone.register_forward_hook(
        lambda module, inputs, output: calls.append(len(inputs[0]))
    )
    project(source, data.records, patterns, LAYERS, folder, report=lines.append)
    handle.remove()
    assert calls == [2]
    assert path.read_bytes() == content
    assert "2 written (1 of them were there, but damaged), 8 kept" in lines[0]


def test_batches_of_no_image_are_refused(data, found, tmp_path):
    source, patterns, _ = found
    for size in (0, -2):
        match = f"batch_size must be at least 1 image, got {size}"
        with pytest.raises(ValueError, match=match):
            run_discovery(source, data, tmp_path / "new", batch_size=size)
        with pytest.raises(ValueError, match=match):
            project(source, data.records, patterns, LAYERS, tmp_path / "new", batch_size=size)
    assert not (tmp_path / "new").exists()


def test_patterns_of_another_network_layer_or_size_are_refused(data, found, tmp_path):
    source, patterns, _ = found
    with pytest.raises(
        ValueError, match=r"class patterns was made with network .*, but the test has network"
    ):
        project(make_source(seed=1), data.records, patterns, LAYERS, tmp_path)
    with pytest.raises(ValueError, match=r"no class patterns of layer 'C42'\. Allowed: C41"):
        project(source, data.records, patterns, ("C42",), tmp_path)
    source.settings = {"image_size": 96}
    with pytest.raises(ValueError, match="with image_size 64, but the test has image_size 96"):
        project(source, data.records, patterns, LAYERS, tmp_path)


def make(data, found, **options):
    _, patterns, folder = found
    options = {"settings": PLAIN, "report": lambda line: None} | options
    root = data.json_file.parent
    return make_masks(data.records, patterns, LAYERS, folder, image_root=root, **options)


def test_masks_are_made_and_compared_per_layer(data, found):
    _, patterns, folder = found
    lines = []
    made = make(data, found, category_ids=data.category_ids, report=lines.append)
    assert list(made) == list(LAYERS)
    for layer, of_layer in made.items():
        written = load_coco(of_layer.json_file, data.json_file.parent)
        assert written.class_names == data.class_names
        for record, original in zip(written.records, data.records, strict=True):
            assert record["image_labels"] == original["image_labels"]
            assert record["annotations"] == []
            labels, q = read_projections(projections_folder(folder, layer), record["image_id"])
            expected = proxy_label_map(
                q, labels, 64, 64, num_classes=4, stds=patterns.layers[layer].std[labels]
            )
            path = record["label_map_file_name"]
            mask = read_label_map(path, 64, 64, num_classes=4, image_id=0)
            np.testing.assert_array_equal(mask, expected)
        assert 0 <= of_layer.evaluation["undecided_missed"]["mIoU"]["all"] <= 100
    table = lines[0].splitlines()
    assert table[2].startswith("| C41 | ")
    assert "10 images, 0 of them refined by the CRF, 0 without labels" in lines[0]


def test_tags_alone_give_masks_that_are_not_compared(data, found):
    records = [r | {"annotations": [], "supervision": "image"} for r in data.records]
    _, patterns, folder = found
    lines = []
    made = make_masks(
        records,
        patterns,
        LAYERS,
        folder,
        image_root=data.json_file.parent,
        settings=PLAIN,
        report=lines.append,
    )
    assert made["C41"].evaluation is None
    assert lines[0].splitlines()[2].startswith("| C41 | - | - | ")


def test_a_half_written_mask_is_made_again(data, found):
    lines = []
    whole = make(data, found)
    path = mask_path(
        whole["C41"].json_file.parent / "masks" / "C41-zero-ignore", data.records[0]["image_id"]
    )
    content = path.read_bytes()
    path.write_bytes(content[:50])
    again = make(data, found, report=lines.append)
    assert path.read_bytes() == content
    assert again["C41"].summary.num_redone == 1
    assert again["layer3"].summary.num_kept == 10
    assert "C41: 1 damaged or outdated masks were made again" in lines[0]


def test_other_tags_of_an_image_make_its_projections_and_mask_again(data, found):
    source, patterns, folder = found
    first = make(data, found)
    records = [dict(record) for record in data.records]
    labels = records[3]["image_labels"]
    records[3]["image_labels"] = [next(c for c in range(4) if c not in labels)]
    lines = []
    project(source, records, patterns, LAYERS, folder, report=lines.append)
    assert lines[0].startswith("Projections of 10 images: 1 written (0 of them")
    again = make_masks(
        records,
        patterns,
        LAYERS,
        folder,
        image_root=data.json_file.parent,
        settings=PLAIN,
        report=lines.append,
    )
    for layer in LAYERS:
        assert (again[layer].summary.num_redone, again[layer].summary.num_kept) == (1, 9)
        path = mask_path(folder / "masks" / f"{layer}-zero-ignore", records[3]["image_id"])
        mask = read_label_map(path, 64, 64, num_classes=4, image_id=0)
        assert set(np.unique(mask)) == {0, records[3]["image_labels"][0] + 1}
    assert first["C41"].summary.num_redone == 0


def test_settings_lie_side_by_side(data, found):
    make(data, found)
    made = make(data, found, settings=ProxyMaskSettings(threshold="otsu", crf=False))
    assert made["C41"].json_file.name == "C41-otsu-ignore.json"
    folder = found[2]
    assert sorted(p.name for p in (folder / "masks").iterdir()) == [
        "C41-otsu-ignore",
        "C41-zero-ignore",
        "layer3-otsu-ignore",
        "layer3-zero-ignore",
    ]


def test_a_class_without_images_leaves_no_background(data, found, tmp_path):
    source = found[0]
    without = [r for r in data.records if 2 not in r["image_labels"]]
    lines = []
    patterns = discover(
        source, without, data.class_names, LAYERS, output=tmp_path / "p", report=lambda line: 0
    )
    assert not patterns.layers["C41"].valid[2]
    folder = tmp_path / "q"
    project(source, data.records, patterns, LAYERS, folder, report=lambda line: None)
    made = make_masks(
        data.records,
        patterns,
        LAYERS,
        folder,
        image_root=data.json_file.parent,
        settings=PLAIN,
        report=lines.append,
    )
    count = len(data.records) - len(without)
    assert count > 0
    assert made["C41"].summary.num_without_pattern == count
    assert f"C41: {count} images have a label without a pattern: no background" in lines[0]


def test_the_missing_crf_is_named(data, found, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[crf\]'"):
        make(data, found, settings=ProxyMaskSettings(crf=True))


def test_true_masks_change_nothing_but_the_comparison(data, found, tmp_path):
    """Neither patterns nor projections nor masks see what the annotations hold."""
    source, patterns, _ = found
    first = make(data, found)
    blind = []
    for record in data.records:
        nowhere = [a | {"bbox": [0, 0, 1, 1], "segmentation": None} for a in record["annotations"]]
        blind.append(record | {"annotations": nowhere, "supervision": "image"})
    again = discover(
        source, blind, data.class_names, LAYERS, output=tmp_path / "p", report=lambda line: 0
    )
    assert_same_patterns(patterns, again)
    project(source, blind, again, LAYERS, tmp_path / "q", report=lambda line: None)
    second = make_masks(
        blind,
        again,
        LAYERS,
        tmp_path / "q",
        image_root=data.json_file.parent,
        settings=PLAIN,
        report=lambda line: None,
    )
    for layer in LAYERS:
        files = [
            json.loads(made[layer].json_file.read_text())["images"] for made in (first, second)
        ]
        for one, two in zip(*files, strict=True):
            pixels = [
                (made[layer].json_file.parent / entry["label_map_file_name"]).read_bytes()
                for made, entry in ((first, one), (second, two))
            ]
            assert pixels[0] == pixels[1]


def test_components_are_drawn_and_the_first_is_the_pattern(data, tmp_path):
    """Shares of the variance are those of a plain principal component analysis."""
    source, label = make_source(), data.records[0]["image_labels"][0]
    path = tmp_path / "folder" / "components.png"
    shares = draw_components(path, source, data.records, label, "C41", num_images=2, batch_size=3)
    shown = [record for record in data.records if label in record["image_labels"]]
    vectors = []
    with torch.no_grad(), LayerTaps(source.classifier.backbone, ["C41"]) as taps:
        for record in shown:
            source.classifier.backbone(source.model.preprocess([source.read_image(record)]))
            vectors.append(taps.features["C41"][0].flatten(1).T.double())
    expected = np.linalg.eigvalsh(np.cov(torch.cat(vectors).T.numpy()))[::-1]
    assert shares == pytest.approx(expected / expected.sum(), abs=1e-5)
    rows = min(2, len(shown))
    picture = cv2.imread(str(path))
    assert picture.shape[1] == 4 * 256
    assert picture.shape[0] > rows * 256
    other = ({"image_labels": []}, {"image_labels": [label + 1]})
    with pytest.raises(ValueError, match=f"None of the 2 images has the class of index {label}"):
        draw_components(path, source, other, label, "C41")
