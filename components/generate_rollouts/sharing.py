"""Which rank samples what: forward batches by estimated cost, and the parts of a group brought together.

A batch is the unit, of one candidate where runtime.rollout.batch_size is 1. Batches follow from the recipe and the
runtime alone, so that no candidate's bits depend on the number of ranks; and a group that shares its prefix stays
whole, since its prefix is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerloop.components.generate_rollouts.plan import GroupPlan
from layerloop.components.policy.sampling import Plan, microbatches
from layerloop.components.runtime.balance import forward_cost, share, two_stage_order
from layerloop.components.runtime.distributed import Exchange
from layerloop.components.schema.recipe import RolloutRecipe


@dataclass(frozen=True)
class Batch:
    """Candidates of a group that one rank samples together."""

    group: int
    candidates: range


@dataclass(frozen=True)
class Shares:
    """Batches of every rank, in the order in which it samples them, and the rank that writes each group."""

    batches: tuple[tuple[Batch, ...], ...]
    writers: Mapping[int, int]
    calls: tuple[int, ...]  # forward passes of each rank


def share_batches(
    plans: Sequence[GroupPlan],
    tokens: Mapping[int, int],
    recipe: RolloutRecipe,
    *,
    width: int,
    batch_size: int,
    ranks: int,
) -> Shares:
    """Share the groups' batches among the ranks, the longest first, each of which samples its own group by group in
    the order that the judge waits least in.

    Args:
        tokens: of a frame, by group.
        width: of the transformer.
        batch_size: most candidates in one forward pass.
    """
    batches, costs, calls = [], [], []
    for plan in plans:
        sampled = sampling_plan(plan, recipe)
        size = recipe.group_size if sampled.share_prefix else batch_size
        forward = forward_cost(plan.layers, frame_tokens=tokens[plan.group], width=width)
        for candidates in microbatches(recipe.group_size, size):
            batches.append(Batch(plan.group, candidates))
            costs.append(sampled.nfe(len(candidates)) * forward)
            calls.append(sampled.nfe(-(-len(candidates) // batch_size)))  # a batch takes one sample's calls
    sampling = [sum(cost for batch, cost in zip(batches, costs, strict=True) if batch.group == p.group) for p in plans]
    judging = [plan.layers + 2 for plan in plans]  # images of a candidate's layers, and of what is made of them
    turns = {plans[index].group: turn for turn, index in enumerate(two_stage_order(sampling, judging))}
    owned = [sorted(mine, key=lambda index: (turns[batches[index].group], index)) for mine in share(costs, ranks)]
    writers: dict[int, int] = {}
    for index, rank in sorted((index, rank) for rank, mine in enumerate(owned) for index in mine):
        writers.setdefault(batches[index].group, rank)
    return Shares(
        batches=tuple(tuple(batches[index] for index in mine) for mine in owned),
        writers=writers,
        calls=tuple(sum(calls[index] for index in mine) for mine in owned),
    )


def sampling_plan(plan: GroupPlan, recipe: RolloutRecipe) -> Plan:
    """How a planned group is sampled, but for the values of its schedule."""
    return Plan(
        sigmas=(0.0,) * (recipe.steps + 1),
        window_start=plan.window_start,
        window_size=plan.window_size,
        dynamics=plan.dynamics,
        etas=plan.etas,
        outside=recipe.whole if plan.dynamics == "ode" else recipe.outside,
        share_prefix=recipe.share_prefix and plan.window_size > 0,
    )


@dataclass(frozen=True)
class Part:
    """Sampled candidates of a group: `window[n, w+1, S, C]`, `velocities[n, w, S, C]` where they are kept, else
    `[n, 0, S, C]`, `rows[n]`, `final[n, S, C]`, `stacks[n, L, H, W, 4]`."""

    window: np.ndarray
    velocities: np.ndarray
    rows: np.ndarray
    final: np.ndarray
    stacks: np.ndarray

    def arrays(self) -> list[np.ndarray]:
        return [self.window, self.velocities, self.rows, self.final, self.stacks]

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> Part:
        """All candidates of a group, from its parts in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate(arrays) for arrays in zip(*(part.arrays() for part in parts), strict=True)))


class Assembly:
    """The groups of an iteration as their parts come in, on each rank for the groups that it writes.

    A rank that fails sends a mark for what it lacks, so that no other rank waits for it.
    """

    def __init__(self, shares: Shares, rank: int) -> None:
        self._shares, self._rank = shares, rank
        self._batches = sorted(
            (batch for mine in shares.batches for batch in mine), key=lambda b: (b.group, b.candidates.start)
        )
        self._tags = {batch: tag for tag, batch in enumerate(self._batches)}
        self._order: dict[int, list[Batch]] = {}  # of the groups that this rank writes
        for batch in self._batches:
            if shares.writers[batch.group] == rank:
                self._order.setdefault(batch.group, []).append(batch)
        expected = {
            source: [self._tags[batch] for batch in mine if batch.group in self._order]
            for source, mine in enumerate(shares.batches)
            if source != rank
        }
        self._exchange = Exchange({source: tags for source, tags in expected.items() if tags})
        self._parts: dict[Batch, Part] = {}
        self._to_send = [batch for batch in shares.batches[rank] if batch.group not in self._order]

    def add(self, batch: Batch, part: Part) -> None:
        """A batch that this rank has sampled; those of others' groups are sent in their order."""
        if batch.group in self._order:
            self._parts[batch] = part
        else:
            self._to_send.remove(batch)
            self._exchange.send(self._shares.writers[batch.group], self._tags[batch], part.arrays())

    def complete(self, *, wait: bool = False) -> list[tuple[int, Part]]:
        """Groups of this rank that are complete by now, each once; with `wait`, all that will be."""
        for tag, arrays in self._exchange.receive(wait=wait):
            if arrays:  # else its rank has failed, and the group will not be complete
                self._parts[self._batches[tag]] = Part(*arrays)
        done = []
        for group, batches in list(self._order.items()):
            if all(batch in self._parts for batch in batches):
                done.append((group, Part.joined([self._parts.pop(batch) for batch in batches])))
                del self._order[group]
        return done

    def close(self) -> None:
        """Mark what this rank did not sample, and wait until what it sent is received."""
        for batch in self._to_send:
            self._exchange.send(self._shares.writers[batch.group], self._tags[batch], [])
        self._to_send.clear()
        self._exchange.finish()
