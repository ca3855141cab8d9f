"""Docstrings open in the imperative."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUESTIONS = {"What", "Whether", "How", "Where", "Which", "When", "Who", "Why"}
NO_VERBS = QUESTIONS | {
    "A", "An", "The", "One", "It", "Its", "This", "That", "These", "Those", "All", "Each", "Every",
    "Of", "In", "On", "By", "From", "With", "Within", "Some", "No", "Everything", "Nothing",
}  # fmt: skip
FILES = sorted([*(ROOT / "softmod").rglob("*.py"), *(ROOT / "docs" / "example").rglob("*.py")])
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def openings(source: str) -> Iterator[tuple[ast.AST, str]]:
    """Yield every function, class and module with a docstring, and the docstring's first word."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)):
            words = (ast.get_docstring(node) or "").split()
            if words:
                yield node, words[0].strip(",.:;")


def faulty(source: str) -> list[str]:
    """Return the names of what has a docstring that opens badly, with its first word."""
    return [
        f"{getattr(node, 'name', 'module')}: {word}"
        for node, word in openings(source)
        if word in (NO_VERBS if isinstance(node, FUNCTIONS) else QUESTIONS)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_verb(path: Path) -> None:
    assert faulty(path.read_text()) == []


def test_a_docstring_that_opens_otherwise_is_seen() -> None:
    source = '"""A module."""\nclass Mine:\n    """Whether."""\n    def f(self): "The sum."\n'
    assert faulty(source) == ["Mine: Whether", "f: The"]
