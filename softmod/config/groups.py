"""Configuration groups and their options, which are the files of `conf/`."""

from __future__ import annotations

from pathlib import Path

GROUPS = (
    "env",
    "model",
    "network",
    "critic_head",
    "algorithm",
    "optimizer",
    "run",
    "workers",
    "fabric",
    "tracking",
    "experiment",
    "variant",
    "sweep",
)


def conf_folder() -> Path:
    """Return the path of `conf/`: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def options(group: str, config_dir: str | None = None) -> list[str]:
    """List the options of a group: the files of `conf/`, and those of a folder of the user."""
    folders = [conf_folder(), *([Path(config_dir)] if config_dir else [])]
    files = [path for folder in folders for path in (folder / group).glob("*.yaml")]
    return sorted({path.stem for path in files if path.is_file()})
