"""The documentation: every key is explained, every link leads somewhere, pages outside docs/ are part of the site, and
what workflows and pages tell people or machines to run is there."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from layerloop.components.schema.recipe import DataRecipe, Recipe
from layerloop.components.schema.record import Record
from layerloop.components.schema.runtime import Runtime

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
assert _spec and _spec.loader
hooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hooks)


@pytest.mark.parametrize("model", [Recipe, Runtime])
def test_every_key_says_what_it_means(model: type[Record]) -> None:
    silent = [
        ".".join((*path, key))
        for path, section in hooks._sections(model, ())
        for key, field in section.model_fields.items()
        if not hooks._is_section(field) and not hooks.meanings(section).get(key)
    ]
    assert silent == [], "write a comment at each field"


def test_a_row_has_type_range_default_and_meaning() -> None:
    page = hooks.reference(Recipe, "recipe")
    assert "| `resolution` | integer, ≥ 16 | `640` | Longest side, pixels |" in page
    assert "| `name` | text | required |" in page
    assert "## `judge.phase2`" in page
    assert "| `batch_size` | integer, ≥ 1 | `1`; tiny: `12` |" in hooks.reference(Runtime, "runtime")


def test_a_comment_above_a_field_and_behind_it_are_both_read() -> None:
    assert hooks.meanings(DataRecipe)["multiple"] == "sides are rounded to this"
    assert hooks.meanings(Recipe)["name"].startswith("Of the recipe")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1"})


def test_the_site_builds_with_no_link_that_leads_nowhere(tmp_path: Path) -> None:
    done = build(tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    start = (tmp_path / "site" / "index.html").read_text()
    assert 'href="JUDGE/"' in start and 'href="contributing/"' in start
    assert "fonts.googleapis.com" not in start, "a page fetches from elsewhere"
    compiled = [path.name for path in (tmp_path / "site").rglob("*.py*")]
    assert compiled == [], "they hold the paths of the machine that built the site"
    assert "Difference-hash distance" in (tmp_path / "site" / "reference" / "recipe" / "index.html").read_text()


@pytest.mark.parametrize("page", [*hooks.PAGES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_to_files_of_the_repository_name_files_that_are_there(page: str) -> None:
    folder = (ROOT / page).parent
    targets = [match[3].partition("#")[0] for match in hooks._LINK.finditer((ROOT / page).read_text())]
    missing = [target for target in targets if target and ":" not in target and not (folder / target).exists()]
    assert missing == []


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WORKFLOWS], ids=lambda path: path.name)
def test_every_target_that_is_named_is_one_of_the_makefile(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ {4}|run: )make ([a-z-]+)", path.read_text(), re.MULTILINE))
    assert named <= targets
    assert named or path.name == "tests.yml"


def test_dependencies_are_tried_once_a_week_and_proposed_where_their_files_are() -> None:
    (scheduled,) = (text for path in WORKFLOWS if "schedule:" in (text := path.read_text()))
    workflow = yaml.safe_load(scheduled)
    (at,) = workflow[True]["schedule"]  # YAML 1.1 reads the key `on` as true
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", at["cron"])
    assert "make newest" in [step.get("run") for step in workflow["jobs"]["newest"]["steps"]]
    found = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())["updates"]
    assert {update["package-ecosystem"] for update in found} == {"pip", "github-actions", "docker"}
    for update in found:
        for folder in update.get("directories", [update.get("directory")]):
            assert (ROOT / folder.lstrip("/")).is_dir()
