"""Settings that every test shares."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

from tests.support.exhaustive import EXHAUSTIVE
from tests.support.servers.fixtures import azure as azure
from tests.support.servers.fixtures import azure_server as azure_server
from tests.support.servers.fixtures import careless_gcs as careless_gcs
from tests.support.servers.fixtures import careless_gcs_server as careless_gcs_server
from tests.support.servers.fixtures import careless_s3 as careless_s3
from tests.support.servers.fixtures import careless_s3_server as careless_s3_server
from tests.support.servers.fixtures import ceph as ceph
from tests.support.servers.fixtures import ceph_server as ceph_server
from tests.support.servers.fixtures import faulty as faulty
from tests.support.servers.fixtures import gcp_emulator as gcp_emulator
from tests.support.servers.fixtures import gcp_emulator_server as gcp_emulator_server
from tests.support.servers.fixtures import gcs as gcs
from tests.support.servers.fixtures import gcs_server as gcs_server
from tests.support.servers.fixtures import opened as opened
from tests.support.servers.fixtures import s3 as s3
from tests.support.servers.fixtures import s3_server as s3_server

# Deadlines and "too slow" measure the machine, not the code: tests share its cores. What is
# drawn is the same in each run, so that a change is judged by what it changes; the exhaustive
# tests draw anew.
settings.register_profile(
    "holdfast",
    deadline=None,
    derandomize=not EXHAUSTIVE,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("holdfast")

# The machine that runs the tests may be a cloud's: what it says about itself is for no test.
os.environ["HOLDFAST_NOTICES"] = "none"

# Where a shell has started the tests with `&`, it is ignored, here and in what they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The matrix forks thousands of loaders' workers, which costs the more the larger a process
    is: after all other tests it is five times as large, and a fork takes five times as long."""
    items.sort(key=lambda item: "tests/matrix/" not in item.nodeid)
