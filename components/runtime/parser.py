"""A command line whose errors are one line that names the word and what it may have meant."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """argparse's, whose errors are one line without the usage."""

    def error(self, message: str) -> NoReturn:
        """End with status 2 and the line."""
        print(f"error: {self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's. An option that a command has not is refused before anything that it lacks."""
        given = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:
            for word in takewhile(lambda word: word != "--", given):
                name = word.partition("=")[0]
                if name.startswith("--") and not any(known.startswith(name) for known in self._option_string_actions):
                    self.error(f"no option {name}{meant(name, self._option_string_actions)}")
        found, left = super().parse_known_args(given, namespace)
        if left and self._subparsers is None:
            self.error(f"nothing is expected at {' '.join(left)}")
        return found, left


def meant(word: str, known: Iterable[str]) -> str:
    """`, did you mean run?`, where a known word is close; else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""
