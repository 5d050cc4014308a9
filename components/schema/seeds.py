"""Randomness by hashing, so that results do not depend on worker count, batch size or which pod died."""

from __future__ import annotations

import hashlib


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed from an ordered tuple, such as (campaign seed, iteration, image key, candidate, purpose).

    Parts are length-prefixed and typed before hashing with SHA-256, so ("1", 2) and (1, "2") or ("ab", "c") and
    ("a", "bc") never collide by concatenation.

    Returns:
        An int in [0, 2**63), accepted by `random.Random`, `numpy.random.default_rng` and `torch.Generator.manual_seed`.
    """
    digest = hashlib.sha256()
    for part in parts:
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(len(text).to_bytes(8, "big") + text)
    return int.from_bytes(digest.digest()[:8], "big") >> 1
