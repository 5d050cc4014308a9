"""The command line's parser: a command that there is none of is one line that names what was meant."""

from __future__ import annotations

import argparse
from typing import Any

from layerloop.components.runtime.parser import OneLineParser, meant
from layerloop.components.schema.steps import STEPS


class Parser(OneLineParser):
    """The parser of `layerloop` and of its commands."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's; a command that there is none of is refused with the one that is close."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.error(f"no command {value!r}{meant(value, action.choices) or _step(value)}")
        super()._check_value(action, value)


def _step(word: str) -> str:
    """Where a step is that a command was taken for: `evaluate` for `evaluate_adapter`."""
    found = [name for name in STEPS if name.startswith(word.replace("-", "_"))]
    return f": that step is python -m layerloop.components.{found[0]}" if found else ""
