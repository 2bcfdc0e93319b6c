import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from maskx.core.losses import label_pairs
from maskx.systems.larvseg.attention import (
    MemoryBank,
    attention_maps,
    pseudo_background,
    top_token_means,
)


def unit_tokens(n, d, h, w):
    return F.normalize(torch.randn(n, d, h, w, dtype=torch.float64), dim=1)


def z_score(values):
    return (values - values.mean()) / (values.var(unbiased=False) + 1e-5).sqrt()


def fill(bank, stored):
    """Put the mean of the K tokens of each image into the bank; ``stored[c]`` is (M', K, d)."""
    for label, images in stored.items():
        for tokens in images:
            bank.enqueue(torch.tensor([label]), tokens.mean(dim=0, keepdim=True))


def slow_scores(tokens, stored):
    """S_mem in the form that stores pixels: mean of cos(f, m) over the M' x K stored tokens."""
    memory = stored.flatten(0, 1)
    return torch.stack(
        [
            torch.stack([F.cosine_similarity(token, m, dim=0) for m in memory]).mean()
            for token in tokens.flatten(1).T
        ]
    )


def make_memory(num_images, num_tokens=4, d=6):
    """Classes with so many images in the bank, as many unit tokens of each."""
    bank = MemoryBank(len(num_images), d, size=3, warm_up=1).double()
    stored = {
        label: F.normalize(torch.randn(n, num_tokens, d, dtype=torch.float64), dim=-1)
        for label, n in enumerate(num_images)
        if n
    }
    fill(bank, stored)
    return bank, stored


def test_attention_equals_the_form_that_stores_pixels():
    torch.manual_seed(0)
    tokens = unit_tokens(2, 6, 3, 4)
    # Class 2 has no image: neither foreground nor background.
    bank, stored = make_memory([3, 2, 0, 1, 3])
    labels = [[0, 1, 2, 4], [3, 2]]
    pairs = label_pairs(labels, 5)
    found = attention_maps(tokens, pairs, bank.class_means(pairs.classes), bank.seen(pairs.classes))
    assert found.shape == (6, 12)
    for row, (image, label) in enumerate(zip(pairs.images, pairs.classes.tolist(), strict=True)):
        if label not in stored:
            continue
        scores = slow_scores(tokens[image], stored[label])
        others = [o for o in labels[image] if o != label and o in stored]
        if others:
            background = [slow_scores(tokens[image], stored[other]) for other in others]
            scores = scores - torch.stack(background).mean(dim=0)
        expected = z_score(scores).sigmoid()
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)


def test_a_class_without_images_is_no_background():
    torch.manual_seed(0)
    tokens = unit_tokens(1, 6, 3, 3)
    bank, _ = make_memory([3, 0])
    alone, both = label_pairs([[0]], 2), label_pairs([[0, 1]], 2)
    maps = []
    for pairs in (alone, both):
        known = bank.seen(pairs.classes)
        means = bank.class_means(pairs.classes)
        means[~known] = 1.0  # whatever stands where no mean is
        maps.append(attention_maps(tokens, pairs, means, known))
    torch.testing.assert_close(maps[0][0], maps[1][0])


def slow_pseudo_background(tokens, label, stored):
    foreground = slow_scores(tokens, stored[label])
    kept = []
    for other in stored:
        scores = slow_scores(tokens, stored[other])
        like = (z_score(foreground) - z_score(scores)).square().mean()
        # Above 2 a correlation is negative; the class itself has 0.
        if scores.sort(descending=True).values[:5].mean() > 0.35 and like > 2:
            kept.append(scores)
    return torch.stack(kept).mean(dim=0) if kept else torch.zeros_like(foreground), len(kept)


def test_pseudo_background_is_what_is_there_and_elsewhere():
    torch.manual_seed(1)
    d = 6
    # Left half like class 0, right half like class 1, and noise; class 2 is where class 0 is,
    # class 3 is nowhere, class 4 has no image, class 5 is a second background.
    directions = F.normalize(torch.randn(6, d, dtype=torch.float64), dim=1)
    directions[2] = F.normalize(directions[0] + 0.1 * directions[2], dim=0)
    directions[3] = -directions[0]
    directions[5] = F.normalize(directions[1] + 0.1 * directions[5], dim=0)
    means = torch.zeros(d, 4, 6, dtype=torch.float64)
    means[:, :, :3] = directions[0][:, None, None]
    means[:, :, 3:] = directions[1][:, None, None]
    tokens = F.normalize(means + 0.1 * torch.randn_like(means), dim=0)[None]
    bank = MemoryBank(6, d, size=2, warm_up=1).double()
    stored = {c: directions[c].expand(2, 3, d) for c in (0, 1, 2, 3, 5)}
    fill(bank, stored)
    pairs = label_pairs([[0]], 6)
    foreground = bank.class_means(pairs.classes)
    background = pseudo_background(tokens, pairs, foreground, bank, torch.arange(6))
    expected, kept = slow_pseudo_background(tokens[0], 0, stored)
    assert kept >= 2
    torch.testing.assert_close(background[0], expected)
    attention = attention_maps(tokens, pairs, foreground, bank.seen(pairs.classes), background)
    scores = slow_scores(tokens[0], stored[0]) - expected
    torch.testing.assert_close(attention[0], z_score(scores).sigmoid())
    assert attention[0].reshape(4, 6)[:, :3].min() > 0.5 > attention[0].reshape(4, 6)[:, 3:].max()


def test_maps_that_cannot_be_background_are_not_made():
    torch.manual_seed(0)
    num_classes, d, side = 400, 16, 10
    bank = MemoryBank(num_classes, d, size=1, warm_up=1).double()
    bank.enqueue(torch.arange(num_classes), torch.randn(num_classes, d, dtype=torch.float64))
    tokens, pairs = unit_tokens(2, d, side, side), label_pairs([[0], [1]], num_classes)
    arguments = (tokens, pairs, bank.class_means(pairs.classes), bank, torch.arange(num_classes))
    with FlopCounterMode(display=False) as counter:
        pseudo_background(*arguments)
    every_map = 2 * 2 * num_classes * d * side**2
    assert counter.get_total_flops() < 0.65 * every_map


def test_without_a_background_the_map_is_that_of_the_foreground():
    torch.manual_seed(0)
    tokens = unit_tokens(1, 6, 3, 3)
    bank, stored = make_memory([3, 0, 0])
    pairs = label_pairs([[0]], 3)
    foreground = bank.class_means(pairs.classes)
    background = pseudo_background(tokens, pairs, foreground, bank, torch.arange(3))
    assert not background.any()
    found = attention_maps(tokens, pairs, foreground, bank.seen(pairs.classes), background)
    expected = z_score(slow_scores(tokens[0], stored[0])).sigmoid()
    torch.testing.assert_close(found[0], expected)


def test_chunks_of_classes_change_no_pseudo_background(monkeypatch):
    torch.manual_seed(2)
    tokens = unit_tokens(2, 3, 3, 3)
    bank, _ = make_memory([3] * 9, num_tokens=1, d=3)
    pairs = label_pairs([[4], [2]], 9)
    foreground = bank.class_means(pairs.classes)
    arguments = (tokens, pairs, foreground, bank, torch.arange(9))
    whole = pseudo_background(*arguments)
    assert whole.any(dim=1).all()
    monkeypatch.setattr("maskx.systems.larvseg.attention._CLASS_CHUNK", 2)
    torch.testing.assert_close(pseudo_background(*arguments), whole)


def test_pseudo_background_is_that_of_a_plain_search_over_all_classes():
    """It sums and sorts only what may be background; the plain form does so for every class."""
    torch.manual_seed(0)
    num_classes, pairs = 300, label_pairs([[3], [7], [3, 9]], 300)
    bank = MemoryBank(num_classes, 6, size=3).double()
    bank.counts.copy_(torch.arange(num_classes) % 5)
    bank.means.copy_(F.normalize(torch.randn(num_classes, 3, 6).double(), dim=-1))
    bank.means[torch.arange(3) >= bank.counts[:, None]] = 0
    tokens = unit_tokens(3, 6, 4, 5)
    every_class, means = torch.arange(300), bank.means.sum(1) / bank.counts.clamp(1, 3)[:, None]
    torch.testing.assert_close(bank.class_means(every_class), means)
    assert bank.class_means(torch.zeros(0, dtype=torch.int64)).shape == (0, 6)
    foreground = bank.class_means(pairs.classes)
    found = pseudo_background(tokens, pairs, foreground, bank, every_class)
    maps = (means @ tokens.flatten(2))[pairs.images]
    scores = pairs.unpad(pairs.pad(foreground) @ tokens.flatten(2))
    centred = scores - scores.mean(dim=-1, keepdim=True)
    kept = maps.topk(5, dim=-1).values.mean(dim=-1) > 0.35
    kept &= ((maps @ centred[:, :, None])[..., 0] < 0) & (bank.counts > 0)
    assert kept.any(dim=1).all()
    assert not kept.all()
    expected = (kept.double()[:, None] @ maps)[:, 0] / kept.sum(dim=1, keepdim=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_tokens", [1, 4, 20])
def test_top_tokens_are_those_most_like_the_class(num_tokens):
    torch.manual_seed(0)
    tokens, vectors = unit_tokens(2, 5, 3, 3), F.normalize(torch.randn(6, 5).double(), dim=1)
    pairs = label_pairs([[5, 0], [3]], 6)
    found = top_token_means(tokens, vectors, pairs, num_tokens)
    for row, (image, label) in enumerate(((0, 0), (0, 5), (1, 3))):
        every = sorted(tokens[image].flatten(1).T, key=lambda t: -(t @ vectors[label]).item())
        expected = torch.stack(every[: min(num_tokens, 9)]).mean(dim=0)
        torch.testing.assert_close(found[row], expected)


@settings(max_examples=30, deadline=None)
@given(labels=st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=1, max_size=4))
def test_pairs_list_each_label_of_each_image_once(labels):
    pairs = label_pairs(labels, 7)
    expected = [(i, label) for i, each in enumerate(labels) for label in sorted(set(each))]
    found = zip(pairs.images.tolist(), pairs.classes.tolist(), strict=True)
    assert list(found) == expected
    assert pairs.num_slots == max(len(set(each)) for each in labels)
    present = pairs.present(7)
    assert {tuple(p) for p in present.nonzero().tolist()} == set(expected)
    values = torch.randn(len(expected), 2)
    assert torch.equal(pairs.unpad(pairs.pad(values)), values)


def test_labels_out_of_range_are_refused():
    message = r"image 1 of the batch has image_labels \[-1, 7\]; the labels of 7 classes are 0 to 6"
    with pytest.raises(ValueError, match=message):
        label_pairs([[0], [7, 2, -1]], 7)
