"""The script of `make bench-gpu`, every part of it, at tiny size: what it will do on a GPU it does here. Blocks are
compiled in the slow tests only, since to trace them takes longer than all other parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import __main__ as script
from benchmarks.gpu.model import REAL, TINY, Bench, build
from benchmarks.gpu.parts import PARTS

QUICK = ",".join(name for name in PARTS if name != "compiled")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "gpu.json"
    assert script.main(["--tiny", "--out", str(out), "--only", QUICK]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    found["out"] = out
    return found


@pytest.mark.slow
def test_every_part_is_measured(measured: dict[str, Any]) -> None:
    assert list(measured["parts"]) == QUICK.split(",")
    assert script.main(["--tiny", "--out", str(measured["out"])]) == 0
    found = json.loads(measured["out"].read_text())
    assert list(found["parts"]) == list(PARTS)
    assert found["machine"]["setting"] == "tiny"
    numbers = {name: part["numbers"] for name, part in found["parts"].items()}
    assert numbers["matmul"]["tflops"] > 0
    for part in ("forward", "update"):
        assert set(numbers[part]) == {f"layers_{layers}" for layers in TINY.layers}
    assert set(numbers["attention"]) == {"native_seconds", "_native_math_seconds"}
    assert 0 < numbers["resident"]["busy_share"] <= 1
    assert numbers["resident"]["judge_hidden_fraction"] <= 1
    assert numbers["compiled"]["first_seconds"] > 0
    assert numbers["float8"]["update"]["point_seconds"] > 0


@pytest.mark.slow
def test_rates_are_operations_over_seconds(measured: dict[str, Any]) -> None:
    bench, layers = Bench(TINY, torch.device("cpu")), TINY.layers[-1]
    forward = measured["parts"]["forward"]["numbers"][f"layers_{layers}"]
    assert forward["tflops"] * forward["seconds"] * 1e12 == pytest.approx(bench.forward_operations(layers), rel=0.01)
    update = measured["parts"]["update"]["numbers"][f"layers_{layers}"]
    operations = bench.update_operations(layers, checkpointing=True)
    assert update["tflops"] * update["point_seconds"] * 1e12 == pytest.approx(operations, rel=0.01)
    assert operations > 3 * bench.forward_operations(layers)


def test_what_is_measured_is_kept_and_what_is_left_is_continued(
    measured: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = measured["out"], measured["out"].read_bytes()
    assert script.main(["--tiny", "--out", str(out), "--only", QUICK]) == 0
    assert out.read_bytes() == before
    found = json.loads(before)
    found["parts"].pop("matmul")
    out.write_text(json.dumps(found))
    assert script.main(["--tiny", "--out", str(out), "--minutes", "0"]) == 1
    assert "lacks matmul" in capsys.readouterr().out
    assert script.main(["--tiny", "--out", str(out), "--only", "matmul"]) == 0
    assert json.loads(out.read_text())["parts"].keys() == found["parts"].keys() | {"matmul"}


def test_a_part_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Bench) -> dict[str, Any]:
        raise torch.OutOfMemoryError("80 GB are not enough")

    def broken(_: Bench) -> dict[str, Any]:
        raise ValueError("no such kernel")

    monkeypatch.setattr(script, "PARTS", {"full": full, "broken": broken, "matmul": PARTS["matmul"]})
    assert script.main(["--tiny", "--out", str(tmp_path / "gpu.json")]) == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["full"]["numbers"] == {"out_of_memory": "80 GB are not enough"}
    assert parts["broken"] == {"failed": "ValueError: no such kernel"}
    assert parts["matmul"]["numbers"]["tflops"] > 0


def test_another_machines_file_and_a_machine_without_a_gpu_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"machine": {"device": "NVIDIA H100"}, "parts": {}}))
    assert script.main(["--tiny", "--out", str(out)]) == 2
    assert "name another --out" in capsys.readouterr().err
    assert script.main(["--tiny", "--only", "matmull"]) == 2
    if not torch.cuda.is_available():
        assert script.main([]) == 2
        assert "there is no GPU here" in capsys.readouterr().err


def test_the_real_size_is_the_released_models_and_nothing_of_it_is_left_on_meta() -> None:
    assert REAL.size.parameters == 20_430_407_232
    policy = build(TINY, torch.device("cpu"), "float8")
    modules = (policy.transformer, policy.vae)
    assert not any(tensor.is_meta for module in modules for tensor in (*module.parameters(), *module.buffers()))
