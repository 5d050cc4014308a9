"""A bound of safetensors headers: their JSON becomes objects many times its size, before any tensor is looked at."""

from __future__ import annotations

from layerloop.components.schema.errors import LayerloopError

LENGTH = 8  # bytes at the beginning of a file that say how long its header is
LONGEST = 10_000_000  # bytes of a header: an adapter of every layer of a 20 B model has a tenth of it


def check_header(beginning: bytes, *, where: str, longest: int = LONGEST) -> None:
    """Refuse a file by its first bytes, where its header would be too long to be parsed.

    Raises:
        LayerloopError: naming `where` and the length.
    """
    said = int.from_bytes(beginning[:LENGTH], "little")
    if said > longest:
        raise LayerloopError(f"{where} says that its header has {said} bytes, over {longest}: it is not safetensors")
