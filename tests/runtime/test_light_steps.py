"""What a light pod never pays for: torch and its friends, which take seconds and gigabytes."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

from layerloop import components
from layerloop.components.schema.steps import STEPS

HEAVY = ("torch", "diffusers", "transformers", "peft", "kfp")
LIGHT = ("schema", "storage", "runtime", "judge", "shard_dataset", "score_rollouts")  # packages of light steps

IMPORT = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
print(*(heavy for heavy in sys.argv[1].split(",") if heavy in sys.modules))
"""

START = """
import runpy, sys
heavy, module = sys.argv[1], sys.argv[2]
sys.argv = [module, "--help"]
try:
    runpy.run_module(module, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
print("heavy:", *(name for name in heavy.split(",") if name in sys.modules))
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_of(package: str) -> list[str]:
    """Every module of a package but its declaration for Kubeflow, which only pipelines import."""
    path = [f"{folder}/{package}" for folder in components.__path__]
    name = f"{components.__name__}.{package}"
    found = [f"{name}.{module.name}" for module in pkgutil.iter_modules(path)]
    return [name, *(module for module in found if not module.endswith((".component", ".__main__")))]


@pytest.mark.parametrize("package", LIGHT)
def test_no_module_of_a_light_step_imports_torch(package: str) -> None:
    modules = modules_of(package)
    assert len(modules) > 1
    assert python(IMPORT, ",".join(HEAVY), *modules).split() == []


@pytest.mark.parametrize("step", STEPS)
def test_every_step_starts_without_torch(step: str) -> None:
    out = python(START, ",".join(HEAVY), f"layerloop.components.{step}")
    assert "--campaign" in out
    assert out.splitlines()[-1].strip() == "heavy:"


def test_the_check_itself_notices_a_heavy_import() -> None:
    assert python(IMPORT, "json,fractions", "fractions").split() == ["fractions"]
