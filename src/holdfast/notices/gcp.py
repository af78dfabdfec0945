"""What a virtual machine of Google's Compute Engine says about itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from urllib.parse import urlencode

from holdfast.notices.metadata import TIMEOUT_S, Unanswered, request
from holdfast.notices.notice import Notice
from holdfast.notices.notifier import Notifier, Over

_HEADERS = {"Metadata-Flavor": "Google"}
# A service that holds an answer back for longer could be dead without anybody noticing.
_HELD_S = 30
# Between two questions that each wait for a change.
_INTERVAL_S = 0.2
# What the machine has from the notice on.
_PREEMPTED_S = 30.0
_TERMINATED_S = 60.0


def gcp_notifiers(endpoint: str) -> list[Notifier]:
    """Two, since each waits for the change of one key."""
    return [
        Notifier("GCP preemption", Key(endpoint, "preempted", _preempted), _INTERVAL_S),
        Notifier("GCP maintenance", Key(endpoint, "maintenance-event", _maintenance), _INTERVAL_S),
    ]


def _preempted(value: str, now_s: float) -> Notice | None:
    if value != "TRUE":
        return None
    return Notice("GCP", "this VM is being preempted", now_s + _PREEMPTED_S)


def _maintenance(value: str, now_s: float) -> Notice | None:
    match value:
        case "TERMINATE_ON_HOST_MAINTENANCE":
            text = "this VM will be terminated for maintenance of its host"
            return Notice("GCP maintenance", text, now_s + _TERMINATED_S)
        case "MIGRATE_ON_HOST_MAINTENANCE":
            text = "this VM will be migrated to another host"
            return Notice("GCP maintenance", text, stops=False)
        case _:  # NONE
            return None


class Key:
    """Asks for one key of the instance, at first what it is, then when it changes."""

    def __init__(
        self,
        endpoint: str,
        key: str,
        read: Callable[[str, float], Notice | None],
        *,
        held_s: int = _HELD_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._endpoint = endpoint
        self._path = f"/computeMetadata/v1/instance/{key}"
        self._read = read
        self._held_s = held_s
        self._clock = clock
        self._etag = ""
        self._value = ""
        self._notice: Notice | None = None

    def __call__(self) -> list[Notice]:
        path, timeout_s = self._path, TIMEOUT_S
        if self._etag:
            wait = {"wait_for_change": "true", "timeout_sec": self._held_s}
            path += "?" + urlencode({**wait, "last_etag": self._etag})
            timeout_s += self._held_s
        answer = request(self._endpoint, path, _HEADERS, timeout_s=timeout_s)
        if answer.status == 404:
            raise Over(f"there is no {self._path}")
        if answer.status != 200:
            raise Unanswered(f"{self._endpoint}: HTTP {answer.status} for {self._path}")
        self._etag = answer.etag
        if (value := answer.text.strip()) != self._value:
            self._value, self._notice = value, self._read(value, self._clock())
        return [self._notice] if self._notice else []
