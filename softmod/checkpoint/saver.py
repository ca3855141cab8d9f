"""Saving and restoring of a run: collects the state of its parts in a checkpoint."""

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
    """Work that was unfinished when a run was saved.

    Args:
        policy: weights that the pending round is collected with; None: no round is pending.
        updates: updates of the pending round that were made already.
        evaluation: an evaluation is pending.
        over: training has ended, and the last evaluation is pending.
    """

    policy: Float[Tensor, " number"] | None = None
    updates: int = 0
    evaluation: bool = False
    over: bool = False


NOTHING = PendingWork()
WEIGHTS = "weights"  # key of a pending round's policy, flat
FAILURES = 3  # failed saves in a row that end the run

logger = logging.getLogger(__name__)


class Saver:
    """Saves and restores a run's whole state, and keeps the best weights.

    Args:
        run: the run's folder; checkpoints are in `run/checkpoints`.
        agent, optimizers, replay, workers: the parts whose state is saved.
        about: metadata of the run (configuration, identity), stored with each checkpoint.
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
        self.failures: Counter[str] = Counter()  # failed saves in a row, by kind
        self.pending = NOTHING  # work that a restored run has to finish

    def try_save(self, clock: Clock, log: Log) -> Path | None:
        """Save; if that fails, log a warning and continue until the next save is due.

        Returns:
            The checkpoint; None where the disk refused.

        Raises:
            SaveError: the third save in a row failed.
        """
        return self._attempt("checkpoint", lambda: self.save(clock, log))

    def _attempt(self, what: str, save: Callable[[], Path]) -> Path | None:
        """Call `save`; return what it saved, or log a warning and return None.

        Args:
            what: kind of save, by which failures are counted.
            save: writes a checkpoint.

        Raises:
            SaveError: the third save of this kind in a row failed.
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
        """Save a whole checkpoint, including unfinished episodes; keep the last two.

        Returns:
            The checkpoint's folder.

        Raises:
            SaveError: the checkpoint cannot be written; earlier ones are untouched.
        """
        log.journal.sync()  # metrics that the checkpoint counts as logged must be on disk first
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
        metadata = self.about | {
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
            self.run / "checkpoints" / f"step_{clock.env_steps:012d}", groups, metadata, pieces
        )
        checkpoint.prune(self.run, folder)
        faults.point("checkpoint.pruned")
        kept = [name for whole in checkpoint.all_in(self.run) for name in checkpoint.shared(whole)]
        self.archive.prune(name.removeprefix(f"{FOLDER}/") for name in kept)
        return folder

    def stop(self, clock: Clock, log: Log, pending: PendingWork = NOTHING) -> NoReturn:
        """Save, then end the run.

        Raises:
            StoppedError: always, unless saving fails.
            SaveError: the checkpoint cannot be written.
        """
        self.save(clock, log, pending)
        stopped = StoppedError(f"stopped and saved at {clock.env_steps:,} env steps")
        if self.about["config"]["run"]["resume"] == "never":
            stopped.how = (
                f"run.resume=never starts a new run: rename {self.run} to"
                f" seed_{self.about['seed']} to resume it"
            )
        raise stopped

    def keep_best(self, clock: Clock, scores: list[TaskScore]) -> None:
        """Save the weights if this is the best evaluation so far; ties go to the later one.

        Raises:
            SaveError: the third save in a row failed.
        """
        mean = mean_success(scores)
        if mean < self.best:
            return
        folder = self.run / "checkpoints" / "best"
        groups = {"agent": dict(self.agent.state_dict())}
        metadata = self.about | {
            "kind": "weights",
            "clock": clock.facts(),
            "scores": [s.as_dict() for s in scores],
        }
        if self._attempt("evaluation", lambda: checkpoint.save(folder, groups, metadata)):
            self.best = mean

    def restore(
        self, folder: Path, metadata: dict[str, Any], clock: Clock, replay: bool = True
    ) -> None:
        """Restore all parts from a checkpoint.

        Args:
            folder: the checkpoint's folder.
            metadata: the checkpoint's metadata.
            clock: restored too.
            replay: restore the replay too. Without it, the updates of a pending round are dropped.

        Raises:
            CheckpointError: the checkpoint does not match the parts; some of them may be restored
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
        counters = metadata["counters"]
        if replay:
            self.archive.restore(pieces, int(counters["written"]))
        self.agent.updates = int(counters["updates"])
        self.best = float(counters["best"])
        self.workers.restore(self._under_way(folder))
        clock.restore(metadata["clock"])
        if skipped := counters.get("skipped"):
            self.agent.skipped = torch.tensor(skipped, device=self.replay.device)
        if pending := metadata.get("begun"):
            self.pending = PendingWork(
                policy=self._policy(folder) if pending["updates"] and replay else None,
                updates=int(pending["updates"]) if replay else 0,
                evaluation=bool(pending["evaluation"]),
                over=bool(pending.get("over")),
            )

    def _under_way(self, folder: Path) -> UnderWay:
        """Read the unfinished episodes of a checkpoint."""
        spec = self.workers.spec
        under_way = UnderWay.none(spec, spec.num_tasks, self.workers.copies)
        saved = checkpoint.arrays(folder, "episodes")
        checkpoint.restore_arrays(tensors(under_way), saved, "episodes")
        return under_way

    def _policy(self, folder: Path) -> Float[Tensor, " number"]:
        """Read the weights that a pending round is collected with."""
        saved = checkpoint.arrays(folder, "policy")
        policy = self.agent.policy()
        if WEIGHTS not in saved:  # saved by name, by an earlier version
            names = self.agent.acting_actor.state_dict()
            saved = {WEIGHTS: torch.cat([saved[name].reshape(-1) for name in names])}
        checkpoint.restore_arrays({WEIGHTS: policy}, saved, "policy")
        return policy


def tensors(under_way: UnderWay) -> dict[str, Tensor]:
    """Return the unfinished episodes as tensors that share their memory."""
    return {name: torch.from_numpy(array) for name, array in vars(under_way).items()}
