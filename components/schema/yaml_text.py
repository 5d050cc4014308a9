"""YAML (or JSON) text read without surprises: a key that is given twice is an error, not a silent choice."""

from __future__ import annotations

from typing import Any

from layerloop.components.schema.errors import LayerloopError


def load_yaml(text: str | bytes, *, where: str) -> Any:
    """The value of YAML text with one document; None where it is empty.

    Raises:
        LayerloopError: not YAML, or a key twice in one mapping, in one line that begins with `where`.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            """As composed, before merges: `<<` puts the keys of another mapping into this one."""
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        line = key.start_mark.line + 1
                        raise LayerloopError(f"{where} has the key {key.value} twice (line {line}): keep one of them")
                    seen.add(key.value)
            return node

    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LayerloopError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    except (TypeError, ValueError, RecursionError):  # a date that does not exist, or ten thousand brackets
        raise LayerloopError(f"{where} is not YAML that can be read: write plain keys and values") from None
