"""Saved results: they give the same report as the runs, and README and docs agree with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from softmod.errors import ConfigError
from softmod.report import cost, results, tables
from softmod.report.__main__ import run as report
from softmod.report.runs import Comparison, comparisons, from_folders
from tests.command.test_train import here
from tests.command.test_train import run as train

__all__ = ["here"]

ROOT = Path(__file__).parents[2]
SAVED = sorted(path.parent for path in (ROOT / "results").glob("*/seed_0.json"))


def test_saved_results_make_the_same_tables_as_the_runs(here, capsys):
    assert train("seed=0") == train("seed=1") == 0
    assert report(["runs=[runs]", "save=results/toy", "output=first"]) == 0
    assert report(["results=[results/toy]", "output=second"]) == 0
    names = [path.name for path in (here / "first").glob("*.csv")]
    assert {"success.csv", "seeds.csv", "tasks.csv"} <= set(names)
    for name in names:
        ours, theirs = ((here / folder / name).read_text() for folder in ("first", "second"))
        assert ours == theirs or name == "efficiency.csv"  # rates are rounded
    saved = json.loads((here / "results" / "toy" / "seed_1.json").read_text())
    assert saved["command"].startswith("python -m softmod.train experiment=toy")
    assert "seed=1" in saved["command"]
    assert saved["env_steps"] == 600
    assert saved["tags"]["version.metaworld"] == "3.1.1"
    assert {"machine.processor", "machine.cores"} <= saved["tags"].keys()
    assert set(saved["success_rate"]) == {"toy-reach", "toy-opposite", "toy-touch"}


def test_unfinished_runs_and_two_of_a_seed_are_no_results(here):
    assert train() == train("run.folder=others", "algorithm.discount=0.9") == 0
    (first,), (second,) = from_folders(["runs"]), from_folders(["others"])
    with pytest.raises(ConfigError, match="two runs with seed 0"):
        results.save([first, second], here / "results")
    first.status = "KILLED"
    with pytest.raises(ConfigError, match="is not finished"):
        results.save([first], here / "results")
    assert not (here / "results").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "curves": 3}']
)
def test_a_damaged_file_is_named(here, content, capsys):
    path = here / "results" / "toy" / "seed_0.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert report(["results=[results/toy]"]) == 2
    printed = capsys.readouterr().err
    assert "seed_0.json" in printed
    assert printed.count("\n") == 1


def test_saving_is_for_runs_only(here, capsys):
    assert report(["results=[results/toy]", "save=elsewhere"]) == 2
    assert "only with runs=" in capsys.readouterr().err


def comparison(folder: Path) -> Comparison:
    """Return the only comparison of the results in a folder."""
    (one,) = comparisons(results.load([str(folder)]))
    return one


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: folder.name)
def test_the_tables_of_readme_and_docs_are_those_of_the_results(folder: Path):
    pages = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "claim.md")
    shown = "".join(page.read_text() for page in pages)
    for line in tables.readme(comparison(folder)).as_markdown().splitlines():
        assert line in shown, (
            f"results/{folder.name}: python -m softmod.report results=[results/{folder.name}]"
        )


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: folder.name)
def test_seeds_are_all_there_from_0_on(folder: Path):
    """Check that no seed was left out."""
    (group,) = comparison(folder).groups
    assert [run.seed for run in group.runs] == list(range(len(group.runs)))
    assert np.isfinite(group.scores()).all()


def test_saved_results_have_parameters_and_flop():
    for name, parameters in {"mt10": 103_246, "mt10_mt_mh_sac": 116_000}.items():
        run = results.load([str(ROOT / "results" / name)])[0]
        found = cost.of_run(run)
        assert found is not None
        assert (found.actor, found.critics) == (parameters, 617_802)
        assert found.gflop > 0.1
