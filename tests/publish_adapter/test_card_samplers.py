"""What the card says of samplers, from a table as evaluate_adapter writes it."""

from __future__ import annotations

from typing import Any

import pytest

from layerloop.components.evaluate_adapter.samplers import sampler_table
from layerloop.components.publish_adapter.usage import euler_steps, programs, sampler_rows, sampler_verdict
from layerloop.components.schema.inference import COMPARED, REFERENCE, Inference
from layerloop.components.schema.recipe import Recipe


def table(*garbled: Inference, images: int = 12) -> dict[str, Any]:
    """All samplers agree but for those that garble the adapter's layers."""
    rows = {
        (setting, model): [
            {"bad_layers": (3.0 if model == "adapter" and setting in garbled else {"base": 1.0, "adapter": 0.5}[model])
             + 0.01 * (i % 3), "recomposition_error": 0.02}
            for i in range(images)
        ]
        for setting in COMPARED
        for model in ("base", "adapter")
    }  # fmt: skip
    return sampler_table(rows, seed=0)


EULER = [Inference(steps, "euler", 1.0) for steps in (10, 20, 30, 50)]


def test_the_programs_take_the_fewest_steps_of_eulers_method_that_are_safe() -> None:
    found = table(EULER[0], EULER[2])
    assert euler_steps(found) == 20 and "Euler's method with 20 steps, the fewest" in sampler_verdict(found)
    assert "**these are safe: Euler 20, Euler 50, Heun 25, Heun 50, Euler 10, guidance 4," in sampler_verdict(found)
    code = programs(Recipe(name="r"), steps=20)
    assert "num_inference_steps=20," in code["diffusers"] and "num_inference_steps=20," in code["peft"]


def test_a_card_says_where_no_sampler_of_diffusers_or_none_at_all_is_safe() -> None:
    assert euler_steps(table(*EULER)) is None
    assert "Euler's method, which is not among them: expect worse" in sampler_verdict(table(*EULER))
    assert "**no sampler is safe**" in sampler_verdict(table(*COMPARED))
    assert euler_steps(None) is None
    few = table(EULER[0], images=5)
    assert euler_steps(few) is None and "cannot be said from 5 images" in sampler_verdict(few)


def test_the_table_has_a_row_a_sampler_with_what_is_clear_in_bold() -> None:
    header, rows = sampler_rows(table(EULER[0]))
    assert header == ["sampler", "safe", "Bad layers ↓", "Recomposition error ↓"]
    assert rows[0] == ["Euler 10", "no", "1.01 → **3.01**", "0.02 → 0.02"]
    assert rows[COMPARED.index(REFERENCE)] == ["Heun 50", "yes", "1.01 → **0.51**", "0.02 → 0.02"]
    assert rows[-1][0] == "Heun 50, guidance 4" and len(rows) == 12


@pytest.mark.parametrize("column", ["layer_l1", "bad_layers"])
def test_a_measure_that_is_undefined_everywhere_has_no_column(column: str) -> None:
    assert (column in table()["settings"][0]["measures"]) == (column == "bad_layers")
