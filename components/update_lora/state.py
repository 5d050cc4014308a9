"""The training state that an iteration hands to the next: adapter, AdamW's moments, averages, counters. No pickle.

Files in `iterations/<iteration>/policy/<hash>/`, all float32:
    adapter_model.safetensors, adapter_config.json    the policy that samples next, in peft's layout
    optimizer.safetensors    exp_avg.<key>, exp_avg_sq.<key>; trained.<key> where other weights learn than sample
    ema.safetensors          the averaged adapter, keys as in adapter_model.safetensors, where recipe.update.ema is set
    learner.json             a `LearnerState`

Every iteration starts from these files, also within one process, so an interrupted campaign resumes bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from layerloop.components.policy.adapter_files import write_peft
from layerloop.components.policy.adapters import NAME, PEFT_PREFIX, PEFT_WEIGHTS
from layerloop.components.policy.lora import adapter_of
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.learning import ALGORITHMS, LearnerState, UpdateRecipe
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.tensor_files import check_header
from layerloop.components.storage.manifests import read_file
from layerloop.components.storage.stores import Store

OPTIMIZER, EMA, LEARNER = "optimizer.safetensors", "ema.safetensors", "learner.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """The adapter's parameters by key, the optimizer over them, and its averages over time.

    `sampling` holds the weights of the policy that samples next where these are not the learning ones (an algorithm
    with an `old_decay`), else None. `sampler` holds those that sampled the iteration where the recipe lets them lag.
    """

    def __init__(self, policy: LayeredPolicy, update: UpdateRecipe, counters: LearnerState) -> None:
        self.update, self.counters = update, counters
        suffix = f".{NAME}.weight"
        self.parameters = {
            name.removesuffix(suffix) + ".weight": parameter
            for name, parameter in policy.trainable_parameters().items()
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=update.learning_rate,
            betas=update.adam_betas,
            eps=update.adam_epsilon,
            weight_decay=update.weight_decay,
        )
        self.ema = self._copy_weights() if update.ema is not None else None
        self.old_decay = ALGORITHMS[update.algorithm].old_decay(update)
        self.sampling = self._copy_weights() if self.old_decay > 0 else None
        self.sampler: Mapping[str, Tensor] | None = None

    @classmethod
    def resume(
        cls, policy: LayeredPolicy, update: UpdateRecipe, store: Store, previous: Manifest, iteration: int
    ) -> Self:
        """The state after `previous`, whose adapter is on `policy`; a new one where `previous` has none (iteration 0).

        Raises:
            LayerloopError: a file is missing, changed, or of another adapter.
        """
        fresh = LearnerState(iteration=iteration, algorithm=update.algorithm, optimizer_steps=0, ema_steps=0)
        if not any(file.base_name == LEARNER for file in previous.files):
            return cls(policy, update, fresh)
        learner = previous.file(LEARNER)
        stored = LearnerState.from_json(read_file(store, learner), where=f"{store.uri}/{learner.name}")
        state = cls(policy, update, stored.model_copy(update={"iteration": iteration}))
        tensors = _read_tensors(store, previous, OPTIMIZER)
        if stored.optimizer_steps > 0:
            for key, parameter in state.parameters.items():
                moments = {name: _matching_tensor(tensors, f"{name}.{key}", parameter, OPTIMIZER) for name in MOMENTS}
                step = torch.tensor(float(stored.optimizer_steps))
                state.optimizer.state[parameter] = {"step": step, **moments}
        if state.ema is not None:
            averaged = _read_tensors(store, previous, EMA)
            state.ema = {k: _matching_tensor(averaged, PEFT_PREFIX + k, p, EMA) for k, p in state.parameters.items()}
        if state.sampling is not None:
            state._set_weights(
                {k: _matching_tensor(tensors, f"trained.{k}", p, OPTIMIZER) for k, p in state.parameters.items()}
            )
        return state

    def step(self) -> None:
        """Take one optimizer step with the present gradients and update the average."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        counters = {"optimizer_steps": self.counters.optimizer_steps + 1}
        if self.ema is not None and self.update.ema is not None:
            # Warm-up as in flow_grpo, so that the first average is not the untrained adapter.
            n = self.counters.ema_steps
            decay = min(self.update.ema, (1 + n) / (10 + n))
            for key, parameter in self.parameters.items():
                self.ema[key].lerp_(parameter.detach(), 1 - decay)
            counters["ema_steps"] = n + 1
        self.counters = self.counters.model_copy(update=counters)

    @torch.no_grad()
    def end_iteration(self) -> None:
        """Move the policy that samples next towards the trained one: once per iteration, after its last step."""
        if self.sampling is not None:
            for key, parameter in self.parameters.items():
                self.sampling[key].lerp_(parameter, 1 - self.old_decay)

    def sampled_with(self, weights: Mapping[str, Tensor]) -> None:
        """Say that the iteration was sampled with other weights than those at hand, by parameter name."""
        suffix = f".{NAME}.weight"
        self.sampler = {name.removesuffix(suffix) + ".weight": value for name, value in weights.items()}

    @property
    def on_policy(self) -> bool:
        """Whether the policy that sampled is the one that learns."""
        return self.sampler is None and self.sampling is None

    @contextmanager
    def sampler_weights(self) -> Iterator[None]:
        """Within this context the policy is the one that sampled the iteration."""
        with self._weights(self.sampler or self.sampling):
            yield

    @contextmanager
    def _weights(self, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
        if weights is None:
            yield
            return
        trained = self._copy_weights()
        self._set_weights(weights)
        try:
            yield
        finally:
            self._set_weights(trained)

    def write(self, policy: LayeredPolicy, folder: Path, *, base: str | None) -> list[Path]:
        """Write the files above into `folder`; returns them in a fixed order. The state stays as it is.

        Raises:
            LayerloopError: NaN in the adapter.
        """
        tensors: dict[str, Tensor] = {}
        for key, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{name}.{key}": moments[name] for name in MOMENTS if name in moments}
        if self.sampling is not None:
            tensors |= {f"trained.{key}": parameter.detach() for key, parameter in self.parameters.items()}
        with self._weights(self.sampling):
            adapter = adapter_of(policy.transformer)
        write_peft(adapter, folder, transformer=policy.transformer, base=base)
        _save_tensors(tensors, folder / OPTIMIZER)
        (folder / LEARNER).write_bytes(self.counters.to_json())
        names = [PEFT_WEIGHTS, "adapter_config.json", OPTIMIZER, LEARNER]
        if self.ema is not None:
            _save_tensors({PEFT_PREFIX + key: value for key, value in self.ema.items()}, folder / EMA)
            names.append(EMA)
        return [folder / name for name in names]

    def _copy_weights(self) -> dict[str, Tensor]:
        return {key: parameter.detach().clone() for key, parameter in self.parameters.items()}

    @torch.no_grad()
    def _set_weights(self, weights: Mapping[str, Tensor]) -> None:
        for key, parameter in self.parameters.items():
            parameter.copy_(weights[key])


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({key: value.detach().to("cpu", torch.float32).contiguous() for key, value in tensors.items()}, file)


def _read_tensors(store: Store, manifest: Manifest, name: str) -> dict[str, Tensor]:
    """The tensors of a committed state file.

    Raises:
        LayerloopError: the file is missing or not safetensors.
    """
    try:
        file = manifest.file(name)
    except KeyError:
        raise LayerloopError(
            f"the policy of iteration {manifest.iteration} of {store.uri} has no {name}: another recipe committed it"
        ) from None
    where, data = f"{store.uri}/{file.name}", read_file(store, file)
    check_header(data, where=where)
    try:
        return load(data)
    except SafetensorError as error:
        raise LayerloopError(f"{where} is not safetensors ({error}): restore it") from None


def _matching_tensor(tensors: Mapping[str, Tensor], name: str, parameter: Tensor, file: str) -> Tensor:
    """A tensor of a state file, checked to fit a parameter and moved to its device.

    Raises:
        LayerloopError: it is missing or of another shape.
    """
    found = tensors.get(name)
    if found is None or found.shape != parameter.shape:
        shape = "missing" if found is None else f"of shape {tuple(found.shape)}, not {tuple(parameter.shape)}"
        raise LayerloopError(
            f"{file}: {name} is {shape}: it belongs to another adapter, restore the one committed with it"
        )
    return found.to(parameter.device, torch.float32).clone()
