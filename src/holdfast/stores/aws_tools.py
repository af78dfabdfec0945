"""What the AWS tools know about the user: profiles, single sign-on, roles, a container's keys.

Through botocore, which those tools are made of: where `aws s3 ls` works, an address works.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.errors import UsageError

# obstore keeps what it was given until five minutes before its end. botocore hands out what is
# good for ten minutes more, or as long as its giver would have it: so it is asked each time.
_GOOD_FOR = timedelta(seconds=60)
# Their messages repeat what a server or a program has said.
_NOT_REPEATED = (
    *("CredentialRetrievalError", "MetadataRetrievalError", "TokenRetrievalError"),
    "ClientError",
)
_STATIC = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_PROFILES = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE")


class CredentialsUnreachable(Exception):
    """Who gives them did not answer; asking again may help. obstore passes on the name."""


class CredentialsRefused(Exception):
    """There are none to be had until the user does something. obstore passes on the name."""


class AwsTools(NamedTuple):
    """What they would use."""

    credentials: Callable[[], dict[str, Any]] | None
    """For obstore; None: the environment holds them, and obstore reads that itself."""
    region: str
    """"" for all of these: they know of none."""
    endpoint: str
    ca_bundle: str


def ask_aws_tools() -> AwsTools:
    """Reads their variables and files, and may ask a sign-on or the machine's own service.

    Raises UsageError if there are no credentials anywhere, or if they are where only botocore
    finds them and it is not installed.
    """
    environ = os.environ
    static = all(name in environ for name in _STATIC) or "AWS_SKIP_SIGNATURE" in environ
    if static and not _is_configured():
        return AwsTools(None, "", "", "")
    try:
        errors: Any = import_module("botocore.exceptions")
        providers: Any = import_module("botocore.configprovider")
        session: Any = import_module("botocore.session").Session()
    except ImportError:
        if static or not _is_configured():
            return AwsTools(None, "", "", "")  # a role's, which obstore can ask for itself
        raise UsageError(
            "the credentials are in a profile, and botocore, which reads those, is not installed",
            hint="pip install 'holdfast[s3]', or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        ) from None
    try:
        found = None if static else session.get_credentials()
        endpoint = providers.ConfiguredEndpointProvider(
            full_config=session.full_config,
            scoped_config=session.get_scoped_config(),
            client_name="s3",
        ).provide()
        region = session.get_config_variable("region")
        bundle = session.get_config_variable("ca_bundle")
    except (errors.BotoCoreError, errors.ClientError) as error:
        raise UsageError(
            f"the AWS credentials cannot be used: {_told(error)}",
            hint="Mend the profile, AWS_PROFILE or the files in ~/.aws: try `aws s3 ls`.",
        ) from None
    if found is None and not static:
        raise UsageError(
            "there are no AWS credentials: not in the environment, in no profile, and this "
            "machine has no role",
            hint="Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        )
    credentials = None if found is None else _Credentials(found, errors)
    return AwsTools(credentials, region or "", endpoint or "", bundle or "")


def _is_configured() -> bool:
    """Whether the user has profiles."""
    environ = os.environ
    files = (
        environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        environ.get("AWS_CONFIG_FILE", "~/.aws/config"),
    )
    return any(name in environ for name in _PROFILES) or any(
        Path(file).expanduser().exists() for file in files
    )


class _Credentials:
    """botocore's, which renews them, in the form that obstore asks for. From any thread."""

    def __init__(self, found: Any, errors: Any) -> None:
        self._found = found
        self._refused = (errors.SSOError, errors.ClientError)
        self._failed = (errors.BotoCoreError, errors.ClientError, RuntimeError)

    def __call__(self) -> dict[str, Any]:
        try:
            keys = self._found.get_frozen_credentials()
        except self._refused as error:
            raise CredentialsRefused(_told(error)) from None
        except self._failed as error:
            raise CredentialsUnreachable(_told(error)) from None
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.now(UTC) + _GOOD_FOR,
        }


def _told(error: Exception) -> str:
    """As much of an error as holds no secret."""
    name = type(error).__name__
    if any(kind.__name__ in _NOT_REPEATED for kind in type(error).__mro__):
        return name
    return f"{name}, {error}"
