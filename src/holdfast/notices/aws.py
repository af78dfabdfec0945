"""What a spot instance of Amazon's EC2 says about itself (IMDSv2)."""

from __future__ import annotations

import json
from typing import Any

from holdfast.notices.metadata import Answer, Unanswered, request
from holdfast.notices.notice import Notice
from holdfast.notices.notifier import Notifier, Over
from holdfast.notices.times import from_iso

# Amazon advises 5 s, of the two minutes that there are. Once a second leaves more of them, and
# costs a dozen packets a second of the 1024 that a machine's interface has for its metadata.
_INTERVAL_S = 1.0
_RECOMMENDED_EVERY = 5
_TOKEN_S = 21600


def spot_notifier(endpoint: str) -> Notifier:
    return Notifier("AWS", Spot(endpoint), _INTERVAL_S)


class Spot:
    """Asks the instance whether it is about to be taken away, or may be."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._token = ""
        self._is_spot = False
        self._asked = 0
        self._recommended: list[Notice] = []

    def __call__(self) -> list[Notice]:
        if not self._is_spot:
            self._check_spot()
        taken = self._taken()
        if not self._recommended and self._asked % _RECOMMENDED_EVERY == 0:
            self._recommended = self._rebalance()
        self._asked += 1
        return [*taken, *self._recommended]

    def _check_spot(self) -> None:
        answer = self._get("instance-life-cycle")
        if answer.status not in (200, 403, 404):  # 429: others ask too often
            raise Unanswered(f"{self._endpoint}: HTTP {answer.status} for the life cycle")
        if answer.status != 200 or answer.text.strip() != "spot":
            raise Over("this is no spot instance")
        self._is_spot = True

    def _taken(self) -> list[Notice]:
        said = self._read("spot/instance-action")
        if said is None or not (action := said.get("action")):
            return []
        at, when = from_iso(str(said.get("time", ""))), said.get("time") or "an unknown time"
        # A hibernation keeps the memory, and comes at once: the work goes on when it is over.
        stops = action != "hibernate"
        return [Notice("AWS spot", f"the instance will {action} at {when}", at, stops=stops)]

    def _rebalance(self) -> list[Notice]:
        said = self._read("events/recommendations/rebalance")
        if said is None:
            return []
        text = "the instance is at an elevated risk of being taken away"
        return [Notice("AWS rebalance", text, stops=False)]

    def _read(self, name: str) -> dict[str, Any] | None:
        """The JSON object; None if there is none."""
        answer = self._get(name)
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise Unanswered(f"{self._endpoint}: HTTP {answer.status} for {name}")
        try:
            said = json.loads(answer.text)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise Unanswered(f"{self._endpoint}: {name} is {answer.text[:100]!r}")
        return said

    def _get(self, name: str) -> Answer:
        """With another token if the one that it has is not good any more."""
        answer = Answer(401, "")
        for _ in range(2):
            if not self._token:
                self._token = self._new_token()
            headers = {"X-aws-ec2-metadata-token": self._token}
            answer = request(self._endpoint, f"/latest/meta-data/{name}", headers)
            if answer.status != 401:
                break
            self._token = ""
        return answer

    def _new_token(self) -> str:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
        answer = request(self._endpoint, "/latest/api/token", headers, method="PUT")
        if answer.status != 200:
            raise Unanswered(f"{self._endpoint}: HTTP {answer.status} for a token")
        return answer.text.strip()
