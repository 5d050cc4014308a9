"""The scale of every module of an adapter: its own alpha, or that of a config as peft chooses it."""

from __future__ import annotations

import math
import reprlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from layerloop.components.schema.errors import LayerloopError

PATTERN_SECONDS, LONGEST_PATTERN = 0.2, 1000  # of a key of a pattern: to match one module, and its characters
ALL_SECONDS = 60.0  # for all patterns and modules: one for each layer of a 20 B model takes two


class Scales:
    """alpha / r of each module, or alpha / sqrt(r) with `use_rslora`, with peft's choice of alpha: that of the first
    pattern (a regular expression) that matches, else `lora_alpha`, else its default. Without a config alpha is r, as in
    diffusers.

    The rank is that of the weights. A config that says another one is of another adapter, or older than a change of the
    ranks, so that its alpha is for another scale; peft refuses it too.

    Args:
        config: peft's, or that of a file's metadata.
        where: the file of `config`, for errors.
        alphas: of modules that have their own in the file.

    Raises:
        LayerloopError: a pattern that is no mapping, or `use_rslora` that is neither true nor false.
    """

    def __init__(self, config: dict[str, Any] | None, where: Path, alphas: Mapping[str, float]) -> None:
        self.config, self.where, self.alphas = config or {}, where, alphas
        self.known = config is not None
        self.patterns = _Patterns(self.config, "alpha_pattern", where)
        self.ranks = _Patterns(self.config, "rank_pattern", where)
        self.root = self.config.get("use_rslora") or False
        if not isinstance(self.root, bool):
            raise LayerloopError(f"{where} has use_rslora {reprlib.repr(self.root)}: write true or false")

    def scale(self, module: str, rank: int) -> float:
        """The scale of a module, whose matrices have this rank.

        Raises:
            LayerloopError: an alpha that is no number or 0, a pattern that cannot be used, or another rank.
        """
        if module in self.alphas:
            return self.alphas[module] / rank
        if not self.known:
            return 1.0
        self._check_rank(module, rank)
        return self._alpha(module) / (math.sqrt(rank) if self.root else rank)

    def _alpha(self, module: str) -> float:
        from peft import LoraConfig

        pattern = self.patterns.first(module)
        field, alpha = "lora_alpha", self.config.get("lora_alpha", LoraConfig.lora_alpha)
        if pattern is not None:
            field, alpha = f"alpha_pattern[{pattern!r}]", self.patterns.values[pattern]
        largest = torch.finfo(torch.float32).max
        if alpha == 0 and isinstance(alpha, int | float) and not isinstance(alpha, bool):
            raise LayerloopError(
                f"{self.where} has {field} 0, with which the adapter does nothing: set it to the alpha that it was "
                "trained with, such as 16"
            )
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= largest:
            raise LayerloopError(
                f"{self.where} has {field} {reprlib.repr(alpha)}, which is not a finite number: set it to the alpha "
                "that the adapter was trained with, such as 16"
            )
        return alpha

    def _check_rank(self, module: str, rank: int) -> None:
        pattern = self.ranks.first(module)
        field = "r" if pattern is None else f"rank_pattern[{pattern!r}]"
        said = self.config.get("r", rank) if pattern is None else self.ranks.values[pattern]
        if said != rank:
            raise LayerloopError(
                f"{self.where} has {field} {reprlib.repr(said)} where {module} has rank {rank}: it is not of these "
                "weights, whose alpha may be another; fetch both again, or correct both of its numbers"
            )


class _Patterns:
    """A field of a config that maps regular expressions, matched as peft's `get_pattern_key` does, but never for longer
    than `PATTERN_SECONDS`: a pattern such as `(a+)+b` takes Python's own matcher longer than anybody lives."""

    def __init__(self, config: Mapping[str, Any], field: str, where: Path) -> None:
        self.values: dict[str, Any] = config.get(field) or {}
        self.field, self.where, self.until = field, where, time.monotonic() + ALL_SECONDS
        if not isinstance(self.values, dict):
            raise LayerloopError(
                f"{where} has {field} {reprlib.repr(self.values)}, which is not a mapping: write it as "
                '{"to_q": 8} with the number of each module'
            )
        self.compiled: dict[str, Any] = {}  # regex itself keeps 500; converters write a pattern for every layer

    def first(self, module: str) -> str | None:
        """The first pattern that matches a module's name; None where none does."""
        import regex

        for pattern in self.values:
            try:
                if len(pattern) > LONGEST_PATTERN:
                    raise regex.error(f"{len(pattern)} characters")
                if time.monotonic() > self.until:
                    raise TimeoutError
                if pattern not in self.compiled:
                    self.compiled[pattern] = regex.compile(rf"(.*\.)?({pattern})$")
                if self.compiled[pattern].match(module, timeout=PATTERN_SECONDS):
                    return pattern
            except (regex.error, TimeoutError, RecursionError, OverflowError, MemoryError) as error:
                why = "it takes too long" if isinstance(error, TimeoutError) else " ".join(str(error).split())[:120]
                raise LayerloopError(
                    f"{self.where} has {self.field} {reprlib.repr(pattern)}, which is not a regular expression that "
                    f"can be used ({why}): correct it, or name modules in full"
                ) from None
        return None
