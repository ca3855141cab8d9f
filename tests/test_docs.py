"""The documentation: links lead somewhere, and the site's navigation lists every page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from softmod.config.groups import GROUPS, options

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
NAMES = {page.relative_to(ROOT).as_posix(): page for page in [ROOT / "README.md", *PAGES]}


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as MkDocs and most forges make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
        for heading in HEADING.findall(text)
    }


def broken(page: Path) -> Iterator[str]:
    """Yield the links and snippets of a page that lead nowhere."""
    for snippet in SNIPPET.findall(page.read_text()):
        if not (ROOT / snippet).is_file():
            yield snippet
    for link in LINK.findall(CODE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if link.startswith(("http://", "https://")):
            continue
        target = page.parent / path if path else page
        known = target.suffix != ".md" or not anchor or anchor in anchors(target)
        if not target.exists() or not known:
            yield link


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str):
    assert not list(broken(NAMES[name]))


def unquoted(text: str) -> Iterator[str]:
    """Yield the command lines of a page that zsh would not pass on as they are."""
    for block in re.findall(r"^ *```(?:sh|bash)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            bare = re.sub(r"\"[^\"]*\"|'[^']*'|(?:^|\s)#.*", "", line)
            if re.search(r"[\[\]*?]|=~|=\(", bare):
                yield line


@pytest.mark.parametrize("name", NAMES)
def test_command_lines_quote_what_a_shell_would_expand(name: str):
    assert not list(unquoted(NAMES[name].read_text()))


def test_a_bare_bracket_is_found():
    text = 'A.\n```sh\ntrain "a=[1]"  # [x]\ntrain a=[1]\nls *.md\n```\n[a](b)\n'
    assert list(unquoted(text)) == ["train a=[1]", "ls *.md"]


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](page.md#a-title) [b](page.md#b) [c](c.md) `[d](d.md)`\n")
    assert list(broken(page)) == ["page.md#b", "c.md"]


def listed(nav: object) -> Iterator[str]:
    """Yield the pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for part in nav.values():
            yield from listed(part)
    elif isinstance(nav, list):
        for part in nav:
            yield from listed(part)


def test_the_navigation_lists_every_page_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = [page.relative_to(DOCS).as_posix() for page in PAGES]
    assert sorted(listed(nav)) == sorted(pages)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_installed_from_an_index(name: str):
    """The package is in none: extras are installed from a clone."""
    assert not re.search(r"pip install [^\n]*softmod\b", NAMES[name].read_text())


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_option_and_key(hooks: ModuleType):
    shown = hooks.groups()
    for group in GROUPS:
        assert f"### {group}\n" in shown
        for option in options(group):
            assert re.search(rf"^\| (\*\*)?`{option}`(\*\*)? \| \S", shown, re.MULTILINE), option
    for name in ("soft_modular_residual", "fast", "quickstart"):
        assert f"**`{name}`**" in shown
    shown = hooks.keys()
    assert "| `discount` | `0.98` | number in [0, 1] |" in shown
    assert "| `resume` | `auto` | `auto`, `must`, `never`, `weights` |" in shown
    assert "`num_experts`" in hooks.networks()
    assert "`atoms`" in hooks.heads()
    assert "`eval/success_rate/<task>`" in hooks.metrics()
