"""What a checkpoint of a run holds, gathered from the parts and put back into them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from softmod.agent.mtsac import MTSAC
from softmod.agent.replay import Replay
from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.replay_files import FOLDER, Archive
from softmod.clock import Clock
from softmod.errors import SaveError
from softmod.spec import TaskScore, UnderWay, mean_success
from softmod.system import faults
from softmod.system.signals import StoppedError
from softmod.tracking.metrics import Log
from softmod.workers.pool import Workers


@dataclass(frozen=True)
class PendingWork:
    """Describe what a run was in the middle of when it was saved.

    Args:
        policy: the weights that the round is collected with.
        updates: of the round, which were made already.
        evaluation: an evaluation was under way.
        over: the training has ended, and the last evaluation was under way.
    """

    policy: Float[Tensor, " number"] | None = None
    updates: int = 0
    evaluation: bool = False
    over: bool = False


NOTHING = PendingWork()
WEIGHTS = "weights"  # of a pending round's policy, flat
FAILURES = 3  # saves that may fail in a row before the run ends

logger = logging.getLogger(__name__)


class Saver:
    """Saves a run's whole state, keeps the best weights, restores.

    Args:
        run: the run's folder; checkpoints lie in `run/checkpoints`.
        agent, optimizers, replay, workers: the parts whose state it is.
        about: the run's configuration and identity, stored with each checkpoint.
    """

    def __init__(
        self,
        run: Path,
        agent: MTSAC,
        optimizers: list[Any],
        replay: Replay,
        workers: Workers,
        about: dict[str, Any],
    ) -> None:
        self.run = run
        self.agent = agent
        self.optimizers = optimizers
        self.replay = replay
        self.workers = workers
        self.about = about
        self.archive = Archive(run, replay)
        self.best = -1.0
        self.failures: Counter[str] = Counter()  # of saves, in a row
        self.pending = NOTHING  # that a restored run has to finish

    def try_save(self, clock: Clock, log: Log) -> Path | None:
        """Save; where the disk refuses, warn and go on until the next save is due.

        Returns:
            The checkpoint; None where the disk refused.

        Raises:
            SaveError: for the third time in a row.
        """
        return self._attempt("checkpoint", lambda: self.save(clock, log))

    def _attempt(self, what: str, save: Callable[[], Path]) -> Path | None:
        """Return what was saved; None where the disk refused.

        Raises:
            SaveError: it was not, for the third time in a row.
        """
        try:
            saved = save()
        except SaveError as error:
            self.failures[what] += 1
            if self.failures[what] == FAILURES:
                raise
            logger.warning("%s; the next attempt is at the next %s", error, what)
            return None
        self.failures[what] = 0
        return saved

    def save(self, clock: Clock, log: Log, pending: PendingWork = NOTHING) -> Path:
        """Save a whole checkpoint, with the episodes under way; keep the last two.

        Raises:
            SaveError: the disk refused; the checkpoints before are untouched.
        """
        log.journal.sync()  # what the checkpoint takes for told is on the disk before it
        groups = {
            "agent": dict(self.agent.state_dict()),
            "optimizers": checkpoint.optimizer_arrays(self.optimizers),
            "episodes": tensors(self.workers.under_way),
            "policy": {} if pending.policy is None else {WEIGHTS: pending.policy},
        }
        skipped = float(self.agent.skipped_in_a_row())
        counters = {
            "updates": self.agent.updates,
            "written": self.replay.written,
            "best": self.best,
        }
        facts = self.about | {
            "kind": "whole",
            "clock": clock.facts(),
            "counters": counters | {"skipped": skipped},
            "begun": {
                "updates": pending.updates,
                "evaluation": pending.evaluation,
                "over": pending.over,
            },
            "log": log.state(),
        }
        pieces = {f"{FOLDER}/{name}": hashed for name, hashed in self.archive.save().items()}
        folder = checkpoint.save(
            self.run / "checkpoints" / f"step_{clock.env_steps:012d}", groups, facts, pieces
        )
        checkpoint.prune(self.run, folder)
        faults.point("checkpoint.pruned")
        kept = [name for whole in checkpoint.all_in(self.run) for name in checkpoint.shared(whole)]
        self.archive.prune(name.removeprefix(f"{FOLDER}/") for name in kept)
        return folder

    def stop(self, clock: Clock, log: Log, pending: PendingWork = NOTHING) -> NoReturn:
        """Save, and end the run.

        Raises:
            StoppedError: always.
        """
        self.save(clock, log, pending)
        stopped = StoppedError(f"stopped and saved at {clock.env_steps:,} env steps")
        if self.about["config"]["run"]["resume"] == "never":
            stopped.how = (
                f"run.resume=never begins anew: rename {self.run} to seed_{self.about['seed']} to"
                " go on from it"
            )
        raise stopped

    def keep_best(self, clock: Clock, scores: list[TaskScore]) -> None:
        """Keep the weights of the best evaluation so far (the later one of equals).

        Raises:
            SaveError: the disk refused for the third time in a row.
        """
        mean = mean_success(scores)
        if mean < self.best:
            return
        place = self.run / "checkpoints" / "best"
        groups = {"agent": dict(self.agent.state_dict())}
        facts = self.about | {
            "kind": "weights",
            "clock": clock.facts(),
            "scores": [s.as_dict() for s in scores],
        }
        if self._attempt("evaluation", lambda: checkpoint.save(place, groups, facts)):
            self.best = mean

    def restore(self, folder: Path, facts: dict[str, Any], clock: Clock) -> None:
        """Bring all parts to where the checkpoint was taken.

        Raises:
            CheckpointError: it is of another form; parts named before the odd one are restored
                already.
        """
        checkpoint.restore_arrays(
            dict(self.agent.state_dict()), checkpoint.arrays(folder, "agent"), "network"
        )
        live = checkpoint.optimizer_arrays(self.optimizers)
        checkpoint.restore_arrays(live, checkpoint.arrays(folder, "optimizers"), "optimizers")
        pieces = {
            name.removeprefix(f"{FOLDER}/"): hashed
            for name, hashed in checkpoint.shared(folder).items()
        }
        self.archive.restore(pieces, int(facts["counters"]["written"]))
        self.agent.updates = int(facts["counters"]["updates"])
        self.best = float(facts["counters"]["best"])
        self.workers.restore(self._under_way(folder))
        clock.restore(facts["clock"])
        if skipped := facts["counters"].get("skipped"):
            self.agent.skipped = torch.tensor(skipped, device=self.replay.device)
        if begun := facts.get("begun"):
            policy = self._policy(folder) if begun["updates"] else None
            self.pending = PendingWork(
                policy, int(begun["updates"]), bool(begun["evaluation"]), bool(begun.get("over"))
            )

    def _under_way(self, folder: Path) -> UnderWay:
        spec = self.workers.spec
        under_way = UnderWay.none(spec, spec.num_tasks, self.workers.copies)
        saved = checkpoint.arrays(folder, "episodes")
        checkpoint.restore_arrays(tensors(under_way), saved, "episodes")
        return under_way

    def _policy(self, folder: Path) -> Float[Tensor, " number"]:
        """Return the weights that a pending round is collected with."""
        saved = checkpoint.arrays(folder, "policy")
        policy = self.agent.policy()
        if WEIGHTS not in saved:  # of a version that saved them by their names
            names = self.agent.acting_actor.state_dict()
            saved = {WEIGHTS: torch.cat([saved[name].reshape(-1) for name in names])}
        checkpoint.restore_arrays({WEIGHTS: policy}, saved, "policy")
        return policy


def tensors(under_way: UnderWay) -> dict[str, Tensor]:
    """Return the episodes under way as tensors on the same memory."""
    return {name: torch.from_numpy(array) for name, array in vars(under_way).items()}
