"""Recurring runs: the nightly evaluation, and a campaign's chain of training runs until its target.

KFP keeps and starts them (ScheduledWorkflow, its own controller), so nothing of ours has to stay alive. `kfp
recurring-run create` sends every parameter as text and leaves the schedule disabled (kfp 2.17), hence these commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from layerloop.components.schema.errors import LayerloopError, SeveralErrors
from layerloop.components.schema.record import Record, validate
from layerloop.components.schema.yaml_text import load_yaml, read_by_hand
from layerloop.pipelines.kfp_api import KfpApi, equals, experiment, find_experiment, required
from layerloop.pipelines.runnable import Pipeline, digest, typed_parameters
from layerloop.pipelines.runs import Settings, live_runs, options_of, request_fields

CHAIN_MINUTES = 10  # between a run's end and the next, at most; a tick after the target costs a step that ends at once

# Field, lowest, highest, names: what robfig/cron v1 parses, which KFP uses.
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
_FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("second", 0, 59, {}),
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of the month", 1, 31, {}),
    ("month", 1, 12, {name: number for number, name in enumerate(_MONTHS, 1)}),
    ("day of the week", 0, 6, {name: number for number, name in enumerate(_DAYS)}),
)
_ITEM = re.compile(r"(\*|\?|\w+)(?:-(\w+))?(?:/(\d+))?")


def check_cron(text: str) -> str:
    """`text`, if KFP will take it: six fields, seconds first, each in its range.

    Raises:
        ValueError: which field is wrong, and what fits.
    """
    fields = text.split()
    if len(fields) != 6:
        raise ValueError(f"cron is {text!r}: write six fields, seconds first, such as '0 0 2 * * *'")
    chosen = [_check_field(text, value, *field) for value, field in zip(fields, _FIELDS, strict=True)]
    days, months = chosen[3], chosen[4]
    if min(days) > max({2: 29, 4: 30, 6: 30, 9: 30, 11: 30}.get(month, 31) for month in months) and fields[5] in "*?":
        raise ValueError(f"cron is {text!r}: that day never comes in these months")
    return text


def _check_field(text: str, value: str, name: str, low: int, high: int, names: Mapping[str, int]) -> set[int]:
    """The numbers that a field stands for: lists of `*`, `?`, `5`, `1-5` and steps; `5/10` means from 5 on."""
    chosen: set[int] = set()
    for item in value.split(","):
        match = _ITEM.fullmatch(item)
        start, end, step = match.groups() if match else ("", None, None)
        if start in ("*", "?") and end is None:
            first, last = low, high
        else:
            first = _number(start, names)
            last = _number(end, names) if end is not None else high if step else first
        by = int(step or 1)
        if not low <= first <= last <= high or by < 1:
            hint = ", or a name" if names else ""
            raise ValueError(f"cron is {text!r}: {item!r} is no {name}: {low} to {high}{hint}")
        chosen |= set(range(first, last + 1, by))
    return chosen


def _number(text: str, names: Mapping[str, int]) -> int:
    """-1, which is in no field, for what is neither a number nor a name."""
    return names.get(text.lower(), int(text) if text.isascii() and text.isdigit() else -1)


class Schedule(Record):
    """One recurring run, started at the times of `cron` or `every_minutes`: one at a time, and none is made up for."""

    name: str = Field(min_length=1, max_length=100)
    pipeline: str  # a package (.yaml), or NAME or NAME@VERSION that is registered
    cron: str | None = None
    every_minutes: int | None = Field(default=None, ge=1)
    parameters: dict[str, Any] = {}
    experiment: str = "layerloop"
    service_account: str | None = None
    pipeline_root: str | None = None
    paused: bool = False

    @field_validator("cron")
    @classmethod
    def _cron(cls, text: str | None) -> str | None:
        return None if text is None else check_cron(text)

    @model_validator(mode="after")
    def _one_trigger(self) -> Schedule:
        if (self.cron is None) == (self.every_minutes is None):
            raise ValueError(f"schedule {self.name} needs either cron or every_minutes")
        return self

    def trigger(self) -> dict[str, Any]:
        if self.cron:
            return {"cron_schedule": {"cron": self.cron}}
        return {"periodic_schedule": {"interval_second": str(60 * (self.every_minutes or 1))}}

    def when(self) -> str:
        return self.cron or f"every {self.every_minutes} minutes"


def read_schedules(path: Path, defaults: Mapping[str, Any]) -> list[Schedule]:
    """The schedules of a YAML file, `schedules: [{name: ..., pipeline: ..., cron: ..., parameters: {...}}, ...]`.

    Args:
        defaults: For keys that an entry leaves out: experiment, service_account, pipeline_root.

    Raises:
        LayerloopError: everything that is wrong with it, a line each.
    """
    try:
        document: Any = load_yaml(read_by_hand(path), where=f"schedule file {path}")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise LayerloopError(f"schedule file {path} cannot be read ({reason}): name a YAML file") from None
    listed = document.get("schedules") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not listed or set(document) != {"schedules"}:
        raise LayerloopError(f"schedule file {path} must hold one list, `schedules:`, with an entry for each")
    found, problems = [], []
    for index, item in enumerate(listed):
        where = f"schedules[{index}]"
        try:
            found.append(validate(Schedule, {**defaults, **item} if isinstance(item, dict) else item, where=where))
        except LayerloopError as error:
            problems += re.split(rf"; (?={re.escape(where)})", str(error))
    names = [schedule.name for schedule in found]
    problems += [
        f"schedule {name} is given twice: give each a name" for name in sorted(set(names)) if names.count(name) > 1
    ]
    refuse(problems)
    return found


def refuse(problems: Sequence[str]) -> None:
    """Raise LayerloopError with a line for each problem, if there is one."""
    if problems:
        raise SeveralErrors(problems)


def apply_schedule(
    api: KfpApi, schedule: Schedule, pipeline: Pipeline, *, old_run: Literal["keep", "refuse", "stop"] = "keep"
) -> str:
    """Create the recurring run, one at a time and without catching up; an existing one of that name is replaced.

    One that has the very same settings is left as it is (resumed, or paused, as asked). KFP has no call that changes a
    recurring run, and deleting one also deletes its active run, which belongs to it.

    Args:
        old_run: What becomes of an old one's active run: `keep` it, for which the old one is paused and goes
            with the next `apply` or `delete`; `stop` it; or `refuse`, where there must not be a second run.

    Returns:
        What was done, in one line.

    Raises:
        LayerloopError: a wrong package or parameter, an old one's run is alive, or the API server refuses.
    """
    settings = Settings(service_account=schedule.service_account, pipeline_root=schedule.pipeline_root)
    body = {
        "display_name": schedule.name,
        **request_fields(pipeline, typed_parameters(pipeline, schedule.parameters), settings),
        "trigger": schedule.trigger(),
        "max_concurrency": "1",
        "no_catchup": True,
    }
    mark = f"settings {digest(body)}"
    home = experiment(api, schedule.experiment)
    there = _named(api, home, schedule.name)
    same = next((item for item in there if mark in (item.get("description") or "")), None)
    others = [item for item in there if item is not same]
    running = _running(api, home) if others else {}
    alive = {key: running[key] for item in others if (key := item["recurring_run_id"]) in running}
    if alive and old_run == "refuse" and same is None:
        run = next(iter(alive.values()))
        raise LayerloopError(
            f"schedule {schedule.name} has other settings and its run {run['run_id']} is active: wait for its end "
            f"(`layerloop schedule pause {schedule.name}` starts no further one), or give --replace, which stops it"
        )
    if same is None:
        body |= {
            "experiment_id": home,
            "description": f"layerloop {version('layerloop')}, {mark}",
            "mode": "DISABLE" if schedule.paused else "ENABLE",
        }
        made = api.post("recurringruns", body)
        made_id, did = str(required(api, made, "recurring_run_id", "a recurring run")), "created"
    else:
        made_id, did = str(same["recurring_run_id"]), "as it was"
        if _paused(same) != schedule.paused:
            _switch(api, same, on=not schedule.paused)
            did = "paused" if schedule.paused else "resumed"
    for item in others:  # after the new one exists: a refused schedule leaves the old one as it was
        if item["recurring_run_id"] in alive and old_run != "stop":
            _switch(api, item, on=False)
            did += f", the old one is paused while its run {alive[item['recurring_run_id']]['run_id']} continues"
        else:
            api.delete(f"recurringruns/{item['recurring_run_id']}")
            did += ", the old one is deleted"
    return f"schedule {schedule.name} ({schedule.when()}, {pipeline.said}) {made_id}: {did}"


def list_schedules(api: KfpApi, experiment_name: str) -> list[str]:
    """A line for every recurring run of the experiment: name, trigger, state, id."""
    home = find_experiment(api, experiment_name)
    items = list(_all(api, home)) if home else []
    rows = [("name", "when", "state", "id")]
    rows += [(str(i["display_name"]), _when(i), "paused" if _paused(i) else "on", i["recurring_run_id"]) for i in items]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    if not items:
        return [f"experiment {experiment_name} has no schedule"]
    return ["  ".join([*(cell.ljust(w) for cell, w in zip(row[:3], widths, strict=True)), row[3]]) for row in rows]


def change_schedules(api: KfpApi, experiment_name: str, names: Sequence[str], what: str) -> list[str]:
    """Delete, pause or resume recurring runs by their names; a line for each.

    Raises:
        LayerloopError: one of them is not there; then nothing is changed.
    """
    home = find_experiment(api, experiment_name)
    items = list(_all(api, home)) if home else []
    known = sorted({str(item["display_name"]) for item in items})
    refuse(
        [
            f"schedule {name} is not in experiment {experiment_name}: known are {', '.join(known) or 'none'}"
            for name in names
            if name not in known
        ]
    )
    running = _running(api, str(home))
    lines = []
    for item in items:
        name = item["display_name"]
        if name not in names:
            continue
        run = running.get(item["recurring_run_id"])
        going = f"; its run {run['run_id']} continues" if run and what == "pause" else ""
        if what == "delete":
            api.delete(f"recurringruns/{item['recurring_run_id']}")
            going = f"; its run {run['run_id']} is stopped with it" if run else ""
        else:
            _switch(api, item, on=what == "resume")
        lines.append(f"schedule {name} {item['recurring_run_id']}: {what.removesuffix('e')}ed{going}")
    return lines


def run_until(
    api: KfpApi,
    pipeline: Pipeline,
    parameters: Mapping[str, Any],
    settings: Settings,
    *,
    campaign: str,
    until: int,
    max_failures: int,
    every_minutes: int = CHAIN_MINUTES,
    replace: bool = False,
) -> None:
    """Let KFP start run after run of a campaign until its head is at iteration `until`.

    The chain is a recurring run with max_concurrency 1 and no_catchup, named by the campaign, so that there is one a
    campaign: while a run is active none is started. What ends it is the run's own first step
    (pipelines/train.py), which ends green once the target is reached, stops after `max_failures` runs in a row without
    progress, and in both cases disables the recurring run.

    Raises:
        LayerloopError: the package has no such first step, a wrong parameter, another chain's run is active, or KFP
            refuses.
    """
    if not pipeline.declares("until") or not pipeline.declares("max_failures"):
        raise LayerloopError(
            f"{pipeline.said} has no parameters until and max_failures: compile the train pipeline with this layerloop"
        )
    schedule = Schedule(
        name=chain_name(campaign),
        pipeline=pipeline.said,
        every_minutes=every_minutes,
        parameters={**parameters, "campaign": campaign, "until": until, "max_failures": max_failures},
        experiment=settings.experiment,
        service_account=settings.service_account,
        pipeline_root=settings.pipeline_root,
    )
    print(apply_schedule(api, schedule, pipeline, old_run="stop" if replace else "refuse"))
    flags = f"--experiment {settings.experiment} {options_of(api)}"
    print(
        f"campaign {campaign} runs until iteration {until}: a run begins within {every_minutes} minutes of the\n"
        f"last one's end, and {max_failures} in a row without progress end the chain\n"
        f"watch:   {api.ui}/#/recurringruns  or  layerloop campaign show {campaign}\n"
        f"pause:   layerloop schedule pause {schedule.name} {flags}\n"
        f"resume:  layerloop schedule resume {schedule.name} {flags}\n"
        f"remove:  layerloop schedule delete {schedule.name} {flags}",
        flush=True,
    )


def chain_name(campaign: str) -> str:
    """Name of the campaign's one chain: its last part to be read, a hash of all of it to be distinct."""
    uri = campaign.rstrip("/")
    readable = re.sub(r"[^a-z0-9]+", "-", uri.rpartition("/")[2].lower()).strip("-")[:30] or "campaign"
    return f"until-{readable}-{digest(uri)[:8]}"


def _named(api: KfpApi, home: str, name: str) -> list[dict[str, Any]]:
    listed = api.pages("recurringruns", "recurringRuns", experiment_id=home, filter=equals("display_name", name))
    return [item for item in listed if item.get("display_name") == name]


def _all(api: KfpApi, home: str) -> Iterator[dict[str, Any]]:
    return api.pages("recurringruns", "recurringRuns", experiment_id=home)


def _running(api: KfpApi, home: str) -> dict[str, dict[str, Any]]:
    """The live run of each recurring run that has one, by the recurring run's id."""
    return {
        str(run["recurring_run_id"]): run for run in live_runs(api, experiment_id=home) if run.get("recurring_run_id")
    }


def _paused(item: Mapping[str, Any]) -> bool:
    mode = item.get("mode") or "MODE_UNSPECIFIED"  # `status` is what the controller saw last, and may be behind
    return mode == "DISABLE" if mode != "MODE_UNSPECIFIED" else item.get("status") == "DISABLED"


def _switch(api: KfpApi, item: Mapping[str, Any], *, on: bool) -> None:
    api.post(f"recurringruns/{item['recurring_run_id']}:{'enable' if on else 'disable'}")


def _when(item: Mapping[str, Any]) -> str:
    trigger = item.get("trigger") or {}
    seconds = (trigger.get("periodic_schedule") or {}).get("interval_second")
    return str(
        (trigger.get("cron_schedule") or {}).get("cron") or (f"every {int(seconds) // 60} minutes" if seconds else "?")
    )
