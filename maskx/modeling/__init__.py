"""Networks and losses of the five systems in plain PyTorch; both hosts drive these modules."""
