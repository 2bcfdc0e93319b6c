import math

import pytest
import torch
import torch.nn.functional as F

from maskx.systems.larvseg.network import CosineClassifier, check_class_indices


def make_classifier(logit_form="temperature", *, num_classes=7, channels=5, **options):
    torch.manual_seed(0)
    classifier = CosineClassifier(channels, num_classes, logit_form=logit_form, **options).double()
    if logit_form == "layernorm":
        classifier.scale.data.fill_(1.7)
        classifier.shift.data.fill_(-0.4)
    return classifier


def slow_logits(classifier, features, class_indices):
    """The logits of one token after the other, from the equations."""
    classes = [
        classifier.class_embeddings[index] @ classifier.class_projection for index in class_indices
    ]
    logits = features.new_zeros(len(features), len(classes), *features.shape[2:])
    for n, y, x in torch.ones_like(features[:, 0]).nonzero().tolist():
        token = features[n, :, y, x] @ classifier.feature_projection
        cosines = torch.stack([F.cosine_similarity(token, c, dim=0) for c in classes])
        if classifier.logit_form == "temperature":
            values = cosines / classifier.temperature()
        else:
            values = F.layer_norm(cosines, cosines.shape, eps=1e-5)
            values = classifier.scale * values + classifier.shift
        logits[n, :, y, x] = values
    return logits


@pytest.mark.parametrize("logit_form", ["temperature", "layernorm"])
@pytest.mark.parametrize("class_indices", [[0, 1, 2, 3, 4, 5, 6], [5, 2, 3]])
def test_logits_are_those_of_the_equations(logit_form, class_indices):
    classifier = make_classifier(logit_form)
    features = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    vectors = classifier.class_vectors(torch.tensor(class_indices))
    factors = classifier.factors(classifier.tokens(features), vectors)
    expected = slow_logits(classifier, features, class_indices)
    torch.testing.assert_close(factors.dense(), expected)


@pytest.mark.parametrize("logit_form", ["temperature", "layernorm"])
def test_weighted_logits_are_pooled_before_the_product_with_the_classes(logit_form):
    classifier = make_classifier(logit_form)
    features = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    factors = classifier.factors(classifier.tokens(features), classifier.class_vectors())
    weights = torch.rand(2, 4, 6, dtype=torch.float64)
    found = factors.pooled_logits(factors.pool(weights), weights.sum(dim=-1))
    expected = torch.einsum("nst,nlt->nsl", weights, factors.dense().flatten(2))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("logit_form", ["temperature", "layernorm"])
def test_gradients_of_the_factors_are_those_of_the_slow_form(logit_form):
    classifier = make_classifier(logit_form)
    features = torch.randn(1, 5, 2, 2, dtype=torch.float64)
    target = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    gradients = []
    for logits in (
        classifier.factors(
            classifier.tokens(features), classifier.class_vectors(torch.tensor([6, 0, 3]))
        ).dense(),
        slow_logits(classifier, features, [6, 0, 3]),
    ):
        classifier.zero_grad()
        (logits * target).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in classifier.parameters()])
    torch.testing.assert_close(*gradients)
    # Classes that are not scored have no gradient.
    grad = classifier.class_embeddings.grad
    assert not grad[[1, 2, 4, 5]].any()
    assert grad[[0, 3, 6]].any(dim=1).all()


def test_temperature_starts_where_told_and_stays_within_its_bounds():
    classifier = make_classifier(temperature=0.05)
    assert classifier.temperature().item() == pytest.approx(0.05)
    for raw, bound in ((-50.0, 0.01), (50.0, 1.0)):
        classifier.raw_temperature.data.fill_(raw)
        assert classifier.temperature().item() == pytest.approx(bound)


def test_parameters_are_initialised_as_in_the_reference():
    torch.manual_seed(0)
    classifier = CosineClassifier(256, 400)
    for projection in (classifier.feature_projection, classifier.class_projection):
        assert projection.shape == (256, 256)
        assert projection.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert classifier.class_embeddings.std().item() == pytest.approx(0.02, rel=0.02)
    assert CosineClassifier(8, 3, hidden_channels=4).tokens(torch.randn(1, 8, 2, 2)).shape[1] == 4


def test_classes_that_training_showed_are_in_the_checkpoint():
    classifier = make_classifier()
    assert classifier.trained.all()
    classifier.set_trained([4, 1, 4])
    other = make_classifier()
    other.load_state_dict(classifier.state_dict())
    assert other.trained.nonzero().flatten().tolist() == [1, 4]


def test_one_class_has_a_logit_of_the_shift_under_layernorm():
    classifier = make_classifier("layernorm", num_classes=1)
    features = torch.randn(1, 5, 2, 2, dtype=torch.float64)
    logits = classifier.factors(classifier.tokens(features), classifier.class_vectors()).dense()
    torch.testing.assert_close(logits, torch.full_like(logits, -0.4))
    assert math.isfinite(logits.sum().item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_form": "softmax"}, "logit_form of CosineClassifier must be one of 'temperature'"),
        ({"temperature": 2.0}, r"temperature must lie between 0.01 and 1.0, got 2.0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_classifier(**options)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "class_indices is empty"),
        ([0, 7, -1], r"class_indices has \[-1, 7\]. Allowed: 0 to 6"),
        ([3, 1, 3, 1, 2], r"class_indices has \[1, 3\] more than once.*must be merged"),
    ],
)
def test_class_indices_that_cannot_be_are_refused(indices, message):
    with pytest.raises(ValueError, match=message):
        check_class_indices(indices, 7)


def test_class_indices_keep_their_order():
    assert check_class_indices((5, 0, 2), 6).tolist() == [5, 0, 2]
