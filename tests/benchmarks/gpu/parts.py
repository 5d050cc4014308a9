"""What is measured, part by part. Each returns numbers whose names end in their unit, or are shares and counts."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from layerloop.components.policy.sampling import Plan, rollout

from .model import Bench

Numbers = dict[str, Any]
STEPS, WINDOW = 10, 4  # of the recipe `paper`: 10 forwards a candidate


def matmul(bench: Bench) -> Numbers:
    """The rate of a large matrix product, which nothing that is built of them exceeds."""
    side, dtype = bench.setting.matmul, bench.setting.dtype
    a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
    seconds = bench.seconds(lambda: a @ b)
    return {"tflops": 2 * side**3 / seconds / 1e12}


def forward(bench: Bench) -> Numbers:
    """One forward pass by layers, without gradients."""
    return _forwards(bench, "plain", bench.setting.layers)


def attention(bench: Bench) -> Numbers:
    """The same with each attention backend, at the most layers; why one is not available, else."""
    policy, layers, found = bench.policy("plain"), bench.setting.layers[-1], {}
    for name in bench.setting.attention:
        try:
            policy.transformer.set_attention_backend(name)
            found[f"{name}_seconds"] = _forward_seconds(bench, "plain", layers)
        except (ValueError, RuntimeError, ImportError) as error:
            found[f"{name}_unavailable"] = " ".join(str(error).split())[:200]
        finally:
            policy.transformer.set_attention_backend("native")
    return found


def sampling(bench: Bench) -> Numbers:
    """One candidate of the paper's recipe, and decoding its layers."""
    policy, side, found = bench.policy("plain"), bench.setting.pixels, {}
    for layers in (bench.setting.layers[0], bench.setting.layers[-1]):
        bench.forget_peak()
        seconds = bench.seconds(lambda layers=layers: sampled(bench, layers), repeats=1)
        final = sampled(bench, layers).final
        found[f"layers_{layers}"] = {
            "seconds": seconds, "forwards": STEPS, "peak_gb": bench.peak_gb(),
            "decode_seconds": bench.seconds(lambda final=final: policy.decode(final, side, side), repeats=1),
        }  # fmt: skip
    return found


def update(bench: Bench) -> Numbers:
    """Forward and backward of one point with gradient checkpointing, by layers."""
    return {f"layers_{layers}": _update(bench, layers, checkpointing=True) for layers in bench.setting.layers}


def update_without_checkpoints(bench: Bench) -> Numbers:
    """The same with all activations kept, for the fewest layers."""
    transformer, layers = bench.policy("plain").transformer, bench.setting.layers[0]
    transformer.disable_gradient_checkpointing()
    try:
        return {f"layers_{layers}": _update(bench, layers, checkpointing=False)}
    finally:
        transformer.enable_gradient_checkpointing()


def resident(bench: Bench) -> Numbers:
    """A small resident iteration with a stand-in judge that serves one group at a time, as slow as sampling: each group
    is judged as soon as it is sampled, and the points are learnt when all are. The GPU's share of the time."""
    groups, size = bench.setting.groups, bench.setting.group_size
    sampled(bench, groups[0])
    judged = _timed(bench, lambda: sampled(bench, groups[len(groups) // 2])) * size  # seconds a group
    todo: queue.Queue[int | None] = queue.Queue()
    done = threading.Event()

    def serve() -> None:
        while todo.get() is not None:
            time.sleep(judged)
        done.set()

    threading.Thread(target=serve, daemon=True).start()
    computing, start = 0.0, time.perf_counter()
    for group, layers in enumerate(groups):
        computing += _timed(bench, lambda layers=layers: [sampled(bench, layers) for _ in range(size)])
        todo.put(group)
    todo.put(None)
    done.wait()
    waited = time.perf_counter()
    for layers in groups:
        computing += _timed(bench, lambda layers=layers: [learnt(bench, layers) for _ in range(size)])
    end = time.perf_counter()
    service = judged * len(groups)
    return {
        "seconds": end - start, "busy_share": computing / (end - start), "judge_service_seconds": service,
        "judge_hidden_fraction": 1 - max(0.0, end - start - computing) / service, "update_seconds": end - waited,
        "candidates": size * len(groups), "points": size * len(groups),
    }  # fmt: skip


def float8(bench: Bench) -> Numbers:
    """Forward and update with the base in float8."""
    found = _forwards(bench, "float8", bench.setting.layers[-1:])
    return found | {"update": _update(bench, bench.setting.layers[-1], checkpointing=True, kind="float8")}


def compiled(bench: Bench) -> Numbers:
    """Forward and update with compiled blocks: seconds of the first calls, which compile, and of later ones."""
    bench.policy("compiled")
    layers = bench.setting.layers[-1]
    first = _timed(bench, lambda: _forward(bench, "compiled", layers))
    other = _timed(bench, lambda: _forward(bench, "compiled", bench.setting.layers[0]))
    found = _forwards(bench, "compiled", bench.setting.layers[-1:])
    update = _update(bench, layers, checkpointing=True, kind="compiled")
    return found | {"first_seconds": first, "first_of_other_layers_seconds": other, "update": update}


PARTS: Mapping[str, Callable[[Bench], Numbers]] = {
    "matmul": matmul, "forward": forward, "update": update, "sampling": sampling, "attention": attention,
    "resident": resident, "update_without_checkpoints": update_without_checkpoints, "float8": float8,
    "compiled": compiled,
}  # fmt: skip


# ---- what the parts have in common


def sampled(bench: Bench, layers: int) -> Any:
    """One candidate's trajectory, as the recipe `paper` samples it."""
    policy, side = bench.policy("plain"), bench.setting.pixels
    condition, noise = bench.condition(layers)
    plan = Plan(policy.sigmas(STEPS, side, side), 0, WINDOW, "flow_sde", (1.0,) * WINDOW, outside="euler")
    return rollout(policy, condition, noise, plan, step_noise=lambda c, j: policy.noise(j, layers, side, side))


def learnt(bench: Bench, layers: int, kind: str = "plain") -> None:
    """The gradient of one point's loss, as large as a surrogate's."""
    policy = bench.policy(kind)  # type: ignore[arg-type]
    condition, noise = bench.condition(layers)
    policy.velocity(noise, torch.tensor([0.9]), condition).square().mean().backward()
    for parameter in policy.trainable_parameters().values():
        parameter.grad = None


@torch.no_grad()
def _forward(bench: Bench, kind: str, layers: int) -> torch.Tensor:
    policy = bench.policy(kind)  # type: ignore[arg-type]
    condition, noise = bench.condition(layers)
    return policy.velocity(noise, 0.9, condition)


def _forward_seconds(bench: Bench, kind: str, layers: int) -> float:
    policy = bench.policy(kind)  # type: ignore[arg-type]
    condition, noise = bench.condition(layers)
    with torch.no_grad():
        return bench.seconds(lambda: policy.velocity(noise, 0.9, condition))


def _forwards(bench: Bench, kind: str, counts: tuple[int, ...]) -> Numbers:
    found = {}
    for layers in counts:
        bench.policy(kind)  # type: ignore[arg-type]
        bench.forget_peak()
        seconds = _forward_seconds(bench, kind, layers)
        rate = bench.forward_operations(layers) / seconds / 1e12
        found[f"layers_{layers}"] = {"seconds": seconds, "tflops": rate, "peak_gb": bench.peak_gb()}
    return found


def _update(bench: Bench, layers: int, *, checkpointing: bool, kind: str = "plain") -> Numbers:
    bench.policy(kind)  # type: ignore[arg-type]
    bench.forget_peak()
    seconds = bench.seconds(lambda: learnt(bench, layers, kind), repeats=2)
    rate = bench.update_operations(layers, checkpointing=checkpointing) / seconds / 1e12
    return {"point_seconds": seconds, "tflops": rate, "peak_gb": bench.peak_gb()}


def _timed(bench: Bench, run: Callable[[], Any]) -> float:
    bench.wait()
    start = time.perf_counter()
    run()
    bench.wait()
    return time.perf_counter() - start
