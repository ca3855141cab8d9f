"""Compilation of the kernels: once, into the cache folder, and optional for runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from softmod.config.compose import compose, typed
from softmod.experiment import resources as parts
from softmod.kernels import library

WRONG = {  # errors such as a compiler might make, in one function each
    "relu": ("narrow_##X(h < 0 ? 0 : h)", "narrow_##X(h < 0 ? 0 : h + 1)"),
    "no relu": (
        "out[i] = narrow_##X((row[i] - middle) * scale);",
        "out[i] = narrow_##X(row[i] * scale);",
    ),
    "gradient": ("- h[i] * along", "+ h[i] * along"),
    "bfloat16": ("rounded = (bits + 0x7fff", "rounded = (bits + 0xffffff"),
}


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Start like a new process, with an empty cache folder."""
    from softmod.kernels import norm

    if not library.available():
        pytest.skip("no C compiler")
    memories = (library.library, library.available, norm._function)
    for memory in memories:
        memory.cache_clear()
    monkeypatch.setenv("SOFTMOD_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    for memory in memories:
        memory.cache_clear()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_it_is_compiled_once(anew: Path, monkeypatch: pytest.MonkeyPatch):
    assert library.available()
    (kept,) = anew.iterdir()
    assert kept.name == f"kernels-{library.key()}.so"
    library.library.cache_clear()
    monkeypatch.setattr(library, "_compile", lambda _: pytest.fail("compiled again"))
    library.library()


def test_a_damaged_library_is_compiled_again(anew: Path):
    anew.mkdir()
    path = anew / f"kernels-{library.key()}.so"
    path.write_bytes(b"\x7fELF")
    assert library.available()
    assert path.stat().st_size > 1000


def test_where_nothing_can_be_kept_it_is_compiled_each_time(
    anew: Path, caplog: pytest.LogCaptureFixture
):
    anew.write_text("a file where the folder should be")
    assert library.available()
    assert "cannot be kept" in caplog.text


def test_processors_and_sources_have_libraries_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    key = library.key()
    monkeypatch.setattr(library, "_features", lambda: "flags: other")
    assert library.key() != key
    monkeypatch.undo()
    assert library.key() == key
    monkeypatch.setattr(library, "SOURCE", tmp_path / "other.c")
    (tmp_path / "other.c").write_text("int other;")
    assert library.key() != key


def test_a_library_that_others_could_have_written_is_compiled_again(
    anew: Path, caplog: pytest.LogCaptureFixture
):
    assert library.available()
    (kept,) = anew.iterdir()
    kept.chmod(0o666)
    library.library.cache_clear()
    library.library()
    assert "could have written it" in caplog.text
    assert kept.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("echo 'kernels.c:1: error: no' >&2; exit 1", "fails (kernels.c:1: error: no)"),
        ("exit 3", "fails (exit code 3)"),
        ('while [ "$1" != -o ]; do shift; done; echo junk > "$2"', "cannot be loaded"),
    ],
)
def test_a_compiler_that_fails_is_done_without(
    does: str,
    told: str,
    anew: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    anew.mkdir()
    monkeypatch.setenv("CC", script(anew / "compiler", does))
    with caplog.at_level("INFO"):
        assert not library.available()
    assert told in caplog.text


def test_without_a_compiler_it_is_done_without(anew: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(anew))
    assert not library.available()
    with pytest.raises(library.CompilerError, match="no C compiler"):
        library.library()
    monkeypatch.setenv("CC", "an open ' quote")
    library.library.cache_clear()
    with pytest.raises(library.CompilerError, match="No closing quotation"):
        library.library()
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    library.library.cache_clear()
    with pytest.raises(library.CompilerError, match="no-such-compiler cannot be run"):
        library.library()


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_library_that_computes_something_else_is_refused(
    wrong: tuple[str, str],
    anew: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
):
    source = library.SOURCE.read_text()
    assert wrong[0] in source
    (tmp_path / "wrong.c").write_text(source.replace(*wrong))
    monkeypatch.setattr(library, "SOURCE", tmp_path / "wrong.c")
    assert not library.available()
    assert "results differ from PyTorch's" in caplog.text


@pytest.mark.usefixtures("compiler")
def test_a_run_keeps_to_what_it_began_with():
    auto, off = (
        typed(compose(["fabric=cpu", f"fabric.kernels={wanted}"])) for wanted in ("auto", "off")
    )
    assert parts.fused(auto)
    assert parts.fused(auto, {"seed": 0, "fused": "0123"})
    assert not parts.fused(auto, {"seed": 0, "fused": None})
    assert not parts.fused(auto, {"seed": 0})  # a run that started before kernels existed
    assert not parts.fused(off)
    assert not parts.fused(off, {"fused": "0123"})


@pytest.mark.usefixtures("compiler")
def test_the_source_compiles_without_warnings(tmp_path: Path):
    name = next((name for name in library.COMPILERS if shutil.which(name)), None)
    if name is None:
        pytest.skip("another compiler, named by $CC")
    line = [
        name,
        "-Wall",
        "-Wextra",
        "-Werror",
        *library.FLAGS,
        "-o",
        str(tmp_path / "k.so"),
        str(library.SOURCE),
    ]
    done = subprocess.run([*line, "-lm"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_processes_may_compile_at_once(anew: Path):
    code = "from softmod import kernels; print(kernels.available())"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in started] == ["True", "True"]
    assert len(list(anew.iterdir())) == 1
