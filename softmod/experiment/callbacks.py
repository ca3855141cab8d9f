"""Callbacks: code of the user's own that a run calls while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softmod.config.instantiate import build
from softmod.config.schema import TrainConfig
from softmod.errors import ConfigError
from softmod.spec import Rollout, TaskScore

if TYPE_CHECKING:
    from softmod.experiment.session import Metrics, Session


class Callback:
    """Base class of callbacks; every method does nothing until it is overridden.

    A run calls its callbacks between two rounds and waits for them. They can read everything
    (`session.parts`), log metrics (`session.log_metrics`) and end the training (`session.stop`).
    They must not change the agent or the replay: a callback is not part of the run's identity, and
    its state is not saved. What changes results is an algorithm or a network.

    An exception in a callback ends the run.
    """

    def on_round_end(self, session: Session, metrics: Metrics, rollout: Rollout) -> None:
        """Handle the end of a round.

        Args:
            session: of the run.
            metrics: of the round's last update, on the learner's device; empty during the warm-up.
            rollout: the round's experience.
        """

    def on_evaluation(self, session: Session, scores: list[TaskScore]) -> None:
        """Handle an evaluation, the last one included.

        Args:
            session: of the run.
            scores: of the policy, one for each task.
        """

    def on_save(self, session: Session, checkpoint: Path) -> None:
        """Handle a new checkpoint.

        Args:
            session: of the run.
            checkpoint: its folder. Only the last two are kept.
        """


def make_callbacks(cfg: TrainConfig, given: Sequence[Callback] = ()) -> tuple[Callback, ...]:
    """Build the callbacks of a configuration; return them and those that were given.

    Raises:
        ConfigError: a class cannot be found, is not a `Callback`, or does not accept the options.
    """
    for callback in given:
        if not isinstance(callback, Callback):
            name = type(callback).__name__
            raise ConfigError(f"callbacks: {name} must be an instance of softmod.Callback")
    built = [build(node, f"callbacks.{n}", Callback) for n, node in enumerate(cfg.callbacks)]
    return (*built, *given)
