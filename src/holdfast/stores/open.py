"""From an address to the store that it names."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from holdfast.errors import BadAddress
from holdfast.stores.base import BadKey, Store
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore
from holdfast.stores.object_address import SCHEMES

# Two letters at least: `C:` is a drive.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_SUPPORTED = (
    "Use a folder (runs/mnist), file:///data/runs/mnist, s3://bucket/prefix, gs://…, az://… or "
    "memory://name."
)


def open_store(address: str | os.PathLike[str]) -> Store:
    """The store at `address`: a path, a `file://` URL, `s3://bucket/prefix`, `gs://…`, `az://…`
    or `memory://name`.

    Touches nothing: whether it exists and can be written shows at the first call.
    Raises BadAddress.

    >>> open_store("memory://scratch").address
    'memory://scratch'
    """
    if not isinstance(address, str):
        return _open_folder(os.fspath(address))
    match = _SCHEME.fullmatch(address)
    if match is None:
        return _open_folder(address)
    scheme = match[1].lower()
    if scheme == "file":
        return _open_folder(_file_path(address))
    if scheme == "memory":
        try:
            return MemoryStore.named(match[2])
        except BadKey as error:
            raise BadAddress(
                f"bad name in {address!r}: {error.message}",
                hint="A name is letters, digits, '.', '_', '-', in parts joined by '/'.",
            ) from None
    if scheme in SCHEMES:
        from holdfast.stores.object import ObjectStore  # slow to import; most runs have folders

        return ObjectStore(address)
    raise BadAddress(f"cannot open {address!r}: unknown scheme {scheme}://", hint=_SUPPORTED)


def _open_folder(path: str) -> LocalStore:
    if not path or "\0" in path:
        raise BadAddress(f"not a path: {path!r}", hint=_SUPPORTED)
    return LocalStore(os.path.expanduser(path))


def _file_path(address: str) -> str:
    hint = "Write file:///absolute/path; '#', '?' and '%' in it as %23, %3F and %25."
    try:
        url = urlsplit(address)
    except ValueError:
        raise BadAddress(f"not a URL: {address!r}", hint=hint) from None
    if url.netloc not in ("", "localhost") or not url.path.startswith("/"):
        raise BadAddress(f"no absolute path on this machine: {address!r}", hint=hint)
    if "?" in address or "#" in address:
        raise BadAddress(f"a file URL has no query or fragment: {address!r}", hint=hint)
    return unquote(url.path, errors="surrogateescape")
