"""The last lines of a local run: what the adapter changed, as its report calls it, and what to try next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerloop.components.schema.messages import counted
from layerloop.components.storage.campaign import Campaign
from layerloop.pipelines.campaigns import bad_layers
from layerloop.pipelines.job import published_at


def outcome_lines(campaign: Campaign, *, shown: str) -> list[str]:
    """What the adapter of the head changed on what was held out, and a command that takes it.

    Args:
        shown: The campaign's folder or URI as the user would type it.
    """
    head = campaign.head()
    lines = [_changed(bad, what, head) for bad, what in bad_layers(campaign)[:1]]
    if name := published_at(campaign, head):
        counts = campaign.recipe.rollout
        layers = f"--layers {counts.max_layers} " if counts.min_layers == counts.max_layers else ""
        adapter = shlex.quote(f"{shown.rstrip('/')}/{campaign.published_dir(name)}")
        lines.append(f"Try next: {_typed()} decompose PICTURE {layers}--adapter {adapter} -o layers")
    return lines


def _changed(bad: Mapping[str, Any], what: str, head: int) -> str:
    clear = ("clearly fewer" if bad["difference"] < 0 else "clearly more") if bad["clear"] else "no clear difference"
    between = ""
    if bad["low"] is not None and bad["high"] is not None:
        between = f"; 95 % interval of the difference {bad['low']:+.2f} to {bad['high']:+.2f}"
    return (
        f"Changed: bad layers a held-out {what} {bad['base']:.2f} -> {bad['tuned']:.2f} after "
        f"{counted(head, 'iterations')}, {clear} ({counted(bad['n'], f'{what}s')}{between})"
    )


def _typed() -> str:
    """How `layerloop` is typed here: by its name where a shell finds this one, else by its path."""
    ours, found = Path(sys.executable).with_name("layerloop"), shutil.which("layerloop")
    if not ours.exists() or (found and os.path.samefile(found, ours)):
        return "layerloop"
    return shlex.quote(os.path.relpath(ours) if ours.is_relative_to(Path.cwd()) else str(ours))
