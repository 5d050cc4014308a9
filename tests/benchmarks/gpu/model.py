"""The policy at real size with random weights, made on the GPU without any download; and the same at tiny size."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

from layerloop.components.policy.float8 import use_float8
from layerloop.components.policy.lora import new_adapter, put_adapter, train_adapter
from layerloop.components.policy.model import Condition, LayeredPolicy
from layerloop.components.policy.size import AdapterSize, Tokens, TransformerSize
from layerloop.components.policy.tiny import build_tiny_pipeline
from layerloop.components.schema.learning import LoraRecipe

Kind = Literal["plain", "float8", "compiled"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured: at real size on a GPU, or at tiny size wherever the tests run."""

    name: str
    size: TransformerSize
    dtype: torch.dtype
    pixels: int
    layers: tuple[int, ...]
    matmul: int  # side of the square matrices
    repeats: int
    groups: tuple[int, ...]  # layers of the groups of the resident iteration
    group_size: int
    attention: tuple[str, ...]  # backends to try
    backend: str  # of torch.compile


REAL = Setting(
    name="real", size=TransformerSize(), dtype=torch.bfloat16, pixels=640, layers=(2, 3, 4, 5), matmul=8192, repeats=5,
    groups=(2, 3, 4), group_size=2, attention=("native", "_native_cudnn", "_native_flash", "flash", "_flash_3"),
    backend="inductor",
)  # fmt: skip
TINY = Setting(
    name="tiny", size=TransformerSize(blocks=2, heads=1, head_dim=16, text_width=16), dtype=torch.float32, pixels=32,
    layers=(1, 2), matmul=64, repeats=2, groups=(1, 2, 2), group_size=2, attention=("native", "_native_math"),
    backend="eager",
)  # fmt: skip
PROMPT_TOKENS = 11


class Bench:
    """One device, and one policy on it at a time."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device
        self._kind: Kind | None = None
        self._policy: LayeredPolicy | None = None

    @property
    def adapter(self) -> AdapterSize:
        """The paper's adapter on this size."""
        return AdapterSize.of(self.setting.size, rank=LoraRecipe().rank, targets=LoraRecipe().targets)

    def tokens(self, layers: int) -> Tokens:
        """Of one candidate."""
        side = self.setting.pixels // 16
        return Tokens(layers, side, side, PROMPT_TOKENS)

    def forward_operations(self, layers: int) -> float:
        """Of one forward pass."""
        return self.setting.size.forward(self.tokens(layers), self.adapter)

    def update_operations(self, layers: int, *, checkpointing: bool) -> float:
        """Of one point: forward and backward, and what checkpointing repeats."""
        return (1 + checkpointing) * self.forward_operations(layers) + self.setting.size.backward(
            self.tokens(layers), self.adapter
        )

    def policy(self, kind: Kind) -> LayeredPolicy:
        """The policy with an adapter, in a kind; the one before is let go first."""
        if self._kind != kind:
            self._policy, self._kind = None, None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._policy, self._kind = build(self.setting, self.device, kind), kind
        assert self._policy is not None
        return self._policy

    def condition(self, layers: int) -> tuple[Condition, torch.Tensor]:
        """A condition and a candidate's latents."""
        policy, side = self.policy(self._kind or "plain"), self.setting.pixels
        prompt = torch.randn(1, PROMPT_TOKENS, self.setting.size.text_width, generator=torch.Generator().manual_seed(0))
        seen = policy.noise(1, 0, side, side).to(self.device)
        condition = Condition(seen, prompt.to(self.device, policy.dtype), side, side)
        return condition, policy.noise(0, layers, side, side).to(self.device)

    def seconds(self, run: Callable[[], Any], *, repeats: int | None = None) -> float:
        """The quickest of some runs, after one that is not counted, until the device has ended each."""
        run()
        found = []
        for _ in range(repeats or self.setting.repeats):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            found.append(time.perf_counter() - start)
        return min(found)

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget_peak(self) -> None:
        """Begin to watch the most memory anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gb(self) -> float | None:
        """The most memory since, of tensors on a GPU."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else None


@torch.no_grad()
def build(setting: Setting, device: torch.device, kind: Kind) -> LayeredPolicy:
    """A policy of the setting's size whose weights are drawn on the device, block by block in float8."""
    from accelerate import init_empty_weights

    size, part = setting.size, setting.size.head_dim // 8
    with init_empty_weights():
        transformer = QwenImageTransformer2DModel(
            num_layers=size.blocks, num_attention_heads=size.heads, attention_head_dim=size.head_dim,
            joint_attention_dim=size.text_width, axes_dims_rope=(2 * part, 3 * part, 3 * part), in_channels=64,
            out_channels=16, use_additional_t_cond=True, use_layer3d_rope=True,
        )  # fmt: skip
        vae = None if setting.name == "tiny" else AutoencoderKLQwenImage(input_channels=4)
    vae = build_tiny_pipeline(vae_dim=4, blocks=1, heads=1, head_dim=16).vae if vae is None else vae
    if kind == "float8":
        use_float8(transformer)
    for module in (*transformer.modules(), *vae.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                drawn = _drawn(parameter, device, setting.dtype)
                if parameter.dim() == 2 and hasattr(module, "store"):
                    module.store(drawn)
                else:
                    setattr(module, name, torch.nn.Parameter(drawn, requires_grad=False))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5, use_dynamic_shifting=False)
    policy = LayeredPolicy(
        transformer=transformer.to(device), vae=vae.to(device, setting.dtype), scheduler=scheduler
    )  # fmt: skip
    put_adapter(policy.transformer, new_adapter(policy.transformer, LoraRecipe(), seed=0))
    train_adapter(policy.transformer, True)
    policy.transformer.enable_gradient_checkpointing()
    if kind == "compiled":
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        policy.transformer.compile_repeated_blocks(fullgraph=True, backend=setting.backend)
    return policy


def _drawn(parameter: torch.nn.Parameter, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Values that keep activations finite: weights of 0.02, ones for norms; the speed depends on neither."""
    empty = torch.empty(parameter.shape, device=device, dtype=dtype)
    return empty.normal_(std=0.02) if parameter.dim() > 1 else empty.fill_(1.0)
