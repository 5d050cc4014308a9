"""The manifest: the small JSON that commits a step's output. No manifest, no output."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from layerloop.components.schema.record import SCHEMA_VERSION, Record

Kind = Literal["sources", "rollouts", "scores", "policy", "evaluation", "published"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class File(Record):
    """One object of an output that is not a shard, such as `adapter_model.safetensors`."""

    name: str  # relative to the campaign's root
    bytes: int = Field(ge=0)
    sha256: Sha256


class Shard(File):
    """One WebDataset tar of an output."""

    samples: int = Field(ge=0)


class Manifest(Record):
    """The shards and files of one step's output. Written last and create-only; small enough to be a KFP artifact.

    Names are relative to the campaign's root, so a campaign may be moved. `counts` are non-negative integers for
    readers and metrics (images, rejects, groups, candidates ...); `metadata` holds what later steps check (fingerprint
    of the base model, sha256 of the adapter, splits ...).
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Kind
    iteration: int | None = Field(default=None, ge=0)  # None for sources; 0 is the policy before the first update
    shards: tuple[Shard, ...] = ()
    files: tuple[File, ...] = ()
    counts: dict[str, int] = {}
    metadata: dict[str, JsonValue] = {}

    def shards_of(self, split: str) -> tuple[Shard, ...]:
        """Shards whose file name begins with `<split>-`, in order (sources: train, holdout, designs, benchmark)."""
        return tuple(s for s in self.shards if s.name.rsplit("/", 1)[-1].startswith(f"{split}-"))

    def file(self, name: str) -> File:
        """The file whose base name is `name`; KeyError if the manifest has none."""
        for file in self.files:
            if file.name.rsplit("/", 1)[-1] == name:
                return file
        raise KeyError(name)
