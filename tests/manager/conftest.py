"""Fixtures of this folder's tests."""

from tests.manager.faulty_bucket import bucket as bucket
