"""Anchors: velocities of the policy that sampled, where the policy that learns is another by now.

They are computed before the first optimizer step, with the learner's own microbatches, because bfloat16 results depend
on the shape of a batch and an anchor from another shape would move the on-policy ratio away from 1.

Where the recipe keeps the sampler's velocities (`rollout.keep_velocities`), a microbatch has one timestep, as a pass of
the sampler has, and only the first microbatch of every shape is computed: if the kept velocities of all its points are
the same to the bit, those of the other microbatches of that shape are taken as they are; if not, all are computed. So
the anchors, and the adapter, never depend on whether velocities were kept. A shape is that of the learner's pass and of
the sampler's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.runtime.distributed import rank
from layerloop.components.runtime.progress import log, progress
from layerloop.components.update_lora.algorithm import Batch
from layerloop.components.update_lora.plan import Microbatch
from layerloop.components.update_lora.trajectories import Trajectories

T = TypeVar("T")
Index = tuple[int, int]  # optimizer step, microbatch


class Anchors:
    """The anchors of this rank's microbatches, `v_old[P, S, C]` float32 on the CPU each.

    Args:
        policy: with the weights that sampled.
        anchored: the microbatches that need one.
        groups: their trajectories.
        batch_of: inputs of a microbatch's pass.
    """

    def __init__(
        self,
        policy: LayeredPolicy,
        anchored: Mapping[Index, Microbatch],
        groups: Mapping[int, Trajectories],
        batch_of: Callable[[Microbatch], Batch],
    ) -> None:
        self._anchored, self._groups = anchored, groups
        self._computed: dict[Index, Tensor] = {}
        same: dict[tuple[object, ...], bool] = {}  # by shape
        for index in with_progress(list(anchored), "computing anchors"):
            microbatch = anchored[index]
            # Ranks that share a sharded base enter its layers together: none may leave a pass out.
            shape = None if policy.sharded else self._shape(microbatch)
            if shape is not None and same.get(shape):
                continue
            batch = batch_of(microbatch)
            velocity = policy.velocity(batch.latents, batch.sigma, batch.condition).cpu()
            self._computed[index] = velocity
            if shape is not None and shape not in same:
                same[shape] = torch.equal(velocity, self._kept(microbatch))
        self._log(same)

    def take(self, step: int, microbatch: int) -> Tensor | None:
        """The anchor of a microbatch, once; None where the policy that learns is the one that sampled."""
        index = step, microbatch
        if index not in self._anchored:
            return None
        computed = self._computed.pop(index, None)
        return self._kept(self._anchored[index]) if computed is None else computed

    def _shape(self, microbatch: Microbatch) -> tuple[object, ...] | None:
        """What the bits of a pass may depend on; None where its velocities were not kept."""
        group = self._groups[microbatch.group]
        own = [group.trajectories[point.candidate] for point in microbatch.points]
        if any(one.velocities is None for one in own):
            return None
        record = group.record
        return record.layers, record.height, record.width, len(own), *sorted({one.rows for one in own})

    def _kept(self, microbatch: Microbatch) -> Tensor:
        trajectories = self._groups[microbatch.group].trajectories
        kept = [(trajectories[point.candidate].velocities, point.timestep) for point in microbatch.points]
        return torch.stack([velocities[timestep] for velocities, timestep in kept if velocities is not None])

    def _log(self, same: Mapping[tuple[object, ...], bool]) -> None:
        if rank() == 0 and same:
            taken = len(self._anchored) - len(self._computed)
            log(
                f"anchors: {taken} of {len(self._anchored)} passes saved by kept velocities"
                + ("" if all(same.values()) else "; in the others a pass of the learner rounds otherwise than one of "
                   "the sampler: runtime.update.microbatch equal to runtime.rollout.batch_size saves more")
            )  # fmt: skip


def with_progress(work: Sequence[T], what: str) -> Iterator[T]:
    """An iterator over passes, with a progress line on rank 0."""
    return iter(progress(work, what=what, unit="passes") if rank() == 0 and work else work)
