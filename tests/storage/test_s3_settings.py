"""What the environment says of a bucket, and names as people and other programs give them."""

from __future__ import annotations

from pathlib import Path

import pytest
from botocore.exceptions import ProxyConnectionError
from botocore.parsers import ResponseParserError

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.shard_dataset.inputs import find_inputs, read_items
from layerloop.components.storage import s3, s3_client
from layerloop.components.storage.s3_requests import Requests
from layerloop.components.storage.stores import Store, open_store

from ..conftest import BUCKET

KEY = "arn:aws:kms:us-east-1:123456789012:key/0123"


@pytest.mark.parametrize(
    ("settings", "algorithm", "key"),
    [
        ({}, None, None),
        ({"LAYERLOOP_S3_ENCRYPTION": "AES256"}, "AES256", None),
        ({"LAYERLOOP_S3_ENCRYPTION": "aws:kms", "LAYERLOOP_S3_KMS_KEY": KEY}, "aws:kms", KEY),
    ],
)
def test_every_way_of_writing_asks_for_the_encryption_of_the_environment(
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    algorithm: str | None,
    key: str | None,
) -> None:
    import boto3

    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    store = open_store(s3_bucket)
    (tmp_path / "small").write_bytes(b"1")
    (tmp_path / "large").write_bytes(bytes(11 << 20))
    store.write("written", b"1")
    store.create("created", b"1")
    store.upload("small", tmp_path / "small")
    store.upload("large", tmp_path / "large")
    store.copy("written", "copied")
    heads = {n: boto3.client("s3").head_object(Bucket=BUCKET, Key=f"{prefix_of(store)}{n}") for n in store.list()}
    assert len(heads) == 5
    assert {n: head.get("ServerSideEncryption") for n, head in heads.items()} == dict.fromkeys(heads, algorithm)
    assert {n: head.get("SSEKMSKeyId") for n, head in heads.items()} == dict.fromkeys(heads, key)
    assert store.read("copied") == b"1" and not store.create("created", b"2")


def prefix_of(store: Store) -> str:
    return store.uri.removeprefix(f"s3://{BUCKET}/") + "/"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"LAYERLOOP_S3_ENCRYPTION": "kms"},
            "LAYERLOOP_S3_ENCRYPTION is 'kms': choose AES256, aws:kms, aws:kms:dsse, or leave it out",
        ),
        (
            {"LAYERLOOP_S3_KMS_KEY": "x"},
            "LAYERLOOP_S3_KMS_KEY is set but LAYERLOOP_S3_ENCRYPTION is not: set it to aws",
        ),
        ({"LAYERLOOP_S3_ADDRESSING": "host"}, "LAYERLOOP_S3_ADDRESSING is 'host': choose virtual, path, or leave it"),
        (
            {"AWS_SECRET_ACCESS_KEY": "se cret\n"},
            "^AWS_SECRET_ACCESS_KEY has a blank, a line break or a letter .*without$",
        ),
        ({"AWS_SESSION_TOKEN": "to\nken"}, "^AWS_SESSION_TOKEN has a blank, a line break or a letter that no key has"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:99999"}, "^AWS_ENDPOINT_URL is 'http://127.0.0.1:99999', which is no"),
        ({"AWS_ENDPOINT_URL_S3": "https://h/?key=secret"}, r"^AWS_ENDPOINT_URL_S3 is 'https://h/\?\.\.\.', which"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere/token"},
            r"^AWS_WEB_IDENTITY_TOKEN_FILE is /nowhere/token, which cannot be read \(No such file or directory\)",
        ),
        ({"AWS_CONFIG_FILE": "s3=nonsense"}, "S3 settings are refused .*check the AWS_. variables and profile"),
        ({"AWS_CONFIG_FILE": "credential_process=/nowhere/x"}, "S3 settings are refused .*/nowhere/x.*check the AWS_."),
        ({"AWS_PROFILE": "nobody"}, "S3 settings are refused .*nobody.*check the AWS_. variables and profile"),
    ],
)
def test_a_setting_that_means_nothing_is_one_line(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    for name, value in settings.items():
        if name == "AWS_CONFIG_FILE":  # of a profile, which gives its own keys
            (tmp_path / "config").write_text(f"[profile mine]\n{value}\n")
            value = str(tmp_path / "config")
            monkeypatch.setenv("AWS_PROFILE", "mine")
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv(name, value)
    with pytest.raises(LayerloopError, match=message) as caught:
        open_store(s3_bucket)
    assert "\n" not in str(caught.value)


def test_a_profiles_token_that_is_nowhere_is_one_line(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = "[profile mine]\nrole_arn = arn:aws:iam::123456789012:role/r\nweb_identity_token_file = /nowhere/token\n"
    (tmp_path / "config").write_text(profile)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    said = (
        r"/nowhere/token, which the profile names, cannot be read \(No such file or directory\): correct it, or mount"
    )
    with pytest.raises(LayerloopError, match=said):
        open_store(s3_bucket).exists("x")


def test_what_stands_before_the_store_is_one_line() -> None:
    """A proxy, and the service that gives a pod its credentials: what that answers is raised by a parser's error."""
    requests = Requests("https://store", "bucket", "s3://bucket")
    for error, said in (
        (ProxyConnectionError(proxy_url="http://me:secret@proxy"), r"through the proxy of HTTPS_PROXY \(Proxy"),
        (ResponseParserError("no XML"), r"is not an S3 store at https://store \(ResponseParserError\)"),
    ):
        with pytest.raises(LayerloopError, match=said) as caught, requests._one_line("x"):
            raise error
        assert "secret" not in str(caught.value)


def test_a_prefix_that_is_not_utf_8_is_refused(s3_bucket: str) -> None:
    with pytest.raises(LayerloopError, match=r"caf\\xe9 is not UTF-8, as the names of all objects are: correct it"):
        open_store(f"{s3_bucket}/caf\udce9")


@pytest.mark.parametrize(
    ("style", "url"), [("virtual", "http://bucket.s3.test:1/k?"), ("path", "http://s3.test:1/bucket/k?")]
)
def test_the_bucket_is_where_the_store_wants_it(monkeypatch: pytest.MonkeyPatch, style: str, url: str) -> None:
    for name, value in (("AWS_ENDPOINT_URL", "http://s3.test:1"), ("LAYERLOOP_S3_ADDRESSING", style)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    signed = s3_client.client().generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "k"})
    assert signed.startswith(url)


ODD = [
    "a b+c&d=e.png",
    "ümläut-e\u0301.png",
    "100%25.png",
    "semi;colon#1.png",
    "q?.png",
    "日本/写真.png",
    "'\"<>.png",
    "~a:b@c.png",
]


def test_names_of_any_letters_are_kept(store_uri: str) -> None:
    store = open_store(f"{store_uri}/a b+c#1/ü%20")
    for name in ODD:
        store.write(name, name.encode())
    store.copy(ODD[0], "copy of +")
    assert store.list() == sorted([*ODD, "copy of +"])
    assert {name: store.read(name).decode() for name in ODD} == {name: name for name in ODD}
    assert store.list("日本/") == ["日本/写真.png"] and store.folders() == ["日本"]
    assert store.read_range(ODD[1], 0, 2) == "ü".encode() and store.size(ODD[2]) == len(ODD[2])


def test_images_are_read_by_the_keys_that_the_bucket_has(s3_bucket: str) -> None:
    """Those which are no names of a campaign's objects among them: empty parts, dots, a slash in front."""
    import boto3

    prefix = s3_bucket.removeprefix(f"s3://{BUCKET}/")
    keys = [*ODD, "d//b.png", "d/./c.png", "../e.png", "/f.png"]
    for key in [*keys, "folder/", "d//"]:
        boto3.client("s3").put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=key.encode())
    found = find_inputs(s3_bucket, what="images")
    assert {item.load().decode() for item in read_items(found, max_bytes=1000)} == set(keys)


def test_a_listing_has_all_pages(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_bucket)
    names = [f"{n % 7}/{n:04d}" for n in range(25)]
    for name in names:
        store.write(name, b"")
    plain = store._client.list_objects_v2  # type: ignore[attr-defined]

    def short_pages(*, keeps_token: bool, **arguments: object) -> dict[str, object]:
        page = plain(**arguments, MaxKeys=10)
        if not keeps_token:  # as some servers do
            page.pop("NextContinuationToken", None)
        return dict(page)

    for keeps_token in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(store, "_client", _Paged(store, keeps_token, short_pages))
            assert store.list() == sorted(names)
    assert store.folders() == [str(n) for n in range(7)]


class _Paged:
    """A client whose listings come in pages of ten."""

    def __init__(self, store: Store, keeps_token: bool, pages) -> None:  # type: ignore[no-untyped-def]
        self._inner, self.meta = store._client, store._client.meta  # type: ignore[attr-defined]
        self.list_objects_v2 = lambda **arguments: pages(keeps_token=keeps_token, **arguments)


@pytest.mark.parametrize("bucket", ["Not_A_Bucket!", "a" * 300])
def test_a_bucket_that_cannot_be_is_one_line(s3_environment: dict[str, str], bucket: str) -> None:
    with pytest.raises(LayerloopError, match="names no bucket that can exist: correct the URI"):
        open_store(f"s3://{bucket}/x").read("y")
