"""Hooks of mkdocs: pages made from the code (every key of recipe and runtime) and from files outside docs/."""

from __future__ import annotations

import ast
import inspect
import os.path
import posixpath
import re
import textwrap
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.record import Record
from layerloop.components.schema.runtime import TINY, Runtime, flat

ROOT = Path(__file__).parents[1]

# Files outside docs/ that are pages of the site, by their place there.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "manifests/README.md": "manifests.md",
    "images/README.md": "images.md",
    "components/policy/README.md": "policy.md",
}
REFERENCE = {"reference/recipe.md": (Recipe, "recipe"), "reference/runtime.md": (Runtime, "runtime")}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The site's files, with the generated ones."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text()))
    for place, (model, name) in REFERENCE.items():
        files.append(File.generated(config, place, content=reference(model, name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links led to other pages; a file of the repository that is no page is named without a link."""
    place = page.file.src_uri
    source = next((name for name, at in PAGES.items() if at == place), f"docs/{place}")
    return _LINK.sub(lambda match: _led(match, source, place), markdown)


def _led(match: re.Match[str], source: str, place: str) -> str:
    mark, text, target = match.groups()
    path, _, fragment = target.partition("#")
    if not path or ":" in path:
        return match[0]
    found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if found in PAGES:
        there = PAGES[found]
    elif found.startswith("docs/") or place in REFERENCE:
        there = found.removeprefix("docs/")
    else:
        return text if text.startswith("`") else f"`{text}`" if text == path else f"{text} (`{found}`)"
    led = os.path.relpath(there, posixpath.dirname(place) or ".")
    return f"{mark}[{text}]({led}{'#' + fragment if fragment else ''})"


# ------------------------------------------------------------------------------------------------------------ reference


def reference(model: type[Record], name: str) -> str:
    """A page with every key of `model`: type and range, default, meaning."""
    tiny = flat(TINY) if name == "runtime" else {}
    intro = inspect.getdoc(inspect.getmodule(model)) or ""
    lines = [f"# Every key of the {name}", "", intro, ""]
    for path, section in _sections(model, ()):
        lines += [f"## `{'.'.join(path) or name}`", "", inspect.getdoc(section) or "", ""]
        rows = [row for key in section.model_fields if (row := _row(section, key, (*path, key), tiny))]
        if rows:
            lines += ["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def meanings(model: type[Record]) -> dict[str, str]:
    """What the comment at each field of `model` says: behind it on its line, or the lines right above it."""
    source = textwrap.dedent(inspect.getsource(model))
    lines = source.splitlines()
    found = {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        last = lines[(node.end_lineno or node.lineno) - 1]
        behind = last[node.end_col_offset :].strip()
        above = []
        for line in reversed(lines[: node.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, line.strip())
        words = " ".join(line.lstrip("# ") for line in [*above, behind] if line)
        found[node.target.id] = words
    return found


def _sections(model: type[Record], path: tuple[str, ...]) -> list[tuple[tuple[str, ...], type[Record]]]:
    inner = [
        place
        for key, field in model.model_fields.items()
        if _is_section(field)
        for place in _sections(field.annotation, (*path, key))  # type: ignore[arg-type]
    ]
    return [(path, model), *inner]


def _is_section(field: FieldInfo) -> bool:
    return inspect.isclass(field.annotation) and issubclass(field.annotation, Record)


def _row(section: type[Record], key: str, path: tuple[str, ...], tiny: dict[str, Any]) -> str | None:
    field = section.model_fields[key]
    if _is_section(field):
        return None
    default = "required" if field.default is PydanticUndefined else _shown(field.default)
    if (dotted := ".".join(path)) in tiny:
        default += f"; tiny: {_shown(tiny[dotted])}"
    words = meanings(section)[key].replace("|", "\\|")
    meaning = words[:1].upper() + words[1:]
    return f"| `{key}` | {_type(field)} | {default} | {meaning} |"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    if isinstance(value, tuple):
        return "`[" + ", ".join(map(str, value)) + "]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _type(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [
        f"{sign} {bound:g}"
        for item in field.metadata
        for name, sign in signs.items()
        if (bound := getattr(item, name, None)) is not None
    ]
    return ", ".join([_annotation(field.annotation), *limits])


def _annotation(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin is Annotated:
        return _annotation(inside[0])
    if origin in (Union, UnionType):
        return " or ".join("none" if part is type(None) else _annotation(part) for part in inside)
    if origin is tuple:
        return f"list of {_annotation(inside[0])}"
    return {int: "integer", float: "number", bool: "`true`, `false`", str: "text"}.get(annotation, str(annotation))
