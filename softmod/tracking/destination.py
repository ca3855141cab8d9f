"""Destination of a run's upload: store, experiment, name and sweep, in its `tracking.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softmod.config.schema import TrackingConfig
from softmod.errors import ConfigError
from softmod.system.files import write_json
from softmod.tracking import mlflow_store as store
from softmod.tracking.descriptions import run_name
from softmod.tracking.record import Record
from softmod.tracking.redact import redacted, without_passwords

DESTINATION = "tracking.json"


def save(folder: Path, tracking: TrackingConfig, metadata: Mapping[str, Any]) -> None:
    """Write the destination of a run, without passwords.

    Args:
        folder: the run's folder.
        tracking: configuration of the store.
        metadata: `experiment` and `run_name`, and `sweep` (`command.sweep_identity`) or None.

    Raises:
        OSError: it cannot be written.
    """
    values = {
        "uri": store.saved_uri(tracking.uri, folder),
        "sweep": metadata.get("sweep"),
        "experiment": metadata["experiment"],
        "run_name": metadata["run_name"],
    }
    write_json(folder / DESTINATION, without_passwords(values))


def load(folder: Path, record: Record) -> dict[str, Any]:
    """Return store, experiment, name and sweep of a run, as training saved them.

    A run that was trained without MLflow goes to the default store.

    Raises:
        ConfigError: the saved URI lacks its password, and MLFLOW_TRACKING_URI does not supply it.
    """
    try:
        saved = json.loads((folder / DESTINATION).read_text(encoding="utf-8"))
        names = ("uri", "sweep", "experiment", "run_name")
        destination: dict[str, Any] = {name: saved[name] for name in names}
        destination["uri"] = store.located_uri(destination["uri"], folder)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        destination = {
            "uri": store.store_uri(None),
            "sweep": None,
            "experiment": str(record.params.get("env.name", "softmod")),
            "run_name": run_name(record.params) or f"{folder.absolute().parent.name}/{folder.name}",
        }
    if "***" not in destination["uri"]:
        return destination
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if redacted(uri) != destination["uri"]:
        raise ConfigError(
            f"{folder}: set MLFLOW_TRACKING_URI to {destination['uri']} with its password"
        )
    return destination | {"uri": uri}
