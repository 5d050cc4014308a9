from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.shard_dataset import footers
from layerloop.components.shard_dataset.files import InputError, LocalFiles
from layerloop.components.shard_dataset.footers import MOST_ENDED
from layerloop.components.shard_dataset.inputs import Inputs, find_inputs, read_items
from layerloop.components.storage.stores import open_store, read_uri

FILES = {
    "a.png": b"a", "b.JPG": b"bb", "notes.txt": b"x", "sub/c.webp": b"ccc", "sub/deep/d.png": b"dddd",
    ".hidden/e.png": b"x", "sub/._c.webp": b"x", ".DS_Store": b"x", "[1].png": b"1",
}  # fmt: skip
REMEDY = "give a folder of images, a glob, WebDataset tars, parquet or a list of URIs (.txt)"


@pytest.fixture
def files_uri(store_uri: str) -> str:
    store = open_store(store_uri)
    for name, data in FILES.items():
        store.write(f"in/{name}", data)
    return f"{store_uri}/in"


def find(uri: str) -> Inputs:
    return find_inputs(uri, what="images")


def read(inputs: Inputs, max_bytes: int = 10**6) -> list[tuple[str, bytes | str]]:
    return [(item.origin, item.problem or item.load()) for item in read_items(inputs, max_bytes=max_bytes)]


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_a_folder_gives_its_images_all_the_way_down(files_uri: str) -> None:
    for uri in (files_uri, f"{files_uri}/"):
        found = find(uri)
        assert found.uri == files_uri
        assert found.sizes == {"[1].png": 1, "a.png": 1, "b.JPG": 2, "sub/c.webp": 3, "sub/deep/d.png": 4}
        assert found.images == 5
    assert read(found) == [
        ("[1].png", b"1"), ("a.png", b"a"), ("b.JPG", b"bb"), ("sub/c.webp", b"ccc"), ("sub/deep/d.png", b"dddd"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.png", ["[1].png", "a.png"]),
        ("**/*.png", ["[1].png", "a.png", "sub/deep/d.png"]),
        ("sub/*", ["c.webp"]),
        ("sub/**", ["c.webp", "deep/d.png"]),
        ("?.*", ["a.png", "b.JPG"]),
        ("[a-b].*", ["a.png", "b.JPG"]),
        ("[!a].*", ["b.JPG"]),
        ("{a,b}.{png,JPG}", ["a.png", "b.JPG"]),
        ("*.txt", ["notes.txt"]),  # named by the user, so taken at its word
        ("s*/**/d.png", ["sub/deep/d.png"]),
    ],
)
def test_a_glob_gives_what_it_matches(files_uri: str, pattern: str, names: list[str]) -> None:
    assert list(find(f"{files_uri}/{pattern}").sizes) == names


def test_numbered_tars_are_given_by_braces(files_uri: str) -> None:
    store = open_store(files_uri)
    for number in range(12):
        store.write(f"data/train-{number:06d}.tar", tar_of([(f"k{number}.png", b"p")]))
    found = find(f"{files_uri}/data/train-{{000003..000010}}.tar")
    assert list(found.sizes) == [f"train-{number:06d}.tar" for number in range(3, 11)]
    assert found.images is None
    assert read(found)[0] == ("train-000003.tar:k3.png", b"p")


def test_one_file_is_taken_by_itself(files_uri: str) -> None:
    assert read(find(f"{files_uri}/sub/c.webp")) == [("c.webp", b"ccc")]


def test_a_path_with_brackets_that_exists_is_no_glob(tmp_path: Path) -> None:
    (tmp_path / "x [1]").mkdir()
    (tmp_path / "x [1]" / "a.png").write_bytes(b"a")
    assert read(find(f"{tmp_path}/x [1]")) == [("a.png", b"a")]


def test_relative_paths_and_file_uris_are_recorded_as_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "a.png").write_bytes(b"a")
    monkeypatch.chdir(tmp_path)
    for uri in ("pics", "./pics/", f"file://{tmp_path}/pics", str(tmp_path / "pics")):
        assert find(uri).uri == str(tmp_path / "pics")


def test_a_folder_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LayerloopError) as caught:
        find(f"{tmp_path}/nowhere")
    assert str(caught.value) == f"images {tmp_path}/nowhere does not exist: {REMEDY}"


def test_an_empty_place_is_one_line(store_uri: str) -> None:
    if "://" not in store_uri:
        os.mkdir(store_uri)
    with pytest.raises(LayerloopError) as caught:
        find(store_uri)
    assert str(caught.value) == f"images {store_uri} is empty: {REMEDY}"


def test_a_folder_without_images_is_one_line(store_uri: str) -> None:
    open_store(store_uri).write("notes.txt", b"x")
    open_store(store_uri).write("table.csv", b"x")
    with pytest.raises(LayerloopError) as caught:
        find(store_uri)
    assert str(caught.value) == f"images {store_uri} has 2 files but no image, tar or parquet: {REMEDY}"


def test_a_glob_that_matches_nothing_is_one_line(files_uri: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        find(f"{files_uri}/*.gif")
    assert str(caught.value) == f"images {files_uri}/*.gif matches no file: {REMEDY}"


def test_unbalanced_braces_are_one_line(store_uri: str) -> None:
    with pytest.raises(LayerloopError, match="has unbalanced braces: close them"):
        find(f"{store_uri}/{{a,b}}{{c")


def test_the_fingerprint_tells_names_and_sizes(files_uri: str) -> None:
    first = find(files_uri).sha256
    assert find(files_uri).sha256 == first
    open_store(files_uri).write("notes.txt", b"passed over, so of no matter")
    assert find(files_uri).sha256 == first
    open_store(files_uri).write("a.png", b"longer")
    assert find(files_uri).sha256 != first


def test_a_larger_file_than_any_image_is_a_problem_and_not_read(files_uri: str) -> None:
    items = dict(read(find(f"{files_uri}/sub"), max_bytes=3))
    assert items["c.webp"] == b"ccc"
    assert items["deep/d.png"] == "file has 0 MB, over the 0 allowed: make it smaller"


def test_webdataset_samples_give_their_image_and_not_their_masks(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as tar:
        for key in ("one", "two"):
            tar.write(
                {"__key__": f"dir/{key}", "JPG": b"j" + key.encode(), "json": {"a": 1}, "mask.png": b"m", "txt": "t"}
            )
    assert read(find(str(tmp_path))) == [("x.tar:dir/one.JPG", b"jone"), ("x.tar:dir/two.JPG", b"jtwo")]


@pytest.mark.parametrize("cut", [1024, 1100, 200])
def test_a_tar_cut_short_gives_what_is_whole_and_one_problem(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([("a.png", b"a" * 512), ("b.png", b"b" * 512)])[:cut])
    (tmp_path / "b.tar").write_bytes(tar_of([("c.png", b"c")]))
    items = read(find(str(tmp_path)))
    assert [item for item in items if isinstance(item[1], bytes)] == (
        [("a.tar:a.png", b"a" * 512)] if cut >= 1024 else []
    ) + [("b.tar:c.png", b"c")]
    problems = [problem for _, problem in items if isinstance(problem, str)]
    assert len(problems) == 1
    assert problems[0].startswith("tar ")


@pytest.mark.parametrize(
    "column",
    [
        pa.array(
            [{"bytes": b"one", "path": "1.png"}, {"bytes": b"two", "path": None}, {"bytes": None, "path": "3.png"}]
        ),
        pa.array([b"one", b"two", None], pa.binary()),
        pa.array([b"one", b"two", None], pa.large_binary()),
    ],
    ids=["struct", "binary", "large_binary"],
)
def test_parquet_gives_the_cells_of_its_image_column(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"label": [1, 2, 3], "image": column, "thumbnail": column}), tmp_path / "t.parquet")
    items = read(find(str(tmp_path / "t.parquet")))
    assert items[:2] == [("t.parquet:0", b"one"), ("t.parquet:1", b"two")]
    assert items[2][0] == "t.parquet:2"
    assert str(items[2][1]).startswith("row has no image bytes")


def test_the_only_binary_column_is_the_image_whatever_its_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["x"], "photo_of_it": [b"one"]}), tmp_path / "t.parquet")
    assert read(find(str(tmp_path))) == [("t.parquet:0", b"one")]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"caption": ["x"], "n": [1]},
            "has no image column among caption: string, n: int64: store the bytes of image files in a binary column "
            "'image', or give their addresses as a list ..txt.",
        ),
        (
            {"left": [b"x"], "right": [b"y"]},
            "has several image columns among left, right: name the one with encoded images 'image'",
        ),
    ],
)
def test_parquet_without_a_clear_image_column_is_one_line(
    tmp_path: Path, table: dict[str, list[object]], message: str
) -> None:
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    with pytest.raises(LayerloopError, match=f"^{tmp_path}/t.parquet {message}$"):
        read(find(str(tmp_path)))


def test_a_damaged_parquet_is_one_problem(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 rubbish")
    items = read(find(str(tmp_path)))
    assert [origin for origin, _ in items] == ["t.parquet"]
    assert str(items[0][1]).startswith("parquet is damaged (")


def test_a_parquet_that_says_more_rows_than_it_has_is_told_so_once(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [b"one", b"two"]}), path, store_schema=False)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"\x16\x04") + 1] = 0x7E  # of the row group's two rows, 63: Thrift's compact protocol
    path.write_bytes(bytes(data))
    items = read(find(str(tmp_path)))
    assert [content for _, content in items[:2]] == [b"one", b"two"]
    assert [(origin, str(why)) for origin, why in items[2:]] == [
        ("t.parquet:2", "61 rows: missing, the parquet is damaged: make it again")
    ]


def test_a_parquet_whose_description_of_a_row_group_is_damaged_has_rows_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [b"one", b"two"]}), path, store_schema=False)
    schema, of_column = (place.start() for place in re.finditer(b"image", path.read_bytes()))
    data = bytearray(path.read_bytes())
    data[of_column] = 0x80  # where the group says which column its pages are of
    path.write_bytes(bytes(data))
    items = read(find(str(tmp_path)))
    assert [origin for origin, _ in items] == ["t.parquet:0", "t.parquet:1"] and schema < of_column
    assert str(items[1][1]).startswith("row cannot be read, the parquet is damaged (")


def test_a_parquet_whose_description_ends_arrow_spoils_its_row_group_alone(tmp_path: Path) -> None:
    # pyarrow lets C++ end the process over a histogram of a wrong length (facts in footers.py)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"one", b"two", b"three"]}), path, row_group_size=1, store_schema=False)
    pq.write_table(pa.table({"image": [b"four"]}), tmp_path / "b.parquet")
    data = path.read_bytes()
    two_levels, three = b"\x19\x26\x00\x02", b"\x19\x36\x00\x00\x02"  # a list of 0, 1 and one of 0, 0, 1
    start, first, second, third = data[:-8].split(two_levels)
    length = (int.from_bytes(data[-8:-4], "little") + 1).to_bytes(4, "little")
    path.write_bytes(two_levels.join([start, first + three + second, third]) + length + b"PAR1")
    told = (
        "row cannot be read, the parquet is damaged (Definition level histogram size mismatch, size: 3, expected: 2): "
        "make it again"
    )
    assert read(find(str(tmp_path))) == [
        ("a.parquet:0", b"one"), ("a.parquet:1", told), ("a.parquet:2", b"three"), ("b.parquet:0", b"four"),
    ]  # fmt: skip


def test_a_parquet_each_of_whose_row_groups_ends_arrow_is_given_up_soon(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"one"] * 40}), path, row_group_size=1, store_schema=False)
    optional, required = b"\x25\x02\x18\x05image", b"\x25\x00\x18\x05image"  # where levels have one value, not two
    path.write_bytes(path.read_bytes().replace(optional, required, 1))
    items = read(find(str(tmp_path)))
    assert [origin for origin, _ in items] == [f"a.parquet:{row}" for row in range(40)]
    ended = [str(problem) for _, problem in items if "size: 2, expected: 1" in str(problem)]
    assert len(ended) == MOST_ENDED and all("the parquet is damaged (" in str(problem) for _, problem in items)


def test_a_description_that_the_child_alone_cannot_read_is_the_tables_fault() -> None:
    problem, end = footers._described(b"PAR1\xff\xff\xff\xff\x02\0\0\0PAR1", 0)
    assert isinstance(problem, str) and end is None


def test_a_reader_of_descriptions_that_is_ended_from_outside_condemns_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"image": [b"one"]}), tmp_path / "a.parquet")
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -KILL $$\n")
    killed.chmod(0o700)
    monkeypatch.setattr(footers, "_CHILD", footers._Child())
    with monkeypatch.context() as patched:
        patched.setattr("sys.executable", str(killed))
        with pytest.raises(UnavailableError, match=r"ended with status -9 \(no word\): give the step more memory"):
            read(find(str(tmp_path)))
    assert read(find(str(tmp_path))) == [("a.parquet:0", b"one")]
    footers._CHILD.close()


def test_images_tars_and_parquet_may_lie_in_one_folder(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    (tmp_path / "p.png").write_bytes(encoded(1))
    (tmp_path / "t.tar").write_bytes(tar_of([("k.png", encoded(2))]))
    pq.write_table(pa.table({"image": [encoded(3)]}), tmp_path / "u.parquet")
    assert [origin for origin, _ in read(find(str(tmp_path)))] == ["p.png", "t.tar:k.png", "u.parquet:0"]


@pytest.mark.timeout(20)
def test_a_pipe_named_as_an_image_is_not_waited_for(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.parquet")
    inputs = find_inputs(str(tmp_path), what="images")
    assert list(inputs.sizes) == ["a.png"] and {item.kind for item in inputs.passed} == {"special files"}
    for uri in (f"{tmp_path}/pipe.*", f"{tmp_path}/pipe.png"):
        with pytest.raises(LayerloopError, match=r"pipe"):
            find_inputs(uri, what="images")
    with pytest.raises(InputError, match="not a regular file"):  # it took the place of a file since the listing
        LocalFiles(tmp_path).read("pipe.png")
    with pytest.raises(LayerloopError, match="not a regular file"):
        read_uri(tmp_path / "pipe.png")


def test_a_few_bytes_of_parquet_are_not_unpacked_to_gigabytes(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    """A dictionary of one image of zeros, which every row names: 16 rows at once would be sixteen of it."""
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 16), pa.array([bytes(70_000_000)], pa.binary()))
    table = pa.table({"image": rows})
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    found = read(find(f"{tmp_path}/bomb.parquet"), 10**9)
    assert len(found) == 16 and all("unpacks to" in str(problem) for _, problem in found)
    nulls = pa.table({"image": pa.nulls(3_000_000, pa.binary())})
    pq.write_table(nulls, tmp_path / "nulls.parquet", row_group_size=3_000_000)
    [(origin, problem)] = read(find(f"{tmp_path}/nulls.parquet"))
    assert origin == "nulls.parquet:0" and "3000000 rows: row group has 3000000 entries in" in str(problem)


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (gzip.compress(b"x"), "packed by gzip: unpack it"),
        (bz2.compress(b"x"), "packed by bzip2: unpack it"),
        (lzma.compress(b"x"), "packed by xz: unpack it"),
        (b"PK\x03\x04" + bytes(600), "a zip: unpack it"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a pointer of Git LFS and not the file itself: fetch it with",
        ),
        (b"ARROW1\0\0", "an Arrow table: write it as parquet"),
        (b"<!doctype html>", "a web page: download the file itself"),
    ],
)
def test_a_container_that_is_something_else_is_told_what_it_is(
    tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(data)
    ((origin, problem),) = read(find(str(tmp_path)))
    assert origin == name and str(problem).startswith(f"file named {name[1:]} is {said}")


def test_a_tar_within_a_tar_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([("in.tar", b"x"), ("k.png", b"k")]))
    inputs = find(str(tmp_path))
    assert read(inputs) == [("a.tar:k.png", b"k")]
    assert [item.reason for item in inputs.passed] == [".tar within a tar is not read: give it by itself"]


def test_a_table_about_the_images_beside_it_is_passed_over_and_one_alone_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"file_name": ["a.png"]}), tmp_path / "metadata.parquet")
    with pytest.raises(LayerloopError, match=r"metadata\.parquet has no image column among file_name: string: store"):
        read(find(str(tmp_path)))
    (tmp_path / "z.png").write_bytes(b"z")
    inputs = find(str(tmp_path))
    assert read(inputs) == [("z.png", b"z")]
    (passed,) = inputs.passed
    assert (passed.origin, passed.kind) == ("metadata.parquet", "tables without images")
    assert passed.reason.startswith("has no image column among file_name: string: store the bytes")


def test_a_row_without_bytes_is_told_with_the_beginning_of_its_path(tmp_path: Path) -> None:
    cells = pa.array([{"bytes": None, "path": "p" * 5_000}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
    ((_, problem),) = read(find(str(tmp_path)))
    assert str(problem).startswith("row has no image bytes (path 'ppp") and len(str(problem)) < 300


def test_a_member_of_negative_size_is_not_read_to_the_end_of_its_tar(tmp_path: Path) -> None:
    data = bytearray(tar_of([("a.png", b"a"), ("b.png", b"b")]))
    data[124:136] = b"\xff" * 12  # -1 in base 256
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    found = dict(read(find(str(tmp_path))))
    assert found["a.tar:a.png"] == "member has a size of -1 bytes: make the tar again"
