"""A text file of URIs as an input, with files on the web among them."""

from __future__ import annotations

import threading
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
        self.url = ""


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    served = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(self.path)
            body = served.files.get(self.path.partition("?")[0])
            status = served.trouble.pop(0) if served.trouble else 200 if body is not None else 404
            self.send_response(status)
            self.send_header("Content-Length", str(len(body or b"") if status == 200 else 0))
            self.end_headers()
            if status == 200:
                self.wfile.write(body or b"")

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
