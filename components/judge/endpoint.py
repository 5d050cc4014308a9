"""The endpoint behind a judge's URL: whether anything answers there, whether it serves the model, and still does."""

from __future__ import annotations

import asyncio
import json
import re
import time

from layerloop.components.judge.errors import read_error, shown
from layerloop.components.judge.features import EndpointFeatures
from layerloop.components.judge.replies import PAID, UnusableError, read_body
from layerloop.components.judge.transport import Connection, TransportError
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.messages import printable
from layerloop.components.schema.runtime import JudgeRuntime

REFUSALS = frozenset({400, 404, 415, 422, 501})  # statuses that may be about a parameter of the request
NO_ROUTE = frozenset({404, 405, 410})  # statuses of a URL or model that does not exist
_NOWHERE = re.compile(  # the same with status 200, of LM Studio and of gateways
    r"unexpected endpoint|not found|no route|cannot post|(?:unknown|invalid|no such) (?:endpoint|path|route|url|model)|"
    r"code 40[45]\b",
    re.IGNORECASE,
)


class Endpoint:
    """What is at the other end of a connection, asked with short questions to `model`."""

    def __init__(self, connection: Connection, model: str, runtime: JudgeRuntime) -> None:
        self._connection, self._model, self._runtime = connection, model, runtime

    async def check(self, *, probe: bool = False) -> list[str]:
        """Ids of the models that are served; empty where the endpoint does not list them.

        A list that lacks the recipe's model, or that is refused, decides nothing: then a short question to the model
        does. With `probe` it is always asked.

        Raises:
            LayerloopError: nothing answers at the URL, it is not that of the API, it refuses the key, or it does not
                serve the recipe's model.
        """
        until = time.monotonic() + self._runtime.start_seconds
        while True:
            try:
                models = await self._connection.models(timeout=min(20.0, self._runtime.timeout_seconds))
                if models or time.monotonic() >= until:  # a proxy before a judge that starts lists nothing
                    break
            except UnavailableError:
                if time.monotonic() >= until:
                    raise
            await asyncio.sleep(min(5.0, self._runtime.start_seconds / 20))
        listed = any(_same_model(self._model, model) for model in models)
        if probe or not listed:
            answers = await self._answers(models)
            if models and not listed and answers is False:
                served = printable(", ".join(sorted(models)[:6]))
                what = f"recipe.judge.model is {self._model!r}, judge {self._connection.url} serves {served}"
                raise LayerloopError(f"{what}: choose one of these")
        return models

    async def _answers(self, models: list[str]) -> bool | None:
        """Whether the model answers a short question; None where the judge is busy or its trouble may pass, which says
        nothing. What only says that the question was bad is no answer and no error.

        Raises:
            LayerloopError: nothing is served at the URL, the key is refused, or there is no credit.
        """
        features = EndpointFeatures(response_format="none", seed=False, temperature=False)
        for _ in range(4):
            question = {"model": self._model, "messages": [{"role": "user", "content": "Say yes."}]}
            if features.limit_name:
                question[features.limit_name] = 16  # type: ignore[assignment]
            try:
                body = await self._connection.post(
                    json.dumps(question).encode(), timeout=min(60.0, self._runtime.timeout_seconds)
                )
            except TransportError as error:
                if error.status in NO_ROUTE:
                    if models and "model" in error.text.lower():
                        return False
                    raise self.not_served(error) from None
                simpler = features.without(error.text) if error.status in REFUSALS else None
                if simpler is None:
                    return None if error.problem.retry else False
                features = simpler
                continue
            try:
                read_body(body)
            except UnusableError as error:
                return True if error.reason in PAID else self._says_nothing(error, body, models)
            return True
        return False

    def _says_nothing(self, problem: UnusableError, body: bytes, models: list[str]) -> bool | None:
        """What a body with status 200 that is no completion says of the model. Raises LayerloopError as `_answers`."""
        self._connection.error_in_body(problem, body)
        text = read_error(body)
        page = problem.reason == "body_not_json" and body.lstrip()[:1] == b"<"
        if not page and not _NOWHERE.search(text):
            return None
        if models and "model" in text.lower():
            return False
        raise self.not_served(TransportError(problem, status=200, text=text))

    def not_served(self, error: TransportError) -> LayerloopError:
        """The refusal of a URL behind which there is no judge, or not this model."""
        said = f"HTTP {error.status}{': ' if error.text else ''}{shown(error.text)}"
        if "model" in error.text.lower():
            return LayerloopError(
                f"judge {self._connection.url} does not serve recipe.judge.model {self._model!r} ({said}): choose "
                "another"
            )
        base = self._connection.url.partition("?")[0].rstrip("/")
        if base.endswith("/chat/completions"):
            hint = f"leave out /chat/completions: {base.removesuffix('/chat/completions')}"
        elif not re.search(r"/v\d+(?:beta\d*|alpha\d*)?(?:/|$)", base):
            hint = f"the base URL of most servers ends in /v1: try {base}/v1"
        else:
            hint = "give the base URL of an OpenAI-compatible API, such as http://127.0.0.1:8788/v1"
        return LayerloopError(f"judge {self._connection.url} has no /chat/completions ({said}): {hint}")

    async def is_alive(self) -> bool:
        """Whether the judge answers a short question, be it by saying that the question is bad."""
        question = {"model": self._model, "messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 16}
        try:
            read_body(await self._connection.post(json.dumps(question).encode(), timeout=self._runtime.timeout_seconds))
        except TransportError as error:
            return error.status is not None and not error.problem.retry
        except UnusableError as error:
            return error.reason in PAID
        return True


def _same_model(wanted: str, listed: str) -> bool:
    """Whether a listed id is the wanted model: Ollama adds `:latest`, Gemini puts `models/` before."""
    return wanted.removeprefix("models/").removesuffix(":latest") == listed.removeprefix("models/").removesuffix(
        ":latest"
    )
