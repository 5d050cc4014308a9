"""An environment that cannot be used is one line before anything is done."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from layerloop.components.runtime.environment import usable_environment
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.folders import cache_folder


@pytest.mark.parametrize("folder", ["/nowhere/at/all", "/proc"])
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "layerloop.components.score_rollouts", "--campaign", "c"],
        ["-c", "from layerloop.pipelines.cli import main; raise SystemExit(main(['judge', 'check', 'http://x/v1']))"],
    ],
    ids=["step", "command"],
)
def test_a_tmpdir_that_cannot_be_written_is_one_line(folder: str, command: list[str], tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"TMPDIR": folder},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert f"error: TMPDIR is {folder}, which does not exist, cannot be written or is full" in result.stderr
    assert "Traceback" not in result.stderr and os.listdir(tmp_path) == []


def test_a_user_without_a_home_is_one_line_where_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("LAYERLOOP_CACHE", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # of no entry in passwd, as Kubernetes runs containers
    with pytest.raises(LayerloopError, match="HOME is not set"), usable_environment():
        cache_folder()
    with usable_environment():
        pass  # where none is needed none is asked for


def test_the_home_of_nobody_is_one_line() -> None:
    said = "a path begins with the ~name of nobody: .* write the path in full"
    with pytest.raises(LayerloopError, match=said), usable_environment():
        Path("~no-such-user/pictures").expanduser()


class OfAnotherLibrary(Exception):
    """As safetensors says it."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
        OfAnotherLibrary("Error while serializing: I/O error: No space left on device (os error 28)"),
        ExceptionGroup("of tasks", [OSError(errno.EDQUOT, "Disk quota exceeded")]),
    ],
    ids=["system", "safetensors", "tasks"],
)
def test_a_disk_that_becomes_full_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    line = f"a disk is full .*set TMPDIR, which is {tmp_path}, to a folder with more"
    with pytest.raises(LayerloopError, match=line), usable_environment():
        raise error


@pytest.mark.parametrize(("closed", "said"), [(">&- 2>&- <&-", b""), ("", b"# The whole job")])
def test_streams_that_are_closed_are_no_failure(closed: str, said: bytes) -> None:
    program = "from layerloop.pipelines.cli import main; raise SystemExit(main(['recipe', 'tiny']))"
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(said) and bool(done.stdout) == bool(said)


def test_no_file_takes_the_place_of_a_closed_stream_and_no_name_is_beyond_an_encoding(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from layerloop.components.runtime.contract import end_process\n"
        "from layerloop.components.runtime.environment import usable_environment\n"
        "with usable_environment(), open(sys.argv[1], 'w') as file:\n"
        "    print('caf\\udce9 \\u732b')\n"
        "    os.system('echo of a child')\n"
        "    file.write('ours')\n"
        "end_process(0)\n"
    )
    line = [sys.executable, "-c", program, str(tmp_path / "file")]
    done = subprocess.run(["/bin/sh", "-c", 'exec "$@" >&-', "sh", *line], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"") and (tmp_path / "file").read_text() == "ours"
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(line, capture_output=True, env=ascii_only, check=False)
    assert sorted(done.stdout.split(b"\n")) == [b"", rb"caf\udce9 \u732b", b"of a child"], done.stderr


def test_a_tmpdir_that_is_relative_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in (".", "in", "in/", "./in/../in"):
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setenv("TMPDIR", folder)
        with usable_environment():
            assert os.path.samefile(tempfile.gettempdir(), folder)


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="other"), usable_environment():
        raise RuntimeError("other")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon", "HF_HUB_DOWNLOAD_TIMEOUT is 'soon': give seconds, an integer"),
        ("HF_HUB_ETAG_TIMEOUT", "", "HF_HUB_ETAG_TIMEOUT is '': give seconds"),
        ("HF_ENDPOINT", "http://me:secret@hub:port", "HF_ENDPOINT is 'http://...@hub:port', which is no address"),
    ],
)
def test_a_variable_with_which_the_hubs_library_cannot_be_imported_is_one_line(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(LayerloopError, match=said), usable_environment():
        pass


def test_a_variable_that_ends_a_librarys_import_is_named() -> None:
    program = "from layerloop.components.runtime.environment import usable_environment as u\nwith u():\n import tqdm"
    environment = {**os.environ, "TQDM_MININTERVAL": "often"}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True).stderr
    assert said.splitlines()[-1] == (
        "layerloop.components.schema.errors.LayerloopError: tqdm cannot be imported (could not convert string to "
        "float: 'often'): correct or unset what it reads of TQDM_MININTERVAL"
    )


def test_an_import_that_no_variable_ends_passes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "oddlibrary.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in os.environ if name.startswith("USE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(ZeroDivisionError), usable_environment():
        import oddlibrary
    monkeypatch.setenv("ODDLIBRARY_X", "1")
    with pytest.raises(LayerloopError, match=r"oddlibrary cannot be imported .* of ODDLIBRARY_X"), usable_environment():
        import oddlibrary  # noqa: F401


def test_an_attention_that_diffusers_does_not_know_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "fast")
    said = "DIFFUSERS_ATTN_BACKEND is 'fast', which diffusers does not know: unset it"
    with pytest.raises(LayerloopError, match=said), usable_environment():
        raise RuntimeError("Failed to import diffusers...: 'fast' is not a valid AttentionBackendName")


def test_a_python_that_leaves_out_texts_is_one_line() -> None:
    program = "from layerloop.pipelines.cli import main; raise SystemExit(main(['recipe', 'tiny']))"
    done = subprocess.run([sys.executable, "-OO", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: PYTHONOPTIMIZE is 2 (-OO), which leaves out texts that are needed: set it")
