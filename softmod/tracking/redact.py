"""Redaction of passwords in everything that is stored or shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SECRETS = (
    (re.compile(r"(://)(?:[^\s:/@]*:\S*|[^\s/@]+)@"), r"\1***@"),
    (
        re.compile(
            r"([?&;](?!viewStateShareKey=)"  # of the dashboard's address: the name of a view
            r"(?:\w*password|passwd|pwd|\w*token|\w*secret|\w*key)=)[^&\s'\"]+",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
)


def redacted(text: str) -> str:
    """Return the text with user names, passwords and tokens in URIs replaced by `***`."""
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


def without_passwords(value: Any) -> Any:
    """Return nested values with each string in them redacted."""
    if isinstance(value, Mapping):
        return {key: without_passwords(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_passwords(item) for item in value]
    return redacted(value) if isinstance(value, str) else value
