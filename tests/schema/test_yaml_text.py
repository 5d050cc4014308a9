"""YAML is read without silent choices."""

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import parse_recipe
from layerloop.components.schema.yaml_text import load_yaml


def test_what_is_written_is_read() -> None:
    assert load_yaml("a: &x {b: 1}\nc: {<<: *x, b: 2}\n", where="file") == {"a": {"b": 1}, "c": {"b": 2}}
    merged_twice = "b: &b {k: 2}\no: {a: &x {<<: *b, k: 1}}\nc: {<<: *x}\n"
    assert load_yaml(merged_twice, where="file") == {"b": {"k": 2}, "o": {"a": {"k": 1}}, "c": {"k": 1}}
    assert load_yaml(b'{"a": [1, 2.5, "x"]}', where="file") == {"a": [1, 2.5, "x"]}
    assert load_yaml("", where="file") is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3", "file x has the key a twice (line 3): keep one of them"),
        ("- {b: 1, b: 2}", "file x has the key b twice (line 1): keep one of them"),
        ("a: [", "file x is not YAML: while parsing"),
        (b"\xff\xfe\x00", "file x is not YAML: "),
        ("a: !!python/object:os.system x", "file x is not YAML: could not determine a constructor"),
        ("a: 2026-13-45", "file x is not YAML that can be read: write plain keys and values"),
        ("[" * 3000, "file x is not YAML that can be read: write plain keys and values"),
    ],
)
def test_what_is_doubtful_is_one_line(text: str | bytes, line: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        load_yaml(text, where="file x")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_gives_a_key_twice_is_refused() -> None:
    with pytest.raises(LayerloopError, match=r"recipe has the key seed twice \(line 3\): keep one of them"):
        parse_recipe("name: mine\nseed: 1\nseed: 2\n")
