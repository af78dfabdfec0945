"""What a virtual machine of Azure says about itself: Scheduled Events.

An event is never confirmed, which would bring it forward.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from holdfast.notices.metadata import TIMEOUT_S, Unanswered, request
from holdfast.notices.notice import Notice
from holdfast.notices.notifier import Notifier, Over
from holdfast.notices.times import from_http

_HEADERS = {"Metadata": "true"}
_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
_INTERVAL_S = 1.0  # as Microsoft advises
# Who asks first has the events switched on for this machine, which takes up to two minutes.
_FIRST_S = 150.0
# An event may be days ahead. This is as long as a spot instance of Amazon has.
_LEAD_S = 120.0

_STOPS = {
    "Preempt": "preempted",
    "Terminate": "deleted",
    "Reboot": "rebooted",
    "Redeploy": "moved to another host",
}
_PAUSES = {"Freeze": "paused for some seconds"}


def azure_notifier(endpoint: str) -> Notifier:
    return Notifier("Azure", ScheduledEvents(endpoint), _INTERVAL_S)


class ScheduledEvents:
    """Asks for what is scheduled for this machine: others of its group are in the list, too."""

    def __init__(self, endpoint: str, *, clock: Callable[[], float] = time.time) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._name = ""
        self._timeout_s = _FIRST_S

    def __call__(self) -> list[Notice]:
        if not self._name:
            self._name = self._get(_NAME, TIMEOUT_S).strip()
            if not self._name:
                raise Unanswered(f"{self._endpoint}: this VM has no name")
        text = self._get(_EVENTS, self._timeout_s)
        self._timeout_s = TIMEOUT_S
        try:
            said = json.loads(text)
        except ValueError:
            said = None
        if not isinstance(said, dict) or not isinstance(events := said.get("Events", []), list):
            raise Unanswered(f"{self._endpoint}: the events are {text[:100]!r}")
        notices = (self._read(event) for event in events if isinstance(event, dict))
        return [notice for notice in notices if notice is not None]

    def _read(self, event: dict[str, Any]) -> Notice | None:
        """What one event means for this machine now."""
        names = event.get("Resources")
        if not isinstance(names, list) or not any(self._is_me(name) for name in names):
            return None
        kind = str(event.get("EventType", ""))
        what = _STOPS.get(kind) or _PAUSES.get(kind)
        if what is None:
            return None
        # Blank once it has begun.
        not_before = str(event.get("NotBefore") or "")
        at = from_http(not_before)
        if at is not None and at - self._clock() > _LEAD_S:
            return None
        when = f"not before {not_before}" if at is not None else "now"
        return Notice(f"Azure {kind}", f"this VM will be {what}, {when}", at, stops=kind in _STOPS)

    def _is_me(self, name: object) -> bool:
        return str(name).casefold() == self._name.casefold()

    def _get(self, path: str, timeout_s: float) -> str:
        answer = request(self._endpoint, path, _HEADERS, timeout_s=timeout_s)
        if answer.status in (403, 404):
            raise Over(f"{self._endpoint}: HTTP {answer.status} for {path}")
        if answer.status != 200:
            raise Unanswered(f"{self._endpoint}: HTTP {answer.status} for {path}")
        return answer.text
