"""A campaign of two iterations through all steps is the stored one: manifests, records, the numbers of its report."""

from __future__ import annotations

from typing import Any

import pytest

from layerloop.components.storage.campaign import Campaign

from . import replay
from .conftest import Held

# Other kernels and another order of sums (as in test_curves.py) moved no value by more than 2e-4 of it, and that one is
# a p value, which multiplies.
NEAR = 5e-3


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LAYERLOOP_RUNTIME", raising=False)
        return replay.make_campaign(tmp_path_factory.mktemp("replay"))


def test_two_iterations_leave_the_stored_values(campaign: Campaign, held_against: Held) -> None:
    held_against("replay", replay.values(campaign), lambda a, b: replay.differences(a, b, near=NEAR))


def test_on_a_machine_that_calculates_alike_they_leave_the_same_bytes(campaign: Campaign, held_against: Held) -> None:
    found = {"machine": replay.machine(), "objects": replay.objects(campaign)}

    def changed(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
        if stored["machine"] != now["machine"]:
            pytest.skip(f"stored on another machine ({stored['machine']}): `make golden` before a change and after it")
        return replay.differences(stored["objects"], now["objects"], near=0.0)

    held_against("objects", found, changed)
