"""What a verification of a campaign found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.manifest import File, Manifest
from layerloop.components.schema.messages import counted, size_text
from layerloop.components.storage.store import StoreError

OF_THE_STORE = (UnavailableError, StoreError)  # what ends a verification: an object that was not read has no fault


@dataclass
class Findings:
    """What a verification found."""

    objects: int = 0
    bytes: int = 0
    faults: dict[str, str] = field(default_factory=dict)  # object, or folder -> what is wrong with it
    unread: set[str] = field(default_factory=set)  # manifests among them: what they name is not known
    orphans: dict[str, int] = field(default_factory=dict)  # object that no manifest names -> bytes
    leftovers: list[str] = field(default_factory=list)  # of killed writers, by names for people
    copies: list[str] = field(default_factory=list)  # publications whose visible files are not copies
    manifests: dict[str, Manifest] = field(default_factory=dict)
    removed: dict[str, File] = field(default_factory=dict)  # by retention, as its records say

    def lines(self) -> Iterator[str]:
        """What is wrong, one line each, and a summary."""
        yield from (f"{where}: {what}" for where, what in sorted(self.faults.items()))
        yield from (f"{folder}: files that people load are not those of its manifest" for folder in self.copies)
        size = sum(self.orphans.values())
        if self.orphans:
            what = "--repair leaves them, while a manifest is damaged" if self.unread else "--repair removes them"
            yield f"{counted(len(self.orphans), 'objects')} that no manifest names, {size_text(size)} ({what})"
        if self.leftovers:
            yield f"{counted(len(self.leftovers), 'unfinished writes')} left over (--repair removes them)"
        if self.removed:
            gone = sum(file.bytes for file in self.removed.values())
            yield f"{counted(len(self.removed), 'objects')} of past iterations, {size_text(gone)}, removed by retention"
        verdict = "all is what was committed" if self.sound else counted(len(self.faults) + len(self.copies), "faults")
        yield f"{self.objects} objects of {len(self.manifests)} manifests, {size_text(self.bytes)} read: {verdict}"

    @property
    def sound(self) -> bool:
        """Whether everything that is committed is right; orphans do no harm."""
        return not self.faults and not self.copies


def without_address(uri: str, name: str, error: LayerloopError) -> str:
    """An error's words without the URI and name that its line begins with anyway."""
    return str(error).replace(f"{uri}/", "").removeprefix(name).lstrip(": ")
