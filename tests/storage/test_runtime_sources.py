"""Where a runtime comes from: the parameter, the environment, an old recipe.json, the defaults; and that nothing of it
is the campaign's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.runtime import TINY, Runtime, flat, merged
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.runtime import VARIABLE, read_runtime, runtime_values
from layerloop.components.storage.stores import open_store

RECIPE = Recipe(name="test")
OTHER: dict[str, Any] = {  # another value of every key
    "model.attention": "_native_math", "model.compile": True, "model.gradient_checkpointing": False, "model.fsdp": True,
    "rollout.batch_size": 3, "update.microbatch": 5, "evaluation.batch_size": 7,
    "judge.concurrency": 9, "judge.timeout_seconds": 33.0, "judge.timeout_factor": 2.5, "judge.retries": 6,
    "judge.start_seconds": 8.0, "judge.give_up_seconds": 44.0, "judge.price.input": 2.0,
    "judge.price.cached_input": 0.5, "judge.price.output": 10.0, "judge.batch.enabled": True,
    "judge.batch.poll_seconds": 3.0, "judge.batch.max_hours": 2.0, "judge.batch.linger_seconds": 1.0,
    "judge.batch.max_requests": 100, "judge.batch.max_megabytes": 20,
}  # fmt: skip


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def old_recipe_json(recipe: Recipe, values: dict[str, Any]) -> bytes:
    """recipe.json as it was written when recipes held these values."""
    whole = recipe.model_dump(mode="json")
    del whole["judge"]["redraws"]  # which was `retries` then
    for key, value in values.items():
        whole = merged(whole, nested(key.replace("timeout_factor", "impatience"), value))
    return (json.dumps(whole, sort_keys=True, indent=2) + "\n").encode()


def test_every_key_may_differ_between_two_runs_of_a_campaign(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, RECIPE)
    frozen = campaign.store.read("recipe.json")
    assert frozen == RECIPE.to_json() and not set(flat(json.loads(frozen))) & set(OTHER)
    assert set(OTHER) == set(flat(Runtime().model_dump())), "every key is tried"
    for key, value in OTHER.items():
        default = flat(campaign.runtime.model_dump())[key]
        assert value != default
        for reopened in (
            Campaign.open(store_uri, nested(key, value)),
            Campaign.create_or_open(store_uri, RECIPE, json.dumps(nested(key, value))),
        ):
            assert flat(reopened.runtime.model_dump()) == flat(Runtime().model_dump()) | {key: value}
            assert reopened.recipe == RECIPE
    assert campaign.store.read("recipe.json") == frozen


def test_an_old_campaign_keeps_its_runtime_and_its_recipe_is_not_another_one(store_uri: str) -> None:
    recipe = Recipe.model_validate({"name": "test", "judge": {"redraws": OTHER["judge.retries"]}})
    store = open_store(store_uri)
    data = old_recipe_json(recipe, OTHER)
    store.write("recipe.json", data)
    opened = Campaign.open(store_uri)
    assert flat(opened.runtime.model_dump()) == OTHER
    assert opened.recipe == recipe
    again = Campaign.create_or_open(store_uri, recipe, "judge: {concurrency: 64}")
    assert flat(again.runtime.model_dump()) == OTHER | {"judge.concurrency": 64}
    assert store.read("recipe.json") == data, "an old campaign's file stays as it is"
    with pytest.raises(LayerloopError, match=r"made with another recipe \(judge.redraws: 6 -> 4\): "):
        Campaign.create_or_open(store_uri, RECIPE)


def test_a_bad_value_in_an_old_recipe_is_named_with_its_file(store_uri: str) -> None:
    open_store(store_uri).write("recipe.json", old_recipe_json(RECIPE, {"judge.concurrency": 0}))
    with pytest.raises(LayerloopError) as caught:
        Campaign.open(store_uri)
    assert str(caught.value).startswith(f"{store_uri}/recipe.json.judge.concurrency is 0: input should be greater")


def test_sources_go_over_each_other_value_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {"judge": {"concurrency": 1, "retries": 1, "start_seconds": 1.0, "price": {"input": 1.0, "output": 1.0}}}
    monkeypatch.setenv(VARIABLE, '{"judge": {"concurrency": 2, "retries": 2, "price": {"input": 2}}}')
    judge = read_runtime("judge: {concurrency: 3}", RECIPE, stored=stored).judge
    assert (judge.concurrency, judge.retries, judge.start_seconds) == (3, 2, 1.0)
    assert (judge.price.input, judge.price.output, judge.price.cached_input) == (2.0, 1.0, None)
    assert judge.give_up_seconds == Runtime().judge.give_up_seconds


def test_the_tiny_base_has_defaults_of_its_own_below_all_else() -> None:
    tiny = Recipe.model_validate({"name": "test", "model": {"base": "tiny"}})
    assert read_runtime("", tiny) == Runtime.model_validate(TINY)
    assert read_runtime("", RECIPE) == Runtime()
    assert read_runtime("", tiny, stored={"update": {"microbatch": 3}}).update.microbatch == 3


def test_it_is_text_or_a_mapping_or_a_file_anywhere(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, values = "judge:\n  concurrency: 5\n", {"judge": {"concurrency": 5}}
    (tmp_path / "r.yaml").write_text(text)
    open_store(s3_bucket).write("r.yaml", text.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (
        text, json.dumps(values), values, {"judge": {"concurrency": 5.0}}, "r.yaml", f" {tmp_path}/r.yaml\n",
        "~/r.yaml", f"file://{tmp_path}/r.yaml", f"{s3_bucket}/r.yaml",
    ):  # fmt: skip
        assert runtime_values(given) == values, given
    for nothing in ("", " \n", {}, "{}", "# all\n# defaults\n"):
        assert runtime_values(nothing) == {}
    monkeypatch.setenv(VARIABLE, str(tmp_path / "r.yaml"))
    assert read_runtime("", RECIPE).judge.concurrency == 5


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("nowhere.yaml", "runtime is nowhere.yaml, which cannot be read ("),
        ("judge: [", "runtime is not YAML: "),
        ("- judge: 3", "runtime is [{'judge': 3}], not a mapping: write it as judge: {concurrency: 8}"),
        ("judge: {retries: -1}", "runtime.judge.retries is -1: input should be greater than or equal to 0"),
    ],
)
def test_a_bad_runtime_is_one_line(given: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LayerloopError) as caught:
        read_runtime(given, RECIPE)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setenv(VARIABLE, given)
    with pytest.raises(LayerloopError, match="^LAYERLOOP_RUNTIME"):
        read_runtime("", RECIPE)


def test_a_base_is_made_smaller_in_one_way_only() -> None:
    recipe = Recipe.model_validate({"name": "test", "model": {"fp8_base": True}})
    with pytest.raises(LayerloopError) as caught:
        read_runtime({"model": {"fsdp": True}}, recipe)
    assert str(caught.value) == (
        "runtime.model.fsdp is true and so is recipe.model.fp8_base: set fsdp to false, either makes the base smaller"
    )
