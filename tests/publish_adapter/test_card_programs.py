"""The card's programs, run as they are printed: new processes, on the tiny policy, in the folder of the card."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered as module
from PIL import Image, ImageOps
from warm_python import warm

from layerloop.components.layers.normalise import normalise
from layerloop.components.publish_adapter.step import run
from layerloop.components.publish_adapter.usage import card_for_hub, layers_to_ask_for, programs
from layerloop.components.schema.recipe import Recipe

from ..campaigns import CampaignBuilder

RECIPE = {
    "name": "shop",
    "model": {"base": "tiny", "dtype": "float32", "prompt": 'a "clean" image'},
    "data": {"resolution": 64},
    "rollout": {"min_layers": 2, "max_layers": 3},
    "lora": {"rank": 4, "alpha": 8.0},
    "evaluation": {"steps": 3},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a publication from the tiny policy, with a picture beside its card, and the card."""
    lab = CampaignBuilder.begin(str(tmp_path_factory.mktemp("lab") / "campaign"), RECIPE)
    lab.sources()
    lab.adapter(1, scale=0.05)
    lab.scores(1)
    card = run(campaign=lab.campaign.uri, publish_as="adapter").files["card"].decode()
    folder = Path(lab.campaign.uri) / "published/adapter"
    draw = np.random.default_rng(0)
    small = Image.fromarray(draw.integers(0, 256, (5, 8, 4), dtype=np.uint8))
    picture = small.resize((150, 90), Image.Resampling.BICUBIC)  # with alpha, and of no size of training
    exif = picture.getexif()
    exif[0x0112] = 6  # lies on its side
    picture.save(folder / "picture.png", exif=exif)
    return folder, card


RUNNER = """
import os, sys
for place in sys.argv[1:]:
    os.chdir(place)
    exec(compile(open("program.py").read(), "program.py", "exec"), {"__name__": "__main__"})
"""


def run_programs(codes: dict[str, str], folder: Path, places: Path) -> dict[str, list[np.ndarray]]:
    """The layers that each program writes, in a copy of `folder`; a new process runs them, one after the other."""
    for name, code in codes.items():
        shutil.copytree(folder, places / name)
        (places / name / "program.py").write_text(code)
    done = subprocess.run(
        [warm(), "-c", RUNNER, *(str(places / name) for name in codes)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [np.asarray(Image.open(file)) for file in sorted((places / name).glob("layer-*.png"))] for name in codes
    }


def test_every_program_on_the_card_runs_as_printed(published: tuple[Path, str], tmp_path: Path) -> None:
    folder, card = published
    names = ("diffusers", "peft", "layerloop")
    codes = dict(zip(names, re.findall(r"```python\n(.*?)```", card, re.DOTALL), strict=True))
    found = run_programs(codes, folder, tmp_path)
    for layers in found.values():
        assert [layer.shape for layer in layers] == [(64, 32, 4)] * 3  # 90 x 150 after turning it upright
    for theirs, ours in zip(found["diffusers"], found["peft"], strict=True):
        assert np.array_equal(theirs, ours)
    # Heun's and Euler's steps differ, the picture, its size and the noise do not: the layers resemble each other
    assert np.abs(np.stack(found["diffusers"]).astype(int) - np.stack(found["layerloop"])).mean() < 40


def test_the_adapter_of_a_program_acts(
    published: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program without the line that loads it gives other layers; in this process, which is quicker."""
    folder, card = published
    monkeypatch.setattr(module, "calculate_dimensions", module.calculate_dimensions)  # which programs replace
    code, found = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], []
    for program in (code, code.replace("pipeline.load_lora_weights(adapter)\n", "")):
        shutil.copytree(folder, place := tmp_path / str(len(found)))
        monkeypatch.chdir(place)
        exec(program, {})
        found.append((place / "layer-0.png").read_bytes())
    assert found[0] != found[1]


def test_the_programs_size_and_picture_are_those_of_training(published: tuple[Path, str]) -> None:
    """The lines before the pipeline, for pictures of many sizes: the same size and nearly the same pixels."""
    folder, card = published
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    lines = code[code.index("picture =") : code.index("pipeline_qwenimage_layered.calc")]
    recipe = Recipe.model_validate(RECIPE)
    image = Image.open(folder / "picture.png")
    for size in ((150, 90), (64, 64), (1000, 30), (33, 400)):
        if 64 * min(size) / max(size) < 8:
            continue  # refused in training
        resized = ImageOps.exif_transpose(image).resize(size)
        scope = {"Image": Opened(resized), "ImageOps": ImageOps}
        exec(lines, scope)
        expected = normalise(resized, recipe.data)
        assert scope["size"] == (expected.shape[1], expected.shape[0])
        seen = scope["picture"].resize(scope["size"], Image.Resampling.LANCZOS).convert("RGB")  # type: ignore[attr-defined]
        assert np.abs(np.asarray(seen).astype(int) - expected).max() <= 2


class Opened:
    """`PIL.Image` whose `open` gives one picture."""

    def __init__(self, picture: Image.Image) -> None:
        self.open = lambda _: picture

    def __getattr__(self, name: str) -> object:
        return getattr(Image, name)


@pytest.mark.parametrize(
    ("base", "name", "known"),
    [
        ("Qwen/Qwen-Image-Layered", "Qwen/Qwen-Image-Layered", True),
        ("hf://me/mine", "me/mine", True),
        ("/hub/models--me--mine/snapshots/abc", "me/mine", True),
        ("s3://secret-bucket/base", "Qwen/Qwen-Image-Layered", False),
        ("/home/me/base", "Qwen/Qwen-Image-Layered", False),
    ],
)
def test_a_base_is_named_as_the_hub_names_it(base: str, name: str, known: bool) -> None:
    codes = programs(Recipe.model_validate({"name": "r", "model": {"base": base}}), steps=20)
    assert f'ModelRecipe(base="{name}", ' in codes["layerloop"]
    line = f'base = "{name}"' + ("\n" if known else "  # or the folder of the base")
    assert line in codes["diffusers"] and line in codes["peft"]
    for code in codes.values():
        assert "secret-bucket" not in code and "/home" not in code and "/hub" not in code
        compile(code, "card", "exec")


def test_programs_ask_for_layers_that_were_trained_for() -> None:
    def asked(low: int, high: int) -> int:
        rollout = {"min_layers": low, "max_layers": high}
        return layers_to_ask_for(Recipe.model_validate({"name": "r", "rollout": rollout}))

    assert [asked(2, 5), asked(2, 3), asked(6, 8), asked(4, 4)] == [4, 3, 6, 4]


def test_programs_give_the_prompt_of_training_whatever_its_letters() -> None:
    prompt = 'a "b" \\\\n\\ \r\n\t\u2028 {c} 猫'
    for program in programs(Recipe.model_validate(RECIPE | {"model": {"prompt": prompt}}), steps=3).values():
        texts = {node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)}
        assert prompt in texts


def test_on_the_hub_the_programs_name_the_repository(published: tuple[Path, str]) -> None:
    card = card_for_hub(published[1], "me/layers")
    first, second, third = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'adapter = "me/layers"\n' in first and 'adapter = "me/layers"\n' in second
    assert 'adapter = "hf://me/layers"\n' in third
    assert 'adapter = "."' not in card
