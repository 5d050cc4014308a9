"""Which model decomposes, and how: chosen from the options without loading anything, then loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerloop.components.runtime.progress import log
from layerloop.components.schema.decomposition import DecomposeOptions
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import SHIPPED, TINY, DataRecipe, Recipe, parse_recipe
from layerloop.components.schema.run_recipe import overridden, packaged_recipes
from layerloop.components.schema.runtime import Runtime
from layerloop.components.storage.campaign import MANIFEST, RECIPE, Campaign
from layerloop.components.storage.final_weights import final_weights
from layerloop.components.storage.folders import HUB_ID, WEIGHTS, hub_uri, local_adapter, local_folder
from layerloop.components.storage.runtime import read_runtime
from layerloop.components.storage.stores import open_store

if TYPE_CHECKING:
    import torch

    from layerloop.components.policy.inference import Inference
    from layerloop.components.policy.model import LayeredPolicy

RELEASED = "Qwen/Qwen-Image-Layered"
TOY = (
    "the tiny policy that ships with layerloop{faults}, a toy of 64 pixels: it shows what files you get, not what the "
    f"method can do; for real layers give --base {RELEASED} on a GPU of 80 GB"
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is going to be loaded. `campaign` or `folder` says where the adapter is; neither: there is none."""

    recipe: Recipe
    runtime: Runtime
    data: DataRecipe  # the size that the model works at
    why: str  # for the log
    campaign: Campaign | None = None
    folder: Path | None = None
    base_fingerprint: str | None = None  # that the adapter was trained on, where its publication says so
    adapter: str | None = None  # its name, without the folders that lead to it
    adapter_sha256: str | None = None  # of its weights file

    @property
    def base(self) -> str:
        """The base's name."""
        return self.recipe.model.base

    @property
    def description(self) -> str:
        """One sentence for users."""
        toy = TOY.format(faults="" if self.base == TINY else ", with faults to unlearn")
        base = toy if self.recipe.model.shipped else self.base
        if self.campaign is not None:
            return f"the adapter of {self.campaign.uri}, on {base}"
        because = "" if self.recipe.model.shipped else f", {self.why}"
        return f"{f'the adapter {self.adapter}, on ' if self.adapter else ''}{base}{because}"


@dataclasses.dataclass(frozen=True)
class Model:
    """A policy that is ready to decompose. Prompts are `(T, E)`; the blank one only with guidance."""

    policy: LayeredPolicy
    prompt: torch.Tensor
    blank_prompt: torch.Tensor | None
    how: Inference


def choose(options: DecomposeOptions) -> Choice:
    """The recipe, its base and the adapter that the options mean.

    Without a recipe or a base it is the adapter's own base; without an adapter the released model, where its weights
    are in the hub's cache and there is a GPU, and else the tiny policy.

    Raises:
        LayerloopError: an adapter or a recipe that is not there or not valid.
    """
    campaign, folder, published = _find_adapter(options.adapter)
    if options.recipe is not None:
        recipe, why = parse_recipe(options.recipe), "of the recipe"
    elif options.base is not None:
        recipe, why = _recipe_of(options.base), "as asked for"
    elif campaign is not None:
        recipe, why = campaign.recipe, f"of the campaign {campaign.uri}"
    elif folder is not None and (base := _base_of(folder, published)) is not None:
        recipe, why = _recipe_of(base), f"the base of {options.adapter}"
    else:
        here = _released_can_run()
        recipe, why = _recipe_of(RELEASED if here else TINY), "its weights and a GPU are here"
    if campaign is not None and recipe.model.base != campaign.recipe.model.base:
        raise LayerloopError(
            f"the adapter of {campaign.uri} is for the base {campaign.recipe.model.base}, not {recipe.model.base}: "
            "leave out --base and --recipe"
        )
    data = recipe.data.model_copy(update={"resolution": options.resolution or recipe.data.resolution})
    fingerprint = str(published.metadata.get("base_fingerprint") or "") or None if published else None
    return Choice(
        recipe, read_runtime("", recipe), data, why, campaign, folder, fingerprint,
        _name_of(options.adapter), _adapter_sha256(campaign, folder),
    )  # fmt: skip


def load(choice: Choice, options: DecomposeOptions) -> Model:
    """The model on a GPU where there is one, with its adapter and the prompt's embedding.

    Raises:
        LayerloopError: the base cannot be loaded, or the adapter is of another base or cannot be read.
    """
    import torch

    from layerloop.components.policy.inference import Inference
    from layerloop.components.policy.prompt import embed_prompts

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and choice.base == RELEASED:
        log("no GPU is here: this model takes hours for a picture, and about 60 GB of memory")
    how = Inference(options.steps or choice.recipe.evaluation.steps, options.sampler, options.guidance)
    model = choice.recipe.model
    local = local_folder(model.base) if "://" in model.base else None
    texts = [*([model.prompt] if choice.campaign is None else []), *([" "] if options.guidance != 1 else [])]
    embeds = embed_prompts(model, texts, folder=local) if texts else []
    blank = embeds.pop() if options.guidance != 1 else None
    if choice.campaign is not None:
        from layerloop.components.policy.at import policy_at

        iteration = choice.campaign.head()
        log(f"adapter: iteration {iteration} of {choice.campaign.uri}")
        at = policy_at(choice.campaign, iteration, device=device, delivered=True)
        return Model(at.policy, at.prompt, blank, how)
    return Model(_load_base(choice, options, device), embeds[0], blank, how)


def _load_base(choice: Choice, options: DecomposeOptions, device: torch.device) -> LayeredPolicy:
    """The base, from a copy on the node where there is one, with the adapter of `choice.folder` on it."""
    from layerloop.components.policy.adapters import read_adapter
    from layerloop.components.policy.at import folder_of_base
    from layerloop.components.policy.lora import replace_adapter, train_adapter
    from layerloop.components.policy.model import LayeredPolicy

    adapter = None if choice.folder is None else read_adapter(choice.folder)  # refused before the base is loaded
    if choice.folder is not None and choice.base_fingerprint is None:
        _check_named_base(choice, _base_of(choice.folder, None))
    recipe, runtime = _most(choice, options)
    remedy = "or lower --resolution, --layers or --batch-size"
    folder = folder_of_base(recipe, runtime, device=device, use="evaluation", remedy=remedy)
    policy = LayeredPolicy.load(choice.recipe.model, choice.runtime.model, device=device, folder=folder)
    if adapter is None:
        return policy
    if choice.base_fingerprint not in (None, policy.fingerprint):
        raise LayerloopError(
            f"adapter {choice.adapter} was trained on the base {str(choice.base_fingerprint)[:12]}, {choice.base} is "
            f"{policy.fingerprint[:12]}: give its own base with --base"
        )
    try:
        replace_adapter(policy.transformer, adapter, where=str(choice.adapter))
    except LayerloopError as error:
        raise LayerloopError(f"adapter {choice.adapter} is not for the base {choice.base} ({error})") from None
    train_adapter(policy.transformer, False)
    return policy


def _check_named_base(choice: Choice, named: str | None) -> None:
    """Of an adapter that comes without its base's fingerprint, hold the name that it gives against the base in use.

    Two names may be of one model, a hub id and a folder; those of shipped bases are not.

    Raises:
        LayerloopError: both are shipped bases.
    """
    if named is None or named == choice.base:
        return
    if named in SHIPPED and choice.base in SHIPPED:
        raise LayerloopError(f"adapter {choice.adapter} is for the base {named}, not {choice.base}: leave out --base")
    log(f"adapter {choice.adapter} names {named} as its base, and {choice.base} is used: right if both are one model")


def _most(choice: Choice, options: DecomposeOptions) -> tuple[Recipe, Runtime]:
    """Recipe and runtime of an evaluation that takes as much memory as this will."""
    evaluation = choice.recipe.evaluation.model_copy(update={"layers": options.counts})
    recipe = choice.recipe.model_copy(update={"data": choice.data, "evaluation": evaluation})
    if options.batch_size is None:
        return recipe, choice.runtime
    batch = choice.runtime.evaluation.model_copy(update={"batch_size": options.batch_size})
    return recipe, choice.runtime.model_copy(update={"evaluation": batch})


def _name_of(adapter: str | None) -> str | None:
    """A hub id as it is; of a path or URI its last part."""
    if adapter is None or hub_uri(adapter) == f"hf://{adapter}":
        return adapter
    return adapter.rstrip("/").rpartition("/")[2]


def _adapter_sha256(campaign: Campaign | None, folder: Path | None) -> str | None:
    if campaign is not None:
        return final_weights(campaign.policy(campaign.head())).sha256
    if folder is None:
        return None
    from layerloop.components.policy.adapters import weights_sha256

    return weights_sha256(folder)


def _find_adapter(text: str | None) -> tuple[Campaign | None, Path | None, Manifest | None]:
    """(campaign, folder or file, its publication's manifest) of what `--adapter` names.

    Raises:
        LayerloopError: there is nothing, or a campaign without an adapter.
    """
    if text is None:
        return None, None, None
    path = Path(text).expanduser()
    try:
        exists, is_campaign = path.exists(), (path / RECIPE).is_file()
    except OSError as error:
        raise LayerloopError(f"adapter {text} cannot be read ({error.strerror}): give one that can") from None
    if not text.strip():
        raise LayerloopError("--adapter is empty: give an adapter, or leave the option out")
    if "://" in text and not text.startswith("hf://") and not text.endswith(WEIGHTS):
        is_campaign = open_store(text).exists(RECIPE)
    if is_campaign:
        campaign = Campaign.open(text if "://" in text else str(path))
        if campaign.head() < 1:
            raise LayerloopError(f"campaign {campaign.uri} has no adapter yet: train an iteration first")
        return campaign, None, None
    if "://" in text:
        folder = local_adapter(text)
    elif exists:
        folder = path
    elif (hub := hub_uri(text)) is not None:
        folder = local_adapter(hub)
    else:
        raise LayerloopError(
            f"adapter {text} does not exist: give a folder, a campaign, s3://..., or a repository of the hub as "
            "hf://owner/name"
        )
    manifest = folder / MANIFEST
    return None, folder, Manifest.from_json(manifest.read_bytes(), where=str(manifest)) if manifest.is_file() else None


def _base_of(folder: Path, published: Manifest | None) -> str | None:
    """The base that an adapter names and that can be found: a shipped one, a hub id or a local folder."""
    named: Any = published.metadata.get("base") if published else None
    for config in (folder / "peft" / "adapter_config.json", folder / "adapter_config.json"):
        if named is None and config.is_file():
            try:
                named = json.loads(config.read_bytes()).get("base_model_name_or_path")
            except (OSError, ValueError, AttributeError, RecursionError):
                named = None  # reading the adapter says what is wrong
    if not isinstance(named, str) or not named.strip():  # empty, as peft writes it of a model without a name
        return None
    try:
        return named if named in SHIPPED or HUB_ID.fullmatch(named) or Path(named).is_dir() else None
    except OSError:  # too long for a path
        return None


def _recipe_of(base: str) -> Recipe:
    """The packaged recipe that fits a base, with it."""
    recipe = parse_recipe(packaged_recipes()["tiny" if base in SHIPPED else "paper"])
    return overridden(recipe, {"model": {"base": base}})[0]


def _released_can_run() -> bool:
    """Whether the released model's files are all in the hub's cache and there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        return False
    from huggingface_hub import snapshot_download

    from layerloop.components.policy.base_files import BASE, TEXT, check_files

    try:
        patterns = [f"{part}/*" for part in (*BASE, *TEXT)]
        check_files(Path(snapshot_download(RELEASED, local_files_only=True, allow_patterns=patterns)), {**BASE, **TEXT})
    except Exception:  # the hub raises a dozen kinds; each means that it is not all here
        return False
    return True
