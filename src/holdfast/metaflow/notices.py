"""Whether the machine is about to be taken away: who says so, and who looks.

A source is a function that returns what was said, "" as long as nothing was, and raises Over
when there is nobody to ask. It knows nothing of Metaflow or of checkpoints.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

Source = Callable[[], str]

# A machine is gone two minutes after its notice, so that an older one was about another.
_STALE_S = 600.0

_ENDPOINT = "http://169.254.169.254"
_TIMEOUT_S = 1.0
_TOKEN_S = 21600
_MAX_BYTES = 1 << 16
_VENDOR = Path("/sys/class/dmi/id/sys_vendor")


class Over(Exception):
    """Nobody will say anything: there is no more to ask."""


def file_notice(path: str, clock: Callable[[], float] = time.time) -> Source:
    """The file `path` is there from the moment of the notice, with its time in it."""

    def ask() -> str:
        try:
            if clock() - os.stat(path).st_mtime > _STALE_S:
                return ""
            said = Path(path).read_text(errors="replace").strip()[:100]
        except OSError:
            return ""
        return f"the machine will be taken away ({path}: {said})"

    return ask


def on_ec2(environ: Mapping[str, str] = os.environ, vendor: Path = _VENDOR) -> bool:
    """Whether this is a machine of Amazon's EC2 whose metadata may be asked for."""
    if environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    if environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        return True
    try:
        return vendor.read_text().strip() == "Amazon EC2"
    except OSError:
        return False


class SpotNotice:
    """What a spot instance of EC2 says about itself. A `Source`."""

    def __init__(self, endpoint: str = "") -> None:
        self._endpoint = urlsplit(
            endpoint or os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _ENDPOINT
        )
        self._token = ""
        self._is_spot = False

    def __call__(self) -> str:
        try:
            if not self._is_spot:
                self._check_spot()
            status, text = self._get("spot/instance-action")
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not self._is_spot:  # no such service, or none that containers can reach
                raise Over(str(error)) from None
            return ""  # asked again
        if status != 200:
            return ""
        try:
            said = json.loads(text)
            return f"the instance will {said['action']} at {said['time']}"
        except (ValueError, KeyError, TypeError):
            return f"the instance will be taken away: {text[:100]}"

    def _check_spot(self) -> None:
        status, text = self._get("instance-life-cycle")
        if status != 200 or text.strip() != "spot":
            raise Over("this is no spot instance")
        self._is_spot = True

    def _get(self, name: str) -> tuple[int, str]:
        """Status and text, with another token if the one that it has is not good any more."""
        status, text = 401, ""
        for _ in range(2):
            if not self._token:
                seconds = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
                status, text = self._request("PUT", "/latest/api/token", seconds)
                if status != 200:
                    break
                self._token = text
            token = {"X-aws-ec2-metadata-token": self._token}
            status, text = self._request("GET", f"/latest/meta-data/{name}", token)
            if status != 401:
                break
            self._token = ""
        return status, text

    def _request(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        # Not urllib, which would go through the proxy of the environment.
        connection = http.client.HTTPConnection(
            self._endpoint.hostname or "", self._endpoint.port, timeout=_TIMEOUT_S
        )
        try:
            connection.request(method, self._endpoint.path.rstrip("/") + path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(_MAX_BYTES).decode("utf-8", "replace")
        finally:
            connection.close()


class Watch:
    """Asks a source again and again, in a thread, until it says something or `close`."""

    def __init__(self, source: Source, *, interval_s: float, tell: Callable[[str], None]) -> None:
        self._source = source
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._listeners = [tell]
        self._closed = threading.Event()
        self.notice = ""
        """What was said; "" as long as nothing was."""
        threading.Thread(target=self._look, name="holdfast-notices", daemon=True).start()

    def listen(self, call: Callable[[str], None]) -> None:
        """Have `call` called with the notice, in the thread that looks; at once if it is there."""
        with self._lock:
            if not self.notice:
                self._listeners.append(call)
                return
        call(self.notice)

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _look(self) -> None:
        said = ""
        while not said:
            try:
                said = self._source()
            except Over:
                return
            if not said and self._closed.wait(self._interval_s):
                return
        with self._lock:
            self.notice = said
            listeners = list(self._listeners)
        for call in listeners:
            call(said)
