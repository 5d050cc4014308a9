"""YAML is read without silent choices."""

from pathlib import Path

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import parse_recipe
from layerloop.components.schema.yaml_text import LONGEST, load_yaml, read_by_hand


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


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{', '.join([f'*{chr(97 + n)}'] * 9)}]}}\n" for n in range(12)
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "line"),
    [
        (BOMB, "file unfolds to over 1000000 characters by its aliases: write plain values"),
        (MERGES, "file unfolds to over 1000000 characters by its aliases: write plain values"),
        ("a: &a [*a]", "file has a value inside itself, or 100 levels: write plain keys and values"),
        ("a: &a {b: *a}", "file has a value inside itself, or 100 levels: write plain keys and values"),
        ("{a: " * 200 + "1" + "}" * 200, "file has a value inside itself, or 100 levels: write plain keys and values"),
        ("x" * 2_000_000, "file has 2000000 bytes, over 1000000: give settings, not data"),
        ("a: " + "1:" * 200_000 + "1", "file has a number of 400001 characters: put it in quotes if it is none"),
        ("a: " + "1:" * 190 + "1.5", "file is not YAML that can be read: write plain keys and values"),
        ("a: !!int ''", "file is not YAML that can be read: write plain keys and values"),
        ("a: !!bool maybe", "file is not YAML that can be read: write plain keys and values"),
    ],
    ids=[
        "aliases",
        "merges",
        "list in itself",
        "map in itself",
        "deep",
        "long",
        "sixties",
        "overflow",
        "int",
        "bool",
    ],
)
def test_a_few_bytes_do_not_become_gigabytes_or_hours(text: str, line: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        load_yaml(text, where="file")
    assert str(caught.value) == line


def test_a_wrong_value_is_shown_in_a_few_words_whatever_its_length() -> None:
    many = ", ".join(f"k{n}: 1" for n in range(500))
    for text in (f"seed: {'x' * 400_000}", f"seed: [{'1, ' * 100_000}]", f"rollout: {{{many}}}", f"{'k' * 90_000}: 1"):
        with pytest.raises(LayerloopError) as caught:
            parse_recipe(f"name: mine\n{text}\n")
        assert len(str(caught.value)) < 8000 and "\n" not in str(caught.value)


def test_a_file_that_people_write_is_read_whole_in_utf_8_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes("\ufeffname: é\r\n".encode())
    assert load_yaml(read_by_hand(file), where="file") == {"name": "é"}
    for other in (file, Path("/dev/zero")):
        file.write_bytes(b"#" * (LONGEST + 1))
        with pytest.raises(LayerloopError, match=rf"^{other} has over \d+ bytes, so it is no file of settings"):
            read_by_hand(other)
