"""Addresses as they may stand in a log, a table or an error: without the secrets that some carry."""

from __future__ import annotations

import re

_USER = re.compile(r"(?<=://)[^/\s?#]*@")  # user:password@
_QUERY = re.compile(r"\?[^\s?#]*=[^\s#]*")  # a signature, a token, a key; a glob's `?` has no `=` behind it
_FRAGMENT = re.compile(r"#[^\s]*=[^\s]*")


def without_secrets(address: str) -> str:
    """`https://user:password@host/a?key=...` as `https://...@host/a?...`; a path on this machine as it is."""
    if "://" not in address:
        return address
    return _FRAGMENT.sub("#...", _QUERY.sub("?...", _USER.sub("...@", address)))
