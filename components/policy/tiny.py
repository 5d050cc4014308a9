"""The tiny layered policy: diffusers' own `QwenImageLayeredPipeline` with small dimensions, weights kept in the
package.

`build_tiny_pipeline` builds untrained modules, without any hub; components/research/pretraining trains them on
generated designs; `tiny_folder` is the folder of the trained ones, in diffusers' layout. Text does not steer this
policy: its text encoder is random and frozen, there so that every step handles prompts as with the full model.
"""

from __future__ import annotations

import copy
import json
import logging
from importlib import resources
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageLayeredPipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

PROMPT = "a clean, well composed image"  # the released Stable-Layers inference gives every image this prompt
PREFIX_TOKENS = 34  # that the pipeline removes from the front of every prompt, whatever the tokenizer
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
VAE_MULTIPLIERS = (
    1,
    2,
    2,
    2,
)  # channels of the autoencoder's levels, times `vae_dim`; each halves the sides of the last
# The full model's time shift at 640 pixels, where the rule that shifts by image size would give 0.25 at 64 pixels.
SHIFT = 2.5
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def tiny_folder() -> Path:
    """The folder of the pretrained tiny policy in diffusers' layout, in a checkout as in an installed wheel."""
    folder = Path(str(resources.files("layerloop.components.policy"))) / "tiny-weights"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no model_index.json: this installation lacks the tiny policy's weights; "
            "train them with `make pretrain` in a checkout"
        )
    return folder


def load_tiny_pipeline() -> QwenImageLayeredPipeline:
    """The pretrained tiny policy in float32. Its captioning processor is left out: always give it a prompt."""
    return QwenImageLayeredPipeline.from_pretrained(
        tiny_folder(), processor=None, dtype=torch.float32, local_files_only=True
    )


def build_tiny_pipeline(
    *,
    vae_dim: int = 24,
    blocks: int = 6,
    heads: int = 4,
    head_dim: int = 32,
    seed: int = 0,
) -> QwenImageLayeredPipeline:
    """An untrained tiny pipeline, all of it built here, float32, the same for the same `seed`.

    The autoencoder, of `vae_dim` channels at full size, halves the sides three times into 16 channels, and the
    transformer has `blocks` blocks of `heads * head_dim` channels. The scheduler's shift is `SHIFT`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _build_tokenizer()
        text_encoder = _build_text_encoder(tokenizer).eval().requires_grad_(False)
        text_encoder.to(torch.float16).to(torch.float32)  # as it will be loaded: embeddings must not change by saving
        vae = AutoencoderKLQwenImage(
            base_dim=vae_dim,
            z_dim=16,
            dim_mult=list(VAE_MULTIPLIERS),
            num_res_blocks=1,
            temperal_downsample=[False] * (len(VAE_MULTIPLIERS) - 1),
            input_channels=4,
            latents_mean=[0.0] * 16,
            latents_std=[1.0] * 16,
        )
        quarter = head_dim // 4
        transformer = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=blocks,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=text_encoder.config.text_config.hidden_size,
            axes_dims_rope=(quarter, (head_dim - quarter) // 2, (head_dim - quarter) // 2),
            use_additional_t_cond=True,
            use_layer3d_rope=True,
        )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False)
    pipeline = QwenImageLayeredPipeline(
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        processor=None,
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: QwenImageLayeredPipeline, folder: Path) -> None:
    """Save a tiny pipeline with float16 weights, which lose less precision than training leaves uncertain."""
    halves = {
        name: torch.nn.Module.to(copy.deepcopy(pipeline.components[name]), torch.float16)
        for name in ("vae", "transformer", "text_encoder")
    }
    type(pipeline)(**{**pipeline.components, **halves}).save_pretrained(folder)


def _build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE that knows the words of the template and of the default prompt, so that each is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    text = TEMPLATE.format(PROMPT)
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\n\n\n")
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [word for word, _ in bpe.pre_tokenizer.pre_tokenize_str("\n")]
    bpe.train_from_iterator([part for part in text.split("\n") if part] + words, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    prefix = TEMPLATE.split("{}")[0]
    found = len(tokenizer(prefix).input_ids)
    if found != PREFIX_TOKENS:
        raise RuntimeError(f"the tiny tokenizer cuts the template's prefix into {found} tokens, not {PREFIX_TOKENS}")
    return tokenizer


def _build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    hidden = 16
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1_000_000.0},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 1,
            "hidden_size": hidden,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [0],
            "out_hidden_size": hidden,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(
    lambda record: "processor" not in record.getMessage()  # left out on purpose
)
