"""The counter-based generator: published values, distributions, and independence."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from softmod import counter
from softmod.counter import MASK, Counter
from softmod.seeding import counter_key

PUBLISHED = [  # counter, key and output of philox4x32-10 in the known answers of Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(count: int, numbers: int = 1, key: tuple[int, int] = (1, 2)) -> Tensor:
    return Counter(key, "cpu").words(torch.arange(numbers), count)


@pytest.mark.parametrize(("at", "key", "expected"), PUBLISHED)
def test_published_values(at: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]):
    even, odd = (torch.tensor(at[first::2])[:, None, None] for first in (0, 1))
    assert Counter(key, "cpu").blocks(even, odd).flatten().tolist() == list(expected)


def test_a_words_address_is_all_that_determines_it():
    many = words(1000, 50)
    assert torch.equal(words(37, 8), many[:8, :37])
    one = Counter((1, 2), "cpu").words(torch.tensor([41]), 1000)
    assert torch.equal(one[0], many[41])
    assert len(many.unique()) > 0.999 * many.numel()
    assert ((many >= 0) & (many <= MASK)).all()


def test_keys_differ_by_seed():
    keys = {counter_key(seed) for seed in range(100)}
    assert len(keys) == 100
    first, second = (words(1000, key=counter_key(seed)) for seed in (0, 1))
    assert (first == second).sum() == 0


def test_every_bit_is_as_often_one_as_zero():
    bits = (words(200_000)[0, :, None] >> torch.arange(32)) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 5 * 0.5 / math.sqrt(200_000)).all()


@pytest.mark.parametrize("below", [1, 2, 3, 10, 1000])
def test_integers_are_uniform(below: int):
    drawn = counter.integers(words(100_000)[0], torch.tensor(below))
    counts = torch.bincount(drawn, minlength=below)
    assert len(counts) == below
    expected = 100_000 / below
    chi_squared = ((counts - expected).square() / expected).sum().item()
    assert chi_squared <= below - 1 + 5 * math.sqrt(2 * below)


def test_the_largest_integers():
    extremes = torch.tensor([0, MASK])
    assert counter.integers(extremes, torch.tensor(2**31)).tolist() == [0, 2**31 - 1]
    assert counter.integers(extremes, torch.tensor(7)).tolist() == [0, 6]


def test_normals_have_the_moments_and_tails_of_a_normal_distribution():
    count = 4_000_000
    drawn = counter.normals(words(count)[0], counter.normal_table("cpu"))
    assert drawn.dtype is torch.float32
    values = drawn.double()
    error = 1 / math.sqrt(count)
    assert abs(values.mean()) < 5 * error
    assert abs(values.square().mean() - 1) < 5 * math.sqrt(2) * error
    assert abs(values.pow(3).mean()) < 5 * math.sqrt(15) * error
    assert abs(values.pow(4).mean() - 3) < 5 * math.sqrt(96) * error
    for bound in (1.0, 2.0, 3.0, 4.0):
        tail = math.erfc(bound / math.sqrt(2))
        seen = (values.abs() > bound).double().mean()
        assert abs(seen - tail) < 5 * math.sqrt(tail / count)
    assert 4.5 < values.abs().max() < 6.1


def test_successive_normals_are_independent():
    drawn = counter.normals(words(100_000, 3), counter.normal_table("cpu")).double().numpy()
    apart = [np.corrcoef(drawn[0][:-lag], drawn[0][lag:])[0, 1] for lag in (1, 2, 3, 4, 7, 64)]
    between = np.corrcoef(drawn)[np.triu_indices(3, 1)]
    squares = np.corrcoef(drawn**2)[np.triu_indices(3, 1)]
    assert np.abs([*apart, *between, *squares]).max() < 5 / math.sqrt(100_000)


def test_gumbels_have_the_moments_of_a_gumbel_distribution():
    values = counter.gumbels(words(1_000_000)[0], counter.gumbel_table("cpu")).double()
    assert abs(values.mean() - np.euler_gamma) < 0.01
    assert abs(values.var() - math.pi**2 / 6) < 0.02


def test_seen_failing_with_a_round_less(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(counter, "ROUNDS", 9)
    with pytest.raises(AssertionError):
        test_published_values(*PUBLISHED[0])


COMPILED = """
import sys
import torch
from softmod.counter import *
device = sys.argv[1]
generator, below = Counter((5, 6), device), torch.tensor(77777, device=device)
normal, gumbel = normal_table(device), gumbel_table(device)
def draw(numbers):
    words = generator.words(numbers, 3001)
    return words, integers(words, below), normals(words, normal), gumbels(words, gumbel)
numbers = torch.tensor([0, 7, 2**32 - 1], device=device)
compiled = torch.compile(draw, fullgraph=True)
assert all(map(torch.equal, draw(numbers), compiled(numbers)))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_the_same_bits_when_compiled(device: str):
    """In a separate process, since the shape checks of the tests cannot be compiled."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, device], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.cuda
def test_the_same_bits_on_a_gpu():
    numbers = torch.tensor([0, 1, 12345, 2**32 - 1])
    tables = counter.normal_table, counter.gumbel_table
    drawn = []
    for device in ("cpu", "cuda"):
        made = Counter(counter_key(3), device).words(numbers.to(device), 40_000)
        below = torch.tensor(999_983, device=device)
        normal, gumbel = (table(device) for table in tables)
        own = [made, counter.integers(made, below)]
        own += [counter.normals(made, normal), counter.gumbels(made, gumbel)]
        drawn.append([tensor.cpu() for tensor in own])
    assert all(torch.equal(here, there) for here, there in zip(*drawn, strict=True))
