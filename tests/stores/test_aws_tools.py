"""Where the AWS tools find credentials, an address does: profiles, programs, containers."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import holdfast
from holdfast.errors import HoldfastError, StoreUnavailable, UsageError
from holdfast.stores.aws_tools import ask_aws_tools
from holdfast.stores.object import ObjectStore
from holdfast.stores.object_address import parse_object_address
from holdfast.stores.object_clients import connect
from holdfast.stores.open import open_store
from holdfast.stores.retrying import Retry
from tests.stores.contract import ANY
from tests.support.hours import Hours
from tests.support.servers import faults
from tests.support.servers.keys import AUTHORIZATION, SECRET, SESSION, Keys, keys_on_loopback
from tests.support.servers.proxy import FaultProxy
from tests.support.servers.service import Place

AtOnce = Retry(deadline_s=0)


class Home:
    """A user's ~/.aws."""

    def __init__(self, folder: Path) -> None:
        self.credentials = folder / "credentials"
        self.config = folder / "config"

    def profile(self, name: str, **settings: str) -> None:
        lines = [f"[{name}]" if name == "default" else f"[profile {name}]"]
        lines += [f"{key} = {value}" for key, value in settings.items()]
        with self.config.open("a") as file:
            file.write("\n".join(lines) + "\n")


@pytest.fixture
def home(s3: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """Nothing in the environment but where the files are, and that there is no role."""
    for name in s3.service.credentials:
        monkeypatch.delenv(name)
    found = Home(tmp_path)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(found.credentials))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(found.config))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return found


def signer(place: Place, before: Callable[[Place], tuple[Place, FaultProxy]]) -> str:
    """The id of the key that a request is signed with."""
    behind, proxy = before(place)
    assert open_store(behind.address).put_new("signed", [b"x"])
    return proxy.exchanges(method="PUT")[0].signer


Faulty = Callable[[Place], tuple[Place, FaultProxy]]


# -- profiles ----------------------------------------------------------------------------


def test_the_default_profile(s3: Place, home: Home, faulty: Faulty) -> None:
    home.credentials.write_text("[default]\naws_access_key_id=A1\naws_secret_access_key=b\n")
    assert signer(s3, faulty) == "A1"


@pytest.mark.parametrize("variable", ["AWS_PROFILE", "AWS_DEFAULT_PROFILE"])
def test_a_profile_by_name(
    s3: Place, home: Home, faulty: Faulty, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    home.credentials.write_text("[default]\naws_access_key_id=A1\naws_secret_access_key=b\n")
    home.profile("lab", aws_access_key_id="A2", aws_secret_access_key="b")
    monkeypatch.setenv(variable, "lab")
    assert signer(s3, faulty) == "A2"


def test_keys_in_the_environment_win(
    s3: Place, home: Home, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.profile("lab", aws_access_key_id="A2", aws_secret_access_key="b")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "A3")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "c")
    assert signer(s3, faulty) == "A3"


def test_a_program_that_tells_them(s3: Place, home: Home, faulty: Faulty) -> None:
    told = '{"Version": 1, "AccessKeyId": "A4", "SecretAccessKey": "b"}'
    program = home.config.with_name("program.py")
    program.write_text(f"print('{told}')")
    home.profile("default", credential_process=f"{sys.executable} {program}")
    assert signer(s3, faulty) == "A4"


def test_region_endpoint_and_authorities_of_a_profile(
    s3: Place, home: Home, tmp_path: Path
) -> None:
    home.profile(
        "default",
        aws_access_key_id="A1",
        aws_secret_access_key="b",
        region="eu-north-1",
        endpoint_url=s3.endpoint,
        ca_bundle=str(tmp_path / "authority.pem"),
    )
    found = ask_aws_tools()
    assert (found.region, found.endpoint) == ("eu-north-1", s3.endpoint)
    with pytest.raises(UsageError, match=r"authority\.pem"):
        open_store(f"s3://{s3.service.bucket}/{s3.prefix}").put_new("a", [b"x"])
    home.config.write_text(home.config.read_text().replace("ca_bundle", "cli_pager"))
    short = f"s3://{s3.service.bucket}/{s3.prefix}"
    assert open_store(short).put_new("a", [b"x"])
    client = connect(parse_object_address(short)).small
    assert client.config["region"] == "eu-north-1"
    client = connect(parse_object_address(f"{short}?region=us-west-2&endpoint=http://h:1")).small
    assert client.config["region"] == "us-west-2"
    assert client.config["endpoint"] == client.config["endpoint_url_s3"] == "http://h:1"


def test_the_region_of_a_profile_goes_with_keys_in_the_environment(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.profile("default", region="eu-north-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "A3")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "c")
    assert connect(parse_object_address("s3://bucket/run")).small.config["region"] == "eu-north-1"
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert "region" not in connect(parse_object_address("s3://bucket/run")).small.config


def test_a_role_by_web_identity(
    s3: Place, home: Home, tmp_path: Path, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on EKS; moto serves STS, too."""
    token = tmp_path / "token"
    token.write_text("a.web.token")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/training")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", s3.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert signer(s3, faulty).startswith("ASIA")


def test_a_role_of_a_profile(
    s3: Place, home: Home, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.profile("person", aws_access_key_id="A1", aws_secret_access_key="b")
    home.profile(
        "training",
        role_arn="arn:aws:iam::123456789012:role/training",
        source_profile="person",
        region="us-east-1",
    )
    monkeypatch.setenv("AWS_PROFILE", "training")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", s3.endpoint)
    assert signer(s3, faulty).startswith("ASIA")


def test_the_role_of_the_machine(
    s3: Place, home: Home, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    with keys_on_loopback() as keys:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"{keys.url}/")
        assert signer(s3, faulty) == "KEY1"


# -- what is missing or wrong ------------------------------------------------------------


@pytest.mark.usefixtures("home")
def test_no_credentials_anywhere() -> None:
    with pytest.raises(UsageError, match="there are no AWS credentials") as caught:
        open_store("s3://bucket/run").size("a")
    assert "AWS_PROFILE" in caught.value.hint


def test_a_profile_that_is_not_there(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.profile("lab", region="eu-north-1")
    monkeypatch.setenv("AWS_PROFILE", "lba")
    with pytest.raises(UsageError, match=r"ProfileNotFound.*lba"):
        open_store("s3://bucket/run").size("a")


def test_half_a_profile(home: Home) -> None:
    home.credentials.write_text("[default]\naws_access_key_id=A1\n")
    with pytest.raises(UsageError, match="PartialCredentials"):
        open_store("s3://bucket/run").size("a")


def test_what_a_failing_program_says_is_not_repeated(home: Home) -> None:
    home.profile("default", credential_process="cat /dev/null /nowhere/key-is-SESAME")
    with pytest.raises(UsageError, match="CredentialRetrievalError") as caught:
        open_store("s3://bucket/run").size("a")
    assert "SESAME" not in str(caught.value)


def test_a_sign_on_that_is_over(s3: Place, home: Home) -> None:
    home.profile(
        "default",
        sso_start_url="https://example.invalid/start",
        sso_region="us-east-1",
        sso_account_id="1",
        sso_role_name="r",
    )
    store = ObjectStore(s3.address, retry=Hours().retry())
    with pytest.raises((StoreUnavailable, UsageError), match="SSO") as caught:
        store.put_new("a", [b"x"])
    assert "aws s3 ls" in caught.value.hint


def test_a_profile_without_what_reads_it(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.profile("default", aws_access_key_id="A1", aws_secret_access_key="b")
    for module in ("botocore.session", "botocore.exceptions", "botocore.configprovider"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match="botocore, which reads those, is not") as caught:
        open_store("s3://bucket/run").size("a")
    assert "pip install 'holdfast[s3]'" in caught.value.hint


def test_without_what_reads_profiles_the_environment_is_enough(
    s3: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("botocore.session", "botocore.exceptions", "botocore.configprovider"):
        monkeypatch.setitem(sys.modules, module, None)
    assert open_store(s3.address).put_new("a", [b"x"])


# -- keys that do not last ---------------------------------------------------------------


@pytest.fixture
def keys(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keys]:
    with keys_on_loopback() as keys:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{keys.url}/container")
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", AUTHORIZATION)
        yield keys


def test_keys_of_a_container_that_last_are_asked_for_once(s3: Place, keys: Keys) -> None:
    store = open_store(s3.address)
    for n in range(5):
        assert store.put_new(f"a{n}", [b"x"])
    assert keys.given == 1


def test_a_run_outlives_its_keys(
    s3: Place, keys: Keys, faulty: Faulty, caplog: pytest.LogCaptureFixture
) -> None:
    """The server refuses those that have ended, as each pair has when the next save comes."""
    caplog.set_level(logging.DEBUG, "holdfast")
    keys.lasting_s = 60
    place, proxy = faulty(s3)
    refusing = proxy.fail(
        faults.expired_token(), times=None, when=lambda request: keys.is_over(request.signer)
    )
    with holdfast.CheckpointManager(place.address, keep=None) as ckpts:
        for step in range(1, 5):
            ckpts.save(step, {"answer": step}).result()
            ckpts.wait()  # for what is asked after the commit, too
            time.sleep(0.2)  # obstore asks for others a tenth of a second later at the earliest
            keys.end()
        assert [found.step for found in ckpts.checkpoints()] == [1, 2, 3, 4]
        assert all(found.ok for found in ckpts.verify())
        shown = repr(ckpts)
    assert refusing.met == 0
    assert len({request.signer for request in proxy.exchanges()}) > 4
    told = caplog.text + shown + repr(open_store(place.address))
    store = open_store(s3.address)
    stored = b"".join(store.get(info.key, max_bytes=ANY) for info in list(store.list("")))
    for secret in (SECRET, SESSION, AUTHORIZATION):
        assert secret not in told
        assert secret.encode() not in stored


def test_a_giver_that_is_down_is_asked_again(s3: Place, keys: Keys) -> None:
    keys.lasting_s = 1
    hours = Hours()
    store = ObjectStore(s3.address, retry=hours.retry())
    assert store.put_new("a", [b"x"])
    keys.answers = False

    def heal(seconds: float) -> None:
        keys.answers = True

    store = ObjectStore(s3.address, retry=Retry(sleep=heal), clients=store._connect())
    assert store.put_new("b", [b"x"])


def test_a_giver_that_stays_down(s3: Place, keys: Keys) -> None:
    keys.lasting_s = 1
    clients = connect(parse_object_address(s3.address))
    keys.answers = False
    store = ObjectStore(s3.address, retry=AtOnce, clients=clients)
    with pytest.raises(HoldfastError, match="no credentials: CredentialRetrievalError") as caught:
        store.put_new("b", [b"x"])
    assert SECRET not in str(caught.value)


def test_keys_that_the_server_calls_expired(s3: Place, keys: Keys, faulty: Faulty) -> None:
    """Before their time: that save fails at once, and the next one tries anew."""
    place, proxy = faulty(s3)
    with holdfast.CheckpointManager(place.address) as ckpts:
        ckpts.save(1, {"answer": 1}).result()
        refusing = proxy.fail(faults.expired_token(), times=None)
        with pytest.raises(StoreUnavailable, match="ExpiredToken") as caught:
            ckpts.save(2, {"answer": 2}).result()
        assert SECRET not in str(caught.value)
        refusing.stop()
        ckpts.save(3, {"answer": 3}).result()
        assert [found.step for found in ckpts.checkpoints()] == [1, 3]
