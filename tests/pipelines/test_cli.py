"""The command line itself: help, recipes, compiling."""

import errno
import re
import shlex
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save
from warm_python import warm

from layerloop.components.judge.methods import rubric_of
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.recipe import parse_recipe, parse_recipe_runtime
from layerloop.components.schema.runtime import Runtime
from layerloop.components.storage.runtime import runtime_values
from layerloop.components.storage.stores import open_store
from layerloop.pipelines.cli import build_parser, main
from layerloop.pipelines.inputs import absolute, packaged_recipes, recipe_and_runtime, recipe_text, what_is_trained

COMMANDS = [
    ["demo"], ["run"], ["continue"], ["compile"], ["recipe"], ["runtime"], ["plan"], ["decompose"], ["compare"],
    ["submit"], ["schedule", "apply"], ["schedule", "list"], ["schedule", "delete"], ["schedule", "pause"],
    ["schedule", "resume"], ["pipeline", "upload"], ["judge", "serve"], ["judge", "check"], ["campaign", "show"],
    ["campaign", "run-until"], ["campaign", "list"], ["campaign", "compare"], ["campaign", "delete"],
    ["adapter", "merge"], ["publish"], ["study"],
]  # fmt: skip


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: layerloop")
    assert len(text.splitlines()) > 5


def commands_in(page: Path) -> list[list[str]]:
    """The `layerloop` commands of a page's indented lines, continued ones joined, without what explains them."""
    text = re.sub(r"\\{1,2}\n *", "", page.read_text())
    lines = re.findall(r"^ +(?:OPENAI_API_KEY=\S+ )?layerloop ([a-z].*)$", text, re.MULTILINE)
    commands = [re.split(r" {3,}| > ", line)[0] for line in lines if "..." not in line.split()]
    return [shlex.split(command, comments=True) for command in commands]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/cluster.md",
        "pipelines/cli.py",
        "pipelines/cli_run.py",
        "pipelines/cli_compile.py",
        "pipelines/cli_cluster.py",
    ],
)
def test_commands_that_are_written_down_are_accepted(page: str) -> None:
    commands = commands_in(Path(__file__).parents[2] / page)
    assert len(commands) >= 2
    for command in commands:
        build_parser().parse_args(command)  # SystemExit where an option is unknown


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("comparee x", "layerloop: no command 'comparee', did you mean compare? (see layerloop --help)"),
        ("evaluate x", "layerloop: no command 'evaluate': that step is python -m layerloop.components.evaluate_ad"),
        ("campaign shwo x", "layerloop campaign: no command 'shwo', did you mean show?"),
        ("zzz", "layerloop: no command 'zzz' (see layerloop --help)"),
        ("compile -o x --iterations 0", "layerloop compile: argument --iterations: it is 0: choose 1 or more"),
        ("run --workers two", "layerloop run: argument --workers: it is two: choose 1 or more"),
        ("continue x --until -1", "layerloop continue: argument --until: it is -1: choose 1 or more"),
        ("run --campain x", "layerloop run: no option --campain, did you mean --campaign?"),
        ("compare x --output=y --outptu y", "layerloop compare: no option --outptu, did you mean --output?"),
        ("demo --frseh", "layerloop demo: no option --frseh, did you mean --fresh?"),
        ("run", "layerloop run: the following arguments are required: --campaign, --images"),
        ("campaign compare a b c", "layerloop campaign compare: nothing is expected at c"),
    ],
)
def test_what_is_misspelt_is_one_line_with_what_was_meant(
    typed: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(typed.split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(f"error: {line}") and said.count("\n") == 1


def test_the_installed_command_is_this_one() -> None:
    command = str(Path(sys.executable).with_name("layerloop"))
    text = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "Fine-tune an image layer decomposition model" in text


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_is_valid_and_begins_with_what_it_is_for(name: str) -> None:
    text = packaged_recipes()[name]
    parse_recipe(text)
    assert text.startswith("# ")
    assert len(text.splitlines()[0]) <= 120


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe"]) == 0
    listed = capsys.readouterr().out
    assert {line.split()[0] for line in listed.splitlines()} == set(packaged_recipes())
    assert len({line.index(line.split()[1], 8) for line in listed.splitlines()}) == 1  # in columns
    assert main(["recipe", "paper"]) == 0
    assert capsys.readouterr().out == packaged_recipes()["paper"]


def test_a_change_of_a_recipe_is_made_and_checked() -> None:
    changed = parse_recipe(
        recipe_text("tiny", ["judge.model=qwen3-vl", "rollout.window.size=3", "evaluation.layers=[2]"])
    )
    assert (changed.judge.model, changed.rollout.window.size, changed.evaluation.layers) == ("qwen3-vl", 3, (2,))
    assert changed.rollout.window.start == parse_recipe(packaged_recipes()["tiny"]).rollout.window.start


@pytest.mark.parametrize(
    "change, line",
    [
        ("judge.model", "is not a change: write it as judge.model=name"),
        ("name.x=1", "recipe.name is not a section"),
        ("rollout.groups=[", "is not a YAML value"),
        ("rollout.group=3", "recipe.rollout.group is not a known key: did you mean 'groups'"),
    ],
)
def test_a_change_that_is_none_is_refused(change: str, line: str) -> None:
    with pytest.raises(LayerloopError, match=line):
        recipe_text("tiny", [change])


OLD = "name: mine\nmodel: {base: tiny}\nrollout: {groups: 5, batch_size: 3}\njudge: {concurrency: 4, impatience: 9}\n"


def test_the_runtimes_values_in_a_recipe_file_hold_for_the_run_and_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(OLD)
    text, runtime = recipe_and_runtime(f"{tmp_path}/mine.yaml")
    assert yaml.safe_load(text) == {"name": "mine", "model": {"base": "tiny"}, "rollout": {"groups": 5}}
    assert runtime == {"rollout": {"batch_size": 3}, "judge": {"concurrency": 4, "timeout_factor": 9.0}}
    (line,) = capsys.readouterr().err.splitlines()
    assert "rollout.batch_size, judge.concurrency, judge.timeout_factor say where and how fast" in line


def test_a_change_goes_over_the_runtimes_file_and_that_over_the_recipes(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OLD)
    (tmp_path / "runtime.yaml").write_text("judge: {concurrency: 5, retries: 1}\n")
    changes = ["judge.concurrency=6", "judge.price.input=2.5", "rollout.groups=7", "judge.impatience=2"]
    text, runtime = recipe_and_runtime(f"{tmp_path}/mine.yaml", changes, f"{tmp_path}/runtime.yaml")
    assert parse_recipe(text).rollout.groups == 7
    assert runtime == {
        "rollout": {"batch_size": 3},
        "judge": {"concurrency": 6, "retries": 1, "timeout_factor": 2.0, "price": {"input": 2.5}},
    }


def test_a_change_of_the_runtime_alone_leaves_the_recipes_text_as_it_is() -> None:
    text, runtime = recipe_and_runtime("tiny", ["judge.retries=9"])
    assert text == packaged_recipes()["tiny"]
    assert runtime == {"judge": {"retries": 9}}
    text, runtime = recipe_and_runtime("tiny", ["judge={model: m, concurrency: 2}"])
    assert parse_recipe(text).judge.model == "m"
    assert runtime == {"judge": {"concurrency": 2}}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("judge.concurrency=0", "runtime.judge.concurrency is 0: input should be greater than or equal to 1"),
        ("judge.price.inputs=1", "runtime.judge.price.inputs is not a known key: did you mean 'input'"),
    ],
)
def test_an_impossible_change_of_the_runtime_is_refused(change: str, line: str) -> None:
    with pytest.raises(LayerloopError, match=line):
        recipe_and_runtime("tiny", [change])


def test_packaged_recipes_hold_nothing_of_the_runtime() -> None:
    for text in packaged_recipes().values():
        assert parse_recipe_runtime(text)[1] == {}


def test_the_runtime_that_is_printed_is_all_of_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runtime"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == Runtime().model_dump(mode="json")
    assert Runtime.model_validate(runtime_values(printed)) == Runtime()


def test_a_recipe_is_not_printed_with_a_value_that_it_would_not_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "tiny", "--set", "judge.concurrency=3"]) == 2
    assert capsys.readouterr().err.startswith("error: judge.concurrency is not of the recipe but of the runtime")


def test_the_compiled_pipelines_runtime_is_the_one_given(tmp_path: Path) -> None:
    (tmp_path / "runtime.yaml").write_text("judge: {concurrency: 5}\n")
    for kind in ("train", "evaluate"):
        path = tmp_path / f"{kind}.yaml"
        given = ["--runtime", f"{tmp_path}/runtime.yaml", "--set", "update.microbatch=3"]
        assert main(["compile", "-o", str(path), "--pipeline", kind, "--recipe", "tiny", *given]) == 0
        spec = next(yaml.safe_load_all(path.read_text()))
        parameter = spec["root"]["inputDefinitions"]["parameters"]["runtime"]
        assert parameter["parameterType"] == "STRUCT"
        assert runtime_values(parameter["defaultValue"]) == {"judge": {"concurrency": 5}, "update": {"microbatch": 3}}


def test_a_rubrics_file_goes_into_the_recipe_since_pods_do_not_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = (resources.files("layerloop.components.judge") / "rubrics" / "default.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(shipped.replace("name: default", "name: mine"))
    assert main(["compile", "-o", "x.yaml", "--recipe", "tiny", "--set", "judge.rubric=mine.yaml"]) == 0
    tasks = next(yaml.safe_load_all((tmp_path / "x.yaml").read_text()))["root"]["dag"]["tasks"]
    frozen = tasks["shard-dataset"]["inputs"]["parameters"]["default_recipe"]["runtimeValue"]["constant"]
    (tmp_path / "mine.yaml").unlink()
    recipe = parse_recipe(frozen).judge
    assert rubric_of(recipe).name == "mine"
    assert rubric_of(recipe).system_text() == rubric_of(JudgeRecipe()).system_text()
    with pytest.raises(
        LayerloopError, match=r"^recipe\.judge\.rubric is mine\.yaml: that file does not exist; what it"
    ):
        recipe_text("tiny", ["judge.rubric=mine.yaml"])
    with pytest.raises(
        LayerloopError, match=r"^recipe\.judge\.rubric is 'mine': choose default, or the path of a .yaml"
    ):
        recipe_text("tiny", ["judge.rubric=mine"])
    in_the_pod = recipe_text("tiny", ["judge.rubric=/etc/layerloop/mine.yaml"])
    assert parse_recipe(in_the_pod).judge.rubric == "/etc/layerloop/mine.yaml"


def test_paths_become_absolute_and_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute("photos/*.png") == f"{tmp_path}/photos/*.png"
    assert absolute("~/photos") == "/home/someone/photos"
    assert absolute("s3://bucket/a") == "s3://bucket/a"
    assert absolute("") == ""


def test_compile_writes_a_file_and_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "train.yaml"
    assert main(["compile", "-o", str(path), "--recipe", "tiny", "--iterations", "2", "--workers", "1"]) == 0
    assert f"{path}: train pipeline, 9 container tasks" in capsys.readouterr().out
    assert next(yaml.safe_load_all(path.read_text()))["pipelineInfo"]["name"] == "layerloop-train"


def test_compile_says_what_the_evaluation_costs_and_who_has_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["compile", "-o", str(tmp_path / "train.yaml"), "--recipe", "paper", "--iterations", "1"]
    assert main([*options, "--workers", "20"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == (
        "evaluation: 480 designs + 64 images are 107712 forwards of base and adapter, about 9.6 h on 1 GPU "
        "(assumed 0.32 s a forward at 640 px); deadline 22 h"
    )
    assert printed[2] == (
        "rollouts: 20 workers with processes for 1 GPU each share 16 groups: 4 processes have nothing to do"
    )
    assert printed[3].startswith(
        "images are layerloop-policy and layerloop-light, which a cluster looks for at docker.io"
    )
    assert main([*options, "--evaluate", "never"]) == 0
    assert "evaluation" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["compile", "-o", "x.yaml"], ["demo"], ["run", "--campaign", "c", "--images", "i"]]
)
def test_without_kfp_it_is_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kfp", None)
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: layerloop {command[0]} needs kfp, which is not here: pip install 'layerloop[pipelines]'"


def test_an_adapter_on_s3_is_fetched_to_be_merged(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAYERLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", warm())
    a, b = np.ones((2, 8), np.float32), np.full((8, 2), 3, np.float32)
    weights = save({"transformer.proj.lora_A.weight": a, "transformer.proj.lora_B.weight": b})
    open_store(s3_bucket).write("mine/pytorch_lora_weights.safetensors", weights)
    out = tmp_path / "out"
    assert main(["adapter", "merge", str(out), f"{s3_bucket}/mine=0.5"]) == 0
    printed = capfd.readouterr().out
    assert f"{s3_bucket}/mine is in {tmp_path}/cache/" in printed and f"{out}: rank 2, 1 layers" in printed
    merged = load_file(out / "pytorch_lora_weights.safetensors")
    product = merged["transformer.proj.lora_B.weight"] @ merged["transformer.proj.lora_A.weight"]
    assert np.array_equal(product, 0.5 * b @ a)


def test_an_adapter_that_is_not_on_s3_is_refused_by_its_uri(
    s3_bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", "merge", str(tmp_path / "out"), f"{s3_bucket}/none=0.5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {s3_bucket}/none has no objects: correct the URI, or upload the files first"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["-o", "train.txt"], "output is train.txt: name a file that ends in .yaml"),
        (["-o", "/proc/none/train.yaml"], "cannot be written"),
        (["-o", "x.yaml", "--cluster", "none.yaml"], "cluster file none.yaml cannot be read"),
        (["-o", "x.yaml", "--recipe", "none.yaml"], "recipe none.yaml cannot be read"),
    ],
)
def test_a_refused_compile_is_one_line_and_status_two(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compile", *arguments]) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith("error: ")
    assert line in printed
    assert not list(tmp_path.iterdir())


def test_a_reader_that_stops_reading_is_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "layerloop.pipelines.cli", "recipe", "paper"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `| head` does
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 128 + 13


@pytest.mark.parametrize(
    ("change", "layers"),
    [("evaluation.layers=2,4", (2, 4)), ("recipe.evaluation.layers=3", (3,)), ("evaluation.layers=[2, 5]", (2, 5))],
)
def test_a_list_is_written_as_people_write_it(change: str, layers: tuple[int, ...]) -> None:
    assert parse_recipe(recipe_text("tiny", [change])).evaluation.layers == layers


def test_a_text_with_a_comma_stays_one_text() -> None:
    assert (
        parse_recipe(recipe_text("tiny", ["model.prompt=clean, well composed"])).model.prompt == "clean, well composed"
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["recipe", "papr"], r"recipe papr cannot be read .*; did you mean 'paper'\?$"),
        (["recipe", "tiny", "--set", "rollout.outside=huen"], "choose one of heun, euler; did you mean 'heun'\\?$"),
        (["run", "--campaign", "c", "--images", "a.png", "b.png"], "--images got 2 values, a.png b.png .*: quote it"),
        (
            ["decompose", "a.png", "-o", "out", "--batch-size", "0"],
            "^error: --batch-size is 0: input should be greater",
        ),
        (
            ["recipe", "--set", "seed=1"],
            "--set needs a recipe that it changes: name one of demo, paper, paper-exact, tiny$",
        ),
        (["compile", "-o", "x.yaml", "--resident", "--workers", "4"], "--workers is given with --resident"),
        (["judge", "check", "127.0.0.1:8788"], "judge URL is '127.0.0.1:8788': give a base URL such as http://"),
        (
            ["schedule", "apply", "-f", "/nowhere.yaml", "--host", "http://127.0.0.1:9"],
            "schedule file /nowhere.yaml cannot be read \\(No such file or directory\\): name a YAML file$",
        ),
        (["run", "--campaign", "c", "--images", "a", "--runtime", "/nowhere"], r"cannot be read \(/nowhere does not"),
    ],
)
def test_a_slip_of_the_fingers_is_one_line_with_what_was_meant(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(line, said), said


def test_programs_of_the_users_folder_are_not_taken_for_pythons_own(tmp_path: Path) -> None:
    """A process that a command starts would import `shutil.py` where the user stands."""
    (tmp_path / "shutil.py").write_text("raise SystemExit('not Python')")
    command = [str(Path(sys.executable).with_name("layerloop")), "adapter", "merge", "out", "a=x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == "error: adapter 'a=x' is not ADAPTER=WEIGHT: write a number after the sign, such as a/b=0.5\n"


def test_the_version_says_what_a_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"layerloop \d+\.\d+\.\d+", first)
    assert "Python 3." in second and "kfp 2." in second


def test_a_run_says_first_which_model_it_trains() -> None:
    assert "tiny policy that ships with layerloop, at 64 pixels" in what_is_trained(parse_recipe(recipe_text("tiny")))
    paper = what_is_trained(parse_recipe(recipe_text("paper")))
    assert paper == "recipe stable-layers: trains Qwen/Qwen-Image-Layered at 640 pixels, in bfloat16"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOENT, "No such file or directory", "/proc/x/runs"), "/proc/x/runs cannot be used (No such"),
        (
            OSError(errno.EROFS, "Read-only file system", "/ro/x"),
            "/ro/x cannot be used (Read-only file system): give one",
        ),
    ],
)
def test_a_path_that_cannot_be_used_is_one_line(
    error: OSError, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise error

    monkeypatch.setattr("layerloop.pipelines.inputs.runtime_text", fail)
    assert main(["runtime"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {line}")


def test_the_demo_where_no_folder_can_be_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--folder", "/proc/x"]) == 2
    assert capsys.readouterr().err == "error: /proc/x cannot be used (No such file or directory): give another path\n"
