"""The transformer in numbers: parameters, floating-point operations and bytes of a forward pass and of an update.

Everything follows from the model's config by arithmetic, without torch and without a GPU, so that a plan can be made
anywhere; a test holds the operations equal to what torch's `FlopCounterMode` counts on the meta device.

h, w are packed tokens of one frame (16 pixels each), T prompt tokens, L layers; the model's sequence is L+2 frames
(layers, composite, condition) of h*w tokens and the text's T. A multiplication and an addition are two operations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any, Literal, Self

TOKEN_PIXELS = 16  # side of a packed token: 8 of the autoencoder, 2 of a patch
CHANNELS = 64  # of a packed token
ATTENTION_BACKWARD = 2.5  # of its forward: the scores again and four products (FlashAttention, arXiv 2205.14135)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer, and what it is applied to: all image tokens, all text tokens, or one vector for the sample."""

    name: str
    inputs: int
    outputs: int
    rows: Literal["image", "text", "once"]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of one sample: `layers` layers on `height` x `width` packed tokens a frame, and `text` of the prompt."""

    layers: int
    height: int
    width: int
    text: int

    @property
    def image(self) -> int:
        """Of all frames: layers, composite and condition."""
        return (self.layers + 2) * self.height * self.width

    def rows(self, linear: Linear) -> int:
        """Rows of a linear layer's input."""
        return {"image": self.image, "text": self.text, "once": 1}[linear.rows]


@dataclasses.dataclass(frozen=True)
class TransformerSize:
    """Dimensions of a Qwen-Image transformer. The defaults are those of Qwen-Image-Layered's config."""

    blocks: int = 60
    heads: int = 24
    head_dim: int = 128
    text_width: int = 3584

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        """From a diffusers folder's `transformer/config.json`; what it leaves out has diffusers' default."""
        names = ("num_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim")
        return cls(*(int(config.get(name, default)) for name, default in zip(names, (60, 24, 128, 3584), strict=True)))

    @property
    def width(self) -> int:
        """Of a token inside the model."""
        return self.heads * self.head_dim

    @functools.cached_property
    def outer(self) -> tuple[Linear, ...]:
        """Linear layers outside the blocks; 256 is the width of the sinusoidal time embedding."""
        d, time = self.width, "time_text_embed.timestep_embedder"
        return (
            Linear(f"{time}.linear_1", 256, d, "once"), Linear(f"{time}.linear_2", d, d, "once"),
            Linear("img_in", CHANNELS, d, "image"), Linear("txt_in", self.text_width, d, "text"),
            Linear("norm_out.linear", d, 2 * d, "once"), Linear("proj_out", d, CHANNELS, "image"),
        )  # fmt: skip

    @functools.cached_property
    def inner(self) -> tuple[Linear, ...]:
        """Linear layers of one block."""
        d = self.width
        return (
            Linear("img_mod.1", d, 6 * d, "once"), Linear("txt_mod.1", d, 6 * d, "once"),
            *(Linear(f"attn.{name}", d, d, "image") for name in ("to_q", "to_k", "to_v", "to_out.0")),
            *(Linear(f"attn.{n}", d, d, "text") for n in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
            Linear("img_mlp.net.0.proj", d, 4 * d, "image"), Linear("img_mlp.net.2", 4 * d, d, "image"),
            Linear("txt_mlp.net.0.proj", d, 4 * d, "text"), Linear("txt_mlp.net.2", 4 * d, d, "text"),
        )  # fmt: skip

    @functools.cached_property
    def linears(self) -> dict[str, Linear]:
        """All linear layers by their full name."""
        blocks = {
            f"transformer_blocks.{block}.{linear.name}": linear for block in range(self.blocks) for linear in self.inner
        }
        return blocks | {linear.name: linear for linear in self.outer}

    @functools.cached_property
    def block_weights(self) -> int:
        """Weights of the blocks' linear layers, without biases: what float8 stores."""
        return self.blocks * sum(linear.inputs * linear.outputs for linear in self.inner)

    @functools.cached_property
    def parameters(self) -> int:
        """Of the transformer: linear layers with biases, the norms of queries and keys and of the text, and the
        embedding that tells layered from plain images."""
        linear = sum(linear.inputs * linear.outputs + linear.outputs for linear in self.linears.values())
        return linear + self.blocks * 4 * self.head_dim + self.text_width + 2 * self.width

    def base_bytes(self, *, dtype: str, float8: bool) -> int:
        """Of the frozen transformer; with float8 the blocks' weights take one byte and a float32 scale for each row."""
        each = {"float32": 4, "bfloat16": 2}[dtype]
        if not float8:
            return each * self.parameters
        scales = 4 * self.blocks * sum(linear.outputs for linear in self.inner)
        return each * (self.parameters - self.block_weights) + self.block_weights + scales

    # ---- operations

    def _attention(self, tokens: Tokens) -> float:
        """Of one block: scores and their product with the values, over image and text together."""
        return 4.0 * (tokens.image + tokens.text) ** 2 * self.width

    def forward(self, tokens: Tokens, adapter: AdapterSize | None = None) -> float:
        """Operations of one forward pass of one sample."""
        block, outer = (
            sum(2.0 * tokens.rows(one) * one.inputs * one.outputs for one in linears)
            for linears in (self.inner, self.outer)
        )
        inside = self.blocks * (block + self._attention(tokens))
        return inside + outer + (adapter.forward(tokens) if adapter else 0.0)

    def backward(self, tokens: Tokens, adapter: AdapterSize, *, attention: float = ATTENTION_BACKWARD) -> float:
        """Operations of the gradient of the adapter's weights.

        The base is frozen: a linear layer passes its gradient on, at the cost of its forward, and has none of its own;
        nothing is passed on to the model's inputs (first block) or from the last block's text, which goes nowhere.
        `attention` is its backward in forwards: 2 where the scores are kept and not computed again.
        """
        last, inputs = f"transformer_blocks.{self.blocks - 1}.", {f"attn.{n}" for n in _FIRST_INPUTS}
        total = 0.0
        for name, one in self.linears.items():
            start = name.startswith("transformer_blocks.0.") and one.name in inputs
            end = name.startswith(last) and one.name in _LAST_DEAD
            if one.rows != "once" and name not in ("img_in", "txt_in") and not start and not end:
                total += 2.0 * tokens.rows(one) * one.inputs * one.outputs
        unused = sum(
            2.0 * tokens.rows(one) * adapter.rank * one.inputs
            for name, one in adapter.on.items()
            if name.startswith("transformer_blocks.0.") and one.name in inputs
        )
        return total + attention * self.blocks * self._attention(tokens) + 2 * adapter.forward(tokens) - unused

    # ---- memory

    def checkpoint_bytes(self, tokens: Tokens, *, dtype: str) -> int:
        """Kept between forward and backward with gradient checkpointing: both streams before every block."""
        return self.blocks * (tokens.image + tokens.text) * self.width * {"float32": 4, "bfloat16": 2}[dtype]

    def block_bytes(self, tokens: Tokens, *, dtype: str, gradients: bool) -> int:
        """Alive inside one block, in streams of the model's width: of a forward pass about 12 (norm, queries, keys,
        values, attention, the feed-forward's 4 before and 4 after its activation), with gradients about 30 (each kept,
        and its gradient where it is used)."""
        streams = 30 if gradients else 12
        return streams * (tokens.image + tokens.text) * self.width * {"float32": 4, "bfloat16": 2}[dtype]


_FIRST_INPUTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_LAST_DEAD = ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")


@dataclasses.dataclass(frozen=True)
class AdapterSize:
    """A LoRA of `rank` on the linear layers `on` of a transformer."""

    rank: int
    on: Mapping[str, Linear]  # by full name

    @classmethod
    def of(cls, size: TransformerSize, *, rank: int, targets: Collection[str]) -> Self:
        """The layers that `policy/lora.py` adapts: those that are a target or end with it, without the dead ones."""
        last = f"transformer_blocks.{size.blocks - 1}."
        dead = {f"{last}{name}" for name in (*_LAST_DEAD, "attn.add_q_proj")}
        chosen = {
            name: linear
            for name, linear in size.linears.items()
            if name not in dead and any(name == target or name.endswith(f".{target}") for target in targets)
        }
        return cls(rank, chosen)

    @property
    def parameters(self) -> int:
        """Of both factors."""
        return sum(self.rank * (linear.inputs + linear.outputs) for linear in self.on.values())

    @property
    def training_bytes(self) -> int:
        """Weights, gradients and AdamW's two moments, float32."""
        return 4 * 4 * self.parameters

    def forward(self, tokens: Tokens) -> float:
        """Operations that the adapter adds to a forward pass of one sample."""
        return sum(2.0 * tokens.rows(one) * self.rank * (one.inputs + one.outputs) for one in self.on.values())
