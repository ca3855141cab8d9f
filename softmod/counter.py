"""A counter-based random generator in tensor arithmetic: equal bits on every device.

A draw is a function of a key and a counter, so it needs no generator state, and a CUDA graph can
draw. Only integer operations, table lookups and one addition are used, since the logarithms and
cosines of two devices differ in their last bits.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
MASK = 0xFFFFFFFF
ENTRIES = 2**16  # of a table of quantiles


class Counter:
    """Philox 4x32-10 (Salmon et al. 2011) on int64 tensors that hold 32-bit words.

    Args:
        key: two 32-bit words; streams of different keys are independent.
        device: the device of all draws.
    """

    def __init__(self, key: tuple[int, int], device: torch.device | str) -> None:
        keys = []
        for turn in range(ROUNDS):
            words = zip(key, WEYL, strict=True)
            keys.append([(word + turn * step) & MASK for word, step in words])
        self._keys = torch.tensor(keys, device=device)[:, :, None, None]
        self._multipliers = torch.tensor(MULTIPLIERS, device=device)[:, None, None]

    def words(self, numbers: Int[Tensor, " number"], count: int) -> Int[Tensor, "number count"]:
        """Return `count` random 32-bit words for each of some numbers below 2^32.

        A number's words depend neither on the other numbers nor on `count`.
        """
        blocks = torch.arange((count + 3) // 4, device=numbers.device)[None]
        even = torch.stack([blocks, torch.zeros_like(blocks)])
        odd = torch.stack([numbers[:, None], torch.zeros_like(numbers)[:, None]])
        four = self.blocks(even, odd)  # (word, number, block)
        return four.permute(1, 2, 0).flatten(1)[:, :count]

    def blocks(
        self, even: Int[Tensor, "2 #number #block"], odd: Int[Tensor, "2 #number #block"]
    ) -> Int[Tensor, "4 number block"]:
        """Return the four words of each block.

        Args:
            even: words 0 and 2 of the counter.
            odd: words 1 and 3.
        """
        for key in self._keys:
            product = (even * self._multipliers).flip(0)  # 64 bits; their sign has no meaning
            even = ((product >> 32) ^ odd ^ key) & MASK
            odd = product  # the upper half is masked with the next round's even words
        return torch.stack([even, odd & MASK], 1).flatten(0, 1)


def integers(words: Int[Tensor, "*shape"], below: Int[Tensor, ""]) -> Int[Tensor, "*shape"]:
    """Return integers in [0, below) from random words; `below` is at most 2^31.

    Probabilities differ by less than `below` / 2^32 of their value.
    """
    return (words * below) >> 32


def normals(
    words: Int[Tensor, "*shape"], table: Float[Tensor, " entry"]
) -> Float[Tensor, "*shape"]:
    """Return standard normal numbers from random words and `normal_table`.

    A number is the sum of two quantiles, so it is within 6.1, and has 2^31 different values.
    """
    return table[words >> 16] + table[words & (ENTRIES - 1)]


def gumbels(
    words: Int[Tensor, "*shape"], table: Float[Tensor, " entry"]
) -> Float[Tensor, "*shape"]:
    """Return standard Gumbel numbers from random words and `gumbel_table`."""
    return table[words >> 16]


def normal_table(device: torch.device | str) -> Float[Tensor, " entry"]:
    """Return the quantiles of a normal distribution whose variance is exactly one half."""
    quantiles = torch.special.ndtri(_midpoints())
    return (quantiles / (2 * quantiles.square().mean()).sqrt()).float().to(device)


def gumbel_table(device: torch.device | str) -> Float[Tensor, " entry"]:
    """Return the quantiles of the standard Gumbel distribution."""
    return (-(-_midpoints().log()).log()).float().to(device)


def _midpoints() -> Float[Tensor, " entry"]:
    """Return the middles of equal parts of [0, 1], in double precision on the CPU."""
    return (torch.arange(ENTRIES, dtype=torch.float64, device="cpu") + 0.5) / ENTRIES
