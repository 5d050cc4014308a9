"""What the warm Python runs ends, prints and is ended as in an interpreter of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm_python import warm

SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def run(python: str, *words: str, **environment: str) -> tuple[int, str, str]:
    """Exit status, output, and the last line of the errors."""
    done = subprocess.run([python, *words], capture_output=True, text=True, env=os.environ | environment)
    return done.returncode, done.stdout, (done.stderr.splitlines() or [""])[-1]


@pytest.mark.parametrize(
    "code",
    [
        "import sys; print(sys.argv, __name__); print(2, file=sys.stderr); sys.exit(3)",
        "import sys; sys.exit('a line')",
        "import os; print('said before', flush=True); os.kill(os.getpid(), 9)",
        "print('lost'); raise ValueError('crash')",
        "raise KeyboardInterrupt",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
        "import atexit; atexit.register(print, 'at the end')",
        "import os, sys; print(os.environ['GIVEN'], os.getcwd() == sys.path[0] or sys.path[0] == '')",
        "import sys; print([name for name in sys.modules if name.startswith('layerloop')])",
        "print(input())",
    ],
)
def test_a_program_ends_and_prints_as_in_an_interpreter_of_its_own(code: str) -> None:
    words = ("-c", code, "an argument")
    assert run(warm(), *words, GIVEN="value") == run(sys.executable, *words, GIVEN="value")


def test_modules_come_from_where_they_would() -> None:
    remedy = "begin one with `layerloop run`, or correct the path or URI"
    line = f"error: /none is no campaign, for it has no recipe.json: {remedy}"
    assert run(warm(), "-m", "layerloop.components.update_lora", "--campaign", "/none") == (2, "", line)
    assert run(warm(), "-V") == run(sys.executable, "-V")


def test_a_sitecustomize_of_the_environment_is_run(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.GIVEN = 1")
    assert run(warm(), "-c", "print(GIVEN)", PYTHONPATH=str(tmp_path)) == (0, "1\n", "")


def test_processes_that_it_starts_are_warm_too() -> None:
    code = "import subprocess, sys; print('torch' in sys.modules, flush=True)"
    inner = f"{code}; sys.exit(subprocess.run([sys.executable, '-c', {code!r}]).returncode)"
    assert run(warm(), "-c", inner) == (0, "True\nTrue\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_the_process_that_was_started(number: int) -> None:
    with subprocess.Popen([warm(), "-c", SLEEP], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(10) == -number
    deadline = time.monotonic() + 10
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.01)
        pytest.fail("it goes on")
