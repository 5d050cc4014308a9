"""The policy against diffusers' own pipeline, and against itself in other batches."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import diffusers.pipelines.qwenimage.pipeline_qwenimage_layered as upstream
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageLayeredPipeline
from PIL import Image

from layerloop.components.policy import sampling
from layerloop.components.policy.autoencoder import FrameDecoder
from layerloop.components.policy.lora import new_adapter, put_adapter, train_adapter
from layerloop.components.policy.model import Condition, LayeredPolicy
from layerloop.components.policy.sampling import Plan
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.learning import LoraRecipe
from layerloop.components.schema.recipe import ModelRecipe
from layerloop.components.schema.runtime import ModelRuntime

PROMPT = "a clean, well composed image"


@pytest.fixture(scope="module")
def pipeline(random_folder: Path) -> QwenImageLayeredPipeline:
    pipe = QwenImageLayeredPipeline.from_pretrained(random_folder, processor=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def decompose(  # type: ignore[no-untyped-def]
    pipe, image: np.ndarray, layers: int, steps: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """(final latents, pixels (L, 4, H, W)) of the pipeline, at the image's own size."""
    monkeypatch.setattr(upstream, "calculate_dimensions", lambda area, ratio: (image.shape[1], image.shape[0]))
    latents = []

    def keep(pipe, step, time, values):  # type: ignore[no-untyped-def]
        latents.append(values["latents"])
        return values

    out = pipe(
        image=Image.fromarray(image).convert("RGBA"), prompt=PROMPT, layers=layers, num_inference_steps=steps,
        true_cfg_scale=1.0, generator=torch.Generator().manual_seed(seed), output_type="pt", callback_on_step_end=keep,
    )  # fmt: skip
    return latents[-1], out.images[0]


@torch.no_grad()
def euler(policy: LayeredPolicy, condition: Condition, layers: int, steps: int, seed: int) -> torch.Tensor:
    plan = Plan(policy.sigmas(steps, condition.height, condition.width), outside="euler")
    noise = policy.noise(seed, layers, condition.height, condition.width)
    return sampling.deterministic(noise, lambda x, s: policy.velocity(x, s, condition), plan, range(steps))


@pytest.mark.parametrize(
    ("height", "width", "layers"), [(64, 64, 3), (64, 64, 1), (80, 32, 2), (48, 112, 4), (32, 32, 20)]
)
def test_one_image_equals_the_pipeline_bit_for_bit(
    pipeline, frozen_policy, prompt_embeds, make_image, monkeypatch, height, width, layers
) -> None:  # type: ignore[no-untyped-def]
    image = make_image(height, width)
    theirs, pixels = decompose(pipeline, image, layers, 6, 5, monkeypatch)
    condition = frozen_policy.encode(image[None], prompt_embeds)
    latents = euler(frozen_policy, condition, layers, 6, 5)
    assert torch.equal(latents, theirs)

    folded = frozen_policy.decode(latents, height, width)[0]
    assert folded.shape == (layers, 4, height, width)
    assert (folded - pixels).abs().max() < 1e-5
    rounded = (pixels * 255).round().permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(frozen_policy.layers_uint8(latents, height, width)[0].astype(int) - rounded).max() <= 1

    # all layers in one call and unfolded, as the pipeline decodes them
    monkeypatch.setattr(frozen_policy, "decoder", lambda frames: frozen_policy.vae.decode(frames).sample)
    assert torch.equal(frozen_policy.decode(latents, height, width)[0], pixels)


class HeunScheduler(FlowMatchEulerDiscreteScheduler):
    """Heun's method as a scheduler of the pipeline, which calls the model at each of `timesteps` and then `step`: every
    inner noise level is met twice, once to correct the step that leads there and once to begin the next."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None) -> None:  # type: ignore[no-untyped-def]
        super().set_timesteps(device=device, sigmas=sigmas, mu=mu)
        self.timesteps = self.timesteps.repeat_interleave(2)[1:]
        self.calls = 0

    def step(self, model_output, timestep, sample, return_dict=False):  # type: ignore[no-untyped-def]
        corrects, i = self.calls % 2 == 1, self.calls // 2
        self.calls += 1
        if corrects:
            return (self.pending[0] + (self.sigmas[i + 1] - self.sigmas[i]) * (0.5 * (self.pending[1] + model_output)),)
        self.pending = (sample, model_output)
        return (sample + (self.sigmas[i + 1] - self.sigmas[i]) * model_output,)


@pytest.mark.parametrize(("height", "width", "layers"), [(64, 64, 3), (48, 112, 1), (16, 48, 20)])
def test_heun_too_equals_the_pipeline_bit_for_bit(
    pipeline, frozen_policy, prompt_embeds, make_image, monkeypatch, height, width, layers
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(pipeline, "scheduler", HeunScheduler.from_config(pipeline.scheduler.config))
    image = make_image(height, width)
    theirs, _ = decompose(pipeline, image, layers, 5, 5, monkeypatch)
    condition = frozen_policy.encode(image[None], prompt_embeds)
    noise = frozen_policy.noise(5, layers, height, width)
    with torch.no_grad():
        plan = Plan(frozen_policy.sigmas(5, height, width), outside="heun")
        ours = sampling.deterministic(noise, lambda x, s: frozen_policy.velocity(x, s, condition), plan, range(5))
    assert pipeline.scheduler.calls == plan.nfe(1) == 9
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, euler(frozen_policy, condition, layers, 5, 5))


def test_the_prompt_embedding_is_the_pipelines(pipeline, prompt_embeds) -> None:  # type: ignore[no-untyped-def]
    theirs, mask = pipeline.encode_prompt(PROMPT)
    assert mask is None and torch.equal(prompt_embeds, theirs[0])


def test_a_batch_of_images_is_what_the_images_are_alone(
    pipeline, frozen_policy, prompt_embeds, make_image, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    """Where the pipeline gives 4 and 2 layers for two images of three layers each."""
    images = [make_image(seed=seed) for seed in (1, 2)]
    condition = frozen_policy.encode(np.stack(images), prompt_embeds)
    assert torch.equal(condition.latents[1:], frozen_policy.encode(images[1][None], prompt_embeds).latents)
    noise = torch.cat([frozen_policy.noise(seed, 3, 64, 64) for seed in (7, 8)])
    plan = Plan(frozen_policy.sigmas(6, 64, 64), outside="euler")
    stacks = frozen_policy.decode(sampling.rollout(frozen_policy, condition, noise, plan).final, 64, 64)
    for image, stack, seed in zip(images, stacks, (7, 8), strict=True):
        _, pixels = decompose(pipeline, image, 3, 6, seed, monkeypatch)
        assert (stack - pixels).abs().max() < 1e-4


def noisy(seed: int, tokens: int):  # type: ignore[no-untyped-def]
    return lambda c, j: torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(1000 * seed + 10 * c + j))


@pytest.mark.parametrize(("layers", "height", "width", "start"), [(1, 32, 32, 0), (3, 64, 64, 2), (5, 48, 64, 1)])
def test_results_are_identical_for_any_batch_size(
    policy, prompt_embeds, make_image, shake, layers, height, width, start
) -> None:  # type: ignore[no-untyped-def]
    put_adapter(policy.transformer, new_adapter(policy.transformer, LoraRecipe(), seed=1))
    shake(policy.transformer)
    condition = policy.encode(make_image(height, width)[None], prompt_embeds)
    noise = torch.cat([policy.noise(seed, layers, height, width) for seed in range(7)])
    plan = Plan(policy.sigmas(5, height, width), start, 2, "flow_sde", (0.7, 0.7))
    z = noisy(layers, noise.shape[1])
    full = sampling.rollout(policy, condition, noise, plan, step_noise=z, batch_size=7)
    for batch_size in (1, 2, 3, 4, 5, 6, 8):
        part = sampling.rollout(policy, condition, noise, plan, step_noise=z, batch_size=batch_size)
        assert torch.equal(part.window, full.window) and torch.equal(part.final, full.final), batch_size
    assert full.window.shape == (7, 3, noise.shape[1], 64)
    stacks = policy.decode(full.final, height, width)
    assert torch.equal(policy.decode(full.final[3:4], height, width)[0], stacks[3])


def test_a_result_does_not_depend_on_the_other_rows(frozen_policy, condition) -> None:  # type: ignore[no-untyped-def]
    noise = torch.cat([frozen_policy.noise(seed, 2, 64, 64) for seed in range(6)])
    plan = Plan(frozen_policy.sigmas(4, 64, 64))
    full = sampling.rollout(frozen_policy, condition, noise, plan, batch_size=6)
    turned = sampling.rollout(frozen_policy, condition, noise.flip(0), plan, batch_size=4)
    assert torch.equal(turned.final.flip(0), full.final)


def test_a_shared_prefix_is_what_every_candidate_would_have_computed(frozen_policy, condition) -> None:  # type: ignore[no-untyped-def]
    noise = frozen_policy.noise(1, 2, 64, 64)
    sigmas = frozen_policy.sigmas(6, 64, 64)
    z = noisy(3, noise.shape[1])
    shared = sampling.rollout(
        frozen_policy,
        condition,
        noise,
        Plan(sigmas, 3, 2, "cps", (0.8, 0.8), share_prefix=True),
        step_noise=z,
        candidates=4,
    )
    apart = sampling.rollout(
        frozen_policy, condition, noise.expand(4, -1, -1), Plan(sigmas, 3, 2, "cps", (0.8, 0.8)), step_noise=z
    )
    assert torch.equal(shared.window[0, 0], shared.window[3, 0])
    assert (shared.window - apart.window).abs().max() < 2e-5 and (shared.final - apart.final).abs().max() < 2e-5
    assert (shared.final[0] - shared.final[1]).abs().max() > 0.01  # their own noise sets candidates apart
    assert shared.nfe < apart.nfe


def test_the_stored_window_replays_to_the_next_latents(frozen_policy, condition) -> None:  # type: ignore[no-untyped-def]
    noise = torch.cat([frozen_policy.noise(seed, 2, 64, 64) for seed in range(4)])
    plan = Plan(frozen_policy.sigmas(6, 64, 64), 0, 3, "flow_sde", (0.9, 0.6, 0.3))
    z = noisy(9, noise.shape[1])
    window = sampling.rollout(frozen_policy, condition, noise, plan, step_noise=z).window
    assert torch.equal(window[:, 0], noise)
    for j, i in enumerate(plan.window):
        with torch.no_grad():
            v = frozen_policy.velocity(window[:, j], plan.sigmas[i], condition)
        noise = torch.cat([z(c, j) for c in range(4)])
        step = sampling.stochastic_step(window[:, j], v, noise, plan.sigmas, i, plan.etas[j], plan.dynamics)
        assert torch.equal(step, window[:, j + 1])


def test_without_a_window_only_final_latents_remain(frozen_policy, condition) -> None:  # type: ignore[no-untyped-def]
    noise = torch.cat([frozen_policy.noise(seed, 2, 64, 64) for seed in range(2)])
    trajectory = sampling.rollout(frozen_policy, condition, noise, Plan(frozen_policy.sigmas(3, 64, 64)))
    assert trajectory.window.shape == (2, 0, noise.shape[1], 64) and trajectory.nfe == 2 * 5


def test_the_model_sees_the_time_that_the_pipeline_would_show_it(base_recipe, prompt_embeds, make_image) -> None:  # type: ignore[no-untyped-def]
    """In bfloat16 the pipeline rounds 1000 sigma before it divides: 711.6 becomes 712."""
    policy = LayeredPolicy.load(base_recipe.model_copy(update={"dtype": "bfloat16"}))
    condition = policy.encode(make_image()[None], prompt_embeds)
    seen = []
    policy.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    schedule = policy.sigmas(20, 64, 64)
    noise = policy.noise(0, 1, 64, 64)
    with torch.no_grad():
        for sigma in schedule[:-1]:
            velocity = policy.velocity(noise, sigma, condition)
            both = policy.velocity(noise.expand(2, -1, -1), torch.tensor([sigma, schedule[0]]), condition)
    assert velocity.dtype == both.dtype == torch.float32
    times = torch.tensor(schedule[:-1]) * 1000
    expected = times.to(torch.bfloat16) / 1000
    assert torch.equal(torch.cat(seen[::2]), expected) and torch.equal(torch.stack(seen[1::2])[:, 0], expected)
    assert not torch.equal(expected, (times / 1000).to(torch.bfloat16))  # the order of rounding matters here


def test_one_time_for_the_batch_is_that_time_for_each_row(frozen_policy, condition) -> None:  # type: ignore[no-untyped-def]
    noise = torch.cat([frozen_policy.noise(seed, 2, 64, 64) for seed in range(3)])
    with torch.no_grad():
        one = frozen_policy.velocity(noise, 0.5, condition)
        each = frozen_policy.velocity(noise, torch.full((3,), 0.5), condition)
        mixed = frozen_policy.velocity(noise, torch.tensor([0.5, 0.9, 0.5]), condition)
    assert (one - each).abs().max() < 1e-5
    assert (one[1] - mixed[1]).abs().max() > 1e-4 and (one[2] - mixed[2]).abs().max() < 1e-5


def test_noise_is_of_the_seed_alone(frozen_policy) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    first = frozen_policy.noise(3, 2, 32, 64)
    torch.manual_seed(1)
    assert torch.equal(first, frozen_policy.noise(3, 2, 32, 64)) and first.shape == (1, 3 * 8, 64)
    assert not torch.equal(first, frozen_policy.noise(4, 2, 32, 64))


@pytest.mark.parametrize("layers", [1, 20])
def test_any_number_of_layers_and_any_aspect_ratio(frozen_policy, prompt_embeds, make_image, layers) -> None:  # type: ignore[no-untyped-def]
    for height, width in ((16, 16), (16, 96), (80, 48)):
        condition = frozen_policy.encode(make_image(height, width)[None], prompt_embeds)
        noise = frozen_policy.noise(0, layers, height, width)
        final = sampling.rollout(frozen_policy, condition, noise, Plan(frozen_policy.sigmas(2, height, width))).final
        stack = frozen_policy.layers_uint8(final, height, width)
        assert stack.shape == (1, layers, height, width, 4) and stack.dtype == np.uint8 and stack.std() > 0


def test_an_rgb_image_is_conditioned_on_as_opaque_rgba(frozen_policy, prompt_embeds, make_image) -> None:  # type: ignore[no-untyped-def]
    rgb = make_image()
    rgba = np.concatenate([rgb, np.full((64, 64, 1), 255, np.uint8)], axis=-1)
    a, b = (frozen_policy.encode(image[None], prompt_embeds).latents for image in (rgb, rgba))
    assert torch.equal(a, b) and a.dtype == torch.float32
    rgba[..., 3] = 0
    assert not torch.equal(a, frozen_policy.encode(rgba[None], prompt_embeds).latents)


def test_a_side_that_is_not_a_multiple_is_named(frozen_policy, prompt_embeds) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LayerloopError, match=r"image width is 72 pixels: the model needs a multiple of 16"):
        frozen_policy.encode(np.zeros((1, 64, 72, 3), np.uint8), prompt_embeds)
    with pytest.raises(ValueError, match="not uint8"):
        frozen_policy.encode(np.zeros((1, 64, 64, 3), np.float32), prompt_embeds)


# ---- autoencoder


@pytest.mark.parametrize("temporal", [[False, True, True], [False, False, False]])
def test_folded_decoding_equals_the_vae(temporal: list[bool]) -> None:
    """Also where the VAE halves time, as the released one does: that never acts on a first frame."""
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=16, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=temporal, input_channels=4
    ).eval()
    latents = torch.randn(3, 16, 1, 4, 6)
    with torch.no_grad():
        expected = torch.cat([vae.decode(one).sample for one in latents.split(1)])
        assert torch.equal(FrameDecoder(vae, fold=False)(latents), expected)
        folded = FrameDecoder(vae)(latents)
    assert folded.shape == (3, 4, 1, 32, 48) and (folded - expected).abs().max() < 1e-5
    assert not any(isinstance(module, torch.nn.Conv3d) for module in FrameDecoder(vae).modules())
    assert isinstance(vae.decoder.conv_in, torch.nn.Conv3d)  # the VAE itself is as it was


# ---- precision, memory, speed


def gradient(policy: LayeredPolicy, condition: Condition) -> dict[str, torch.Tensor]:
    noise = torch.cat([policy.noise(seed, 2, 64, 64) for seed in range(2)])
    policy.velocity(noise, 0.8, condition).square().mean().backward()
    return {name: p.grad.clone() for name, p in policy.trainable_parameters().items() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(base_recipe, prompt_embeds, make_image, shake) -> None:  # type: ignore[no-untyped-def]
    gradients = []
    for checkpointing in (False, True):
        policy = LayeredPolicy.load(base_recipe, ModelRuntime(gradient_checkpointing=checkpointing))
        assert policy.transformer.is_gradient_checkpointing == checkpointing
        put_adapter(policy.transformer, new_adapter(policy.transformer, LoraRecipe(rank=2), seed=0))
        shake(policy.transformer)
        gradients.append(gradient(policy, policy.encode(make_image()[None], prompt_embeds)))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("fp8", [False, True])
def test_the_adapter_is_float32_on_a_base_of_any_precision(base_recipe, prompt_embeds, make_image, shake, fp8) -> None:  # type: ignore[no-untyped-def]
    update = {"dtype": "bfloat16", "fp8_base": fp8}
    policy = LayeredPolicy.load(base_recipe.model_copy(update=update))
    put_adapter(policy.transformer, new_adapter(policy.transformer, LoraRecipe(rank=2), seed=0))
    shake(policy.transformer)
    parameters = policy.trainable_parameters()
    assert parameters and all(p.dtype == torch.float32 and ".lora_" in name for name, p in parameters.items())
    frozen = {p.dtype for name, p in policy.transformer.named_parameters() if name not in parameters}
    assert frozen == ({torch.bfloat16, torch.float8_e4m3fn} if fp8 else {torch.bfloat16})
    condition = policy.encode(make_image()[None], prompt_embeds)
    gradients = gradient(policy, condition)
    assert gradients.keys() == parameters.keys()
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() and g.any() for g in gradients.values())

    exact = LayeredPolicy.load(base_recipe)
    put_adapter(exact.transformer, new_adapter(exact.transformer, LoraRecipe(rank=2), seed=0))
    shake(exact.transformer)
    noise = policy.noise(0, 2, 64, 64)
    with torch.no_grad():
        difference = policy.velocity(noise, 0.8, condition) - exact.velocity(noise, 0.8, condition)
        scale = exact.velocity(noise, 0.8, condition).std()
    assert difference.std() < (0.2 if fp8 else 0.06) * scale


def test_without_the_adapter_the_policy_is_the_base_bit_for_bit(policy, frozen_policy, condition, shake) -> None:  # type: ignore[no-untyped-def]
    noise = policy.noise(0, 2, 64, 64)
    with torch.no_grad():
        base = frozen_policy.velocity(noise, 0.7, condition)
        with policy.without_adapter():  # there is none yet
            assert torch.equal(policy.velocity(noise, 0.7, condition), base)
        put_adapter(policy.transformer, new_adapter(policy.transformer, LoraRecipe(), seed=1))
        assert torch.equal(policy.velocity(noise, 0.7, condition), base)  # B is zero
        shake(policy.transformer)
        adapted = policy.velocity(noise, 0.7, condition)
        with policy.without_adapter():
            assert torch.equal(policy.velocity(noise, 0.7, condition), base)
        assert torch.equal(policy.velocity(noise, 0.7, condition), adapted)
    assert (adapted - base).abs().max() > 1e-3


@pytest.mark.parametrize("trainable", [True, False], ids=["learning", "frozen"])
def test_without_the_adapter_nothing_becomes_trainable(policy, trainable) -> None:  # type: ignore[no-untyped-def]
    put_adapter(policy.transformer, new_adapter(policy.transformer, LoraRecipe(), seed=1))
    train_adapter(policy.transformer, trainable)
    before = policy.trainable_parameters().keys()
    with policy.without_adapter():
        pass
    assert policy.trainable_parameters().keys() == before
    assert bool(before) == trainable


@pytest.mark.slow
def test_compiled_blocks_take_all_that_a_campaign_asks_of_them_and_change_no_bit(
    base_recipe, prompt_embeds, make_image, shake, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    """Base, rollouts of any L, replay, gradients, the adapter switched off, on a base in float8: more variants than the
    8 that dynamo expects, each traced as one full graph. Code generation is left out: it takes minutes on a CPU."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # pytest would keep megabytes of it
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: compiled(block, backend="eager", **how))
    recipe = base_recipe.model_copy(update={"dtype": "bfloat16", "fp8_base": True})
    image = make_image(32, 32)

    def outputs(policy: LayeredPolicy) -> list[torch.Tensor]:
        condition, found = policy.encode(image[None], prompt_embeds), []

        def run(layers: int, sigma: float | torch.Tensor = 0.7, *, learn: bool = False) -> None:
            noise = torch.cat([policy.noise(seed, layers, 32, 32) for seed in range(2)])
            with torch.set_grad_enabled(learn):
                found.append(policy.velocity(noise, sigma, condition))
            if learn:
                found[-1].square().mean().backward()
                found[-1] = torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values()])

        run(2)
        put_adapter(policy.transformer, new_adapter(policy.transformer, LoraRecipe(rank=2), seed=0))
        shake(policy.transformer)
        times = torch.tensor([0.9, 0.6])
        run(2), run(3), run(5), run(2, times), run(4, times, learn=True), run(3, times, learn=True)
        with policy.without_adapter():
            run(2, times)
        return found

    expected = outputs(LayeredPolicy.load(recipe))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # restored afterwards
        policy = LayeredPolicy.load(recipe, ModelRuntime(compile=True))
        assert all(block._compiled_call_impl is not None for block in policy.transformer.transformer_blocks)
        assert all(torch.equal(a, b) for a, b in zip(expected, outputs(policy), strict=True))


def test_every_attention_layer_has_the_runtimes_backend(base_recipe, frozen_policy, condition) -> None:  # type: ignore[no-untyped-def]
    """Rollout, update and evaluation all load the policy here, so what one of them runs the others do."""
    policy = LayeredPolicy.load(base_recipe, ModelRuntime(attention="_native_math"))
    backends = {block.attn.processor._attention_backend for block in policy.transformer.transformer_blocks}
    assert [backend.value for backend in backends] == ["_native_math"]
    noise = policy.noise(0, 2, 64, 64)
    with torch.no_grad():
        assert torch.allclose(
            policy.velocity(noise, 0.7, condition), frozen_policy.velocity(noise, 0.7, condition), atol=1e-5
        )


def test_an_unknown_attention_backend_is_refused_in_one_line(base_recipe: ModelRecipe) -> None:
    with pytest.raises(LayerloopError, match=r"runtime\.model\.attention is 'telepathy'"):
        LayeredPolicy.load(base_recipe, ModelRuntime(attention="telepathy"))


def test_velocity_refuses_tokens_that_are_no_whole_frames(frozen_policy, condition) -> None:  # type: ignore[no-untyped-def]
    for tokens in (16, 40):
        with pytest.raises(ValueError, match="not \\(L\\+1\\) frames"):
            frozen_policy.velocity(torch.zeros(1, tokens, 64), 0.5, condition)
    assert math.isfinite(float(frozen_policy.velocity(torch.zeros(1, 32, 64), 0.5, condition).sum()))
