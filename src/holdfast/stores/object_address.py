"""Addresses of runs on object stores: `s3://bucket/prefix?endpoint=…`.

Credentials never stand in an address, since addresses are printed, logged and written down
in forks: they come from the environment, as the clouds' own tools take them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from holdfast.errors import BadAddress

SCHEMES = ("s3", "gs", "az")

_OPTIONS = {
    "s3": ("endpoint", "region", "virtual_hosted"),
    "gs": ("endpoint",),
    "az": ("account", "endpoint"),
}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}[A-Za-z0-9]")
# One part of a prefix: what no client and no tool reads in its own way.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+,-]{0,254}")


class ObjectAddress(NamedTuple):
    """What an address says."""

    scheme: str
    bucket: str
    """Azure: the container."""
    prefix: str
    """Without slashes at its ends; "" for the whole bucket."""
    options: Mapping[str, str]
    text: str
    """The address in its one form."""

    def below(self, path: str) -> str:
        """The address of what lies at `path`, "" for this one, below the prefix."""
        plain, mark, query = self.text.partition("?")
        return f"{plain}/{path}".rstrip("/") + mark + query


def parse_object_address(address: str) -> ObjectAddress:
    """Raises BadAddress.

    >>> found = parse_object_address("s3://bucket/exp/gpt/?region=eu-west-1")
    >>> found.bucket, found.prefix, found.options["region"], found.text
    ('bucket', 'exp/gpt', 'eu-west-1', 's3://bucket/exp/gpt?region=eu-west-1')
    """
    shown = _shown(address)
    try:
        url = urlsplit(address)
        options = parse_qsl(url.query, keep_blank_values=True, strict_parsing=bool(url.query))
    except ValueError:
        raise BadAddress(
            f"not a URL: {shown!r}", hint="Write s3://bucket/prefix?endpoint=http://host:port"
        ) from None
    scheme = url.scheme.lower()
    known = _OPTIONS[scheme]
    if "@" in url.netloc or url.fragment:
        raise _no_secrets(shown, scheme)
    for name, value in options:
        if name not in known:
            raise _no_secrets(shown, scheme, name)
        if name == "endpoint":
            _check_endpoint(value, shown)
    if len(dict(options)) < len(options):
        raise BadAddress(f"an option is given twice in {shown!r}", hint="Give each once.")
    if not _BUCKET.fullmatch(url.netloc):
        raise BadAddress(
            f"no bucket in {shown!r}", hint=f"Write {scheme}://bucket/prefix, e.g. the run's name."
        )
    parts = url.path.strip("/").split("/") if url.path.strip("/") else []
    if not all(_PART.fullmatch(part) for part in parts):
        raise BadAddress(
            f"bad prefix in {shown!r}",
            hint="Its parts are letters, digits and '._=+,-', and do not begin with a dot.",
        )
    prefix = "/".join(parts)
    query = urlencode(sorted(options), safe=":/[]")
    text = f"{scheme}://{url.netloc}" + (f"/{prefix}" if prefix else "")
    return ObjectAddress(
        scheme, url.netloc, prefix, dict(options), f"{text}?{query}" if query else text
    )


def _shown(address: str) -> str:
    """As much of an address as an error may repeat: a user and a password can stand anywhere
    before an "@", whole URLs with slashes in them too, and tokens after "?" and "#"."""
    plain = re.split("[?#]", address, maxsplit=1)[0]
    scheme, _, rest = plain.partition("://")
    return f"{scheme}://…" if "@" in address or ":" in rest.partition("/")[0] else plain


def _check_endpoint(value: str, shown: str) -> None:
    try:
        url = urlsplit(value)
        fits = url.scheme in ("http", "https") and bool(url.hostname)
        fits = fits and not ("@" in value or url.query or url.fragment)
        _ = url.port  # raises
    except ValueError:
        fits = False
    if not fits:
        raise BadAddress(
            f"the endpoint in {shown!r} is no plain http or https URL",
            hint="Write ?endpoint=https://host:port, without a user, a password or a query.",
        )


def _no_secrets(shown: str, scheme: str, name: str = "") -> BadAddress:
    # A token without a name reads as one, too.
    what = f"the option {name!r}" if re.fullmatch("[a-z_]{1,40}", name) else "this form"
    return BadAddress(
        f"{shown!r}: an address of {scheme}:// does not take {what}",
        hint=f"It takes {', '.join(_OPTIONS[scheme])}. Credentials come from the environment.",
    )
