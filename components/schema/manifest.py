"""The manifest: the small JSON that commits a step's output. No manifest, no output.

What it names is written once, under a name that holds the hash of its content: in the file's own name
(`g000003-0123456789abcdef.tar`) or, where other programs look for certain names, in that of a folder around all files
of the output (`0123456789abcdef/adapter_model.safetensors`). So no attempt can damage what another has committed.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from layerloop.components.schema.record import SCHEMA_VERSION, Record, seal, unseal

HASH_DIGITS = 16  # of a sha256, in names


def content_name(name: str, sha256: str) -> str:
    """`folder/g000003-0123456789abcdef.tar` for `folder/g000003.tar`."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return f"{folder}{slash}{stem}-{sha256[:HASH_DIGITS]}{dot}{suffix}"


Kind = Literal["sources", "rollouts", "scores", "policy", "evaluation", "published"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class File(Record):
    """One object of an output that is not a shard, such as `adapter_model.safetensors`."""

    name: str  # relative to the campaign's root
    bytes: int = Field(ge=0)
    sha256: Sha256

    @property
    def base_name(self) -> str:
        """The last part of the name, without its own hash."""
        base = self.name.rpartition("/")[2]
        return base.replace(f"-{self.sha256[:HASH_DIGITS]}", "", 1)


class Shard(File):
    """One WebDataset tar of an output."""

    samples: int = Field(ge=0)


class Manifest(Record):
    """The shards and files of one step's output. Written last and create-only; small enough to be a KFP artifact.

    Names are relative to the campaign's root, so a campaign may be moved. `counts` are non-negative integers for
    readers and metrics (images, rejects, groups, candidates ...); `metadata` holds what later steps check (fingerprint
    of the base model, sha256 of the adapter, splits ...). As JSON it carries its own hash, which reading it checks;
    manifests of earlier versions have none.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Kind
    iteration: int | None = Field(default=None, ge=0)  # None for sources; 0 is the policy before the first update
    shards: tuple[Shard, ...] = ()
    files: tuple[File, ...] = ()
    counts: dict[str, int] = {}
    metadata: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        counts = Counter(file.name for file in (*self.shards, *self.files))
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(
                f"{twice[0]} is listed twice: restore the manifest, or delete it to have the step run again"
            )
        return self

    def to_json(self) -> bytes:
        return seal(super().to_json())

    @classmethod
    def from_json(cls, data: bytes | str, *, where: str) -> Self:
        return super().from_json(unseal(data, where=where), where=where)

    def shards_of(self, split: str) -> tuple[Shard, ...]:
        """Shards whose file name begins with `<split>-`, in order (sources: train, holdout, designs, benchmark)."""
        return tuple(s for s in self.shards if s.name.rsplit("/", 1)[-1].startswith(f"{split}-"))

    def file(self, name: str) -> File:
        """The file whose base name, without a hash, is `name`; KeyError if the manifest has none."""
        for file in self.files:
            if file.base_name == name:
                return file
        raise KeyError(name)


class Removal(Record):
    """What retention removed from a folder of a past iteration: the manifests there still name it, and no reader
    misses it. Written before the first object is deleted; as JSON it carries its own hash."""

    schema_version: Literal[1] = SCHEMA_VERSION
    folder: str  # iterations/000003/rollouts
    files: tuple[File, ...] = ()

    def to_json(self) -> bytes:
        return seal(super().to_json())

    @classmethod
    def from_json(cls, data: bytes | str, *, where: str) -> Self:
        return super().from_json(unseal(data, where=where), where=where)
