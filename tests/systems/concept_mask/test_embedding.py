import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskx.core.backbones import SmallResNet
from maskx.systems.concept_mask.network import ConceptEmbedding, embedding_loss, soft_topics


class Pixels(nn.Module):
    """A backbone that returns the images as they are."""

    def forward(self, images):
        return {"pixels": images}


def small_embedding(**kwargs):
    torch.manual_seed(0)
    backbone = SmallResNet(widths=(4, 6, 8, 10), output_stride=16)
    embedding = ConceptEmbedding(
        backbone, in_feature="layer4", in_channels=10, dim=5, hidden_channels=(7, 6), **kwargs
    )
    # Statistics and weights that are not those of the start.
    for module in embedding.layers:
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return embedding.eval()


def pixel_embedding(**kwargs):
    torch.manual_seed(0)
    return ConceptEmbedding(
        Pixels(), in_feature="pixels", in_channels=3, dim=4, hidden_channels=(6, 5), **kwargs
    )


def slow_embedding_map(embedding, features):
    """The layers as 1x1 convolutions with spatial batch norm, from their weights."""
    x = features
    for number in (1, 2, 3):
        fc = getattr(embedding.layers, f"fc{number}")
        norm = getattr(embedding.layers, f"norm{number}")
        conv = nn.Conv2d(fc.in_features, fc.out_features, 1, bias=False)
        spatial = nn.BatchNorm2d(fc.out_features).train(embedding.training)
        conv.weight.data = fc.weight.data[:, :, None, None]
        spatial.load_state_dict(norm.state_dict())
        x = spatial(conv(x))
        if hasattr(embedding.layers, f"relu{number}"):
            x = x.relu()
    return x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("final_relu", [False, True])
def test_the_map_is_that_of_convolutions_with_spatial_batch_norm(training, final_relu):
    embedding = small_embedding(final_relu=final_relu)
    images = torch.randn(3, 3, 64, 48)
    features = embedding.backbone(images)["layer4"]
    embedding.layers.train(training)
    embedding.training = training
    expected = slow_embedding_map(embedding, features)
    found = embedding.embedding_map(images)
    assert found.shape == (3, 5, 4, 3)
    torch.testing.assert_close(found, expected)


def test_map_and_vector_are_equal_where_the_feature_map_has_one_position():
    embedding = small_embedding()
    images = torch.randn(4, 3, 16, 16)
    vectors, maps = embedding(images), embedding.embedding_map(images)
    assert maps.shape == (4, 5, 1, 1)
    assert torch.equal(maps[:, :, 0, 0], vectors)
    embedding.layers.train()
    assert torch.equal(embedding.embedding_map(images)[:, :, 0, 0], embedding(images))


def test_the_vector_is_the_embedding_of_the_mean_feature():
    embedding = small_embedding()
    images = torch.randn(2, 3, 64, 48)
    pooled = embedding.backbone(images)["layer4"].mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(embedding(images), slow_embedding_map(embedding, pooled)[..., 0, 0])


@pytest.mark.parametrize("final_relu", [False, True])
def test_only_a_final_relu_makes_every_embedding_non_negative(final_relu):
    embedding = pixel_embedding(final_relu=final_relu)
    found = embedding(torch.randn(16, 3, 5, 5))
    assert (found < 0).any().item() != final_relu
    assert (found > 0).any()


def test_the_loss_reaches_every_parameter():
    embedding = small_embedding().train()
    topics = soft_topics([[0], [1, 2]], torch.randn(4, 5), torch.ones(4))
    embedding_loss(embedding(torch.randn(2, 3, 64, 64)), topics).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in embedding.parameters())


@pytest.mark.parametrize("final_relu", [False, True])
def test_bfloat16_autocast_is_finite(final_relu):
    embedding = pixel_embedding(final_relu=final_relu)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = embedding(torch.randn(4, 3, 8, 8))
        maps = embedding.embedding_map(torch.randn(4, 3, 8, 8))
        loss = embedding_loss(vectors, torch.randn(4, 4))
    assert vectors.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert maps.isfinite().all()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in embedding.parameters())


def test_a_batch_of_one_image_cannot_be_trained_on():
    embedding = pixel_embedding()
    with pytest.raises(ValueError, match=r"batch of one image.*at least 2 images"):
        embedding(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"batch of one image.*at least 2 images"):
        embedding.embedding_map(torch.randn(1, 3, 1, 1))
    assert embedding.embedding_map(torch.randn(1, 3, 1, 2)).shape == (1, 4, 1, 2)
    assert embedding.eval()(torch.randn(1, 3, 8, 8)).shape == (1, 4)


def test_an_image_smaller_than_the_stride_is_named():
    with pytest.raises(ValueError, match=r"40 x 12 pixels.*stride 16 of the feature 'layer4'"):
        small_embedding().embedding_map(torch.randn(2, 3, 40, 12))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_feature": "layer9"}, "layer1, layer2, layer3, layer4; got 'layer9'"),
        ({"in_channels": 3}, "channels of 'layer4', 10; got 3"),
        ({"dim": 0}, r"at least 1 wide, got \(10, 7, 0\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(kwargs, message):
    arguments = {"in_feature": "layer4", "in_channels": 10, "dim": 5, "hidden_channels": (7,)}
    with pytest.raises(ValueError, match=message):
        ConceptEmbedding(SmallResNet(widths=(4, 6, 8, 10)), **arguments | kwargs)


def test_a_feature_that_a_backbone_without_shapes_lacks_is_named():
    embedding = ConceptEmbedding(Pixels(), in_feature="res5", in_channels=3, dim=4)
    with pytest.raises(ValueError, match=r"no feature 'res5'\. Allowed: pixels"):
        embedding(torch.randn(2, 3, 8, 8))


def test_soft_topics_are_those_computed_by_hand():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    idf = torch.tensor([0.5, 2.0, 1.0])
    topics = soft_topics([[0, 2], [], [1, 1]], vectors, idf)
    assert topics.tolist() == [[3.5, 4.0], [0.0, 0.0], [0.0, 4.0]]
    assert soft_topics([], vectors, idf).shape == (0, 2)


@given(st.lists(st.lists(st.integers(0, 6)), max_size=5))
@settings(max_examples=50, deadline=None)
def test_soft_topics_equal_a_loop_over_distinct_tags(image_labels):
    torch.manual_seed(0)
    vectors, idf = torch.randn(7, 3).double(), torch.rand(7).double()
    found = soft_topics(image_labels, vectors, idf)
    expected = torch.zeros(len(image_labels), 3).double()
    for image, labels in enumerate(image_labels):
        for label in set(labels):
            expected[image] += idf[label] * vectors[label]
    torch.testing.assert_close(found, expected)


def test_a_tag_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"image 1 .*\[4\].*4 classes are 0 to 3"):
        soft_topics([[0], [2, 4]], torch.ones(4, 2), torch.ones(4))


def test_the_loss_is_one_minus_the_mean_cosine_of_the_images_with_tags():
    embeddings = torch.randn(3, 4).double()
    topics = torch.randn(3, 4).double()
    topics[1] = 0
    losses = [
        1
        - sum(e * t for e, t in zip(embeddings[n].tolist(), topics[n].tolist(), strict=True))
        / math.sqrt(sum(e * e for e in embeddings[n].tolist()))
        / math.sqrt(sum(t * t for t in topics[n].tolist()))
        for n in (0, 2)
    ]
    assert embedding_loss(embeddings, topics).item() == pytest.approx(sum(losses) / 2)


def test_the_length_of_topic_and_embedding_has_no_part_in_the_loss():
    embeddings, topics = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    loss = embedding_loss(embeddings, topics)
    torch.testing.assert_close(embedding_loss(3 * embeddings, 0.1 * topics), loss)
    assert embedding_loss(topics, 2 * topics).item() == pytest.approx(0, abs=1e-12)
    assert embedding_loss(-topics, topics).item() == pytest.approx(2)


def test_an_image_without_tags_has_no_gradient():
    embeddings = torch.randn(3, 4, requires_grad=True)
    topics = torch.tensor([[1.0, 2, 0, 0], [0, 0, 0, 0], [0, -1, 0, 3]])
    embedding_loss(embeddings, topics).backward()
    assert embeddings.grad.any(dim=1).tolist() == [True, False, True]


def test_without_any_tags_the_loss_is_zero_with_a_graph_through_every_parameter():
    embedding = small_embedding().train()
    loss = embedding_loss(embedding(torch.randn(2, 3, 32, 32)), torch.zeros(2, 5))
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in embedding.parameters())


def test_an_embedding_of_zeros_has_a_finite_gradient():
    embeddings = torch.zeros(2, 4, requires_grad=True)
    embedding_loss(embeddings, torch.randn(2, 4)).backward()
    assert embeddings.grad.isfinite().all()
