"""Writing of a report: selection of runs, comparisons, and the order of the page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from softmod.checkpoint import files as checkpoint
from softmod.checkpoint.load import TrainedPolicy, load
from softmod.config.schema import ReportConfig
from softmod.errors import ConfigError
from softmod.report import cost, figures, results, routing, sharing, swaps, tables
from softmod.report.page import Page, budget_line, machines_line, protocol_line, unequal_line
from softmod.report.runs import (
    GOALS,
    Comparison,
    Group,
    Run,
    comparisons,
    from_folders,
    from_mlflow,
)
from softmod.system.streams import say
from softmod.tracking import dashboard
from softmod.tracking.mlflow_store import connect, prepare_environment, store_uri
from softmod.tracking.names import routing_entropy

PUBLISHED = Path(__file__).parent / "published.yaml"
MOST_LAYERS = 8


def report(cfg: ReportConfig, output: Path) -> Path:
    """Write the report of a sweep, of run folders, of results or of a checkpoint.

    Returns:
        The path of the page.

    Raises:
        ConfigError: There is no such sweep or folder, no run has finished, or the output cannot be
            written.
    """
    parent = None
    began = time.time()
    if cfg.checkpoint:
        return report_routing(cfg, cfg.checkpoint, output)
    if cfg.parent:
        prepare_environment()
        uri = store_uri(cfg.uri)
        parent, runs = from_mlflow(uri, cfg.parent)
    elif cfg.results:
        runs = results.load(cfg.results)
    else:
        runs = from_folders(cfg.runs)
        if cfg.save:
            results.save(runs, Path(cfg.save))
    found = comparisons(runs)
    with checkpoint.writing(output):
        output.mkdir(parents=True, exist_ok=True)
        page = write(cfg, found, runs, output)
    if parent:
        client = connect(uri)
        for path in sorted(output.rglob("*")):
            if path.is_file() and path.stat().st_mtime >= began - 1:  # skip older reports
                below = path.parent.relative_to(output).as_posix()
                client.log_artifact(parent, str(path), f"report/{below}".removesuffix("/."))
        experiment = client.get_run(parent).info.experiment_id
        if line := dashboard.line(uri, experiment, parent):
            say(line)
    return page


def report_routing(cfg: ReportConfig, path: str, output: Path) -> Path:
    """Write the page on a checkpoint's routing; return its path.

    Raises:
        CheckpointError: There is no valid checkpoint at `path`.
        ConfigError: The network does not route, its classes are not allowed, `swap` is true for
            another network than a soft modular one, or the output cannot be written.
    """
    if cfg.video:
        from softmod.report.moving import videos
        from softmod.report.video import encoder

        encoder()  # before the work
    policy = load(path, cfg.allow)
    if cfg.swap:
        swaps.router_of(policy)
    rollouts = routing.roll_out(policy, cfg.episodes)
    if not rollouts:
        raise ConfigError(f"checkpoint={path}: its network does not route")
    with checkpoint.writing(output):
        output.mkdir(parents=True, exist_ok=True)
        page = Page(f"Routing of {path}", output)
        played = " or ".join(map(str, sorted({one.episodes for one in rollouts})))
        page.text(
            f"{played} episodes of each task with the deterministic policy, up to success or the"
            " horizon."
        )
        page.picture(
            routing.graphs(rollouts, output / "graphs.png"),
            "Connections by mean probability, per task",
        )
        page.picture(
            routing.courses(rollouts, output / "courses.png"),
            "Weights of the modules along an episode",
        )
        if len(rollouts) > 1:
            page.picture(
                routing.similarity_figure(rollouts, output / "similarity.png"),
                "Similarity of the tasks' routing",
            )
        page.picture(
            routing.task_map(rollouts, output / "map.png"), "Routing of states, colored by task"
        )
        page.table(sharing.sources_table(rollouts))
        page.table(sharing.variation_table(rollouts))
        if len(rollouts) > 1:
            page.table(sharing.distances_table(rollouts))
        if cfg.swap:
            add_swaps(page, policy, rollouts, cfg.episodes)
        written = page.write()
        if cfg.video:
            for video in videos(policy, output):
                page.link(video, video.name)
            page.write()
        return written


def add_swaps(
    page: Page, policy: TrainedPolicy, rollouts: Sequence[routing.Rollouts], episodes: int
) -> None:
    """Add success with the routing of other tasks, and with constant routing."""
    page.heading("Other routing")
    page.text(f"{episodes} episodes of each task.")
    page.table(swaps.frozen(policy, rollouts, episodes))
    if len(rollouts) > 1:
        values = swaps.swapped(policy, episodes)
        table = swaps.swaps_table(policy.tasks, values)
        page.table(table)
        page.picture(
            swaps.swaps_figure(policy.tasks, values, page.folder / "swaps.png"), table.caption
        )
        agreement = swaps.agreement(routing.similarity(rollouts), values)
        page.text(
            "Rank correlation of a swap's success with the similarity of the two tasks' routing:"
            f" {agreement:.2f}."
        )


def write(
    cfg: ReportConfig, found: Sequence[Comparison], runs: Sequence[Run], output: Path
) -> Path:
    """Write the page with all comparisons and the published results; return its path."""
    page = Page(f"softmod report: {cfg.parent or ', '.join(cfg.runs or cfg.results)}", output)
    if len(found) > 1:
        page.note(
            f"These {len(runs)} runs have {len(found)} protocols (tasks, goals, reward, horizon,"
            " evaluation). Success rates under different protocols are not comparable, so each"
            " protocol has a section of its own."
        )
    for number, comparison in enumerate(found, 1):
        folder = output if len(found) == 1 else output / f"protocol_{number}"
        folder.mkdir(exist_ok=True)
        part = page if len(found) == 1 else Page(f"{page.title}, protocol {number}", folder)
        add_comparison(part, comparison, cfg)
        if part is not page:
            page.heading(f"Protocol {number}")
            page.text(protocol_line(comparison))
            page.link(part.write(), f"{len(comparison.groups)} models")
    if len(found) > 1 and only_tasks_differ(found):
        page.heading("Success across task sets")
        table = tables.task_sets(found)
        page.table(table)
        page.picture(figures.task_sets(table, output / "task_sets.png"), table.caption)
    page.heading("Published results")
    page.note(
        "Measured by others under other protocols: for orientation, not for a direct comparison."
    )
    page.table(tables.published(yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))))
    return page.write()


def only_tasks_differ(found: Sequence[Comparison]) -> bool:
    """Return whether the protocols differ only in their tasks, so that task sets are comparable."""
    without_tasks = set()
    for comparison in found:
        protocol = comparison.protocol.items()
        without_tasks.add(frozenset((key, value) for key, value in protocol if key != "env.tasks"))
    return len(without_tasks) == 1


def add_comparison(page: Page, comparison: Comparison, cfg: ReportConfig) -> None:
    """Add a comparison to a page: success, learning curves, cost, routing and interference."""
    folder = page.folder
    costs = _costs(comparison, cfg.allow)
    page.heading("Protocol")
    page.text(protocol_line(comparison))
    page.text(budget_line(comparison))
    for group in comparison.groups:
        if unequal := unequal_line(group):
            page.note(unequal)
    for line in comparison.left_out:
        page.note(f"Left out: {line}")
    page.heading("Success")
    page.table(tables.success(comparison))
    page.picture(
        figures.intervals(comparison, folder / "success.png"), "Success per model, with intervals"
    )
    page.table(tables.per_task(comparison))
    page.picture(
        figures.heat_map(comparison, folder / "tasks.png"),
        "Success per model and task, mean over seeds",
    )
    page.table(tables.per_seed(comparison))
    tables.readme(comparison).write(folder)
    if len(comparison.groups) > 1:
        page.heading("Probability of improvement")
        page.table(tables.improvements(comparison))
        page.picture(
            figures.improvement_matrix(comparison, folder / "improvement.png"),
            "Probability of improvement",
        )
    page.heading("Learning")
    if machines := machines_line(comparison):
        page.note(machines)
    during, final = (comparison.protocol[key] for key in GOALS)
    goals = "" if during == final else f"; {during} goals per task in training, {final} at the end"
    for over_time, name in ((False, "curves"), (True, "curves_over_time")):
        path = figures.learning_curves(comparison, folder / f"{name}.png", over_time)
        over = "training time" if over_time else "environment steps"
        page.picture(
            path,
            f"Success over {over}: IQM over seeds of the task mean, with 95 % bootstrap"
            f" bands{goals}",
        )
    page.heading("Efficiency and cost")
    page.table(tables.efficiency(comparison, cfg.level, lambda group: costs.get(group.label)))
    sizes = {label: one.actor + one.critics for label, one in costs.items()}
    page.picture(
        figures.capacity(comparison, sizes, folder / "capacity.png"), "Success against parameters"
    )
    add_internals(page, comparison)


def add_internals(page: Page, comparison: Comparison) -> None:
    """Add routing entropy and gradient agreement over training, if the runs logged them."""
    entropy = {routing_entropy(layer): f"layer {layer}" for layer in range(1, MOST_LAYERS + 1)}
    label = "entropy of routing, nats"
    entropies = figures.metric_curves(
        comparison, lambda group: entropy, label, page.folder / "entropy.png"
    )
    label = "cosine between tasks' gradients, mean over pairs"
    cosines = figures.metric_curves(
        comparison, _cosines, label, page.folder / "interference.png", mark=0.0
    )
    if entropies or cosines:
        page.heading("Routing and gradients")
    page.picture(
        entropies, "Entropy of the routing probabilities, mean over states, tasks and seeds"
    )
    page.picture(
        cosines, "Cosine between the tasks' gradients, mean over seeds; below zero they conflict"
    )


def _cosines(group: Group) -> dict[str, str]:
    """Return the metrics of gradient agreement with their titles."""
    return {f"gradients/mean_cosine/{network}": network for network in ("actor", "critic")}


def _costs(comparison: Comparison, allow: Sequence[str]) -> dict[str, cost.Cost]:
    """Return the cost of each group whose networks can be built."""
    costs = {}
    for group in comparison.groups:
        if counted := cost.of_run(group.runs[0], allow):
            costs[group.label] = counted
    return costs
