"""A policy's operations repeated in numpy give PyTorch's actions, for every network."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.utils._python_dispatch import TorchDispatchMode

from softmod.capture import numpy_graph as acting
from softmod.capture.numpy_graph import NumpyFunction, Recorded, record
from softmod.capture.recorder import NotRepeatableError
from softmod.networks.gaussian import Actor, actions
from softmod.networks.network import Network
from softmod.networks.soft_modular import SoftModular
from softmod.system.libraries import allow_onednn, product_library
from tests.networks.kinds import FORMS
from tests.networks.kinds import SMALL as SIZES
from tests.settings import network, published

ROOT = Path(__file__).parents[2]
TASKS, OBS, ACTION = 4, 6, 3


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    """Use the default library for products; training in the same process may have chosen oneDNN."""
    before = product_library()
    allow_onednn(False)
    yield
    allow_onednn(before == "oneDNN")


def actor(form: Callable[..., Network], recipe: bool = False, **options: Any) -> Actor:
    """Make a policy; as in the `recipe`, with normalized observations and a tanh log std."""
    torch.manual_seed(0)
    inner = form(OBS, 2 * ACTION, TASKS, **options)
    net = Actor(inner, "tanh", normalize_obs=True) if recipe else published(inner)
    net.eval().requires_grad_(False)
    for parameter in net.parameters():  # away from the small start values, so that an error shows
        parameter.add_(torch.randn_like(parameter) * 0.3)
    if net.normalizer is not None:
        net.normalizer.set(torch.randn(OBS), torch.rand(OBS))
    return net


SMALL = network(
    "soft_modular",
    num_layers=3,
    num_modules=3,
    module_width=8,
    embedding_width=12,
    gating_width=8,
)
ACTORS = {
    "soft_modular": lambda: actor(SoftModular, **SMALL),
    "before_sum": lambda: actor(
        SoftModular, **(SMALL | {"relu": "before_sum", "head": "sum", "routing_reads": "last"})
    ),
    "recipe": lambda: actor(SoftModular, recipe=True, **SMALL),
    "before_sum_normed": lambda: actor(
        SoftModular, **(SMALL | {"relu": "before_sum", "head": "sum", "norm": "layer"})
    ),
} | {
    name: partial(actor, form, **SIZES[name])
    for name, form in FORMS.items()
    if name != "soft_modular"
}


class Counter(TorchDispatchMode):
    """A counter of PyTorch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def inputs(tasks: int, copies: int, *widths: int) -> list[Tensor]:
    return [torch.zeros(tasks, copies, width) for width in widths]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", list(ACTORS))
@pytest.mark.parametrize(
    ("tasks", "copies"), [([1], 1), ([0, 2, 3], 1), ([3, 1], 5), ([0, 1, 2, 3], 8)]
)
def test_actions_are_those_of_pytorch_and_cost_it_nothing(
    name: str, tasks: list[int], copies: int, wide: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(acting, "wide_products", lambda: wide)
    net, index = ACTORS[name](), torch.tensor(tasks)
    act = Recorded(
        lambda obs, noise: actions(net, obs, index, noise), inputs(len(tasks), copies, OBS, ACTION)
    )
    draws = np.random.default_rng(1)
    for _ in range(3):
        for array in act.inputs:
            array[...] = draws.standard_normal(array.shape)
        with Counter() as counter:
            ours = act().copy()
        assert counter.count == 0
        assert ours.shape == (len(tasks), copies, ACTION)
        np.testing.assert_allclose(ours, act.eager(), rtol=1e-5, atol=1e-6)


def test_new_weights_count_without_recording_anew():
    net = ACTORS["soft_modular"]()
    act = Recorded(lambda obs: actions(net, obs), inputs(TASKS, 1, OBS))
    act.inputs[0][...] = 1.0
    before = act().copy()
    for parameter in net.parameters():
        parameter.mul_(1.5)
    assert np.abs(act() - before).max() > 1e-3
    np.testing.assert_allclose(act(), act.eager(), rtol=1e-5, atol=1e-6)


class Unusual(Network):
    """Operations without a numpy kernel: GELU, a reduction with two results, in-place writes."""

    def __init__(self) -> None:
        super().__init__(OBS, 2 * ACTION, TASKS, 1)
        self.norm, self.linear = nn.LayerNorm(OBS), nn.Linear(OBS, 2 * ACTION)

    def forward(
        self, x: Float[Tensor, "task batch in_dim"], tasks: Any = None
    ) -> Float[Tensor, "stack task batch o"]:
        hidden = nn.functional.gelu(self.norm(x))
        hidden = hidden + hidden.max(-1, keepdim=True).values
        hidden[..., 0] = hidden[..., 1] * 2
        return self.linear(hidden.sigmoid_()).unsqueeze(0)


@pytest.mark.parametrize("axes", [(6,), (5, 6)])
@pytest.mark.parametrize("affine", [False, True])
def test_a_layer_norm_is_that_of_pytorch(axes: tuple[int, ...], affine: bool):
    """Over one axis and several, on transposed memory, and far from zero."""
    weights = (
        torch.randn(2, *axes, generator=torch.Generator().manual_seed(0)).unbind()
        if affine
        else (None, None)
    )
    act = Recorded(
        lambda x: layer_norm(x.transpose(1, 2) + 3.0, axes, *weights), [torch.zeros(2, 6, 5)]
    )
    act.inputs[0][...] = np.random.default_rng(0).standard_normal(act.inputs[0].shape)
    with Counter() as counter:
        ours = act().copy()
    assert counter.count == 0
    np.testing.assert_allclose(ours, act.eager(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [1.0, 2.0, float("inf")])
def test_lengths_are_those_of_pytorch(order: float):
    act = Recorded(lambda x: torch.nn.functional.normalize(x, order, -1), [torch.zeros(2, 6, 5)])
    # The first vector of each batch stays zero.
    act.inputs[0][:, 1:] = np.random.default_rng(0).standard_normal((2, 5, 5))
    with Counter() as counter:
        ours = act().copy()
    assert counter.count == 0
    np.testing.assert_allclose(ours, act.eager(), rtol=1e-5, atol=1e-6)


def test_what_numpy_does_not_know_is_left_to_pytorch():
    net = published(Unusual()).requires_grad_(False)
    act = record(lambda obs: actions(net, obs), inputs(TASKS, 2, OBS))
    assert isinstance(act, Recorded)
    act.inputs[0][...] = np.random.default_rng(0).standard_normal(act.inputs[0].shape)
    np.testing.assert_allclose(act(), act.eager(), rtol=1e-5, atol=1e-6)


def test_a_function_that_looks_at_values_is_called_instead():
    def looks(x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x * 3

    with pytest.raises(NotRepeatableError, match="reads a value"):
        Recorded(looks, [torch.ones(2)])
    act = record(looks, [torch.ones(2)])
    assert type(act) is NumpyFunction
    act.inputs[0][...] = -1.0
    assert act().tolist() == [-3.0, -3.0]


def test_a_function_that_leaves_pytorch_is_called_instead():
    def leaves(x: Tensor) -> Tensor:
        return x + torch.from_numpy(np.sin(x.numpy()))

    act = record(leaves, [torch.ones(2)])
    assert type(act) is NumpyFunction
    act.inputs[0][...] = 0.5
    np.testing.assert_allclose(act(), 0.5 + np.sin(np.float32(0.5)), rtol=1e-6)


def test_few_rows_do_not_depend_on_their_company():
    net = ACTORS["soft_modular"]()
    together = Recorded(lambda obs: actions(net, obs), inputs(TASKS, 1, OBS))
    together.inputs[0][...] = np.random.default_rng(0).standard_normal(together.inputs[0].shape)
    for task in range(TASKS):
        index = torch.tensor([task, 0])
        pair = Recorded(lambda obs, index=index: actions(net, obs, index), inputs(2, 1, OBS))
        pair.inputs[0][0] = together.inputs[0][task]
        assert np.array_equal(pair()[0], together()[task])


def product(rows: int, wide: bool, monkeypatch: pytest.MonkeyPatch) -> acting.Array:
    """Multiply the first rows of a fixed input by a fixed matrix `[500, 300]`."""
    monkeypatch.setattr(acting, "wide_products", lambda: wide)
    draws = np.random.default_rng(0)
    a, b = (
        draws.standard_normal((1, 12, 500), np.float32),
        draws.standard_normal((1, 500, 300), np.float32),
    )
    out = np.empty((1, rows, 300), np.float32)
    for call in acting._product(out, a[:, :rows], b):
        call()
    np.testing.assert_allclose(out, a[:, :rows] @ b, rtol=1e-3, atol=1e-3)
    return out


@pytest.mark.parametrize("wide", [False, True])
def test_a_products_rows_do_not_depend_on_their_company(
    wide: bool, monkeypatch: pytest.MonkeyPatch
):
    if wide and not acting.wide_products():  # not used here, so only its results are checked
        product(1, wide, monkeypatch)
        product(12, wide, monkeypatch)
        return
    five = product(5, wide, monkeypatch)
    for rows in (1, 2, 4) + (7, 9, 12) * wide:
        company = product(rows, wide, monkeypatch)
        least = min(rows, 5)
        assert np.array_equal(company[:, :least], five[:, :least]), rows


RECORDS = """
import sys
import softmod.workers.preload
import torch
from softmod.capture.numpy_graph import Recorded, record
assert isinstance(record(lambda obs: (obs * 2.0).clamp(-1.0, 1.0), [torch.zeros(3)]), Recorded)
print([name for name in ("torch._dynamo", "sympy", "lightning") if name in sys.modules])
"""


def test_a_worker_that_records_does_not_import_the_compiler() -> None:
    """It would take 0.8 s and 90 MB in every worker process."""
    told = subprocess.run(
        [sys.executable, "-c", RECORDS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout == "[]\n"
