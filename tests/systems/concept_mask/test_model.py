import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maskx.core.backbones import SmallResNet
from maskx.core.word_table import WordTable
from maskx.systems.concept_mask.concept_sets import ConceptSplit
from maskx.systems.concept_mask.model import (
    EmbeddingModel,
    RefinementModel,
    SegmentationModel,
    read_description,
)
from maskx.systems.concept_mask.network import ConceptEmbedding, ConceptSegmenter, normalise_maps
from maskx.systems.concept_mask.query import ConceptQuery

V, DIM = 9, 5
NAMES = tuple("abcdefghi")
BOXED, MASKED = (0, 2, 3, 5), (2, 5)
# Rows by concept: 0 is far from 3 and 5, 2 from 5.
GAMMA = (
    np.array([0, 2, 2, 3, 3, 3, 3, 3, 3, 3]),
    np.array([3, 5, 5], dtype=np.int32),
    np.array([0.75, 1.0, 0.5], dtype=np.float32),
)
SIZES = (32, 48)
BOXES = torch.tensor([[0.0, 0, 20, 20], [30, 30, 48, 48], [10, 4, 40, 30], [1, 20, 46, 47]])
STAGE_2 = (
    {"concepts": [0, 3], "boxes": BOXES[:3], "box_rows": torch.tensor([0, 0, 1])},
    {"concepts": [2], "boxes": BOXES[3:], "box_rows": torch.tensor([0])},
)


def make_vectors():
    return torch.randn(V, DIM, generator=torch.Generator().manual_seed(7))


def make_table(vectors=None, names=NAMES):
    vectors = make_vectors() if vectors is None else vectors
    return WordTable(names, vectors.numpy(), np.linspace(1, 3, len(names)), source="a test")


def make_split(boxed=BOXED, masked=MASKED, names=NAMES):
    return ConceptSplit(names, *(tuple(names[i] for i in each) for each in (boxed, masked)))


def make_images(num_images=2, height=48, width=48):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_images, 3, height, width, generator=generator)


def make_net(stage, *, seed=0, widths=(6, 7), **changes):
    """A network whose images need no normalising."""
    torch.manual_seed(seed)
    backbone = SmallResNet(widths=(4, 6, 8, 12), output_stride=16)
    embedding = ConceptEmbedding(
        backbone, in_feature="layer4", in_channels=12, dim=DIM, hidden_channels=widths
    )
    for _ in range(5):  # running statistics as after training
        embedding(make_images())
    arguments = {
        "table": make_table(),
        "split": make_split(),
        "attention_sizes": SIZES,
        "pixel_mean": (0.0, 0.0, 0.0),
        "pixel_std": (1.0, 1.0, 1.0),
    }
    if stage > 1:
        arguments["hidden_channels"] = 6
    if stage == 2:
        arguments["gamma"] = GAMMA
    if stage == 3:
        encoder = SmallResNet(widths=(4, 6, 8, 12), output_stride=16)
        arguments["mask_size"] = 32
        arguments["segmenter"] = ConceptSegmenter(encoder, decoder_channels=(8, 6, 6, 4, 4))
    network = (EmbeddingModel, RefinementModel, SegmentationModel)[stage - 1]
    return network(embedding, **(arguments | changes))


def make_masks():
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, 4:20, 8:30] = masks[1, 10:31, 2:9] = True
    return masks


STAGE_3 = (
    {"concepts": [2], "masks": make_masks()[:1]},
    {"concepts": [5], "masks": make_masks()[1:]},
)
TARGETS = {1: ({"image_labels": [0, 4]}, {"image_labels": [8]}), 2: STAGE_2, 3: STAGE_3}


def make_samples(stage, targets=None, images=None):
    images = make_images() if images is None else images
    targets = TARGETS[stage] if targets is None else targets
    return [
        {"image": image, "image_id": n} | each
        for n, (image, each) in enumerate(zip(images, targets, strict=True))
    ]


def losses_of(net, targets=None):
    """Losses, in the mode that the network is in."""
    samples = make_samples(net.stage, targets)
    return net.losses(torch.stack([sample["image"] for sample in samples]), samples)


def predict(net, image, query=None, **options):
    return net.predict({"image": image}, query, **options)


def train_step(net, optimizer):
    optimizer.zero_grad()
    losses = net(make_samples(net.stage))
    sum(losses.values()).backward()
    optimizer.step()


def make_optimizer(net):
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=1e-2)


def moved_parts(net):
    """Names of the parts of which a training step moves anything, running statistics too."""
    before = copy.deepcopy(net.state_dict())
    train_step(net, make_optimizer(net))
    after = net.state_dict()
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}


def set_refined(net, probs):
    """Let the refined map of each concept be constant."""
    with torch.no_grad():
        net.refinement.conv2.weight.zero_()
        net.refinement.conv2.bias.copy_(torch.as_tensor(probs).logit())


def unfolded_logits(net, embedding_map):
    """Maps of all concepts, through two convolutions over V maps."""
    coarse = F.conv2d(embedding_map, make_vectors()[:, :, None, None])
    return net.refinement.conv2(F.relu(net.refinement.conv1(coarse)))


def query_of(indices, vectors=None):
    if vectors is None:
        vectors = torch.zeros(len(indices), DIM)
    return ConceptQuery(indices, vectors)


def cross_entropy(logit, target):
    prob = 1 / (1 + math.exp(-logit))
    return -math.log(prob if target else 1 - prob)


# Losses


def test_stage_1_is_one_minus_the_cosine_to_the_soft_topic():
    net = make_net(1)
    images, table, idf = make_images(), make_vectors(), torch.linspace(1, 3, V)
    found = losses_of(net)
    topics = [idf[0] * table[0] + idf[4] * table[4], idf[8] * table[8]]
    expected = 0
    for e, t in zip(net.embedding(images), topics, strict=True):
        expected += (1 - (e @ t) / (e.norm() * t.norm())) / 2
    assert found.keys() == {"loss_embedding"}
    torch.testing.assert_close(found["loss_embedding"], expected)


def test_stage_2_is_the_slow_form_of_eqs_2_to_4():
    net = make_net(2, matching_weight=0.01, discrimination_weight=0.3, num_matched=3)
    with torch.no_grad():  # the frozen copy differs from what is trained
        for parameter in net.embedding.layers.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        net.refinement.conv2.weight.normal_()
    images = make_images()
    found = losses_of(net)
    with torch.no_grad():
        logits = unfolded_logits(net, net.embedding.embedding_map(images))
        original_map = net.original.embedding_map(images)

    # Boxes: cells of 16 pixels, a cell is on where its centre lies in a box of its pair.
    pairs = [(0, 0), (0, 3), (1, 2)]
    targets = torch.zeros(3, 3, 3)
    for box, row in zip(BOXES.tolist(), (0, 0, 1, 2), strict=True):
        for y in range(3):
            for x in range(3):
                centre_y, centre_x = 16 * y + 8, 16 * x + 8
                if box[0] <= centre_x < box[2] and box[1] <= centre_y < box[3]:
                    targets[row, y, x] = 1
    assert [int(target.sum()) for target in targets] == [2, 2, 6]
    terms = []
    for (n, k), target in zip(pairs, targets, strict=True):
        for logit, inside in zip(logits[n, k].flatten(), target.flatten(), strict=True):
            terms.append(cross_entropy(float(logit), bool(inside)))
    assert found["loss_boxes"].item() == pytest.approx(sum(terms) / 27, rel=1e-4)

    # Matching: the three maps with the highest peak, on above mean + std; sum, mean over images.
    total = 0
    for n in range(2):
        maps = [[float(e @ w) for e in original_map[n].flatten(1).T] for w in make_vectors()]
        best = sorted(range(V), key=lambda k, maps=maps: -max(maps[k]))[:3]
        for k in best:
            mean = sum(maps[k]) / 9
            std = (sum((value - mean) ** 2 for value in maps[k]) / 9) ** 0.5
            for value, logit in zip(maps[k], logits[n, k].flatten(), strict=True):
                total += cross_entropy(float(logit), value > mean + std)
    assert found["loss_matching"].item() == pytest.approx(0.01 * total / 2, rel=1e-4)

    # Discrimination: where a concept is, its negatives are not.
    negatives = {0: {3: 0.75, 5: 1.0}, 3: {}, 2: {5: 0.5}}
    per_pair = []
    for (n, i), target in zip(pairs, targets, strict=True):
        if negatives[i]:
            total = sum(
                weight * sum(cross_entropy(float(x), False) for x in logits[n, j][target > 0])
                for j, weight in negatives[i].items()
            )
            per_pair.append(total / float(target.sum()) / len(negatives[i]))
    expected = 0.3 * sum(per_pair) / len(per_pair)
    assert found["loss_discrimination"].item() == pytest.approx(expected, rel=1e-4)


def test_without_overlaps_there_is_no_discrimination_loss():
    losses = losses_of(make_net(2, gamma=None))
    assert losses.keys() == {"loss_boxes", "loss_matching"}


def test_stage_3_segments_with_the_normalised_maps_of_both_sizes():
    net = make_net(3).eval()
    with torch.no_grad():  # far enough from 0 that a sigmoid is no line, and maps matter
        net.refinement.conv2.weight.normal_(std=3)
        net.segmenter.classify.weight.normal_(std=5)
    images = make_images()
    found = losses_of(net)
    total = 0
    for n, concept in enumerate((2, 5)):
        maps = []
        for size in SIZES:
            warped = F.interpolate(images[n : n + 1], (size, size), mode="bilinear", antialias=True)
            prob = unfolded_logits(net, net.embedding.embedding_map(warped))[:, concept].sigmoid()
            large = F.interpolate(prob[None], (32, 32), mode="bilinear")
            maps.append((large - large.min()) / (large.max() - large.min()))
        warped = F.interpolate(images[n : n + 1], (32, 32), mode="bilinear", antialias=True)
        logits = net.segmenter(warped, torch.cat(maps, dim=1), torch.tensor([0]))
        target = make_masks()[n : n + 1].float()
        total = total + F.binary_cross_entropy_with_logits(logits, target) / 2
    assert found.keys() == {"loss_masks"}
    torch.testing.assert_close(found["loss_masks"], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "targets", "name"),
    [
        (1, {"image_labels": []}, "loss_embedding"),
        (
            2,
            {"concepts": [], "boxes": BOXES[:0], "box_rows": torch.zeros(0).long()},
            "loss_boxes",
        ),
        (3, {"concepts": [], "masks": torch.zeros(0, 32, 32)}, "loss_masks"),
    ],
)
def test_a_batch_without_supervision_gives_zero_with_a_graph(stage, targets, name):
    net = make_net(stage)
    losses = net(make_samples(stage, [targets] * 2))
    assert losses[name] == 0
    assert losses.get("loss_discrimination", 0) == 0
    sum(losses.values()).backward()
    for parameter in net.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad


def test_concepts_may_come_in_any_order():
    net = make_net(2)
    expected = losses_of(net)
    other = {"concepts": [3, 0], "boxes": BOXES[:3], "box_rows": torch.tensor([1, 1, 0])}
    found = losses_of(net, [other, STAGE_2[1]])
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize(
    ("stage", "level", "others"), [(2, "boxed", [-1, 1, 9]), (3, "masked", [0, 3, 9])]
)
def test_concepts_whose_boxes_or_masks_are_withheld_are_refused(stage, level, others):
    concepts = [[2, others[2]], others[:2]]
    targets = [TARGETS[stage][n] | {"concepts": concepts[n]} for n in range(2)]
    message = rf"concept indices \[{', '.join(map(str, others))}\], .* among the {level} concepts"
    with pytest.raises(ValueError, match=message):
        losses_of(make_net(stage), targets)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_samples_that_do_not_fit_are_refused(stage):
    net, samples = make_net(stage), make_samples(stage)
    for key in net.targets:
        without = {name: value for name, value in samples[1].items() if name != key}
        with pytest.raises(ValueError, match=rf"Image 1 has no '{key}'\. .*stage {stage}"):
            net([samples[0], without])
    other = samples[1] | {"image": torch.zeros(3, 32, 48)}
    with pytest.raises(ValueError, match=r"different sizes: \(32, 48\), \(48, 48\)"):
        net([samples[0], other])


def test_images_are_normalised_with_the_statistics_of_the_model():
    net = make_net(1, pixel_mean=(10.0, 20, 30), pixel_std=(2.0, 4, 8)).train()
    images = (make_images() * 100).round()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((10, 20, 30), (2, 4, 8)))
    samples = make_samples(1, images=images)
    expected = copy.deepcopy(net).losses((images - mean) / std, samples)
    torch.testing.assert_close(net(samples), expected)


# Stages: what is frozen, what is handed on


@pytest.mark.parametrize(
    ("stage", "moved"),
    [(1, {"embedding"}), (2, {"embedding", "refinement"}), (3, {"segmenter"})],
)
def test_a_stage_moves_only_what_it_trains(stage, moved):
    net = make_net(stage)
    net.eval().train()
    assert moved_parts(net) == moved


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parts_stay_in_evaluation_mode(stage):
    net = make_net(stage)
    names = {1: (), 2: ("original",), 3: ("embedding", "refinement")}[stage]
    frozen = [getattr(net, name) for name in names]
    for module in net.modules():
        inside = any(module in list(part.modules()) for part in frozen)
        assert module.training != inside
    assert not any(module.training for module in net.eval().modules())
    assert all(not p.requires_grad for part in frozen for p in part.parameters())


def test_stage_2_starts_from_stage_1_and_remembers_it():
    first = make_net(1)
    train_step(first, make_optimizer(first))
    second = make_net(2, seed=5)
    fresh = copy.deepcopy(second.refinement.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.is_new
    images = make_images()
    expected = first.eval().embedding.embedding_map(images)
    second.eval()
    torch.testing.assert_close(second.embedding.embedding_map(images), expected)
    torch.testing.assert_close(second.original.embedding_map(images), expected)
    for name, value in second.refinement.state_dict().items():
        assert torch.equal(value, fresh[name])
    train_step(second.train(), make_optimizer(second))
    second.eval()
    torch.testing.assert_close(second.original.embedding_map(images), expected)
    assert not torch.allclose(second.embedding.embedding_map(images), expected)


def test_stage_3_starts_from_stage_2_and_predicts_its_attention():
    second = make_net(2)
    train_step(second, make_optimizer(second))
    second.set_fitted(theta_image=0.5)
    third = make_net(3, seed=5)
    fresh = copy.deepcopy(third.segmenter.state_dict())
    third.load_state_dict(second.state_dict())
    assert not any(name.startswith("original.") for name in third.state_dict())
    for name, value in third.segmenter.state_dict().items():
        assert torch.equal(value, fresh[name])
    query = query_of([0, 1, 7])
    for old, new in zip(
        *[
            net.eval().attention(net.embedding_maps(make_images()), query)
            for net in (second, third)
        ],
        strict=True,
    ):
        torch.testing.assert_close(old, new)


@pytest.mark.parametrize(
    ("found", "stage", "message"),
    [
        (
            lambda: make_net(1),
            3,
            "is of stage 1 of .*. Stage 3 starts from one of stage 2",
        ),
        (
            lambda: make_net(3),
            2,
            "is of stage 3 of .*. Stage 2 starts from one of stage 1",
        ),
        (lambda: make_net(2), 1, "Stage 1 is the first"),
        (lambda: make_net(1, widths=(6, 8)), 2, r"does not fit this network: embedding\..* \.\.\."),
        (lambda: make_net(2, hidden_channels=4), 3, r"does not fit .* refinement\.conv1"),
        (lambda: make_net(2, split=make_split((1, *MASKED))), 3, "with boxes of other concepts"),
        (
            lambda: make_net(1, table=make_table(-make_vectors())),
            2,
            r"made with the word table \w{12}",
        ),
    ],
)
def test_checkpoints_that_do_not_fit_the_stage(found, stage, message):
    net = make_net(stage)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        net.load_state_dict(found().state_dict())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_only_a_training_starts_from_the_stage_before():
    with pytest.raises(ValueError, match=r"is of stage 2 .*, the network of stage 3\. Build the"):
        make_net(3).eval().load_state_dict(make_net(2).state_dict())


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("change", ["vectors", "fewer", "names"])
def test_a_state_dict_of_another_table_is_refused(stage, change):
    vectors, names = make_vectors(), NAMES
    if change == "vectors":
        vectors = 2 * vectors
    elif change == "fewer":
        vectors, names = vectors[:8], NAMES[:8]
    else:
        names = (*NAMES[:8], "z")
    other = make_net(
        stage,
        table=make_table(vectors, names),
        split=make_split(names=names),
        **({"gamma": None} if stage == 2 else {}),
    )
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"made with the word table \w{12}, but .*a test"):
            make_net(stage).train(mode).load_state_dict(other.state_dict())


def test_a_checkpoint_says_what_network_it_is_of():
    net = make_net(3, architecture={"backbone": "small"})
    found = read_description(net.state_dict())
    assert (found["stage"], found["names"]) == (3, list(NAMES))
    assert (found["boxed"], found["masked"]) == (list("acdf"), list("cf"))
    assert (found["attention_sizes"], found["architecture"]) == ([32, 48], {"backbone": "small"})
    assert found["word_table"] == make_table().hash
    with pytest.raises(ValueError, match="does not say what network it is of"):
        read_description({})
    other = net.get_extra_state().clone()
    other[0] += 1
    with pytest.raises(ValueError, match="says of a network of ConceptMask cannot be read"):
        make_net(3).load_state_dict(net.state_dict() | {"_extra_state": other})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_goes_on_exactly_from_a_state_dict(stage):
    net = make_net(stage)
    if stage == 2:
        first = make_net(1, seed=3)
        net.load_state_dict(first.state_dict())
    net.set_fitted(theta_image=0.25, existence_threshold_unseen=0.125)
    optimizer = make_optimizer(net)
    train_step(net, optimizer)
    other = make_net(stage, seed=9)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    assert not other.is_new
    other_optimizer = make_optimizer(other)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_step(net, optimizer)
    train_step(other, other_optimizer)
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert other.theta_image == 0.25
    query = query_of([0, 1])
    both = [predict(each.eval(), make_images()[0], query) for each in (net, other)]
    assert torch.equal(both[0]["masks_prob"], both[1]["masks_prob"])


def test_only_trained_weights_and_what_prediction_needs_are_in_the_state_dict():
    names = {name.partition(".")[0] for name in make_net(2).state_dict()}
    fitted = {"theta_image", "theta_unseen", "existence_thresholds", "existence_threshold_unseen"}
    table = {"idf", "vectors", "_extra_state"}
    assert names == {"embedding", "refinement", "original"} | table | fitted


# Attention


def test_blending_by_hand():
    net = make_net(3).eval()
    table = torch.zeros(V, DIM)
    table[:, 0] = torch.arange(V) + 1.0
    table[0, 1], table[2, 2], table[3, 3], table[5, 4] = 10, 10, 20, 20
    table[1, 2], table[4, 1] = 3, -1  # 1 is nearest to 2
    table[5] *= 10  # but its inner product is largest with 5
    net.vectors.copy_(table)
    net.set_fitted(theta_image=0.25, theta_unseen=0.75)
    probs = [0.5, 0.2, 0.6, 0.7, 0.9, 0.8, 0.3, 0.4, 0.1]
    set_refined(net, probs)
    unseen = torch.tensor([0.0, 9, 1, 0, 0])  # nearest to 0
    vectors = torch.stack([unseen * 0, unseen * 0, unseen])
    query = ConceptQuery([2, 1, -1], vectors, blended=True)

    maps = net.embedding_maps(make_images())
    assert net.nearest_boxed(torch.stack([table[2], table[1], unseen])).tolist() == [2, 2, 0]
    own, nearest, blended, initial = (
        net.attention(maps, query, kind=kind) for kind in ("own", "nearest", "blended", "initial")
    )
    for a in range(2):
        side = SIZES[a] // 16
        scores = torch.einsum("nkhw,k->nhw", maps[a], unseen)
        low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
        torch.testing.assert_close(initial[a][:, 2], scores)
        normalised = (scores - low) / (high - low)
        for found, values in ((own, (0.6, 0.2)), (nearest, (0.6, 0.6)), (blended, (0.6, 0.5))):
            expected = torch.tensor(values)[:, None, None].expand(2, 2, side, side)
            torch.testing.assert_close(found[a][:, :2], expected)
        torch.testing.assert_close(own[a][:, 2], normalised)
        torch.testing.assert_close(nearest[a][:, 2], torch.full_like(normalised, 0.5))
        torch.testing.assert_close(blended[a][:, 2], 0.75 * normalised + 0.25 * 0.5)

    # Without being asked, unseen words have no part in the blend.
    alone = net.attention(maps, query_of([2, 1, -1], vectors))
    for found, own_map, blend in zip(alone, own, blended, strict=True):
        torch.testing.assert_close(found[:, 2], own_map[:, 2])
        torch.testing.assert_close(found[:, :2], blend[:, :2])
    found = predict(net, make_images()[0], query)
    assert found["borrowed"] == [None, "c", "a"]
    assert found["own_share"].tolist() == [1, 0.25, 0.75]
    found = predict(net, make_images()[0], query_of([2, 1, -1], vectors))
    assert found["borrowed"] == [None, "c", None]
    assert found["own_share"].tolist() == [1, 0.25, 1]


def test_without_fitted_theta_maps_are_not_blended():
    net = make_net(3).eval()
    maps = net.embedding_maps(make_images())
    query = ConceptQuery([0, 1, -1], torch.ones(3, DIM), blended=True)
    for own, blended in zip(
        net.attention(maps, query, kind="own"), net.attention(maps, query), strict=True
    ):
        assert torch.equal(own, blended)
    assert predict(net, make_images()[0], query)["borrowed"] == [None] * 3


def test_two_unseen_words_are_told_apart_by_their_own_evidence():
    """Both are nearest to one boxed concept, whose map blended ones of a small theta are."""
    net = make_net(3).eval()
    net.set_fitted(theta_unseen=0.05)
    words = make_vectors()[[2]] + 0.3 * torch.eye(DIM)[:2]
    assert len(set(net.nearest_boxed(words).tolist())) == 1
    alone = predict(net, make_images()[0], query_of([-1, -1], words))["attention"]
    assert (alone[0] - alone[1]).abs().max() > 0.05
    blended = predict(net, make_images()[0], ConceptQuery([-1, -1], words, blended=True))
    assert (blended["attention"][0] - blended["attention"][1]).abs().max() < 0.06
    assert blended["borrowed"] == ["c", "c"]


def test_refined_maps_are_those_of_the_unfolded_computation():
    net = make_net(3).eval()
    maps = net.embedding_maps(make_images())
    for each, own in zip(maps, net.attention(maps, query_of([7, 0, 7])), strict=True):
        expected = unfolded_logits(net, each).sigmoid()[:, [7, 0, 7]]
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)


def test_existence_is_the_maximum_before_normalising_and_the_cosine_of_unseen_words():
    net = make_net(3).eval()
    maps = net.embedding_maps(make_images())
    word = torch.tensor([0.3, -2, 1, 0.5, 4])
    found = net.existence(maps, query_of([4, -1], torch.stack([word, word])))
    for n in range(2):
        best = max(float(unfolded_logits(net, each)[n, 4].sigmoid().max()) for each in maps)
        cosines = [
            float(e @ word / (e.norm() * word.norm()))
            for each in maps
            for e in each[n].flatten(1).T
        ]
        assert found[n].tolist() == pytest.approx([best, max(cosines)], abs=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_existence_of_the_whole_vocabulary_streams(stage):
    count = 2100  # more than are made at a time
    names = tuple(f"word {n}" for n in range(count))
    vectors = torch.randn(count, DIM, generator=torch.Generator().manual_seed(3))
    large = {"table": make_table(vectors, names), "split": make_split(names=names)}
    net = make_net(stage, **large, **({"gamma": None} if stage == 2 else {})).eval()
    maps = net.embedding_maps(make_images())
    expected = net.existence(maps, query_of(range(count)))
    torch.testing.assert_close(net.vocabulary_existence(maps), expected)


# Prediction


def count_calls(module):
    calls = SimpleNamespace(sizes=[])
    module.register_forward_hook(lambda m, i, o: calls.sizes.append(tuple(i[0].shape)))
    return calls


@pytest.mark.parametrize("query", [query_of([3]), query_of([0, 1, 2, 3, 4, 5, -1]), None])
def test_an_image_is_embedded_once_per_size_for_any_number_of_concepts(query):
    net = make_net(3).eval()
    calls = count_calls(net.embedding.backbone)
    predict(net, make_images()[0], query)
    assert calls.sizes == [(1, 3, 32, 32), (1, 3, 48, 48)]


def test_maps_are_made_of_the_image_as_it_is():
    """Not of a square that it was warped to before, which would lose what large sizes show."""
    net = make_net(3, attention_sizes=(32, 96)).eval()
    image = make_images(1, 120, 90)
    expected = F.interpolate(image, (96, 96), mode="bilinear", antialias=True)
    seen = []
    net.embedding.backbone.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    net.embedding_maps(image)
    torch.testing.assert_close(seen[1], expected)


def test_masks_come_at_the_size_of_the_file():
    net = make_net(3).eval()
    image = make_images(1, 48, 80)[0]
    query = query_of([3, -1, 1], torch.ones(3, DIM))
    (found,) = net([{"image": image, "height": 60, "width": 100, "query": query}])
    assert found["concept_indices"].tolist() == [3, -1, 1]
    assert found["concepts"] == ["d", "vector 1", "b"]
    for key in ("masks_prob", "masks", "attention", "initial"):
        assert found[key].shape == (3, 60, 100)
    assert torch.equal(found["masks"], found["masks_prob"] > 0.5)
    assert found["existence"].shape == found["exists"].shape == found["own_share"].shape == (3,)
    assert predict(net, image, query)["masks"].shape == (3, 48, 80)
    with torch.no_grad():
        attention = net.attention(net.embedding_maps(image[None]), query)
        prob = net.segment(image[None], attention, (60, 100))[0]
    torch.testing.assert_close(found["masks_prob"], prob)


@pytest.mark.parametrize("scored", [(), (48,)])
def test_the_map_that_is_measured_is_the_sigmoid_map(scored):
    """The mean over the scored sizes, without bringing each to [0, 1]; of Eq. 1 brought there."""
    net = make_net(3, scored_sizes=scored).eval()
    with torch.no_grad():
        net.refinement.conv2.weight.normal_()
    image = make_images(1, 48, 80)
    query = query_of([3, 1, -1], torch.ones(3, DIM))
    found = net.predict({"image": image[0], "height": 60, "width": 100}, query)
    probs, scores = [], []
    with torch.no_grad():
        for each in net.embedding_maps(image)[1 if scored else 0 :]:
            prob = unfolded_logits(net, each)[:, [3, 1]].sigmoid()
            probs.append(F.interpolate(prob, (60, 100), mode="bilinear")[0])
            score = torch.einsum("nkhw,ck->nchw", each, net.vectors[[3, 1]])
            score = torch.cat([score, each.sum(dim=1, keepdim=True)], dim=1)
            scores.append(F.interpolate(score, (60, 100), mode="bilinear")[0])
    refined = sum(probs) / len(probs)
    initial = normalise_maps(sum(scores) / len(scores))
    torch.testing.assert_close(found["attention"][:2], refined)
    torch.testing.assert_close(found["attention"][2], initial[2])
    torch.testing.assert_close(found["initial"], initial)
    assert refined.amax(dim=(1, 2)).min() < 1


def test_masks_are_made_of_the_normalised_maps_of_both_sizes():
    net = make_net(3).eval()
    with torch.no_grad():  # probabilities far from 0.5
        net.segmenter.classify.weight.normal_(std=5)
    image = make_images(1, 48, 80)
    generator = torch.Generator().manual_seed(4)
    attention = [0.4 + 0.2 * torch.rand(1, 2, side, side, generator=generator) for side in (2, 3)]
    found = net.segment(image, attention, (60, 100))
    warped = F.interpolate(image, (32, 32), mode="bilinear", antialias=True)
    for concept in range(2):
        maps = []
        for each in attention:
            large = F.interpolate(each[:, concept : concept + 1], (32, 32), mode="bilinear")
            maps.append((large - large.min()) / (large.max() - large.min()))
        logits = net.segmenter(warped, torch.cat(maps, dim=1), torch.tensor([0]))
        expected = F.interpolate(logits[None], (60, 100), mode="bilinear").sigmoid()
        torch.testing.assert_close(found[:, concept], expected[0])


def test_masks_of_many_concepts_are_made_some_at_a_time():
    net = make_net(3).eval()
    images, query = make_images(), query_of(range(9))
    attention = net.attention(net.embedding_maps(images), query)
    calls = count_calls(net.segmenter.encoder)
    together = net.segment(images, attention)
    assert [size[0] for size in calls.sizes] == [16, 2]
    assert together.shape == (2, 9, 48, 48)
    # One image, one concept.
    alone = net.segment(images[1:], [each[1:, 2:3] for each in attention])
    torch.testing.assert_close(alone[0, 0], together[1, 2])


def test_all_concepts_above_their_threshold():
    net = make_net(3).eval()
    probs = [0.5, 0.2, 0.6, 0.7, 0.9, 0.8, 0.3, 0.4, 0.1]
    set_refined(net, probs)
    thresholds = torch.full((V,), 0.55)
    thresholds[3], thresholds[8] = 0.75, 0.05
    net.set_fitted(existence_thresholds=thresholds)
    found = predict(net, make_images()[0])
    assert found["concepts"] == ["c", "e", "f", "i"]
    assert found["existence"].tolist() == pytest.approx([0.6, 0.9, 0.8, 0.1])
    assert found["exists"].all()
    asked = predict(net, make_images()[0], query_of([3, 8]))
    assert asked["exists"].tolist() == [False, True]


def test_the_query_of_the_model_is_for_samples_without_one():
    net = make_net(3, query=ConceptQuery([4], torch.zeros(1, DIM), names=["asked"])).eval()
    assert predict(net, make_images()[0])["concepts"] == ["asked"]
    assert predict(net, make_images()[0], query_of([1]))["concepts"] == ["b"]
    (found,) = net([{"image": make_images()[0], "query": query_of([2, 3])}])
    assert found["concepts"] == ["c", "d"]
    net.unseen = WordTable(("owl",), np.ones((1, DIM)), np.ones(1))
    (found,) = net([{"image": make_images()[0], "concepts": ["owl", "d", 0]}])
    assert found["concepts"] == ["owl", "d", "a"]
    assert found["concept_indices"].tolist() == [-1, 3, 0]


@pytest.mark.parametrize("margin", [-0.01, 0.01])
def test_an_unseen_word_exists_above_its_own_threshold(margin):
    net = make_net(3).eval()
    query = query_of([-1, 8], torch.ones(2, DIM))
    score = float(predict(net, make_images()[0], query)["existence"][0])
    net.set_fitted(
        existence_thresholds=torch.full((V,), 0.0), existence_threshold_unseen=score - margin
    )
    found = predict(net, make_images()[0], query)
    assert found["exists"].tolist() == [margin > 0, True]


def test_no_concept_may_exist(caplog):
    net = make_net(3).eval()
    said = "no threshold of existence was fitted: there may be maps and masks of most of the 9"
    predict(net, make_images()[0], query_of([1]))
    assert said not in caplog.text
    for _ in range(2):
        predict(net, make_images()[0])
    assert caplog.text.count(said) == 1
    assert not net.has_fitted_thresholds
    net.set_fitted(existence_thresholds=torch.ones(V))
    assert net.has_fitted_thresholds
    for asked in ({}, {"query": query_of([])}):
        sample = {"image": make_images()[0], "height": 20, "width": 30}
        found = net.predict(sample | asked)
        assert found["concept_indices"].shape == found["existence"].shape == (0,)
        for key in ("masks", "masks_prob", "attention", "initial"):
            assert found[key].shape == (0, 20, 30)
        assert found["concepts"] == found["borrowed"] == []


@pytest.mark.parametrize("stage", [1, 2])
def test_before_stage_3_the_attention_takes_the_place_of_the_masks(stage):
    net = make_net(stage).eval()
    image, query = make_images()[0], query_of([3, 0, -1], torch.ones(3, DIM))
    found = predict(net, image, query)
    attention = net.attention(net.embedding_maps(image[None]), query)
    expected = 0
    for each in attention:
        large = F.interpolate(each, (48, 48), mode="bilinear")
        low, high = large.amin((2, 3), keepdim=True), large.amax((2, 3), keepdim=True)
        expected = expected + (large - low) / (high - low) / 2
    torch.testing.assert_close(found["masks_prob"], expected[0].detach())
    assert found["existence"].shape == (3,)
    if stage == 1:
        torch.testing.assert_close(found["attention"], found["initial"])
        net.set_fitted(existence_threshold_unseen=-1.5)
        assert len(predict(net, image)["concepts"]) == V


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["own", "nearest", "initial"])
def test_the_kind_of_attention_is_that_of_the_model_unless_it_is_asked_for(stage, kind):
    """ "initial" of stage 2 is the row "finetuned" of the paper's Table 1."""
    net, other = make_net(stage).eval(), make_net(stage, attention_kind=kind).eval()
    other.load_state_dict(net.state_dict())
    sample, query = {"image": make_images()[0]}, query_of([3, 0])
    asked, own = net.predict(sample, query, kind=kind), other.predict(sample, query)
    blended = other.predict(sample, query, kind="blended")
    for key in ("attention", "masks_prob"):
        assert torch.equal(own[key], asked[key])
        assert torch.equal(blended[key], net.predict(sample, query)[key])
    if kind == "initial":
        assert torch.equal(own["attention"], own["initial"])


@pytest.mark.parametrize("stage", [2, 3])
def test_constant_attention_maps_give_finite_masks(stage):
    net = make_net(stage).eval()
    set_refined(net, [0.3] * V)
    found = predict(net, make_images()[0], query_of([3, 1]))
    assert found["masks_prob"].isfinite().all()
    if stage == 2:
        assert not found["masks_prob"].any()
    assert all(loss.isfinite() for loss in losses_of(net).values())


def test_the_vector_of_a_known_concept_is_that_of_the_table():
    net = make_net(3).eval()
    maps = net.embedding_maps(make_images())
    wrong = net.attention(maps, query_of([4], torch.ones(1, DIM)), kind="initial")
    right = net.attention(maps, query_of([4], make_vectors()[4:5]), kind="initial")
    assert all(torch.equal(*both) for both in zip(wrong, right, strict=True))


def test_prediction_runs_in_bfloat16():
    net = make_net(3).eval()
    query = query_of([3, -1], torch.ones(2, DIM))
    expected = predict(net, make_images()[0], query)["masks_prob"]
    with torch.autocast("cpu", torch.bfloat16):
        found = predict(net, make_images()[0], query)["masks_prob"]
        losses_of(net)["loss_masks"].backward()
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_autocast_computes_nearly_the_same(stage):
    net = make_net(stage).train()
    exact = {name: loss.item() for name, loss in losses_of(copy.deepcopy(net)).items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(net)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(exact[name], rel=0.15, abs=0.02)
    sum(losses.values()).backward()


# Errors


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (1, {"attention_sizes": (8, 48)}, r"are \(8, 48\). Allowed: .* of at least 16 pixels"),
        (1, {"attention_sizes": ()}, r"attention_sizes of ConceptMask are \(\)"),
        (1, {"scored_sizes": (32, 40)}, r"scored_sizes of ConceptMask has \[40\]. Allowed: some"),
        (2, {"attention_kind": "raw"}, r"attention_kind of ConceptMask must be one of 'blended'"),
        (1, {"split": make_split(names="abcdefghj")}, "another vocabulary .*: concept 8 is 'j'"),
        (2, {"split": make_split((), ())}, "no boxed concept. Stages 2 and 3 need at least one"),
        (3, {"split": make_split((), ())}, "no boxed concept. Stages 2 and 3 need at least one"),
        (3, {"attention_sizes": (32,)}, "takes 2 attention maps, but there are 1 attention_sizes"),
        (3, {"mask_size": 0}, "mask_size of ConceptMask must be at least 1, got 0"),
        (2, {"num_matched": -1}, "num_matched of ConceptMask must be at least 0, got -1"),
        (2, {"matching_weight": -0.1}, "matching_weight of ConceptMask must be at least 0"),
        (2, {"discrimination_weight": -1}, "discrimination_weight of ConceptMask must be at least"),
        (2, {"gamma": (np.zeros(4), *GAMMA[1:])}, "gamma has 3 rows for a word table of 9"),
    ],
)
def test_arguments_that_do_not_fit(stage, changes, message):
    with pytest.raises(ValueError, match=message):
        make_net(stage, **changes)


def test_images_smaller_than_the_stride_are_named():
    net = make_net(3).eval()
    words = "Image 7 has 12 x 48 pixels, less than the 16 of one position"
    small = {"image": torch.zeros(3, 12, 48), "image_id": 7}
    with pytest.raises(ValueError, match=words):
        net([small | {"query": query_of([3])}])
    with pytest.raises(ValueError, match="The image has 12 x 48 pixels"):
        predict(net, make_images(1, 12, 48)[0], query_of([3]))
    for stage in (1, 2, 3):
        samples = make_samples(stage, images=make_images(2, 12, 48))
        with pytest.raises(ValueError, match="Image 0 has 12 x 48 pixels"):
            make_net(stage).train()(samples)


def test_queries_that_do_not_fit():
    net = make_net(3).eval()
    image = make_images()[0]
    with pytest.raises(ValueError, match=r"concept indices \[-2, 9\]. Allowed: 0 to 8, and -1"):
        predict(net, image, query_of([9, 0, -2]))
    with pytest.raises(ValueError, match=r"2 concepts has vectors of shape \(2, 4\). Needed: \(2"):
        predict(net, image, query_of([0, 1], torch.zeros(2, 4)))
    with pytest.raises(ValueError, match="kind of attention must be one of 'blended', 'own'"):
        predict(net, image, query_of([0]), kind="refined")
    with pytest.raises(ValueError, match="Stage 1 of ConceptMask has no refined maps"):
        predict(make_net(1).eval(), image, query_of([0]), kind="nearest")


def test_fitted_values_out_of_range_and_those_that_could_not_be_told():
    net = make_net(3)
    for theta in (0, 1.5):
        with pytest.raises(ValueError, match=rf"theta_unseen must be above 0 .*, got {theta}"):
            net.set_fitted(theta_unseen=theta)
    with pytest.raises(ValueError, match="existence_thresholds has 3 numbers for a word table of"):
        net.set_fitted(existence_thresholds=torch.ones(3))
    thresholds = np.full(V, 0.25)
    thresholds[1] = np.nan
    net.set_fitted(existence_thresholds=thresholds, existence_threshold_unseen=math.nan)
    assert net.existence_thresholds.tolist() == [0.25, 0.5, *[0.25] * 7]
    assert net.existence_threshold_unseen == 0
