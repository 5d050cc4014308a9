"""The exception whose message is meant for the user."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from layerloop.components.schema.messages import printable


class LayerloopError(Exception):
    """Bad input or a refused operation, in one line that names the thing, its value and the remedy.

    Steps and the command line print it without a traceback and exit with its `status`; anything else that is raised is
    a defect and keeps its traceback.
    """

    status: int = 2

    def __str__(self) -> str:
        """One line, whatever names of files and words of others it quotes."""
        return printable(super().__str__())

    def reworded(self, line: str) -> LayerloopError:
        """The same refusal in other words: whether it may last stays."""
        return (UnavailableError if isinstance(self, UnavailableError) else LayerloopError)(line)


class SeveralErrors(LayerloopError):
    """Refusals that are known at once, a line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        return "\nerror: ".join(printable(line) for line in self.args)


class UnavailableError(LayerloopError):
    """A refusal that may not last: a service did not answer, or was too busy. The same attempt may succeed later."""


@contextlib.contextmanager
def first_refusal() -> Iterator[None]:
    """Tasks that stopped each other with refusals alone: the first of these in the stead of their group."""
    try:
        yield
    except BaseExceptionGroup as errors:
        refusals, defects = errors.split(LayerloopError)
        if refusals is None or defects is not None:
            raise
        first: BaseException = refusals
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
