"""A publication in other people's programs: new processes with diffusers or peft and nothing of layerloop."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from warm_python import warm

from layerloop.components.policy.adapters import read_adapter
from layerloop.components.policy.lora import put_adapter
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.publish_adapter.step import run
from layerloop.components.storage.campaign import Campaign

from ..campaigns import policy_folder, prompt_embeds
from .conftest import MakeCampaign, velocity

LOADING = {
    "diffusers": "pipeline.load_lora_weights(place)",
    "the bfloat16 copy": 'pipeline.load_lora_weights(place, weight_name="pytorch_lora_weights.bf16.safetensors")',
    "peft": "from peft import PeftModel; "
    'pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, place, subfolder="peft")',
}
PROGRAM = """
import sys

import torch
from diffusers import QwenImageLayeredPipeline
from safetensors.torch import load_file, save_file

base, place, inputs, output, *ways = sys.argv[1:]
given, velocities = load_file(inputs), {}
for way in ways:
    pipeline = QwenImageLayeredPipeline.from_pretrained(base, processor=None, local_files_only=True)
    exec(way)
    with torch.no_grad():
        velocity = pipeline.transformer(
            hidden_states=given["hidden"], timestep=given["time"], encoder_hidden_states=given["prompt"],
            encoder_hidden_states_mask=None, img_shapes=[[(1, 2, 3)] * 4], return_dict=False,
            additional_t_cond=torch.zeros(1, dtype=torch.long),
        )[0]
    velocities[way] = velocity[:, : 3 * 6].contiguous()
save_file(velocities, output)
assert not [name for name in sys.modules if name.startswith("layerloop")], "nothing of layerloop"
"""
REVISION = "a" * 40


@pytest.fixture
def campaign(make_campaign: MakeCampaign) -> Campaign:
    """A campaign with alpha 8 on rank 4, published as `adapter`."""
    campaign = make_campaign()
    run(campaign=campaign.uri, publish_as="adapter")
    return campaign


def their_velocities(
    campaign: Campaign, place: str, ways: Sequence[str], folder: Path, *, python: str, **environment: str
) -> list[torch.Tensor]:
    """The velocity of `conftest.velocity` by a new process that loads the adapter from `place`, in one way after the
    other, into a new pipeline each."""
    from safetensors.torch import save_file

    policy = LayeredPolicy.load(campaign.recipe.model)
    seen = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1))
    time = torch.tensor([0.8], dtype=torch.float32) * 1000
    hidden = torch.cat([policy.noise(3, 2, 32, 48), seen], dim=1)
    save_file({"hidden": hidden, "time": time / 1000, "prompt": prompt_embeds()[None]}, folder / "inputs.safetensors")
    output = folder / "output.safetensors"
    files = [str(folder / "inputs.safetensors"), str(output)]
    done = subprocess.run(
        [python, "-c", PROGRAM, campaign.recipe.model.base, place, *files, *ways],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "more than one weights file" not in done.stderr
    velocities = load_file(output)
    return [velocities[way] for way in ways]


def ours(campaign: Campaign) -> tuple[torch.Tensor, torch.Tensor]:
    """Velocities of the base and of the campaign's adapter."""
    policy = LayeredPolicy.load(campaign.recipe.model)
    base = velocity(policy)
    put_adapter(policy.transformer, read_adapter(policy_folder(campaign, 1)))
    return base, velocity(policy)


def test_a_published_folder_is_loaded_as_it_stands(campaign: Campaign, tmp_path: Path) -> None:
    base, tuned = ours(campaign)
    found = their_velocities(
        campaign, f"{campaign.uri}/published/adapter", list(LOADING.values()), tmp_path, python=warm()
    )
    effect = (tuned - base).square().mean().sqrt()
    assert effect > 0.01
    for library, theirs in zip(LOADING, found, strict=True):
        allowed = 0.01 if library == "the bfloat16 copy" else 1e-5  # its weights have 8 bits
        assert (theirs - tuned).square().mean().sqrt() < allowed * effect, library


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[str]:
    """A server that gives `folder` as the repository owner/name, by the requests that huggingface_hub makes."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    siblings = [{"rfilename": name} for name in sorted(files)]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, headers, body = self.path.split("?")[0], {}, b""
            name = path.partition("/resolve/")[2].partition("/")[2]
            if path.startswith("/api/models/owner/name"):
                body = json.dumps({"id": "owner/name", "sha": REVISION, "siblings": siblings}).encode()
                headers["Content-Type"] = "application/json"
            elif path.startswith("/owner/name/resolve/") and name in files:
                body = files[name].read_bytes()
                headers |= {"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
            else:
                self.send_error(404)
                return
            self.send_response(200)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("library", ["diffusers", "peft"])
def test_a_repository_of_the_hub_is_loaded_by_its_name(campaign: Campaign, tmp_path: Path, library: str) -> None:
    _, tuned = ours(campaign)
    with hub(Path(campaign.uri) / "published/adapter") as endpoint:
        environment = {
            "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        (found,) = their_velocities(
            campaign, "owner/name", [LOADING[library]], tmp_path, python=sys.executable, **environment
        )
    assert (found - tuned).abs().max() < 1e-5
