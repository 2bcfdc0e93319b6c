import logging

import pytest
import torch
from full_disk import full_disk

from maskx.core.backbone_choice import build_backbone
from maskx.core.image_classifier import LayerTaps


def frozen(seed=0, **cache):
    torch.manual_seed(seed)
    backbone = build_backbone("small", frozen_stages="all")
    if cache:
        backbone.keep_features(**cache)
    return backbone


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 1e-3)])
@pytest.mark.parametrize("in_files", [True, False])
def test_maps_are_those_of_the_backbone(images, tmp_path, dtype, error, in_files):
    backbone = frozen(folder=tmp_path / "features" if in_files else None, dtype=dtype)
    expected = [frozen()(image[None]) for image in images]
    for _ in range(2):
        found = backbone(images)
        for name, maps in found.items():
            wanted = torch.cat([each[name] for each in expected])
            torch.testing.assert_close(maps, wanted, rtol=error, atol=error)
            assert maps.dtype == torch.float32
            assert not maps.requires_grad
    assert (backbone.cache.misses, backbone.cache.hits) == (2, 2)


def test_a_mirrored_image_is_another_image(images):
    backbone = frozen(max_bytes=10**8)
    backbone(images)
    found = backbone(images.flip(-1))["layer4"]
    assert backbone.cache.misses == 4
    torch.testing.assert_close(found, frozen()(images.flip(-1))["layer4"], rtol=1e-2, atol=1e-2)


def test_an_image_has_the_same_features_beside_any_other(images):
    """Padding is left out; in it the maps are zero."""
    padded = torch.zeros(1, 3, 64, 48)
    padded[:, :, :32, :40] = images[:1]
    backbone = frozen(max_bytes=0)
    alone, beside = backbone(images[:1]), backbone(padded)
    for name, maps in alone.items():
        height, width = maps.shape[-2:]
        assert torch.equal(beside[name][:, :, :height, :width], maps)
        assert not beside[name][:, :, height:].any()
        assert beside[name].shape == frozen()(padded)[name].shape


def test_results_do_not_depend_on_what_is_kept(images):
    some = frozen(max_bytes=frozen(max_bytes=10**8)(images[:1])["layer4"].nbytes)
    none = frozen(max_bytes=0)
    every = frozen(max_bytes=10**8)
    for _ in range(2):
        found = [each(images)["layer4"] for each in (some, none, every)]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[1], found[2])
    assert none.cache.hits == 0


def test_a_full_cache_is_said_once(images, caplog):
    backbone = frozen(max_bytes=1)
    with caplog.at_level(logging.WARNING):
        backbone(images)
        backbone(images)
    assert [record.message for record in caplog.records if "cache is full" in record.message]
    assert caplog.text.count("cache is full") == 1
    assert "--feature-cache GB" in caplog.text


def test_another_process_finds_what_was_kept(images, tmp_path):
    frozen(folder=tmp_path)(images)
    again = frozen(folder=tmp_path)
    again(images)
    assert (again.cache.misses, again.cache.hits) == (0, 2)
    others = torch.randn(1, 3, 32, 40)
    expected = frozen(max_bytes=0)(others)["layer4"]
    assert torch.equal(again(others)["layer4"], expected)
    assert again.cache.misses == 1


def test_features_of_another_backbone_are_refused_by_name(images, tmp_path):
    frozen(folder=tmp_path / "features")(images)
    message = r"features' holds features of SmallResNet with weights \w{12} in float16, not of Sm"
    with pytest.raises(ValueError, match=message):
        frozen(seed=1, folder=tmp_path / "features")
    with pytest.raises(ValueError, match=r"in float32\. Remove that folder, or name another"):
        frozen(folder=tmp_path / "features", dtype="float32")


def test_a_damaged_file_is_made_again(images, tmp_path, caplog):
    expected = frozen(folder=tmp_path)(images)["layer4"]
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    found = frozen(folder=tmp_path)(images)["layer4"]
    assert torch.equal(found, expected)
    assert caplog.text.count("is made again") == 2


def test_a_full_disk_is_named_and_leaves_no_part_of_a_file(images, tmp_path):
    backbone = frozen(folder=tmp_path / "features")
    with (
        full_disk(1000),
        pytest.raises(OSError, match=r"not be written to '.*features'.*--feature-cache GB; 0 kee"),
    ):
        backbone(images)
    assert [file.name for file in (tmp_path / "features").iterdir()] == ["features.json"]


def test_only_a_frozen_backbone_keeps_features():
    for stages in (0, 4):
        backbone = build_backbone("small", frozen_stages=stages)
        with pytest.raises(ValueError, match=r"Features of SmallResNet cannot be kept.*--frozen"):
            backbone.keep_features()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_bytes": -1}, "max_bytes of the feature cache is -1"), ({"dtype": "int8"}, "'float16'")],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        frozen(**options)


def test_taps_see_what_inner_layers_put_out(images):
    plain, backbone = frozen(), frozen(max_bytes=10**8, dtype="float32")
    backbone(images)  # without the inner layer
    with LayerTaps(plain, ("C42", "conv1")) as expected:
        plain(images)
    for _ in range(2):
        with LayerTaps(backbone, ("C42", "conv1")) as taps:
            backbone(images)
        for name, output in expected.features.items():
            torch.testing.assert_close(taps.features[name], output)
    assert (backbone.cache.misses, backbone.cache.hits) == (4, 2)
    assert backbone(images).keys() == plain(images).keys()
