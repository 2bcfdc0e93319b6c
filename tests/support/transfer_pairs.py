"""Two images with three labels, on which the networks of TransferNet are tried."""

import torch

IMAGE_SIZE = (32, 48)
PAIR_IMAGES = torch.tensor([0, 1, 1])
PAIR_LABELS = torch.tensor([2, 0, 3])
NO_PAIRS = torch.zeros(0, dtype=torch.int64)


def make_images(num_images=2, size=IMAGE_SIZE):
    return torch.randn(num_images, 3, *size, generator=torch.Generator().manual_seed(1))


def share_of_losses_left(net, *, steps):
    """Train a network on one mask and the labels: its losses at the end over those at first."""
    targets = torch.zeros(3, *IMAGE_SIZE, dtype=torch.int64)
    targets[:, 8:24, 8:24] = 1
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    before = None
    for _ in range(steps):
        outputs = net(make_images(), PAIR_IMAGES, PAIR_LABELS)
        losses = net.losses(outputs, PAIR_IMAGES, PAIR_LABELS, targets)
        before = before or {name: loss.item() for name, loss in losses.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return {name: loss.item() / before[name] for name, loss in losses.items()}
