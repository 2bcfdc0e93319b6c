"""Content of a checkpoint, and whether it was read as it was written."""

import torch

CONTENT = {
    "model": {"weight": torch.linspace(0, 1, 5000), "count": torch.tensor([3])},
    "iteration": 7,
    "run": {"name": "toy"},
}


def same(found):
    weights = (torch.equal(found["model"][k], v) for k, v in CONTENT["model"].items())
    return found["iteration"] == 7 and found["run"] == CONTENT["run"] and all(weights)
