import json
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskx.data.coco import load_coco
from maskx.data.dense_crf import SEC_DSRG, TRANSFERNET, refine
from maskx.data.label_maps import read_label_map, semantic_label_map
from maskx.systems.class_patterns import proxy_masks
from maskx.systems.class_patterns.projections import (
    otsu_threshold,
    projections_path,
    start_projections,
    write_projections,
)
from maskx.systems.class_patterns.proxy_masks import (
    ProxyMaskSettings,
    make_proxy_masks,
    mask_path,
    proxy_label_map,
    write_proxy_json,
)

# --- one image

# Pixels by column: none positive, class 4 only, class 1 only, both.
TWO = np.array([[[-1, 2, -1, 2]], [[-1, -1, 3, 8]]], np.float32)


def label_two(labels=(4, 1), maps=TWO, **keys):
    keys = {"num_classes": 6, "stds": [1, 2]} | keys
    return proxy_label_map(maps, labels, *maps.shape[1:], **keys).tolist()


def test_algorithm_1_by_hand():
    found = proxy_label_map(TWO, (4, 1), 1, 4, num_classes=6, stds=[1, 2])
    assert found.dtype == np.uint8
    assert found.tolist() == [[0, 5, 2, 255]]


def test_the_label_with_the_largest_standardised_projection_takes_conflicts():
    assert label_two(resolve="standardised") == [[0, 5, 2, 2]]  # 2 / 1 < 8 / 2
    assert label_two(resolve="standardised", stds=[1, 8]) == [[0, 5, 2, 5]]  # 2 / 1 > 8 / 8


def test_thresholds_are_in_standard_deviations():
    assert label_two(thresholds=[2.5, 0]) == [[0, 0, 2, 2]]
    assert label_two(thresholds=[0, 1.6]) == [[0, 5, 0, 255]]
    assert label_two(thresholds=-2) == [[255, 255, 255, 255]]
    # A class below its threshold takes no conflict, as large as it may be.
    assert label_two(thresholds=[1, 5], resolve="standardised") == [[0, 5, 0, 5]]


def test_0_is_not_positive():
    assert label_two(maps=np.zeros((2, 1, 2), np.float32)) == [[0, 0]]


def test_a_label_without_a_pattern_may_be_anywhere_but_where_another_is():
    maps = TWO.copy()
    maps[0] = np.nan
    assert label_two(maps=maps, stds=[np.nan, 2]) == [[255, 255, 2, 2]]
    assert label_two(maps=maps, stds=[np.nan, 2], resolve="standardised") == [[255, 255, 2, 2]]
    maps[1] = np.nan
    assert label_two(maps=maps, stds=[np.nan, np.nan]) == [[255] * 4]


def test_an_image_without_labels_is_background():
    for maps in (np.zeros((0, 2, 3)), np.zeros((0, 0, 0))):
        found = proxy_label_map(maps, [], 3, 5, num_classes=6, stds=[])
        assert found.shape == (3, 5)
        assert not found.any()


def test_large_vocabularies_have_large_labels():
    found = proxy_label_map(TWO, (900, 1), 1, 4, num_classes=1000, stds=[1, 2])
    assert found.dtype == np.int32
    assert found.tolist() == [[0, 901, 2, 65535]]


def test_projections_are_resized_before_they_are_compared():
    """Between 1 and -3 the sign changes after a quarter of the way; nearest would be in half."""
    maps = np.array([[[1, -3]]], np.float32)
    found = proxy_label_map(maps, [0], 1, 16, num_classes=1, stds=[1])
    # The centres of its two pixels are at 4 and 12: 1 - (x + 0.5 - 4) / 2 > 0 up to x = 5.
    assert found[0].tolist() == [1] * 6 + [0] * 10
    maps = np.random.default_rng(0).normal(size=(1, 5, 6)).astype(np.float32)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(maps)[None], (37, 50), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    found = proxy_label_map(maps, [2], 37, 50, num_classes=6, stds=[1])
    is_clear = np.abs(resized) > 1e-5
    assert is_clear.mean() > 0.99
    np.testing.assert_array_equal(found[is_clear], 3 * (resized > 0)[is_clear])


def by_pixel(maps, labels, thresholds, stds, resolve):
    """Algorithm 1 in loops, at the size of the projections."""
    found = np.zeros(maps.shape[1:], int)
    for place in np.ndindex(*maps.shape[1:]):
        votes = {}
        for label, q, threshold, std in zip(
            labels, maps[(slice(None), *place)], thresholds, stds, strict=True
        ):
            if q / std > threshold:
                votes[label] = q / std
        if len(votes) == 0:
            found[place] = 255 if np.isnan(maps).any() else 0
        elif len(votes) == 1 or resolve == "standardised":
            found[place] = max(votes, key=votes.get) + 1
        else:
            found[place] = 255
    return found


@given(st.integers(1, 4), st.integers(0, 2**16), st.sampled_from(["ignore", "standardised"]))
def test_it_agrees_with_algorithm_1_pixel_by_pixel(num_labels, seed, resolve):
    random = np.random.default_rng(seed)
    maps = random.normal(size=(num_labels, 4, 5)).astype(np.float32)
    if random.random() < 0.3:
        maps[random.integers(num_labels)] = np.nan
    labels = random.permutation(7)[:num_labels].tolist()
    thresholds, stds = random.normal(0, 0.5, num_labels), random.uniform(0.5, 2, num_labels)
    found = proxy_label_map(
        maps,
        labels,
        4,
        5,
        num_classes=7,
        thresholds=thresholds,
        stds=stds.astype(np.float32),
        resolve=resolve,
    )
    np.testing.assert_array_equal(found, by_pixel(maps, labels, thresholds, stds, resolve))


def test_bad_arguments_are_named():
    with pytest.raises(
        ValueError, match=r"resolve must be one of 'ignore', 'standardised', got 'max'"
    ):
        label_two(resolve="max")
    with pytest.raises(ValueError, match=r"Label 6 of an image .* indices 0 to 5"):
        label_two(labels=(4, 6))
    with pytest.raises(ValueError, match=r"The projections have shape \(2, 1, 4\), for 1 labels"):
        label_two(labels=(4,))
    with pytest.raises(ValueError, match=r"deviation of class index 1 is 0.0"):
        label_two(stds=[1, 0])
    with pytest.raises(ValueError, match=r"have nan for class index 4 at row 0, column 1"):
        label_two(maps=np.where(TWO == 2, np.nan, TWO))


# --- many images

NAMES = ("cat", "dog", "owl")
STDS = np.array([1.0, 2.0, np.nan])
SIZE = (18, 24)
NO_CRF = ProxyMaskSettings(crf=False)
# By image id: labels; the class "owl" has no pattern.
LABELS = {"a/1": [0], "a/2": [1], "b/1": [0, 1], "b/2": [], "c": [2], "d": [1, 2]}


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Images with a bright rectangle, tags.json, and projections in the folder projections."""
    folder = tmp_path_factory.mktemp("proxy")
    random = np.random.default_rng(0)
    start_projections(folder / "projections", class_names=NAMES, patterns="ab12", layer="C41")
    images = []
    for number, (image_id, labels) in enumerate(LABELS.items()):
        image = random.normal(60, 5, (*SIZE, 3))
        image[4:12, 6:16] += 100
        cv2.imwrite(str(folder / f"{number}.png"), np.clip(image, 0, 255).astype(np.uint8))
        images.append(
            {"id": image_id, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]}
            | {"image_labels": [10 * (label + 1) for label in labels]}
        )
        if labels:
            maps = random.normal(-1, 0.7, (len(labels), 6, 8)).astype(np.float32)
            maps[:, 1:4, 2:5] += 2.5
            maps[[label == 2 for label in labels]] = np.nan
            # In another order than in the annotation file.
            write_projections(folder / "projections", image_id, labels[::-1], maps[::-1])
    categories = [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(NAMES)]
    content = {"images": images, "annotations": [], "categories": categories}
    (folder / "tags.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def records(data_folder):
    return load_coco(data_folder / "tags.json", data_folder).records


@pytest.fixture
def make(data_folder, records, tmp_path):
    """make_proxy_masks into tmp_path / "masks", unless something else is asked for."""

    def call(records=records, *, output=tmp_path / "masks", **keys):
        keys = {"class_names": NAMES, "stds": STDS, "settings": NO_CRF} | keys
        return make_proxy_masks(records, data_folder / "projections", output, **keys)

    return call


def read_mask(folder, image_id):
    return read_label_map(mask_path(folder, image_id), *SIZE, num_classes=3, image_id=image_id)


def read_npz(data_folder, image_id):
    """Labels and projections, by class."""
    with np.load(projections_path(data_folder / "projections", image_id)) as content:
        return dict(zip(content["labels"].tolist(), content["projections"], strict=True))


def expected_mask(data_folder, image_id, **keys):
    labels = LABELS[image_id]
    maps = read_npz(data_folder, image_id) if labels else {}
    maps = np.array([maps[label] for label in labels]).reshape(len(labels), 6, 8)
    keys = {"stds": STDS[labels]} | keys
    return proxy_label_map(maps, labels, *SIZE, num_classes=3, **keys)


def test_masks_are_those_of_algorithm_1(data_folder, make, tmp_path):
    summary = make(progress=True)
    masks = {image_id: read_mask(tmp_path / "masks", image_id) for image_id in LABELS}
    for image_id, mask in masks.items():
        np.testing.assert_array_equal(mask, expected_mask(data_folder, image_id))
    assert set(np.unique(masks["b/1"])) == {0, 1, 2, 255}
    assert not masks["b/2"].any()
    assert (masks["c"] == 255).all()
    assert set(np.unique(masks["d"])) == {2, 255}
    assert len(list((tmp_path / "masks").iterdir())) == len(LABELS) + 1
    assert (summary.num_images, summary.num_kept, summary.num_redone) == (6, 0, 0)
    assert summary.num_without_labels == 1
    assert summary.num_without_pattern == 2
    assert summary.num_refined == 0
    assert summary.pixels == 6 * 18 * 24
    assert summary.background_pixels == sum((mask == 0).sum() for mask in masks.values())
    assert summary.undecided_pixels == sum((mask == 255).sum() for mask in masks.values())
    assert summary.thresholds == (0, 0, 0)
    header = json.loads((tmp_path / "masks" / "proxy_masks.json").read_text())
    assert header["settings"]["resolve"] == "ignore"
    assert header["projections"] == {"class_names": [*NAMES], "patterns": "ab12", "layer": "C41"}


def test_the_crf_refines_masks_of_images_with_one_label_that_has_a_pattern(
    data_folder, records, make, tmp_path
):
    pytest.importorskip("pydensecrf", reason="the extra `crf` is not installed")
    settings = ProxyMaskSettings(crf_settings=TRANSFERNET)
    assert make(settings=settings).num_refined == 2
    for record in records:
        image_id = record["image_id"]
        mask = read_mask(tmp_path / "masks", image_id)
        plain = expected_mask(data_folder, image_id)
        if image_id[0] != "a":
            np.testing.assert_array_equal(mask, plain)
            continue
        (label,) = LABELS[image_id]
        score = cv2.resize(read_npz(data_folder, image_id)[label], SIZE[::-1]) / STDS[label]
        prob = 1 / (1 + np.exp(-score.astype(float)))
        image = cv2.imread(record["file_name"])
        _, foreground = refine(image, np.stack([1 - prob, prob]), TRANSFERNET)
        np.testing.assert_array_equal(mask, (label + 1) * (foreground > 0.5))
        assert (mask != plain).any()
        assert set(np.unique(mask)) == {0, label + 1}


def test_the_crf_gets_the_sigmoid_of_the_standardised_projection(
    data_folder, records, make, monkeypatch
):
    given = []

    def refine(image, prob, settings):
        given.append(prob)
        return prob

    monkeypatch.setattr(proxy_masks, "check_crf", lambda: None)
    monkeypatch.setattr(proxy_masks, "refine", refine)
    summary = make(records[:2], settings=ProxyMaskSettings(threshold="otsu"))
    for prob, image_id in zip(given, ("a/1", "a/2"), strict=True):
        (label,) = LABELS[image_id]
        score = cv2.resize(read_npz(data_folder, image_id)[label], SIZE[::-1]) / STDS[label]
        expected = 1 / (1 + np.exp(-(score - summary.thresholds[label])))
        np.testing.assert_allclose(prob, [1 - expected, expected], atol=1e-6)


def test_a_crf_without_pairs_changes_no_mask(data_folder, make, tmp_path):
    """That is, p = 0.5 where a projection is at its threshold, of Otsu too."""
    pytest.importorskip("pydensecrf", reason="the extra `crf` is not installed")
    no_pairs = type(SEC_DSRG)(
        **vars(SEC_DSRG) | {"gaussian_compat": 0, "bilateral_compat": 0, "iterations": 1}
    )
    settings = ProxyMaskSettings(threshold="otsu", crf_settings=no_pairs)
    summary = make(settings=settings)
    assert summary.thresholds[0] != 0
    for image_id in ("a/1", "a/2"):
        keys = {"thresholds": [summary.thresholds[label] for label in LABELS[image_id]]}
        expected = expected_mask(data_folder, image_id, **keys)
        np.testing.assert_array_equal(read_mask(tmp_path / "masks", image_id), expected)


def test_without_the_library_the_crf_is_refused_before_any_work(make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[crf\]'"):
        make(settings=ProxyMaskSettings())
    assert not (tmp_path / "masks").exists()
    make()  # it is not needed without


def test_otsu_thresholds_are_those_of_all_projections_of_a_class(data_folder, make, tmp_path):
    settings = ProxyMaskSettings(crf=False, threshold="otsu", resolve="standardised")
    summary = make(settings=settings)
    for label in (0, 1):
        scores = np.concatenate(
            [read_npz(data_folder, i)[label].ravel() for i, v in LABELS.items() if label in v]
        )
        counts, edges = np.histogram(scores / STDS[label], 512, (-8, 8))
        assert summary.thresholds[label] == pytest.approx(otsu_threshold(counts, edges), abs=1e-9)
    assert summary.thresholds[2] == 0
    for image_id, labels in LABELS.items():
        keys = {"thresholds": [summary.thresholds[i] for i in labels], "resolve": "standardised"}
        expected = expected_mask(data_folder, image_id, **keys)
        np.testing.assert_array_equal(read_mask(tmp_path / "masks", image_id), expected)


def test_processes_write_the_same_bytes(make, tmp_path):
    summaries = [make(output=tmp_path / str(workers), workers=workers) for workers in (1, 2)]
    assert summaries[0] == summaries[1]
    one, two = (sorted((tmp_path / name).iterdir()) for name in "12")
    assert [path.name for path in one] == [path.name for path in two]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_complete_masks_are_kept_and_broken_ones_are_made_again(make, tmp_path, monkeypatch):
    plain_map, left = proxy_masks.proxy_label_map, iter(range(4))

    def interrupted(*arguments, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return plain_map(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(proxy_masks, "proxy_label_map", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make()
    masks = sorted((tmp_path / "masks").glob("*.png"))
    assert len(masks) == 4
    masks[0].write_bytes(masks[0].read_bytes()[:50])
    cv2.imwrite(str(masks[1]), np.zeros((3, 4), np.uint8))  # of another size
    times = {path: path.stat().st_mtime_ns for path in masks}
    resumed = make()
    assert (resumed.num_kept, resumed.num_redone) == (2, 2)
    changed = [path.stat().st_mtime_ns != times[path] for path in masks]
    assert changed == [True, True, False, False]

    at_once = make(output=tmp_path / "at_once")
    for path in (tmp_path / "at_once").iterdir():
        assert (tmp_path / "masks" / path.name).read_bytes() == path.read_bytes()
    counts = ("background_pixels", "undecided_pixels", "num_without_pattern", "num_images")
    assert [getattr(resumed, k) for k in counts] == [getattr(at_once, k) for k in counts]


def test_masks_of_other_image_labels_are_made_again(make, records, tmp_path):
    make()
    changed = [dict(record) for record in records]
    changed[0]["image_labels"] = []
    made = make(changed)
    assert (made.num_kept, made.num_redone) == (5, 1)
    assert not read_mask(tmp_path / "masks", "a/1").any()
    assert make(changed).num_kept == 6


def test_masks_of_other_settings_are_not_mixed(make, records, data_folder, tmp_path):
    make()
    message = r"proxy_masks\.json' was made with settings .*Use files of the same, or name another"
    with pytest.raises(ValueError, match=message):
        make(settings=ProxyMaskSettings(crf=False, resolve="standardised"))
    shutil.copytree(data_folder / "projections", tmp_path / "other")
    header = json.loads((tmp_path / "other" / "projections.json").read_text())
    header["patterns"] = "cd"
    (tmp_path / "other" / "projections.json").write_text(json.dumps(header))
    with pytest.raises(
        ValueError, match=r"made with projections .* this run has projections .*'patterns': 'cd'"
    ):
        make_proxy_masks(
            records,
            tmp_path / "other",
            tmp_path / "masks",
            class_names=NAMES,
            stds=STDS,
            settings=NO_CRF,
        )
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.png").touch()
    with pytest.raises(ValueError, match=r"photos holds files \(x\.png\) but no proxy_masks\.json"):
        make(output=tmp_path / "photos")


def test_more_images_may_be_added(make, records):
    assert make(records[:2]).num_kept == 0
    assert make(records).num_kept == 2


def test_what_does_not_fit_is_named(make, records, data_folder, tmp_path):
    with pytest.raises(ValueError, match=r"stds has shape \(2,\)\. .* each of the 3 classes"):
        make(stds=[1, 2])
    with pytest.raises(ValueError, match=r"projections for the classes \['cat', 'dog', 'owl'\], n"):
        make(class_names=("cat", "owl", "dog"))
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        make(workers=0)
    with pytest.raises(ValueError, match=r"threshold must be one of 'zero', 'otsu', got 'auto'"):
        ProxyMaskSettings(threshold="auto")
    with pytest.raises(
        ValueError, match=r"resolve must be one of 'ignore', 'standardised', got 'max'"
    ):
        ProxyMaskSettings(resolve="max")
    with pytest.raises(
        FileNotFoundError, match=r"\(image 'new'\): there is no such file\. Let the"
    ):
        make([records[0] | {"image_id": "new"}])
    assert not (tmp_path / "masks").exists()
    with pytest.raises(FileNotFoundError, match=r"projections\.json': there is no such file"):
        make_proxy_masks(
            records,
            tmp_path,
            tmp_path / "masks",
            class_names=NAMES,
            stds=STDS,
            settings=NO_CRF,
        )
    with pytest.raises(
        ValueError, match=r"class indices \[0\], but image 'a/1' has the labels \[0, 1\]"
    ):
        make([records[0] | {"image_labels": [0, 1]}])


@pytest.mark.parametrize("threshold", ["zero", "otsu"])
def test_single_values_that_are_not_finite_name_the_image(
    make, records, data_folder, tmp_path, threshold
):
    shutil.copytree(data_folder / "projections", tmp_path / "projections")
    maps = np.ones((1, 6, 8), np.float32)
    maps[0, 3, 4] = np.nan
    np.savez(projections_path(tmp_path / "projections", "a/2"), labels=[1], projections=maps)
    with pytest.raises(ValueError, match=r"\(image 'a/2'\): the projections have nan for class"):
        make_proxy_masks(
            records,
            tmp_path / "projections",
            tmp_path / "masks",
            class_names=NAMES,
            stds=STDS,
            settings=ProxyMaskSettings(crf=False, threshold=threshold),
        )


# --- annotation file


def test_the_annotation_file_gives_masks_to_training(make, data_folder, tmp_path):
    make()
    data = load_coco(data_folder / "tags.json", data_folder)
    output = tmp_path / "new" / "proxy.json"
    write_proxy_json(
        output,
        data.records,
        tmp_path / "masks",
        image_root=data_folder,
        class_names=data.class_names,
        category_ids=data.category_ids,
    )
    # The JSON file has relative paths only: both folders may move together.
    shutil.move(tmp_path / "new", tmp_path / "moved" / "new")
    shutil.move(tmp_path / "masks", tmp_path / "moved" / "masks")
    found = load_coco(tmp_path / "moved" / "new" / "proxy.json", data_folder)
    assert (found.class_names, found.category_ids) == (data.class_names, data.category_ids)
    for record, original in zip(found.records, data.records, strict=True):
        image_id = record["image_id"]
        assert record["supervision"] == "mask"
        for key in ("image_id", "height", "width", "image_labels", "file_name"):
            assert record[key] == original[key]
        np.testing.assert_array_equal(
            semantic_label_map(record, 3), expected_mask(data_folder, image_id)
        )


def test_missing_masks_and_mixed_ids_are_named(make, records, data_folder, tmp_path):
    keys = {"image_root": data_folder, "class_names": NAMES, "category_ids": (10, 20, 30)}
    make(records[:2])
    output = tmp_path / "proxy.json"
    with pytest.raises(FileNotFoundError, match=r"\(image 'b/1'\): there is no such proxy mask"):
        write_proxy_json(output, records, tmp_path / "masks", **keys)
    with pytest.raises(ValueError, match=r"category_ids are \[10, 30, 20\]\. Allowed: rising ids"):
        write_proxy_json(
            output, records[:2], tmp_path / "masks", **keys | {"category_ids": (10, 30, 20)}
        )
    assert not output.exists()
