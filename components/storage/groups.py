"""One group of candidates as the samples of a shard, and back. The format itself is described in schema/trajectory.py.

Tensors are numpy arrays on both sides, so that the judging step reads without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Shard
from layerloop.components.schema.tensor_files import check_header
from layerloop.components.schema.trajectory import REMEDY, CandidateRecord, GroupRecord, candidate_key, group_key
from layerloop.components.storage.images import encode_png, read_png
from layerloop.components.storage.shards import Sample, read_shard
from layerloop.components.storage.store import Store

SOURCE, CONDITION, TRAJECTORY = "source.png", "condition.safetensors", "trajectory.safetensors"
_HEADER = 100_000  # bytes of a header that names a tensor or two


@dataclass(frozen=True)
class SampledGroup:
    """A sampled group: `image[H, W, 4]` and `stacks[G, L, H, W, 4]` uint8, `condition[h*w, C]`,
    `window[G, w+1, S, C]`, `velocities[G, w, S, C]` and `final[G, S, C]` float32, `rows[G]` int32 (see
    schema/trajectory.py). A `window` of size 0 is left out of the shard, and where there are no velocities
    `[G, 0, S, C]` so are these and the rows."""

    record: GroupRecord
    image: np.ndarray
    condition: np.ndarray
    seeds: Sequence[int]
    window: np.ndarray
    velocities: np.ndarray
    rows: np.ndarray
    final: np.ndarray
    stacks: np.ndarray


def samples_of(group: SampledGroup) -> Iterator[Sample]:
    """The samples of the group's shard, each encoded when it is asked for."""
    from safetensors.numpy import save

    record = group.record
    members = {"json": record.to_json(), SOURCE: encode_png(group.image)}
    members[CONDITION] = save({"condition": np.ascontiguousarray(group.condition)})
    yield group_key(record.iteration, record.group), members
    for candidate, (seed, stack) in enumerate(zip(group.seeds, group.stacks, strict=True)):
        latents = {"final": np.ascontiguousarray(group.final[candidate])}
        if record.window_size:
            latents["window"] = np.ascontiguousarray(group.window[candidate])
        if group.velocities.shape[1]:
            latents["velocities"] = np.ascontiguousarray(group.velocities[candidate])
            latents["rows"] = np.ascontiguousarray(group.rows[candidate, None], dtype=np.int32)
        own = CandidateRecord(
            iteration=record.iteration,
            group=record.group,
            candidate=candidate,
            image_key=record.image_key,
            seed=seed,
        )
        layers = {_layer(index): encode_png(layer) for index, layer in enumerate(stack)}
        yield (
            candidate_key(record.iteration, record.group, candidate),
            {"json": own.to_json(), TRAJECTORY: save(latents), **layers},
        )


@dataclass(frozen=True)
class Candidate:
    """One decomposition of a group; of its members, those that the reader asked for, decoded when they are used."""

    record: CandidateRecord
    group: GroupRecord
    members: Mapping[str, bytes]
    where: str  # names it in errors

    def stack(self) -> np.ndarray:
        """Its layers `(L, H, W, 4)` uint8, straight RGBA, bottom first.

        Raises:
            LayerloopError: a layer is not a PNG of this project or not of the group's size.
        """
        return np.stack(
            [
                _png(self.members, _layer(index), (self.group.height, self.group.width, 4), where=self.where)
                for index in range(self.group.layers)
            ]
        )

    def window(self, channels: int) -> np.ndarray:
        """Latents before each step of the SDE window and after its last: `window[w+1, S, C]` float32.

        Raises:
            LayerloopError: missing, damaged, not finite, or of another shape than the record's and the model's.
        """
        shape = (self.group.window_size + 1, self._tokens, channels)
        return _tensor(self.members, TRAJECTORY, "window", shape, where=self.where)

    def velocities(self, channels: int) -> np.ndarray:
        """The model's velocities in the window's steps, where the recipe keeps them: `velocities[w, S, C]` float32.
        Raises as `window`."""
        shape = (self.group.window_size, self._tokens, channels)
        return _tensor(self.members, TRAJECTORY, "velocities", shape, where=self.where)

    def rows(self) -> int:
        """Rows of the forward passes that gave `velocities`. Raises as `window`."""
        return int(_tensor(self.members, TRAJECTORY, "rows", (1,), where=self.where, dtype="I32")[0])

    def final(self, channels: int) -> np.ndarray:
        """The latents that were decoded: `final[S, C]` float32. Raises as `window`."""
        return _tensor(self.members, TRAJECTORY, "final", (self._tokens, channels), where=self.where)

    @property
    def _tokens(self) -> int:
        return (self.group.layers + 1) * self.group.latent_height * self.group.latent_width


@dataclass(frozen=True)
class Group:
    """One image with all its candidates, in ascending order."""

    record: GroupRecord
    candidates: tuple[Candidate, ...]
    members: Mapping[str, bytes]
    where: str

    def image(self) -> np.ndarray:
        """The image that was decomposed: `(H, W, 4)` uint8, opaque. Raises as `Candidate.stack`."""
        return _png(self.members, SOURCE, (self.record.height, self.record.width, 4), where=self.where)

    def condition(self, channels: int) -> np.ndarray:
        """Its packed latents: `condition[h*w, C]` float32. Raises as `Candidate.window`."""
        shape = (self.record.latent_height * self.record.latent_width, channels)
        return _tensor(self.members, CONDITION, "condition", shape, where=self.where)


def read_group(store: Store, shard: Shard, iteration: int, group: int, *, layers: bool, latents: bool) -> Group:
    """The group of a shard.

    Args:
        layers: read the image and the candidates' layers.
        latents: read the condition and the candidates' latents.

    Raises:
        LayerloopError: the shard is not what was committed, or does not hold this one group with all its candidates and
            what is asked for of them, each under its own key.
    """

    def wanted(suffix: str) -> bool:
        images, tensors = suffix.endswith(".png"), suffix.endswith(".safetensors")
        return suffix == "json" or (layers and images) or (latents and tensors)

    found: GroupRecord | None = None
    own: Mapping[str, bytes] = {}
    candidates: list[Candidate] = []
    for key, members in read_shard(store, shard, required=("json",), wanted=wanted):
        where = f"{store.uri}/{shard.name}:{key}"
        if found is None:
            _same_key(where, key, group_key(iteration, group), "is where {} should be")
            found, own = GroupRecord.from_json(members["json"], where=f"{where}.json"), members
            _of_iteration(where, found.iteration, iteration)
            _same_key(where, key, group_key(found.iteration, found.group), "holds the record of {}")
            _require(where, members, [SOURCE] * layers + [CONDITION] * latents)
            continue
        _same_key(where, key, candidate_key(iteration, group, len(candidates)), "is where {} should be")
        record = CandidateRecord.from_json(members["json"], where=f"{where}.json")
        _of_iteration(where, record.iteration, iteration)
        recorded = candidate_key(record.iteration, record.group, record.candidate)
        _same_key(where, key, recorded, "holds the record of {}")
        _require(where, members, [_layer(n) for n in range(found.layers)] * layers + [TRAJECTORY] * latents)
        candidates.append(Candidate(record, found, members, where))
    where = f"{store.uri}/{shard.name}"
    if found is None:
        raise LayerloopError(f"{where} is empty: {REMEDY}")
    if len(candidates) != found.group_size:
        raise LayerloopError(
            f"{where} has {len(candidates)} candidates, its group's record says {found.group_size}: {REMEDY}"
        )
    return Group(found, tuple(candidates), own, f"{where}:{group_key(iteration, group)}")


def _layer(index: int) -> str:
    return f"layer{index}.png"


def _same_key(where: str, key: str, wanted: str, fault: str) -> None:
    if key != wanted:
        raise LayerloopError(f"{where} {fault.format(wanted)}: {REMEDY}")


def _of_iteration(where: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise LayerloopError(f"{where} is of iteration {found}, not {wanted}: {REMEDY}")


def _require(where: str, members: Mapping[str, bytes], names: Sequence[str]) -> None:
    for name in names:
        if name not in members:
            raise LayerloopError(f"{where} lacks {name}: {REMEDY}")


def _png(members: Mapping[str, bytes], name: str, shape: tuple[int, ...], *, where: str) -> np.ndarray:
    image = read_png(members, name, where=where, size=shape[:2], remedy=REMEDY)
    if image.shape != shape:
        _refuse(where, name, image.shape, f"its group's record says {_sizes(shape)}")
    return image


_DTYPES = {"F32": "<f4", "I32": "<i4"}


def _tensor(
    members: Mapping[str, bytes], member: str, name: str, shape: tuple[int, ...], *, where: str, dtype: str = "F32"
) -> np.ndarray:
    """One finite tensor of a safetensors member. Its other tensors are ignored."""
    from safetensors import SafetensorError, deserialize

    check_header(members[member], where=f"{where}.{member}", longest=_HEADER)
    try:
        tensors = dict(deserialize(members[member]))
    except SafetensorError as error:
        raise LayerloopError(f"{where}.{member} is not safetensors ({error}): {REMEDY}") from None
    if name not in tensors:
        raise LayerloopError(f"{where}.{member} has no tensor {name!r}: {REMEDY}")
    found = tensors[name]
    if found["dtype"] != dtype:
        what = "latents" if dtype == "F32" else name
        raise LayerloopError(f"{where}.{member} {name} is {found['dtype']}, {what} are stored in {dtype}: {REMEDY}")
    if tuple(found["shape"]) != shape:
        _refuse(where, f"{member} {name}", found["shape"], f"its record and the model's channels say {_sizes(shape)}")
    tensor = np.frombuffer(found["data"], dtype=_DTYPES[dtype]).reshape(shape)
    if not np.isfinite(tensor).all():
        raise LayerloopError(
            f"{where}.{member} {name} has NaN or infinite latents: the policy that sampled it has diverged, or the "
            "model's dtype overflows; go back to an earlier iteration"
        )
    return tensor


def _refuse(where: str, what: str, found: Sequence[int], wanted: str) -> NoReturn:
    raise LayerloopError(f"{where}.{what} is {_sizes(found)}, {wanted}: {REMEDY}")


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"
