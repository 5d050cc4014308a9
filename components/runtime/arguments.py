"""A step's keyword arguments as a command line, and as values that arrive as text."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from layerloop.components.runtime.outputs import StepResult
from layerloop.components.runtime.parser import OneLineParser
from layerloop.components.schema.errors import LayerloopError


def parser_of(run: Callable[..., StepResult], name: str) -> argparse.ArgumentParser:
    """A flag for each keyword-only argument of `run`, with its help from the docstring's `Args:`."""
    document = inspect.getdoc(run) or ""
    helps = _argument_helps(document)
    parser = OneLineParser(
        prog=f"python -m layerloop.components.{name}",
        description=re.split(r"\n\s*\n\s*(?:Args|Returns|Raises):", document)[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--executor-input", default=None, help=argparse.SUPPRESS)
    for parameter in parameters_of(run):
        kind = kind_of(run, parameter.name)
        text = helps.get(parameter.name, "").replace("%", "%%")
        if parameter.default is parameter.empty:
            text = f"{text} (required)"
        elif parameter.default not in (None, "", {}):
            text = f"{text} (default: {parameter.default})"
        if kind is bool:
            parser.add_argument(
                flag(parameter.name), dest=parameter.name, action=argparse.BooleanOptionalAction, help=text
            )
        else:
            metavar = {str: "TEXT", int: "N", float: "X", dict: "JSON"}[kind]
            reader = str if kind is dict else kind
            parser.add_argument(flag(parameter.name), dest=parameter.name, type=reader, metavar=metavar, help=text)
    return parser


def parameters_of(run: Callable[..., StepResult]) -> list[inspect.Parameter]:
    """The keyword-only parameters of a step."""
    return [p for p in inspect.signature(run).parameters.values() if p.kind is p.KEYWORD_ONLY]


def kind_of(run: Callable[..., StepResult], name: str) -> type:
    """The plain type of an argument, None aside."""
    hint = typing.get_type_hints(run)[name]
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [typing.get_origin(option) or option for option in options if option is not type(None)]
    if len(kinds) != 1 or kinds[0] not in (str, int, float, bool, dict, Mapping):
        raise TypeError(
            f"argument {name} of {run.__module__}.run is {hint}: use str, int, float, bool or dict, or one | None"
        )
    return dict if kinds[0] is Mapping else kinds[0]


def flag(name: str) -> str:
    """The flag of an argument: `judge_url` is given as `--judge-url`."""
    return f"--{name.replace('_', '-')}"


def _argument_helps(document: str) -> dict[str, str]:
    """Help per argument from a docstring's `Args:` section (names indented once, their continuation lines deeper)."""
    match = re.search(r"^Args:\n(.*?)(?:\n\S|\Z)", document, re.MULTILINE | re.DOTALL)
    helps: dict[str, str] = {}
    name = ""
    for line in match[1].splitlines() if match else ():
        entry = re.match(r"^ {4}(\w+):\s*(.*)$", line)
        if entry:
            name = entry[1]
            helps[name] = entry[2].strip()
        elif name and line.strip():
            helps[name] += f" {line.strip()}"
    return helps


def step_name(run: Callable[..., StepResult]) -> str:
    """`score_rollouts` for a `run` of layerloop.components.score_rollouts.step, also when that is run as `__main__`."""
    module = run.__module__
    if module == "__main__":
        spec = run.__globals__.get("__spec__")
        module = spec.name if spec else Path(run.__globals__.get("__file__", "step")).parent.name
    return module.removesuffix(".step").removesuffix(".__main__").rpartition(".")[2]


def mapping(name: str, value: str) -> dict[str, Any]:
    """A mapping given as JSON text.

    Raises:
        LayerloopError: `value` is not a JSON object.
    """
    try:
        read = json.loads(value)
    except ValueError as error:
        raise LayerloopError(f'{name} is not JSON ({error}): write it as {{"update": {{"steps": 1}}}}') from None
    if not isinstance(read, dict):
        raise LayerloopError(f'{name} is {value}: give a JSON object such as {{"update": {{"steps": 1}}}}')
    return read


def cast(name: str, value: Any, kind: type) -> Any:
    """A parameter in its declared type. Numbers may arrive as floats (protobuf) or, from a schedule, as text; text that
    looks like a number may arrive as one. Blanks around a value come from a form or a shell, and are removed."""
    text = value.strip() if isinstance(value, str) else value
    if kind is dict:
        if isinstance(value, dict):
            return value
        return mapping(f"input parameter {name}", text if isinstance(text, str) else json.dumps(text))
    if kind is str:
        if isinstance(text, str):
            return text
        return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)
    if kind is bool:
        named = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}.get(str(text).lower())
        if named is not None:
            return named
    elif not isinstance(text, bool):
        try:
            number = float(text)
            if kind is float:
                return number
            if number.is_integer():
                return int(text) if isinstance(text, (str, int)) and str(text).lstrip("+-").isdigit() else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise LayerloopError(f"input parameter {name} is {value!r}: give {_ARTICLE[kind]}")


_ARTICLE = {int: "an integer", float: "a number", bool: "true or false"}
