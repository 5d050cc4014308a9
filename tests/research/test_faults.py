"""Faults to unlearn: each kind is what its name says, and they are trained into an adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.flags import blank, duplicate, flags_of, glazed
from layerloop.components.layers.stack import composite
from layerloop.components.policy.adapters import PEFT_WEIGHTS, read_adapter
from layerloop.components.research import faults

STACKS = [
    stack
    for layers in (2, 3, 4)
    for stack in render_sketches(np.random.default_rng(5), count=12, layers=layers, size=(64, 64))
]


def of_kind(kind: str, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    monkeypatch.setattr(faults, "KINDS", {kind: 1.0})
    rng = np.random.default_rng(1)
    return [faults.spoil(rng, stack) for stack in STACKS]


def test_what_is_left_in_the_background_leaves_its_layer_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    for stack, spoiled in zip(STACKS, of_kind("left", monkeypatch), strict=True):
        gone = blank(spoiled)
        assert gone[1:].any() and not gone[0]
        assert np.array_equal(spoiled[1:][~gone[1:]], stack[1:][~gone[1:]]), "other layers stay as they are"
        kept = np.abs(composite(stack)[..., :3].astype(int) - composite(spoiled)[..., :3]).mean(-1) <= 1
        assert kept.mean() > 0.6, "the image is the same, but where the order of overlapping layers changed"


def test_a_veil_is_glazed(monkeypatch: pytest.MonkeyPatch) -> None:
    for stack, spoiled in zip(STACKS, of_kind("veil", monkeypatch), strict=True):
        assert glazed(spoiled)[1:].sum() == 1 + np.delete(glazed(stack[1:]), _changed(stack, spoiled)).sum()
        assert flags_of(spoiled, composite(stack)).bad.any()


def test_a_copy_is_a_duplicate(monkeypatch: pytest.MonkeyPatch) -> None:
    for stack, spoiled in zip(STACKS, of_kind("copy", monkeypatch), strict=True):
        source = composite(stack)[..., :3]
        assert duplicate(spoiled, source)[1 + _changed(stack, spoiled)]


def _changed(stack: np.ndarray, spoiled: np.ndarray) -> int:
    """Which upper layer was replaced, counted from the first above the background."""
    (index,) = [n for n in range(1, len(stack)) if not np.array_equal(stack[n], spoiled[n])]
    return index - 1


def test_its_adapter_is_one_of_the_tiny_policy_and_trained(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    faults.train_adapter_of_faults(out, work=tmp_path / "work", steps=2, designs=6)
    trained = read_adapter(out)
    assert {key.replace(".lora_B.", ".lora_A.") for key in trained.state} <= set(trained.state)
    assert all(value.any() for value in trained.state.values()), "B starts at zero"
    written = (out / PEFT_WEIGHTS).stat().st_mtime_ns
    faults.train_adapter_of_faults(out, work=tmp_path / "work", steps=2, designs=6)
    assert (out / PEFT_WEIGHTS).stat().st_mtime_ns == written, "what is there is kept"
