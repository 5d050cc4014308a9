"""YAML (or JSON) text read without surprises: a key that is given twice is an error, not a silent choice, and no text
of a few kilobytes unfolds into gigabytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerloop.components.schema.errors import LayerloopError

if TYPE_CHECKING:
    import yaml

LONGEST = 1_000_000  # bytes of text that are parsed: PyYAML takes a minute for ten times as much
UNFOLDED = 1_000_000  # characters and nodes of what a text stands for, its aliases written out
DEEPEST = 100  # levels
LONGEST_NUMBER = 400  # characters; Python takes the square of the length for some forms


def read_by_hand(path: str | Path) -> str:
    """A text file that people write, in UTF-8 whatever the locale is. Raises OSError and UnicodeDecodeError too.

    Raises:
        LayerloopError: it is so large that it is another file: weights, an archive, a device.
    """
    with open(path, "rb") as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise LayerloopError(f"{path} has over {LONGEST} bytes, so it is no file of settings: name another one")
    return data.decode("utf-8-sig")


def load_yaml(text: str | bytes, *, where: str) -> Any:
    """The value of YAML text with one document; None where it is empty.

    Raises:
        LayerloopError: not YAML, a key twice in one mapping, or more than any settings have, in one line that begins
            with `where`.
    """
    import yaml

    if len(text) > LONGEST:
        raise LayerloopError(f"{where} has {len(text)} bytes, over {LONGEST}: give settings, not data")

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            """As composed, before merges: `<<` puts the keys of another mapping into this one."""
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        line, shown = key.start_mark.line + 1, key.value[:80]
                        raise LayerloopError(f"{where} has the key {shown} twice (line {line}): keep one of them")
                    seen.add(key.value)
            return node

        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None:
                _check_size(node, where)
            return node

    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LayerloopError(f"{where} is not YAML: {' '.join(str(error).split())[:400]}") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError):
        # a date that does not exist, `!!int` without digits, ten thousand brackets
        raise LayerloopError(f"{where} is not YAML that can be read: write plain keys and values") from None


def _check_size(root: yaml.Node, where: str) -> None:
    """Refuse what is too large or too deep with its aliases written out, before any of it is.

    Raises:
        LayerloopError: it is, a number is too long, or a value is inside itself.
    """
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        known = sizes.get(id(node))
        if known is not None:
            return known
        if id(node) in inside or depth > DEEPEST:
            raise LayerloopError(f"{where} has a value inside itself, or {DEEPEST} levels: write plain keys and values")
        if isinstance(node.value, str):
            if len(node.value) > LONGEST_NUMBER and node.tag.rpartition(":")[2] in ("int", "float", "timestamp"):
                raise LayerloopError(
                    f"{where} has a number of {len(node.value)} characters: put it in quotes if it is none"
                )
            found = 1 + len(node.value)
        else:
            inside.add(id(node))
            parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
            found = 1 + sum(size(part, depth + 1) for part in parts)
            inside.discard(id(node))
        if found > UNFOLDED:
            raise LayerloopError(f"{where} unfolds to over {UNFOLDED} characters by its aliases: write plain values")
        sizes[id(node)] = found
        return found

    size(root, 0)
