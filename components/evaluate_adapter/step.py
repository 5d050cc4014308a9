"""The step `evaluate_adapter`: adapter and base decompose the same held-out images from the same noise.

Under torchrun every rank decomposes its share of the images; rank 0 measures, writes the report and commits.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from layerloop.components.evaluate_adapter import against
from layerloop.components.evaluate_adapter.assess import Row, compare_rows, paired_differences
from layerloop.components.evaluate_adapter.cases import Case, Cases, Kind, read_cases
from layerloop.components.evaluate_adapter.gallery import ShownCase, full_size
from layerloop.components.evaluate_adapter.history import earlier_evaluations, judge_cost, training_charts
from layerloop.components.evaluate_adapter.judged import add_judged, check_judge
from layerloop.components.evaluate_adapter.measuring import Measuring
from layerloop.components.evaluate_adapter.provenance import (
    Clock,
    ground_truth,
    model_name,
    notices,
    provenance,
    settings,
)
from layerloop.components.evaluate_adapter.report import Report, render, standalone
from layerloop.components.evaluate_adapter.results import (
    judge_sentence,
    kubeflow_metrics,
    mean_of,
    metrics_json,
    reward_curve,
    samples_table,
    score_manifests,
)
from layerloop.components.evaluate_adapter.samplers import (
    chosen_cases,
    commit_samplers,
    read_table,
    sample_settings,
    samplers_dir,
)
from layerloop.components.evaluate_adapter.sheets import Choice, choose, contact_sheet, strips_of
from layerloop.components.policy.at import LoadedPolicy, policy_at
from layerloop.components.runtime import ranks
from layerloop.components.runtime.contract import step_main
from layerloop.components.runtime.distributed import (
    broadcast_json,
    failing_together,
    log_first,
    process_group,
    rank,
    shares_base,
)
from layerloop.components.runtime.outputs import StepResult
from layerloop.components.runtime.progress import log
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest, Shard
from layerloop.components.schema.messages import counted
from layerloop.components.schema.steps import STEPS
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.images import encode_png
from layerloop.components.storage.lease import EVALUATION, hold
from layerloop.components.storage.manifests import add_folder, read_file
from layerloop.components.storage.stores import open_store

if TYPE_CHECKING:
    from layerloop.components.layers.stack import Pixels

SHOWN: dict[Kind, int] = {"designs": 7, "pictures": 4}  # samples with contact sheets


def run(
    loaded: LoadedPolicy | None = None,
    *,
    campaign: str,
    iteration: int | None = None,
    baseline: str = "",
    samplers: bool = False,
    judge_url: str = "",
    runtime: str = "",
) -> StepResult:
    """Compare an adapter with its base on held-out designs and unlabelled images, and write the report.

    The adapter's weights are those that would be published: the average, where the recipe keeps one. Both sample
    exactly as at inference (Heun, no guidance) from the same seeds. Decompositions are kept in shards, so a
    step that is run again continues; the base's are shared by all evaluations of the campaign.

    Args:
        loaded: A policy of this campaign that is in memory already, of whatever iteration: its base is used.
        campaign: Root URI of the campaign.
        iteration: The iteration whose adapter to evaluate; by default the last committed one.
        baseline: Fail, with exit status 3, where the adapter is clearly worse than this: the path or URI of the
            `metrics.json` of an evaluation on the same images, or `previous`, the evaluation before it; by default
            nothing. The evaluation is committed all the same.
        samplers: Compare both by Euler's method with 10, 20, 30 and 50 steps and by Heun's with 25 and 50 too, each
            without guidance and with 4.0, on up to 32 of the images: 1,548 model calls an image. The
            table is kept apart, in `evaluations/samplers-<iteration>`; a report made later shows it.
        judge_url: Base URL of an OpenAI-compatible judge, such as http://127.0.0.1:8788/v1, that also scores both on
            the unlabelled images, by the recipe's judge.model and rubric and the environment's OPENAI_API_KEY; by
            default none does.
        runtime: Where and how fast to run: YAML or JSON text, or the path or URI of a file; empty for LAYERLOOP_RUNTIME
            and the defaults (`layerloop runtime`). It changes no result.

    Returns:
        On rank 0 the evaluation; on other ranks, which are done when all is sampled, nothing.

    Raises:
        WorseError: it is clearly worse than the baseline.
        LayerloopError: there is no adapter yet, nothing is held out, the base is not the one that the adapter was
            trained on, the adapter decodes into NaN, the baseline cannot be compared with, or the judge does not
            answer.
    """
    opened = Campaign.open(campaign, runtime)
    if baseline and baseline != against.PREVIOUS:
        against.read_baseline(baseline)  # refused before hours of sampling
    current = opened.head() if iteration is None else iteration
    if current < 1:
        raise LayerloopError(
            f"campaign {opened.uri} has no adapter to evaluate (iteration {current}): train an iteration first"
        )
    folder = opened.evaluation_dir(_evaluation_name(current))
    done = opened.already_committed(folder, log=log_first)
    wanted = samplers and opened.find(samplers_dir(opened, current)) is None
    if done is not None and judge_url:
        log(
            f"iteration {current} was evaluated before, so no judge is asked: its report stays as it is; remove "
            f"{folder}/manifest.json, and the next evaluation makes it again from what was sampled"
        )
    if done is not None and not wanted:
        return _result(opened, done, baseline)
    with hold(opened.store, EVALUATION, log=log):
        done = opened.already_committed(folder, log=log_first)  # by the run that held it until now
        wanted = samplers and opened.find(samplers_dir(opened, current)) is None
        if done is None or wanted:
            done = _evaluate(opened, current, loaded, done=done, samplers=wanted, judge_url=judge_url)
        return StepResult() if done is None else _result(opened, done, baseline)


def _evaluate(
    opened: Campaign,
    current: int,
    loaded: LoadedPolicy | None,
    *,
    done: Manifest | None,
    samplers: bool,
    judge_url: str,
) -> Manifest | None:
    """Evaluate an iteration and commit the evaluation, unless it is `done`, and the table of `samplers`; None on other
    ranks than the first. Raises as `run`."""
    clock = Clock()
    with process_group() as device:
        # The head may have moved between two ranks' looks, and half of the cases would be of another adapter.
        said: Any = broadcast_json([current, done is not None, samplers])
        current, evaluated, samplers = said
        with failing_together(), clock.time("loading"):
            cases = read_cases(opened, opened.sources())
            sharded = shares_base(opened.runtime.model)
            loaded = policy_at(opened, current, device=device, sharded=sharded, delivered=True, loaded=loaded)
            if judge_url and not evaluated and rank() == 0:
                check_judge(opened, judge_url)
        if rank() == 0:
            log(f"evaluating iteration {current} on {_case_counts(cases)}")
        if samplers:
            _compare_samplers(opened, current, cases, loaded, clock)
        if not evaluated:
            sampled = _sample_both_models(opened, current, cases, loaded, clock)
    if rank() != 0:
        return None
    if done is not None:
        table = samplers_dir(opened, current)
        log(f"the report of iteration {current} was made before: the table of samplers is in {table}")
        return done
    measured = _measure_both_models(opened, current, cases, sampled, clock)
    if judge_url:
        with clock.time("judging"):
            models = {"base": (sampled.base, measured.base), "adapter": (sampled.tuned, measured.tuned)}
            measured = replace(measured, judged=add_judged(opened, judge_url, sampled.chunks, models))
    facts = provenance(opened.recipe, loaded.policy, opened.policy(current), cases, clock)
    facts |= {"judged": measured.judged} if measured.judged else {}
    return _commit(opened, current, cases, loaded, sampled, measured, facts)


def _compare_samplers(campaign: Campaign, iteration: int, cases: Cases, loaded: LoadedPolicy, clock: Clock) -> None:
    """Both models by every sampler; on all ranks, of which rank 0 measures and commits the table."""
    chosen = chosen_cases(cases)
    with clock.time("comparing samplers"):
        shards = sample_settings(campaign, iteration, chosen, loaded)
        with failing_together():
            if rank() == 0:
                commit_samplers(campaign, iteration, chosen, shards, loaded)


def _evaluation_name(iteration: int) -> str:
    return f"iteration-{iteration:06d}"


def _case_counts(cases: Cases) -> str:
    counts = (len(cases.of("designs")), "designs"), (len(cases.of("pictures")), "unlabelled images")
    return " and ".join(counted(count, what) for count, what in counts if count)


# ------------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Sampled:
    """Decompositions of both models in shards: one of `base` and one of `tuned` for each of `chunks`."""

    chunks: Sequence[Sequence[Case]]
    base: Sequence[Shard]
    tuned: Sequence[Shard]


def _sample_both_models(
    campaign: Campaign, iteration: int, cases: Cases, loaded: LoadedPolicy, clock: Clock
) -> Sampled:
    """Both models' decompositions; on all ranks."""
    from layerloop.components.evaluate_adapter.decompose import base_shards, case_chunks, decomposed

    chunks = case_chunks(cases.cases)
    with clock.time("sampling base"):
        base = base_shards(campaign, loaded, chunks)
    with clock.time("sampling adapter"):
        folder = campaign.evaluation_dir(_evaluation_name(iteration))
        stem = f"{folder}/decompositions-{str(loaded.adapter_sha256)[:12]}"
        tuned = decomposed(campaign, loaded, chunks, stem, model=_evaluation_name(iteration))
    return Sampled(chunks, base, tuned)


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Measured:
    """Numbers of every case, in the order of the cases; `truth` of the true layers themselves."""

    base: list[Row]
    tuned: list[Row]
    truth: list[Row]
    judged: str = ""  # who judged the unlabelled images, where someone did


def _measure_both_models(campaign: Campaign, iteration: int, cases: Cases, sampled: Sampled, clock: Clock) -> Measured:
    edits, chunks = campaign.recipe.evaluation.max_edits, sampled.chunks
    with clock.time("measuring"), Measuring(edits, cases=len(cases.cases)) as measuring:
        base = measuring.shards(campaign.store, chunks, sampled.base, model="base")
        tuned = measuring.shards(campaign.store, chunks, sampled.tuned, model=_evaluation_name(iteration))
        truth = measuring.truth(cases.of("designs"))
    return Measured(base, tuned, truth)


# -------------------------------------------------------------------------------------------------------------- writing


def _commit(
    campaign: Campaign,
    iteration: int,
    cases: Cases,
    loaded: LoadedPolicy,
    sampled: Sampled,
    measured: Measured,
    facts: dict[str, Any],
) -> Manifest:
    """Write the report and everything that it quotes, then the manifest that makes them count."""
    shown = _cases_to_show(campaign, cases, sampled, measured)
    report = _report(campaign, iteration, cases, measured, shown, settings(facts))
    folder = campaign.evaluation_dir(_evaluation_name(iteration))
    files = {
        "metrics.json": metrics_json(report.comparisons, report.reference, facts, rows=measured.tuned),
        "samples.parquet": samples_table({"base": measured.base, _evaluation_name(iteration): measured.tuned}),
        **{_sheet_name(item.choice): encode_png(contact_sheet(item.choice, item.strips)) for item in shown},
        **{name: data for item in shown for name, data in full_size(item, campaign=campaign.recipe.name)},
        "report.html": render(report),
    }
    manifest = Manifest(
        kind="evaluation",
        iteration=iteration,
        shards=(*sampled.base, *sampled.tuned),
        files=add_folder(campaign.store, folder, files),
        counts={"designs": report.counts["designs"], "pictures": report.counts["pictures"], "sheets": len(shown)},
        metadata={"base_fingerprint": loaded.base_fingerprint, "adapter_sha256": loaded.adapter_sha256},
    )
    return campaign.commit(folder, manifest)


def _report(
    campaign: Campaign,
    iteration: int,
    cases: Cases,
    measured: Measured,
    shown: Sequence[ShownCase],
    setting_rows: dict[str, str],
) -> Report:
    recipe, scores = campaign.recipe, score_manifests(campaign, iteration)
    return Report(
        title=f"Iteration {iteration} against its base",
        campaign=recipe.name,
        model=model_name(recipe),
        counts={"designs": len(cases.of("designs")), "pictures": len(cases.of("pictures"))},
        comparisons=compare_rows(measured.base, measured.tuned, seed=recipe.seed),
        reference=mean_of(measured.truth),
        judge=judge_sentence(scores),
        judged=measured.judged,
        notices=notices(cases),
        ground_truth=ground_truth(cases, recipe),
        curve=reward_curve(campaign, scores),
        training=training_charts(campaign, iteration, scores),
        earlier=earlier_evaluations(campaign, iteration),
        iteration=iteration,
        differences=paired_differences(measured.base, measured.tuned),
        shown=shown,
        settings=({"Judge": asked} if (asked := judge_cost(scores)) else {}) | setting_rows,
        max_edits=recipe.evaluation.max_edits,
        samplers=read_table(campaign, iteration),
        version=version("layerloop"),
    )


def _cases_to_show(campaign: Campaign, cases: Cases, sampled: Sampled, measured: Measured) -> list[ShownCase]:
    """Cases of each kind for the gallery, their layers read from the shards again."""
    from layerloop.components.evaluate_adapter.decompose import read_decompositions

    choices: list[Choice] = []
    for kind, count in SHOWN.items():
        at = [index for index, case in enumerate(cases.cases) if case.kind == kind]
        choices += choose(
            [cases.cases[index] for index in at],
            [measured.base[index] for index in at],
            [measured.tuned[index] for index in at],
            seed=campaign.recipe.seed,
            count=count,
        )
    wanted = {choice.case.name for choice in choices}
    stacks: dict[str, dict[str, Pixels]] = {name: {} for name in wanted}
    for model, shards in (("Base", sampled.base), ("Adapter", sampled.tuned)):
        for chunk, shard in zip(sampled.chunks, shards, strict=True):
            if wanted & {case.name for case in chunk}:
                for name, stack in read_decompositions(campaign.store, shard, only=wanted).items():
                    stacks[name][model] = stack
    return [ShownCase(choice, tuple(strips_of(choice, stacks[choice.case.name]))) for choice in choices]


def _sheet_name(choice: Choice) -> str:
    return f"sheets/{choice.case.kind}-{choice.case.name}.png"


def _result(campaign: Campaign, manifest: Manifest, baseline: str) -> StepResult:
    if baseline:
        against.fail_when_worse(campaign, manifest, baseline)
    document = json.loads(read_file(campaign.store, manifest.file("metrics.json")))
    return StepResult(
        manifests={"evaluation": manifest},
        files={"report": standalone(read_file(campaign.store, manifest.file("report.html")))},
        metrics=kubeflow_metrics(document),
    )


main = functools.partial(step_main, run, step=STEPS["evaluate_adapter"], launch=ranks.launch_per_gpu, store=open_store)

if __name__ == "__main__":
    raise SystemExit(main())
