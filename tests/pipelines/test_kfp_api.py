"""The client of KFP's API: it signs in, gives up in time, and knows a login page from an answer."""

import datetime
import http.server
import ipaddress
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerloop.pipelines.kfp_api import AwayError, KfpApi, MissingError, RefusedError, connect, experiment


def ask(server: Any, **environment: str) -> dict[str, Any]:
    return KfpApi(server.url, environment=environment).get("healthz")


def test_nothing_is_sent_along_when_nothing_is_set(kfp_api: Any) -> None:
    assert ask(kfp_api)["tag_name"] == "2.17.0"
    assert kfp_api.seen == [("GET", "/apis/v2beta1/healthz", None, None)]


def test_a_token_is_sent_as_a_bearer_token_whatever_a_netrc_says(
    kfp_api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    kfp_api.tokens = {"given"}
    ask(kfp_api, KFP_TOKEN="given\n")
    ask(kfp_api, KFP_EXISTING_TOKEN="given")  # the variable of KFP's own CLI
    assert kfp_api.authorizations == {"Bearer given"}


def test_a_token_file_is_read_again_so_a_renewed_token_is_used(kfp_api: Any, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first")
    kfp_api.tokens = {"first"}
    api = KfpApi(kfp_api.url, environment={"KF_PIPELINES_SA_TOKEN_PATH": str(file)})
    api.get("healthz")
    file.write_text("second\n")  # as the kubelet does before the old one expires
    kfp_api.tokens = {"second"}
    api.get("healthz")
    assert [authorization for *_, authorization, _ in kfp_api.seen] == ["Bearer first", "Bearer second"]


def test_a_token_that_is_renewed_while_it_is_refused_is_tried_once_more(kfp_api: Any, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("expired")
    kfp_api.tokens = {"renewed"}

    def renew(handler: Any) -> bool:
        file.write_text("renewed")
        return False

    kfp_api.before = renew
    assert KfpApi(kfp_api.url, environment={"KFP_TOKEN_FILE": str(file)}).get("healthz")["multi_user"] is False
    assert len(kfp_api.seen) == 2


def test_a_session_cookie_lets_in_and_is_renewed_when_the_proxy_renews_it(kfp_api: Any, gate: Any) -> None:
    kfp_api.cookies, kfp_api.gate = {"oauth2_proxy_kubeflow=old|1"}, gate
    api = KfpApi(kfp_api.url, environment={"KFP_COOKIE": "theme=dark; oauth2_proxy_kubeflow=old|1"})
    kfp_api.renewed_cookie = "oauth2_proxy_kubeflow=new|2"
    api.get("healthz")
    kfp_api.cookies = {"oauth2_proxy_kubeflow=new|2"}
    api.get("healthz")
    assert [cookie for *_, cookie in kfp_api.seen] == [
        "theme=dark; oauth2_proxy_kubeflow=old|1",
        "theme=dark; oauth2_proxy_kubeflow=new|2",
    ]


def test_a_stranger_is_told_in_one_line_how_to_sign_in(kfp_api: Any, gate: Any) -> None:
    kfp_api.tokens, kfp_api.gate = {"right"}, gate
    began = time.monotonic()
    with pytest.raises(RefusedError) as caught:
        ask(kfp_api)
    assert time.monotonic() - began < 5  # kfp.Client takes 25 s
    assert "set KFP_TOKEN, KFP_TOKEN_FILE or KFP_COOKIE" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "state=secret" not in str(caught.value)
    assert len(kfp_api.seen) == 1  # the login page is not fetched


@pytest.mark.parametrize(
    "host", ["http://[::1", "http://h:99999", "http://h:x", "ftp://me:s3cr3t@h/?k=s3cr3t", "https://"]
)
def test_a_host_that_is_no_address_is_one_line(host: str) -> None:
    with pytest.raises(
        RefusedError, match=r"^host is '.*': write it as https://kubeflow\.example\.com/pipeline$"
    ) as caught:
        KfpApi(host, environment={})
    assert "s3cr3t" not in str(caught.value)


def test_a_403_says_refused_and_why(kfp_api: Any) -> None:
    kfp_api.before = lambda handler: handler.reply(403, {"message": "User 'a' is not authorized"}) or True
    with pytest.raises(RefusedError, match=r"refused \(403\) by KFP at http://127.*User 'a' is not authorized"):
        ask(kfp_api)


@pytest.mark.parametrize("variable", ["KFP_TOKEN", "KFP_COOKIE"])
def test_a_secret_is_in_no_error_even_when_the_server_repeats_it(kfp_api: Any, variable: str) -> None:
    kfp_api.before = lambda handler: handler.reply(400, {"message": "bad header s3cr3t-value here"}) or True
    value = {"KFP_TOKEN": "s3cr3t-value", "KFP_COOKIE": "session=s3cr3t-value"}[variable]
    with pytest.raises(RefusedError) as caught:
        ask(kfp_api, **{variable: value})
    assert "s3cr3t" not in str(caught.value)
    assert "bad header ... here" in str(caught.value)


def test_a_token_that_is_no_header_is_refused_without_showing_it(kfp_api: Any) -> None:
    with pytest.raises(RefusedError) as caught:
        ask(kfp_api, KFP_TOKEN="s3cr3t\nsecond line")
    assert "s3cr3t" not in str(caught.value)


def test_a_password_in_the_host_is_not_shown() -> None:
    with pytest.raises(AwayError) as caught:
        KfpApi("http://someone:s3cr3t@127.0.0.1:9", environment={}).get("healthz")
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    "status, error", [(400, RefusedError), (404, MissingError), (429, AwayError), (500, AwayError), (503, AwayError)]
)
def test_what_is_worth_another_try_is_told_from_what_is_not(kfp_api: Any, status: int, error: type) -> None:
    kfp_api.before = lambda handler: handler.reply(status, {"message": "why"}) or True
    with pytest.raises(error, match=f"answers {status}: why"):
        ask(kfp_api)


@pytest.mark.parametrize(
    "body, kind", [("[]", "application/json"), ("null", "application/json"), ("ok", "text/plain"), ("<p>", "text/html")]
)
def test_what_is_no_json_object_is_no_answer_of_kfp(kfp_api: Any, body: str, kind: str) -> None:
    kfp_api.before = lambda handler: handler.reply(200, body, kind=kind) or True
    with pytest.raises(RefusedError, match=f"answers with {kind}, which is a login page or another server"):
        ask(kfp_api)


@pytest.mark.parametrize(
    "body, odd",
    [
        ({"run_id": 7}, "run_id: 7"),
        ({"run_id": "r", "state": ["SUCCEEDED"]}, 'state: ["SUCCEEDED"]'),
        ({"run_id": "r", "run_details": {"task_details": [{"state": 5}]}}, "state: 5"),
        ({"run_id": "r", "run_details": {"task_details": ["x"]}}, 'task_details: ["x"]'),
        ({"run_id": "r", "run_details": {"task_details": [{"error": "x"}]}}, 'error: "x"'),
        ({"runs": [{"state": "RUNNING"}]}, 'runs: [{"state": "RUNNING"}]'),
        ({"runs": {"run_id": "r"}}, 'runs: {"run_id": "r"}'),
        ({"recurringRuns": [{"recurring_run_id": "a", "trigger": "daily"}]}, 'trigger: "daily"'),
        ({"pipeline_version_id": "v", "pipeline_spec": "text"}, 'pipeline_spec: "text"'),
    ],
)
def test_fields_of_another_kind_than_kfps_are_one_line_and_no_traceback(kfp_api: Any, body: Any, odd: str) -> None:
    kfp_api.before = lambda handler: handler.reply(200, body) or True
    with pytest.raises(RefusedError, match=rf"answers {re.escape(odd)}, which KFP does not: check --host"):
        ask(kfp_api)


def test_what_others_named_and_what_is_null_is_no_field_of_kfps(kfp_api: Any) -> None:
    body = {"run_id": "r", "error": None, "runtime_config": {"parameters": {"state": 3}}, "plugins": {"error": "x"}}
    kfp_api.before = lambda handler: handler.reply(200, body) or True
    assert ask(kfp_api) == body


def test_json_that_is_cut_short_is_worth_another_try(kfp_api: Any) -> None:
    kfp_api.before = lambda handler: handler.reply(200, '{"multi_') or True
    with pytest.raises(AwayError, match="cut short"):
        ask(kfp_api)


def test_nobody_at_the_host_is_one_line() -> None:
    with pytest.raises(AwayError, match="KFP at http://127.0.0.1:9 cannot be reached"):
        KfpApi("http://127.0.0.1:9", environment={}).get("healthz")


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_accepts_and_does_not_answer_holds_nobody_beyond_the_deadline(silent: str) -> None:
    began = time.monotonic()
    with pytest.raises(AwayError, match="did not answer within"):
        connect(silent, deadline=began + 0.5)
    assert 0.4 < time.monotonic() - began < 5


def test_a_server_that_drips_a_byte_at_a_time_holds_nobody_either() -> None:
    class Dripping(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    began = time.monotonic()
    with pytest.raises(AwayError, match="did not answer within"):
        connect(f"http://127.0.0.1:{server.server_address[1]}", deadline=began + 0.5)
    assert time.monotonic() - began < 5
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "typed, base",
    [
        ("kfp.example.com", "https://kfp.example.com"),
        ("http://127.0.0.1:8888/", "http://127.0.0.1:8888"),
        ("https://kubeflow.example.com/_/pipeline/#/runs", "https://kubeflow.example.com/pipeline"),
        ("https://kubeflow.example.com/pipeline/apis/v2beta1", "https://kubeflow.example.com/pipeline"),
    ],
)
def test_what_people_copy_out_of_the_address_bar_is_a_host(typed: str, base: str) -> None:
    assert KfpApi(typed, environment={}).url == base


@pytest.mark.parametrize("typed", ["ftp://a", "https://", "http:///x"])
def test_what_is_no_host_is_one_line(typed: str) -> None:
    with pytest.raises(RefusedError, match="host is "):
        KfpApi(typed, environment={})


def test_the_endpoint_is_taken_from_the_environment_or_the_cluster() -> None:
    assert KfpApi(environment={"KFP_ENDPOINT": "http://a"}).url == "http://a"
    assert KfpApi(environment={"KF_PIPELINES_ENDPOINT": "http://b"}).url == "http://b"
    assert KfpApi(environment={"KUBERNETES_SERVICE_HOST": "10.0.0.1"}).url.startswith("http://ml-pipeline.kubeflow")
    with pytest.raises(RefusedError, match="--host or KFP_ENDPOINT"):
        KfpApi(environment={})


def test_files_that_the_environment_names_must_be_there() -> None:
    with pytest.raises(RefusedError, match="token file /nowhere cannot be read"):
        KfpApi("http://a", environment={"KFP_TOKEN_FILE": "/nowhere"})
    with pytest.raises(RefusedError, match="CA bundle /nowhere does not exist: correct KFP_CA_CERT"):
        KfpApi("http://a", environment={"KFP_CA_CERT": "/nowhere"})


def test_multi_user_mode_needs_a_namespace_and_single_user_mode_gets_none(
    kfp_api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert connect(kfp_api.url, "kubeflow").namespace == ""  # KFP refuses a namespace in single-user mode
    kfp_api.multi_user = True
    with pytest.raises(RefusedError, match="multi-user mode and no namespace is given"):
        connect(kfp_api.url)
    monkeypatch.setenv("KFP_NAMESPACE", "team-a")
    api = connect(kfp_api.url)
    assert api.namespace == "team-a"
    assert experiment(api, "layers") == "experiment-0"
    assert kfp_api.experiments["experiment-0"]["namespace"] == "team-a"


def test_an_experiment_is_found_on_a_later_page_and_not_made_again(kfp_api: Any) -> None:
    api = connect(kfp_api.url)
    first = [experiment(api, name) for name in ("a", "b", "c", "d", "e")]
    assert [experiment(api, name) for name in ("a", "b", "c", "d", "e")] == first
    assert len(set(first)) == 5


def test_every_page_of_a_listing_is_read(kfp_api: Any) -> None:
    for number in range(8):
        kfp_api.add_run(display_name=str(number))
    api = connect(kfp_api.url)
    assert [run["display_name"] for run in api.pages("runs", "runs")] == [str(number) for number in range(8)]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate of 127.0.0.1 with its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "ca.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(built.public_bytes(serialization.Encoding.PEM) + private)
    return path


@pytest.mark.parametrize("variable", ["KFP_CA_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_private_certificate_is_refused_until_its_bundle_is_named(
    kfp_api: Any, certificate: Path, variable: str
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    kfp_api.socket = context.wrap_socket(kfp_api.socket, server_side=True)
    with pytest.raises(RefusedError, match="certificate of KFP at https://.* is not trusted.*KFP_CA_CERT"):
        ask(kfp_api)
    assert ask(kfp_api, **{variable: str(certificate)})["multi_user"] is False


def test_the_end_of_a_log_is_read_where_kfp_gives_it(kfp_api: Any) -> None:
    api = KfpApi(kfp_api.url, environment={"KFP_TOKEN": "s3cr3t"})
    kfp_api.logs["pod-1"] = "".join(f"line {number}\n" for number in range(9000)) + "token s3cr3t\n"
    assert api.tail_of_log("run-0", "pod-1", lines=2) == ["line 8999", "token ..."]
    assert api.tail_of_log("run-0", "pod-2") == []
    kfp_api.before = lambda handler: handler.reply(200, json.dumps({}), kind="text/html") or True
    assert api.tail_of_log("run-0", "pod-1") == []
