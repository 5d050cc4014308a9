"""The list of deliberate faults is applicable and complete, and its runner reports what survives."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FAULTS: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("faults.yaml").read_text(encoding="utf-8"))

# What a campaign's numbers and its safety stand on, and the files that hold it.
AREAS = {
    "objective": ("update_lora/objective.py", "update_lora/grpo.py", "update_lora/nft.py", "update_lora/learner.py"),
    "advantages": ("update_lora/advantages.py", "update_lora/plan.py"),
    "training state": ("update_lora/state.py",),
    "sampling": ("policy/sampling.py", "generate_rollouts/plan.py"),
    "seeds": ("schema/seeds.py",),
    "loading of the policy": ("policy/at.py", "policy/base_files.py", "policy/fingerprint.py", "policy/loading.py"),
    "adapters": ("policy/adapters.py", "policy/adapter_files.py", "policy/lora.py"),
    "calibration": ("score_rollouts/calibration.py", "score_rollouts/rewards.py"),
    "judge methods": ("judge/methods",),
    "requests": ("judge/requests.py", "judge/client.py", "judge/endpoint.py"),
    "limiter": ("judge/limiter.py",),
    "parsing": ("judge/parsing.py", "judge/forms.py", "judge/relaxed.py", "judge/values.py"),
    "storage": (
        "storage/local.py",
        "storage/s3.py",
        "storage/s3_requests.py",
        "storage/bids.py",
        "storage/shards.py",
        "storage/manifests.py",
    ),
    "rollouts": ("storage/rollouts.py", "storage/groups.py"),
    "sources of the runtime": ("storage/runtime.py",),
    "contract": ("runtime/contract.py", "runtime/arguments.py", "runtime/executor_input.py", "runtime/outputs.py"),
    "target of a run": ("shard_dataset/run_target.py",),
    "measures": ("layers/measure.py", "layers/layerd.py", "layers/stack.py"),
    "decomposing pictures": ("decompose", "layers/restore.py", "policy/inference.py"),
    "statistics": ("evaluate_adapter/statistics.py",),
    "publishing": ("publish_adapter",),
    "settings of the cluster": ("pipelines/cluster.py",),
}


def test_every_fault_changes_what_is_in_its_file_once() -> None:
    stale = {}
    for fault in FAULTS:
        path = ROOT / fault["file"]
        count = path.read_text(encoding="utf-8").count(fault["old"]) if path.is_file() else 0
        if count != 1 or fault["new"] == fault["old"]:
            stale[fault["name"]] = f"{count} times in {fault['file']}"
    assert stale == {}


def test_the_tests_of_every_fault_exist() -> None:
    functions: dict[str, set[str]] = {}
    missing = []
    for fault in FAULTS:
        assert fault["tests"], fault["name"]
        for test in fault["tests"]:
            file, _, name = test.partition("::")
            if file not in functions:
                tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
                functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            if name and name not in functions[file]:
                missing.append(f"{fault['name']}: {test}")
    assert missing == []


def test_names_are_unique_and_faults_are_many() -> None:
    names = [fault["name"] for fault in FAULTS]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    assert len(names) >= 60


@pytest.mark.parametrize("area", AREAS)
def test_every_area_has_faults(area: str) -> None:
    prefixes = tuple(name if name.startswith("pipelines/") else f"components/{name}" for name in AREAS[area])
    assert all((ROOT / prefix).exists() for prefix in prefixes)
    assert sum(fault["file"].startswith(prefixes) for fault in FAULTS) >= 2


# -------------------------------------------------------------------------------------------------------------- runner

TOY = {
    "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '--import-mode=importlib'\n",
    "components/__init__.py": "",
    "components/sums.py": "def add(a, b):\n    return a + b\n\n\ndef double(a):\n    return 2 * a\n",
    "tests/room/test_sums.py": (
        "from layerloop.components.sums import add, double\n\n\n"
        "def test_sums():\n    assert add(2, 3) == 5\n\n\n"
        "def test_twice():\n    assert double(2) == 4\n"
    ),
}
SUMS = "tests/room/test_sums.py"


def fault(name: str, old: str, new: str, *tests: str) -> dict[str, Any]:
    return {"name": name, "file": "components/sums.py", "old": old, "new": new, "tests": list(tests or [SUMS])}


def checkout(root: Path, *faults: dict[str, Any]) -> Path:
    """A checkout of one module with two tests, and a list of faults."""
    for name, text in {**TOY, "tests/mutants/faults.yaml": yaml.safe_dump(list(faults))}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def run(root: Path, *arguments: str) -> tuple[int, list[str]]:
    """(exit status, lines) of the runner."""
    command = [sys.executable, str(ROOT / "tests/mutants"), "--root", str(root), "--jobs", "1", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return result.returncode, (result.stdout + result.stderr).splitlines()


def test_what_survives_and_what_is_stale_is_reported_with_status_1(tmp_path: Path) -> None:
    root = checkout(
        tmp_path,
        fault("sign", "a + b", "a - b"),
        fault("unwatched", "a + b", "a - b", f"{SUMS}::test_twice"),
        fault("gone", "a * b", "a / b"),
        fault("not-python", "2 * a", "2 *", f"{SUMS}::test_twice"),
    )
    before = (root / "components/sums.py").read_bytes()
    status, lines = run(root)
    assert status == 1
    assert lines[-2].startswith("2 of 4 faults caught")
    assert lines[-1] == "not caught: unwatched (survived), gone (stale)"
    assert "gone: its old line is in components/sums.py 0 times, not once" in lines
    assert (root / "components/sums.py").read_bytes() == before


def test_what_was_caught_is_not_run_again_until_something_changes(tmp_path: Path) -> None:
    root = checkout(tmp_path, fault("sign", "a + b", "a - b"), fault("factor", "2 * a", "3 * a"))
    status, lines = run(root, "--part", "1/2")
    assert (status, lines[-2].split()) == (0, ["1/1", "caught", "sign"])
    status, lines = run(root)
    assert (status, lines[-2].split()) == (0, ["1/1", "caught", "factor"])
    assert lines[-1].startswith("2 of 2 faults caught")
    (root / SUMS).write_text(TOY[SUMS].replace("assert double(2) == 4", "pass"))
    status, lines = run(root)
    assert status == 1
    assert lines[-1] == "not caught: factor (survived)"


def test_a_test_that_fails_anyway_catches_nothing(tmp_path: Path) -> None:
    root = checkout(tmp_path, fault("sign", "a + b", "a - b"))
    (root / SUMS).write_text(TOY[SUMS].replace("== 5", "== 6"))
    status, lines = run(root)
    assert status == 1
    assert "error: tests of tests/room fail without any fault, so they catch none: repair them" in lines
    assert lines[-1] == "not caught: sign (no verdict)"


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--only", "sing"], "error: --only sing is not in faults.yaml"),
        (["--part", "5/4"], "error: --part 5/4 is not K/N with 1 <= K <= N"),
    ],
)
def test_a_selection_of_nothing_is_refused(tmp_path: Path, arguments: list[str], line: str) -> None:
    assert run(checkout(tmp_path, fault("sign", "a + b", "a - b")), *arguments) == (1, [line])
