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
from holdfast.stores.aws_tools import ask_aws_tools
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
    """Asks the store nothing; where credentials are to be had may be asked for. Raises UsageError
    if a package or a credential is missing; StoreUnavailable in a forked child whose parent used
    one of these stores."""
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

    # Who set it, either way, gets what he wants.
    chosen = address.scheme != "s3" or "AWS_UNSIGNED_PAYLOAD" in os.environ
    try:
        build, bundle = make(stores, address)
        options = {
            "connect_timeout": timedelta(seconds=10),
            "allow_http": True,  # where the endpoint says http://
            **_certificates(bundle),
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

        def upload(nbytes: int, signed: bool) -> Any:
            if nbytes < LARGE_BYTES:
                return client(_SMALL_S)
            config = {} if chosen or signed else {"unsigned_payload": True}
            return client(_WHOLE_S if nbytes > IN_MEMORY_BYTES else _LARGE_S, **config)

        return Clients(client(_SMALL_S), client(_LARGE_S), upload, obstore, errors)
    except errors as error:
        raise UsageError(
            f"{address.text} cannot be used as the environment says: {words_of(error)}",
            hint="Mend the variables of that cloud and the files that they name, or the address.",
        ) from None


def _certificates(bundle: str) -> dict[str, bytes]:
    """What is trusted besides the system's certificates and SSL_CERT_FILE, which obstore reads:
    the file that a cloud's own tools were told of, if any."""
    if not bundle:
        return {}
    path = Path(bundle).expanduser()
    try:
        files = sorted(filter(Path.is_file, path.iterdir())) if path.is_dir() else [path]
        return {"root_certificate": b"\n".join(file.read_bytes() for file in files)}
    except OSError as error:
        raise UsageError(
            f"the certificates that are to be trusted, in {bundle!r}, cannot be read: "
            f"{error.strerror}",
            hint="AWS_CA_BUNDLE, or REQUESTS_CA_BUNDLE for GCS and Azure, names a PEM file or a "
            "folder of such.",
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


# What each cloud takes: how to make its client, and the certificates that its tools trust.
_Made = tuple[Callable[..., Any], str]


def _s3(stores: Any, address: ObjectAddress) -> _Made:
    names = {"virtual_hosted": "virtual_hosted_style_request"}
    config: dict[str, Any] = {
        names.get(name, name): value for name, value in address.options.items()
    }
    tools = ask_aws_tools()
    given = "region" in config or "AWS_REGION" in os.environ or "AWS_DEFAULT_REGION" in os.environ
    if tools.region and not given:
        config["region"] = tools.region
    if endpoint := config.get("endpoint") or tools.endpoint:
        # Both: else the variable AWS_ENDPOINT_URL_S3 would win.
        config["endpoint"] = config["aws_endpoint_url_s3"] = endpoint
    if tools.credentials:
        config["credential_provider"] = tools.credentials
    bundle = tools.ca_bundle or os.environ.get("AWS_CA_BUNDLE", "")
    return partial(stores.S3Store, address.bucket, **config), bundle


def _gcs(stores: Any, address: ObjectAddress) -> _Made:
    config: dict[str, Any] = {}
    if endpoint := address.options.get("endpoint"):
        config["base_url"] = endpoint
    bundle = os.environ.get("REQUESTS_CA_BUNDLE", "")
    return partial(stores.GCSStore, address.bucket, **config), bundle


def _azure(stores: Any, address: ObjectAddress) -> _Made:
    config = _connection_string(os.environ.get("AZURE_STORAGE_CONNECTION_STRING", ""))
    account = address.options.get("account")
    if account and account != config.get("account_name"):
        config = {"account_name": account}  # the string is another's
    if endpoint := address.options.get("endpoint"):
        config["endpoint"] = endpoint
    bundle = os.environ.get("REQUESTS_CA_BUNDLE", "")
    return partial(stores.AzureStore, address.bucket, **config), bundle


def _connection_string(text: str) -> dict[str, str]:
    """What Azure's portal shows and its tools take, and obstore does not."""
    pairs = (part.partition("=") for part in text.split(";"))
    parts = {name: value for name, _, value in pairs}
    account, endpoint = parts.get("AccountName", ""), parts.get("BlobEndpoint", "")
    if suffix := parts.get("EndpointSuffix"):
        protocol = parts.get("DefaultEndpointsProtocol", "https")
        endpoint = endpoint or f"{protocol}://{account}.blob.{suffix}"
    config = {
        "account_name": account,
        "account_key": parts.get("AccountKey", ""),
        "sas_key": parts.get("SharedAccessSignature", ""),
        "endpoint": endpoint,
    }
    return {name: value for name, value in config.items() if value}
