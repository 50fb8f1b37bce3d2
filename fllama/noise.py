"""Randomness for privacy: from the operating system, never from --seed, and stored nowhere."""

import os

import numpy as np
import torch


def secret_generator(device="cpu"):
    """Return a generator whose seed nobody knows, for one turn or one round.

    On the CPU it is NumPy's, with 128 bits of the operating system's: torch's keeps 32 bits of a seed, which can be
    tried out. On a GPU it is torch's, with 64 bits.
    """
    if torch.device(device).type == "cpu":
        return np.random.default_rng()
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))
    return generator


def gaussian(like, generator):
    """Return noise of mean 0 and standard deviation 1, of the shape and device of a float32 tensor."""
    if isinstance(generator, np.random.Generator):
        return torch.from_numpy(generator.standard_normal(tuple(like.shape), dtype=np.float32))
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
