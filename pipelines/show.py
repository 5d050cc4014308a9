"""`layerloop campaign show`: how far a campaign is, read from its manifests."""

from __future__ import annotations

from collections.abc import Sequence

from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.messages import counted, size_text
from layerloop.components.storage.campaign import Campaign

HEADINGS = ("iteration", "groups", "candidates", "masked", "reward", "spread", "learnt from", "state", "size")


def campaign_text(uri: str) -> str:
    """Head, recipe, a row per iteration with its rewards and sizes, evaluations and published adapters.

    Raises:
        LayerloopError: there is no campaign, or one of its manifests is damaged.
    """
    campaign = Campaign.open(uri)
    recipe, head = campaign.recipe, campaign.head()
    lines = [
        f"campaign   {campaign.uri}",
        f"recipe     {recipe.name}: {recipe.model.base}, judge {recipe.judge.model}, "
        f"{recipe.rollout.groups} groups of {recipe.rollout.group_size}",
        f"sources    {_sources(campaign)}",
        f"head       iteration {head}" if head else "head       none yet: the base policy",
    ]
    rows = [_row(campaign, number, head) for number in campaign.iterations()]
    if rows:
        lines += ["", *table_lines(HEADINGS, rows), ""]
    lines.append(f"evaluated  {', '.join(campaign.evaluations()) or 'nothing yet'}")
    lines.append(f"published  {', '.join(campaign.published()) or 'nothing yet'}")
    lines.append(f"size       {size_text(campaign.bytes_under())}")
    return "\n".join(lines)


def _sources(campaign: Campaign) -> str:
    sources = campaign.find(campaign.sources_dir)
    if sources is None:
        return "not committed yet"
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sources.counts.items())
    return f"{counts}, {size_text(campaign.bytes_under(campaign.sources_dir))}"


def _row(campaign: Campaign, number: int, head: int) -> list[str]:
    """One iteration, whatever of it is committed."""
    sampled, planned = len(campaign.sampled_groups(number)), campaign.recipe.rollout
    scores = campaign.find(campaign.scores_dir(number))
    policy = campaign.find(campaign.policy_dir(number))
    state = (
        "done"
        if policy
        else "scored"
        if scores
        else f"{sampled} of {planned.groups} groups sampled"
        if sampled
        else "begun"
    )
    if policy and number == head:
        state = "done, head"
    groups = policy.counts.get("groups") if policy else None
    return [
        str(number),
        str(sampled),
        str(sampled * planned.group_size),
        _count(scores, "candidates_masked"),
        _metric(scores, "reward_mean"),
        _metric(scores, "reward_std_within_group"),
        "" if groups is None else counted(int(groups), "groups"),
        state,
        size_text(campaign.bytes_under(f"iterations/{number:06d}")),
    ]


def _count(manifest: Manifest | None, name: str) -> str:
    return str(manifest.counts[name]) if manifest and name in manifest.counts else ""


def _metric(manifest: Manifest | None, name: str) -> str:
    metrics = manifest.metadata.get("metrics") if manifest else None
    value = metrics.get(name) if isinstance(metrics, dict) else None
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def table_lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table with right-aligned columns."""
    widths = [max(len(row[n]) for row in (headings, *rows)) for n in range(len(headings))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (headings, *rows)]
