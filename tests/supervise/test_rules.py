"""`--on-exit-code`, and the waits before restarts."""

from __future__ import annotations

import pytest

from holdfast.errors import UsageError
from holdfast.supervise.rules import Rules, backoff_s


def test_the_last_rule_that_names_a_status_counts() -> None:
    rules = Rules.parse(["1-255=stop", "75=restart", "SIGKILL,3=restart"])
    assert [rules.verdict(status) for status in (0, 1, 3, 75, 137, 255)] == [
        *("stop", "stop", "restart", "restart", "restart", "stop"),
    ]


@pytest.mark.parametrize("text", ["75", "75=go", "=stop", "5-3=stop", "256=stop", "SIGX=stop", ""])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no rule for exit statuses"):
        Rules.parse([text])


def test_waits_have_a_limit_however_often() -> None:
    assert backoff_s(10_000, 1.0, 300.0) == 300.0
    assert backoff_s(3, 0.25, 300.0) == 2.0
