"""Pretraining computes what diffusers' modules compute, continues where it stopped, and ends in a folder that loads."""

import json

import numpy as np
import pytest
import torch

from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.stack import flatten
from layerloop.components.policy.tiny import PROMPT, build_tiny_pipeline
from layerloop.components.research.pretraining.attention import real_arithmetic
from layerloop.components.research.pretraining.autoencoder import (
    autoencoder_loss,
    decode_frames,
    encode_frames,
    prepare_autoencoder,
)
from layerloop.components.research.pretraining.measure import compare, composite_everywhere, contact_sheet, sample
from layerloop.components.research.pretraining.stages import main
from layerloop.components.research.pretraining.training import Schedule, Training, learning_rate
from layerloop.components.research.pretraining.transformer import (
    draw_sigmas,
    encode_designs,
    flow_loss,
    normalise,
    pack,
)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = build_tiny_pipeline(vae_dim=8, blocks=2, heads=2)
    generator = torch.Generator().manual_seed(0)
    for parameter in pipeline.vae.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return pipeline


@pytest.fixture(scope="module")
def prompt(pipeline):
    return pipeline.encode_prompt(PROMPT)[0].detach()


@torch.no_grad()
def test_frames_are_encoded_and_decoded_as_videos_of_one_frame(pipeline):
    vae = pipeline.vae
    frames = torch.rand(2, 4, 48, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, log_variance = encode_frames(vae, frames)
    expected = vae.encode(frames[:, :, None]).latent_dist
    assert torch.allclose(mean, expected.mean[:, :, 0], atol=1e-4)
    assert torch.allclose(log_variance, expected.logvar[:, :, 0], atol=1e-4)
    assert torch.allclose(
        decode_frames(vae, mean).clamp(-1, 1), vae.decode(mean[:, :, None]).sample[:, :, 0], atol=1e-4
    )


def test_a_prepared_autoencoder_keeps_the_scale_of_its_signal():
    vae = build_tiny_pipeline().vae
    prepare_autoencoder(vae, seed=0)
    frames = torch.rand(4, 4, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents, _ = encode_frames(vae, frames)
        out = decode_frames(vae, latents)
    assert 0.2 < latents.std() < 3
    assert 0.1 < out.std() < 3


def test_a_pretraining_follows_from_its_seed():
    """The autoencoder's start too: it is drawn from a generator of its own, not from torch's."""
    weights = []
    for seed in (1, 1, 2):
        vae = build_tiny_pipeline(vae_dim=8, blocks=1, heads=1).vae
        prepare_autoencoder(vae, seed=seed)
        weights.append(vae.decoder.conv_in.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_colour_counts_by_alpha_in_the_loss():
    target = torch.zeros(1, 4, 2, 2)
    target[:, 3] = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # the upper half is opaque, the lower clear
    upper, lower = target.clone(), target.clone()
    upper[:, :3, 0], lower[:, :3, 1] = 1.0, 1.0
    assert autoencoder_loss(target, target)["rgb_l1"] == 0
    ratio = autoencoder_loss(upper, target)["rgb_l1"] / autoencoder_loss(lower, target)["rgb_l1"]
    assert ratio == pytest.approx(20)
    assert autoencoder_loss(upper, target)["alpha_l1"] == 0


def test_latents_are_packed_as_the_pipeline_packs_them(pipeline):
    latents = torch.randn(3, 16, 6, 4, generator=torch.Generator().manual_seed(0))
    expected = type(pipeline)._pack_latents(latents[:, None], 3, 16, 6, 4, 1)
    assert (pack(latents) == expected).all()


def test_real_rotations_give_the_transformers_own_output_and_are_taken_back(pipeline, prompt):
    stacks = render_sketches(np.random.default_rng(0), count=3, layers=2, size=(64, 48))
    data = encode_designs(pipeline.vae, stacks)
    x0 = data.frames.float()
    noise, sigmas = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        before = flow_loss(pipeline.transformer, data, x0, noise, sigmas, prompt)
        with real_arithmetic(pipeline.transformer):
            inside = flow_loss(pipeline.transformer, data, x0, noise, sigmas, prompt)
        after = flow_loss(pipeline.transformer, data, x0, noise, sigmas, prompt)
    assert inside == pytest.approx(before.item(), rel=1e-5)
    assert after == before


def test_encoded_designs_begin_with_the_condition(pipeline):
    stacks = render_sketches(np.random.default_rng(0), count=2, layers=3, size=(32, 64))
    data = encode_designs(pipeline.vae, stacks)
    assert data.grid == (4, 2)
    assert data.shapes == [(1, 4, 2)] * 5
    assert data.frames.shape == (2, 4 * 8, 64)
    composites = np.concatenate([flatten(stacks, "black"), np.full((2, 64, 32, 1), 255, np.uint8)], axis=-1)
    with torch.no_grad():
        mean, _ = encode_frames(pipeline.vae, torch.from_numpy(composites).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert torch.allclose(data.frames[:, :8].float(), pack(normalise(pipeline.vae, mean)), atol=0.1)  # bfloat16


def test_noise_levels_lie_where_the_shifted_sampler_steps():
    sigmas = draw_sigmas(torch.Generator().manual_seed(0), 4000, shift=2.5, even=0.0)
    assert sigmas.min() > 0 and sigmas.max() <= 1
    assert sigmas.median() == pytest.approx(2.5 * 0.5 / (1 + 1.5 * 0.5), abs=0.01)


def test_figures_of_the_truth_are_perfect_and_of_the_composite_are_not():
    truth = render_sketches(np.random.default_rng(3), count=4, layers=3, size=(64, 64))
    figures = compare(truth, truth)
    assert figures == {
        "alpha_iou": 1,
        "alpha_iou_0": 1,
        "rgb_l1": 0,
        "rgb_l1_0": 0,
        "blank": 0,
        "recomposition": 0,
    }
    trivial = compare(composite_everywhere(truth), truth)
    assert trivial["recomposition"] == 0 and trivial["alpha_iou_0"] == 1
    assert trivial["alpha_iou"] < 0.5 and trivial["rgb_l1"] > 0.02
    empty = truth.copy()
    empty[:, 1:, ..., 3] = 0
    assert compare(empty, truth)["blank"] == 2
    assert contact_sheet(truth, zoom=2).shape == (4 * 128, 4 * 128, 3)


def test_the_sampler_recovers_data_from_an_exact_velocity(pipeline, prompt, monkeypatch):
    """With v = eps - x0 known, Heun must end at x0 for any steps: the layers are then what the autoencoder keeps."""
    stacks = render_sketches(np.random.default_rng(0), count=2, layers=2, size=(32, 32))
    data = encode_designs(pipeline.vae, stacks)
    x0 = data.frames.float()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))

    def exact(*, hidden_states, **others):
        return (torch.cat([noise - x0, hidden_states[:, x0.shape[1] :]], dim=1),)

    monkeypatch.setattr(pipeline.transformer, "forward", exact)
    made = sample(pipeline, data, prompt, steps=3, seed=5)
    with torch.no_grad():
        images = torch.from_numpy(stacks.reshape(4, 32, 32, 4)).permute(0, 3, 1, 2).float() / 127.5 - 1
        kept = decode_frames(pipeline.vae, encode_frames(pipeline.vae, images)[0]).clamp(-1, 1)
    kept = ((kept + 1) * 127.5).permute(0, 2, 3, 1).numpy().reshape(made.shape)
    assert np.abs(made - kept).mean() < 3  # levels of 255; the encoder ran in bfloat16


def test_the_learning_rate_warms_up_and_decays():
    rates = [learning_rate(progress, 1.0) for progress in (0.0, 0.01, 0.02, 0.5, 1.0)]
    assert rates[0] < rates[1] < rates[2] == 1.0 > rates[3] > rates[4] == pytest.approx(0.01)


def test_a_training_continues_with_its_optimizer_and_average(tmp_path):
    def make():
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)
        return module, Training("line", module, Schedule(work=tmp_path, steps=20, batch=8, peak=0.1, seed=0), decay=0.9)

    x, y = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.ones(8, 1)
    module, training = make()
    for _ in range(5):
        training.advance((module(x) - y).square().mean())
    training.save()
    again, resumed = make()
    assert (resumed.step, resumed.spent) == (5, training.spent)
    for one, trained in ((training, module), (resumed, again)):
        one.advance((trained(x) - y).square().mean())
    assert torch.equal(again.weight, module.weight)
    for average, expected in zip(resumed.average.shadow, training.average.shadow, strict=True):
        assert torch.equal(average, expected)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_pretrains_exports_and_continues(tmp_path, capsys):
    command = [
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "tiny"),
        "--frames-from",
        "8",
        "--designs",
        "24",
    ]
    command += ["--autoencoder-steps", "3", "--transformer-steps", "4", "--decoder-steps", "2", "--measured", "1"]
    main([*command, "--seed", "1"])
    figures = json.loads((tmp_path / "tiny" / "pretraining.json").read_text())
    assert figures["policy"].keys() == {"2", "3", "4", "5"}
    assert (tmp_path / "work" / "sheet.png").exists()

    from diffusers import QwenImageLayeredPipeline

    loaded = QwenImageLayeredPipeline.from_pretrained(tmp_path / "tiny", processor=None, dtype=torch.float32)
    assert loaded.vae.config.latents_std != [1.0] * 16
    assert not list(tmp_path.glob(".tiny*"))

    capsys.readouterr()
    main([*command, "--seed", "1", "--stages", "autoencoder", "transformer", "--transformer-steps", "6"])
    said = capsys.readouterr().out
    assert "autoencoder: continues at step 3" in said and "transformer: continues at step 4" in said


def test_a_stage_whose_input_lacks_says_which_to_run_first(tmp_path):
    with pytest.raises(SystemExit, match="run the stage `autoencoder` first"):
        main(["--work", str(tmp_path), "--out", str(tmp_path / "tiny"), "--stages", "transformer"])
