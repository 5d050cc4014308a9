"""`layerloop publish`: publish a campaign's adapter, and where asked upload it to the Hugging Face hub in one commit.

The token is read from HF_TOKEN and given to huggingface_hub only. The repository gets the files of the publication's
manifest; the programs of the card name the repository.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from layerloop.components.publish_adapter.names import HUB_ID
from layerloop.components.publish_adapter.step import CARD, run
from layerloop.components.publish_adapter.usage import card_for_hub
from layerloop.components.runtime.environment import usable_environment
from layerloop.components.runtime.parser import OneLineParser
from layerloop.components.runtime.progress import log
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.manifests import read_file, visible_name


def upload(campaign: Campaign, name: str, repository: str, *, private: bool = False) -> str:
    """Upload the publication `name` to `repository`, made where it does not exist; returns the commit's address.

    Raises:
        LayerloopError: no such publication, a name that is none, no HF_TOKEN, or what the hub refuses.
    """
    token = token_for(repository)
    folder = campaign.published_dir(name)
    manifest = campaign.find(folder)
    if manifest is None:
        raise LayerloopError(f"{campaign.uri} has no publication {name}: it has {campaign.published() or 'none'}")
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = []
    for file in manifest.files:
        data = read_file(campaign.store, file)
        path = visible_name(folder, file).removeprefix(f"{folder}/")
        if path == CARD:
            data = card_for_hub(data.decode(), repository).encode()
        operations.append(CommitOperationAdd(path_in_repo=path, path_or_fileobj=data))
        log(f"{path}: {len(data):,} bytes")
    api = HfApi(token=token, library_name="layerloop")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done: Any = api.create_commit(repository, operations, commit_message=f"{name}, by layerloop")
    except Exception as error:  # the hub raises a dozen kinds
        reason = " ".join(str(error).split()).replace(token, "…")[:300] or type(error).__name__
        raise LayerloopError(
            f"the hub did not take {repository} ({reason}): check its name, and that HF_TOKEN may write there"
        ) from None
    return str(done.commit_url)


def token_for(repository: str) -> str:
    """The environment's token. Raises LayerloopError where there is none, or `repository` is not `owner/name`."""
    if not HUB_ID.fullmatch(repository):
        raise LayerloopError(f"--hub is {repository!r}: give owner/name, a repository of the hub")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise LayerloopError("HF_TOKEN is not set: put a token that may write to the hub into the environment")
    if any(not "!" <= letter <= "~" for letter in token):  # an error about it would quote it
        raise LayerloopError("HF_TOKEN has a blank, a line break or a letter that no token has: set it without")
    return token


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 and one line where publishing or the upload is refused."""
    parser = OneLineParser(prog="python -m layerloop.components.publish_adapter.hub", description=__doc__)
    parser.add_argument("campaign", metavar="CAMPAIGN", help="root URI of the campaign")
    parser.add_argument("--publish-as", default="", metavar="NAME", help="folder under published/")
    parser.add_argument("--iteration", type=int, metavar="N", help="whose adapter (default: the head)")
    parser.add_argument("--hub", default="", metavar="OWNER/NAME", help="upload to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="a repository that is made is private")
    arguments = parser.parse_args(argv)
    try:
        with usable_environment():
            _publish(arguments)
    except LayerloopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _publish(arguments: argparse.Namespace) -> None:
    if arguments.hub:
        token_for(arguments.hub)  # before the work
    done = run(campaign=arguments.campaign, publish_as=arguments.publish_as, iteration=arguments.iteration)
    print(done.parameters["published"])
    if arguments.hub:
        name = str(done.manifests["adapter"].metadata["name"])
        print(upload(Campaign.open(arguments.campaign), name, arguments.hub, private=arguments.private))


if __name__ == "__main__":
    raise SystemExit(main())
