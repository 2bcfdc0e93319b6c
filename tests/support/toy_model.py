"""A model whose training brings a weight to 0, and whose results a test makes up."""

import torch

from maskx.core.sample_models import SampleModel


class OneWeight(SampleModel):
    def __init__(self, length=1):
        super().__init__(8)
        self.weight = torch.nn.Parameter(torch.ones(length))

    def forward(self, samples):
        return {"loss_x": self.weight.sum() ** 2} if self.training else self.results(samples)
