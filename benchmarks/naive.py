"""Naive reference for an update: soft modularization module by module in plain PyTorch, with SAC.

It has the same networks and the same update as `softmod.agent.mtsac` in its sequential order, in
the most direct form: a Linear per module, a one-hot task in a flat batch, two critics one after
the other, and unfused Adam.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus


class NaiveSoftModular(nn.Module):
    """The released form of soft modularization: `L` layers of `n` modules of width `d`."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        tasks: int,
        layers: int,
        modules: int,
        width: int,
        embedding: int,
        gating: int,
    ) -> None:
        super().__init__()
        self.modules_per_layer = modules
        self.state = nn.Sequential(
            nn.Linear(in_dim, embedding), nn.ReLU(), nn.Linear(embedding, embedding)
        )
        self.task = nn.Linear(tasks, embedding)
        self.gate = nn.Sequential(
            nn.ReLU(), nn.Linear(embedding, gating), nn.ReLU(), nn.Linear(gating, gating)
        )
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(width if layer else embedding, width) for _ in range(modules))
            for layer in range(layers)
        )
        self.route = nn.ModuleList(nn.Linear(gating, modules * modules) for _ in range(layers - 1))
        self.condition = nn.ModuleList(
            nn.Linear(modules * modules * layer, gating) for layer in range(1, layers)
        )
        self.route_last = nn.Linear(gating, modules)
        self.head = nn.Linear(width, out_dim)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        """Map inputs `[row, in]` and one-hot tasks `[row, task]` to outputs `[row, out]`."""
        state = self.state(x)
        embedding = self.gate(state * self.task(task))
        first, *others = ([*layer] for layer in self.layers)  # type: ignore[misc]
        outputs = [module(relu(state)) for module in first]
        routes: list[Tensor] = []
        signal = embedding
        for layer, modules in enumerate(others):
            weights = self._weights(self.route[layer](relu(signal)))
            routes.append(weights.flatten(1))
            outputs = [
                module(relu(self._sum(outputs, weights[:, i]))) for i, module in enumerate(modules)
            ]
            signal = self.condition[layer](torch.cat(routes, -1)) * embedding
        weights = self.route_last(relu(signal)).softmax(-1)
        return self.head(relu(self._sum(outputs, weights)))

    def _weights(self, logits: Tensor) -> Tensor:
        """Return routing probabilities `[row, target, source]`."""
        return logits.view(len(logits), self.modules_per_layer, -1).softmax(-1)

    @staticmethod
    def _sum(outputs: list[Tensor], weights: Tensor) -> Tensor:
        """Sum the modules' outputs `[row, d]` with weights `[row, source]`."""
        return sum(
            (weights[:, j, None] * output for j, output in enumerate(outputs)), torch.zeros(())
        )


class NaiveSAC:
    """SAC with two critics, their targets, and a temperature per task."""

    def __init__(self, obs: int, action: int, tasks: int, **network: int) -> None:
        self.actor = NaiveSoftModular(obs, 2 * action, tasks, **network)
        self.critics = [NaiveSoftModular(obs + action, 1, tasks, **network) for _ in range(2)]
        self.targets = deepcopy(self.critics)
        self.log_alpha = nn.Parameter(torch.zeros(tasks))
        self.entropy = -float(action)
        self.optimizers = [
            torch.optim.Adam(parameters, lr=3e-4)
            for parameters in (
                self.actor.parameters(),
                [p for c in self.critics for p in c.parameters()],
                [self.log_alpha],
            )
        ]

    def update(
        self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, task: Tensor
    ) -> None:
        """Update critics, actor, temperatures and targets once, on flat rows; `task` is one-hot."""
        alpha = self.log_alpha.exp().detach()[task.argmax(-1)]
        with torch.no_grad():
            next_action, next_log_prob = self._act(next_obs, task)
            pair = torch.cat([next_obs, next_action], -1)
            next_q = torch.min(*(critic(pair, task).squeeze(-1) for critic in self.targets))
            target = reward + 0.99 * (next_q - alpha * next_log_prob)
        pair = torch.cat([obs, action], -1)
        loss = sum(
            (critic(pair, task).squeeze(-1) - target).square().mean() for critic in self.critics
        )
        self._step(1, loss, *(list(critic.parameters()) for critic in self.critics))

        new_action, log_prob = self._act(obs, task)
        pair = torch.cat([obs, new_action], -1)
        q = torch.min(*(critic(pair, task).squeeze(-1) for critic in self.critics))
        self._step(0, (alpha * log_prob - q).mean(), list(self.actor.parameters()))
        self._step(
            2, -(self.log_alpha[task.argmax(-1)] * (log_prob.detach() + self.entropy)).mean()
        )
        with torch.no_grad():
            for critic, slow in zip(self.critics, self.targets, strict=True):
                for source, moving in zip(critic.parameters(), slow.parameters(), strict=True):
                    moving.lerp_(source, 0.005)

    def _step(self, which: int, loss: Tensor, *clipped: Iterable[nn.Parameter]) -> None:
        """Take a step of one optimizer, with gradients clipped to norm 1 per group."""
        self.optimizers[which].zero_grad()
        loss.backward()
        for parameters in clipped:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizers[which].step()

    def _act(self, obs: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """Sample actions `[row, action]` with their log probabilities `[row]`."""
        mean, log_std = self.actor(obs, task).chunk(2, -1)
        log_std = log_std.clamp(-20.0, 2.0)
        noise = torch.randn_like(mean)
        before = mean + log_std.exp() * noise
        gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        correction = 2.0 * (math.log(2.0) - before - softplus(-2.0 * before))
        return before.tanh(), (gaussian - correction).sum(-1)
