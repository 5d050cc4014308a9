"""Samples are read alone, and a campaign without layerloop: index, extract, export and import."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.index import INDEX, extract, write_indices
from layerloop.components.storage.local import LocalStore
from layerloop.components.storage.retention import apply_retention
from layerloop.components.storage.s3 import PROBE
from layerloop.components.storage.shards import read_shard
from layerloop.components.storage.stores import open_store
from layerloop.components.storage.transfer import export_campaign, import_campaign
from layerloop.components.storage.verification import verify_campaign
from layerloop.pipelines.cli import main

from .test_retention import fill, quiet

KEY = "i000001-g000001-c01"


@pytest.mark.parametrize("indexed", [False, True])
def test_a_sample_is_what_the_whole_shard_says(store_uri: str, indexed: bool) -> None:
    campaign = fill(store_uri, 2).campaign
    if indexed:
        assert (f"iterations/000001/rollouts/{INDEX}", 2 * 3) in list(write_indices(campaign))
    shard = campaign.rollouts(1)[1].shards[0]
    wanted = {f"{KEY}.{suffix}": data for suffix, data in dict(read_shard(campaign.store, shard))[KEY].items()}
    (score,) = (m["json"] for s in campaign.scores(1).shards for k, m in read_shard(campaign.store, s) if k == KEY)
    assert extract(campaign, KEY) == wanted | {f"{KEY}.score.json": score}
    assert verify_campaign(campaign, log=quiet).orphans == {}


def test_with_an_index_one_range_is_read_and_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = fill(str(tmp_path / "c"), 1).campaign
    list(write_indices(campaign))
    ranges: list[str] = []
    plain = LocalStore.read_range

    def counted(self: LocalStore, name: str, offset: int, size: int) -> bytes:
        ranges.append(name)
        return plain(self, name, offset, size)

    monkeypatch.setattr(LocalStore, "read_range", counted)
    extract(campaign, "i000001-g000001")
    assert ranges == [campaign.rollouts(1)[1].shards[0].name]


def test_a_range_is_a_tar_for_any_reader(tmp_path: Path) -> None:
    import pyarrow.parquet

    lab = fill(str(tmp_path / "c"), 1)
    list(write_indices(lab.campaign))
    rows = pyarrow.parquet.read_table(Path(lab.uri) / "iterations/000001/rollouts" / INDEX).to_pylist()
    (row,) = (row for row in rows if row["key"] == KEY)
    data = (Path(lab.uri) / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["length"]]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {name.partition(".")[0] for name in tar.getnames()} == {KEY}
        assert f"{KEY}.trajectory.safetensors" in tar.getnames()


def test_an_index_of_other_shards_is_passed_over_and_a_wrong_place_is_refused(tmp_path: Path) -> None:
    lab, other = fill(str(tmp_path / "c"), 1), fill(str(tmp_path / "other"), 2)
    list(write_indices(other.campaign))
    name = f"iterations/000001/rollouts/{INDEX}"
    lab.store.write(name, other.store.read(f"iterations/000002/rollouts/{INDEX}"))
    before = extract(lab.campaign, KEY)
    lab.store.write(name, b"no parquet")
    assert extract(lab.campaign, KEY) == before
    import pyarrow
    import pyarrow.parquet

    shard = lab.campaign.rollouts(1)[1].shards[0].name
    table = pyarrow.table({"shard": [shard], "key": [KEY], "offset": [0], "length": [5120]})
    pyarrow.parquet.write_table(table, Path(lab.uri) / name)
    with pytest.raises(LayerloopError, match=f"does not hold {KEY} at byte 0|not a complete tar"):
        extract(lab.campaign, KEY)


def test_what_there_is_not_and_what_was_removed_is_said(tmp_path: Path) -> None:
    campaign = fill(str(tmp_path / "c"), 3, trajectories=1).campaign
    with pytest.raises(LayerloopError, match="has no sample i000001-g000007: give the key of"):
        extract(campaign, "i000001-g000007")
    apply_retention(campaign, log=quiet)
    with pytest.raises(LayerloopError, match="was removed by the campaign's retention"):
        extract(campaign, KEY)


def test_the_command_writes_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = fill(str(tmp_path / "c"), 1)
    assert main(["campaign", "index", lab.uri]) == 0
    assert main(["campaign", "extract", lab.uri, KEY, "-o", str(tmp_path / "out")]) == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert written == extract(lab.campaign, KEY) and f"{KEY}.layer0.png" in written
    assert f"{KEY}.json" in capsys.readouterr().out


def objects(campaign: Campaign) -> dict[str, bytes]:
    return {n: campaign.store.read(n) for n in campaign.store.list() if not n.startswith("lease/")}


def test_an_export_comes_back_as_the_campaign_it_was(store_uri: str, tmp_path: Path) -> None:
    campaign = fill(store_uri, 3, trajectories=1).campaign
    apply_retention(campaign, log=quiet)
    campaign.store.write(f"{campaign.rollouts_dir(1)}/g000000-{'0' * 16}.tar", b"named by nobody")
    folder = str(tmp_path / "export")
    export_campaign(campaign, folder, log=quiet)
    export_campaign(campaign, folder, log=quiet)  # again changes nothing
    exported = Campaign.open(folder)
    assert verify_campaign(exported, log=quiet).sound
    assert "recipe.json" in exported.store.read("README.md").decode()
    import_campaign(folder, str(tmp_path / "back"), log=quiet)
    wanted = {name: data for name, data in objects(campaign).items() if not name.endswith(f"-{'0' * 16}.tar")}
    assert objects(Campaign.open(str(tmp_path / "back"))) == wanted
    assert objects(exported).keys() - wanted.keys() == {"README.md"} | {
        name for name in exported.store.list() if name.endswith(INDEX)
    }


def test_a_damaged_object_is_not_exported(tmp_path: Path) -> None:
    lab = fill(str(tmp_path / "c"), 1)
    name = lab.campaign.rollouts(1)[0].shards[0].name
    data = bytearray(lab.store.read(name))
    data[700] ^= 1
    lab.store.write(name, bytes(data))
    with pytest.raises(LayerloopError, match="its manifest says"):
        export_campaign(lab.campaign, str(tmp_path / "export"), log=quiet)
    with pytest.raises(LayerloopError, match="it is not an export, or one that was interrupted"):
        import_campaign(str(tmp_path / "export"), str(tmp_path / "back"), log=quiet)


def test_an_export_that_was_interrupted_is_not_imported(tmp_path: Path) -> None:
    lab = fill(str(tmp_path / "c"), 1)
    with pytest.raises(LayerloopError, match="it is not an export, or one that was interrupted"):
        import_campaign(lab.uri, str(tmp_path / "back"), log=quiet)


def test_an_export_that_was_killed_at_its_first_request_or_while_it_wrote_goes_on(
    store_uri: str, tmp_path: Path
) -> None:
    campaign = fill(str(tmp_path / "c"), 1).campaign
    command = [
        sys.executable,
        "-c",
        "from layerloop.components.storage.owners import *; print(owned_name('.tmp-a.tar'))",
    ]
    half = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.strip()  # of a process that is gone
    target = open_store(store_uri)
    target.write(f"{PROBE}0123", b"")
    if isinstance(target, LocalStore):
        (target.root / half).write_bytes(b"half")
    with pytest.raises(LayerloopError, match="it is not an export, or one that was interrupted, export again"):
        import_campaign(store_uri, str(tmp_path / "back"), log=quiet)
    export_campaign(campaign, store_uri, log=quiet)
    found = verify_campaign(Campaign.open(store_uri), log=quiet)
    assert found.sound and not [name for name in found.leftovers if PROBE not in name]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    lab, other = fill(str(tmp_path / "c"), 1), fill(str(tmp_path / "other"), 1, trajectories=1)
    with pytest.raises(LayerloopError, match="holds another campaign: give an empty folder"):
        export_campaign(lab.campaign, other.uri, log=quiet)
    with pytest.raises(LayerloopError, match="is the campaign itself"):
        export_campaign(lab.campaign, lab.uri, log=quiet)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"mine")
    with pytest.raises(LayerloopError, match=r"holds a\.png, which is not of this campaign"):
        export_campaign(lab.campaign, str(tmp_path / "photos"), log=quiet)


def test_a_store_reads_a_range_as_it_is(store_uri: str) -> None:
    store = open_store(store_uri)
    store.write("a", bytes(range(200)))
    assert store.read_range("a", 0, 3) == bytes([0, 1, 2]) and store.read_range("a", 150, 20) == bytes(range(150, 170))
    assert store.read_range("a", 190, 100) == bytes(range(190, 200)) and store.read_range("a", 5, 0) == b""
    with pytest.raises(LayerloopError, match="does not exist"):
        store.read_range("b", 0, 1)
