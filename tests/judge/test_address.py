"""Where the judge is."""

import pytest

from layerloop.components.judge.address import judge_address
from layerloop.components.schema.errors import LayerloopError


def test_what_is_given_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "https://theirs/v1")
    assert judge_address(" http://ours:8000/v1\n") == "http://ours:8000/v1"
    assert judge_address("  ") == "https://theirs/v1"


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://a/v1", "http://", "http:///v1", "http://a:x/v1", "http://a b/v1"]
)
def test_what_is_no_url_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(LayerloopError, match=r"^judge_url is '.*': give a base URL such as http://127.0.0.1:8788/v1$"):
        judge_address(url)
    with pytest.raises(LayerloopError, match="^judge_url is empty and OPENAI_BASE_URL is not set"):
        judge_address("")
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(LayerloopError, match="^OPENAI_BASE_URL is "):
        judge_address("")
