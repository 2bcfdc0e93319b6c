import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from maskx.core.digests import network_hash
from maskx.core.tensor_files import write_tensors
from maskx.systems.class_patterns.pattern_moments import load_moments, save_moments
from maskx.systems.class_patterns.patterns import (
    ClassPatterns,
    LayerPatterns,
    PatternMoments,
    find_patterns,
    load_patterns,
    save_patterns,
)

NAMES = ("dog", "cat", "bird")


def make_layer(channels):
    torch.manual_seed(channels)
    moments = PatternMoments(3, channels)
    for label in (0, 2):
        moments.update(torch.randn(channels, 4, 4), torch.randn(1, 4, 4), [label])
    return find_patterns(moments)


@pytest.fixture
def patterns():
    layers = {"C41": make_layer(4), "layer3": make_layer(6)}
    return ClassPatterns(layers, NAMES, "abc", {"size": 328, "seed": 0})


def equal(one, other):
    names = [field.name for field in dataclasses.fields(LayerPatterns)]
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs
    )


def test_patterns_are_read_as_they_were_written(patterns, tmp_path):
    path = tmp_path / "folder" / "patterns.safetensors"
    save_patterns(path, patterns)
    save_patterns(path, patterns)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    read = load_patterns(path, network="abc", class_names=list(NAMES))
    assert (read.class_names, read.network, read.settings) == (
        NAMES,
        "abc",
        {"size": 328, "seed": 0},
    )
    assert list(read.layers) == ["C41", "layer3"]
    assert all(equal(read.layers[name], patterns.layers[name]) for name in read.layers)
    one = load_patterns(path, network=None, class_names=None, layers=["layer3"])
    assert list(one.layers) == ["layer3"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"network": "abd"}, "found with the network abc, but are to be used with abd"),
        (
            {"class_names": ("dog", "cow", "bird")},
            "class 1 is 'cat' in the file, but 'cow' is expected. Use the same list",
        ),
        ({"class_names": NAMES[:2]}, "class 2 is 'bird' in the file, but None is expected"),
        (
            {"layers": ["C41", "C43"]},
            "no class patterns of layer 'C43'. Layers in the file: C41, layer3",
        ),
    ],
)
def test_patterns_for_something_else_are_refused(patterns, tmp_path, asked, message):
    path = tmp_path / "patterns.safetensors"
    save_patterns(path, patterns)
    with pytest.raises(ValueError, match=message) as error:
        load_patterns(path, **({"network": "abc", "class_names": NAMES} | asked))
    assert str(path) in str(error.value)


def read(path):
    return load_patterns(path, network=None, class_names=None)


def test_damaged_and_foreign_files_are_refused(patterns, tmp_path):
    path = tmp_path / "patterns.safetensors"
    with pytest.raises(FileNotFoundError, match=r"There is no file '.*' with class patterns"):
        read(path)
    save_patterns(path, patterns)
    content = path.read_bytes()
    for damaged in (b"", b"nothing", content[:100], content[:-10], b"\0" * 50 + content[50:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is no safetensors file, or is damaged"):
            read(path)
    for metadata in (None, {"format": "pt"}, {"maskx": json.dumps({"kind": "others"})}):
        save_file({"mean": torch.zeros(3)}, str(path), metadata)
        with pytest.raises(ValueError, match="is a safetensors file, but not one with class patt"):
            read(path)


STATE = {"class_names": NAMES, "network": "", "settings": {}, "layers": ["C41"]}


def test_files_with_missing_or_misshaped_tensors_are_refused(patterns, tmp_path):
    path = tmp_path / "patterns.safetensors"
    tensors = {f"C41/{name}": value for name, value in vars(patterns.layers["C41"]).items()}
    write_tensors(path, tensors, "class patterns", STATE)
    assert equal(read(path).layers["C41"], patterns.layers["C41"])

    lacking = {n: t for n, t in tensors.items() if n != "C41/std"}
    write_tensors(path, lacking, "class patterns", STATE)
    with pytest.raises(ValueError, match=r"is damaged: it lacks the tensors \['C41/std'\]"):
        read(path)
    for name, shape in (("std", (2,)), ("mean", (3, 9)), ("std", (3, 1)), ("std", ())):
        write_tensors(path, tensors | {f"C41/{name}": torch.zeros(shape)}, "class patterns", STATE)
        with pytest.raises(
            ValueError, match=rf"{name if shape != (3, 9) else 'direction'} of layer 'C41' is"
        ):
            read(path)
    for name, dtype in (("valid", torch.float32), ("std", torch.float64)):
        other = tensors[f"C41/{name}"].to(dtype)
        write_tensors(path, tensors | {f"C41/{name}": other}, "class patterns", STATE)
        with pytest.raises(
            ValueError, match=f"damaged: {name} of layer 'C41' is .* of {dtype}. Allowed"
        ):
            read(path)


@pytest.mark.parametrize("key", ["class_names", "network", "settings", "layers"])
@pytest.mark.parametrize("value", [None, 3.5])
def test_files_that_lack_a_key_or_have_another_type_are_refused(patterns, tmp_path, key, value):
    path = tmp_path / "patterns.safetensors"
    tensors = {f"C41/{name}": tensor for name, tensor in vars(patterns.layers["C41"]).items()}
    write_tensors(path, tensors, "class patterns", STATE | {key: value})
    with pytest.raises(ValueError, match=rf"is damaged: its {key} is {value}\. Allowed: a "):
        read(path)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("class patterns", {}),
        ("class patterns", STATE),
        ("moments of class patterns", {"sizes": {"C41": {"num_classes": 2, "channels": "x"}}}),
    ],
)
def test_headers_that_nobody_wrote_are_refused(tmp_path, kind, content):
    """Files that claim to be of a kind, without the digest of what they say."""
    path = tmp_path / "x.safetensors"
    about = json.dumps({"kind": kind, **content})
    save_file({"a": torch.zeros(1)}, str(path), {"maskx": about})
    reader = read if kind == "class patterns" else load_moments
    with pytest.raises(ValueError, match=r"x.safetensors' is damaged: .* Make it again"):
        reader(path)


@pytest.mark.parametrize("key", ["identity", "done", "total", "images", "sizes"])
@pytest.mark.parametrize("value", [None, 3.5])
def test_moments_that_lack_a_key_or_have_another_type_are_refused(tmp_path, key, value):
    path = tmp_path / "moments"
    content = {"identity": {}, "done": 3, "total": 3, "images": "", "sizes": {}}
    write_tensors(path, {}, "moments of class patterns", content | {key: value})
    with pytest.raises(ValueError, match=rf"is damaged: its {key} is {value}\. Allowed: a "):
        load_moments(path)


@pytest.mark.parametrize("sizes", [3, {"num_classes": 10**12, "channels": 10**12}, {"seed": 0}])
def test_moments_of_sizes_that_cannot_be_are_refused(tmp_path, sizes):
    path = tmp_path / "moments"
    content = {"identity": {}, "done": 3, "total": 3, "images": "", "sizes": {"C41": sizes}}
    write_tensors(path, {}, "moments of class patterns", content)
    with pytest.raises(ValueError, match=r"moments' is damaged: layer 'C41': .* Make it again"):
        load_moments(path)


def test_a_flipped_bit_is_found(patterns, tmp_path):
    path = tmp_path / "patterns.safetensors"
    save_patterns(path, patterns)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for position in range(start, len(content), 17):
        content[position] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not those that were written"):
            read(path)
        content[position] ^= 1


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2).to(torch.bfloat16))


def change_parameter(network):
    with torch.no_grad():
        network[0].weight[3, 2, 1, 0] += 1e-6


def change_type(network):
    network[0].double()


def change_shape(network):
    network[0].weight = nn.Parameter(network[0].weight.detach().reshape(4, 27))


def change_name(network):
    network.add_module("3", network[2])


def change_buffer(network):
    network[1].running_mean[1] = 3


@pytest.mark.parametrize(
    "change", [change_parameter, change_type, change_shape, change_name, change_buffer]
)
def test_the_hash_sees_every_change(change):
    network = make_network()
    before = network_hash(network)
    assert before == network_hash(make_network().eval())
    change(network)
    assert network_hash(network) != before


def test_the_hash_sees_buffers_that_are_not_saved():
    networks = [nn.Module(), nn.Module()]
    for value, network in enumerate(networks):
        network.register_buffer("pixel_mean", torch.full((3,), float(value)), persistent=False)
    assert network_hash(networks[0]) != network_hash(networks[1])


def test_moments_are_read_as_they_were_written(tmp_path):
    moments = {"a.b": PatternMoments(2, 3), "c": PatternMoments(2, 4, seed=5)}
    moments["a.b"].update(torch.rand(3, 2, 2), torch.rand(1, 2, 2), [1])
    moments["c"].update(torch.rand(4, 2, 2), None, [0, 1])
    path = tmp_path / "moments"
    content = {"identity": {}, "done": 3, "total": 3, "images": ""}
    save_moments(path, moments, content)
    found, content = load_moments(path)
    assert content["done"] == 3
    assert found["c"].seed == 5
    for layer, of_layer in moments.items():
        state = found[layer].state_dict()
        assert state.keys() == of_layer.state_dict().keys()
        assert all(torch.equal(state[n], t) for n, t in of_layer.state_dict().items())

    with pytest.raises(ValueError, match="but not one with class patterns"):
        read(path)
    kind, state = "moments of class patterns", moments["c"].state_dict()
    sizes = {"num_classes": 2, "channels": 4, "seed": 0}

    def damage(words, tensors, sizes=sizes):
        tensors = {f"c/{name}": tensor for name, tensor in tensors.items()}
        write_tensors(path, tensors, kind, content | {"sizes": {"c": sizes}})
        with pytest.raises(ValueError, match=rf"moments' is damaged: layer 'c': .*{words}"):
            load_moments(path)

    damage("has nothing as cross", {"mean": torch.zeros(2, 4)})
    damage("unexpected keyword", state, sizes | {"depth": 3})
    damage("", state, sizes | {"channels": "x"})
    damage(r"\(3, 3\) of torch.float32 as scatter.1", state | {"scatter.1": torch.zeros(3, 3)})
    damage("as scatter.2. Allowed", state | {"scatter.2": state["scatter.1"].clone()})
    damage("float32 as cross. Allowed", state | {"cross": state["cross"].float()})
    damage("nothing as sample.1", {n: t for n, t in state.items() if n != "sample.1"})
    damage("7", state | {"uses_maps": torch.tensor(7)})
    write_tensors(path, {}, kind, content | {"sizes": None})
    with pytest.raises(ValueError, match="is damaged: its sizes is None"):
        load_moments(path)
