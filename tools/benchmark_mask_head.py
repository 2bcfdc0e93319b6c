"""Cost of the mask head against the number of classes, and against its trunk as the limit.

All rows are measured in one run, interleaved, so that only their ratios need to be compared.
The K-channel form computes the logits of every class, as Mask R-CNN does, and picks one.

Example:
    python tools/benchmark_mask_head.py --rois 64 --classes 80 3000 21841
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maskx.modeling.mask_head import MaskXHead, mask_loss
from maskx.modeling.weight_transfer import DetectorWeights, WeightTransfer

# Beyond this the logits of every class would need more than most machines have.
_LARGEST_K_CHANNEL_BYTES = 2 * 2**30


def make_step(head: MaskXHead, detector: DetectorWeights, rois: Tensor, form: str) -> Callable:
    """Make a training step of one form of the head; it returns the numbers of the logits."""
    class_indices = torch.arange(len(rois)) * 7919 % len(detector.cls)
    targets = torch.rand(len(rois), head.mask_size, head.mask_size) > 0.5

    def step() -> int:
        if form == "gathered":
            logits = head(rois, class_indices, detector)
            mask_loss(logits, targets).backward()
            return logits.numel()
        features = rois
        for name in ("mask_fcn1", "mask_fcn2", "mask_fcn3", "mask_fcn4", "deconv", "deconv_relu"):
            features = getattr(head, name)(features)
        if form == "trunk":
            features.mean().backward()
            return 0
        every_class = torch.arange(len(detector.cls))
        w_seg = WeightTransfer.forward(head.predictor, every_class, detector)
        logits = F.conv2d(features, w_seg[:, :, None, None])
        chosen = logits[torch.arange(len(rois)), class_indices]
        mask_loss(chosen, targets).backward()
        return logits.numel()

    return step


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rois", type=int, default=64)
    parser.add_argument("--classes", type=int, nargs="+", default=[80, 3000, 21841])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    rois = torch.randn(arguments.rois, 256, 14, 14)
    steps = {}
    for num_classes in arguments.classes:
        detector = DetectorWeights(torch.randn(num_classes, 1024), torch.randn(num_classes, 4096))
        head = MaskXHead(in_channels=256, num_classes=num_classes, detector_channels=1024)
        steps.setdefault(("trunk", "-"), make_step(head, detector, rois, "trunk"))
        steps["gathered", num_classes] = make_step(head, detector, rois, "gathered")
        if 4 * arguments.rois * num_classes * 28**2 <= _LARGEST_K_CHANNEL_BYTES:
            steps["K-channel", num_classes] = make_step(head, detector, rois, "K-channel")

    seconds: dict = {key: [] for key in steps}
    numbers = {}
    for _ in range(arguments.repeats + 1):  # the first round warms up
        for key, step in steps.items():
            started = time.perf_counter()
            numbers[key] = step()
            seconds[key].append(time.perf_counter() - started)
    limit = statistics.median(seconds["trunk", "-"][1:])
    print(f"{'form':10} {'K':>6} {'seconds':>8} {'x trunk':>8} {'logits, MB':>11}")
    for (form, num_classes), times in seconds.items():
        median = statistics.median(times[1:])
        megabytes = 4 * numbers[form, num_classes] / 1e6
        print(f"{form:10} {num_classes:>6} {median:8.3f} {median / limit:8.2f} {megabytes:11.1f}")


if __name__ == "__main__":
    main()
