"""A bound of safetensors headers: their JSON becomes objects many times its size, before any tensor is looked at."""

from __future__ import annotations

from layerloop.components.schema.errors import LayerloopError

LENGTH = 8  # bytes at the beginning of a file that say how long its header is
LONGEST = 10_000_000  # bytes of a header: an adapter of every layer of a 20 B model has a tenth of it
PICKLE = "a pickle of torch.save, which may run code: save it as safetensors"
_OTHERS = (  # first bytes of what people have instead
    ((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), PICKLE),
    ((b"version ",), "a pointer of Git LFS: fetch the file that it stands for (git lfs pull)"),
    ((b"<",), "a page of a web site: download the file again"),
    ((b"{", b"["), "JSON, an answer of a server perhaps: download the file again"),
    ((b"GGUF",), "GGUF, quantised: take the safetensors file that it was made from"),
    ((b"7z\xbc\xaf", b"Rar!", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"), "an archive: unpack it"),
)


def check_header(beginning: bytes, *, where: str, longest: int = LONGEST) -> None:
    """Refuse a file by its first bytes, where its header would be too long to be parsed.

    Raises:
        LayerloopError: naming `where`, and the length or what the file is.
    """
    said = int.from_bytes(beginning[:LENGTH], "little")
    if said > longest:
        if other := next((what for starts, what in _OTHERS if beginning.lstrip().startswith(starts)), None):
            raise LayerloopError(f"{where} is not safetensors but {other}")
        raise LayerloopError(
            f"{where} is not safetensors (its header has {said} bytes, over {longest}): restore or download it again"
        )
