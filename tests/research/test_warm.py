"""The warm process answers every request with a line, and outlives a failing one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def ask(*requests: str) -> list[dict[str, object]]:
    process = subprocess.run(
        [sys.executable, "-m", "layerloop.components.research.warm"],
        input="".join(f"{request}\n" for request in requests),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_a_failing_step_is_one_line_of_error_and_the_next_request_is_still_answered(tmp_path: Path) -> None:
    request = json.dumps({"verb": "score_rollouts", "arguments": {"campaign": str(tmp_path / "none")}})
    answers = ask(request, request)
    assert len(answers) == 2
    for answer in answers:
        assert answer["status"] == 2
        assert "has no recipe.json" in str(answer["error"])


def test_requests_that_are_none_are_refused() -> None:
    answers = ask("not json", "[]", '{"verb": 3}', '{"verb": "../../etc"}', '{"verb": "no_such_verb"}', "")
    assert [answer["status"] for answer in answers] == [2, 2, 2, 2, 2]
    assert "step no_such_verb cannot be imported" in str(answers[-1]["error"])


def test_a_defect_keeps_its_name_and_status_1() -> None:
    (answer,) = ask('{"verb": "score_rollouts", "arguments": {"no_such_argument": 1}}')
    assert answer["status"] == 1
    assert "TypeError" in str(answer["error"])
