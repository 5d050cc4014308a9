"""The house rules, as tests: formatting, lint, types, sizes, names, and the arrows between packages."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerloop.components.schema.steps import STEPS, Step

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of this environment's bin folder."""
    executable = str(Path(sys.executable).with_name(command[0]))
    return subprocess.run(
        [executable, *command[1:]], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_formatting_and_lint_are_clean() -> None:
    for command in (("format", "--check"), ("check",)):
        result = run("ruff", *command, "--quiet", "components", "pipelines", "tests")
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.timeout(600)
def test_types_check() -> None:
    # mypy knows no editable installs, so it is given the names that installing gives: layerloop.components, ...
    links = ROOT / "build" / "typing" / "layerloop"
    links.mkdir(parents=True, exist_ok=True)
    for folder in ("components", "pipelines"):
        if not (links / folder).exists():
            (links / folder).symlink_to(ROOT / folder)
    result = run("mypy")
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_run_one_way() -> None:
    result = run("lint-imports")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "module, line",
    [
        ("components/generate_rollouts/step.py", "from layerloop.components.update_lora import step"),
        ("components/generate_rollouts/step.py", "from layerloop.components.train_stretch import step"),
        ("components/storage/stores.py", "from layerloop.components.runtime import progress"),
        ("components/storage/s3.py", "from layerloop.components.storage import stores"),
        ("components/policy/model.py", "from layerloop.components.layers import stack"),
        ("components/policy/model.py", "from layerloop.components.storage import campaign"),
        ("components/policy/at.py", "from layerloop.components.runtime import distributed"),
        ("components/schema/seeds.py", "from layerloop.components.storage import stores"),
        ("components/update_lora/step.py", "import kfp"),
        ("components/update_lora/step.py", "from layerloop.components.update_lora import component"),
        ("components/score_rollouts/step.py", "from layerloop.components.policy import model"),
        ("components/judge/client.py", "from layerloop.components.reference_judge import answers"),
        ("pipelines/cli.py", "from layerloop.components.policy import model"),
        ("components/policy/model.py", "from layerloop.components.policy import sampling"),
        ("pipelines/demo.py", "from layerloop.pipelines.research import arms"),
        ("components/policy/tiny.py", "from layerloop.components.research.pretraining import training"),
        ("pipelines/research/outcomes.py", "from layerloop.pipelines.research import page"),
    ],
)
def test_an_import_that_runs_the_wrong_way_is_refused(tmp_path: Path, module: str, line: str) -> None:
    for path in (*(ROOT / "components").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")):
        copy = tmp_path / "layerloop" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / "layerloop" / module
    target.write_text(target.read_text() + f"\n\ndef _late() -> None:\n    {line}\n")  # lazily: no excuse
    result = run("lint-imports", "--no-cache", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1, result.stdout
    assert "BROKEN" in result.stdout


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, `from a import b` as both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_pipelines_know_a_step_only_by_its_declaration() -> None:
    allowed = re.compile(rf"layerloop\.components\.(?:{'|'.join(STEPS)})\.component(?:\.\w+)?")
    for path in (ROOT / "pipelines").rglob("*.py"):
        of_steps = {name for name in imports_of(path) if name.split(".")[2:3] and name.split(".")[2] in STEPS}
        assert all(allowed.fullmatch(name) for name in of_steps), f"{path}: {of_steps}"


@pytest.mark.parametrize("step", STEPS)
def test_the_declaration_of_a_step_is_nothing_else(step: str) -> None:
    tree = ast.parse((ROOT / "components" / step / "component.py").read_text())
    kinds = [type(node).__name__ for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert kinds == ["Expr", "FunctionDef"]  # the docstring and the component


def test_the_step_table_the_folders_and_the_arrows_name_the_same_steps() -> None:
    declared = {path.parent.name for path in (ROOT / "components").glob("*/component.py")}
    assert declared == set(STEPS)
    contracts = {
        c["id"]: c for c in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    }
    floors = [set(layer.split(" | ")) for layer in contracts["direction"]["layers"]]
    above, below = (
        {f"layerloop.components.{n}" for n, s in STEPS.items() if bool(s.composes) is c} for c in (True, False)
    )
    assert floors[:3] == [{"layerloop.pipelines"}, above, below] and set(contracts["steps"]["modules"]) == below
    assert {other for step in STEPS.values() for other in step.composes} <= set(STEPS)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_declaration_names_the_image_and_the_command_of_the_step_table(step: Step) -> None:
    text = (ROOT / "components" / step.name / "component.py").read_text()
    assert f'image="layerloop-{step.image}"' in text
    assert f'"-m", "layerloop.components.{step.name}"' in text


LINES, PARAMETERS = 60, 7  # of a function: lines without its docstring, parameters without self and cls
KFP = "its parameters are those of the Kubeflow task"
LARGER = {  # file: {function: why it may exceed}
    **{f"components/{step}/component.py": {step: KFP} for step in STEPS},
    "components/shard_dataset/step.py": {"run": KFP},
    "components/policy/tiny.py": {"build_tiny_pipeline": "independent sizes of one model, each with a default"},
    "pipelines/cli.py": {"build_parser": "one list of flags"},
    "pipelines/evaluate.py": {
        "evaluate_pipeline": "kfp compiles the function inside it",
        "evaluation": "the parameters of the compiled pipeline",
    },
    "pipelines/schedules.py": {"run_until": "the options of one command, each by name"},
    "pipelines/submit.py": {"submit_until": "the options of one command, each by name"},
    "pipelines/train.py": {
        "train_pipeline": "kfp compiles the function inside it",
        "remaining_work": "the parameters of the compiled pipeline",
        "train": "the parameters of the compiled pipeline",
    },
}


def python_files() -> list[Path]:
    """The project's own code, without tests."""
    return sorted(path for folder in ("components", "pipelines") for path in (ROOT / folder).rglob("*.py"))


def size_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, int]:
    """(lines, parameters) of a function, without its docstring and without self and cls."""
    first = function.body[0]
    document = first if ast.get_docstring(function, clean=False) is not None else None
    lines = (function.end_lineno or 0) - function.lineno + 1
    lines -= (document.end_lineno or 0) - document.lineno + 1 if document is not None else 0
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return lines, sum(name not in ("self", "cls") for name in names)


def test_functions_are_short_and_take_few_parameters() -> None:
    found = []
    for path in python_files():
        file = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in LARGER.get(file, {}):
                lines, parameters = size_of(node)
                if lines > LINES or parameters > PARAMETERS:
                    found.append(f"{file}:{node.lineno} {node.name}: {lines} lines, {parameters} parameters")
    assert not found, "\n".join(found)


def test_the_size_of_a_function_is_counted_without_docstring_and_self() -> None:
    code = 'def f(self, a, /, b, *, c):\n    """One\n    two."""\n    return (\n        a\n    )\n'
    (function,) = ast.parse(code).body
    assert isinstance(function, ast.FunctionDef)
    assert size_of(function) == (4, 3)


# What only tests or users call: a function here needs a reason.
UNCALLED = {
    # for users, who have layers and want files
    "components/layers/export.py": {"read_psd"},
    "components/layers/psd.py": {"save_psd"},
    "pipelines/local.py": {"overhead"},  # for the benchmark of that name
}
CALLED_BY_LIBRARIES = {
    "do_GET",
    "do_POST",
    "emit",
    "handle_error",
    "handle_one_request",
    "ignore_aliases",
    "log_message",
}
CALLED_BY_LIBRARIES |= {"makefile", "parse_known_args", "readinto", "seekable", "send_error", "sendall", "setup"}


def definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes of a module, and the public methods of its classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and not method.name.startswith("_"):
                yield method


def uses(tree: ast.AST) -> Counter[str]:
    """How often each name is read, imported by name, or read as an attribute."""
    found: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found[node.id] += 1
        elif isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.ImportFrom):
            found.update(alias.name for alias in node.names)
    return found


def test_nothing_is_kept_that_only_tests_call() -> None:
    trees = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in python_files()}
    everywhere = sum((uses(tree) for tree in trees.values()), Counter())
    found = {
        (file, node.name)
        for file, tree in trees.items()
        for node in definitions(tree)
        if everywhere[node.name] == uses(node)[node.name]  # at most by itself
        and node.name not in CALLED_BY_LIBRARIES
    }
    known = {(file, name) for file, names in UNCALLED.items() for name in names}
    assert found <= known, f"delete it, or say in UNCALLED what it is for: {sorted(found - known)}"
    assert known <= found, f"gone or called, so no longer of UNCALLED: {sorted(known - found)}"


def test_a_function_that_calls_only_itself_is_not_called() -> None:
    tree = ast.parse("def f():\n    return f()\n\nclass A:\n    def g(self): ...\n\nA().h()\n")
    names = [node.name for node in definitions(tree) if uses(tree)[node.name] == uses(node)[node.name]]
    assert names == ["f", "g"]


def test_benchmarks_import_what_is_there() -> None:
    """They are not run with the tests, which would notice."""
    imports = [
        (path.name, node.module, alias.name)
        for path in (ROOT / "tests" / "benchmarks").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("layerloop.")
        for alias in node.names
    ]
    assert len(imports) > 30
    for file, module, name in imports:
        path = ROOT / str(module).removeprefix("layerloop.").replace(".", "/")
        if path.is_dir() and ((path / f"{name}.py").exists() or (path / name).is_dir()):
            continue
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert source.exists(), f"{file}: there is no {module}"
        defined = {getattr(node, "name", "") for node in ast.parse(source.read_text()).body}
        stored = {n.id for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.Name)}
        assert name in defined | stored, f"{file}: {module} has no {name}"


# Identifiers that docs/glossary.md replaces by another word.
BANNED = {
    "place": "campaign, bucket, cluster",
    "told": "what was written or logged",
    "twin_of": "find_duplicate",
    "Patience": "AdaptiveTimeout",
    "Dialect": "EndpointFeatures",
    "delivered_weights": "final_weights",
}
BANNED_ALLOWED = {  # file: names
    "components/layers/columns.py": {"place"},  # where a measure is quoted
    **{f"pipelines/{name}.py": {"place"} for name in ("cluster", "evaluate", "inputs", "train")},
}


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of all names that code defines or uses; keywords of calls and texts are left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr


def test_names_are_those_of_the_glossary() -> None:
    found = []
    for path in python_files():
        file = path.relative_to(ROOT).as_posix()
        for line, name in names_in(ast.parse(path.read_text())):
            if name in BANNED and name not in BANNED_ALLOWED.get(file, set()):
                found.append(f"{file}:{line} {name}: {BANNED[name]}")
    assert not found, "\n".join(found)


def test_a_banned_name_is_found_wherever_it_is_defined_or_used() -> None:
    code = "class Dialect: ...\ndef f(place):\n    told = place.twin_of\ntext.format(place='x')  # place\n"
    assert sorted(name for _, name in names_in(ast.parse(code)) if name in BANNED) == [
        "Dialect", "place", "place", "told", "twin_of",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "module", ["score_rollouts.step", "judge.client", "reference_judge.server", "storage.campaign", "runtime.contract"]
)
def test_what_runs_without_torch_starts_without_it(module: str) -> None:
    code = f"import layerloop.components.{module}, sys; print(*{{'torch', 'diffusers', 'kfp'}} & set(sys.modules))"
    result = run("python", "-c", code)
    assert result.stdout.strip() == "", result.stderr


def test_the_command_line_starts_without_kfp_and_torch() -> None:
    code = "import layerloop.pipelines.cli, sys; print(*{'torch', 'kfp', 'numpy', 'pyarrow'} & set(sys.modules))"
    result = run("python", "-c", code)
    assert result.stdout.strip() == "", result.stderr
    assert result.returncode == 0, result.stderr


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_secrets_and_leftovers_are_not_in_the_tree() -> None:
    pattern = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b|\bsk-[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}")
    for folder in ("components", "pipelines", "manifests", "images"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".yaml", ".yml", ".md", ".toml", ""):
                assert not pattern.search(path.read_text(errors="replace")), path
