import pytest
import torch


@pytest.fixture
def in_float64():
    """Take a model of each host to float64: what is left of a difference is not of the rounding."""

    def convert(of_detectron2, of_torchvision):
        first, second = of_detectron2.double(), of_torchvision.double()
        for name in ("pixel_mean", "pixel_std"):
            assert torch.equal(getattr(first, name), getattr(second, name))
        return first, second

    return convert


@pytest.fixture
def assert_same_step():
    """Check that two models make the same losses and gradients."""

    def check(first, second, first_losses, second_losses, *, expected, trained):
        """``expected``: by loss whether it is above 0. ``trained``: of the name of a parameter."""
        for losses in (first_losses, second_losses):
            assert set(losses) == set(expected)
            sum(losses.values()).backward()
        for name, loss in first_losses.items():
            assert loss.item() == pytest.approx(second_losses[name].item(), rel=1e-6), name
            assert (loss.item() > 0) == expected[name], name
        others = dict(second.named_parameters())
        assert set(dict(first.named_parameters())) == set(others)
        for name, parameter in first.named_parameters():
            other = others[name]
            assert parameter.requires_grad == other.requires_grad == trained(name), name
            assert (parameter.grad is None) == (other.grad is None) == (not trained(name)), name
            if trained(name):
                difference = (parameter.grad - other.grad).abs().max()
                assert difference <= 1e-6 * other.grad.abs().max() + 1e-12, name

    return check
