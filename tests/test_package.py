"""What is installed: the wheel's contents, what an import costs, and that the switch can never break ``import torch``."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import entry_points

import pytest
from entries import ROOT, python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel that is built offline, by the backend alone."""
    where = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(where)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = where.glob("fusion_pass-*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_holds_two_packages_and_no_kernels(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fusion_pass", "fusion_kernels"}


def test_the_wheel_is_typed_and_complete(wheel: list[str]) -> None:
    for package, home in (("fusion_pass", ROOT), ("fusion_kernels", ROOT / "kernels")):
        assert f"{package}/py.typed" in wheel
        for source in (home / package).rglob("*.py"):
            assert source.relative_to(home).as_posix() in wheel


def test_there_is_no_package_named_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_entry_points_are_registered() -> None:
    found = {
        (e.group, e.name): e.value for group in ("torch_dynamo_backends", "torch.backends") for e in entry_points(group=group)
    }
    assert found["torch_dynamo_backends", "flash"] == "fusion_pass.backend:flash_backend"
    assert found["torch.backends", "fusion_pass"] == "fusion_pass.autoload:activate"


@pytest.mark.parametrize("names", ["", "flash_backend, make_backend, last_report"])
def test_importing_the_package_imports_no_inductor(names: str) -> None:
    use = f"from fusion_pass import {names}" if names else "import fusion_pass"
    python(f"{use}; import sys; assert not [m for m in sys.modules if m.startswith('torch._inductor')]")


def test_importing_the_package_alone_does_not_even_import_torch() -> None:
    python("import fusion_pass, sys; assert 'torch' not in sys.modules; assert fusion_pass.__version__ == '0.1.0'")


def test_the_switch_imports_os_and_nothing_else_while_it_is_off() -> None:
    code = (
        "import os, sys; before = set(sys.modules); from fusion_pass import autoload; autoload.activate();"
        "new = set(sys.modules) - before - {'__future__'}; assert new == {'fusion_pass', 'fusion_pass.autoload'}, new"
    )
    for value in ("", "0"):
        python(code, FUSION_PASS=value)


def test_the_switch_costs_nothing_beside_the_import_of_torch_while_it_is_off() -> None:
    code = (
        "import sys, time\n"
        "start = time.perf_counter(); import torch; torch_cost = time.perf_counter() - start\n"
        "def cost():\n"
        "    for name in ('fusion_pass', 'fusion_pass.autoload'): sys.modules.pop(name, None)\n"
        "    start = time.perf_counter()\n"
        "    from fusion_pass import autoload; autoload.activate()\n"
        "    return time.perf_counter() - start\n"
        "print(min(cost() for _ in range(20)) / torch_cost)"
    )
    assert float(python(code).stdout) < 0.01


def test_the_switch_waits_for_inductor_and_steps_aside() -> None:
    python(
        "import sys, torch\n"
        "assert not [m for m in sys.modules if m.startswith('torch._inductor')]\n"
        "finders = [f for f in sys.meta_path if type(f).__module__ == 'fusion_pass.autoload']\n"
        "assert len(finders) == 1\n"
        "import torch._inductor.config as config\n"
        "assert not [f for f in sys.meta_path if type(f).__module__ == 'fusion_pass.autoload']\n"
        "assert type(config.pre_grad_custom_pass).__name__ == 'FusionPass'\n"
        "assert type(config.__loader__).__module__ != 'fusion_pass.autoload'\n",
        FUSION_PASS="1",
    )


def test_a_failure_of_the_switch_is_one_line_and_torch_goes_on() -> None:
    done = python(
        "import sys; sys.modules['fusion_pass.hook'] = None\n"
        "import torch, torch._inductor.config\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)))",
        FUSION_PASS="1",
    )
    assert "tensor([2.])" in done.stdout
    assert "fusion_pass: FUSION_PASS is set, but the pass could not be registered" in done.stderr
