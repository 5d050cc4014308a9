"""Provenance of an evaluation, for `metrics.json` and for the page."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from layerloop.components.evaluate_adapter.cases import Cases
from layerloop.components.layers.truth import differences
from layerloop.components.runtime.distributed import world_size
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import FAULTY, TINY, Recipe
from layerloop.components.storage.final_weights import final_weights

if TYPE_CHECKING:
    from layerloop.components.policy.model import LayeredPolicy


class Clock:
    """Elapsed seconds by activity."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, what: str) -> Iterator[None]:
        """Add the seconds of the block to those of the activity `what`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - start


def notices(cases: Cases) -> list[str]:
    """Notices to read before the numbers."""
    texts = [f"Left out: {count} {reason}." for reason, count in cases.left_out.items()]
    if not cases.of("designs"):
        texts.append(
            "This campaign holds out no designs with known layers. LayerD’s protocol, per-slot L1 and the comparison "
            "of layer 0 with a true background need them and are missing here."
        )
    if not cases.of("pictures"):
        texts.append("This campaign holds out no unlabelled images, so this page is about designs only.")
    return texts


def ground_truth(cases: Cases, recipe: Recipe) -> list[str]:
    """How the designs' true layers were made, in sentences."""
    facts = cases.truth
    texts = []
    if facts.get("rows"):
        texts += differences(recipe.data.designs, facts)
    if given := facts.get("designs", 0) - facts.get("rows", 0):
        texts.append(f"{given} designs came as files of layers, without those that an opaque layer hides altogether.")
    if facts.get("untold"):
        texts.append(
            f"{facts['untold']} designs were sharded by an earlier version of layerloop, which kept hidden layers."
        )
    return texts


def provenance(recipe: Recipe, policy: LayeredPolicy, adapter: Manifest, cases: Cases, clock: Clock) -> dict[str, Any]:
    """Provenance of a comparison: values for `metrics.json`, which the page's settings repeat."""
    import resource

    import torch

    from layerloop.components.policy.inference import Inference

    steps = recipe.evaluation.steps
    if policy.device.type == "cuda":
        machine = torch.cuda.get_device_name(policy.device)
        memory = torch.cuda.max_memory_allocated(policy.device) / 2**30
    else:
        machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if world_size() > 1:
        machine = f"{world_size()} x {machine}"
    sizes = [max(case.size) for case in cases.cases]
    return {
        "campaign": recipe.name,
        "iteration": adapter.iteration,
        "adapter_sha256": final_weights(adapter).sha256,
        "lora": f"rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}",
        "base": model_name(recipe),
        "base_fingerprint": policy.fingerprint,
        "dtype": recipe.model.dtype,
        "prompt": recipe.model.prompt,
        "sampler": "heun",
        "steps": steps,
        "model_calls_per_decomposition": Inference(steps).calls,
        "guidance": False,
        "seed": recipe.seed,
        "longest_side": max(sizes),
        "seconds": {what.replace(" ", "_"): round(seconds, 3) for what, seconds in clock.seconds.items()},
        "machine": machine,
        "peak_memory_gib": round(memory, 2),
        "software": {name: version(name) for name in ("layerloop", "torch", "diffusers")},
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def settings(p: Mapping[str, Any]) -> dict[str, str]:
    """Rows of the page's settings by heading, from `provenance`."""
    sha = (p["adapter_sha256"] or "unknown")[:12]
    calls = p["model_calls_per_decomposition"]
    seconds = ", ".join(f"{what.replace('_', ' ')} {value:.1f} s" for what, value in p["seconds"].items())
    return {
        "Adapter": f"iteration {p['iteration']}, {p['lora']}, sha256 {sha}",
        "Base": f"{p['base']}, {p['dtype']}, fingerprint {p['base_fingerprint'][:12]}",
        "Sampling": f"Heun, {p['steps']} steps ({calls} model calls per decomposition), no guidance, opaque condition",
        "Prompt": f"“{p['prompt']}”",
        "Images": f"longest side {p['longest_side']} px at most",
        "Seeds": f"hashed from campaign seed {p['seed']}, image and layer count; the same for base and adapter",
        "Time": seconds,
        "Machine": f"{p['machine']}, peak memory {p['peak_memory_gib']:.1f} GiB",
        "Software": ", ".join(f"{name} {number}" for name, number in p["software"].items()),
        "Made": p["made"],
    }


def model_name(recipe: Recipe) -> str:
    """Human-readable name of the base."""
    names = {TINY: "the tiny policy", FAULTY: "the tiny policy with faults to unlearn"}
    return names.get(recipe.model.base, recipe.model.base)
