"""Steps run one after another in one process that stays warm: `python -m layerloop.components.research.warm`.

On the tiny policy a step's own work takes a second or two, less than importing torch, so a study of hundreds of
iterations would spend its hours on imports. This process reads one request per line on standard input,

    {"verb": "update_lora", "arguments": {"campaign": "...", "iteration": 3}}

runs that step as its own command would, and answers one line on standard output,

    {"metrics": {...}, "parameters": {...}}     or     {"error": "one line", "status": 2}

Logs go to standard error. Steps are imported by name when they are first requested, so that no library depends on one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
import traceback
from typing import Any, TextIO

from layerloop.components.schema.errors import LayerloopError

_STEP_NAME = re.compile(r"[a-z]+(_[a-z]+)*")


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer every request until the input ends. A failed step leaves the process ready for the next request."""
    for line in requests:
        if line.strip():
            answer = _answer(line)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _answer(line: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
        name, arguments = request["verb"], request.get("arguments", {})
        if not isinstance(name, str) or not _STEP_NAME.fullmatch(name) or not isinstance(arguments, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        return {"error": f"request {line.strip()[:200]!r} is not {{verb, arguments}}", "status": 2}
    try:
        step = importlib.import_module(f"layerloop.components.{name}.step")
    except ModuleNotFoundError as error:
        return {"error": f"step {name} cannot be imported ({error}): choose a folder of components/", "status": 2}
    try:
        result = step.run(**arguments)
    except LayerloopError as error:
        return {"error": str(error), "status": 2}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "status": 1}
    return {"metrics": result.metrics, "parameters": result.parameters}


def main() -> int:
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # a library that prints must not be read as an answer
        serve(sys.stdin, answers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
