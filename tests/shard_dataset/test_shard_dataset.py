from __future__ import annotations

import io
import json
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from PIL import Image

from layerloop.components.evaluate_adapter.cases import read_cases
from layerloop.components.judge.rubric import file_content
from layerloop.components.layers.crello import generate_design, write_designs_parquet
from layerloop.components.layers.normalise import image_key
from layerloop.components.layers.stack import composite, on_backdrop
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import parse_recipe
from layerloop.components.schema.record import seal
from layerloop.components.schema.runtime import merged
from layerloop.components.shard_dataset.recipe_choice import read_recipe
from layerloop.components.shard_dataset.step import hold_out, run
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.images import decode_png
from layerloop.components.storage.manifests import read_file
from layerloop.components.storage.shards import Sample, read_shard
from layerloop.components.storage.stores import open_store

from ..campaigns import named, plain_name

Encoded = Callable[..., bytes]

REMEDY = "give a folder of images, a glob, WebDataset tars, parquet or a list of URIs (.txt)"
KINDS = "PNG, JPEG, WebP, HEIC, GIF, BMP, TIFF, JPEG 2000 or AVIF"


def samples(campaign: str, split: str) -> list[Sample]:
    opened = Campaign.open(campaign)
    return [
        s
        for shard in opened.sources().shards_of(split)
        for s in read_shard(opened.store, shard, required=("png", "json"))
    ]


def refused(campaign: str) -> dict[str, tuple[str, str]]:
    """(kind, reason) by origin, from rejects.parquet."""
    opened = Campaign.open(campaign)
    table = pq.read_table(io.BytesIO(read_file(opened.store, opened.sources().file("rejects.parquet"))))
    return {row["origin"]: (row["kind"], row["reason"]) for row in table.to_pylist()}


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------------------- the sources


def test_a_folder_becomes_train_and_holdout_shards(campaign_uri: str, recipe: str, folder: Path) -> None:
    result = run(campaign=campaign_uri, recipe=recipe, images=str(folder))
    train, holdout = samples(campaign_uri, "train"), samples(campaign_uri, "holdout")
    assert (len(train), len(holdout)) == (5, 2)
    assert result.metrics == {
        "images": 7, "duplicates": 0, "rejects": 0, "train": 5, "holdout": 2, "designs": 0, "iteration": 0,
        "megabytes": sum(shard.bytes for shard in result.manifests["sources"].shards) / 1e6,
    }  # fmt: skip
    origins = set()
    for key, members in (*train, *holdout):
        pixels = decode_png(members["png"])
        record = json.loads(members["json"])
        assert pixels.shape == (48, 64, 3)  # 96 x 64 with the longest side 64: 42.7 rounds to 48
        assert image_key(pixels) == key
        assert {name: record[name] for name in record if name != "origin"} == {
            "width": 64, "height": 48, "original_width": 96, "original_height": 64,
        }  # fmt: skip
        origins.add(record["origin"])
    assert origins == {f"{seed}.{'jpg' if seed % 2 else 'png'}" for seed in range(4)} | {
        "more/4.png",
        "more/5.jpg",
        "more/6.png",
    }
    manifest = Campaign.open(campaign_uri).sources()
    assert result.manifests == {"sources": manifest, "policy": Manifest(kind="policy", iteration=0)}
    assert [(plain_name(shard.name), shard.samples) for shard in manifest.shards] == [
        ("sources/train-000000.tar", 3), ("sources/train-000001.tar", 2), ("sources/holdout-000000.tar", 2),
    ]  # fmt: skip
    assert refused(campaign_uri) == {}


def test_samples_are_ordered_by_key(local_campaign: str, recipe: str, folder: Path) -> None:
    run(campaign=local_campaign, recipe=recipe, images=str(folder))
    keys = [key for key, _ in samples(local_campaign, "train")]
    assert keys == sorted(keys)


def test_the_same_input_gives_the_same_bytes(
    tmp_path: Path, recipe: str, folder: Path, with_prompt: Callable[..., str]
) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    first, second = with_prompt(f"{tmp_path}/a"), with_prompt(f"{tmp_path}/b")
    one = run(campaign=first, recipe=recipe, images=str(folder)).manifests["sources"]
    two = run(campaign=second, recipe=recipe, images=str(tmp_path / "elsewhere")).manifests["sources"]
    assert (one.shards, one.files, one.counts) == (two.shards, two.files, two.counts)
    assert one.metadata["images_sha256"] == two.metadata["images_sha256"]


def test_webdataset_reads_the_sources(
    tmp_path: Path, recipe: str, folder: Path, with_prompt: Callable[..., str]
) -> None:
    campaign = with_prompt(f"{tmp_path}/c")
    run(campaign=campaign, recipe=recipe, images=str(folder))
    shards = [str(path) for path in sorted((tmp_path / "c/sources").glob("train-*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode("pil")
    images = [sample["png"] for sample in dataset]
    assert [(image.mode, image.size) for image in images] == [("RGB", (64, 48))] * 5


def test_images_come_from_s3(s3_bucket: str, recipe: str, folder: Path, with_prompt: Callable[..., str]) -> None:
    store = open_store(f"{s3_bucket}/pictures")
    for path in folder.rglob("*.*"):
        store.upload(path.relative_to(folder).as_posix(), path)
    campaign = with_prompt(f"{s3_bucket}/campaign")
    result = run(campaign=campaign, recipe=recipe, images=f"{s3_bucket}/pictures/")
    assert result.metrics["images"] == 7
    assert len(samples(campaign, "train")) == 5


def test_our_own_shards_are_a_webdataset_of_images(
    tmp_path: Path, recipe: str, folder: Path, with_prompt: Callable[..., str]
) -> None:
    first, second = with_prompt(f"{tmp_path}/a"), with_prompt(f"{tmp_path}/b")
    run(campaign=first, recipe=recipe, images=str(folder))
    run(campaign=second, recipe=recipe, images=f"{first}/sources/{{train,holdout}}-*.tar")
    assert {key for key, _ in samples(second, "train")} == {key for key, _ in samples(first, "train")}


# -------------------------------------------------------------------------------------------------- rejects, duplicates


def test_what_cannot_be_read_is_listed_with_the_reason_and_counted(
    campaign_uri: str, recipe: str, folder: Path, encoded: Encoded, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled = {
        "text.png": b"I am no image",
        "empty.jpg": b"",
        "cut.png": encoded(20, "PNG")[:900],
        "bomb.png": bomb(),
        "strip.png": encoded(21, "PNG", width=3000, height=2),
        "phone.heic": b"\0\0\0\x18ftypheic" + bytes(50),
    }
    for name, data in spoiled.items():
        (folder / name).write_bytes(data)
    result = run(campaign=campaign_uri, recipe=recipe, images=str(folder))
    assert (result.metrics["images"], result.metrics["rejects"], result.metrics["train"]) == (13, 6, 5)
    table = refused(campaign_uri)
    assert set(table) == set(spoiled)
    reasons = {origin: reason for origin, (kind, reason) in table.items() if kind == "reject"}
    assert reasons["text.png"].startswith("image starts with b'I am no imag', not a known format")
    assert reasons["empty.jpg"].startswith("image is empty (0 bytes)")
    assert reasons["cut.png"].startswith("image is truncated or damaged")
    assert reasons["bomb.png"].startswith("image is more than twice over 100 megapixels")
    assert reasons["strip.png"].startswith("image is 3000 x 2, at most 0.0 pixels on its short side")
    assert reasons["phone.heic"] == "image is HEIC or AVIF, truncated or damaged: save it again"
    log = capsys.readouterr().err
    assert "rejected bomb.png: image is more than twice over 100 megapixels: make it smaller" in log
    assert "rejected 1 more images, listed in rejects.parquet" in log


def test_too_many_rejects_fail_the_step_with_its_rejects_and_nothing_committed(
    store_uri: str, recipe: str, folder: Path
) -> None:
    for number in range(8):
        (folder / f"bad-{number}.png").write_bytes(b"text")
    with pytest.raises(LayerloopError) as caught:
        run(campaign=f"{store_uri}/c", recipe=recipe.replace("/no/such/model", "tiny"), images=str(folder))
    assert str(caught.value) == (
        "8 of 15 images are rejected, over recipe.data.max_reject_fraction 0.5: correct the input, or allow as "
        "many with --set data.max_reject_fraction=0.54; the first is bad-0.png: "
        "image starts with b'text', not a known format: give a PNG, JPEG, WebP, HEIC, GIF, "
        "BMP, TIFF, JPEG 2000 or AVIF"
    )
    assert open_store(store_uri).list() == ["c/sources/rejects.parquet"]
    table = pq.read_table(io.BytesIO(open_store(store_uri).read("c/sources/rejects.parquet"))).to_pylist()
    assert [row["origin"] for row in table] == [f"bad-{number}.png" for number in range(8)]
    for number in range(8):
        (folder / f"bad-{number}.png").unlink()
    run(campaign=f"{store_uri}/c", recipe=recipe.replace("/no/such/model", "tiny"), images=str(folder))
    assert refused(f"{store_uri}/c") == {}, "the table of the refused attempt is replaced"


def test_duplicates_are_dropped_listed_and_never_held_against_the_input(
    local_campaign: str, recipe: str, folder: Path, draw_image: Callable[..., Image.Image]
) -> None:
    shutil.copy(folder / "0.png", folder / "x-copy.png")
    draw_image(2).save(folder / "x-recompressed.jpg", quality=95, subsampling=0)
    draw_image(2).resize((480, 320), Image.Resampling.BICUBIC).save(folder / "x-larger.png")
    for number in range(9):
        shutil.copy(folder / "0.png", folder / f"y{number}.png")
    result = run(campaign=local_campaign, recipe=recipe, images=str(folder))
    assert (result.metrics["images"], result.metrics["duplicates"], result.metrics["rejects"]) == (19, 12, 0)
    table = refused(local_campaign)
    assert {kind for kind, _ in table.values()} == {"duplicate"}
    assert table["x-recompressed.jpg"] == ("duplicate", "same image as 2.png")
    assert table["x-larger.png"] == ("duplicate", "same image as 2.png")
    assert table["x-copy.png"] == ("duplicate", "same image as 0.png")


def test_flat_images_of_different_colours_are_all_kept(
    tmp_path: Path, recipe: str, with_prompt: Callable[..., str]
) -> None:
    (tmp_path / "flat").mkdir()
    for number, colour in enumerate(("red", "green", "blue", "white", "black", "#808080")):
        Image.new("RGB", (50, 50), colour).save(tmp_path / "flat" / f"{number}.png")
    result = run(campaign=with_prompt(f"{tmp_path}/c"), recipe=recipe, images=str(tmp_path / "flat"))
    assert (result.metrics["duplicates"], result.metrics["train"] + result.metrics["holdout"]) == (0, 6)


# -------------------------------------------------------------------------------------------------------------- holdout


def test_the_holdout_depends_on_keys_and_seed_only() -> None:
    keys = [f"{number:016x}" for number in range(30)]
    train, holdout = hold_out(keys, 8, seed=1)
    assert (len(train), len(holdout)) == (22, 8)
    assert sorted(train + holdout) == keys
    assert hold_out(list(reversed(keys)), 8, seed=1) == (train, holdout)
    assert hold_out(keys, 8, seed=2)[1] != holdout
    assert set(hold_out(keys, 4, seed=1)[1]) < set(holdout)
    assert not set(hold_out([*keys, "f" * 16], 8, seed=1)[1]) - set(holdout) - {"f" * 16}


@pytest.mark.parametrize(("images", "held"), [(1, 0), (2, 0), (3, 1), (5, 1), (6, 2), (30, 8)])
def test_never_more_than_a_third_is_held_out(images: int, held: int) -> None:
    train, holdout = hold_out([str(number) for number in range(images)], 8, seed=0)
    assert (len(train), len(holdout)) == (images - held, held)


def test_one_image_is_enough(tmp_path: Path, recipe: str, encoded: Encoded, with_prompt: Callable[..., str]) -> None:
    (tmp_path / "one.png").write_bytes(encoded(1))
    result = run(campaign=with_prompt(f"{tmp_path}/c"), recipe=recipe, images=str(tmp_path / "one.png"))
    assert (result.metrics["train"], result.metrics["holdout"]) == (1, 0)


# -------------------------------------------------------------------------------------------------------------- designs


def check_designs(campaign: str, count: int) -> list[Sample]:
    """Every design recomposes: its layers, composited, are its image."""
    designs = samples(campaign, "designs")
    assert len(designs) == count
    for key, members in designs:
        record = json.loads(members["json"])
        stack = np.stack([decode_png(members[f"layer{index}.png"]) for index in range(record["layers"])])
        assert f"layer{record['layers']}.png" not in members
        pixels = decode_png(members["png"])
        assert stack.shape == (record["layers"], record["height"], record["width"], 4)
        assert np.array_equal(on_backdrop(composite(stack), "white"), pixels)
        assert composite(stack)[..., 3].min() == 255
        assert image_key(pixels) == key
    return designs


def test_designs_in_crellos_columns_become_layered_samples(
    campaign_uri: str, recipe: str, folder: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    designs = [generate_design(rng, canvas=(320, 240), layers=layers) for layers in (2, 3, 4)]
    designs[1]["image"][1] = None  # as Crello's text elements are
    write_designs_parquet(tmp_path / "designs.parquet", designs)
    result = run(campaign=campaign_uri, recipe=recipe, images=str(folder), designs=str(tmp_path / "designs.parquet"))
    assert (result.metrics["designs"], result.metrics["rejects"], result.metrics["images"]) == (2, 1, 7)
    made = check_designs(campaign_uri, 2)
    assert {json.loads(members["json"])["layers"] for _, members in made} == {2, 4}
    for _, members in made:
        record = json.loads(members["json"])
        assert record["truth"]["layers"] == record["layers"] and record["truth"]["text_previews"] == 0
    assert decode_png(made[0][1]["png"]).shape == (48, 64, 3)
    assert refused(campaign_uri) == {
        f"designs.parquet:{designs[1]['id']}": (
            "reject",
            f"element 1 ({designs[1]['type'][1]}) of design {designs[1]['id']} has no image: it cannot be rendered",
        )
    }


def layered_folder(root: Path) -> Path:
    """Designs as folders of numbered PNGs: one opaque, one transparent in places, and one that is damaged."""
    background = Image.new("RGBA", (128, 96), (250, 240, 200, 255))
    disc = Image.new("RGBA", (128, 96))
    disc.paste((200, 30, 30, 255), (20, 20, 60, 60))
    glass = Image.new("RGBA", (128, 96))
    glass.paste((0, 0, 200, 128), (40, 40, 120, 90))
    for name, layers in (("first", [background, disc, glass]), ("second", [disc, Image.new("RGBA", (128, 96)), glass])):
        (root / name).mkdir(parents=True)
        for number, layer in enumerate(layers):
            layer.save(root / name / f"layer_{number + 8}.png")  # 8, 9, 10: numbers, not names, give the order
        layers[0].save(root / name / "preview.png")
    (root / "third").mkdir()
    background.save(root / "third" / "0.png")
    background.resize((100, 96)).save(root / "third" / "1.png")
    return root


def test_designs_in_folders_of_numbered_layers_become_layered_samples(
    local_campaign: str, recipe: str, folder: Path, tmp_path: Path
) -> None:
    result = run(
        campaign=local_campaign, recipe=recipe, images=str(folder), designs=str(layered_folder(tmp_path / "designs"))
    )
    assert (result.metrics["designs"], result.metrics["rejects"]) == (2, 1)
    made = {json.loads(members["json"])["origin"]: members for _, members in check_designs(local_campaign, 2)}
    first = [decode_png(made["first"][f"layer{index}.png"]) for index in range(3)]
    assert tuple(first[0][0, 0]) == (250, 240, 200, 255)
    assert tuple(first[1][20, 20]) == (200, 30, 30, 255)
    assert tuple(first[2][40, 50]) == (0, 0, 200, 128)
    second = [decode_png(made["second"][f"layer{index}.png"]) for index in range(3)]
    assert (second[0] == 255).all()  # white below, since nothing else covers; the empty layer is gone
    assert tuple(second[1][20, 20]) == (200, 30, 30, 255)
    assert refused(local_campaign)["third"] == (
        "reject",
        "layer third/1.png is (100, 96), the first is (128, 96): give one size",
    )


def test_an_image_of_a_held_out_design_is_not_trained_on(
    local_campaign: str, recipe: str, folder: Path, tmp_path: Path
) -> None:
    root = layered_folder(tmp_path / "designs")
    flat = [Image.open(root / "first" / f"layer_{number}.png") for number in (8, 9, 10)]
    whole = Image.alpha_composite(Image.alpha_composite(flat[0], flat[1]), flat[2]).convert("RGB")
    whole.save(folder / "leak.jpg", quality=90)
    result = run(campaign=local_campaign, recipe=recipe, images=str(folder), designs=str(root))
    assert (result.metrics["designs"], result.metrics["duplicates"]) == (2, 1)
    assert refused(local_campaign)["leak.jpg"] == ("duplicate", "same image as first")


def test_a_benchmark_is_evaluated_on_and_never_trained_on(
    local_campaign: str,
    recipe: str,
    folder: Path,
    tmp_path: Path,
    encoded: Encoded,
    with_prompt: Callable[..., str],
) -> None:
    """Its own pictures, one of which lies among the images to train on as well."""
    (tmp_path / "b").mkdir()
    copied = sorted(folder.rglob("*.png"))[0].read_bytes()
    for name, data in {"0.png": copied, "1.png": encoded(901), "2.png": encoded(902)}.items():
        (tmp_path / "b" / name).write_bytes(data)
    (tmp_path / "list.txt").write_text("b/0.png\nb/1.png\nb/2.png\n")
    alone = run(campaign=with_prompt(f"{tmp_path}/alone", recipe), recipe=recipe, images=str(folder))
    given = {"recipe": recipe, "images": str(folder), "benchmark": str(tmp_path / "list.txt")}
    result = run(campaign=local_campaign, **given)
    assert result.metrics["benchmark"] == 3
    assert result.metrics["train"] + result.metrics["holdout"] == alone.metrics["train"] + alone.metrics["holdout"] - 1
    keys = {key for key, _ in samples(local_campaign, "benchmark")}
    assert not keys & {key for split in ("train", "holdout") for key, _ in samples(local_campaign, split)}
    campaign = Campaign.open(local_campaign)
    cases = read_cases(campaign, campaign.sources())
    assert {case.key for case in cases.of("pictures")} <= keys and cases.of("pictures")
    assert run(campaign=local_campaign, **given).manifests == result.manifests
    with pytest.raises(LayerloopError, match="benchmark is /other but the campaign's sources were made of"):
        run(campaign=local_campaign, benchmark="/other")


def test_designs_that_are_none_are_one_line(tmp_path: Path, recipe: str, folder: Path, encoded: Encoded) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "0.png").write_bytes(encoded(1))  # numbered, but in no subfolder of its own
    recipe = recipe.replace("/no/such/model", "tiny")
    with pytest.raises(
        LayerloopError, match=r"/d has no designs: give parquet in Crello's columns, or a folder with a sub"
    ):
        run(campaign=f"{tmp_path}/c", recipe=recipe, images=str(folder), designs=str(tmp_path / "d"))
    pq.write_table(pq.read_table(io.BytesIO(parquet_of({"image": [b"x"]}))), tmp_path / "t.parquet")
    with pytest.raises(
        LayerloopError, match=r"/t\.parquet lacks the columns id, length, canvas_width, .*: give parquet in"
    ):
        run(campaign=f"{tmp_path}/c", recipe=recipe, images=str(folder), designs=str(tmp_path / "t.parquet"))
    with pytest.raises(
        LayerloopError, match=r"^designs /nowhere does not exist: give parquet in Crello's columns, or a folder with"
    ):
        run(campaign=f"{tmp_path}/c", recipe=recipe, images=str(folder), designs="/nowhere")
    assert not (tmp_path / "c").exists()


def parquet_of(columns: dict[str, list[Any]]) -> bytes:
    import pyarrow as pa

    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------- doing it again


def test_a_second_run_returns_the_committed_sources_without_reading_anything(
    campaign_uri: str, recipe: str, folder: Path
) -> None:
    first = run(campaign=campaign_uri, recipe=recipe, images=str(folder))
    for path in folder.rglob("*.*"):
        path.write_bytes(b"?" * path.stat().st_size)  # unread, so of no matter
    assert run(campaign=campaign_uri, recipe=recipe, images=str(folder)) == first
    assert run(campaign=campaign_uri, recipe=recipe, images="") == first
    shutil.rmtree(folder)
    assert run(campaign=campaign_uri, recipe=recipe, images=str(folder)) == first


def test_other_images_than_the_campaigns_are_refused(
    local_campaign: str, recipe: str, folder: Path, tmp_path: Path
) -> None:
    run(campaign=local_campaign, recipe=recipe, images=str(folder))
    remedy = "leave it empty (`layerloop continue`) to go on with the committed sources, or start another campaign"
    with pytest.raises(LayerloopError) as caught:
        run(campaign=local_campaign, recipe=recipe, images=str(folder / "more"))
    assert str(caught.value) == f"images is {folder}/more but the campaign's sources were made of {folder}: {remedy}"
    with pytest.raises(LayerloopError) as caught:
        run(campaign=local_campaign, recipe=recipe, images="", designs=str(tmp_path))
    assert str(caught.value) == f"designs is {tmp_path} but the campaign's sources were made of none: {remedy}"
    (folder / "new.png").write_bytes(b"x")
    with pytest.raises(LayerloopError) as caught:
        run(campaign=local_campaign, recipe=recipe, images=str(folder))
    assert str(caught.value) == f"images {folder} has other files than when the campaign's sources were made: {remedy}"


def test_another_recipe_is_refused_before_anything_is_read(local_campaign: str, recipe: str, folder: Path) -> None:
    run(campaign=local_campaign, recipe=recipe, images=str(folder))
    with pytest.raises(LayerloopError, match=r"was made with another recipe \(data\.resolution: 64 -> 128\)"):
        run(campaign=local_campaign, recipe=recipe.replace("resolution: 64", "resolution: 128"), images="/nowhere")


def test_lost_shards_are_told_and_not_passed_on(local_campaign: str, recipe: str, folder: Path) -> None:
    run(campaign=local_campaign, recipe=recipe, images=str(folder))
    open_store(local_campaign).delete(named(open_store(local_campaign), "sources/train-000001.tar"))
    with pytest.raises(LayerloopError, match=r"train-000001-\w+\.tar is missing but a sources manifest names it"):
        run(campaign=local_campaign, recipe=recipe, images=str(folder))


def test_shards_of_an_interrupted_run_are_kept(campaign_uri: str, recipe: str, folder: Path) -> None:
    first = run(campaign=campaign_uri, recipe=recipe, images=str(folder)).manifests["sources"]
    store = open_store(campaign_uri)
    store.delete("sources/manifest.json")
    cut = named(store, "sources/train-000000.tar")
    store.write(cut, store.read(cut)[:-3000])
    assert run(campaign=campaign_uri, recipe=recipe, images=str(folder)).manifests["sources"] == first


def test_a_killed_run_leaves_nothing_committed_and_the_next_one_finishes(
    tmp_path: Path, recipe: str, encoded: Encoded, with_prompt: Callable[..., str]
) -> None:
    (tmp_path / "pictures").mkdir()
    for seed in range(60):
        (tmp_path / "pictures" / f"{seed}.png").write_bytes(encoded(seed))
    recipe = recipe.replace("images_per_shard: 3", "images_per_shard: 1")
    (tmp_path / "recipe.yaml").write_text(recipe)
    flags = ["--recipe", str(tmp_path / "recipe.yaml"), "--images", str(tmp_path / "pictures")]
    command = [sys.executable, "-m", "layerloop.components.shard_dataset", *flags, "--campaign"]
    clean, killed = with_prompt(f"{tmp_path}/clean", recipe), with_prompt(f"{tmp_path}/killed", recipe)
    subprocess.run([*command, clean], check=True, capture_output=True)

    shards = tmp_path / "killed" / "sources"
    with subprocess.Popen([*command, killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(shards.glob("train-*.tar"))) < 5:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert 5 <= len(list(shards.glob("train-*.tar"))) < 58, "it was not killed in the middle"
    assert Campaign.open(killed).find("sources") is None

    subprocess.run([*command, killed], check=True, capture_output=True)
    assert Campaign.open(killed).sources() == Campaign.open(clean).sources()
    assert len(samples(killed, "train")) == 58


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("", "images is empty and {campaign} has no sources yet: give a folder of images"),
        ("{tmp}/nowhere", f"images {{tmp}}/nowhere does not exist: {REMEDY}"),
        ("{tmp}/hollow", f"images {{tmp}}/hollow is empty: {REMEDY}"),
        ("{tmp}/text.png", "1 of 1 image is rejected, over recipe.data.max_reject_fraction 0.5: correct the input; "
         f"the first is text.png: image starts with b'text', not a known format: give a {KINDS}"),
        ("{tmp}", "campaign {campaign} lies inside images {tmp}: choose a folder outside"),
    ],
)  # fmt: skip
def test_bad_images_are_one_line_and_nothing_is_written(tmp_path: Path, recipe: str, images: str, message: str) -> None:
    (tmp_path / "hollow").mkdir()
    (tmp_path / "text.png").write_bytes(b"text")
    fields = {"tmp": tmp_path, "campaign": tmp_path / "c"}
    with pytest.raises(LayerloopError) as caught:
        run(campaign=f"{tmp_path}/c", recipe=recipe.replace("/no/such/model", "tiny"), images=images.format(**fields))
    assert str(caught.value) == message.format(**fields)
    assert _all_but_rejects(tmp_path / "c") == []


def _all_but_rejects(campaign: Path) -> list[Path]:
    """Files of a campaign that was refused: the table of what was left out is what it is mended by."""
    return [path for path in campaign.rglob("*") if path.is_file() and path.name != "rejects.parquet"]


def test_nothing_left_to_train_on_is_one_line(tmp_path: Path, recipe: str) -> None:
    (tmp_path / "text.png").write_bytes(b"text")
    with pytest.raises(LayerloopError, match=r"text\.png has no image left to train on: give some that can be read"):
        run(
            campaign=f"{tmp_path}/c",
            recipe=recipe.replace("0.5", "1.0").replace("/no/such/model", "tiny"),
            images=str(tmp_path / "text.png"),
        )
    assert _all_but_rejects(tmp_path / "c") == []


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("", "recipe is empty and {tmp}/c has none yet: name one of demo, paper, paper-exact, tiny, or give a "),
        ("{tmp}/nowhere.yaml", "{tmp}/nowhere.yaml does not exist: was it moved or deleted, or is the URI misspelt?"),
        ("name: test\nroll: {}", "recipe.roll is not a known key: did you mean 'rollout'?"),
        ("name: [", "recipe is not YAML: "),
        ("{tmp}/list.yaml", "recipe is list, not a mapping: start from a file of pipelines/recipes"),
    ],
)
def test_bad_recipes_are_one_line(tmp_path: Path, folder: Path, recipe: str, message: str) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(LayerloopError) as caught:
        run(campaign=f"{tmp_path}/c", recipe=recipe.replace("{tmp}", str(tmp_path)), images=str(folder))
    assert str(caught.value).startswith(message.replace("{tmp}", str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_what_later_steps_would_not_get_of_a_recipe_is_refused(local_campaign: str, recipe: str, folder: Path) -> None:
    store = open_store(local_campaign)
    old = yaml.safe_dump(merged(yaml.safe_load(recipe), {"judge": {"concurrency": 64, "start_seconds": 0.0}}))
    with pytest.raises(LayerloopError) as caught:
        run(campaign=local_campaign, recipe=old, images=str(folder))
    assert str(caught.value) == (
        "recipe.judge.concurrency is 64: that says where and how fast to run, which is not kept in a recipe: take it "
        'out and give the parameter runtime {"judge": {"concurrency": 64, "start_seconds": 0.0}}'
    )
    assert Campaign.open(local_campaign).find("sources") is None
    run(campaign=local_campaign, recipe=old, images=str(folder), runtime='{"judge": {"concurrency": 64}}')
    assert store.read("recipe.json") == seal(parse_recipe(recipe).to_json()), "it is not kept"
    run(campaign=local_campaign, recipe=recipe, images=str(folder), runtime="judge: {concurrency: 3}")


def test_an_attention_that_no_step_could_use_is_refused_at_once(tmp_path: Path, folder: Path, base: Path) -> None:
    recipe = json.dumps({"name": "test", "model": {"base": str(base), "dtype": "float32"}})
    with pytest.raises(LayerloopError, match=r"^runtime\.model\.attention is 'flesh': choose one of"):
        run(campaign=f"{tmp_path}/c", recipe=recipe, images=str(folder), runtime="model: {attention: flesh}")
    assert not (tmp_path / "c").exists()


def test_a_recipe_is_text_or_a_path_or_a_uri(
    s3_bucket: str, tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = parse_recipe(recipe)
    (tmp_path / "r.yaml").write_text(recipe)
    open_store(s3_bucket).write("r.yaml", recipe.encode())
    monkeypatch.chdir(tmp_path)
    for given in (recipe, "r.yaml", f"{tmp_path}/r.yaml", f"file://{tmp_path}/r.yaml", f"{s3_bucket}/r.yaml"):
        assert read_recipe(given) == (expected, {})
    assert read_recipe("name: test")[0].name == "test"
    assert read_recipe(expected.to_json().decode()) == (expected, {})


def test_a_campaign_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, recipe: str, folder: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LayerloopError, match="/file/c cannot be written"):
        run(campaign=f"{tmp_path}/file/c", recipe=recipe, images=str(folder))
    with pytest.raises(LayerloopError, match="/file is a file, not a folder"):
        run(campaign=f"{tmp_path}/file", recipe=recipe, images=str(folder))


# ----------------------------------------------------------------------------------------------------------- the prompt


def test_the_prompt_is_embedded_once_by_the_recipes_model(
    tmp_path: Path, recipe: str, folder: Path, base: Path
) -> None:
    import torch
    from diffusers import QwenImageLayeredPipeline
    from safetensors.numpy import load

    text = recipe.replace("/no/such/model", str(base)) + "lora: {rank: 2}\n"
    run(campaign=f"{tmp_path}/c", recipe=text, images=str(folder))
    opened = Campaign.open(f"{tmp_path}/c")
    embeds = load(read_file(opened.store, opened.sources().file("prompt.safetensors")))
    pipeline = QwenImageLayeredPipeline.from_pretrained(base, processor=None, dtype=torch.float32)
    expected = pipeline.encode_prompt(parse_recipe(text).model.prompt)[0][0].detach()
    assert list(embeds) == ["prompt_embeds"]
    assert embeds["prompt_embeds"].dtype == np.float32
    assert np.array_equal(embeds["prompt_embeds"], expected.numpy())


def test_only_the_text_encoder_is_loaded_but_the_whole_base_must_be_there(
    tmp_path: Path, recipe: str, folder: Path, base: Path
) -> None:
    """41 GB of a full-size transformer are no business of this step; that they are missing is."""
    text = recipe.replace("/no/such/model", str(base))
    weights = base / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"cannot be loaded")
    run(campaign=f"{tmp_path}/c", recipe=text, images=str(folder))
    assert Campaign.open(f"{tmp_path}/c").find("sources") is not None
    weights.unlink()
    with pytest.raises(LayerloopError, match=r"base/transformer/diffusion_pytorch_model\.safetensors is missing"):
        run(campaign=f"{tmp_path}/d", recipe=text, images=str(folder))
    assert not (tmp_path / "d").exists()


def test_a_base_and_an_adapter_at_a_uri_are_checked_and_named_by_it(
    s3_bucket: str, tmp_path: Path, recipe: str, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERLOOP_CACHE", str(tmp_path / "cache"))
    store = open_store(f"{s3_bucket}/base")
    for path in base.rglob("*.*"):
        store.upload(path.relative_to(base).as_posix(), path)
    text = recipe.replace("/no/such/model", f"{s3_bucket}/base")
    with pytest.raises(LayerloopError) as caught:
        run(campaign=f"{tmp_path}/c", recipe=f"{text}lora: {{start_from: {s3_bucket}/none}}\n", images=str(folder))
    assert str(caught.value).startswith(f"recipe.lora.start_from is {s3_bucket}/none: {s3_bucket}/none has no objects")
    store.delete("tokenizer/tokenizer.json")
    with pytest.raises(LayerloopError) as caught:
        run(campaign=f"{tmp_path}/c", recipe=text, images=str(folder))
    assert str(caught.value).startswith(f"recipe.model.base is {s3_bucket}/base: /")
    assert "/tokenizer/tokenizer.json is missing, and so are" in str(caught.value)
    assert not (tmp_path / "c").exists()
    store.upload("tokenizer/tokenizer.json", base / "tokenizer/tokenizer.json")
    assert run(campaign=f"{tmp_path}/c", recipe=text, images=str(folder)).metrics["train"] == 5


# ------------------------------------------------------------------------------------------- a recipe that is mended


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"base": "/nope"}}, "recipe.model.base is '/nope': no such folder; give 'tiny', a folder"),
        (
            {"data": {"resolution": 64, "multiple": 8}},
            "recipe.data.multiple is 8 but {base} takes sides that are multiples of 16: choose 16 or a multiple of it",
        ),
        (
            {"lora": {"targets": ["to_k", "to_qq"]}},
            "recipe.lora.targets has 'to_qq', which is not a linear layer of the model: layers of a block are "
            "img_mod.1, attn.to_q, attn.to_k, attn.to_v,",
        ),
        (
            {"lora": {"targets": ["txt_mlp.net.2", "to_add_out"]}},
            "recipe.lora.targets is txt_mlp.net.2, to_add_out, which names only layers of {base} that cannot change "
            "its output (the text side of its last block): add one of img_mod.1, attn.to_q,",
        ),
        (
            {"lora": {"start_from": "/nope"}},
            "recipe.lora.start_from is /nope: folder /nope does not exist: correct the path",
        ),
    ],
    ids=["base", "multiple", "targets", "dead-targets", "start-from"],
)
def test_a_recipe_that_was_refused_can_be_mended_in_the_same_campaign(
    tmp_path: Path, folder: Path, base: Path, change: dict[str, dict[str, Any]], message: str
) -> None:
    good = {"name": "test", "model": {"base": str(base), "dtype": "float32"}, "data": {"resolution": 64}}
    bad = good | {section: good.get(section, {}) | fields for section, fields in change.items()}  # type: ignore[operator]
    with pytest.raises(LayerloopError) as caught:
        run(campaign=f"{tmp_path}/c", recipe=json.dumps(bad), images=str(folder))
    assert str(caught.value).startswith(message.format(base=base))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()
    run(campaign=f"{tmp_path}/c", recipe=json.dumps(good), images=str(folder))
    assert Campaign.open(f"{tmp_path}/c").recipe == parse_recipe(json.dumps(good))
    assert Campaign.open(f"{tmp_path}/c").find("sources") is not None


def test_a_rubric_that_is_not_there_is_refused_before_the_recipe_is_frozen(tmp_path: Path, folder: Path) -> None:
    """The judge's step would say so after hours of sampling, of a recipe that can no longer be changed."""
    asked = {"name": "test", "judge": {"rubric": "/nope/mine.yaml"}}
    with pytest.raises(LayerloopError, match=r"^recipe\.judge\.rubric is /nope/mine\.yaml: that file does not exist; "):
        run(campaign=f"{tmp_path}/c", recipe=json.dumps(asked), images=str(folder))
    assert not (tmp_path / "c").exists()


def test_a_campaign_that_froze_its_rubrics_path_goes_on_with_what_the_file_holds(tmp_path: Path, folder: Path) -> None:
    """Campaigns of earlier versions did; `layerloop run --recipe` now gives what the file holds."""
    path = tmp_path / "mine.yaml"
    shipped = (resources.files("layerloop.components.judge") / "rubrics" / "default.yaml").read_text()
    path.write_text(shipped.replace("name: default", "name: mine"))
    asked = {"name": "test", "data": {"resolution": 64}, "model": {"base": "tiny"}, "judge": {"rubric": str(path)}}
    run(campaign=f"{tmp_path}/c", recipe=json.dumps(asked), images=str(folder))
    asked["judge"] = {"rubric": file_content(str(path))}
    run(campaign=f"{tmp_path}/c", recipe=json.dumps(asked), images=str(folder))
    assert Campaign.open(f"{tmp_path}/c").recipe.judge.rubric == str(path)
    asked["judge"] = {"rubric": file_content(str(path)) | {"version": "2"}}
    with pytest.raises(LayerloopError, match=r"judge\.rubric: .*mine\.yaml' -> 'mine 2 \([0-9a-f]{12}\)'\): continue"):
        run(campaign=f"{tmp_path}/c", recipe=json.dumps(asked), images=str(folder))


def test_a_recipe_whose_prompt_could_not_be_embedded_can_be_mended_in_the_same_campaign(
    tmp_path: Path, recipe: str, folder: Path, base: Path
) -> None:
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    weights = broken / "text_encoder/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(LayerloopError, match=r"/broken/text_encoder cannot be loaded .*: fetch it again"):
        run(campaign=f"{tmp_path}/c", recipe=recipe.replace("/no/such/model", str(broken)), images=str(folder))
    assert not (tmp_path / "c").exists()
    run(campaign=f"{tmp_path}/c", recipe=recipe.replace("/no/such/model", str(base)), images=str(folder))
    assert Campaign.open(f"{tmp_path}/c").recipe.model.base == str(base)


def test_an_embedding_without_a_recipe_beside_it_is_not_believed(
    tmp_path: Path, recipe: str, folder: Path, base: Path
) -> None:
    """Someone deleted recipe.json to start again with another model; the rest of the first attempt is of no use."""
    text = recipe.replace("/no/such/model", str(base))
    run(campaign=f"{tmp_path}/clean", recipe=text, images=str(folder))
    open_store(f"{tmp_path}/c").write("sources/prompt.safetensors", b"of another model")
    run(campaign=f"{tmp_path}/c", recipe=text, images=str(folder))
    assert Campaign.open(f"{tmp_path}/c").sources() == Campaign.open(f"{tmp_path}/clean").sources()


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_runs_as_a_kubeflow_task(
    tmp_path: Path, recipe: str, folder: Path, with_prompt: Callable[..., str]
) -> None:
    def output(name: str) -> dict[str, Any]:
        return {"artifacts": [{"name": name, "uri": str(tmp_path / "out" / name), "metadata": {}, "type": {}}]}

    campaign = with_prompt(f"{tmp_path}/c")
    task = {
        "inputs": {"parameterValues": {"campaign": campaign, "recipe": recipe, "images": str(folder), "designs": ""}},
        "outputs": {
            "artifacts": {name: output(name) for name in ("sources", "policy", "metrics")},
            "outputFile": str(tmp_path / "out" / "executor_output.json"),
        },
    }
    command = [sys.executable, "-m", "layerloop.components.shard_dataset", "--executor-input", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out" / "executor_output.json").read_text())["artifacts"]
    assert told["policy"]["artifacts"][0]["metadata"]["iteration"] == 0
    assert told["sources"]["artifacts"][0]["metadata"]["train"] == 5
    assert told["metrics"]["artifacts"][0]["metadata"]["holdout"] == 2
    sources = Manifest.from_json((tmp_path / "out" / "sources").read_bytes(), where="sources")
    assert sources == Campaign.open(campaign).sources()


def test_the_command_says_bad_input_in_one_line_and_exits_with_2(tmp_path: Path, recipe: str) -> None:
    flags = ["--campaign", f"{tmp_path}/c", "--recipe", recipe, "--images", f"{tmp_path}/nowhere"]
    command = [sys.executable, "-m", "layerloop.components.shard_dataset", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0].startswith("started shard_dataset ")
    assert lines[1:] == [f"error: images {tmp_path}/nowhere does not exist: {REMEDY}"]
