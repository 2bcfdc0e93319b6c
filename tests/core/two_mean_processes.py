"""One of two processes, which see 1 and 3 images, or 4 of which one's are without supervision."""

import torch
from torch import nn
from two_ranks import mean_gradient

from maskx.core.global_mean import global_mean, means_per_process
from maskx.core.losses import multi_label_loss, pixel_loss
from maskx.systems.concept_mask import losses as concepts
from maskx.systems.concept_mask.network import concept_segmentation_loss, embedding_loss
from maskx.systems.larvseg.network import LarvSeg
from maskx.systems.maskx_rcnn.mask_head import mask_loss
from maskx.systems.maskx_rcnn.weak_losses import box_mask_losses
from maskx.systems.maskx_rcnn.weight_transfer import DetectorWeights, WeightTransfer
from maskx.systems.transfernet import network as transfernet


def targets_of(indices):
    """Labels of 4 images of 6 x 6: those of image 0 are mostly unknown."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (4, 6, 6), generator=generator)
    labels[0, 1:] = 255
    return labels[indices]


def discrimination(logits, labels):
    targets = (labels > 1).float()
    weights = (labels[:, 0, :4] % 3).float()
    return concepts.discrimination_loss(logits, targets, torch.arange(len(labels)), weights)


def matching(logits, labels):
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(4, 3, generator=generator)
    seen = torch.stack([x.float() / 99 for x in (labels, labels + 1, labels.flip(1))], dim=1)
    return concepts.matching_loss(logits, seen, vectors, torch.arange(4).repeat(len(labels), 1))


def of_boxes(logits, labels):
    rois = torch.tensor([[0.0, 0, 6, 6]]).repeat(len(labels), 1)
    boxes = rois + torch.tensor([1.0, 1, -1, -2])
    colours = labels[:, None].repeat(1, 3, 1, 1) % 3 / 3
    return sum(box_mask_losses(logits[:, 0], rois, boxes, colours, dilation=1).values())


# Each loss of (n, 4, 6, 6) logits of n images and their labels.
LOSSES = {
    "pixels": lambda x, labels: pixel_loss(x, labels, ignore=255),
    "image labels": lambda x, labels: multi_label_loss(x.mean((2, 3)), labels[:, 0, :4] == 1),
    "TransferNet, labels": lambda x, labels: transfernet.label_loss(
        x.mean((2, 3)), labels[:, 0, 0].clamp(max=3)
    ),
    "TransferNet, masks": lambda x, labels: transfernet.mask_loss(
        x[:, :2], labels.where(labels == 255, labels % 2)
    ),
    "ConceptMask, embedding": lambda x, labels: embedding_loss(
        x.mean((2, 3)), (labels[:, 1, :4] % 4).float() * (labels[:, 1, :4] < 255)
    ),
    "ConceptMask, boxes": lambda x, labels: concepts.box_loss(x[:, 0], labels % 2),
    "ConceptMask, matching": matching,
    "ConceptMask, discrimination": discrimination,
    "ConceptMask, masks": lambda x, labels: concept_segmentation_loss(x[:, 0], labels % 2),
    "Mask^X": lambda x, labels: mask_loss(x[:, 0], labels % 2),
    "Mask^X, boxes": of_boxes,
}


def compare(rank):
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    for own in ([0], [1, 2, 3]), ([0, 1, 2, 3], []):
        for name, loss in LOSSES.items():
            torch.manual_seed(0)
            layer = nn.Conv2d(3, 4, 1)
            parameters = list(layer.parameters())
            mine = own[rank]
            found = mean_gradient(loss(layer(images[mine]), targets_of(mine)), parameters)
            with means_per_process():
                everything = sorted(own[0] + own[1])
                whole = loss(layer(images[everything]), targets_of(everything))
                expected = mean_gradient(whole, parameters)
                apart = mean_gradient(loss(layer(images[mine]), targets_of(mine)), parameters)
            assert expected.abs().max() > 0, name
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)
            if not own[1]:  # the reference's mean: what one process sees counts half
                torch.testing.assert_close(apart, expected / 2, rtol=1e-5, atol=1e-6, msg=name)


def larvseg_losses(mine, **options):
    torch.manual_seed(0)
    backbone = nn.Conv2d(3, 6, 1)
    network = LarvSeg(backbone, in_feature="", in_channels=6, num_classes=4, **options)
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    labels = [[0], [1, 2], [3], [0, 1]]
    return network, network.losses(
        network.classifier.tokens(backbone(images[mine])),
        label_maps=targets_of(mine),
        image_labels=[labels[i] for i in mine],
        loss_size=(6, 6),
    )


def compare_larvseg(rank):
    mine = ([0], [1, 2, 3])[rank]
    for memory in ("single_image", "none"):
        network, losses = larvseg_losses(mine, memory=memory)
        found = mean_gradient(sum(losses.values()), list(network.parameters()))
        with means_per_process():
            network, losses = larvseg_losses([0, 1, 2, 3], memory=memory)
            expected = mean_gradient(sum(losses.values()), list(network.parameters()))
        assert all(loss > 0 for loss in losses.values())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def take_turns(rank):
    """A process whose batch is of a data set without a supervision makes no step of its loss."""
    weight = torch.ones(1, requires_grad=True)
    for takes_part, expected in ((rank == 0, 1.0), (True, 2.0)):
        total = weight.sum() * (6 if rank == 0 else 0)
        loss = global_mean(total, 3 if rank == 0 else 0, takes_part=takes_part)
        torch.testing.assert_close(mean_gradient(loss, [weight]), torch.tensor([expected]))


def teach(rank):
    """A class that one process taught is a taught one in all of them."""
    detector = DetectorWeights(torch.randn(3, 5, generator=torch.Generator().manual_seed(3)), None)
    torch.manual_seed(4)
    options = {"num_classes": 3, "inputs": "cls", "detector_channels": 5, "mix": 0.05}
    transfer = WeightTransfer(out_channels=2, **options).train()
    transfer(torch.tensor([rank]), detector)
    assert transfer.taught.tolist() == [True, True, False]


def work(rank):
    teach(rank)
    compare(rank)
    compare_larvseg(rank)
    take_turns(rank)
