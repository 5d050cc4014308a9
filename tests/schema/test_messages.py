from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from layerloop.components.schema.errors import LayerloopError, SeveralErrors, UnavailableError
from layerloop.components.schema.messages import counted, reason_of, size_text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e6, "2.5 MB"), (41.2e9, "41.2 GB")]
)
def test_bytes_in_words(count: float, text: str) -> None:
    assert size_text(count) == text


def test_every_error_of_the_operating_system_has_a_reason(tmp_path: Path) -> None:
    with pytest.raises(OSError) as refused:
        (tmp_path / "missing").read_bytes()
    assert reason_of(refused.value) == "No such file or directory"
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(shutil.Error) as collected:  # has no strerror
        shutil.copytree(tmp_path / "from", tmp_path / "to")
    assert reason_of(collected.value) == "No such file or directory"
    assert reason_of(shutil.Error()) == "Error"
    assert reason_of(TimeoutError("timed out")) == "timed out"


@pytest.mark.parametrize(
    ("count", "plural", "words"),
    [
        (0, "images", "0 images"),
        (1, "images", "1 image"),
        (2, "images", "2 images"),
        (1, "batches", "1 batch"),
        (1, "passes", "1 pass"),
        (1, "replies", "1 reply"),
    ],
)
def test_what_is_counted_is_in_the_singular_where_there_is_one(count: int, plural: str, words: str) -> None:
    assert counted(count, plural) == words


@pytest.mark.parametrize("kind", [LayerloopError, UnavailableError])
def test_a_refusal_is_one_line_whatever_it_quotes(kind: type[LayerloopError]) -> None:
    error = kind("caf\udce9\n\x1b[31m\u202e 猫 is odd: rename it")
    assert str(error) == r"caf\xe9\n\x1b[31m\u202e 猫 is odd: rename it" == str(error.reworded(str(error)))
    assert str(SeveralErrors(["a\nb", "c"])) == "a\\nb\nerror: c"
