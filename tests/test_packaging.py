"""What is installed: every package and its data, each extra enough for its image, every version pinned."""

import importlib.metadata
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import grimp
import pydantic
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from layerloop.components.schema.steps import STEPS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders_with_code() -> set[str]:
    return {
        "layerloop." + ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("components", "pipelines")
        for path in (ROOT / top).rglob("*.py")
    }


def of_research(package: str) -> bool:
    """Whether a package is research about the project, which no image has."""
    return "research" in package.split(".")


def test_every_folder_with_code_is_a_package_that_is_listed_but_for_research() -> None:
    packages = folders_with_code()
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == {name for name in packages if not of_research(name)}
    for package in packages:
        assert (ROOT / package.removeprefix("layerloop.").replace(".", "/") / "__init__.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in ("components", "pipelines"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(target.glob("layerloop-*.whl"))


def test_the_wheel_carries_every_module_and_every_file_that_code_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    kept = (".py", ".yaml", ".html", ".css", ".js", ".ttf", ".json", ".safetensors", ".jinja", ".txt", ".model")
    for top in ("components", "pipelines"):
        for path in (ROOT / top).rglob("*"):
            if path.is_file() and path.suffix in kept and not {"__pycache__", "research"} & {*path.parts}:
                assert f"layerloop/{path.relative_to(ROOT).as_posix()}" in names
    assert not [name for name in names if not name.startswith(("layerloop/", "layerloop-"))]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the images have of layerloop: the wheel, unpacked."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def python(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the unpacked wheel and the environment's packages, but for the checkout, which `-S` leaves out."""
    environment = {"PYTHONPATH": f"{installed}:{Path(pydantic.__file__).parents[1]}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_runs_without_the_checkout(installed: Path) -> None:
    code = (
        "import layerloop.pipelines.inputs as i, layerloop.components.policy.tiny as t, pathlib\n"
        "print(i.__file__, len(i.packaged_recipes()), pathlib.Path(t.tiny_folder(), 'model_index.json').exists())"
    )
    result = python(installed, "-c", code)
    file, recipes, tiny = result.stdout.split() or pytest.fail(result.stderr)
    assert file.startswith(str(installed))
    assert int(recipes) >= 2
    assert tiny == "True"


def test_research_is_in_the_checkout_and_not_in_the_images(installed: Path) -> None:
    rooms = [path for top in ("components", "pipelines") for path in (ROOT / top).rglob("research")]
    assert sorted(path.parent.name for path in rooms if path.is_dir()) == ["components", "pipelines"]
    assert not list(installed.rglob("research"))


def test_the_study_says_in_one_line_where_it_is_not_installed(installed: Path) -> None:
    result = python(installed, "-m", "layerloop.pipelines.cli", "study")
    assert result.returncode == 2
    assert result.stderr == (
        "error: `layerloop study` is not installed here: run it in a checkout of layerloop, as `make study`\n"
    )


def test_the_study_runs_from_a_checkout(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "layerloop.pipelines.cli", "study", "--arms", "fulll", "--folder", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: arm fulll is not known: choose from full, ")


def test_make_pretrain_starts_a_module_that_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = (ROOT / "Makefile").read_text().split("\npretrain:")[1].split("\n\n")[0]
    (module,) = re.findall(r"-m (\S+)$", recipe, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {module}")


# What the wheel with one extra, or with those of an image, is enough for: commands that say what they take.
STEPS_OF = {image: [f"components.{name}" for name, step in STEPS.items() if step.image == image] for image in
            ("light", "policy")}  # fmt: skip
ENOUGH_FOR: dict[str, list[str]] = {
    "": ["pipelines.cli"],
    "judge": ["components.score_rollouts"],
    "evaluation": ["pipelines.cli judge serve"],
    "policy": ["components.shard_dataset", "components.generate_rollouts", "components.update_lora",
               "components.publish_adapter"],
    "pipelines": ["pipelines.cli compile", "pipelines.cli submit"],
    "policy,judge,evaluation": STEPS_OF["policy"],
    "judge,evaluation": STEPS_OF["light"],
    "policy,decompose": ["pipelines.cli decompose"],
}  # fmt: skip
# Runs `python -m` for each, where nothing but the given packages can be imported: as a clean environment has it.
WITH_THESE_PACKAGES = """
import importlib.machinery, json, runpy, sys, sysconfig

sysconfig.get_config_vars()  # loads a module whose name is the platform's
allowed = {*sys.stdlib_module_names, "layerloop", *json.loads(sys.argv[1])}


class Only(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return super().find_spec(name, path, target) if name.partition(".")[0] in allowed else None


sys.meta_path = [Only if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
for command in sys.argv[2:]:
    module, *words = command.split()
    sys.argv = [module, *words]
    for name in [name for name in sys.modules if name.startswith("layerloop")]:
        del sys.modules[name]
    try:
        runpy.run_module(f"layerloop.{module}", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, command
"""


def with_packages(installed: Path, extras: str, *commands: str) -> subprocess.CompletedProcess[str]:
    """Run commands where the wheel is installed with these extras and nothing else is."""
    wanted = [*requirements()["core"], *(r for extra in extras.split(",") if extra for r in requirements()[extra])]
    names, there = closure(wanted), importlib.metadata.packages_distributions()
    allowed = [module for module, owners in there.items() if {canonicalize_name(owner) for owner in owners} & names]
    return python(installed, "-c", WITH_THESE_PACKAGES, json.dumps(allowed), *commands)


@pytest.mark.parametrize("extras", ENOUGH_FOR)
def test_the_wheel_with_these_extras_alone_says_what_its_commands_take(installed: Path, extras: str) -> None:
    result = with_packages(installed, extras, *(f"{command} --help" for command in ENOUGH_FOR[extras]))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("usage: ") == len(ENOUGH_FOR[extras])


def test_a_command_whose_extra_is_not_installed_names_it_in_one_line(installed: Path) -> None:
    result = with_packages(installed, "", "pipelines.cli judge check http://127.0.0.1:9/v1")
    line = "error: httpx2 is needed and not installed here: pip install 'layerloop[judge]'"
    assert line in result.stderr.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("extras", ENOUGH_FOR)
def test_pip_installs_the_wheel_with_these_extras_into_an_empty_environment(
    wheel: Path, extras: str, tmp_path: Path
) -> None:
    """From the registry that pip knows here."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    fresh = str(tmp_path / "venv" / "bin" / "python")
    install = [fresh, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    named = f"{wheel}[{extras}]" if extras else str(wheel)
    done = subprocess.run([*install, named], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for command in ENOUGH_FOR[extras]:
        module, *words = command.split()
        line = [fresh, "-m", f"layerloop.{module}", *words, "--help"]
        said = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert said.returncode == 0 and "usage: " in said.stdout, said.stderr[-3000:]


def requirements() -> dict[str, list[Requirement]]:
    extras = PROJECT["project"]["optional-dependencies"]
    listed = {"core": PROJECT["project"]["dependencies"], **extras}
    return {name: [Requirement(line) for line in lines] for name, lines in listed.items()}


def test_every_requirement_has_a_lower_and_an_upper_bound() -> None:
    for extra, listed in requirements().items():
        for requirement in listed:
            operators = {specifier.operator for specifier in requirement.specifier}
            assert operators == {">=", "<"}, f"{extra}: {requirement}"


def test_the_constraints_pin_the_whole_closure_within_the_bounds() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    open_ends = {canonicalize_name(r.name): r for listed in requirements().values() for r in listed}
    for name, requirement in open_ends.items():
        assert requirement.specifier.contains(pins[name], prereleases=True), requirement
    seen = closure([r for listed in requirements().values() for r in listed])  # what is installed may ask for more
    assert seen <= pins.keys(), f"not pinned: {', '.join(sorted(seen - pins.keys()))}"


def _gpu(name: str) -> bool:
    """Packages that only some builds of torch ask for, each build with exact versions of its own."""
    return name.startswith(("nvidia", "cuda")) or name == "triton"


def test_torch_is_pinned_to_the_same_release_wherever_it_is_named() -> None:
    named = {
        path.name: re.findall(r"torch==([\d.]+)", path.read_text())
        for path in (ROOT / "constraints.txt", ROOT / "Makefile", ROOT / "images" / "Containerfile.policy")
    }
    assert {version for versions in named.values() for version in versions} == {"2.13.0"}
    assert all(named[file] for file in ("constraints.txt", "Makefile"))


def test_nobody_depends_on_torchvision_or_lets_torch_float() -> None:
    assert "torchvision" not in (ROOT / "constraints.txt").read_text()


# What a step may import where it runs: the extras of its image (images/Containerfile.*), and their own requirements.
EXTRAS_OF_IMAGES = {"light": ("core", "judge", "evaluation"), "policy": ("core", "policy", "judge", "evaluation")}
COMMANDS_OF_IMAGES = {  # modules that are started there
    image: [f"{step.name}.step" for step in STEPS.values() if step.image == image] for image in EXTRAS_OF_IMAGES
}
COMMANDS_OF_IMAGES["light"].append("reference_judge.server")
EXTRAS_OF_IMAGES["decompose"] = (
    "core",
    "policy",
    "decompose",
)  # no image, but pip install 'layerloop[policy,decompose]'
COMMANDS_OF_IMAGES["decompose"] = ["decompose.run"]
# Only to draw designs with photographs in them: the demo and the training of the tiny policy.
NOT_IN_IMAGES = {"skimage", "sklearn"}


@pytest.mark.parametrize("image", EXTRAS_OF_IMAGES)
def test_an_image_installs_all_that_its_steps_import(image: str) -> None:
    graph = grimp.build_graph(
        "layerloop.components", include_external_packages=True, exclude_type_checking_imports=True
    )
    installed = closure([r for extra in EXTRAS_OF_IMAGES[image] for r in requirements()[extra]])
    distributions = importlib.metadata.packages_distributions()
    for step in COMMANDS_OF_IMAGES[image]:
        module = f"layerloop.components.{step}"
        needed = {module, *graph.find_upstream_modules(module)}
        outside = {name for name in needed if graph.is_module_squashed(name) if name not in sys.stdlib_module_names}
        for name in outside - NOT_IN_IMAGES:
            providers = {canonicalize_name(distribution) for distribution in distributions[name]}
            assert providers & installed, f"{step} imports {name}, which the {image} image does not install"


def closure(listed: list[Requirement]) -> set[str]:
    """Names of the distributions that installing the requirements brings, as they are installed here."""
    seen: set[str] = set()
    pending = list(listed)
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in seen and not requirement.extras:
            continue
        seen.add(name)
        environments = [{"extra": extra} for extra in (*requirement.extras, "")]
        for text in importlib.metadata.requires(name) or ():
            needed = Requirement(text)
            if (needed.marker is None or any(needed.marker.evaluate(e) for e in environments)) and not _gpu(
                needed.name
            ):
                pending.append(needed)
    return seen
