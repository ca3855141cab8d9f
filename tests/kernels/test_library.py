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
from softmod.kernels import binding, library
from softmod.kernels.switch import NORM, UPDATE, VERSIONS

WRONG = {  # errors such as a compiler might make, in one function each
    NORM: {
        "relu": ("narrow_##X(h < 0 ? 0 : h)", "narrow_##X(h < 0 ? 0 : h + 1)"),
        "no relu": (
            "out[i] = narrow_##X((row[i] - middle) * scale);",
            "out[i] = narrow_##X(row[i] * scale);",
        ),
        "gradient": ("- h[i] * along", "+ h[i] * along"),
        "bfloat16": ("rounded = (bits + 0x7fff", "rounded = (bits + 0xffffff"),
    },
    UPDATE: {
        "norm": ("variance < 0 ? 0 : variance", "variance < 0 ? variance : 0"),
        "end of a row": ("square += row[i] * row[i]", "square += row[i]"),
        "gradient of norm": ("- total - *(wide *)(h + i) * dot", "- total"),
        "sums": ("if (!first) value +=", "value +="),
        "sums of blocks": ("+ partial[k * n + i]", "+ partial[i]"),
        "relu": ("out[i] = NARROW(h < 0 ? 0 : h);", "out[i] = NARROW(h);"),
        "product": ("total[i] += g * WIDE(x[at + i]);", "total[i] += g;"),
        "softmax": ("row[r * n + i] /= sum", "row[r * n + i] /= n"),
        "mix": ("total[i] += w * WIDE(from[i])", "total[i] += WIDE(from[i])"),
        "gradient of mix": ("total[i] += w * g[t][i]", "total[i] -= w * g[t][i]"),
        "exp": ("p = p * r + 5.0000001201e-1f", "p = p * r + 5.1e-1f"),
        "log": ("p = p * z + 3.3333331174e-1f", "p = p * z + 3.4e-1f"),
        "tanh": ("large = x < 0 ? -large : large", "large = x < 0 ? large : large"),
        "sample": ("raw[i] - 0.918938533204672742f", "raw[i]"),
        "gradient of samples": ("along[i] * 2 * a", "along[i] * a"),
        "target": ("above[n - 1] += above[n];", "above[n] = 0, above[n - 1] = 0;"),
        "cross-entropy": ("total / batch * weight[k % tasks]", "total / batch"),
        "gradient of cross-entropy": ("mass * row[i] - wanted[i]", "row[i]"),
        "value": ("own[at] / critics", "own[at]"),
        "gradient of values": ("(support[i] - own[r])", "support[i]"),
        "observations": ("x < -limit ? -limit : x", "x"),
        "rewards": ("(most[t] + temperature[t] * entropy)", "most[t]"),
        "spread": ("divisor < least ? least : divisor", "1"),
        "policy": ("each * temperature[t]", "each"),
        "norms": ("= dot_of(g, g, n)", "= total_of(g, n)"),
        "clipping": ("clip > 1 ? 1 : clip", "1"),
        "moments": ("beta2 * v[i] + rest2 * d * d", "v[i] + rest2 * d * d"),
        "decay": ("decoupled ? 1 - rate * decay : 1", "1"),
        "targets of a step": ("smoothing * (p[i] - slow[i])", "p[i] - slow[i]"),
        "targets": ("smoothing * (source[k][i]", "(source[k][i]"),
        "finite": ("all &= fabsf(values[k][i]) < INFINITY", "all = 1"),
        "kept": ("memcpy(kept[count + k] + at, m", "memcpy(kept[count + k] + at, v"),
        "temperatures": ("/ batch + entropy) / tasks", "/ batch) / tasks"),
        "weights": ("out[i] /= total / n", "out[i] /= total"),
        "embedding": ("norm < least ? 0 : dot_of(grad, x, n)", "0 * dot_of(grad, x, n)"),
    },
}


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Start like a new process, with an empty cache folder."""
    if not library.available():
        pytest.skip("no C compiler")
    memories = (library.library, library.available, binding.function)
    for memory in memories:
        memory.cache_clear()
    monkeypatch.setenv("SOFTMOD_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    for memory in memories:
        memory.cache_clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile with few optimizations, which takes a third of the time."""
    monkeypatch.setattr(library, "FLAGS", ("-O1", *library.FLAGS[1:]))


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_it_is_compiled_once(anew: Path, monkeypatch: pytest.MonkeyPatch):
    assert library.available()
    (kept,) = anew.iterdir()
    assert kept.name == f"kernels-{library.key()}.so"
    library.library.cache_clear()
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    library.library(UPDATE)


@pytest.mark.usefixtures("quick")
def test_a_damaged_library_is_compiled_again(anew: Path):
    anew.mkdir()
    path = anew / f"kernels-{library.key()}.so"
    path.write_bytes(b"\x7fELF")
    assert library.available()
    assert path.stat().st_size > 1000


@pytest.mark.usefixtures("quick")
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
    assert library.key(NORM) != key
    monkeypatch.setitem(library.SOURCES, UPDATE, tmp_path / "other.c")
    (tmp_path / "other.c").write_text("int other;")
    assert library.key() != key


@pytest.mark.usefixtures("quick")
def test_a_library_that_others_could_have_written_is_compiled_again(
    anew: Path, caplog: pytest.LogCaptureFixture
):
    assert library.available()
    (kept,) = anew.iterdir()
    kept.chmod(0o666)
    library.library.cache_clear()
    library.library(UPDATE)
    assert "could have written it" in caplog.text
    assert kept.stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("quick")
def test_a_compiler_without_openmp_makes_a_library_for_one_thread(
    anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    compiler = " ".join(library._compiler())
    refuse = 'for word; do [ "$word" = -fopenmp ] && { echo "no -fopenmp" >&2; exit 1; }; done'
    monkeypatch.setenv("CC", script(tmp_path / "cc", f'{refuse}; exec {compiler} "$@"'))
    with caplog.at_level("INFO"):
        assert library.available()
    assert "one thread" in caplog.text
    assert "no -fopenmp" in caplog.text
    (kept,) = anew.iterdir()
    assert kept.name == f"kernels-{library.key()}-one-thread.so"
    library.library.cache_clear()
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    library.library(UPDATE)


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
        library.library(UPDATE)
    monkeypatch.setenv("CC", "an open ' quote")
    library.library.cache_clear()
    with pytest.raises(library.CompilerError, match="No closing quotation"):
        library.library(UPDATE)
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    library.library.cache_clear()
    with pytest.raises(library.CompilerError, match="no-such-compiler cannot be run"):
        library.library(UPDATE)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_library_with_few_optimizations_is_accepted(version: int, anew: Path):
    """Check that the next test's libraries are refused for their errors only."""
    assert library.FLAGS[0] == "-O1"
    assert library.available(version)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("version", "wrong"),
    [
        pytest.param(version, wrong, id=f"{version}, {name}")
        for version, errors in WRONG.items()
        for name, wrong in errors.items()
    ],
)
def test_a_library_that_computes_something_else_is_refused(
    version: int,
    wrong: tuple[str, str],
    anew: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
):
    source = library.SOURCES[version].read_text()
    assert wrong[0] in source
    (tmp_path / "wrong.c").write_text(source.replace(*wrong))
    monkeypatch.setitem(library.SOURCES, version, tmp_path / "wrong.c")
    assert not library.available(version)
    assert "results differ from PyTorch's" in caplog.text


@pytest.mark.usefixtures("compiler")
def test_a_run_keeps_to_what_it_began_with():
    auto, off = (
        typed(compose(["fabric=cpu", f"fabric.kernels={wanted}"])) for wanted in ("auto", "off")
    )
    assert parts.fused(auto) == UPDATE
    assert parts.fused(auto, {"seed": 0, "fused": "0123"}) == NORM  # before there were versions
    assert parts.fused(auto, {"seed": 0, "fused": "0123", "kernels": NORM}) == NORM
    assert parts.fused(auto, {"seed": 0, "fused": "0123", "kernels": UPDATE}) == UPDATE
    assert not parts.fused(auto, {"seed": 0, "fused": None})
    assert not parts.fused(auto, {"seed": 0})  # a run that started before kernels existed
    assert not parts.fused(off)
    assert not parts.fused(off, {"fused": "0123"})


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("version", VERSIONS)
def test_the_source_compiles_without_warnings(version: int, tmp_path: Path):
    name = next((name for name in library.COMPILERS if shutil.which(name)), None)
    if name is None:
        pytest.skip("another compiler, named by $CC")
    line = [
        name,
        "-Wall",
        "-Wextra",
        "-Werror",
        *library.FLAGS,
        "-fopenmp",
        "-o",
        str(tmp_path / "k.so"),
        str(library.SOURCES[version]),
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
