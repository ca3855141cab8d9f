"""A comparison of the compiled operations of version 2 with PyTorch's, before their first use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from softmod.kernels import heads, layers, optimizer, policy
from softmod.kernels.halves import TO_HALF
from softmod.kernels.switch import UPDATE, used

CLOSE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}  # tolerance for results of size 1

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def agrees() -> bool:
    """Return whether all compiled functions agree with PyTorch on examples."""
    with used(UPDATE), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        return (
            all(_layers(dtype) and _losses(dtype) for dtype in CLOSE)
            and _batch()
            and _few()
            and _steps()
        )


def same(
    ours: Function, theirs: Function, inputs: Sequence[Tensor], dtype: torch.dtype = torch.float32
) -> bool:
    """Return whether results and gradients of two functions agree.

    Args:
        ours: is given the inputs in `dtype`.
        theirs: is given the inputs in fp32.
        inputs: values that `dtype` represents exactly.
        dtype: float32 or bfloat16.
    """
    results = []
    for function, kind in ((ours, dtype), (theirs, torch.float32)):
        leaves = [value.detach().to(kind, copy=True).requires_grad_() for value in inputs]
        out = function(*leaves)
        outputs = out if isinstance(out, tuple) else (out,)
        weights = [_ramp(value).to(value.dtype) for value in outputs]
        grads = torch.autograd.grad(outputs, leaves, weights)
        results.append([value.detach().float() for value in (*outputs, *grads)])
    return all(_close(a, b, CLOSE[dtype]) for a, b in zip(*results, strict=True))


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    size = max(1.0, float(theirs.abs().max()))
    return torch.allclose(ours, theirs, rtol=0, atol=tolerance * size)


def _ramp(value: Tensor) -> Tensor:
    return torch.linspace(-1, 2, value.numel()).view_as(value).bfloat16()


def _values(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().float()


def _layers(dtype: torch.dtype) -> bool:
    x, square, bias = _values(2, 6, 21), _values(2, 21, 21) / 4, _values(2, 1, 21)

    def dense(x: Tensor, weight: Tensor, bias: Tensor, norm: bool, relu: bool) -> Tensor:
        out = torch.baddbmm(bias, x, weight)
        out = out + (out.to(dtype).float() - out).detach()  # rounded, so that ReLUs agree
        out = functional.layer_norm(out, out.shape[-1:]) if norm else out
        return out.relu() if relu else out

    for norm in (False, True):
        for relu in (False, True):
            if not same(
                lambda *args, n=norm, r=relu: layers.linear(args, n, r),
                lambda x, w, b, n=norm, r=relu: dense(x, w, b, n, r),
                (x, square, bias), dtype,
            ):  # fmt: skip
                return False
    by_task, rows = x.view(2, 2, 3, 21), _values(2, 2, 21)
    route, modules = _values(2, 6, 2, 3), _values(2, 3, 6, 21)
    mixed = "srtj,sjrd->strd"
    return (
        same(
            layers.block,
            lambda x, w, b, v, c: x + dense(dense(x, w, b, True, True), v, c, True, False),
            (x, square, bias, square.flip(1), bias.flip(1)), dtype,
        )
        and all(
            same(
                layers.normalized_sum,
                lambda x, y: functional.layer_norm(x + y.unsqueeze(2), (21,)).relu(),
                (x, rows), dtype,
            )
            for x in (by_task, _values(2, 2, 100, 21))  # the second is shared among threads
        )
        and same(layers.relu, torch.relu, (x,), dtype)
        and same(lambda x: layers.softmax(3 * x), lambda x: (3 * x).softmax(-1), (route,), dtype)
        and all(
            same(
                lambda x, y, r=relu: layers.product(x, y.unsqueeze(2), r),
                lambda x, y, r=relu: (x * y.unsqueeze(2)).relu() if r else x * y.unsqueeze(2),
                (by_task, rows), dtype,
            )
            and same(
                lambda x, y, r=relu: layers.mix(x, y, r),
                lambda x, y, r=relu: torch.einsum(mixed, y, x).relu() if r
                else torch.einsum(mixed, y, x),
                (modules, route), dtype,
            )
            for relu in (False, True)
        )
    )  # fmt: skip


def _losses(dtype: torch.dtype) -> bool:
    outputs, support = 2 * _values(2, 3, 4, 21), torch.linspace(-5, 5, 21)
    target, weight = _values(3, 4, 21).softmax(-1), torch.linspace(0.5, 1.5, 3)
    reward, entropy, discount = _values(3, 4), _values(3, 4), torch.rand(3, 4)
    projected = heads.categorical_target(reward, discount, outputs.to(dtype), entropy, support)
    first = reward + discount * entropy
    values = first[..., None] + discount[..., None] * support
    expected = _projected(values, outputs, support)
    noise = _values(3, 4, 5)
    return (
        _close(projected, expected, CLOSE[torch.float32])
        and same(
            lambda x: heads.cross_entropy(x, target, weight),
            lambda x: _cross_entropy(x, target, weight),
            (outputs,), dtype,
        )
        and same(
            lambda x: heads.expected_value(x, support),
            lambda x: (x.softmax(-1) * support).sum(-1).mean(0),
            (outputs,), dtype,
        )
        and all(
            same(
                lambda x, k=kind: policy.sample(x, noise, k == "tanh"),
                lambda x, k=kind: _sample(x, noise, k),
                (_values(3, 4, 10),), dtype,
            )
            for kind in ("tanh", "clamp")
        )
    )  # fmt: skip


# --- what PyTorch computes ------------------------------------------------------------------------


def _projected(values: Tensor, outputs: Tensor, support: Tensor) -> Tensor:
    atoms = torch.arange(float(len(support)))
    position = (values - support[0]) / (support[1] - support[0])
    position = position.clamp(0, len(support) - 1).unsqueeze(-1)
    shares = (1 - (position - atoms).abs()).clamp(min=0)
    return (outputs.softmax(-1).mean(0).unsqueeze(-1) * shares).sum(-2)


def _cross_entropy(outputs: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return (-(target * outputs.log_softmax(-1)).sum(-1).mean(-1) * weight).mean(-1)


def _sample(outputs: Tensor, noise: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    mean, raw = outputs.chunk(2, -1)
    log_std = 6 * ((raw + 0.805).tanh() + 1) - 10 if kind == "tanh" else raw.clamp(-20, 2)
    before = mean + log_std.exp() * noise
    density = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    correction = 2 * (math.log(2) - before - functional.softplus(-2 * before))
    return before.tanh(), (density - correction).sum(-1)


def _spread(value: Tensor) -> Tensor:
    ordered = value.detach().sort(-1).values
    quarter = value.shape[-1] // 4
    return (ordered[:, -1 - quarter] - ordered[:, quarter]).clamp(min=0.02).unsqueeze(-1)


def _policy_loss(value: Tensor, log_prob: Tensor, temperature: Tensor, weight: Tensor) -> Tensor:
    return ((temperature[:, None] * log_prob - value).mean(-1) * weight).mean()


def _clip(parameters: Sequence[Tensor], stack: int, most: float) -> Tensor:
    parts = [p.grad.view(stack, -1) for p in parameters if p.grad is not None]
    norms = torch.cat(parts, 1).norm(dim=1)
    for part in parts:
        part.mul_((most / (norms + 1e-6)).clamp(max=1.0)[:, None])
    return norms


# --- comparisons of few values --------------------------------------------------------------------


def _batch() -> bool:
    x, scale, mean = _values(3, 8), torch.rand(8) + 0.5, _values(8)
    least, temperature, weight = 0.02, torch.rand(3), torch.rand(3) + 0.5
    largest = torch.tensor([0.0, 2.0, 3.0])
    divisor = torch.where(largest > 0, (largest + 4 * temperature) / 10, 1.0)
    return (
        _close(policy.normalize_obs(x, mean, scale, 1.0), ((x - mean) * scale).clamp(-1, 1), 1e-6)
        and _close(
            policy.scale_rewards(x, temperature, largest, 4.0, 10.0), x / divisor[:, None], 1e-5
        )
        and all(
            same(
                lambda v, p, s=scaled: heads.policy_loss(
                    v, p, temperature, weight, least if s else 0.0
                ),
                lambda v, p, s=scaled: _policy_loss(
                    v / _spread(v) if s else v, p, temperature, weight
                ),
                (_values(3, 8), _values(3, 8)),
            )
            for scaled in (False, True)
        )
    )  # fmt: skip


def _few() -> bool:
    """Compare the functions of few values."""
    log_prob, rows = _values(3, 8), _values(3, 37)
    flags = [optimizer.all_finite([rows, torch.tensor(x)]) for x in (1.0, torch.inf, torch.nan)]
    with used(0):
        rates = log_prob[0].abs()
        expected = (1.1 - rates) / (1.1 - rates).mean()
    return (
        list(map(bool, flags)) == [True, False, False]
        and _close(heads.distance_weights(rates, 1.1), expected, 1e-5)
        and same(layers.unit, lambda x: functional.normalize(x, dim=-1), (rows,))
        and same(
            lambda x: heads.temperature_loss(x, log_prob, -2.0),
            lambda x: -(x * (log_prob - 2.0).mean(-1)).mean(),
            (_values(3),),
        )
    )  # fmt: skip


def _steps() -> bool:
    """Compare steps of Adam and AdamW with clipping, and what is fused with them."""
    values = [_values(2, 37), _values(4, 5)]
    half, whole = TO_HALF(values), [value.bfloat16() for value in values]
    if not all(map(torch.equal, half, whole)):
        return False
    return all(_adam(kind, values) for kind in (torch.optim.Adam, torch.optim.AdamW))


def _adam(kind: type[torch.optim.Adam], values: Sequence[Tensor]) -> bool:
    sets = []
    for ours in (True, False):
        parameters = [value.clone().requires_grad_() for value in values]
        steps = kind(parameters, lr=0.1, weight_decay=0.1, fused=True)
        targets = [torch.zeros_like(value) for value in values]
        for number in range(3):
            for parameter, value in zip(parameters, values, strict=True):
                parameter.grad = (value * (number - 1.5)).roll(number)
            norms = optimizer.gradient_norms(parameters, 2)
            if ours and number:
                names = ("exp_avg", "exp_avg_sq", "step")
                before = [[p.detach() for p in parameters]]
                before += [[steps.state[p][name] for p in parameters] for name in names]
                wanted = [tensor.clone() for own in before for tensor in own]
                kept = [[torch.empty_like(tensor) for tensor in own] for own in before]
                saved = torch.zeros((), dtype=torch.bool)
                optimizer.adam(
                    steps, norms=norms, max_norm=0.5, targets=targets if number == 2 else (),
                    smoothing=0.5, kept=kept, saved=saved,
                )  # fmt: skip
                if not (saved and all(map(torch.equal, wanted, [t for own in kept for t in own]))):
                    return False
            else:
                with used(0):
                    expected = _clip(parameters, 2, 0.5)
                    steps.step()
                if not _close(norms, expected, 1e-5):
                    return False
                if number == 2:
                    torch._foreach_lerp_(targets, [p.detach() for p in parameters], 0.5)
        state = [steps.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
        moved = [target.clone() for target in targets]
        optimizer.move(moved, values, 0.25)
        expected_moves = [t + 0.25 * (v - t) for t, v in zip(targets, values, strict=True)]
        sets.append([*parameters, *state, *targets, *moved, *expected_moves])
    moves = len(values)
    return all(_close(a.detach(), b.detach(), 2e-6) for a, b in zip(*sets, strict=True)) and all(
        _close(a, b, 1e-6)
        for a, b in zip(sets[0][-2 * moves : -moves], sets[0][-moves:], strict=True)
    )
