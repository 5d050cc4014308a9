"""Inputs as people have them: odd metadata, names, links, tars, tables; each made of real bytes."""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from layerloop.components.judge.images import fitted
from layerloop.components.layers.crello import generate_design, write_designs_parquet
from layerloop.components.layers.export import write_png_zip
from layerloop.components.layers.normalise import normalise
from layerloop.components.layers.truth import ground_truth
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import DataRecipe, DesignsRecipe, parse_recipe
from layerloop.components.shard_dataset.files import InputError
from layerloop.components.shard_dataset.inputs import find_inputs, read_items
from layerloop.components.shard_dataset.items import Item
from layerloop.components.shard_dataset.layered import find_designs, layer_order, read_designs
from layerloop.components.shard_dataset.samples import Gathered, Prepared, Refused, account, prepare_image
from layerloop.components.shard_dataset.step import run
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.images import decode_image
from layerloop.components.storage.manifests import read_file
from layerloop.components.storage.stores import open_store

from .posters import WORDS, form, word

Encoded = Callable[..., bytes]
DATA = DataRecipe(resolution=64, multiple=16)


def left_out(campaign: str) -> dict[str, tuple[str, str]]:
    """(kind, reason) by origin, from rejects.parquet."""
    opened = Campaign.open(campaign)
    table = pq.read_table(io.BytesIO(read_file(opened.store, opened.sources().file("rejects.parquet"))))
    return {row["origin"]: (row["kind"], row["reason"]) for row in table.to_pylist()}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(png: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks behind its header."""
    return png[:33] + b"".join(chunks) + png[33:]


def png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def jpeg_with_exif(image: Image.Image, exif: bytes) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    block = b"Exif\0\0" + exif
    return buffer.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + buffer.getvalue()[2:]


def directory(*entries: tuple[int, int, int, bytes]) -> bytes:
    """A TIFF block, big endian, of entries (tag, type, count, four bytes of value or offset); data follow at 8 + ..."""
    body = b"".join(struct.pack(">HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"MM\0*" + struct.pack(">IH", 8, len(entries)) + body + bytes(4)


ORIENTED = (0x0112, 3, 1, struct.pack(">HH", 6, 0))


def used(data: bytes) -> np.ndarray:
    """The pixels of an image that must be used."""
    from layerloop.components.storage.images import decode_png

    prepared = prepare_image(Item("x", lambda: data), DATA)
    assert isinstance(prepared, Prepared), prepared
    return decode_png(prepared.members["png"])


# ------------------------------------------------------------------------------------------------------------ metadata


@pytest.mark.parametrize(
    "exif",
    [
        bytes.fromhex("0008000201120003"), b"", b" ", b"MM", b"II*\0", b"MM\0*\xff\xff\xff\xff", bytes(2000),
        b"MM\0*\0\0\0\x08\xff\xff" + ORIENTED[3] * 3, directory((0x0112, 2, 900, b"\0\0\xff\0")),
        directory((0x0112, 5, 1, b"\0\0\0\x08")), directory((0x0112, 13, 0, b"abcd")), os.urandom(64),
    ],
    ids=range(12),
)  # fmt: skip
def test_exif_that_makes_no_sense_spoils_no_image(exif: bytes, draw_image: Callable[..., Image.Image]) -> None:
    image = draw_image(1)
    expected = normalise(image, DATA)
    assert np.array_equal(used(with_chunk(png(image), chunk(b"eXIf", exif))), expected)
    assert np.array_equal(used(jpeg_with_exif(image, exif)), used(jpeg_with_exif(image, directory())))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, exif=exif or b" ")
    assert np.array_equal(used(buffer.getvalue()), expected)


@pytest.mark.parametrize(
    "other",
    [
        (0x0100, 2, 4, b"640\0"), (0x0100, 10, 1, b"\0\0\0\x08"), (0x010F, 2, 0xFFFFFF, b"\0\0\0\x08"),
        (0x8769, 4, 1, b"\xff\xff\xff\xff"), (0x8769, 2, 4, b"abc\0"), (0x0103, 99, 7, b"1234"),
        (0x011A, 5, 1, bytes(4)),
    ],
)  # fmt: skip
def test_the_orientation_counts_whatever_the_other_tags_are(
    other: tuple[int, int, int, bytes], draw_image: Callable[..., Image.Image]
) -> None:
    image = draw_image(2)
    upright = used(jpeg_with_exif(image, directory()))
    for entries in ((other, ORIENTED), (ORIENTED, other)):
        turned = used(jpeg_with_exif(image, directory(*entries)))
        assert turned.shape == (64, 48, 3)
        assert np.abs(turned.astype(int) - np.rot90(upright, -1)).mean() < 1
        also = used(with_chunk(png(image), chunk(b"eXIf", directory(*entries)))).astype(int)
        assert also.shape == (64, 48, 3)
        assert np.abs(also - np.rot90(normalise(image, DATA), -1)).mean() < 1  # Pillow resizes rows first


def test_the_original_size_of_a_turned_image_is_its_upright_size(draw_image: Callable[..., Image.Image]) -> None:
    data = with_chunk(png(draw_image(2)), chunk(b"eXIf", directory(ORIENTED)))
    prepared = prepare_image(Item("a.png", lambda: data), DATA)
    assert isinstance(prepared, Prepared)
    record = json.loads(prepared.members["json"])
    sizes = record["width"], record["height"], record["original_width"], record["original_height"]
    assert sizes[0] < sizes[1] and sizes[2:] == draw_image(2).size[::-1]


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"Raw profile\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iCCP", b"p\0\0rubbish"),
        chunk(b"zTXt", b"k\0\0rubbish"),
        chunk(b"tEXt", b"k\0v")[:-4] + b"\0\0\0\0",
        chunk(b"pHYs", b"1"),
        chunk(b"gAMA", b""),
        chunk(b"eXIf", directory(ORIENTED))[:-1] + b"\0",
    ],
    ids=["zTXt", "iTXt", "iCCP", "iCCP-rubbish", "zTXt-rubbish", "crc", "pHYs", "gAMA", "eXIf-crc"],
)  # fmt: skip
def test_an_ancillary_chunk_that_cannot_be_read_spoils_no_image(
    extra: bytes, draw_image: Callable[..., Image.Image]
) -> None:
    image = draw_image(3)
    assert np.array_equal(used(with_chunk(png(image), extra)), normalise(image, DATA))
    if extra[4:8] != b"eXIf":  # behind the pixels Pillow looks at no CRC, and takes it
        behind = png(image)
        assert np.array_equal(used(behind[:-12] + extra + behind[-12:]), normalise(image, DATA))


def grey_profile() -> bytes:
    """A minimal ICC profile of grey with a gamma of 1.0."""
    body = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"grey\0" + bytes(79),
        b"cprt": b"text" + bytes(4) + b"none\0" + bytes(3),
        b"wtpt": b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1.0, 0.8249)),
        b"kTRC": b"curv" + bytes(8),
    }
    table, data, offset = b"", b"", 128 + 4 + 12 * len(body)
    for tag, content in body.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", offset + len(data), len(content))
        data += content
    header = struct.pack(">I4sI4s4s4s", offset + len(data), b"lcms", 0x02400000, b"mntr", b"GRAY", b"XYZ ") + bytes(12)
    header += b"acsp" + bytes(28) + b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1.0, 0.8249))
    return header.ljust(128, b"\0") + struct.pack(">I", len(body)) + table + data


def test_grey_with_alpha_has_the_values_of_its_grey_twin() -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))
    grey = Image.fromarray(ramp)
    both = Image.merge("LA", (grey, Image.new("L", grey.size, 255)))
    profile = grey_profile()
    expected = used(png(grey, icc_profile=profile))
    assert expected[0, 16, 0] > 64 + 50, "the profile is applied: linear 64 is a lighter sRGB"
    assert np.array_equal(used(png(both, icc_profile=profile)), expected)
    assert np.array_equal(used(png(grey, icc_profile=profile, transparency=1)), expected)
    wide = Image.fromarray(ramp.astype(np.uint16) * 257)
    assert np.array_equal(used(png(wide, icc_profile=profile)), expected)
    seen = used(png(Image.merge("LA", (grey, Image.new("L", grey.size, 0))), icc_profile=profile))
    assert (seen == 255).all()


@pytest.mark.parametrize(
    "error",
    [
        struct.error("unpack requires 4 bytes"), OverflowError("too\nlarge"), RecursionError("deep"), MemoryError(),
        UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"), UserWarning("as an error"), ZeroDivisionError(),
        SyntaxError("x"),
        OSError(5, "Input/output error"), InputError("file cannot be read (Permission denied): allow it"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_one_image_raises_is_its_reject(error: Exception) -> None:
    def load() -> bytes:
        raise error

    refused = prepare_image(Item("that.png", load), DATA)
    assert isinstance(refused, Refused)
    assert (refused.origin, refused.kind) == ("that.png", "reject")
    assert "\n" not in refused.reason and refused.reason.count(": ") >= 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LayerloopError("the store answered SlowDown"), SystemExit(1)])
def test_what_ends_the_step_is_no_reject(error: BaseException) -> None:
    def load() -> bytes:
        raise error

    with pytest.raises(type(error)):
        prepare_image(Item("that.png", load), DATA)


# --------------------------------------------------------------------------------------------------- names and folders


@pytest.fixture
def six(tmp_path: Path, encoded: Encoded) -> Path:
    root = tmp_path / "six"
    root.mkdir()
    for seed in range(6):
        (root / f"{seed}.png").write_bytes(encoded(seed))
    return root


def test_names_that_no_table_could_hold_are_used_and_printed(
    local_campaign: str, recipe: str, six: Path, encoded: Encoded, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (b"caf\xe9.png", b"sub\\5.png", b"new\nline.png", b"esc\x1b[31m.png", "\u202egnp.png".encode())
    for seed, name in enumerate(names, 10):
        Path(os.fsdecode(os.fsencode(six) + b"/" + name)).write_bytes(encoded(seed))
    Path(os.fsdecode(os.fsencode(six) + b"/bad\xff.png")).write_bytes(b"text")
    result = run(campaign=local_campaign, recipe=recipe, images=str(six))
    assert result.metrics["train"] + result.metrics["holdout"] == 11
    assert list(left_out(local_campaign)) == ["bad\\xff.png"]
    opened = Campaign.open(local_campaign)
    shards = b"".join(opened.store.read(shard.name) for shard in opened.sources().shards)
    for origin in ("caf\\xe9.png", "sub\\5.png", "new\\nline.png", "esc\\x1b[31m.png", "\\u202egnp.png"):
        assert json.dumps(origin).encode() in shards
    assert "\x1b" not in capsys.readouterr().err


def test_a_folder_that_is_not_utf_8_may_be_given_twice(
    local_campaign: str, recipe: str, tmp_path: Path, encoded: Encoded
) -> None:
    root = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(root)
    Path(root, "1.png").write_bytes(encoded(1))
    first = run(campaign=local_campaign, recipe=recipe, images=root)
    assert first.manifests["sources"].metadata["images"].endswith("/caf\\xe9")
    assert run(campaign=local_campaign, recipe=recipe, images=root) == first


def test_a_damaged_member_of_a_tar_is_one_reject_whatever_its_name(
    local_campaign: str, recipe: str, tmp_path: Path, encoded: Encoded
) -> None:
    put_tar(tmp_path / "t.tar", [("ok.png", encoded(1)), ("caf\udce9.png", b"damaged"), ("last.png", encoded(2))])
    result = run(campaign=local_campaign, recipe=recipe, images=f"{tmp_path}/t.tar")
    assert (result.metrics["train"], result.metrics["rejects"]) == (2, 1)
    assert left_out(local_campaign)["t.tar:caf\\xe9.png"][0] == "reject"


def test_links_that_lead_nowhere_and_pipes_are_passed_over_and_said(
    local_campaign: str, recipe: str, six: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (six / "loop.png").symlink_to("loop.png")
    (six / "gone.png").symlink_to("nowhere.png")
    (six / "other").symlink_to(tmp_path)
    (six / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(six / "pipe.png")
    assert run(campaign=local_campaign, recipe=recipe, images=str(six)).metrics["images"] == 6
    assert {origin: kind for origin, (kind, _) in left_out(local_campaign).items()} == dict.fromkeys(
        ("loop.png", "gone.png", "other/", "zero.png", "pipe.png"), "passed over"
    )
    log = capsys.readouterr().err
    assert (
        "images: 6 used, 0 duplicates, 0 rejects, 5 passed over (2 broken links, 2 special files, 1 linked folders)"
        in log
    )
    assert "passed over other/: a link to a folder is not followed" in log


def test_a_subfolder_and_a_file_that_may_not_be_read_are_said(six: Path, tmp_path: Path) -> None:
    """Root may read everything, so the folder is read by someone else where the tests run as root."""
    (six / "shut").mkdir()
    (six / "shut" / "7.png").write_bytes((six / "0.png").read_bytes())
    (six / "secret.png").write_bytes(b"x")
    for path in (tmp_path, *itertools.takewhile(lambda parent: "pytest-of" in str(parent), tmp_path.parents)):
        path.chmod(0o755)
    (six / "shut").chmod(0)
    (six / "secret.png").chmod(0)
    script = (
        "import os, sys\n"
        "from layerloop.components.shard_dataset.inputs import find_inputs, read_items\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "found = find_inputs(sys.argv[1], what='images')\n"
        "print(len(found.sizes), found.passed[0].origin, found.passed[0].reason)\n"
        "for item in read_items(found, max_bytes=10**6):\n"
        "    try: item.load()\n"
        "    except Exception as error: print(item.origin, type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(six)], capture_output=True, text=True)
    (six / "shut").chmod(0o755)
    assert done.stdout.splitlines() == [
        "7 shut/ folder cannot be read (Permission denied): allow it",
        "secret.png InputError file cannot be read (Permission denied): allow it, or restore it",
    ], done.stderr  # fmt: skip


def test_a_folder_inside_one_that_may_not_be_entered_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "shut" / "images").mkdir(parents=True)
    (tmp_path / "shut").chmod(0)
    script = (
        "import os, sys\n"
        "from layerloop.components.shard_dataset.inputs import find_inputs\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "try: find_inputs(sys.argv[1], what='images')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    images = tmp_path / "shut" / "images"
    done = subprocess.run([sys.executable, "-c", script, str(images)], capture_output=True, text=True)
    (tmp_path / "shut").chmod(0o755)
    assert done.stdout == (
        f"LayerloopError {images} cannot be reached (Permission denied): allow it, or correct it\n"
    ), done.stderr  # fmt: skip


def test_rejects_are_counted_by_their_sort_in_words_that_can_be_read() -> None:
    narrow = "image is {} x 20, at most 0.4 pixels on its short side at 64: crop it"
    cut = "image is truncated or damaged (image file is truncated (78 bytes not processed)): save it again"
    reasons = [narrow.format(3000), cut, cut.replace("78", "9"), "image is empty (0 bytes): give a PNG"]
    line = account(Gathered(["a"], [Refused("x", "reject", reason) for reason in reasons]), [], what="images")
    assert line == (
        "images: 1 used, 0 duplicates, 4 rejects (2 image is truncated or damaged, 1 image is 3000 x 20, at most 0.4 "
        "pixels on its short side at 64, 1 image is empty), 0 passed over"
    )
    two = account(
        Gathered([], [Refused("x", "reject", narrow.format(width)) for width in (3000, 9)]), [], what="images"
    )
    assert "(2 image is N x N, at most N pixels on its short side at N)" in two


def test_suffixes_that_are_not_read_are_counted_and_listed(
    local_campaign: str, recipe: str, six: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.jpe", "b.psd", "c.PSD", "d.jxl", "IMG_0001", ".hidden.png", "x.tar.gz"):
        (six / name).write_bytes(b"x")
    run(campaign=local_campaign, recipe=recipe, images=str(six))
    assert "7 passed over (2 .psd, 1 .gz, 1 .jpe, 1 .jxl, 1 hidden, 1 without suffix)" in (
        log := capsys.readouterr().err
    )
    assert "passed over x.tar.gz: .gz is packed, which is not read: unpack it" in log
    assert {kind for kind, _ in left_out(local_campaign).values()} == {"passed over"}
    assert len(left_out(local_campaign)) == 7


# ------------------------------------------------------------------------------------------------------- words, strips


@pytest.mark.parametrize(
    ("words", "forms", "resolution"), [(12, 5, 64), pytest.param(30, 10, 640, marks=pytest.mark.slow)]
)
def test_words_and_forms_that_differ_in_little_are_all_kept(
    tmp_path: Path, words: int, forms: int, resolution: int, with_prompt: Callable[..., str]
) -> None:
    root = tmp_path / "words"
    root.mkdir()
    for number, text in enumerate(WORDS[:words]):
        word(text).save(root / f"word-{number}.png")
    for number in range(forms):
        form(f"10{number}7").save(root / f"form-{number}.png")
    recipe = f"name: t\nmodel: {{base: /no, dtype: float32}}\ndata: {{resolution: {resolution}, holdout: 0}}\n"
    result = run(campaign=with_prompt(f"{tmp_path}/c", recipe), recipe=recipe, images=str(root))
    assert (result.metrics["train"], result.metrics["duplicates"]) == (words + forms, 0)


def test_a_recipe_may_drop_exact_duplicates_only(
    tmp_path: Path, recipe: str, folder: Path, draw_image: Callable[..., Image.Image], with_prompt: Callable[..., str]
) -> None:
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    draw_image(2).save(folder / "recompressed.jpg", quality=95, subsampling=0)
    exact = recipe.replace("holdout: 2", "holdout: 2, duplicates: exact")
    for text, count in ((recipe, 2), (exact, 1)):
        campaign = with_prompt(f"{tmp_path}/c{count}", text)
        assert run(campaign=campaign, recipe=text, images=str(folder)).metrics["duplicates"] == count
    old = {"duplicate_bits": 5, "resolution": 64}
    assert parse_recipe(json.dumps({"name": "old", "data": old})).data.duplicates == "near"


def test_a_strip_is_sent_to_the_judge_with_both_sides_of_32_pixels() -> None:
    strip = normalise(Image.new("RGB", (12000, 300), "red"), DataRecipe())
    assert strip.shape == (16, 640, 3)
    for longest in (64, 384, 512, 1024):
        assert min(fitted(strip, longest).shape[:2]) >= 32
        assert min(fitted(np.zeros((2, 640, 16, 4), np.uint8), longest).shape[1:3]) >= 32
    assert fitted(np.zeros((480, 640, 3), np.uint8), 512).shape == (384, 512, 3)


# ------------------------------------------------------------------------------------------------------- tars, parquet


def put_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def origins(root: Path | str) -> list[str]:
    return [item.origin for item in read_items(find_inputs(str(root), what="images"), max_bytes=10**7)]


def test_dots_in_the_keys_of_a_tar_lose_no_image(tmp_path: Path) -> None:
    put_tar(
        tmp_path / "a.tar",
        [(name, b"x") for name in ("22.05.png", "photo.v2.png", "ok.png", "ok.json", "1.5.mask.png")],
    )
    found = find_inputs(str(tmp_path), what="images")
    assert [item.origin for item in read_items(found, max_bytes=10**6)] == [
        "a.tar:22.05.png",
        "a.tar:photo.v2.png",
        "a.tar:ok.png",
    ]
    assert [(item.origin, item.kind) for item in found.passed] == [("a.tar:1.5.mask.png", "parts of samples")]


def test_the_parts_of_a_sample_are_not_its_image_in_any_order(tmp_path: Path) -> None:
    put_tar(
        tmp_path / "a.tar", [(name, b"x") for name in ("k.layer0.png", "k.preview.jpg", "k.png", "k.txt", "lone.txt")]
    )
    found = find_inputs(str(tmp_path), what="images")
    assert [item.origin for item in read_items(found, max_bytes=10**6)] == ["a.tar:k.png"]
    assert [item.origin for item in found.passed] == ["a.tar:k.layer0.png", "a.tar:k.preview.jpg", "a.tar:lone.txt"]


def test_tars_that_were_put_together_with_cat_are_said(tmp_path: Path) -> None:
    put_tar(tmp_path / "a.tar", [("a.png", b"x")])
    put_tar(tmp_path / "b.tar", [("b.png", b"y")])
    both = (tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()
    (tmp_path / "both.tar").write_bytes(both)
    (tmp_path / "padded.tar").write_bytes((tmp_path / "a.tar").read_bytes() + bytes(3_000_000))
    found = {
        item.origin: item.problem
        for item in read_items(find_inputs(f"{tmp_path}/*d*.tar", what="images"), max_bytes=99)
    }
    assert found == {"padded.tar:a.png": None}
    whole, rest = read_items(find_inputs(f"{tmp_path}/both.tar", what="images"), max_bytes=99)
    assert (whole.origin, whole.problem) == ("both.tar:a.png", None)
    assert rest.problem == "tar goes on behind its end, as tars that were put together with cat do: give each by itself"


def test_containers_without_an_image_and_hidden_members_are_said(tmp_path: Path) -> None:
    (tmp_path / "zeros.tar").write_bytes(bytes(10240))
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "rows.parquet")
    put_tar(tmp_path / "h.tar", [(".git/x.png", b"x"), ("./a/._b.png", b"x"), ("./a/c.png", b"x")])
    found = find_inputs(str(tmp_path), what="images")
    assert [item.origin for item in read_items(found, max_bytes=99)] == ["h.tar:./a/c.png"]
    assert [(item.origin, item.kind) for item in found.passed] == [
        ("h.tar:.git/x.png", "hidden"), ("h.tar:./a/._b.png", "hidden"),
        ("rows.parquet", "empty containers"), ("zeros.tar", "empty containers"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"x", b"y"], pa.binary_view()),
        pa.array([b"x", b"y"], pa.binary(1)),
        pa.array([b"x", b"y"], pa.large_binary()),
        pa.array([b"x", b"y"]).dictionary_encode(),
        pa.array([[b"x", b"y"], []]),
        pa.array([[{"bytes": b"x", "path": "p"}], [{"bytes": b"y", "path": "q"}]]),
        pa.StructArray.from_arrays([pa.array([b"x", b"y"]).dictionary_encode()], ["bytes"]),
    ],
)
def test_bytes_of_images_are_read_in_every_type_of_column(tmp_path: Path, column: Any) -> None:
    pq.write_table(pa.table({"image": column, "caption": ["a", "b"]}), tmp_path / "T.PARQUET")
    items = list(read_items(find_inputs(str(tmp_path), what="images"), max_bytes=99))
    assert [item.load() for item in items] == [b"x", b"y"] and len({item.origin for item in items}) == 2


@pytest.mark.parametrize("cells", [["http://h/a.png"], ["aGVsbG8="], [[1, 2]], [None], [3]])
def test_a_column_without_bytes_is_one_line_that_says_what_it_has(tmp_path: Path, cells: list[Any]) -> None:
    pq.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    line = (
        r"t\.parquet has no image column among image: [a-z0-9<>: ]+: store the bytes of image files in a binary column"
    )
    with pytest.raises(LayerloopError, match=line):
        list(read_items(find_inputs(str(tmp_path), what="images"), max_bytes=99))


def test_a_table_of_designs_may_end_in_capitals(tmp_path: Path) -> None:
    write_designs_parquet(tmp_path / "D.PARQUET", [generate_design(np.random.default_rng(0), layers=2)])
    (item,) = read_designs(find_designs(str(tmp_path)), DATA)
    assert len(item.render(item.load()).layers) == 2


def test_links_in_a_tar_are_said(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(info)
    found = find_inputs(str(tmp_path), what="images")
    assert list(read_items(found, max_bytes=10**6)) == []
    assert [(item.origin, item.kind) for item in found.passed] == [("a.tar:b.png", "links in tars")]


@pytest.mark.parametrize("seed", range(40))
def test_a_tar_with_changed_bytes_raises_nothing(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    put_tar(tmp_path / "a.tar", [(f"{n}.png", b"x" * 600) for n in range(4)])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    for place in rng.integers(0, 6000, 6):
        data[place] = int(rng.integers(256))
    header = data[1536:2048]  # of a member, with a size below zero or beyond all bounds
    header[124:136] = (b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"x" * 12)[seed % 4]
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    data[1536:2048] = header
    (tmp_path / "a.tar").write_bytes(bytes(data))
    for item in read_items(find_inputs(str(tmp_path), what="images"), max_bytes=10**6):
        assert item.problem is None or "\n" not in item.problem


def test_a_gap_in_numbered_tars_is_one_line_that_names_it(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        put_tar(tmp_path / f"shard-{number:03d}.tar", [("k.png", b"x")])
    with pytest.raises(LayerloopError, match=r"shard-002\.tar does not exist: restore it, or narrow the range$"):
        find_inputs(f"{tmp_path}/shard-{{000..003}}.tar", what="images")
    with pytest.raises(LayerloopError, match=r"shard-002\.\{tar,png\} and 2 more of its range does not exist"):
        find_inputs(f"{tmp_path}/shard-{{000..005}}.{{tar,png}}", what="images")
    assert len(find_inputs(f"{tmp_path}/shard-{{000..001}}.{{tar,png}}", what="images").sizes) == 2


def spoiled(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(4096)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("rows", [24, 4])
def test_a_parquet_with_a_damaged_middle_gives_what_is_whole_and_rejects(
    local_campaign: str, tmp_path: Path, recipe: str, encoded: Encoded, rows: int
) -> None:
    images = [encoded(seed, width=320, height=240) for seed in range(24)]
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet", compression="snappy", row_group_size=rows)
    spoiled(tmp_path / "t.parquet")
    relaxed = recipe.replace("max_reject_fraction: 0.5", "max_reject_fraction: 1.0")
    open_store(local_campaign).delete("recipe.json")
    Campaign.create_or_open(local_campaign, parse_recipe(relaxed))
    try:
        result = run(campaign=local_campaign, recipe=relaxed, images=f"{tmp_path}/t.parquet")
    except LayerloopError as error:
        assert rows == 24 and "no image left to train on" in str(error), error
        return
    assert result.metrics["images"] == 24
    assert 1 <= result.metrics["rejects"] <= (24 if rows == 24 else 8)
    assert all(kind == "reject" for kind, _ in left_out(local_campaign).values())


def test_a_table_of_designs_with_a_damaged_middle_gives_rejects(
    tmp_path: Path, recipe: str, folder: Path, with_prompt: Callable[..., str]
) -> None:
    rng = np.random.default_rng(0)
    write_designs_parquet(
        tmp_path / "d.parquet", [generate_design(rng, canvas=(320, 240), layers=3) for _ in range(24)]
    )
    table = pq.read_table(tmp_path / "d.parquet")
    pq.write_table(table, tmp_path / "d.parquet", compression="snappy", row_group_size=4)
    spoiled(tmp_path / "d.parquet")
    relaxed = recipe.replace("max_reject_fraction: 0.5", "max_reject_fraction: 1.0")
    campaign = with_prompt(f"{tmp_path}/c", relaxed)
    result = run(campaign=campaign, recipe=relaxed, images=str(folder), designs=f"{tmp_path}/d.parquet")
    assert result.metrics["designs"] >= 12
    assert result.metrics["rejects"] >= 1
    assert result.metrics["designs"] + result.metrics["rejects"] + result.metrics["duplicates"] == 24


# ------------------------------------------------------------------------------------------------------------------ S3


def test_keys_of_a_bucket_are_taken_as_they_are(s3_bucket: str, encoded: Encoded) -> None:
    store = open_store(s3_bucket)
    client, prefix = store._client, store.prefix  # type: ignore[attr-defined]
    keys = (
        "d/a.png",
        "d//b.png",
        "d/./c.png",
        "d/x\\y.png",
        "d/sub/",
        "e [2023]/f.png",
        "e [2023]/g [1].png",
        "d/#1.png",
    )
    for seed, key in enumerate(keys):
        body = b"" if key.endswith("/") else encoded(seed)
        client.put_object(Bucket=store.bucket, Key=f"{prefix}/{key}", Body=body)  # type: ignore[attr-defined]
    assert origins(f"{s3_bucket}/d") == ["#1.png", "./c.png", "/b.png", "a.png", "x\\y.png"]
    assert origins(f"{s3_bucket}/d/") == origins(f"{s3_bucket}/d")
    items = list(read_items(find_inputs(f"{s3_bucket}/d", what="images"), max_bytes=10**7))
    assert all(isinstance(prepare_image(item, DATA), Prepared) for item in items)
    assert origins(f"{s3_bucket}/e [2023]") == ["f.png", "g [1].png"]
    assert origins(f"{s3_bucket}/e [2023]/*.png") == ["f.png", "g [1].png"]
    assert origins(f"{s3_bucket}/e [2023]/g [1].png") == ["g [1].png"]
    assert origins(f"{s3_bucket}/[de]*/?.png") == ["d/a.png", "e [2023]/f.png"]
    with pytest.raises(LayerloopError, match="is empty"):
        find_inputs(f"{s3_bucket}/nothing", what="images")


# ------------------------------------------------------------------------------------------------------------- designs


def stacks(root: Path, data: DataRecipe = DATA) -> dict[str, np.ndarray]:
    return {item.origin: item.render(item.load()).layers for item in read_designs(find_designs(str(root)), data)}


def old_design(rng: np.random.Generator) -> dict[str, Any]:
    design = generate_design(rng, canvas=(320, 240), layers=3)
    for name, side in (("left", 320), ("width", 320), ("top", 240), ("height", 240)):
        design[name] = [value / side / 2 for value in design[name]]
    return design | {"canvas_width": 3, "canvas_height": 5}


def test_an_older_revision_of_crello_is_refused_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_designs_parquet(tmp_path / "old.parquet", [old_design(rng) for _ in range(3)])
    with pytest.raises(LayerloopError, match=r"boxes within 0\.\.1 on a canvas of 3 x 5, .* revision 3 or 4 of Crello"):
        stacks(tmp_path / "old.parquet")
    write_designs_parquet(tmp_path / "mixed.parquet", [generate_design(rng, layers=2), old_design(rng)])
    good, bad = read_designs(find_designs(str(tmp_path / "mixed.parquet")), DATA)
    assert len(good.render(good.load()).layers) == 2
    with pytest.raises(LayerloopError, match="revision 3 or 4 of Crello"):
        bad.render(bad.load())


def labelled(path: Path, designs: list[dict[str, Any]], classes: dict[str, list[str]]) -> Path:
    """Rows with columns as class indices, as the datasets library writes them."""
    write_designs_parquet(path, designs)
    table = pq.read_table(path)
    for name, names in classes.items():
        indices = [[names.index(v) for v in row] if isinstance(row, list) else row for row in table[name].to_pylist()]
        table = table.set_column(table.schema.get_field_index(name), name, [indices])
    features = {name: {"names": names, "_type": "ClassLabel"} for name, names in classes.items()}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def test_a_canvas_of_class_indices_is_an_older_revision_too(tmp_path: Path) -> None:
    design = generate_design(np.random.default_rng(0), layers=2) | {"canvas_width": 0, "canvas_height": 1}
    path = labelled(tmp_path / "v4.parquet", [design], {"canvas_width": ["600"], "canvas_height": ["1", "2"]})
    with pytest.raises(LayerloopError, match="class indices as canvas_width and canvas_height, revision 3 or 4 of"):
        stacks(path)
    design |= {"canvas_width": 9, "canvas_height": 9}
    write_designs_parquet(tmp_path / "small.parquet", [design])
    with pytest.raises(LayerloopError, match="canvas is 9 x 9 pixels, too small for a design"):
        stacks(tmp_path / "small.parquet")


def test_types_as_class_indices_are_read_by_their_names(tmp_path: Path) -> None:
    """As Crello has them: without the names a text's opacity would count twice."""
    design = generate_design(np.random.default_rng(3), canvas=(320, 240), layers=2, every_kind=True)
    kinds = ["ColoredBackground", "ImageElement", "SvgElement", "TextElement"]
    design["text"][-1] = ""
    (named,) = stacks(labelled(tmp_path / "named.parquet", [design], {"type": kinds})).values()
    write_designs_parquet(tmp_path / "plain.parquet", [design])
    (plain,) = stacks(tmp_path / "plain.parquet").values()
    assert np.array_equal(named, plain)


def test_the_recipe_says_what_of_a_design_is_a_layer(tmp_path: Path) -> None:
    design = generate_design(np.random.default_rng(3), canvas=(320, 240), layers=2, every_kind=True)
    write_designs_parquet(tmp_path / "d.parquet", [design])
    (item,) = read_designs(find_designs(str(tmp_path / "d.parquet")), DATA)
    truth = item.render(item.load())
    assert truth.facts == {
        "elements": 7, "empty": 0, "transparent": 0, "hidden": 1, "layers": 6, "text_previews": 1, "text_fonts": 0,
    }  # fmt: skip
    chosen = DesignsRecipe(transparent="drop", layers="groups", fonts=str(tmp_path / "none"))
    with pytest.raises(LayerloopError, match="none does not exist"):
        next(read_designs(find_designs(str(tmp_path / "d.parquet")), DATA.model_copy(update={"designs": chosen})))
    grouped = DATA.model_copy(update={"designs": DesignsRecipe(transparent="drop", layers="groups")})
    (item,) = read_designs(find_designs(str(tmp_path / "d.parquet")), grouped)
    facts = item.render(item.load()).facts
    assert facts["transparent"] == 2 and 2 <= facts["layers"] < 4


@pytest.mark.parametrize("inside", ["", "design"])
@pytest.mark.parametrize("count", [2, 3, 12])
def test_our_own_zip_unpacked_is_read_back_as_the_same_layers(tmp_path: Path, inside: str, count: int) -> None:
    rng = np.random.default_rng(count)
    stack = rng.integers(0, 256, (count, 48, 64, 4)).astype(np.uint8)
    stack[0, ..., 3] = 255
    with zipfile.ZipFile(io.BytesIO(write_png_zip(stack))) as archive:
        archive.extractall(tmp_path / "z" / inside)
    (read,) = stacks(tmp_path / "z").values()
    assert np.array_equal(read, ground_truth(stack, DATA.designs).layers)


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        ("0.jpg 1.png 2.png", "0.jpg 1.png 2.png"),
        ("0.png 1.png 2.png composite_512.png", "0.png 1.png 2.png"),
        ("0.png 1.png 2.png preview-3.png", "0.png 1.png 2.png"),
        ("0.png 1.png 2.png poster_1024.png", "0.png 1.png 2.png"),
        ("layer_8.png layer_10.png layer_9.png preview.png", "layer_8.png layer_9.png layer_10.png"),
        ("background_0.png text_1.png image_2.png", "background_0.png text_1.png image_2.png"),
        ("0-background.png 1-layer-1.png 2-layer-2.png composite.png", "0-background.png 1-layer-1.png 2-layer-2.png"),
        ("2023-a_1.png 2023-a_2.png", "2023-a_1.png 2023-a_2.png"),
        ("10.png 2.png 1.webp", "1.webp 2.png 10.png"),
        ("readme.png mask.png", ""),
    ],
)
def test_layers_are_told_from_what_lies_beside_them(names: str, layers: str) -> None:
    assert layer_order(names.split()) == layers.split()


def test_what_is_no_layer_is_said(tmp_path: Path) -> None:
    (tmp_path / "d" / "one").mkdir(parents=True)
    for name in ("0.jpg", "1.png", "2.png", "composite_512.png", "notes.txt"):
        Image.new("RGB", (64, 48), (9, 9, len(name))).save(
            tmp_path / "d" / "one" / name, "JPEG" if name[0] == "0" else "PNG"
        )
    found = find_designs(str(tmp_path / "d"))
    assert list(found.sizes) == ["one/0.jpg", "one/1.png", "one/2.png"]
    assert [item.origin for item in found.passed] == ["one/notes.txt", "one/composite_512.png"]
    (design,) = read_designs(find_designs(str(tmp_path / "d")), DATA)
    assert list(design.load()) == ["one/0.jpg", "one/1.png", "one/2.png"]
    assert len(design.render(design.load()).layers) == 1, "opaque layers hide what is below them"


def test_two_layers_of_one_number_are_a_reject(tmp_path: Path) -> None:
    (tmp_path / "d" / "one").mkdir(parents=True)
    for name in ("0.png", "0.jpg", "1.png"):
        Image.new("RGB", (64, 48)).save(tmp_path / "d" / "one" / name)
    with pytest.raises(LayerloopError, match="folder one has two layers of one number"):
        stacks(tmp_path / "d")


def test_layers_and_elements_are_normalised_as_images_are(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint16) * 1040, (48, 1))
    expected = np.rint(ramp[0] * (255 / 65535)).astype(np.uint8)
    root = tmp_path / "d" / "one"
    root.mkdir(parents=True)
    Image.fromarray(ramp).save(root / "0.png")
    turned = Image.new("RGBA", (48, 64), (0, 0, 0, 0))
    turned.paste((200, 0, 0, 255), (0, 0, 8, 8))
    (root / "1.png").write_bytes(with_chunk(png(turned), chunk(b"eXIf", directory(ORIENTED))))
    (stack,) = stacks(tmp_path / "d").values()
    assert np.array_equal(stack[0, 0, :, 0], expected)
    assert tuple(stack[1, 0, -1]) == (200, 0, 0, 255), "turned to the right, the mark is at the top right"

    design = generate_design(np.random.default_rng(0), canvas=(64, 48), layers=1)
    design |= {
        "left": [0.0],
        "top": [0.0],
        "width": [64.0],
        "height": [48.0],
        "angle": [0.0],
        "image": [png(Image.fromarray(ramp))],
    }
    write_designs_parquet(tmp_path / "d.parquet", [design])
    (stack,) = stacks(tmp_path / "d.parquet").values()
    assert np.abs(stack[-1, 20, 4:-4, 0].astype(int) - expected[4:-4]).max() <= 3


def test_a_damaged_layer_is_named(tmp_path: Path) -> None:
    (tmp_path / "d" / "one").mkdir(parents=True)
    (tmp_path / "d" / "one" / "0.png").write_bytes(b"text")
    with pytest.raises(LayerloopError, match="^layer one/0.png: image starts with b'text'"):
        stacks(tmp_path / "d")


def test_profiles_do_not_change_a_decoded_image_that_is_already_plain(draw_image: Callable[..., Image.Image]) -> None:
    image = draw_image(5, 64, 48)
    assert np.array_equal(normalise(decode_image(png(image)), DATA), np.asarray(image))
