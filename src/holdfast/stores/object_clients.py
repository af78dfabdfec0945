"""From an address to the clients that speak to its cloud; imports obstore when it is used."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.core.types import MiB
from holdfast.errors import StoreUnavailable, UsageError
from holdfast.stores.object_address import ObjectAddress
from holdfast.stores.object_blocks import IN_MEMORY_BYTES
from holdfast.stores.object_errors import words_of

# From so many bytes on a request may take long.
LARGE_BYTES = 1 * MiB
# For a request that moves little, and for one that moves up to a pack: 32 MiB take 300 s at
# 0.1 MB/s. What takes longer has failed, and is tried again.
_SMALL_S = 30
_LARGE_S = 300
# For a pack of up to a GiB, which was made for a folder and is copied: at the same 0.1 MB/s.
_WHOLE_S = 3 * 3600
_EXTRAS = {"s3": "s3", "gs": "gcs", "az": "azure"}

_process: int | None = None
"""In which obstore was first used: its threads are not copied by a fork."""


class Clients(NamedTuple):
    """Those of one store: they differ in how long a request may take, and in what is signed."""

    small: Any
    large: Any
    upload: Callable[[int, bool], Any]
    """For an object of so many bytes; whether S3's signature has to cover them if they are
    many."""
    api: Any
    """The functions that take them: the module obstore."""
    errors: tuple[type[Exception], ...]
    """What those raise."""


def connect(address: ObjectAddress) -> Clients:
    """Asks no server. Raises UsageError if a package is missing; StoreUnavailable in a forked
    child whose parent used one of these stores."""
    global _process
    try:
        import obstore
        from obstore import exceptions
        from obstore import store as stores
    except ImportError:
        extra = _EXTRAS[address.scheme]
        raise UsageError(
            f"{address.scheme}:// needs the package obstore, which is not installed",
            hint=f"pip install 'holdfast[{extra}]'",
        ) from None
    check_not_forked(address)
    _process = os.getpid()
    make = {"s3": _s3, "gs": _gcs, "az": _azure}[address.scheme]
    errors = (exceptions.BaseError, OSError, ValueError)
    options = {
        "connect_timeout": timedelta(seconds=10),
        "allow_http": True,  # where the endpoint says http://
        **_certificates(address.scheme),
    }

    @cache  # a client reads every certificate of the machine: each when it is needed
    def client(timeout_s: int, **config: Any) -> Any:
        return build(
            client_options={"timeout": timedelta(seconds=timeout_s), **options},
            # We ask again ourselves: see `retrying`.
            retry_config={"max_retries": 0},
            prefix=address.prefix or None,
            **config,
        )

    # Who set it, either way, gets what he wants.
    chosen = address.scheme != "s3" or "AWS_UNSIGNED_PAYLOAD" in os.environ

    def upload(nbytes: int, signed: bool) -> Any:
        if nbytes < LARGE_BYTES:
            return client(_SMALL_S)
        config = {} if chosen or signed else {"unsigned_payload": True}
        return client(_WHOLE_S if nbytes > IN_MEMORY_BYTES else _LARGE_S, **config)

    try:
        build = make(stores, address)
        return Clients(client(_SMALL_S), client(_LARGE_S), upload, obstore, errors)
    except errors as error:
        raise UsageError(
            f"{address.text} cannot be used as the environment says: {words_of(error)}",
            hint="Mend the variables of that cloud and the files that they name, or the address.",
        ) from None


def _certificates(scheme: str) -> dict[str, bytes]:
    """What is trusted besides the system's certificates and SSL_CERT_FILE, which obstore reads:
    the file that each cloud's own tools are told of."""
    variable = "AWS_CA_BUNDLE" if scheme == "s3" else "REQUESTS_CA_BUNDLE"
    if not (name := os.environ.get(variable)):
        return {}
    path = Path(name).expanduser()
    try:
        files = sorted(filter(Path.is_file, path.iterdir())) if path.is_dir() else [path]
        return {"root_certificate": b"\n".join(file.read_bytes() for file in files)}
    except OSError as error:
        raise UsageError(
            f"{variable} names {name!r}, which cannot be read: {error.strerror}",
            hint="It is a file of certificates that are trusted, in PEM form, or a folder of such.",
        ) from None


def check_not_forked(address: ObjectAddress) -> None:
    """Raises StoreUnavailable in a forked child whose parent used one of these stores: it would
    wait for threads that it has not, and take its parent's connections from it."""
    if _process not in (None, os.getpid()):
        raise StoreUnavailable(
            f"{address.text} cannot be used here: this process was forked from one that used an "
            "object store, and has none of its threads",
            hint='Use the start method "spawn" or "forkserver", or do it in the parent.',
        )


def _s3(stores: Any, address: ObjectAddress) -> Callable[..., Any]:
    names = {"virtual_hosted": "virtual_hosted_style_request"}
    config: dict[str, Any] = {
        names.get(name, name): value for name, value in address.options.items()
    }
    if endpoint := config.get("endpoint"):
        config["aws_endpoint_url_s3"] = endpoint  # else the variable of that name would win
    if provider := _aws_profile():
        config["credential_provider"] = provider
    return partial(stores.S3Store, address.bucket, **config)


def _aws_profile() -> Any:
    """Credentials of a profile or of a shared file, which obstore does not read itself."""
    environ = os.environ
    if "AWS_ACCESS_KEY_ID" in environ or "AWS_WEB_IDENTITY_TOKEN_FILE" in environ:
        return None
    shared = Path(environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    config = Path(environ.get("AWS_CONFIG_FILE", "~/.aws/config")).expanduser()
    if "AWS_PROFILE" not in environ and not shared.exists() and not config.exists():
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        if "AWS_PROFILE" not in environ and not shared.exists():
            return None  # a config file alone may hold a region, and the machine has a role
        raise UsageError(
            "the credentials are in a profile, and boto3, which reads those, is not installed",
            hint="pip install boto3, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        ) from None
    return Boto3CredentialProvider()


def _gcs(stores: Any, address: ObjectAddress) -> Callable[..., Any]:
    config: dict[str, Any] = {}
    if endpoint := address.options.get("endpoint"):
        config["base_url"] = endpoint
    return partial(stores.GCSStore, address.bucket, **config)


def _azure(stores: Any, address: ObjectAddress) -> Callable[..., Any]:
    config: dict[str, Any] = {}
    if account := address.options.get("account"):
        config["account_name"] = account
    if endpoint := address.options.get("endpoint"):
        config["endpoint"] = endpoint
    return partial(stores.AzureStore, address.bucket, **config)
