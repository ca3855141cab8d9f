from __future__ import annotations

import subprocess
import sys

import pytest

from softmod.envs import tasks
from softmod.envs.tasks import (
    MT10,
    MT25,
    MT50,
    SETS,
    TASKS,
    TOY_TASKS,
    check_tasks,
    flawed_success,
)
from softmod.errors import ConfigError


@pytest.mark.parametrize("name", ["MT10", "MT25", "MT50"])
def test_sets_are_metaworlds_in_its_order(name: str) -> None:
    from metaworld import env_dict

    assert getattr(tasks, name) == tuple(getattr(env_dict, f"{name}_V3"))


def test_every_task_has_one_meaning_of_its_own() -> None:
    meanings = [task.meaning for task in TASKS.values()]
    assert len(TASKS) == 54
    assert all(meanings)
    assert len(set(meanings)) == len(meanings)


def test_sizes() -> None:
    assert [len(names) for names in SETS.values()] == [10, 25, 50, len(TOY_TASKS)]
    assert set(MT10) <= set(MT25) <= set(MT50)


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'reach-v2', did you mean reach-v3 or "):
        check_tasks(["push-v3", "reach-v2"], MT50)
    with pytest.raises(ConfigError, match="'door-opn-v3', did you mean door-open-v3"):
        check_tasks(["door-opn-v3"], MT50)


@pytest.mark.parametrize(
    ("names", "complaint"), [([], "empty"), (["push-v3", "push-v3"], "push-v3 more than once")]
)
def test_empty_and_double(names: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_tasks(names, MT50)


def test_one_name_is_one_task() -> None:
    assert check_tasks("push-v3", MT50) == ("push-v3",)


def test_v1_success() -> None:
    flaws = flawed_success(MT50, "v1")
    never = [task for task, flaw in flaws.items() if flaw == tasks.NEVER]
    assert never == ["hand-insert-v3", "stick-push-v3"]
    assert list(flawed_success(MT10, "v1")) == ["peg-insert-side-v3"]
    assert flawed_success(MT50, "v2") == {}


def test_the_names_need_nothing_heavy() -> None:
    heavy = (
        "{'torch', 'numpy', 'metaworld', 'mujoco', 'gymnasium', 'lightning', 'rich'} &"
        " set(sys.modules)"
    )
    code = f"import sys, softmod.envs.tasks; print(sorted({heavy}))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
