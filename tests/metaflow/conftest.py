from __future__ import annotations

from pathlib import Path

import pytest

from tests.metaflow.support import Metaflow
from tests.metaflow.tasks import in_bucket
from tests.support.servers.service import Place


@pytest.fixture
def metaflow(tmp_path: Path) -> Metaflow:
    """With a folder as its datastore."""
    return Metaflow(tmp_path)


@pytest.fixture
def metaflow_on_s3(tmp_path: Path, s3: Place) -> Metaflow:
    """With a bucket as its datastore, and metadata in the folder."""
    root = f"s3://{s3.service.bucket}/{s3.prefix}"
    return Metaflow(
        tmp_path,
        datastore=("--datastore=s3", f"--datastore-root={root}"),
        variables={"METAFLOW_S3_ENDPOINT_URL": s3.endpoint},
        bucket=in_bucket(s3),
    )
