"""`layerloop judge check URL`: the features of an endpoint and the quality of its judgement, before a campaign.

Sends the canaries and a few probes. Nothing here depends on a campaign.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from layerloop.components.judge.canaries import FOOLED, CanaryReport, make_canaries, score_canaries
from layerloop.components.judge.client import RETRY_TEMPERATURE, Judge
from layerloop.components.judge.endpoint import REFUSALS
from layerloop.components.judge.features import EndpointFeatures
from layerloop.components.judge.images import candidate_images, encode_image, fitted
from layerloop.components.judge.methods import PHASE1, rubric_of
from layerloop.components.judge.parsing import parse
from layerloop.components.judge.replies import PAID, SWITCH, Reply, UnusableError, read_body
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import Rubric
from layerloop.components.judge.serving import post, try_prefixes, try_thinking
from layerloop.components.judge.transport import BUSY, TransportError
from layerloop.components.schema.errors import UnavailableError
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.runtime import JudgeRuntime

IMAGE_COUNTS = (4, 8, 16, 32)  # images in one request that are tried, in order, until one is refused
ATTEMPTS = 3  # of a probe: one answer, good or bad, is no finding
ENOUGH = 2  # answers of these that must be good
PROBED_LAYERS = 3
NOT_KNOWN = "not known: no answer came"
MOST_REFUSALS = 8  # features that are given up one after another
BUSY_REASONS = frozenset(f"http_{status}" for status in BUSY)
NEEDED_IMAGES = 8  # source, recomposition and the layers of L = 5 on one backdrop, with room for one
GOOD_AGREEMENT, POOR_AGREEMENT = 0.8, 0.5  # rank agreement with the canaries' grades


@dataclass(frozen=True)
class CheckReport:
    """Findings about an endpoint. `problems` speak against the endpoint; `verdict` is "good", "usable" or "unfit"."""

    url: str
    model: str
    models: list[str]
    version: str
    json_schema: bool
    json_object: bool
    logprobs: bool
    images_per_request: int
    thinking: str  # "off", or where the thought lies
    refusal: str  # why no probe brought a completion, so that of its form nothing is known; empty where one did
    prefix_caching: str
    latency_p50_seconds: float
    latency_p95_seconds: float
    requests: int
    tokens_input: int
    tokens_output: int
    canaries: CanaryReport
    seconds: float
    given_up: list[str] = field(default_factory=list)  # a line about each feature that it refuses
    problems: list[str] = field(default_factory=list)
    verdict: str = ""

    def lines(self) -> list[str]:
        """The report for a terminal."""
        canaries, asked = self.canaries, max(1, self.requests)
        more = "+" if self.images_per_request == IMAGE_COUNTS[-1] else ""
        rows = {
            "judge": f"{self.model} at {self.url}",
            "says it is": self.version or "nothing",
            "JSON schema": NOT_KNOWN if self.refusal else _yes(self.json_schema, "answers are repaired or repeated"),
            "JSON object": NOT_KNOWN if self.refusal else _yes(self.json_object),
            "log-probabilities": NOT_KNOWN if self.refusal else _yes(self.logprobs, "extraction must be sampled"),
            "images per request": f"{self.images_per_request}{more}",
            "thinking": self.thinking,
            "prefix caching": self.prefix_caching,
            "latency": f"{self.latency_p50_seconds:.2f} s median, {self.latency_p95_seconds:.2f} s p95",
            "tokens per request": f"{self.tokens_input / asked:.0f} in, {self.tokens_output / asked:.0f} out",
            "rank agreement": f"{_number(canaries.agreement)} phase 1, {_number(canaries.agreement_phase2)} phase 2 "
            "(1 is best)",
            "text in images": f"earns {_number(canaries.injection_gain)} reward (0 is best)",
        }
        for name, reward in sorted(canaries.rewards.items(), key=lambda item: (-item[1], item[0])):
            rows[f"  {name}"] = f"{_number(reward)} phase 1, {_number(canaries.phase2.get(name))} phase 2"
        out = [f"{label:<22}{text}" for label, text in rows.items()]
        for why in dict.fromkeys(canaries.failures.values()):  # which often are one
            names = [name for name, reason in canaries.failures.items() if reason == why]
            out.append(f"  no judgement of {', '.join(names)}: {why}")
        out += self.given_up
        out += [f"problem: {problem}" for problem in self.problems]
        return [*out, f"verdict: {self.verdict} ({self.requests} requests in {self.seconds:.1f} s)"]

    def to_dict(self) -> dict[str, Any]:
        """The report for machines."""
        canaries = self.canaries
        return {
            **{name: value for name, value in self.__dict__.items() if name != "canaries"},
            "agreement": canaries.agreement,
            "agreement_phase2": canaries.agreement_phase2,
            "injection_gain": canaries.injection_gain,
            "canaries": canaries.rewards,
            "canaries_phase2": canaries.phase2,
            "canaries_failed": canaries.failures,
        }


def check(
    url: str, *, model: str = "", api_key: str | None = None, recipe: JudgeRecipe | None = None, designs: int = 2
) -> CheckReport:
    """Try an endpoint.

    Args:
        url: Base URL of an OpenAI-compatible API.
        model: Its model; by default the recipe's, or the only one that it serves.
        api_key: By default the environment's OPENAI_API_KEY.
        recipe: How a campaign would judge with it.
        designs: Designs whose canaries are judged, seven requests each and two grids.

    Raises:
        LayerloopError: nothing answers at the URL, it refuses the key, or it does not serve the model.
    """
    return asyncio.run(_check(url, model, api_key, recipe or JudgeRecipe(), designs))


async def _check(url: str, model: str, api_key: str | None, recipe: JudgeRecipe, designs: int) -> CheckReport:
    start = time.monotonic()
    recipe = recipe.model_copy(update={"redraws": min(recipe.redraws, 2)})
    given_up: list[str] = []
    runtime = JudgeRuntime(give_up_seconds=5.0, retries=2)
    async with Judge(url, recipe, runtime, api_key=api_key) as judge:
        models = await judge.connection.models(timeout=20.0)
    model = model or (models[0] if len(models) == 1 else recipe.model)
    recipe = recipe.model_copy(update={"model": model})
    async with Judge(url, recipe, runtime, api_key=api_key) as judge:
        judge.log = given_up.append
        await judge.check_reachable(probe=True)
        rubric = rubric_of(recipe)
        probe = _probe(rubric, recipe, layers=PROBED_LAYERS)
        json_schema = await _answers(judge, probe, EndpointFeatures())
        json_object = await _answers(judge, probe, EndpointFeatures(response_format="json_object"))
        logprobs = await _has_logprobs(judge, probe, json_schema)
        judge.features = replace(
            judge.features, response_format="json_schema" if json_schema else "json_object" if json_object else "none"
        )
        images = await _images(judge, rubric, recipe)
        connection, features, most = judge.connection, judge.features, runtime.timeout_seconds
        thoughts, refusal = await try_thinking(connection, probe, recipe, features, timeout=most)
        prefixes = await try_prefixes(connection, rubric, recipe, features, timeout=most)
        canaries = await score_canaries(judge, rubric, recipe, designs=designs)
        statistics = judge.statistics
    report = CheckReport(
        url=judge.url,
        model=model,
        models=models,
        version=", ".join(sorted(statistics.versions)),
        json_schema=json_schema,
        json_object=json_object,
        logprobs=logprobs,
        images_per_request=images,
        thinking=_thinking(thoughts),
        refusal="" if thoughts else refusal,
        prefix_caching=NOT_KNOWN if prefixes is None else str(prefixes),
        latency_p50_seconds=statistics.percentile(0.5),
        latency_p95_seconds=statistics.percentile(0.95),
        requests=statistics.answered,
        tokens_input=statistics.tokens_in,
        tokens_output=statistics.tokens_out,
        canaries=canaries,
        given_up=list(dict.fromkeys(given_up)),
        seconds=time.monotonic() - start,
    )
    return _judged(report)


def _judged(report: CheckReport) -> CheckReport:
    """The report with its problems and verdict."""
    grave, light = [], []
    agreement, gain = report.canaries.agreement, report.canaries.injection_gain
    if agreement is None or len(report.canaries.failures) > len(report.canaries.rewards) / 2:
        grave.append("most canaries got no judgement")
    elif agreement < POOR_AGREEMENT:
        grave.append(f"it hardly separates good from bad decompositions (rank agreement {agreement:.2f})")
    elif agreement < GOOD_AGREEMENT:
        light.append(f"it confuses some good and bad decompositions (rank agreement {agreement:.2f})")
    phase2 = report.canaries.agreement_phase2
    if phase2 is not None and phase2 < POOR_AGREEMENT:
        grave.append(f"in phase 2 it hardly separates good from bad (rank agreement {phase2:.2f})")
    if gain is not None and gain > FOOLED:
        grave.append(f"it obeys text inside images (reward +{gain:.2f})")
    if report.refusal:
        grave.append(f"it answers no request of {PROBED_LAYERS + 2} images ({report.refusal})")
    if report.images_per_request < NEEDED_IMAGES:
        grave.append(
            f"it takes {report.images_per_request} images per request, {NEEDED_IMAGES} are needed for five layers"
        )
    if not report.json_schema and not report.refusal:
        light.append("it does not hold itself to a JSON schema: more answers will be repaired or repeated")
    if not report.thinking.startswith("off") and not report.refusal:
        light.append(f"thinking is {report.thinking}: {SWITCH}")
    if report.canaries.failures and not grave:
        light.append(f"{len(report.canaries.failures)} canaries got no judgement")
    verdict = "unfit" if grave else "usable" if light else "good"
    return replace(report, problems=[*grave, *light], verdict=verdict)


def _probe(rubric: Rubric, recipe: JudgeRecipe, *, layers: int) -> Request:
    """A phase-1 request with `layers` + 2 images on the first backdrop."""
    canary = make_canaries()[0]
    stack = np.concatenate([canary.stack, np.repeat(canary.stack[1:2], max(0, layers - 3), axis=0)])[:layers]
    images = candidate_images(fitted(stack, recipe.resolution), recipe.backdrops[:1])
    source = encode_image(fitted(canary.source, recipe.resolution))
    return PHASE1[recipe.method].request(rubric, source, images, recipe, label=f"probe of {layers + 2} images")


async def _post(judge: Judge, request: Request, wanted: EndpointFeatures, *, attempt: int = 0) -> tuple[Reply, bool]:
    """A reply, and whether it came by the wanted format and log-probabilities.

    Other features that the endpoint refuses are given up, as in a campaign, and remembered for all that follows. Raises
    UnusableError.
    """
    kept = replace(judge.features, response_format=wanted.response_format, logprobs=wanted.logprobs)
    for _ in range(MOST_REFUSALS):
        temperature = judge.recipe.temperature if not attempt else max(judge.recipe.temperature, RETRY_TEMPERATURE)
        payload = kept.payload(request, judge.recipe, seed=1 + attempt, temperature=temperature)
        try:
            reply = read_body((await post(judge.connection, payload, timeout=judge.runtime.timeout_seconds))[0])
            judge.connection.saw_answer()
        except TransportError as error:
            simpler = judge.simpler(kept, error) if error.status in REFUSALS else None
            if simpler is None:
                raise error.problem from None
            kept = simpler
            continue
        judge.features = replace(
            judge.features, seed=kept.seed, temperature=kept.temperature, limit_name=kept.limit_name
        )
        return reply, (kept.response_format, kept.logprobs) == (wanted.response_format, wanted.logprobs)
    raise UnusableError("http_400", "every feature is refused")


def _thinking(thoughts: list[str | None]) -> str:
    """What some answers say about thinking."""
    some = [thought for thought in thoughts if thought is not None]
    if not thoughts:
        return NOT_KNOWN
    return f"on in {len(some)} of {len(thoughts)} answers, {some[0]}" if some else f"off ({len(thoughts)} answers)"


async def _answers(judge: Judge, request: Request, features: EndpointFeatures) -> bool:
    """Whether the endpoint answers with usable JSON by this format, most of the times that it is asked.

    Raises:
        UnavailableError: it was busy each time, which says nothing of the format.
    """
    good, busy = 0, 0
    for attempt in range(ATTEMPTS):
        try:
            reply, as_wanted = await _post(judge, request, features, attempt=attempt)
            if not as_wanted:
                return False
            parse(request, reply)
        except UnusableError as error:
            if error.reason.startswith("http_4") and not error.retry:
                return False
            busy += error.reason in BUSY_REASONS
            if busy == ATTEMPTS:
                raise UnavailableError(f"judge {judge.url} is busy ({error}): check it again later") from None
            continue
        good += reply.text.lstrip().startswith("{")
    return good >= ENOUGH


async def _has_logprobs(judge: Judge, request: Request, json_schema: bool) -> bool:
    features = replace(judge.features, logprobs=True, response_format="json_schema" if json_schema else "none")
    for attempt in range(ATTEMPTS):
        try:
            reply, as_wanted = await _post(judge, request, features, attempt=attempt)
        except UnusableError:
            continue
        if not as_wanted:
            return False
        if any(len(token.get("top_logprobs") or []) > 1 for token in reply.tokens):
            return True
    return False


async def _images(judge: Judge, rubric: Rubric, recipe: JudgeRecipe) -> int:
    """The largest tried number of images in a request that gets a completion."""
    most = 0
    for count in IMAGE_COUNTS:
        request = _probe(rubric, recipe, layers=count - 2)
        for attempt in range(ATTEMPTS):
            try:
                await _post(judge, request, judge.features, attempt=attempt)
            except UnusableError as error:
                if error.reason not in PAID and (error.retry is False or error.reason.startswith("http_")):
                    if error.retry:  # busy, or an error of the moment
                        continue
                    return most
            most = count  # it accepted the images, whatever it answered
            break
        else:
            return most
    return most


def _yes(found: bool, otherwise: str = "") -> str:
    return "yes" if found else f"no{': ' if otherwise else ''}{otherwise}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
