"""The compiled pipelines under the contract of Kubeflow's backend (tests/kfp_backend.py), to a target and beyond."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kfp_backend import Backend, TaskFailed
from PIL import Image
from warm_python import warm

from layerloop.components.storage.campaign import Campaign
from layerloop.pipelines.cluster import Cluster
from layerloop.pipelines.evaluate import evaluate_pipeline
from layerloop.pipelines.inputs import recipe_text
from layerloop.pipelines.packages import write_pipeline
from layerloop.pipelines.train import train_pipeline

from ..judge_server import start_in_thread

pytestmark = pytest.mark.timeout(1800)

SMALL = [
    "rollout.groups=2", "rollout.group_size=3", "rollout.steps=4", "rollout.window.size=2", "rollout.max_layers=2",
    "data.holdout=2", "evaluation.steps=2", "evaluation.layers=[2]", "evaluation.designs=0", "evaluation.pictures=2",
    "judge.min_valid=2",
]  # fmt: skip
RECIPE = recipe_text("tiny", SMALL)
JUDGE = "http://judge.invalid:8000/v1"  # for runs that end before they ask it
ITERATION_OF_TWO = ["generate-rollouts", "generate-rollouts", "score-rollouts", "update-lora"]


@pytest.fixture(scope="module")
def judge_url() -> Iterator[str]:
    with start_in_thread() as url:
        yield url


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight images that differ."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{number}.png")
    return str(folder)


def train(folder: Path, *, iterations: int = 1, workers: int = 1, evaluate: str = "end", **options: Any) -> Backend:
    resident = options.pop("resident", False)
    pipeline = train_pipeline(
        iterations=iterations, workers=workers, recipe=RECIPE, evaluate=evaluate, cluster=Cluster(retries=1),
        resident=resident,
    )  # fmt: skip
    return Backend(write_pipeline(pipeline, folder / "train.yaml"), folder / "root", **options)


def evaluation(folder: Path, **options: Any) -> Backend:
    return Backend(
        write_pipeline(evaluate_pipeline(recipe=RECIPE), folder / "evaluate.yaml"), folder / "root", **options
    )


class KfpServer(ThreadingHTTPServer):
    """Answers as the API server does about one run, which a recurring run started."""

    daemon_threads = True

    def __init__(self, recurring: str) -> None:
        super().__init__(("127.0.0.1", 0), _KfpHandler)
        self.recurring, self.disabled = recurring, []  # type: str, list[str]


class _KfpHandler(BaseHTTPRequestHandler):
    server: KfpServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({"run_id": self.path.rpartition("/")[2], "recurring_run_id": self.server.recurring})

    def do_POST(self) -> None:
        self.server.disabled.append(self.path)
        self._answer({})

    def _answer(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def kfp_server() -> Iterator[KfpServer]:
    server = KfpServer("chain-7")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_two_iterations_of_two_workers_stop_at_a_target_of_one_and_deliver_it(
    tmp_path: Path, images: str, judge_url: str
) -> None:
    campaign = str(tmp_path / "campaign")
    backend = train(tmp_path, iterations=2, workers=2, pods_have_names=False, python=warm())
    backend.run(campaign=campaign, images=images, judge_url=judge_url, until=1, overrides={"seed": 11.0})
    ends = ["evaluate-adapter", "publish-adapter"]
    assert backend.steps() == ["shard-dataset", *ITERATION_OF_TWO, *ITERATION_OF_TWO, *ends]
    surplus = backend.pods[5:9]
    assert all("iteration 2 is past the run's target 1: nothing to do" in pod.output for pod in surplus)
    opened = Campaign.open(campaign)
    assert (opened.head(), opened.iterations(), opened.recipe.seed) == (1, [1], 11)
    assert opened.evaluations() == ["iteration-000001"]
    assert [name[-7:] for name in opened.published()] == ["-000001"]


def test_on_s3_a_campaign_ends_at_its_target_and_switches_its_recurring_run_off(
    s3_bucket: str, tmp_path: Path, images: str, judge_url: str, kfp_server: KfpServer
) -> None:
    api = {"LAYERLOOP_KFP_API": f"http://127.0.0.1:{kfp_server.server_address[1]}"}
    nightly = evaluation(tmp_path, environment=api, python=warm())
    with pytest.raises(TaskFailed, match=r"is no campaign, for it has no recipe.json: begin one with `layerloop run`"):
        nightly.run(campaign=s3_bucket)

    job = {"campaign": s3_bucket, "images": images, "judge_url": judge_url, "until": 1, "max_failures": 2}
    first = train(tmp_path, environment=api, python=warm())
    first.run(**job)
    assert first.steps()[-2:] == ["evaluate-adapter", "publish-adapter"]
    assert Campaign.open(s3_bucket).head() == 1
    assert kfp_server.disabled == []

    second = train(tmp_path, environment=api, python=warm())
    second.run(**job)
    assert second.steps() == ["shard-dataset"]
    assert "has reached its target: iteration 1 of 1" in second.pods[0].output
    assert "recurring run chain-7 is switched off" in second.pods[0].output
    assert kfp_server.disabled == ["/apis/v2beta1/recurringruns/chain-7:disable"]

    nightly = evaluation(tmp_path, environment=api, python=warm())
    nightly.run(campaign=s3_bucket)
    assert nightly.steps() == ["shard-dataset", "evaluate-adapter"]


def test_a_refusal_is_repeated_by_the_next_pods_and_forgotten_by_the_next_run(
    s3_bucket: str, tmp_path: Path, images: str
) -> None:
    job = {"campaign": s3_bucket, "images": f"{images}/*.none", "judge_url": JUDGE}
    backend = train(tmp_path)
    with pytest.raises(TaskFailed, match="the same refusal as .* s ago in pod .*-shard-dataset-0, not retried"):
        backend.run(**job)
    outputs = [pod.output for pod in backend.pods]
    assert [pod.status for pod in backend.pods] == [2, 2]
    assert ["same refusal" in output for output in outputs] == [False, True]
    assert all(output.splitlines()[-1].startswith(f"error: images {images}/*.none") for output in outputs)
    again = train(tmp_path)
    with pytest.raises(TaskFailed):
        again.run(**job)
    assert "same refusal" not in again.pods[0].output


def test_a_misspelt_override_is_one_line(tmp_path: Path, s3_bucket: str, images: str) -> None:
    backend = train(tmp_path)
    with pytest.raises(TaskFailed, match="recipe.update.learning_rat is not a known key: did you mean 'learning_rate'"):
        backend.run(campaign=s3_bucket, images=images, judge_url=JUDGE, overrides={"update": {"learning_rat": 1e-4}})


def test_a_folder_as_campaign_is_refused_in_a_pod(tmp_path: Path, images: str) -> None:
    fleeting = Path("/var/tmp") if Path("/var/tmp").stat().st_dev == Path("/").stat().st_dev else Path("/")
    backend = train(tmp_path)
    with pytest.raises(TaskFailed, match="a folder of this pod, gone with it: give s3://bucket/prefix"):
        backend.run(campaign=str(fleeting / "layerloop-none"), images=images)


def test_a_resident_run_ends_at_its_target_and_the_next_has_nothing_to_do(
    tmp_path: Path, s3_bucket: str, images: str, judge_url: str
) -> None:
    given = {"campaign": s3_bucket, "images": images, "judge_url": judge_url, "until": 2}
    first = train(tmp_path, iterations=3, resident=True, python=warm())
    first.run(**given)
    assert first.steps() == ["shard-dataset", "train-stretch", "evaluate-adapter", "publish-adapter"]
    assert Campaign.open(s3_bucket).iterations() == [1, 2]
    second = train(tmp_path, iterations=3, resident=True, python=warm())
    second.run(**given)
    assert second.steps() == ["shard-dataset"]


@pytest.mark.slow
@pytest.mark.parametrize("store", ["folder", "s3"])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_shape_trains_and_evaluates(
    store: str, iterations: int, workers: int, tmp_path: Path, request: Any, images: str, judge_url: str
) -> None:
    campaign = str(tmp_path / "campaign") if store == "folder" else request.getfixturevalue("s3_bucket")
    options = {"pods_have_names": store == "s3"}
    backend = train(tmp_path, iterations=iterations, workers=workers, evaluate="every-run", **options)
    backend.run(campaign=campaign, images=images, judge_url=judge_url, publish_as="best")
    assert len(backend.pods) == 1 + iterations * (workers + 2) + 2
    assert (Campaign.open(campaign).head(), Campaign.open(campaign).published()) == (iterations, ["best"])
    nightly = evaluation(tmp_path, **options)
    nightly.run(campaign=campaign, iteration=1)
    assert Campaign.open(campaign).evaluations()[0] == "iteration-000001"


@pytest.mark.slow
def test_without_evaluation_the_adapter_is_published_all_the_same(tmp_path: Path, images: str, judge_url: str) -> None:
    backend = train(tmp_path, evaluate="never", pods_have_names=False)
    backend.run(campaign=str(tmp_path / "c"), images=images, judge_url=judge_url)
    assert backend.steps()[-2:] == ["update-lora", "publish-adapter"]
    assert Campaign.open(str(tmp_path / "c")).evaluations() == []
