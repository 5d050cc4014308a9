"""Quantities, names and labels as Kubernetes takes them.

What it would refuse is refused here: in a pod's specification it would come up after the run has started, as a driver
that panics.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

CPU = re.compile(r"(?P<number>[0-9]+|[0-9]*\.[0-9]{1,3}(?!m))(?P<unit>m?)")  # in steps of 1m
MEMORY = re.compile(r"(?P<number>[0-9]+)(?P<unit>Ki|Mi|Gi|Ti|k|M|G|T|)")
_BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_PART = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"  # of a domain name
_NAME = re.compile(rf"(?=.{{1,253}}$){_PART}(?:\.{_PART})*")
_LABEL_KEY = re.compile(
    rf"(?:(?=[^/]{{1,253}}/){_PART}(?:\.{_PART})*/)?[A-Za-z0-9](?:[-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?"
)
_RESOURCE = re.compile(rf"{_PART}(?:\.{_PART})*/[A-Za-z0-9](?:[-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?")
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _cpu(value: Any) -> Any:
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if isinstance(text, str) and not ((match := CPU.fullmatch(text)) and float(match["number"]) > 0):
        raise ValueError(f"{text!r} is not a number of CPUs: write 8, 0.5 or 500m")
    return text


def _memory(value: Any) -> Any:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str):
        return text
    match = MEMORY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a Kubernetes quantity: write a whole number with a unit, such as 96Gi")
    if int(match["number"]) * _BYTES[match["unit"]] < 16 * 2**20:
        raise ValueError(f"{text!r} is {int(match['number']) * _BYTES[match['unit']]} bytes: write 96Gi for gibibytes")
    return text


def _matching(pattern: re.Pattern[str], remedy: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, str) and not pattern.fullmatch(value):
            raise ValueError(f"{value!r} {remedy}")
        return value

    return check


Cpu = Annotated[str, BeforeValidator(_cpu)]
Memory = Annotated[str, BeforeValidator(_memory)]  # bytes, as kfp takes them: whole numbers
Name = Annotated[str, BeforeValidator(_matching(_NAME, "is not a Kubernetes name: use a-z, 0-9 and -, or null"))]
Queue = Annotated[Name, AfterValidator(_matching(_LABEL, "is longer than a label's value: 63 characters at most"))]
LabelKey = Annotated[str, AfterValidator(_matching(_LABEL_KEY, "is not a label key: write name or domain/name"))]
Label = Annotated[str, AfterValidator(_matching(_LABEL, "is not a label value: at most 63 of A-Za-z0-9-_."))]
Gpu = Annotated[str, AfterValidator(_matching(_RESOURCE, "is not an extended resource: write it as nvidia.com/gpu"))]
Api = Annotated[
    str, AfterValidator(_matching(re.compile(r"https?://[^\s/]+\S*"), "is not a URL: write http://host:8888"))
]
Root = Annotated[
    str,
    AfterValidator(_matching(re.compile(r"(s3|minio|gs)://[^\s/]+\S*"), "is not a bucket: write s3://bucket/prefix")),
]
Variable = Annotated[str, AfterValidator(_matching(_VARIABLE, "is not a variable name: use A-Z, 0-9 and _"))]
Hours = Annotated[float, Field(ge=1 / 60, le=8760)]
Gpus = Annotated[int, Field(ge=0)]
Labels = dict[LabelKey, Label]


def times(quantity: str, factor: int, pattern: re.Pattern[str]) -> str:
    """A quantity that many times over: `times("96Gi", 8, MEMORY)` is `768Gi`."""
    match = pattern.fullmatch(quantity)
    assert match is not None  # validated
    return f"{Decimal(match['number']) * factor:f}{match['unit']}" if factor > 1 else quantity


def bytes_of(quantity: str) -> int:
    """Bytes of a quantity of memory."""
    match = MEMORY.fullmatch(quantity)
    assert match is not None
    return int(match["number"]) * _BYTES[match["unit"]]
