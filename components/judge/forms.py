"""Where in the JSON of a reply the answer lies, by what its keys are called.

It may be the value itself, lie under the answer's key, be wrapped, or lie in two places, which are two readings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from layerloop.components.judge.relaxed import read_relaxed
from layerloop.components.judge.replies import UnusableError
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import TOP

_LABEL = re.compile(r"^(?:candidate|row|decomposition)?_?#?_?0*(\d+)[.:)]?$")
# Keys of a judge's own, without what parts words: of a score's scale, of another answer, around one, and of none.
SCALE = re.compile(
    r"(?:max|maximum)(?:possible)?(?:scores?|ratings?|points?|value)?|(?:scores?|ratings?)?(?:max|maximum|scale|"
    r"range|outof)"
)
_RIVAL = re.compile(r"score|final|revis|correct|adjust|updat|answer|result|judge?ment|rating|evaluation")
_WRAP = re.compile(
    rf"{_RIVAL.pattern}|respon|output|assess|data|argument|parameter|content|json|candidate|row|decomposition|grid|review|"
    "grade|verdict|report|tool|function|criteri|quality|item|object|message|body|payload"
)
NO_ANSWER = re.compile(
    r"think|thought|reason|scratch|draft|analys|example|template|schema|properties|initial|previous|first|phase1|before|"
    r"original|confiden|weight|uncertain|explain|explan|comment|justif|rationale|note|observ|max|range"
)


def plain(key: Any) -> str:
    """A key in lower case with underscores, as a judge may write it in any case, with spaces or hyphens."""
    return re.sub(r"[\s\-]+", "_", str(key).strip("*` \t\n").lower())


def is_candidate_label(key: Any) -> bool:
    """Whether a key names a row: "candidate_1", "row 1", "Candidate #1" or "1"."""
    return label_of(key) is not None


def label_of(key: Any) -> int | None:
    """The row that a key or a value names; None where it names none."""
    match = _LABEL.match(plain(key)) if isinstance(key, str | int) and not isinstance(key, bool) else None
    return None if match is None or str(key).lstrip().startswith("-") else int(match[1][:9])


def letters(key: Any) -> str:
    """A key by its letters and digits: "Semantic separation", semanticSeparation and semantic_separation are one."""
    return re.sub(r"[\W_]+", "", str(key).lower())


def named(value: Any, request: Request) -> bool:
    """Whether a JSON object has a criterion."""
    return isinstance(value, dict) and not {letters(n) for n in request.names}.isdisjoint(map(letters, value))


def forms_in(value: Any, request: Request) -> Iterator[Any]:
    """Everything in a JSON value that can be meant as the answer, however wrong in detail.

    That is the value itself or what lies under the answer's key, and what lies beside it under a key that claims to be
    an answer too; or what the value wraps. What stands under the name of a thought, of a draft or of an earlier
    judgement is none.

    Raises:
        UnusableError: out_of_range: another scale is said beside it.
    """
    if isinstance(value, str):
        read = read_relaxed(value.strip()) if value.lstrip()[:1] in ("{", "[") else None
        value = None if read is None else read[0]
    if isinstance(value, list):
        rows = [item for item in value if isinstance(item, dict)]
        several = request.answer.by_candidate and rows and not (len(value) == 1 < request.rows)
        if several or isinstance(by_criterion(value, request), dict):
            yield value
        else:
            for item in rows[:50]:
                yield from forms_in(item, request)
    if not isinstance(value, dict):
        return
    key, by_candidate = letters(request.answer.key), request.answer.by_candidate
    used = [k for k in value if letters(k) == key]
    whole = set(map(letters, request.names)) <= set(map(letters, value))
    if used:
        forms = [value[k] for k in used if value[k] is not None]
        forms = [next(forms_in(form, request), form) if isinstance(form, str) else form for form in forms]
        if whole and not by_candidate:  # the criteria are given beside it once more
            forms.append({k: value[k] for k in value if letters(k) in set(map(letters, request.names))})
    else:
        used = [k for k in value if is_candidate_label(k)]
        forms = [value] if used or (whole if by_candidate else named(value, request)) else []
    if forms:
        check_scale(value, request.names)
    yield from forms
    claims = _RIVAL if forms else _WRAP
    for k, item in value.items():
        if k not in used and wraps(k, request, claims):
            yield from forms_in(item, request)


def wraps(key: Any, request: Request, claims: re.Pattern[str] = _WRAP) -> bool:
    """Whether the answer may lie under a key, by what it is called."""
    name = letters(key)
    return name == letters(request.kind) or (claims.search(name) is not None and not NO_ANSWER.search(name))


def check_scale(value: Mapping[Any, Any], names: Sequence[str] = ()) -> None:
    """Refuse an object that says beside its scores that they are of another scale than 0..TOP: {"max_score": 10}. Keys
    of `names` are scores.

    Raises:
        UnusableError: out_of_range.
    """
    for key, item in value.items():
        if letters(key) in map(letters, names) or not SCALE.fullmatch(letters(key)):
            continue
        if isinstance(item, str | int | float) and not isinstance(item, bool):
            numbers = re.findall(r"\d+(?:\.\d+)?", str(item))
            if numbers and max(map(float, numbers)) != TOP:
                raise UnusableError("out_of_range", f"{str(key)[:40]} is {str(item)[:40]!r}, not {TOP}")


def by_criterion(entries: list[Any], request: Request) -> Any:
    """{name: entry} of a list whose entries each name one criterion; the list where they do not."""
    names = {letters(name): name for name in request.names}
    out: dict[str, Any] = {}
    for entry in entries:
        said = {names[letters(v)] for v in entry.values() if letters(v) in names} if isinstance(entry, dict) else set()
        if len(said) != 1 or not said.isdisjoint(out):
            return entries
        out[said.pop()] = entry
    return out or entries
