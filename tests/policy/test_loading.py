"""Finding and checking a base model's files: every fault is one line that names the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageLayeredPipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

from layerloop.components.policy import base_files, fingerprint, loading, weights
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.policy.prompt import embed_prompt
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import ModelRecipe


@pytest.fixture
def folder(random_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_folder, tmp_path / "model"))


def load(folder: Path | str, **more: object) -> LayeredPolicy:
    return LayeredPolicy.load(ModelRecipe(base=str(folder), dtype="float32"), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(LayerloopError, match=f"{name} is missing"):
        load(folder)


def test_text_files_are_needed_only_for_the_text_encoder(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    load(folder)
    with pytest.raises(LayerloopError, match=r"text_encoder/config\.json is missing"):
        embed_prompt(ModelRecipe(base=str(folder), dtype="float32"))


def test_a_missing_shard_of_the_weights_is_named(folder: Path) -> None:
    index = {"weight_map": {"img_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LayerloopError, match=r"00001-of-00002\.safetensors is missing"):
        load(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(LayerloopError, match=r"transformer/diffusion_pytorch_model\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("transformer/config.json", "use_additional_t_cond", False),
        ("transformer/config.json", "zero_cond_t", True),
        ("vae/config.json", "input_channels", 3),
        ("scheduler/scheduler_config.json", "stochastic_sampling", True),
    ],
)
def test_another_kind_of_model_is_refused(folder: Path, name: str, key: str, value: object) -> None:
    """Such as plain Qwen-Image, whose files are named alike."""
    config = json.loads((folder / name).read_text()) | {key: value}
    (folder / name).write_text(json.dumps(config))
    with pytest.raises(LayerloopError, match=rf"{name} has {key} {value!r}"):
        load(folder)


def test_weights_that_lack_a_tensor_are_refused(folder: Path) -> None:
    """Diffusers would fill it with random numbers and a warning."""
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("decoder.conv_in.weight")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(LayerloopError, match=r"vae lack decoder\.conv_in\.weight, unlike its config"):
        load(folder)
    save_file(load_file(file) | {"decoder.conv_in.weight": torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(LayerloopError, match="vae"):
        load(folder)


def test_the_prompt_is_embedded_without_the_rest_of_the_model(folder: Path) -> None:
    pipeline = QwenImageLayeredPipeline.from_pretrained(folder, processor=None, dtype=torch.float32)
    expected = pipeline.encode_prompt(ModelRecipe().prompt)[0][0]
    for part in ("transformer", "vae", "scheduler"):
        shutil.rmtree(folder / part)
    assert torch.equal(embed_prompt(ModelRecipe(base=str(folder), dtype="float32")), expected)
    (folder / "tokenizer/tokenizer_config.json").unlink()
    with pytest.raises(LayerloopError, match=r"tokenizer/tokenizer_config\.json is missing"):
        embed_prompt(ModelRecipe(base=str(folder), dtype="float32"))


def split_tokenizer(folder: Path) -> None:
    """`tokenizer.json` as the two files of the released model's tokenizer."""
    tokenizer = folder / "tokenizer"
    combined = json.loads((tokenizer / "tokenizer.json").read_text())
    (tokenizer / "vocab.json").write_text(json.dumps(combined["model"]["vocab"]))
    merges = [" ".join(pair) for pair in combined["model"]["merges"]]
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (tokenizer / "tokenizer.json").unlink()


def test_a_tokenizer_in_two_files_is_as_good_as_in_one(folder: Path) -> None:
    model = ModelRecipe(base=str(folder), dtype="float32")
    expected = embed_prompt(model)
    split_tokenizer(folder)
    assert torch.equal(embed_prompt(model), expected)


def test_a_tokenizer_without_its_vocabulary_is_named(folder: Path) -> None:
    """It would load, and make no tokens."""
    model = ModelRecipe(base=str(folder), dtype="float32")
    split_tokenizer(folder)
    (folder / "tokenizer/merges.txt").rename(folder / "merges.txt")
    with pytest.raises(LayerloopError, match=r"tokenizer/merges\.txt is missing: .* is not a complete"):
        embed_prompt(model)
    (folder / "tokenizer/vocab.json").unlink()
    with pytest.raises(LayerloopError) as caught:
        embed_prompt(model)
    assert str(caught.value) == (
        f"{folder}/tokenizer/tokenizer.json is missing, and so are vocab.json and merges.txt, which would do instead: "
        f"{folder} is not a complete diffusers folder of the model; fetch it again"
    )
    (folder / "merges.txt").rename(folder / "tokenizer/merges.txt")
    with pytest.raises(LayerloopError, match=r"tokenizer/vocab\.json is missing: "):
        embed_prompt(model)


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "vae/config.json").write_text("{")
    with pytest.raises(LayerloopError, match=r"vae/config\.json is not a JSON object"):
        load(folder)


def test_a_base_that_is_nowhere_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(LayerloopError, match="no such folder; give 'tiny', a folder, an s3:// URI"):
        load(tmp_path / "absent")
    with pytest.raises(LayerloopError, match="copy it to a local folder first"):
        load("s3://bucket/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        LayerloopError, match=r"'someone/some-model': neither a local folder nor a model that the Hugging"
    ) as e:
        load("someone/some-model")
    assert "\n" not in str(e.value)


def test_the_fingerprint_is_of_contents_not_of_places(random_folder: Path, folder: Path) -> None:
    first = fingerprint.fingerprint(folder)
    assert first == fingerprint.fingerprint(random_folder) == load(folder).fingerprint and len(first) == 64
    shutil.rmtree(folder / "text_encoder")
    (folder / "README.md").write_text("not part of the model")
    assert fingerprint.fingerprint(folder) == first
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fingerprint.fingerprint(folder) != first


def test_the_fingerprint_of_a_hub_snapshot_reads_no_weights(folder: Path, tmp_path: Path) -> None:
    """The hub's cache keeps large files as blobs named by their sha256, which is taken from the name."""
    first = fingerprint.fingerprint(folder)
    for file in base_files.weight_files(folder, "transformer"):
        blob = tmp_path / "blobs" / fingerprint._sha256(file)
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        file.symlink_to(blob)
        size = blob.stat().st_size
        blob.write_bytes(bytes(size))  # would show, were it read
    assert fingerprint.fingerprint(folder) == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_modules_are_those_that_diffusers_loads(random_folder: Path, dtype: torch.dtype) -> None:
    ours = loading.load_base(random_folder, dtype=dtype)[:2]
    kinds = (QwenImageTransformer2DModel, AutoencoderKLQwenImage)
    for part, kind, module in zip(("transformer", "vae"), kinds, ours, strict=True):
        theirs = kind.from_pretrained(random_folder, subfolder=part, dtype=dtype, local_files_only=True)
        assert dict(module.config) == dict(theirs.config)
        assert module.training == theirs.training is False
        left, right = module.state_dict(), theirs.state_dict()
        assert list(left) == list(right)
        for name, tensor in right.items():
            assert left[name].dtype == tensor.dtype
            assert torch.equal(left[name], tensor)
        assert {name: p.dtype for name, p in module.named_buffers()} == {n: p.dtype for n, p in theirs.named_buffers()}
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def test_weights_in_several_files_are_read_from_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PIECE", 1000)  # most tensors take many reads
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    state, names = load_file(file), {}
    for part, keys in enumerate((sorted(state)[::2], sorted(state)[1::2]), start=1):
        name = f"diffusion_pytorch_model-0000{part}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, file.with_name(name))
        names |= dict.fromkeys(keys, name)
    file.unlink()
    Path(f"{file}.index.json").write_text(json.dumps({"weight_map": names}))
    loaded = load(folder).transformer.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "is truncated: fetch it again"),
        (lambda data: data[:5], "is not a safetensors file"),
        (lambda data: b"\xff" * 8 + data[8:], "is not a safetensors file"),
        (lambda data: data[:8] + b"[" + data[9:], "is not a safetensors file"),
        (lambda data: data.replace(b'"F16"', b'"F32"'), "is not a safetensors file"),
        (lambda data: data.replace(b'"F16"', b'"F17"'), "is not a safetensors file"),
    ],
    ids=["end", "start", "length", "json", "size", "dtype"],
)
def test_a_damaged_file_of_weights_is_named(folder: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(LayerloopError) as caught:
        load(folder)
    assert f"{file} {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_full_is_no_fault_of_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(loading, "_put", full)
    with pytest.raises(LayerloopError, match=r"transformer does not fit the GPU's memory \(CUDA out of memory\. Tried"):
        load(folder)


@pytest.fixture
def keeping(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose every file is worth keeping the sha256 of, and has not changed for long."""
    monkeypatch.setattr(fingerprint, "WORTH_KEEPING", 0)
    monkeypatch.setattr(fingerprint, "SETTLED", 0.0)
    return folder


def test_a_fingerprint_is_kept_beside_its_files(keeping: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint.fingerprint(keeping)
    assert json.loads((keeping / fingerprint.DIGESTS).read_bytes()).keys() >= {"vae/config.json"}
    read: list[Path] = []
    monkeypatch.setattr(fingerprint, "_sha256", lambda file: read.append(file) or "0" * 64)
    assert fingerprint.fingerprint(keeping) == first and not read
    (keeping / "vae/config.json").write_bytes((keeping / "vae/config.json").read_bytes())  # written again: read again
    fingerprint.fingerprint(keeping)
    assert read == [keeping / "vae/config.json"]


def test_a_kept_fingerprint_never_hides_a_change(keeping: Path) -> None:
    first = fingerprint.fingerprint(keeping)
    file = keeping / "vae/diffusion_pytorch_model.safetensors"
    times, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time of modification
    assert fingerprint.fingerprint(keeping) != first


def test_a_fingerprint_that_cannot_be_kept_is_computed(keeping: Path) -> None:
    first = fingerprint.fingerprint(keeping)
    for damage in (b"{", b"[]", b'{"vae/config.json": 1}', b'{"vae/config.json": {"sha256": "0"}}'):
        (keeping / fingerprint.DIGESTS).write_bytes(damage)
        assert fingerprint.fingerprint(keeping) == first
    (keeping / fingerprint.DIGESTS).unlink()
    (keeping / fingerprint.DIGESTS).mkdir()  # nothing can be written there, whoever asks
    assert fingerprint.fingerprint(keeping) == first


def test_what_has_just_changed_or_is_small_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "SETTLED", 0.0)
    fingerprint.fingerprint(folder)
    assert not (folder / fingerprint.DIGESTS).exists()  # all are small
    monkeypatch.setattr(fingerprint, "WORTH_KEEPING", 0)
    monkeypatch.setattr(fingerprint, "SETTLED", 3600.0)
    fingerprint.fingerprint(folder)
    assert not (folder / fingerprint.DIGESTS).exists()


def test_the_commit_of_a_snapshot_is_its_folders_name(tmp_path: Path) -> None:
    assert base_files.commit_of(tmp_path / "snapshots" / ("a1" * 20)) == "a1" * 20
    assert base_files.commit_of(tmp_path / "snapshots" / "main") is None
    assert base_files.commit_of(tmp_path / ("a1" * 20)) is None
