"""What is fuzzed, and the rule: a result that its input explains, a reject, or one line; never anything else.

A target is a strategy and a function of what it draws. The function raises AssertionError where the rule is broken;
what the code under it raises, apart from its own refusals, breaks it by itself.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import math
import os
import re
import struct
import tarfile
import tempfile
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import peft  # noqa: F401 - the reader imports it when it needs it, which would count as an example's time
import torch
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image, ImageCms
from pillow_heif import register_heif_opener
from psd_tools.constants import Tag

from layerloop.components.decompose.pictures import look_at
from layerloop.components.judge.address import judge_address
from layerloop.components.judge.errors import read_error, shown
from layerloop.components.judge.features import EndpointFeatures
from layerloop.components.judge.images import candidate_images, encode_image
from layerloop.components.judge.methods import grid, rubric
from layerloop.components.judge.network import BodyError, plain_body, read_coding
from layerloop.components.judge.parsing import parse
from layerloop.components.judge.replies import Reply, UnusableError, Usage, read_body
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import load_rubric
from layerloop.components.judge.serving import thought_in
from layerloop.components.judge.transport import Connection
from layerloop.components.layers.export import write_psd
from layerloop.components.layers.normalise import upright_srgb
from layerloop.components.layers.psd_reading import read_layers
from layerloop.components.policy.adapters import read_adapter
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.manifest import Shard
from layerloop.components.schema.recipe import DataRecipe, Recipe, parse_recipe
from layerloop.components.schema.yaml_text import load_yaml
from layerloop.components.shard_dataset import listed
from layerloop.components.shard_dataset.inputs import find_inputs, read_items
from layerloop.components.shard_dataset.items import Item
from layerloop.components.shard_dataset.samples import Prepared, Refused, guarded, prepare_image
from layerloop.components.storage.images import decode_image, decode_png
from layerloop.components.storage.local import LocalStore
from layerloop.components.storage.shards import read_sample, read_shard, sample_ranges

listed._PAUSE = listed.TIMEOUT = 0.01  # type: ignore[misc] - no server is waited for
set_hypothesis_home_dir(Path(__file__).parents[2] / "build" / "hypothesis")
LONGEST = 12_000  # characters of a message


@dataclass(frozen=True)
class Target:
    """Something to draw, and what must hold for it."""

    draws: st.SearchStrategy[Any]
    holds: Callable[[Any], None]


def one_line(text: str) -> None:
    """A message for people: short, printable, and one line."""
    assert text and len(text) <= LONGEST, f"{len(text)} characters"
    assert "\n" not in text and "\r" not in text, repr(text[:300])
    assert "Traceback" not in text, text[:300]


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """One of some valid inputs with bytes changed, inserted, repeated, left out or cut off."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(("byte", "word", "insert", "delete", "repeat", "cut"))):
            case "byte":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "word":
                word = draw(st.sampled_from((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\xff" * 8)))
                data[at : at + len(word)] = word
            case "insert":
                data[at:at] = draw(st.binary(max_size=40))
            case "delete":
                del data[at : at + draw(st.integers(1, 64))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 200))]
            case "cut":
                del data[at:]
    return bytes(data)


# --------------------------------------------------------------------------------------------------------------- images


def _exif() -> list[bytes]:
    full = Image.Exif()
    full.update({0x0112: 6, 0x010F: "maker", 0x0132: "2026:01:01 00:00:00", 0x9286: b"UNICODE\0a\0b"})
    turned = Image.Exif()
    turned[0x0112] = 8
    big_endian = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    return [full.tobytes(), turned.tobytes(), big_endian]


SIZE = (40, 24)


def _holds_image(drawn: tuple[bytes, str]) -> None:
    exif, kind = drawn
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, (200, 30, 60)).save(buffer, kind)
    data = buffer.getvalue()
    if kind == "JPEG":
        block = exif[:65_000]
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    elif kind == "PNG":
        block = exif.removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
        data = data[:33] + chunk + data[33:]
    _holds_prepared(data)


def _holds_prepared(data: bytes) -> None:
    result = prepare_image(Item("picture", lambda: data), DataRecipe())
    if not isinstance(result, Prepared):
        assert result.kind == "reject"
        one_line(result.reason)
        return
    record = json.loads(result.members["json"])
    original = record["original_width"], record["original_height"]
    assert original in (SIZE, SIZE[::-1])  # as it is or turned, and nothing else
    assert abs(record["width"] / record["height"] / (original[0] / original[1]) - 1) < 0.1
    pixel = Image.open(io.BytesIO(result.members["png"])).convert("RGB").getpixel((5, 5))
    assert max(abs(a - b) for a, b in zip(pixel, (200, 30, 60), strict=True)) < 12  # type: ignore[arg-type]


def _pictures() -> list[bytes]:
    """A small picture in every format that is read, of several modes and packings, some with profile and EXIF."""
    register_heif_opener()
    colour = Image.linear_gradient("L").resize(SIZE).convert("RGB")
    colour.paste((200, 30, 60), (4, 4, 20, 20))
    clear = colour.convert("RGBA")
    clear.putalpha(Image.radial_gradient("L").resize(SIZE))
    grey, palette = colour.convert("L"), clear.quantize(8)
    extra = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), "exif": _exif()[0]}
    two = {"save_all": True, "append_images": [clear]}
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (colour, "JPEG", {"progressive": True, **extra}), (colour.convert("CMYK"), "JPEG", {}), (grey, "JPEG", {}),
        (clear, "PNG", extra), (palette, "PNG", {}), (grey.convert("I;16"), "PNG", {}), (grey.convert("1"), "PNG", {}),
        (clear, "PNG", two), (clear, "WEBP", {"lossless": True, **extra}), (clear, "WEBP", two), (palette, "GIF", {}),
        (colour, "BMP", {}), (grey, "PPM", {}), (clear, "TIFF", {}), (clear, "TIFF", two),
        (colour, "TIFF", {"compression": "jpeg"}), (grey.convert("1"), "TIFF", {"compression": "group4"}),
        (palette, "TIFF", {"compression": "tiff_lzw"}), (colour, "TIFF", {"compression": "packbits"}),
        (Image.new("LAB", SIZE, (120, 20, 200)), "TIFF", {"compression": "tiff_adobe_deflate"}),
        (clear, "JPEG2000", {}), (colour, "JPEG2000", {"irreversible": True, "num_resolutions": 2}),
        (clear, "AVIF", {}), (colour, "HEIF", extra), (colour, "MPO", {"save_all": True, "append_images": [colour]}),
        (colour, "AVIF", extra), (clear, "BMP", {}), (colour.convert("YCbCr"), "TIFF", {}),
        (colour, "TIFF", {"tiffinfo": {274: 6}}), (grey.convert("I;16"), "TIFF", {"compression": "tiff_lzw"}),
    ]  # fmt: skip
    out = [_png_with_colours(colour)]
    for image, kind, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        out.append(buffer.getvalue())
    return out


def _png_with_colours(picture: Image.Image) -> bytes:
    """A PNG that says its colours by code points, gamma and chromaticities."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    said = {b"cICP": bytes([12, 13, 0, 1]), b"gAMA": b"\0\1\x11\x70", b"cHRM": struct.pack(">8I", *[32_000] * 8)}
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in said.items()]
    return buffer.getvalue()[:33] + b"".join(chunks) + buffer.getvalue()[33:]


def _holds_picture(data: bytes) -> None:
    """A picture of the size that is told, or a reject; where decompose can look at it and read it, of one size."""
    result = prepare_image(Item("picture", lambda: data), DataRecipe())
    if isinstance(result, Prepared):
        record = json.loads(result.members["json"])
        assert decode_png(result.members["png"]).shape == (record["height"], record["width"], 3)
    else:
        assert result.kind == "reject"
        one_line(result.reason)
        assert "cannot be used" not in result.reason, "what no reader of pictures foresaw"
    with tempfile.NamedTemporaryFile(prefix="layerloop-fuzz-") as file:
        file.write(data)
        file.flush()
        try:
            seen = look_at(file.name)
            if seen.width * seen.height < 1_000_000:
                assert seen.read().shape[:2] == (seen.height, seen.width)
        except LayerloopError as error:
            one_line(str(error))


@st.composite
def _pngs(draw: st.DrawFn) -> tuple[bytes, np.ndarray]:
    """A PNG of any depth and colour type, and its samples `(H, W, C)` with C = 1, 2, 3 or 4, alpha by tRNS."""
    colour = draw(st.sampled_from([0, 2, 4, 6]))
    depth = draw(st.sampled_from([1, 2, 4, 8, 16] if colour == 0 else [8, 16]))
    channels, top = {0: 1, 2: 3, 4: 2, 6: 4}[colour], 2**depth - 1
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 9)), channels)
    known = draw(st.lists(st.integers(0, top), min_size=1, max_size=3))  # few, so that the clear one is there
    samples = np.array([draw(st.sampled_from(known)) for _ in range(math.prod(shape))]).reshape(shape)
    bits = ((samples[..., None] >> np.arange(depth)[::-1]) & 1).astype(np.uint8)
    rows = [b"\0" + np.packbits(row.reshape(-1)).tobytes() for row in bits]
    clear = draw(st.none() | st.tuples(*[st.sampled_from([*known, top])] * channels)) if colour in (0, 2) else None
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", shape[1], shape[0], depth, colour, 0, 0, 0))]
    chunks += [(b"tRNS", struct.pack(f">{channels}H", *clear))] if clear else []
    chunks += [(b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    alpha = [np.where((samples == clear).all(-1, keepdims=True), 0, top)] if clear else []
    return b"\x89PNG\r\n\x1a\n" + data, np.concatenate([samples, *alpha], axis=-1) / top


def _holds_pixels(drawn: tuple[bytes, np.ndarray]) -> None:
    """What is read is what the samples say, to within a level."""
    data, wanted = drawn
    read = np.asarray(upright_srgb(decode_image(data))) / 255
    alpha = wanted[..., -1:] if wanted.shape[-1] in (2, 4) else np.ones_like(wanted[..., :1])
    colour = wanted[..., :3] if wanted.shape[-1] > 2 else np.repeat(wanted[..., :1], 3, axis=-1)
    found = read[..., 3:] if read.shape[-1] == 4 else np.ones_like(alpha)
    assert np.abs(read[..., :3] - colour).max() < 1.01 / 255
    assert np.abs(found - alpha).max() < 1.01 / 255


@st.composite
def _grey_tiffs(draw: st.DrawFn) -> tuple[bytes, int, int, int, list[int]]:
    """A grey TIFF with bits, what 0 is (TIFF 6.0: 0 white, 1 black), type of numbers, and values."""
    bits, white_is_zero, kind = draw(
        st.sampled_from([(8, 0, 1), (8, 1, 1), (12, 1, 1), (16, 0, 1), (16, 1, 1), (32, 1, 1)])
    )
    values = draw(st.lists(st.integers(0, 2 ** min(bits, 16) - 1), min_size=8, max_size=8))
    entries = (
        (256, 8),
        (257, 1),
        (258, bits),
        (259, 1),
        (262, white_is_zero),
        (273, 134),
        (277, 1),
        (278, 1),
        (279, bits),
        (339, kind),
    )
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries) + bytes(4)
    if bits == 12:
        raw = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in zip(values[::2], values[1::2], strict=True))
    else:
        raw = np.array(values).astype(f"<u{bits // 8}").tobytes()
    return head + raw, bits, white_is_zero, kind, values


def _holds_grey(drawn: tuple[bytes, int, int, int, list[int]]) -> None:
    data, bits, black_is_zero, _, values = drawn
    assert len(data) == 134 + bits
    try:
        read = np.asarray(upright_srgb(decode_image(data)))[0, :, 0]
    except LayerloopError as error:
        assert bits == 32 and 1 < max(values) <= 255, str(error)
        one_line(str(error))
        return
    shares = np.array(values) / (2 ** min(bits, 16) - 1)
    assert np.abs(read / 255 - (shares if black_is_zero else 1 - shares)).max() < 1.01 / 255


# -------------------------------------------------------------------------------------------------------------- replies

RUBRIC = load_rubric("default")


def _requests() -> list[Request]:
    stack = np.zeros((2, 32, 32, 4), np.uint8)
    source, recipe = encode_image(stack[0, ..., :3]), JudgeRecipe()
    alone = rubric.request(RUBRIC, source, candidate_images(stack, ("white",)), recipe, label="alone")
    phase1 = [dict.fromkeys(RUBRIC.names, 0.6)] * 3
    return [alone, grid.request(RUBRIC, source, {"white": source}, recipe, phase1=phase1, layers=2, label="three")]


REQUESTS = _requests()
_NUMBERS = st.one_of(st.integers(-1, 6), st.floats(-1, 7, width=32), st.sampled_from(["4/5", "3 out of 5", None, True]))
_FORM = st.one_of(
    st.fixed_dictionaries(dict.fromkeys(RUBRIC.names, _NUMBERS)),
    st.fixed_dictionaries(
        {f"candidate_{n}": st.fixed_dictionaries(dict.fromkeys(RUBRIC.names, _NUMBERS)) for n in (1, 2, 3)}
    ),
    st.dictionaries(st.sampled_from([*RUBRIC.names, "scores", "candidate_1"]), _NUMBERS, max_size=6),
)
_KEYS = st.sampled_from(
    [
        "scores",
        "final_scores",
        "result",
        "thinking",
        "draft",
        "max_score",
        "scale",
        "candidate_2",
        "Row 3",
        *RUBRIC.names,
    ]
)
_PIECES = st.one_of(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<thought>",
            "[THINK]",
            "[/THINK]",
            "◁think▷",
            "◁/think▷",
            "<|channel|>analysis<|message|>",
            "<|channel|>final<|message|>",
            "<|end|>",
            "```json\n",
            "```",
            "~~~",
            "assistantfinal",
            "analysisWe",
            "{",
            "}",
            "[",
            "]",
            '"scores":',
            "'",
            '"',
            ",",
            "I'm sorry, but I can't",
            "<think/>",
            "&lt;think&gt;",
            "\ufeff",
            "\0",
            "NaN",
            "Infinity",
            "1e999",
            "-",
            ":",
        ]
    ),
    _FORM.map(json.dumps),
    _FORM.map(lambda form: json.dumps({"scores": form})),
    _FORM.map(lambda form: repr({"scores": form})),
    st.recursive(
        _FORM, lambda inner: st.dictionaries(_KEYS, inner | _NUMBERS, max_size=3) | st.lists(inner, max_size=3)
    ).map(json.dumps),
    _FORM.map(lambda form: re.sub(r'"(\w+)":', r"\1: /* so */", json.dumps({"scores": form})).replace("}", ",}")),
    _FORM.map(lambda form: "\n".join(f"{name}: {value}" for name, value in form.items())),
    st.text(max_size=30),
)
_REPLY = st.tuples(st.lists(_PIECES, max_size=10).map("".join), st.sampled_from(["stop", "length"]), st.integers(0, 1))


def _holds_reply(drawn: tuple[str, str, int]) -> None:
    text, finish, which = drawn
    request = REQUESTS[which]
    try:
        rows = parse(request, Reply(text, finish, Usage()))
    except UnusableError as error:
        one_line(error.reason)
        return
    assert len(rows) == request.rows
    said = {round(float(number), 6) for number in re.findall(r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", text)}
    for row in rows:
        assert tuple(row) == request.names or set(row) == set(request.names)
        for value in row.values():
            assert 0 <= value <= 1 and math.isfinite(value)
            assert any(abs(value * 5 - number) < 1e-4 for number in said), f"{value * 5} is nowhere in the reply"


_WHOSE = st.sampled_from(
    [
        "candidate",
        "Candidate ID",
        "row",
        "name",
        "index",
        "id",
        "number",
        "rank",
        "place",
        "total",
        "decomposition no",
        "",
    ]
)


@st.composite
def _labelled(draw: st.DrawFn) -> tuple[str, dict[int, int] | None]:
    """A list of three entries in some order under some label, and the score of each candidate if that can be known."""
    order, word, name = (
        draw(st.permutations([1, 2, 3])),
        draw(st.sampled_from(["", "candidate ", "Row "])),
        draw(_WHOSE),
    )
    scores = draw(st.lists(st.integers(0, 5), min_size=3, max_size=3))
    entries = [
        {**({name: f"{word}{n}" if word else n} if name else {}), **dict.fromkeys(RUBRIC.names, score)}
        for n, score in zip(order, scores, strict=True)
    ]
    known = name not in ("rank", "place", "total") or list(order) == [1, 2, 3]
    said = dict(zip(order if name else (1, 2, 3), scores, strict=True))
    return json.dumps({"scores": entries}), said if known else None


def _holds_labelled(drawn: tuple[str, dict[int, int] | None]) -> None:
    text, said = drawn
    try:
        rows = parse(REQUESTS[1], Reply(text, "stop", Usage()))
    except UnusableError as error:
        assert said is None, str(error)
        return
    assert said is not None, "whose the scores are is not said"
    assert {n: round(5 * next(iter(row.values()))) for n, row in enumerate(rows, 1)} == said


_JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just("400"), st.just("code")
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(
                [
                    "error",
                    "message",
                    "detail",
                    "loc",
                    "msg",
                    "code",
                    "metadata",
                    "raw",
                    "choices",
                    "usage",
                    "content",
                    "type",
                    "finish_reason",
                    "reasoning",
                    "prompt_tokens",
                    "prompt_tokens_details",
                    "cached_tokens",
                    "param",
                    "refusal",
                    "completion_tokens_details",
                    "logprobs",
                    "token",
                ]
            ),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=20,
)
_ERROR_BODY = st.one_of(
    _JSON.map(lambda value: json.dumps(value).encode()),
    _JSON.map(lambda value: json.dumps({"error": {"message": f"failed: {json.dumps(value)}"}}).encode()),
    _JSON.map(lambda value: json.dumps({"choices": [{"message": value}], "usage": value}).encode()),
    _JSON.map(lambda value: f"<html><title>{value}</title><body>{value}".encode()),
    st.binary(max_size=200),
    st.sampled_from(
        [b"[" * 50_000, b"{'a':" * 20_000, b"<" * 100_000, b"<script>" * 10_000, b'{"error":"' + b"\\u00e9" * 30_000]
    ),
)


def _holds_error_body(body: bytes) -> None:
    text = read_error(body)
    assert "\n" not in text and "\r" not in text
    assert len(shown(text)) < 500
    EndpointFeatures(logprobs=True).without(text)
    thought_in(body)
    try:
        reply = read_body(body)
    except UnusableError as error:
        one_line(error.reason)
    else:
        assert reply.text.strip() and reply.usage.input >= 0 and reply.usage.output >= 0


def _holds_coded(drawn: tuple[bytes, str, str, list[int], int]) -> None:
    """A body comes out as it went in, or is refused by name, and never longer than is allowed."""
    data, packing, coding, cuts, most = drawn
    body = {"gzip": gzip.compress, "zlib": zlib.compress, "no": bytes}[packing](data)
    parts = [body[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), len(body)], strict=True)]

    async def read() -> bytes:
        async def stream() -> AsyncIterator[bytes]:
            for part in parts:
                yield part

        known = read_coding({"content-encoding": coding})
        return b"".join([part async for part in plain_body(stream(), known, most)])

    try:
        out = asyncio.run(read())
    except BodyError as error:
        one_line(str(error))
        assert max(len(data), len(body)) > most or error.problem.reason == "body_compressed"
        return
    plain = packing == "no" or (packing == "zlib" and coding != "deflate")
    assert out == (body if plain else data) or (plain and out == zlib.decompress(body, zlib.MAX_WBITS | 32))


_URLISH = st.one_of(
    st.sampled_from(
        [
            "http://",
            "https://",
            "socks5://",
            "ftp://",
            "h:1",
            "http://h:99999",
            "http://[::1",
            "http://u:SECRET@h:1",
            " http://h ",
            '"http://h"',
            "//",
            "h",
            "http://h:x",
            "http://\u200b",
            "*",
            "::1",
            "fd00::/8",
            "[::1]:3",
        ]
    ),
    st.text(alphabet=st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=12),
)
_PROXIES = st.dictionaries(
    st.sampled_from(
        ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy", "OPENAI_ORG_ID"]
    ),
    _URLISH,
    max_size=3,
)


def _holds_proxies(drawn: tuple[str, dict[str, str]]) -> None:
    host, variables = drawn
    url = f"http://{host}/v1"
    with patch.dict(os.environ, variables):
        try:
            judge_address(url)
            connection = Connection(url, "key")
            asyncio.run(connection.close())
        except LayerloopError as error:
            one_line(str(error))
            assert "SECRET" not in str(error)


# ---------------------------------------------------------------------------------------------------------- containers


def _png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


CONTENTS = [_png(10), _png(20), _png(30)]


def _tars() -> list[bytes]:
    out = []
    for layout in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=layout) as tar:
            for number, content in enumerate(CONTENTS):
                info = tarfile.TarInfo(f"{'long/' * 30 if number == 1 else ''}{number:06d}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        out.append(buffer.getvalue()[: 6 * 1024])
    return out


def _parquets() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = []
    for columns, options in (
        ({"image": pa.array(CONTENTS, pa.binary())}, {"compression": "none"}),
        ({"image": pa.array([{"bytes": data, "path": "a"} for data in CONTENTS])}, {"compression": "snappy"}),
        ({"image": pa.array(CONTENTS * 3, pa.binary())}, {"compression": "zstd", "row_group_size": 2}),
    ):
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer, **options)
        out.append(buffer.getvalue())
    return out


def _holds_container(data: bytes, name: str, *, exact: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="layerloop-fuzz-") as folder:
        Path(folder, name).write_bytes(data)
        inputs = find_inputs(folder, what="images")
        try:
            items = list(read_items(inputs, max_bytes=1_000_000))
        except LayerloopError as error:
            one_line(str(error))
            return
    assert len(items) < 20_000  # each of the rows that a damaged table says that a group has, up to 10,000
    for item in items:
        one_line(item.origin)
        if item.problem is not None:
            one_line(item.problem)
        elif exact:
            assert item.load() in data, "bytes that the tar does not have"


_LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "a.png",
                "./a.png",
                "a.tar",
                "~/a.png",
                "http://[::1/a.png",
                "http:///a.png",
                "http://h:x/a.tar",
                "http://u:SECRET@[x/a.png",
                "s3://",
                "file:///%00.png",
                "file://localhost/a%20b.png",
                "#x",
                "\0.png",
                "C:\\a.png",
                "hf://x",
                "gopher://u:SECRET@h/a",
                "http://h:70000/a.png?k=SECRET",
                "a" * 300 + ".tar",
            ]
        ),
        st.text(max_size=9).map(lambda text: f"{text}.png"),
        st.text(max_size=9).map(lambda text: f"file://{text}"),
    ),
    max_size=5,
)


def _holds_list(drawn: tuple[list[str], str]) -> None:
    lines, codec = drawn
    with tempfile.TemporaryDirectory(prefix="layerloop-fuzz-") as folder:
        Path(folder, "l.txt").write_bytes("\n".join(lines).encode(codec, "surrogatepass"))
        Path(folder, "a.png").write_bytes(b"x")
        try:
            items = list(read_items(find_inputs(f"{folder}/l.txt", what="images"), max_bytes=99))
        except LayerloopError as error:
            one_line(str(error))
            assert "SECRET" not in str(error)
            return
        for item in items:
            one_line(item.origin)
            outcome = guarded(item.origin, item.load, lambda data: data)  # type: ignore[arg-type,return-value]
            for text in (item.origin, item.problem or "", outcome.reason if isinstance(outcome, Refused) else ""):
                assert "SECRET" not in text and "Traceback" not in text


@st.composite
def _columns(draw: st.DrawFn) -> bytes:
    """A table with a column `image` of any type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cell = draw(
        st.sampled_from(
            [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(3), pa.string(), pa.int64(), pa.null()]
        )
    )
    values = [
        None
        if cell in (pa.null(),) or draw(st.booleans())
        else 7
        if cell == pa.int64()
        else "abc"
        if cell == pa.string()
        else b"abc"
        for _ in range(3)
    ]
    column = pa.array(values, cell)
    wrap = draw(st.sampled_from(["", "dictionary", "struct", "list", "list of struct"]))
    if wrap == "dictionary" and cell not in (pa.null(), pa.binary_view()):
        column = column.dictionary_encode()
    if "struct" in wrap:
        column = pa.StructArray.from_arrays(
            [column, pa.array(["p"] * 3)], [draw(st.sampled_from(["bytes", "data"])), "path"]
        )
    if wrap.startswith("list") and cell != pa.binary_view():
        column = pa.ListArray.from_arrays([0, 2, 2, 3], column)
    buffer = io.BytesIO()
    pq.write_table(pa.table({draw(st.sampled_from(["image", "x", "im\nage"])): column}), buffer)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- adapters

MODULE = "transformer_blocks.0.attn.to_q"
CONFIGS = st.fixed_dictionaries(
    {"peft_type": st.sampled_from(["LORA", "LOHA", None, 3])},
    optional={
        "r": st.one_of(st.integers(-2, 8), st.text(max_size=3)),
        "lora_alpha": st.one_of(
            st.integers(-5, 10**30), st.floats(), st.text(max_size=3), st.none(), st.lists(st.integers())
        ),
        "alpha_pattern": st.one_of(
            st.dictionaries(
                st.one_of(st.text(max_size=12), st.sampled_from(["(a+)+$", "to_q", "(", ".*", "(.*)*x", "a{9}{9}"])),
                st.one_of(st.integers(), st.floats(), st.text(max_size=3)),
                max_size=3,
            ),
            st.text(max_size=4),
            st.lists(st.integers(), max_size=2),
        ),
        "use_rslora": st.one_of(st.booleans(), st.text(max_size=2)),
        "use_dora": st.booleans(),
        "modules_to_save": st.one_of(st.none(), st.lists(st.text(max_size=3), max_size=2)),
    },
)


def _safetensors() -> list[bytes]:
    from safetensors.numpy import save

    a, b = np.ones((2, 4), np.float32), np.ones((4, 2), np.float32)
    return [
        save({f"base_model.model.{MODULE}.lora_A.weight": a, f"base_model.model.{MODULE}.lora_B.weight": b}),
        save(
            {
                f"diffusion_model.{MODULE}.lora_down.weight": a,
                f"diffusion_model.{MODULE}.lora_up.weight": b,
                f"diffusion_model.{MODULE}.alpha": np.array(2, np.float32),
            }
        ),
        save(
            {f"transformer.{MODULE}.lora_A.weight": a, f"transformer.{MODULE}.lora_B.weight": b},
            metadata={"lora_adapter_metadata": '{"transformer.lora_alpha": 4, "transformer.r": 2}'},
        ),
    ]


def _holds_adapter(drawn: tuple[bytes, bytes, str]) -> None:
    weights, config, name = drawn
    with tempfile.TemporaryDirectory(prefix="layerloop-fuzz-") as folder:
        Path(folder, name).write_bytes(weights)
        Path(folder, "adapter_config.json").write_bytes(config)
        try:
            adapter = read_adapter(folder)
        except LayerloopError as error:
            one_line(str(error))
            return
    assert adapter.rank >= 1 and math.isfinite(adapter.alpha)
    assert all(torch.isfinite(value).all() for value in adapter.state.values())


_SIDES = st.sampled_from(
    [
        "lora_A.weight",
        "lora_B.weight",
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
        "dora_scale",
        "lora_A.a.weight",
        "diff",
    ]
)
_PREFIXES = st.sampled_from(["", "transformer.", "diffusion_model.", "base_model.model.", "pipe.dit.", "lora_te_"])
_SHAPES = st.sampled_from([(2, 4), (4, 2), (0, 4), (4, 0), (), (1,), (0,), (3, 4), (2, 4, 1)])
_DTYPES = st.sampled_from(
    [torch.float32] * 5 + [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64, torch.float64]
)
_METADATA = st.none() | st.dictionaries(
    st.sampled_from(
        [
            "transformer.lora_alpha",
            "transformer.r",
            "transformer.use_dora",
            "transformer.init_lora_weights",
            "transformer.alpha_pattern",
        ]
    ),
    st.sampled_from([0, 4, -1, True, "pissa", "gaussian", None, {}, [1], float("nan"), 1e39]),
    max_size=3,
)
_TENSORS = st.dictionaries(
    st.tuples(_PREFIXES, _SIDES).map(lambda parts: f"{parts[0]}{MODULE}.{parts[1]}"),
    st.tuples(_SHAPES, _DTYPES, st.sampled_from([0.0, 1.0, -2.5])),
    min_size=1,
    max_size=4,
)


def _holds_tensors(drawn: tuple[dict[str, tuple[tuple[int, ...], torch.dtype, float]], dict[str, Any] | None]) -> None:
    """What is read is the product of its matrices, to the scale that its own alpha or metadata give."""
    from safetensors.torch import save_file

    described, config = drawn
    tensors = {key: torch.full(shape, value).to(dtype) for key, (shape, dtype, value) in described.items()}
    with tempfile.TemporaryDirectory(prefix="layerloop-fuzz-") as folder:
        file = Path(folder, "x.safetensors")
        save_file(tensors, str(file), metadata={"lora_adapter_metadata": json.dumps(config)} if config else None)
        try:
            adapter = read_adapter(file)
        except LayerloopError as error:
            one_line(str(error))
            return
    assert adapter.rank >= 1 and adapter.alpha != 0 and math.isfinite(adapter.alpha)
    fields = config or {}
    assert not fields.get("transformer.use_dora") and fields.get("transformer.init_lora_weights") != "pissa"


# --------------------------------------------------------------------------------------------------------------- shards

_LETTERS = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_PLAIN = [f"{key}.{suffix}" for key in ("a", "b", "C-1") for suffix in ("json", "x.png", "layer0.png")]
_ODD = [
    "../a.json",
    "/a.json",
    "a/b.json",
    "nosuffix",
    "a.JSON",
    "a..json",
    ".json",
    "a.json.",
    "é.json",
    "a.j\n",
    "a. b",
]
_TYPES = [b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"\0", b"X"]


@dataclass(frozen=True)
class Entry:
    """One header of a tar, as a hostile writer may set it, and its data."""

    name: str
    data: bytes
    kind: bytes  # the type flag; `0` is a file
    fault: str

    def encoded(self) -> bytes:
        """Header and data in blocks of 512 bytes (POSIX.1-1988, ustar)."""
        sizes = {"negative": b"\xff" * 12, "huge": b"77777777777\0"}
        size = sizes.get(self.fault, b"%011o\0" % len(self.data))
        head = self.name.encode().ljust(100, b"\0") + b"0000444\0" + b"0000000\0" * 2 + size + b"00000000000\0"
        tail = self.kind + b"/etc/passwd".ljust(100, b"\0") + b"ustar\x0000" + bytes(247)
        total = sum(head) + sum(tail) + 8 * 32 + (self.fault == "checksum")
        return head + b"%06o\0 " % total + tail + self.data + bytes(-len(self.data) % 512)


_ENTRY = st.builds(
    Entry,
    st.one_of(st.sampled_from(_PLAIN), st.sampled_from(_PLAIN), st.sampled_from(_PLAIN), st.sampled_from(_ODD)),
    st.one_of(st.binary(max_size=40), st.sampled_from([b"", bytes(512), b"x" * 513])),
    st.one_of(*[st.just(b"0")] * 8, st.sampled_from(_TYPES)),
    st.sampled_from([""] * 12 + ["checksum", "negative", "huge"]),
)
_NEAT = st.lists(st.sampled_from(_PLAIN), unique=True).map(
    lambda names: [Entry(name, name.encode() * 40, b"0", "") for name in sorted(names)]
)
_ENDS = ["proper"] * 5 + ["none", "one block", "ragged", "not zero", "long"]


def _tar_of(entries: list[Entry], end: str) -> bytes:
    body = b"".join(entry.encoded() for entry in entries)
    proper = body + bytes(1024) + bytes(-(len(body) + 1024) % 10240)
    return {
        "proper": proper, "none": body, "one block": body + bytes(512), "ragged": body + bytes(1024),
        "not zero": proper[:-1] + b"\1", "long": proper + bytes(40960),
    }[end]  # fmt: skip


def _samples_of(entries: list[Entry], data: bytes, end: str) -> list[tuple[str, dict[str, bytes]]] | None:
    """What a shard of these headers holds by the words of shards.py; None if it is none."""
    found: dict[str, dict[str, bytes]] = {}
    last = None
    for entry in entries:
        key, *words = entry.name.split(".")
        lower = all(word and set(word) <= _LETTERS and word == word.lower() for word in words)
        if entry.kind != b"0" or entry.fault or not words or not lower or not key or not set(key) <= _LETTERS:
            return None
        suffix = ".".join(words)
        if suffix in found.get(key, {}) or (key in found and key != last):
            return None
        found.setdefault(key, {})[suffix] = entry.data
        last = key
    return list(found.items()) if end == "proper" or (end == "ragged" and len(data) % 10240 == 0) else None


@st.composite
def _shards(draw: st.DrawFn) -> tuple[bytes, int, list[tuple[str, dict[str, bytes]]] | None]:
    """A shard's bytes, the number of samples its manifest says, and what is in it."""
    entries, end = draw(st.one_of(st.lists(_ENTRY, max_size=6), _NEAT)), draw(st.sampled_from(_ENDS))
    data = _tar_of(entries, end)
    samples = _samples_of(entries, data, end)
    count = len(samples or ()) + draw(st.sampled_from([0] * 6 + [1]))
    return data, count, samples if samples is not None and len(samples) == count else None


def _holds_shard(drawn: tuple[bytes, int, list[tuple[str, dict[str, bytes]]] | None]) -> None:
    data, count, wanted = drawn
    shard = Shard(name="s.tar", bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), samples=count)
    with tempfile.TemporaryDirectory(prefix="layerloop-fuzz-") as folder:
        Path(folder, "s.tar").write_bytes(data)
        store = LocalStore(Path(folder))
        try:
            read = list(read_shard(store, shard))
        except LayerloopError as error:
            one_line(str(error))
            assert f"{folder}/s.tar" in str(error) and wanted is None, str(error)
            return
        assert read == wanted
        for key, offset, length in sample_ranges(store, shard):
            assert read_sample(store, shard, key, offset, length) == dict(read)[key]


def _holds_mutated_shard(data: bytes) -> None:
    """Where it is read at all, Python's own reader sees the same files."""
    wanted: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                file = tar.extractfile(info)
                key, _, suffix = info.name.partition(".")
                wanted.setdefault(key, {})[suffix] = file.read() if file else b""
    except Exception:  # it reads less strictly, but may also fail in its own ways
        wanted = {}
    shard = Shard(name="s.tar", bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), samples=len(wanted))
    with tempfile.TemporaryDirectory(prefix="layerloop-fuzz-") as folder:
        Path(folder, "s.tar").write_bytes(data)
        try:
            read = dict(read_shard(LocalStore(Path(folder)), shard))
        except LayerloopError as error:
            one_line(str(error))
        else:
            assert read == wanted


# -------------------------------------------------------------------------------------------------------------- recipes

_KEYS = st.sampled_from(
    [*Recipe.model_fields, "groups", "group_size", "window", "size", "<<", "phase2", "steps", "1", "? a"]
)
_SCALARS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=12),
    st.booleans().map(str),
    st.sampled_from(
        [
            "*a",
            "&a x",
            "&a [*a]",
            "!!binary ====",
            "!!set {a, b}",
            "!!python/name:os",
            "2026-13-01",
            "~",
            "1:60:1",
            "0x",
            "0b2",
            ".inf",
            "-.nan",
            "1_0",
            "|\n  x",
            ">-\n y",
            "'",
            '"\\x"',
            "!!float x",
            "!!timestamp x",
            "!!omap [a]",
            "!!pairs [{a: 1}]",
            "!!merge x",
            "=",
            "%YAML 9.9",
            "---",
            "...",
            "@",
            "`",
        ]
    ),
)
_YAML = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(st.tuples(_KEYS, inner), max_size=5).map(
            lambda items: "{" + ", ".join(f"{k}: {v}" for k, v in items) + "}"
        ),
        st.lists(st.tuples(_KEYS, inner), max_size=5).map(lambda items: "\n".join(f"{k}: {v}" for k, v in items)),
    ),
    max_leaves=12,
)
_RECIPE = st.one_of(_YAML, _YAML.map(lambda text: f"name: mine\n{text}"), st.text(max_size=60))


def _holds_recipe(text: str) -> None:
    for read in (parse_recipe, lambda given: load_yaml(given, where="file")):
        try:
            value = read(text)
        except LayerloopError as error:
            one_line(str(error))
        else:
            if isinstance(value, Recipe):
                assert Recipe.from_json(value.to_json(), where="again") == value


# ------------------------------------------------------------------------------------------------------------ documents

CANVAS = (12, 9)  # width, height


def _documents() -> list[bytes]:
    """Small documents of every kind that is read, and of some that are refused."""
    from psd_tools import PSDImage

    card = Image.new("RGBA", (6, 5), (200, 30, 40, 255))
    out = []
    for mode, depth in (("RGBA", 8), ("RGBA", 16), ("LA", 8)):
        made = PSDImage.new(mode, CANVAS, depth=depth)  # type: ignore[arg-type]
        made.create_pixel_layer(card, name="card", top=1, left=2, opacity=200)
        masked = made.create_pixel_layer(card, name="masked")
        masked.create_mask(Image.linear_gradient("L").resize((6, 5)), top=0, left=0)
        masked.tagged_blocks.set_data(Tag.BLEND_FILL_OPACITY, 128)
        made.create_group([made.create_pixel_layer(card, name="inner", left=7)], name="group").opacity = 128
        made.create_pixel_layer(card, name="off").visible = False
        buffer = io.BytesIO()
        made.save(buffer)
        out.append(buffer.getvalue())
    stack = np.zeros((2, CANVAS[1], CANVAS[0], 4), np.uint8)
    stack[0], stack[1, 2:6, 3:9] = (10, 200, 90, 255), (90, 10, 200, 128)
    return [*out, write_psd(stack, ["a", "b"], groups=[None, "g"])]


def _holds_document(data: bytes) -> None:
    hidden: list[str] = []
    with tempfile.TemporaryDirectory(prefix="layerloop-fuzz-") as folder:
        Path(folder, "a.psd").write_bytes(data)
        try:
            layers = list(read_layers(Path(folder, "a.psd"), hidden))
        except LayerloopError as error:
            one_line(str(error))
            assert "a.psd" in str(error)
            return
    for name in hidden:
        assert len(name) <= 60
    height, width = int.from_bytes(data[14:18], "big"), int.from_bytes(data[18:22], "big")
    for layer in layers:
        assert layer.shape == (height, width, 4) and layer.dtype == np.uint8
        assert not layer[layer[..., 3] == 0].any(), "colour under alpha 0"


TARGETS: dict[str, Target] = {
    "documents": Target(mutated(_documents()), _holds_document),
    "exif": Target(st.tuples(mutated(_exif()), st.sampled_from(["JPEG", "PNG"])), _holds_image),
    "pictures": Target(mutated(_pictures()), _holds_picture),
    "pixels": Target(_pngs(), _holds_pixels),
    "grey": Target(_grey_tiffs(), _holds_grey),
    "replies": Target(_REPLY, _holds_reply),
    "labelled": Target(_labelled(), _holds_labelled),
    "coded_bodies": Target(
        st.tuples(
            st.binary(max_size=400) | st.sampled_from([bytes(20_000), b"{}" * 900]),
            st.sampled_from(["gzip", "zlib", "no"]),
            st.sampled_from(["", "gzip", "x-gzip", "deflate", "br", "identity", "UTF-8", "gzip, br", "\r"]),
            st.lists(st.integers(0, 400), max_size=4),
            st.sampled_from([1 << 20, 1000, 0]),
        ),
        _holds_coded,
    ),
    "proxies": Target(
        st.tuples(st.one_of(st.sampled_from(["judge.invalid", "h:1", "[::1]:2"]), _URLISH), _PROXIES), _holds_proxies
    ),
    "error_bodies": Target(_ERROR_BODY, _holds_error_body),
    "tars": Target(mutated(_tars()), lambda data: _holds_container(data, "a.tar", exact=True)),
    "parquet": Target(mutated(_parquets()), lambda data: _holds_container(data, "a.parquet", exact=False)),
    "lists": Target(
        st.tuples(_LINES, st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le"])), _holds_list
    ),
    "columns": Target(_columns(), lambda data: _holds_container(data, "a.PARQUET", exact=False)),
    "adapter_tensors": Target(st.tuples(_TENSORS, _METADATA), _holds_tensors),
    "adapters": Target(
        st.tuples(
            mutated(_safetensors()),
            st.one_of(
                CONFIGS.map(lambda config: json.dumps(config).encode()), mutated([b'{"peft_type": "LORA", "r": 2}'])
            ),
            st.sampled_from(["adapter_model.safetensors", "pytorch_lora_weights.safetensors"]),
        ),
        _holds_adapter,
    ),
    "recipes": Target(_RECIPE, _holds_recipe),
    "shards": Target(_shards(), _holds_shard),
    "shard_bytes": Target(
        mutated([_tar_of([Entry(name, name.encode() * 9, b"0", "") for name in sorted(_PLAIN)], "proper")]),
        _holds_mutated_shard,
    ),
}
