"""`adapter merge` as a command: nothing half-made, nothing in the way of another try, one line for what is wrong."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layerloop.components.policy import adapter_files, adapters, merge

KEY = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """An adapter in peft's layout, 64 KiB of weights."""
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{KEY}.lora_A.weight": torch.randn(16, 512, generator=generator),
        f"{KEY}.lora_B.weight": torch.randn(512, 16, generator=generator),
    }
    adapter_files.write_peft(adapters.Adapter(state, 16, 16), tmp_path / "part")
    return tmp_path / "part"


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line with which a merge is refused."""

    def refused(*arguments: object) -> str:
        assert merge.main([str(argument) for argument in arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return refused


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


MERGED = [
    "peft/adapter_config.json", "peft/adapter_model.safetensors", "pytorch_lora_weights.bf16.safetensors",
    "pytorch_lora_weights.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("rank", [[], ["--rank", "4"]], ids=["exact", "cut"])
@pytest.mark.parametrize("weight", ["1e300", "1e39"])
def test_a_weight_too_large_is_named_and_leaves_nothing(part, tmp_path, refusal, weight, rank) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "deep" / "out"
    line = refusal(out, f"{part}={weight}", *rank)
    assert line == (
        f"{part} times its weight {float(weight):g} has NaN or infinite values in {KEY}: choose a smaller weight"
    )
    assert not out.parent.exists()
    assert merge.main([str(out), f"{part}=1e3", *rank]) == 0
    assert files(out) == MERGED


def test_a_refused_merge_leaves_an_empty_folder_as_it_was(part, tmp_path, refusal) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    out.mkdir()
    refusal(out, f"{part}=1e300")
    assert out.is_dir() and not list(out.iterdir())


def test_a_disk_that_is_full_leaves_nothing_and_is_one_line(part, tmp_path, refusal) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * 1024, hard))  # the config fits, the weights do not
    try:
        line = refusal(out, part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line.startswith(f"{out} cannot be written (") and "File too large" in line and "give another folder" in line
    assert not out.exists()


def test_what_a_killed_merge_left_is_in_nobodys_way(part, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    left = out / merge.PARTIAL / "peft"
    left.mkdir(parents=True)
    (left / "adapter_config.json").write_text("{")
    assert merge.main([str(out), str(part)]) == 0
    assert files(out) == MERGED
    assert torch.equal(
        adapters.read_adapter(out / "peft").state[f"{KEY}.lora_A.weight"],
        adapters.read_adapter(part).state[f"{KEY}.lora_A.weight"],
    )


def test_a_merge_into_the_empty_current_folder_is_made_there(part, tmp_path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert merge.main([".", str(part)]) == 0
    assert files(tmp_path / "here") == MERGED


def test_an_output_that_cannot_be_made_is_one_line(part, tmp_path, refusal) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_text("x")
    for out, reason in (
        (tmp_path / "file" / "below", "Not a directory"),
        ("/proc/none/out", "No such file or directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        assert refusal(out, part) == f"{out} cannot be written ({reason}): give another folder, one with room"
    assert "is not an empty folder: give another one" in refusal(tmp_path / "file", part)


def test_a_uri_is_no_path(part, tmp_path, monkeypatch, refusal) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert refusal("o", "s3://b/x=0.5") == (
        "adapter s3://b/x is a URI: use `layerloop adapter merge`, which fetches it, or copy it here"
    )
    assert refusal("s3://b/o", part) == "s3://b/o is a URI: give a local folder for the merged adapter"
    assert sorted(os.listdir(tmp_path)) == ["part"]


def test_the_output_of_a_merge_is_merged_again_as_it_stands(part, tmp_path) -> None:  # type: ignore[no-untyped-def]
    first, second = tmp_path / "first", tmp_path / "second"
    assert merge.main([str(first), str(part)]) == 0
    assert merge.main([str(second), f"{first}=0.5"]) == 0
    assert files(second) == MERGED
    once, twice = adapters.read_adapter(first).state, adapters.read_adapter(second / "peft").state
    assert torch.equal(twice[f"{KEY}.lora_B.weight"], 0.5 * once[f"{KEY}.lora_B.weight"])


def test_two_merges_into_one_folder_make_no_mixture(part, tmp_path, refusal) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    with merge.output_folder(out) as folder:
        (folder / "first").write_bytes(b"1")
        assert refusal(out, part) == f"{out} is being written by another process: give another folder"
    assert files(out) == ["first"]


def test_a_merge_that_is_interrupted_is_no_traceback(part, tmp_path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_files, "write_layouts", interrupted)
    try:
        status = merge.main([str(tmp_path / "out"), str(part)])
    except KeyboardInterrupt:  # which would end all tests
        status = -1
    assert status == 130
    assert capsys.readouterr().err == "" and not (tmp_path / "out").exists()
