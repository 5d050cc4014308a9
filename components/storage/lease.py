"""The lease: one run at a time writes a campaign. Readers need none.

    lease/training/000012.json             the claim of a run; the highest number holds
    lease/training/000012/<member>.json    a process of that run that works, rewritten while it lives

A claim is create-only and its number only rises, so of several runs one gets it, and a paused one that wakes up sees
that it was overtaken. The processes of one run (the pods of Kubeflow's workers, a pod that is retried, the ranks of
torchrun) share its claim: they have the same run id. A process that ends removes its member, and a claim without
members is free. A process that dies is found out by the age of its member, by the store's clock: no clock of ours is
compared. On its own machine it is found out at once.

The lease saves work and the judge's money, it does not guard data: what two runs write at once has names of its own
(manifests.py), and one manifest counts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.steps import RUN
from layerloop.components.storage.owners import identity, remove_abandoned_folders
from layerloop.components.storage.store import LARGEST_RECORD, Store

TRAINING, EVALUATION, PUBLICATION = SCOPES = ("training", "evaluation", "publication")  # held independently
FOLDER = "lease"
_KEPT_CLAIMS = 8
_CLAIM = re.compile(r"(\d{6,})\.json")


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    beat: float = 15.0  # between two signs of life
    expiry: float = 90.0  # without one, after which a process counts as dead
    poll: float = 5.0  # between two looks at another run's lease
    say: float = 300.0  # between two lines about waiting
    patience: float = 3600.0  # of waiting


USUAL = Timing()


@dataclass(frozen=True)
class Holder:
    """The run with the highest claim."""

    number: int
    run: str
    who: str  # user, host and process that claimed
    since: float  # seconds ago
    alive: float | None  # seconds since the last sign of life; None where nobody works: the lease is free


def run_id() -> str:
    """The run that this process belongs to: $LAYERLOOP_RUN, torchrun's, or one of its own."""
    if name := os.environ.get(RUN, "").strip():
        return name
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
        return "-".join(os.environ.get(name, "") for name in names)
    return _own_run()


@contextlib.contextmanager
def hold(
    store: Store,
    scope: str = TRAINING,
    *,
    log: Callable[[str], None],
    run: str | None = None,
    timing: Timing = USUAL,
) -> Iterator[None]:
    """Write within this context; other runs wait until it ends. Contexts of one run may be nested and simultaneous.

    A run that waited looks again afterwards at what is committed: the other one may have done its work.

    Args:
        scope: one of SCOPES: an evaluation does not keep the training waiting.
        log: is told who is waited for, and that another run took over.
        run: by default `run_id()`.

    Raises:
        UnavailableError: another run held it for all of `timing.patience`; the line says who, since when, and how to
            take over.
    """
    lease = _Lease(store, scope, run or run_id(), log, timing)
    lease.acquire()
    try:
        yield
    finally:
        lease.release()


def holder(store: Store, scope: str, *, expiry: float = Timing.expiry) -> Holder | None:
    """The run with the highest claim; None where there never was one."""
    root = f"{FOLDER}/{scope}/"
    entries, now = store.entries(root), store.clock()
    numbers = [int(match[1]) for name in entries if (match := _CLAIM.fullmatch(name.removeprefix(root)))]
    if not numbers:
        return None
    number = max(numbers)
    claim = _claim_name(scope, number)
    said = _read(store, claim)
    ages = {
        name: max(0.0, now - entry.modified)
        for name, entry in entries.items()
        if name.startswith(claim.removesuffix(".json") + "/")
    }
    living = [age for name, age in ages.items() if age < expiry and not _is_dead_here(_read(store, name))]
    since = max(0.0, now - entries[claim].modified)
    return Holder(number, str(said.get("run", "")), str(said.get("who", "")), since, min(living, default=None))


def take_over(store: Store, scope: str) -> Holder | None:
    """Free a lease whose holder will not come back, by a claim that nobody works under. Returns who held it."""
    held = holder(store, scope)
    if held is None or held.alive is None:
        return None
    record = {"run": f"freed-{secrets.token_hex(4)}", "who": _who()}
    store.create(_claim_name(scope, held.number + 1), json.dumps(record).encode())
    return held


def sweep(store: Store, *, log: Callable[[str], None]) -> None:
    """Remove what killed processes were writing, in the store and in TMPDIR; what others write now stays."""
    remove_abandoned_folders(Path(tempfile.gettempdir()))
    with contextlib.suppress(LayerloopError):  # a folder that is not ours, a right that lacks: no reason not to work
        if count := store.remove_abandoned():
            log(f"removed {count} unfinished writes of processes that were killed")


def held_by(held: Holder, scope: str, uri: str) -> str:
    """A sentence on who holds a lease."""
    return (
        f"{scope} of {uri} is held by run {held.run} ({held.who}) since {_age(held.since)}, whose last sign of life is "
        f"{_age(held.alive or 0.0)} old"
    )


class _Lease:
    """This process's part in its run's claim."""

    def __init__(self, store: Store, scope: str, run: str, log: Callable[[str], None], timing: Timing) -> None:
        self._store, self._scope, self._run, self._log, self._timing = store, scope, run, log, timing
        self._token = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._ended = threading.Event()
        self._member = ""

    def acquire(self) -> None:
        began, said = time.monotonic(), -self._timing.say
        while True:
            held = holder(self._store, self._scope, expiry=self._timing.expiry)
            if held is None or held.alive is None or held.run == self._run:
                if self._join(held):
                    break
                continue
            waited = time.monotonic() - began
            how = f"layerloop campaign lease {self._store.uri} --take-over, if it will not come back"
            if waited >= self._timing.patience:
                line = held_by(held, self._scope, self._store.uri)
                raise UnavailableError(f"{line}: waited {_age(waited)}; run it again later, or {how}")
            if waited - said >= self._timing.say:
                said = waited
                self._log(f"{held_by(held, self._scope, self._store.uri)}: waiting for it; or {how}")
            time.sleep(min(self._timing.poll, 0.1 + waited / 4))  # often at first: it may be about to end
        self._thread = threading.Thread(target=self._live, daemon=True, name="lease")
        self._thread.start()

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(LayerloopError):  # then it expires
            self._store.delete(self._member)

    def _join(self, held: Holder | None) -> bool:
        """Sign under the run's claim, or make the next one; False where another was faster."""
        joins = held is not None and held.alive is not None
        number = (held.number if held else 0) + (0 if joins else 1)
        claim = _claim_name(self._scope, number)
        self._member = f"{claim.removesuffix('.json')}/{self._token}.json"
        self._beat()  # before the claim, which without a member would be free
        record = {"run": self._run, "who": _who()}
        won = joins or self._store.create(claim, json.dumps(record).encode())
        if won:  # unless what was looked at is long gone, and the number too
            now = holder(self._store, self._scope, expiry=self._timing.expiry)
            won = now is not None and now.number == number
        if not won:
            self._store.delete(self._member)
        elif not joins and self._remove_before(number):
            sweep(self._store, log=self._log)
        return won

    def _remove_before(self, number: int) -> bool:
        """Remove members of past claims, of processes that were killed, and claims of long ago. The last ones stay, so
        that a slow listing meets one that is higher than its own. Returns whether a process was killed."""
        root, killed = f"{FOLDER}/{self._scope}/", False
        for name in self._store.list(root):
            part, _, member = name.removeprefix(root).removesuffix(".json").partition("/")
            if part.isdigit() and int(part) < number - (0 if member else _KEPT_CLAIMS):
                self._store.delete(name)
                killed = killed or bool(member)
        return killed

    def _live(self) -> None:
        """Give signs of life, and say once where another run took over."""
        own, overtaken = int(self._member.split("/")[2]), False
        while not self._ended.wait(self._timing.beat):
            with contextlib.suppress(LayerloopError, OSError):  # the store is away: tried again at the next beat
                if _highest(self._store, self._scope) <= own:
                    self._beat()
                elif not overtaken and (held := holder(self._store, self._scope, expiry=self._timing.expiry)):
                    overtaken = True
                    self._log(
                        f"run {held.run} ({held.who}) took {self._scope} of {self._store.uri} over: what it commits "
                        "first counts, what is committed already stays"
                    )

    def _beat(self) -> None:
        self._store.write(self._member, json.dumps({"run": self._run, "process": identity(os.getpid())}).encode())


def _claim_name(scope: str, number: int) -> str:
    return f"{FOLDER}/{scope}/{number:06d}.json"


def _highest(store: Store, scope: str) -> int:
    """The number of the highest claim; 0 for none. One listing: the members, 32 of four workers with eight GPUs each,
    are not looked at by every one of them in every beat."""
    names = store.children(f"{FOLDER}/{scope}")
    return max((int(match[1]) for name in names if (match := _CLAIM.fullmatch(name))), default=0)


def _read(store: Store, name: str) -> dict[str, Any]:
    """A record of ours; empty where it is gone or unreadable."""
    try:
        value = json.loads(store.read(name, most=LARGEST_RECORD))
    except (LayerloopError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _who() -> str:
    user = os.environ.get("USER") or os.environ.get("KFP_POD_NAME") or "somebody"
    return f"{user} on {socket.gethostname()}, process {os.getpid()}"


@functools.cache
def _own_run() -> str:
    return f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(6)}"


def _is_dead_here(member: dict[str, Any]) -> bool:
    """Whether a process of this very machine and namespace, which therefore could be seen, is gone."""
    theirs, ours = member.get("process"), identity(os.getpid())
    if not isinstance(theirs, list) or len(theirs) != 4 or not ours or theirs[:2] != ours[:2]:
        return False
    return str(theirs[2]).isdigit() and identity(int(theirs[2])) != theirs


def _age(seconds: float) -> str:
    for unit, size in (("days", 172800), ("hours", 7200), ("minutes", 120)):
        if seconds >= size:
            return f"{seconds / (size / 2):.0f} {unit}"
    return f"{seconds:.0f} s"
