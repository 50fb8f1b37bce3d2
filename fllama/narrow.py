"""Vectors in fewer bits than they have, with error feedback: what --average_dtype sends."""

from typing import NamedTuple

import torch

CODE_BLOCK = 1024  # numbers that share a scale in int8; shorter vectors are sent as they are
CODE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / CODE_BLOCK}  # per number that a client sends


class Encoded(NamedTuple):
    """The vector of one sender, as it travels."""

    sender: int  # number of the client, or of the machine
    weight: float
    codes: torch.Tensor  # (P,), float32, bfloat16 or int8
    scales: torch.Tensor | None = None  # of int8: float32, one per CODE_BLOCK numbers, in host memory

    def num_bytes(self):
        scales = 0 if self.scales is None else 4 * self.scales.numel()
        return self.codes.numel() * self.codes.element_size() + scales


def encode(vector, dtype, residuals, name):
    """Return (codes, scales) of a vector (P,) as `dtype`; scales are None except for int8.

    What rounding loses is kept in residuals[name], and added to what is sent by this name next time: error feedback,
    Seide et al. 2014 (Interspeech), Karimireddy et al. 2019 (arXiv:1901.09847).
    """
    vector = vector.reshape(-1).float()
    if dtype == "float32":
        return vector, None
    if name in residuals:
        vector = vector + residuals[name].to(vector.device)
    else:
        vector = vector.clone()  # what follows works in place
    if dtype == "bfloat16":
        codes, scales = vector.bfloat16(), None
        rounded = codes.float()
    else:
        blocks = torch.nn.functional.pad(vector, (0, -len(vector) % CODE_BLOCK)).view(-1, CODE_BLOCK)
        scales = torch.maximum(blocks.amax(dim=1), -blocks.amin(dim=1)).clamp_min_(1e-30) / 127
        whole = (blocks / scales[:, None]).round_()
        codes = whole.to(torch.int8).view(-1)[: len(vector)]
        rounded = whole.mul_(scales[:, None]).view(-1)[: len(vector)]
        scales = scales.cpu()
    residuals[name] = vector.sub_(rounded).cpu()
    return codes, scales


def scales_of_stretch(scales, first, length, device):
    """Return the scale (C,) of each int8 number of a stretch that begins at coordinate `first` of the whole vector."""
    block, skipped = divmod(first, CODE_BLOCK)
    end = block + (skipped + length) // CODE_BLOCK + 1
    return scales[block:end].to(device).repeat_interleave(CODE_BLOCK)[skipped : skipped + length]


def decode(codes, scales, first):
    """Return the float32 numbers of int8 codes (C,) that begin at coordinate `first` of the whole vector."""
    return codes.float() * scales_of_stretch(scales, first, len(codes), codes.device)
