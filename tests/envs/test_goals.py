from __future__ import annotations

import pickle
import time
from collections import defaultdict
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softmod.envs import goals as module
from softmod.envs.goals import benchmark_goals, cache_path
from softmod.envs.tasks import MT10, SETS
from softmod.errors import ConfigError
from softmod.spec import Goal
from tests.envs.conftest import global_stream

Goals = dict[str, Goal]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Use an empty cache and cheap goals; return the list of generated seeds."""
    generated: list[int] = []

    def generate(benchmark: str, seed: int) -> Goals:
        generated.append(seed)
        return {task: np.full((50, 3), seed + 0.5) for task in MT10}

    monkeypatch.setenv("SOFTMOD_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.setattr(module, "_generate", generate)
    return generated


def equal(a: Goals, b: Goals) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[task], b[task]) for task in a)


def test_equal_to_metaworlds_own(mt10: Any) -> None:
    theirs = defaultdict(list)
    for task in mt10.train_tasks:
        theirs[task.env_name].append(pickle.loads(task.data)["rand_vec"])
    before = global_stream()
    ours = benchmark_goals("mt10", 0)
    assert equal(ours, {task: np.array(vectors) for task, vectors in theirs.items()})
    assert global_stream() == before


def test_seeds_differ_and_the_user_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SETS, "mt10", ("reach-v3",))
    first, second = (module._generate("mt10", seed)["reach-v3"] for seed in (0, 1))
    assert not np.array_equal(first, second)
    assert "Drawing the goals of mt10's 1 tasks (once, about" in capsys.readouterr().err


class Gone(StringIO):
    """A pipe whose reader has closed it."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_the_users_stream_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Gone())
    monkeypatch.setattr(module, "SETS", {"none": ()})
    assert module._generate("none", 0) == {}


def test_second_call_is_read_and_quick() -> None:
    first = benchmark_goals("mt10", 0)
    start = time.monotonic()
    second = benchmark_goals("mt10", 0)
    assert time.monotonic() - start < 1.0
    assert equal(first, second)
    with pytest.raises(ValueError, match="read-only"):
        second["reach-v3"][0, 0] = 1


def test_generated_once_per_seed(fake: list[int]) -> None:
    for seed in (0, 0, 7, 0, 7):
        assert benchmark_goals("mt10", seed)["push-v3"][0, 0] == seed + 0.5
    assert fake == [0, 7]
    assert [
        path.name for path in cache_path("mt10", 0).parent.iterdir() if path.name.startswith(".")
    ] == []


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "short":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "flipped":
        at = len(whole) // 2
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    elif how == "other":
        np.savez(path, reach=np.zeros(3))
    elif how == "pickle":
        np.savez(path, **dict.fromkeys(MT10, np.array([None])))  # type: ignore[arg-type]
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["short", "flipped", "other", "pickle", "empty"])
def test_damaged_cache_is_drawn_again(
    fake: list[int], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    first = benchmark_goals("mt10", 0)
    damage(cache_path("mt10", 0), how)
    assert equal(benchmark_goals("mt10", 0), first)
    assert fake == [0, 0]
    assert "cannot be read" in caplog.text
    assert equal(benchmark_goals("mt10", 0), first)
    assert fake == [0, 0]


def test_unwritable_cache_only_warns(
    fake: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SOFTMOD_CACHE", str(tmp_path / "file"))
    assert benchmark_goals("mt10", 3)["push-v3"][0, 0] == 3.5
    assert "cannot be kept" in caplog.text


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "goals-mt25-seed4-metaworld3.1.1.npz"
    monkeypatch.setenv("SOFTMOD_CACHE", "/here")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cache_path("mt25", 4) == Path("/here") / name
    monkeypatch.delenv("SOFTMOD_CACHE")
    assert cache_path("mt25", 4) == Path("/there/softmod") / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_path("mt25", 4) == Path("/home/me/.cache/softmod") / name


def test_impossible_seed() -> None:
    with pytest.raises(ConfigError, match="goal_seed is 4294967296"):
        benchmark_goals("mt10", 2**32)
