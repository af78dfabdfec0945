"""The servers as fixtures. One of each runs per test process, from the first test that asks.

A test asks for a place (`s3`, `gcs`, `azure`, `ceph`, `careless_s3`, `careless_gcs`,
`gcp_emulator`): a prefix of its own, with the credentials in the environment while the test
runs, for the processes that it starts too. `azure` and `careless_s3` come from npm: slow tests
only. `ceph` needs Debian's packages: tests marked `ceph` only, which `make ceph` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.servers.proxy import FaultProxy
    from tests.support.servers.service import Place, Service

# The modules are imported when a test asks: most tests need no client of object stores.


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Service]:
    from tests.support.servers.s3 import moto

    with moto() as service:
        yield service


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[Service]:
    from tests.support.servers.gcs import gcs

    with gcs() as service:
        yield service


@pytest.fixture(scope="session")
def azure_server() -> Iterator[Service]:
    from tests.support.servers.azure import azurite

    with azurite() as service:
        yield service


@pytest.fixture(scope="session")
def ceph_server() -> Iterator[Service]:
    from tests.support.servers.ceph import ceph

    with ceph() as service:
        yield service


@pytest.fixture(scope="session")
def careless_s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    from tests.support.servers.adversaries import s3rver

    with s3rver(tmp_path_factory.mktemp("s3rver")) as service:
        yield service


@pytest.fixture(scope="session")
def careless_gcs_server() -> Iterator[Service]:
    from tests.support.servers.gcs import gcs

    with gcs(careless=True) as service:
        yield service


@pytest.fixture(scope="session")
def gcp_emulator_server() -> Iterator[Service]:
    from tests.support.servers.adversaries import gcp_emulator

    with gcp_emulator() as service:
        yield service


@pytest.fixture
def s3(s3_server: Service, opened: Opened) -> Place:
    """S3: moto."""
    return opened(s3_server)


@pytest.fixture
def gcs(gcs_server: Service, opened: Opened) -> Place:
    """GCS: our fake, which honours conditions."""
    return opened(gcs_server)


@pytest.fixture
def azure(azure_server: Service, opened: Opened) -> Place:
    """Azure: Azurite. Slow tests only."""
    return opened(azure_server)


@pytest.fixture
def ceph(ceph_server: Service, opened: Opened) -> Place:
    """S3: a real Ceph. Tests marked `ceph` only."""
    return opened(ceph_server)


@pytest.fixture
def careless_s3(careless_s3_server: Service, opened: Opened) -> Place:
    """An S3 that ignores conditions: s3rver. Slow tests only."""
    return opened(careless_s3_server)


@pytest.fixture
def careless_gcs(careless_gcs_server: Service, opened: Opened) -> Place:
    """A GCS that ignores conditions: our fake, told to."""
    return opened(careless_gcs_server)


@pytest.fixture
def gcp_emulator(gcp_emulator_server: Service, opened: Opened) -> Place:
    """gcp-storage-emulator: ignores conditions, and to obstore's eyes fails at everything."""
    return opened(gcp_emulator_server)


Opened = Callable[["Service"], "Place"]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Gives a place on a service, with its credentials in the environment of the test."""

    def place(service: Service) -> Place:
        for name, value in service.environment().items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        return service.place()

    return place


@pytest.fixture
def faulty() -> Iterator[Callable[[Place], tuple[Place, FaultProxy]]]:
    """Puts a fault proxy before a place: `place, proxy = faulty(s3)`."""
    from contextlib import ExitStack

    from tests.support.servers.proxy import FaultProxy

    with ExitStack() as stack:

        def before(place: Place) -> tuple[Place, FaultProxy]:
            proxy = stack.enter_context(FaultProxy(place.endpoint))
            return place.through(proxy.url), proxy

        yield before
