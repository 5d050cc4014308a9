"""A text file of URIs as an input, with files on the web among them."""

from __future__ import annotations

import base64
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.shard_dataset import listed
from layerloop.components.shard_dataset.files import InputError
from layerloop.components.shard_dataset.inputs import find_inputs, read_items
from layerloop.components.storage.stores import open_store

Encoded = Callable[..., bytes]


class Web:
    """A server of files by path; `trouble` are statuses that it answers first."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.trouble: list[int] = []
        self.asked: list[str] = []
        self.keys: list[str | None] = []  # Authorization
        self.moves: dict[str, str] = {}
        self.seconds = 0.0  # between two bytes
        self.cut: int | None = None  # bytes that are sent of more that are promised
        self.url = ""


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    served = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(self.path)
            served.keys.append(self.headers["Authorization"])
            if place := served.moves.get(self.path):
                self.send_response(302)
                self.send_header("Location", place)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = served.files.get(self.path.partition("?")[0])
            status = served.trouble.pop(0) if served.trouble else 200 if body is not None else 404
            self.send_response(status)
            self.send_header("Content-Length", str(len(body or b"") if status == 200 else 0))
            self.end_headers()
            if status == 200:
                with contextlib.suppress(OSError):  # nobody waits for it any more
                    for byte in (body or b"")[: served.cut] if served.seconds else ():
                        self.wfile.write(bytes([byte]))
                        time.sleep(served.seconds)
                    if not served.seconds:
                        self.wfile.write((body or b"")[: served.cut])

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(listed, "_PAUSE", 0.01)
    yield served
    server.shutdown()
    server.server_close()


def test_a_list_names_files_here_on_the_web_and_in_a_bucket(
    web: Web, tmp_path: Path, s3_bucket: str, encoded: Encoded
) -> None:
    pictures = [encoded(seed) for seed in range(4)]
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "0.png").write_bytes(pictures[0])
    (tmp_path / "1.png").write_bytes(pictures[1])
    web.files["/a/2.png"] = pictures[2]
    open_store(s3_bucket).write("b/3.png", pictures[3])
    lines = [
        "# pictures",
        "here/0.png",
        f"{tmp_path}/1.png",
        "",
        f"{web.url}/a/2.png?key=secret",
        f"{s3_bucket}/b/3.png",
    ]
    (tmp_path / "list.txt").write_text("\n".join([*lines, "here/0.png"]))
    found = find_inputs(str(tmp_path / "list.txt"), what="benchmark")
    items = {item.origin: item.load() for item in read_items(found, max_bytes=10**7)}
    assert items == {
        f"{tmp_path}/here/0.png": pictures[0],
        f"{tmp_path}/1.png": pictures[1],
        f"{web.url}/a/2.png": pictures[2],
        f"{s3_bucket}/b/3.png": pictures[3],
    }
    assert web.asked == ["/a/2.png?key=secret"]


def test_names_hold_no_secrets_and_still_differ(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("https://me:pw@h/x.png?sig=1\nhttps://me:pw@h/x.png?sig=2#f\n")
    assert list(find_inputs(str(tmp_path / "l.txt"), what="images").sizes) == ["https://h/x.png", "https://h/x.png#2"]


def test_a_server_that_fails_is_asked_again_and_one_that_refuses_is_not(web: Web) -> None:
    web.files["/x.png"] = b"bytes"
    web.trouble = [503, 429]
    assert listed.download(f"{web.url}/x.png") == b"bytes" and len(web.asked) == 3
    web.trouble = [503, 503, 503]
    with pytest.raises(InputError, match=r"cannot be fetched, its server answers 503: correct its line"):
        listed.download(f"{web.url}/x.png")
    web.asked.clear()
    with pytest.raises(InputError, match="its server answers 404"):
        listed.download(f"{web.url}/gone.png?sig=secret")
    assert len(web.asked) == 1


def test_a_server_that_is_not_there_and_a_file_without_end_are_faults_of_their_lines(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="its server does not answer") as caught:
        listed.download("http://127.0.0.1:9/x.png?sig=secret")
    assert "secret" not in str(caught.value)
    web.files["/x.png"] = bytes(2000)
    monkeypatch.setattr(listed, "MOST_BYTES", 1999)
    with pytest.raises(InputError, match="file has over"):
        listed.download(f"{web.url}/x.png")


def test_addresses_are_taken_as_a_browser_takes_them(web: Web) -> None:
    web.files |= {"/%C3%A4%20b.png": b"one", "/a%20b.png": b"two"}
    assert listed.download(f"{web.url}/ä b.png?q=é") == b"one"
    assert listed.download(f"{web.url}/a%20b.png") == b"two"
    assert web.asked == ["/%C3%A4%20b.png?q=%C3%A9", "/a%20b.png"]


def test_a_password_goes_to_its_server_and_into_no_message(web: Web) -> None:
    web.files["/x.png"] = b"bytes"
    assert listed.download(web.url.replace("//", "//me:p%40ss@") + "/x.png") == b"bytes"
    assert web.keys[-1] == f"Basic {base64.b64encode(b'me:p@ss').decode()}"
    web.moves["/moved.png"] = web.url.replace("127.0.0.1", "localhost") + "/x.png"
    assert listed.download(web.url.replace("//", "//me:secret@") + "/moved.png") == b"bytes"
    assert web.keys[-1] is None, "another host gets no password"
    for address in (
        "http://me:secret@127.0.0.1/x.png",
        "http://me:secret@[::1/x.png",
        "http://me:secret@h:99999/x.png",
    ):
        with pytest.raises(InputError) as caught:
            listed.download(address)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [("http://[::1/x.png", "is no address"), ("http:///x.png", "it has no host"), ("http://h:x/a.png", "is no address"),
     (f"http://{'a' * 70}.invalid/a.png", "is no address"), ("http://h:99999/a.tar", "is no address")],
)  # fmt: skip
def test_a_line_that_is_no_address_is_a_fault_of_that_line(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "l.txt").write_text(f"{line}\n")
    (item,) = read_items(find_inputs(str(tmp_path / "l.txt"), what="images"), max_bytes=10)
    with pytest.raises(InputError, match=said) if item.problem is None else contextlib.nullcontext():
        item.load()
    assert item.problem is None or said in item.problem


def test_a_server_that_sends_drops_is_not_waited_for(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.files["/x.png"], web.seconds = bytes(400), 0.02
    monkeypatch.setattr(listed, "TIMEOUT", 0.15)
    with pytest.raises(InputError, match=r"its server does not answer \(\d+ bytes in 0 s\)"):
        listed.download(f"{web.url}/x.png")
    assert len(web.asked) == 3
    web.files["/y.png"], web.cut = bytes(40), 20
    web.seconds = 0.0
    with pytest.raises(InputError, match=r"\(20 bytes are missing\)"):
        listed.download(f"{web.url}/y.png")


def test_a_list_as_other_systems_write_it_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "ü b"
    folder.mkdir()
    (folder / "a\u2028b.png").write_bytes(b"x")
    list_of = tmp_path / "l.txt"
    encoded = str(folder).replace(" ", "%20").replace("ü", "%C3%BC")
    lines = f"ü b/a\u2028b.png\r\nfile://{encoded}/a%E2%80%A8b.png\r\nfile://localhost{folder}/a\u2028b.png"
    for codec in ("utf-8", "utf-8-sig", "utf-16"):  # the last as PowerShell's >
        list_of.write_bytes(lines.encode(codec))
        assert [item.load() for item in read_items(find_inputs(str(list_of), what="images"), max_bytes=10)] == [
            b"x"
        ] * 3
    assert find_inputs(f"file://{encoded}", what="images").sizes == {"a\u2028b.png": 1}
    list_of.write_bytes(lines.encode("utf-16-le"))
    with pytest.raises(LayerloopError, match="is not text in UTF-8"):
        find_inputs(str(list_of), what="images")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"# nothing\n\n", "names no file: write the URI of an image on each line"),
        (b"gopher://h/a.png\n", r"has gopher://h/a\.png: give paths, s3://, hf:// or http"),
        (b"\xff\xfe\x00", "is not text in UTF-8"),
    ],
)
def test_a_list_that_is_none_is_one_line(tmp_path: Path, text: bytes, line: str) -> None:
    (tmp_path / "l.txt").write_bytes(text)
    with pytest.raises(LayerloopError, match=line):
        find_inputs(str(tmp_path / "l.txt"), what="benchmark")


def test_a_scheme_may_be_in_capitals_and_a_folder_is_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "l.txt").write_text(f"FILE://{tmp_path}/a.png\n{tmp_path}\n")
    items = {item.origin: item for item in read_items(find_inputs(str(tmp_path / "l.txt"), what="images"), max_bytes=9)}
    assert items[f"file://{tmp_path}/a.png"].load() == b"a"
    with pytest.raises(InputError, match=r"^a folder is no file: give its files, one a line$"):
        items[str(tmp_path)].load()
