"""Seeds that are the same on every machine."""

import numpy as np


def step_seed(*numbers: int) -> int:
    """Mix numbers into a seed of 32 bits, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
