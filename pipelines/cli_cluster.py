"""The commands of `layerloop` that talk to a KFP API server: submit, schedule, pipeline, campaign run-until."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.cli_parser import command
from layerloop.pipelines.settings import ENVIRONMENT

SUBMIT_EXAMPLES = """\
examples:
  layerloop submit train.yaml --host https://kubeflow.example.com/pipeline --wait -p campaign=s3://bucket/mine \\
      -p images=s3://bucket/photos -p judge_url=http://layerloop-judge.team-a.svc.cluster.local:8000/v1
  layerloop submit layerloop-train --until 100 -p campaign=s3://bucket/mine -p images=s3://bucket/photos
  layerloop submit --attach 5f0c6b1e-...

exit status: 0 the run succeeded (or was started, without --wait), 1 it failed, 2 refused (a wrong input, not signed in,
not KFP), 3 it was cancelled or skipped, or its end was not seen within --timeout or --patience, 130 interrupted. In the
last two cases the run continues, and --attach waits for it again.
"""

SCHEDULE_EXAMPLES = """\
examples:
  layerloop schedule apply layerloop-evaluate --name nightly --cron '0 0 2 * * *' -p campaign=s3://bucket/mine
  layerloop schedule apply -f schedules.yaml
  layerloop schedule list
  layerloop schedule pause nightly

A cron expression has six fields, seconds first, in the cluster's time zone. A schedule of the same name is replaced;
one with the same settings is left as it is.
"""

UPLOAD_EXAMPLES = """\
examples:
  layerloop pipeline upload train.yaml evaluate.yaml

prints NAME@VERSION, which `submit` and `schedule apply` take in place of a file. The version is named by a hash of the
content, so the same pipeline is registered once however often it is uploaded.
"""

UNTIL_EXAMPLES = """\
examples:
  layerloop campaign run-until s3://bucket/mine --until 200 --pipeline layerloop-train \\
      -p images='s3://bucket/photos/*' -p judge_url=http://layerloop-judge.team-a.svc.cluster.local:8000/v1

It returns at once: KFP keeps a recurring run, one run at a time, and nothing of yours has to stay alive.
"""


def add_cluster_commands(commands: Any, campaign: Any) -> None:
    """Add them to the parsers of `layerloop` and of `layerloop campaign`.

    Args:
        commands: Subparsers of `layerloop`.
        campaign: Subparsers of `layerloop campaign`.
    """
    submit = _command(commands, "submit", _submit, "start a run on a cluster, and wait for it", _with(SUBMIT_EXAMPLES))
    submit.add_argument("pipeline", nargs="?", metavar="PIPELINE", help=_PIPELINE)
    _run_options(submit)
    _client_options(submit)
    submit.add_argument("--run-name", default=None, help="(default: the pipeline's name and the time)")
    submit.add_argument("--wait", action="store_true", help="wait for the end and return its result as the exit status")
    until = "run after run until the campaign's head is at iteration N; a live run is attached to"
    submit.add_argument("--until", type=int, default=None, metavar="N", help=until)
    _failures_option(submit)
    submit.add_argument("--attach", default=None, metavar="RUN_ID", help="wait for a run that was started before")
    submit.add_argument("--timeout", type=float, default=None, metavar="SECONDS", help="in all, whatever KFP does")
    patience = "while waiting, how long KFP may be away (default: 2 hours)"
    submit.add_argument("--patience", type=float, default=7200.0, metavar="SECONDS", help=patience)

    schedule = commands.add_parser("schedule", help="recurring runs on a cluster").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    apply = _command(schedule, "apply", _apply, "create or replace recurring runs", _with(SCHEDULE_EXAMPLES))
    apply.add_argument("pipeline", nargs="?", metavar="PIPELINE", help=_PIPELINE)
    apply.add_argument("-f", "--file", default=None, metavar="FILE", help="YAML with any number of schedules")
    apply.add_argument("--name", default=None, help="name of the recurring run")
    apply.add_argument("--cron", default=None, help="six fields, seconds first: '0 0 2 * * *'")
    _run_options(apply)
    _client_options(apply)
    listing = _command(schedule, "list", _list, "list the experiment's recurring runs", _with(""))
    _client_options(listing)
    for what, summary in (
        ("delete", "delete recurring runs; an active run of theirs is stopped with them"),
        ("pause", "start no further runs; an active one continues"),
        ("resume", "start runs again"),
    ):
        change = _command(schedule, what, _change, summary, _with(""))
        change.set_defaults(what=what)
        change.add_argument("names", nargs="+", metavar="NAME")
        _client_options(change)

    pipeline = commands.add_parser("pipeline", help="pipelines that are registered with KFP").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    upload = _command(pipeline, "upload", _upload, "register compiled pipelines with KFP", _with(UPLOAD_EXAMPLES))
    upload.add_argument("files", nargs="+", metavar="FILE", help="a pipeline that `layerloop compile` wrote")
    upload.add_argument("--name", default=None, help="name in the UI, with one FILE (default: the pipeline's own)")
    _client_options(upload)

    chain = _command(
        campaign, "run-until", _run_until, "let KFP run a campaign to its target iteration", _with(UNTIL_EXAMPLES)
    )
    chain.add_argument("campaign", metavar="URI", help="s3://bucket/prefix")
    chain.add_argument("--until", type=int, required=True, metavar="N", help="the iteration to reach")
    chain.add_argument("--pipeline", required=True, metavar="PIPELINE", help=_PIPELINE)
    _failures_option(chain)
    chain.add_argument(
        "--every", type=int, default=10, metavar="MINUTES", help="between two looks (default: %(default)s)"
    )
    chain.add_argument("--replace", action="store_true", help="even if the chain's run is active, which stops it")
    _run_options(chain)
    _client_options(chain)


_PIPELINE = "a compiled pipeline (.yaml), or NAME or NAME@VERSION that is registered with KFP"


def _command(commands: Any, name: str, handler: Any, *rest: str) -> argparse.ArgumentParser:
    """`command`, whose handler says in one line that the extra is not installed, as in the images of the steps."""

    def handle(arguments: argparse.Namespace) -> Any:
        try:
            return handler(arguments)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("kfp", "requests"):
                raise
            raise LayerloopError(
                f"layerloop {name} needs {error.name}, which is not here: pip install 'layerloop[pipelines]'"
            ) from None

    return command(commands, name, handle, *rest)


def _with(examples: str) -> str:
    return f"{examples}\n{ENVIRONMENT}" if examples else ENVIRONMENT


def _run_options(parser: argparse.ArgumentParser) -> None:
    help_ = "a pipeline parameter (may be repeated); NAME=@FILE reads a file"
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help=help_)
    account = "service account of the run's pods (default: KFP_SERVICE_ACCOUNT, else KFP's own)"
    parser.add_argument("--service-account", default=None, metavar="NAME", help=account)
    root = "where KFP keeps what passes between steps (default: KFP_PIPELINE_ROOT, else KFP's own)"
    parser.add_argument("--pipeline-root", default=None, metavar="URI", help=root)


def _client_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default=None, metavar="URL", help="KFP endpoint (default: KFP_ENDPOINT)")
    namespace = "the profile's namespace in multi-user mode (default: KFP_NAMESPACE)"
    parser.add_argument("--namespace", default=None, help=namespace)
    parser.add_argument("--experiment", default=None, help="(default: KFP_EXPERIMENT, else layerloop)")


def _failures_option(parser: argparse.ArgumentParser) -> None:
    help_ = "runs in a row without progress after which it stops (default: %(default)s)"
    parser.add_argument("--max-failures", type=int, default=3, metavar="K", help=help_)


# ------------------------------------------------------------------------------------------------------------- commands


def _submit(arguments: argparse.Namespace) -> int:
    from layerloop.pipelines.kfp_api import KfpApi, connect
    from layerloop.pipelines.runnable import Pipeline, find_pipeline
    from layerloop.pipelines.runs import Waiting
    from layerloop.pipelines.submit import attach, patiently, submit, submit_until

    given = arguments.timeout
    _positive(timeout=given, patience=arguments.patience, until=arguments.until, max_failures=arguments.max_failures)
    deadline = math.inf if given is None else time.monotonic() + given
    waiting = Waiting(deadline=deadline, patience=arguments.patience)
    if arguments.attach:
        if arguments.pipeline or arguments.until or arguments.parameter:
            raise LayerloopError(
                "--attach waits for a run that was started before: leave out pipeline, parameters and --until"
            )
        run_id = arguments.attach.strip().rstrip("/").rpartition("/")[2]  # a run's link is as good
        return attach(connect(arguments.host, arguments.namespace, deadline=deadline), run_id, waiting)
    if not arguments.pipeline:
        raise LayerloopError("no pipeline is given: name a compiled file or a registered pipeline, or --attach RUN_ID")
    parameters = parameters_given(arguments.parameter)

    def found() -> tuple[KfpApi, Pipeline]:
        api = connect(arguments.host, arguments.namespace, deadline=deadline)
        return api, find_pipeline(api, arguments.pipeline)

    if arguments.until is None:
        return submit(*found(), parameters, _settings(arguments), waiting, wait=arguments.wait)
    if "campaign" not in parameters:
        raise LayerloopError("campaign is missing: --until needs -p campaign=s3://bucket/prefix")
    api, pipeline = patiently(found, waiting, what=f"campaign {parameters['campaign']}")
    return submit_until(
        api,
        pipeline,
        parameters,
        _settings(arguments),
        waiting,
        until=arguments.until,
        head=head_of,
        max_failures=arguments.max_failures,
    )


def head_of(campaign: str) -> int:
    """The last committed iteration in a campaign's store; 0 where there is no campaign yet.

    Raises:
        LayerloopError: the store cannot be read from here.
    """
    from layerloop.components.storage.campaign import RECIPE, Campaign
    from layerloop.components.storage.stores import open_store

    return Campaign.open(campaign).head() if open_store(campaign).exists(RECIPE) else 0


def _apply(arguments: argparse.Namespace) -> None:
    from layerloop.components.schema.record import validate
    from layerloop.pipelines.kfp_api import connect
    from layerloop.pipelines.runnable import Pipeline, find_pipeline, typed_parameters
    from layerloop.pipelines.schedules import Schedule, apply_schedule, read_schedules, refuse

    settings = _settings(arguments)
    defaults = {
        "experiment": settings.experiment,
        "service_account": settings.service_account,
        "pipeline_root": settings.pipeline_root,
    }
    if arguments.file:
        if arguments.pipeline or arguments.name or arguments.cron or arguments.parameter:
            raise LayerloopError("--file has everything in it: give no pipeline, --name, --cron or --parameter with it")
        schedules = read_schedules(Path(arguments.file), defaults)
    else:
        needed = {"PIPELINE": arguments.pipeline, "--name": arguments.name, "--cron": arguments.cron}
        missing = [name for name, value in needed.items() if not value]
        if missing:
            raise LayerloopError(f"{', '.join(missing)} not given: `schedule apply` needs them, or --file FILE")
        one = {"name": arguments.name, "pipeline": arguments.pipeline, "cron": arguments.cron}
        values = {"parameters": parameters_given(arguments.parameter)}
        schedules = [validate(Schedule, {**defaults, **one, **values}, where="schedule")]
    api = connect(arguments.host, arguments.namespace)
    found: list[tuple[Schedule, Pipeline]] = []
    problems = []
    for schedule in schedules:  # all of them are looked at before the first is applied
        try:
            pipeline = find_pipeline(api, schedule.pipeline)
            typed_parameters(pipeline, schedule.parameters)
            found.append((schedule, pipeline))
        except LayerloopError as error:
            problems.append(f"schedule {schedule.name}: {error}")
    refuse(problems)
    for schedule, pipeline in found:
        print(apply_schedule(api, schedule, pipeline), flush=True)


def _list(arguments: argparse.Namespace) -> None:
    from layerloop.pipelines.kfp_api import connect
    from layerloop.pipelines.schedules import list_schedules

    api = connect(arguments.host, arguments.namespace)
    print("\n".join(list_schedules(api, _settings(arguments).experiment)))


def _change(arguments: argparse.Namespace) -> None:
    from layerloop.pipelines.kfp_api import connect
    from layerloop.pipelines.schedules import change_schedules

    api = connect(arguments.host, arguments.namespace)
    print("\n".join(change_schedules(api, _settings(arguments).experiment, arguments.names, arguments.what)))


def _upload(arguments: argparse.Namespace) -> None:
    from layerloop.pipelines.kfp_api import connect
    from layerloop.pipelines.runnable import read_package, upload

    if arguments.name and len(arguments.files) > 1:
        raise LayerloopError(f"--name is {arguments.name!r} for {len(arguments.files)} files: upload them one by one")
    for file in arguments.files:
        read_package(Path(file))
    api = connect(arguments.host, arguments.namespace)
    for file in arguments.files:
        print(upload(api, Path(file), name=arguments.name), flush=True)


def _run_until(arguments: argparse.Namespace) -> None:
    from layerloop.pipelines.kfp_api import connect
    from layerloop.pipelines.runnable import find_pipeline
    from layerloop.pipelines.schedules import run_until

    _positive(until=arguments.until, max_failures=arguments.max_failures, every=arguments.every)
    api = connect(arguments.host, arguments.namespace)
    run_until(
        api,
        find_pipeline(api, arguments.pipeline),
        parameters_given(arguments.parameter),
        _settings(arguments),
        campaign=arguments.campaign,
        until=arguments.until,
        max_failures=arguments.max_failures,
        every_minutes=arguments.every,
        replace=arguments.replace,
    )


def _settings(arguments: argparse.Namespace) -> Any:
    from layerloop.pipelines.runs import Settings
    from layerloop.pipelines.settings import setting

    return Settings(
        experiment=arguments.experiment or setting("KFP_EXPERIMENT") or "layerloop",
        run_name=getattr(arguments, "run_name", None),
        service_account=getattr(arguments, "service_account", None) or setting("KFP_SERVICE_ACCOUNT"),
        pipeline_root=getattr(arguments, "pipeline_root", None) or setting("KFP_PIPELINE_ROOT"),
    )


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise LayerloopError(f"--{name.replace('_', '-')} is {value:g}: give a number above 0")


def parameters_given(pairs: Sequence[str]) -> dict[str, str]:
    """`key=value` arguments; `key=@file` reads a file, a recipe for instance."""
    parameters = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise LayerloopError(f"parameter {pair!r} has no value: write it as name=value")
        if value.startswith("@"):
            try:
                value = Path(value[1:]).read_text()
            except (OSError, UnicodeDecodeError):
                raise LayerloopError(f"parameter {key} names the file {value[1:]}, which cannot be read") from None
        parameters[key] = value
    return parameters
