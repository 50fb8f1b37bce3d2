"""Randomness for privacy: from the operating system, never from --seed, and stored nowhere."""

import os

import torch


def secret_generator(device="cpu"):
    """Return a generator whose seed nobody knows, 64 bits of the operating system's; for one turn or one round."""
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))
    return generator


def gaussian(like, generator):
    """Return noise of mean 0 and standard deviation 1, of the shape, dtype and device of a tensor."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
