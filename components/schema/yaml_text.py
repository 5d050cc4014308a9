"""YAML as it is meant: a key that is given twice is an error, where YAML's own loader takes the last one silently."""

from __future__ import annotations

from typing import Any

from layerloop.components.schema.errors import LayerloopError


def read_yaml(text: str | bytes, *, what: str) -> Any:
    """The value of YAML (or JSON) text.

    Raises:
        LayerloopError: not YAML, nested too deep, or a key given twice, in one line that begins with `what`.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a mapping that gives a key twice."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            lines: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    line = key.start_mark.line + 1
                    if (name := (key.tag, key.value)) in lines:
                        raise LayerloopError(
                            f"{what} gives the key {key.value} twice, in lines {lines[name]} and {line}: keep one"
                        )
                    lines[name] = line
            return node

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise LayerloopError(f"{what} is not YAML: {' '.join(str(error).split())}") from None
