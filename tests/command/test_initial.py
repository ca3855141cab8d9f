"""Runs that start from trained weights (`init_from`), and that go on without their replay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import softmod
from softmod.agent.replay import Replay
from softmod.checkpoint.files import newest
from softmod.checkpoint.load import find
from softmod.errors import CheckpointError, ConfigError
from softmod.experiment import initial
from tests.command.test_train import SMALL, here, state

__all__ = ["here"]

EAGER = [*SMALL, "fabric.compile=eager"]
SHORT = [*EAGER, "run.steps_per_task=100"]
OTHER = "env.tasks=[toy-carry,toy-touch]"  # toy-touch is the third of three tasks in the source


def agent_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(find(checkpoint)[0] / "agent.safetensors")


@pytest.fixture
def source(here: Path) -> Path:
    return softmod.train([*SHORT, "algorithm=fast"]).folder


@pytest.fixture
def first_weights(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Return a list of the weights that each run starts with."""
    weights = []
    original = initial.take

    def take(agent, *rest):
        taken = original(agent, *rest)
        weights.append({name: array.clone() for name, array in agent.state_dict().items()})
        return taken

    monkeypatch.setattr(initial, "take", take)
    return weights


def test_a_task_set_of_another_size(source: Path, first_weights, capsys):
    run = softmod.train([*SHORT, "algorithm=fast", OTHER, f"init_from={source}"])
    assert run.env_steps == 200
    saved = agent_of(source)
    (begin,) = first_weights
    for role in ("actor", "averaged_actor"):
        for layer in ("first.weight", "router.output.0.bias", "between.0.weight"):
            name = f"{role}.network.{layer}"
            assert torch.equal(begin[name], saved[name])
        name = f"{role}.network.task.weight"  # [1, task, width]
        assert begin[name].shape[1] == 2
        assert torch.equal(begin[name][:, 1], saved[name][:, 2])  # toy-touch
        assert not torch.isin(begin[name][:, 0], saved[name]).any()  # toy-carry is new
    assert torch.equal(begin["target_critic.first.weight"], saved["target_critic.first.weight"])
    assert torch.equal(begin["moments.mean"], saved["moments.mean"])
    assert saved["return_scale.largest"].all()
    assert not begin["return_scale.largest"].any()
    report = json.loads((run.folder / initial.REPORT).read_text())
    assert report["shared"] == ["toy-touch"]
    assert "actor.network.task.weight" in report["by_task"]
    assert report["other_shape"] == {}
    assert f"init_from={source}: arrays taken: " in capsys.readouterr().err


def test_what_does_not_fit_is_listed_with_its_shapes(source: Path, capsys):
    changed = ["algorithm=fast", "actor.module_width=4", "policy.normalize_obs=false"]
    run = softmod.train([*SHORT, *changed, f"init_from={source}"])
    report = json.loads((run.folder / initial.REPORT).read_text())
    assert report["other_shape"]["actor.network.last.weight"] == [[1, 8, 4], [1, 4, 4]]
    assert "actor.network.state.0.weight" in report["whole"]
    assert "moments.mean" in report["unused"]
    shown = capsys.readouterr().err
    assert "not taken, another shape: actor.network.first" in shown
    assert "not taken, not in this run: " in shown


def test_the_content_and_not_the_path_is_part_of_the_identity(source: Path, here: Path):
    line = [*SHORT, "algorithm=fast", OTHER]
    run = softmod.train([*line, f"init_from={source}"])
    assert run.folder.parent != source.parent
    moved = here / "elsewhere"
    source.rename(moved)
    assert softmod.train([*line, f"init_from={moved}"]).folder == run.folder
    assert softmod.train(line).folder != run.folder
    saved = json.loads((find(run.folder)[0] / "facts.json").read_text())["config"]
    digest = saved["init_digest"]
    with pytest.raises(ConfigError, match=f"init_digest=sha0.* have {digest}"):
        softmod.train([*line, f"init_from={moved}", "init_digest=sha0"])
    shutil.rmtree(moved)
    with pytest.raises(ConfigError, match="init_from=.*neither a checkpoint nor"):
        softmod.train([*line, f"init_from={moved}"])
    gone = [*line, f"init_from={moved}", f"init_digest={digest}"]
    longer = softmod.train([*gone, "run.steps_per_task=150"])
    assert (longer.folder, longer.env_steps) == (run.folder, 300)


def test_a_stopped_run_goes_on_to_the_same_end(source: Path, here: Path):
    line = [*EAGER, "algorithm=fast", OTHER, f"init_from={source}"]
    whole = softmod.train(line).folder
    wanted = state(whole)
    shutil.rmtree(whole)
    softmod.train([*line, "run.steps_per_task=90"])
    (whole / "result.json").unlink()
    assert softmod.train(line).folder == whole
    found = state(whole)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if "agent." in name)


def test_a_shipped_policy_is_a_start_and_an_unknown_one_is_named(here: Path):
    with pytest.raises(ConfigError, match="init_from=mt1O.*mt10, quickstart.*did you mean mt10"):
        softmod.train([*SHORT, "init_from=mt1O"])
    with pytest.raises(ConfigError, match="init_digest=sha1: only with init_from"):
        softmod.train([*SHORT, "init_digest=sha1"])
    assert not list(here.iterdir())


# --- run.resume=weights ---------------------------------------------------------------------------


def test_the_replay_is_refilled_before_updates_go_on(here: Path, monkeypatch, capsys):
    folder = softmod.train([*EAGER, "run.steps_per_task=100"]).folder
    before = agent_of(folder)
    found = newest(folder)
    assert found is not None
    updates = found[1]["counters"]["updates"]
    shutil.rmtree(folder / "replay")
    (folder / "result.json").unlink()
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is valid"):
        softmod.train([*EAGER, "run.steps_per_task=140"])
    uniform = []
    extend = Replay.extend
    monkeypatch.setattr(
        Replay,
        "extend",
        lambda self, rollout: (uniform.append(self.written), extend(self, rollout)),
    )
    line = [*EAGER, "run.resume=weights"]
    softmod.train([*line, "run.steps_per_task=140"])
    assert uniform == [0, 10, 20, 30]  # 40 steps of each task, the warm-up
    after = newest(folder)
    assert after is not None
    assert after[1]["clock"]["env_steps"] == 420
    assert after[1]["counters"] | {"best": 0} == {
        "updates": updates, "written": 40, "best": 0, "skipped": 0.0
    }  # fmt: skip
    assert all(torch.equal(agent_of(folder)[name], before[name]) for name in before)
    assert "40 steps of each task refill the replay" in capsys.readouterr().err
    softmod.train([*line, "run.steps_per_task=200"])  # with the replay, which is there again
    assert uniform[4:] == [40, 50, 60, 70, 80, 90]
    final = newest(folder)
    assert final is not None
    assert final[1]["counters"]["updates"] > updates
    assert final[1]["counters"]["written"] == 100


def test_weights_alone_need_a_checkpoint(here: Path):
    with pytest.raises(CheckpointError, match="run.resume=weights: no checkpoint in"):
        softmod.train([*EAGER, "run.resume=weights"])
    assert not list(here.iterdir())
