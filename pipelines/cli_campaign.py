"""The commands of `layerloop campaign`: look at campaigns, verify them, remove what is done with, read samples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from layerloop.components.schema.messages import counted
from layerloop.pipelines.cli_parser import command

GC_EXAMPLES = """examples:
  layerloop campaign gc campaigns/mine                          what the recipe's retention would remove
  layerloop campaign gc campaigns/mine --trajectories 2 --policies 10 --delete

Nothing is removed without --delete. Scores and manifests stay, and a record of what went, so `campaign verify` misses
nothing; so do the last two policies, and those that were evaluated or published.
"""


def add_campaign_commands(commands: Any) -> Any:
    """Add them to the command line; the subparsers of `layerloop campaign`, for more of its commands."""
    what = "look into campaigns, compare, verify, thin out, copy, delete"
    campaign = commands.add_parser("campaign", help=what).add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    show = command(campaign, "show", _show, "head, iterations, rewards and sizes as a table")
    list_ = command(campaign, "list", _list, "the campaigns in a folder, a row each")
    list_.add_argument("uri", metavar="URI", help="folder or s3://bucket/prefix that holds campaigns")
    compare = command(campaign, "compare", _compare_campaigns, "two campaigns: recipes, iterations, evaluations")
    compare.add_argument("one", metavar="A", help="a campaign")
    compare.add_argument("other", metavar="B", help="another")
    verify = command(
        campaign,
        "verify",
        _verify,
        "read, hash and compare everything that is committed; status 1 where something is wrong",
    )
    verify.add_argument(
        "--repair",
        action="store_true",
        help="remove what no manifest names, and let the next run make again what it can; paid replies are kept",
    )
    _add_removing_and_reading(campaign)
    lease = command(campaign, "lease", _lease, "who writes the campaign now, and since when")
    lease.add_argument("--take-over", action="store_true", help="free it: its holder will not come back")
    delete = command(campaign, "delete", _delete, "delete a campaign, for good; other files in its folder are kept")
    delete.add_argument("--yes", action="store_true", help="delete it: without this nothing is")
    for parser in (show, verify, lease, delete):
        parser.add_argument("uri", metavar="URI", help="folder or s3://bucket/prefix")
    return campaign


def _add_removing_and_reading(campaign: Any) -> None:
    gc = command(
        campaign, "gc", _gc, "remove what past iterations no longer need; says what, without --delete", GC_EXAMPLES
    )
    gc.add_argument("uri", metavar="URI", help="folder or s3://bucket/prefix")
    for name, what in (
        ("trajectories", "keep the rollouts of the last N iterations"),
        ("policies", "keep every N-th policy"),
        ("replies", "keep the judge's replies of the last N iterations"),
    ):
        gc.add_argument(f"--{name}", type=int, default=None, metavar="N", help=f"{what} (default: the recipe's)")
    gc.add_argument("--delete", action="store_true", help="remove it")
    index = command(
        campaign, "index", _index, "write index.parquet beside the shards of every step: where each sample is"
    )
    index.add_argument("uri", metavar="URI", help="folder or s3://bucket/prefix")
    extract = command(campaign, "extract", _extract, "write the files of one sample, without the rest of its shard")
    extract.add_argument("uri", metavar="URI", help="folder or s3://bucket/prefix")
    extract.add_argument("key", metavar="KEY", help="i000007-g000003-c05, i000007-g000003, or a source image's key")
    extract.add_argument("-o", "--output", default=".", metavar="DIR", help="where to (default: here)")
    export = command(campaign, "export", _export, "copy it as a folder that explains itself; again: continue")
    export.add_argument("uri", metavar="URI", help="folder or s3://bucket/prefix")
    export.add_argument("folder", metavar="DIR", help="an empty folder, or a URI")
    take = command(campaign, "import", _import, "make a campaign of an export, to be continued")
    take.add_argument("folder", metavar="DIR", help="the export")
    take.add_argument("uri", metavar="URI", help="folder or s3://bucket/prefix that is empty")


def _show(arguments: argparse.Namespace) -> None:
    from layerloop.pipelines.show import campaign_text

    print(campaign_text(arguments.uri))


def _list(arguments: argparse.Namespace) -> None:
    from layerloop.pipelines.campaigns import list_text

    print(list_text(arguments.uri))


def _compare_campaigns(arguments: argparse.Namespace) -> None:
    from layerloop.pipelines.campaigns import compare_text

    print(compare_text(arguments.one, arguments.other))


def _delete(arguments: argparse.Namespace) -> None:
    from layerloop.pipelines.campaigns import delete_campaign

    delete_campaign(arguments.uri, yes=arguments.yes, log=print)


def _verify(arguments: argparse.Namespace) -> int:
    from layerloop.components.runtime.progress import log
    from layerloop.components.storage.campaign import Campaign
    from layerloop.components.storage.verification import repair_campaign, verify_campaign

    campaign = Campaign.open(arguments.uri)
    found = verify_campaign(campaign, log=log)
    if arguments.repair:
        repair_campaign(campaign, log=log)
        found = verify_campaign(campaign, log=log)
    print("\n".join(found.lines()))
    return 0 if found.sound else 1


def _lease(arguments: argparse.Namespace) -> None:
    from layerloop.components.storage.campaign import Campaign
    from layerloop.components.storage.lease import SCOPES, held_by, holder, take_over

    store = Campaign.open(arguments.uri).store
    for scope in SCOPES:
        held = take_over(store, scope) if arguments.take_over else holder(store, scope)
        if held is None or held.alive is None:
            print(f"{scope} of {store.uri} is free")
        else:
            print(
                held_by(held, scope, store.uri) + ("; it was taken over and is free now" if arguments.take_over else "")
            )


def _gc(arguments: argparse.Namespace) -> None:
    from layerloop.components.runtime.progress import log
    from layerloop.components.schema.recipe import RetentionRecipe
    from layerloop.components.schema.record import validate
    from layerloop.components.storage.campaign import Campaign
    from layerloop.components.storage.retention import collect_garbage, garbage

    campaign = Campaign.open(arguments.uri)
    given = {name: getattr(arguments, name) for name in RetentionRecipe.model_fields}
    values = campaign.recipe.retention.model_dump() | {name: n for name, n in given.items() if n is not None}
    keep = validate(RetentionRecipe, values, where="retention")
    if unfinished := len(campaign.store.leftovers()):
        print(f"{unfinished} unfinished writes and uploads, of processes that were killed or work now")
    found = collect_garbage(campaign, keep, log=log) if arguments.delete else garbage(campaign, keep)
    for expired in found:
        if expired.objects:
            print(f"{expired.folder}: {counted(len(expired.objects), 'objects')}, {expired.bytes / 1e6:.1f} MB")
    total = f"{sum(len(e.objects) for e in found)} objects, {sum(e.bytes for e in found) / 1e6:.1f} MB"
    print(f"removed {total}" if arguments.delete else f"{total} could go: nothing was removed, --delete does")


def _index(arguments: argparse.Namespace) -> None:
    from layerloop.components.storage.campaign import Campaign
    from layerloop.components.storage.index import write_indices

    for name, samples in write_indices(Campaign.open(arguments.uri)):
        print(f"{name}: {counted(samples, 'samples')}")


def _extract(arguments: argparse.Namespace) -> None:
    from layerloop.components.storage.campaign import Campaign
    from layerloop.components.storage.index import extract

    files = extract(Campaign.open(arguments.uri), arguments.key)
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
        print(folder / name)


def _export(arguments: argparse.Namespace) -> None:
    from layerloop.components.runtime.progress import log
    from layerloop.components.storage.campaign import Campaign
    from layerloop.components.storage.transfer import export_campaign

    export_campaign(Campaign.open(arguments.uri), arguments.folder, log=log)


def _import(arguments: argparse.Namespace) -> None:
    from layerloop.components.runtime.progress import log
    from layerloop.components.storage.transfer import import_campaign

    import_campaign(arguments.folder, arguments.uri, log=log)
