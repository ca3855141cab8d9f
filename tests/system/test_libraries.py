"""Setup of the libraries under the learner, in separate processes where it affects the whole
process.
"""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from softmod.config.compose import compose, typed
from softmod.experiment import resources as parts
from softmod.system import libraries as cpu


def says(code: str) -> str:
    line = [sys.executable, "-c", f"from softmod.system import libraries as cpu; {code}"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="another C library")
def test_the_c_library_takes_the_wish():
    assert says("print(cpu.keep_memory())") == "True"


def test_products_stay_fp32_whichever_library_multiplies():
    on, error = says("print(cpu.fast_products(), cpu.product_error() < cpu.EXACT)").split()
    assert on == str(cpu.better_with_onednn())
    assert error == "True"


@pytest.mark.parametrize(
    ("wanted", "native", "expected"),
    [("auto", True, "bf16-mixed"), ("auto", False, "32-true"), ("32-true", True, "32-true"),
     ("bf16-mixed", False, "bf16-mixed")],
)  # fmt: skip
def test_precision_follows_from_the_processor_where_it_is_left_to_it(
    wanted: str, native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parts, "multiplies_bf16", lambda: native)
    cfg = typed(compose(["fabric=cpu", f"fabric.precision={wanted}"]))
    assert parts.precision(cfg) == expected
    for before in ("32-true", "bf16-mixed"):  # as the run had it, on whatever machine it goes on
        assert parts.precision(cfg, {"precision": before}) == (
            before if wanted == "auto" else wanted
        )


def test_the_recipe_leaves_its_precision_to_the_processor_and_the_published_update_does_not():
    chosen = [
        typed(compose(["env=mt10", f"algorithm={name}"])).fabric.precision
        for name in ("fast", "mtsac", "pcgrad")
    ]
    assert chosen == ["auto", "32-true", "32-true"]
    assert (
        typed(compose(["env=quickstart"])).fabric.precision == "32-true"
    )  # small products are faster so


@pytest.mark.skipif(not cpu.better_with_onednn(), reason="MKL is the fast one here")
def test_onednn_multiplies_when_it_is_let():
    code = (
        "import torch; a = torch.rand(300, 300); b = a @ a; cpu.fast_products();"
        " print(torch.equal(b, a @ a))"
    )
    assert says(code) == "False"  # another library rounds in another order


def test_a_product_that_is_not_fp32_is_refused():
    # as bfloat16
    refused = (
        "cpu.product_error = lambda: 4e-3; print(cpu.allow_onednn(True), cpu.product_library())"
    )
    assert says(refused) == says("print(False, cpu.product_library())")


def test_the_probe_tells_bfloat16_from_fp32():
    draws = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=draws) for _ in range(2))
    exact = a.double() @ b.double()
    rounded = (a.bfloat16() @ b.bfloat16()).double()
    assert (
        cpu.product_error() < cpu.EXACT < float((rounded - exact).abs().max() / exact.abs().max())
    )


@pytest.mark.parametrize(
    ("maker", "faster"), [("GenuineIntel", False), ("", False), ("AuthenticAMD", True)]
)
def test_the_processors_maker_decides(maker: str, faster: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "vendor", lambda: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert cpu.better_with_onednn() == faster
