"""The names of unfinished files, which say whose they are.

    tmp/<host>-<boot>-<pid namespace>-<pid>-<start time>-<random>

So a later process can tell what a dead writer left from what a live one writes.
"""

from __future__ import annotations

import re
import secrets

from holdfast.core.records import Holder

TEMPORARIES = "tmp"

_TEMPORARY = re.compile(
    r"(?P<host>[A-Za-z0-9._-]+)-(?P<boot>[0-9a-f]*)-(?P<namespace>\d*)"
    r"-(?P<pid>\d+)-(?P<started>[\w:]*)-[0-9a-f]{16}"
)


def is_temporary(key: str) -> bool:
    """Also of a store further down: `runs` lists what is in `runs/mnist`."""
    *_, folder, name = f"//{key}".split("/")
    return folder == TEMPORARIES and _TEMPORARY.fullmatch(name) is not None


def temporary_name(owner: Holder) -> str:
    host = _host_token(owner.host)
    boot = _boot_token(owner.boot)
    random = secrets.token_hex(8)
    return f"{host}-{boot}-{owner.namespace}-{owner.pid}-{owner.started}-{random}"


def owner_of(name: str, me: Holder) -> Holder | None:
    """Whose temporary this is, as far as its name says; parts like mine are mine."""
    match = _TEMPORARY.fullmatch(name)
    if match is None:
        return None
    return Holder(
        host=me.host if match["host"] == _host_token(me.host) else match["host"],
        boot=me.boot if match["boot"] == _boot_token(me.boot) else match["boot"],
        namespace=match["namespace"],
        pid=int(match["pid"]),
        started=match["started"],
    )


def _host_token(host: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", host)[:64] or "_"


def _boot_token(boot: str) -> str:
    return re.sub(r"[^0-9a-f]", "", boot.lower())[:8]
