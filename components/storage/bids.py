"""Create-only writes in a store without conditional writes: a creator bids, waits, and the lowest bid puts the object.

Two can put only where the first takes longer than the wait between looking and putting.
"""

from __future__ import annotations

import contextlib
import secrets
import time

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.store import Store

BID = ".bid-"  # part of the names of bids
BID_SECONDS = 1.0  # from a bid to looking at all of them
BID_EXPIRES = 60.0  # seconds after which a bidder counts as dead


def create_by_bid(store: Store, name: str, data: bytes) -> bool:
    """Create where the store has no conditional writes: of those who bid at once the lowest bid puts the object.

    A bid that is older than a minute by the store's clock is of a creator that died.
    """
    if store.exists(name):
        return False
    bid = f"{name}{BID}{secrets.token_hex(8)}"
    store.write(bid, data)
    try:
        while True:
            time.sleep(BID_SECONDS)
            bids = store.entries(f"{name}{BID}")
            if store.exists(name):
                return False
            if bid not in bids:  # removed as a leftover
                store.write(bid, data)
                continue
            alive = [n for n, entry in bids.items() if bids[bid].modified - entry.modified < BID_EXPIRES]
            if min(alive) == bid:
                store.write(name, data)
                return store.read(name) == data
    finally:
        with contextlib.suppress(LayerloopError):
            store.delete(bid)
