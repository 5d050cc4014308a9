"""Base class of all records: no unknown keys, no mutation, one canonical JSON form."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import typing
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from layerloop.components.schema.errors import LayerloopError

SCHEMA_VERSION: Final = 1  # raised when a stored record changes its meaning; readers refuse other versions


SEAL: Final = "sha256"  # the key of a sealed document that holds the hash of all its others


class DamagedError(LayerloopError):
    """Bytes that are not those whose hash is known. Reading them again may give the right ones."""


def canonical_json(value: Any) -> bytes:
    """Sorted keys, two spaces, trailing newline: equal values give equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def parse_json(document: bytes | str) -> Any:
    """The value of JSON text. A key that is given twice is an error, since readers disagree about which one counts.

    Raises:
        ValueError: not JSON, or a key twice.
        RecursionError: too many brackets inside each other.
    """
    return json.loads(document, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"it has the key {max(counts, key=lambda key: counts[key])[:80]!r} twice")
    return found


def seal(document: bytes) -> bytes:
    """A JSON object with the hash of its canonical form as one more key, so that a changed bit shows."""
    value = json.loads(document)
    return canonical_json({**value, SEAL: hashlib.sha256(canonical_json(value)).hexdigest()})


def unseal(document: bytes | str, *, where: str) -> bytes | str:
    """What `seal` was given, in its canonical form; a document without a seal, of earlier versions, as it is.

    Raises:
        DamagedError: the document is not what was sealed.
    """
    try:
        value: Any = parse_json(document)
    except (ValueError, RecursionError):
        return document  # the parser says what is wrong with it
    if not isinstance(value, dict) or not isinstance(value.get(SEAL), str):
        return document
    wanted = value.pop(SEAL)
    content = canonical_json(value)
    found = hashlib.sha256(content).hexdigest()
    if found != wanted:
        raise DamagedError(
            f"{where} has content of sha256 {found[:12]} and says {wanted[:12]}: it was changed after it was written, "
            "restore it"
        )
    return content


class Record(BaseModel):
    """A frozen pydantic model that refuses unknown keys and infinite or NaN floats."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def to_json(self) -> bytes:
        """Canonical JSON: sorted keys, two spaces, trailing newline; equal records give equal bytes."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, data: bytes | str, *, where: str) -> Self:
        """Parse and validate; `where` (a path or URI) names the offender in the error.

        Raises:
            LayerloopError: not JSON, another schema version, an unknown or missing key, or a value out of range.
        """
        try:
            value: Any = parse_json(data)
        except (ValueError, RecursionError) as error:
            raise LayerloopError(
                f"{where} is not JSON ({error}): it was truncated or is another kind of file"
            ) from None
        version = value.get("schema_version") if isinstance(value, dict) else None
        if "schema_version" in cls.model_fields and version != SCHEMA_VERSION:
            raise LayerloopError(
                f"{where} has schema_version {version!r}, this version of layerloop reads {SCHEMA_VERSION}: "
                "read it with the version that wrote it"
            )
        return validate(cls, value, where=where)


R = TypeVar("R", bound="Record")

_SHOWN = 8  # problems of a record that are told
_VALUES = reprlib.Repr()  # a wrong value is told in a few words, whatever its length
_VALUES.maxstring = _VALUES.maxother = 200
_VALUES.maxlist = _VALUES.maxtuple = _VALUES.maxdict = _VALUES.maxset = 12
_VALUES.maxlong = 60


def validate(cls: type[R], value: Any, *, where: str) -> R:
    """`cls.model_validate` with every problem put into one readable line that begins with `where`."""
    from pydantic import ValidationError

    try:
        return cls.model_validate(value)
    except ValidationError as error:
        items = error.errors()
        more = f"; and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
        raise LayerloopError("; ".join(_one_line(cls, item, where) for item in items[:_SHOWN]) + more) from None


def _one_line(cls: type[Record], item: Any, where: str) -> str:
    import difflib

    path = ".".join(str(part)[:80] for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _fields_at(cls, item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1])[:80], known, n=1)
        section, dot, key = str(item["loc"][-1])[:200].partition(".")
        if dot and section in known:  # as `--set` writes it
            remedy = f'write it as {{"{section}": {{"{key}": ...}}}}'
        else:
            elsewhere = [] if close else _keys_like(cls, str(item["loc"][-1])[:80])
            meant = close[:1] or elsewhere
            remedy = (
                f"did you mean {' or '.join(map(repr, meant))}?" if meant else f"known keys: {', '.join(sorted(known))}"
            )
        return f"{where}.{path} is not a known key: {remedy}"
    if item["type"] == "missing":
        return f"{where}.{path} is missing: set it"
    if item["type"] == "value_error":  # raised by our own validators, already a full sentence
        message = str(item["ctx"]["error"])
        return message if message.startswith(where) else f"{where}.{path}: {message}" if path else f"{where}: {message}"
    wanted = _WANTED.get(item["type"]) or item["msg"][0].lower() + item["msg"][1:]
    if item["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        close = difflib.get_close_matches(str(item["input"])[:80], choices, n=1)
        wanted = f"choose one of {', '.join(choices)}" + (f"; did you mean {close[0]!r}?" if close else "")
    return f"{where}.{path} is {_VALUES.repr(item['input'])}: {wanted}"


# In place of pydantic's words, which name classes of ours and of Python.
_MAPPING, _LIST = "give a mapping, keys with values", "give a list"
_WANTED = {
    "model_type": _MAPPING, "model_attributes_type": _MAPPING, "dict_type": _MAPPING, "mapping_type": _MAPPING,
    "list_type": _LIST, "tuple_type": _LIST, "string_type": "give text, in quotes",
}  # fmt: skip


def _fields_at(cls: type[Record], loc: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the (nested) record that `loc` points at."""
    current: Any = cls
    for part in loc:
        if hasattr(current, "model_fields"):
            field = current.model_fields.get(part)
            current = field.annotation if field is not None else None
        else:  # what a dictionary's key or a list's index leads to
            current = next(iter(_records_in(current)), None)
    return list(getattr(next(iter(_records_in(current)), None), "model_fields", ()))


def _keys_like(cls: type[Record], key: str) -> list[str]:
    """Keys of a record's sections that are called so, or nearly so, as `rollout.groups`; three at most."""
    import difflib

    dotted = [name for name in _dotted_keys(cls, "") if "." in name]
    close = difflib.get_close_matches(key, [name.rpartition(".")[2] for name in dotted], n=1)
    return [name for name in dotted if name.rpartition(".")[2] in close][:3]


def _dotted_keys(cls: Any, section: str) -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield f"{section}{name}"
        for record in _records_in(field.annotation):
            yield from _dotted_keys(record, f"{section}{name}.")


def _records_in(annotation: Any) -> list[Any]:
    """Records that an annotation mentions: itself, of `X | None`, of `dict[str, X]`, of `tuple[X, ...]`."""
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [found for argument in typing.get_args(annotation) for found in _records_in(argument)]
