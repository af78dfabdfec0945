"""What lies directly below an address, folder or bucket: runs are found so, not read."""

from __future__ import annotations

import os

from holdfast.errors import BadAddress, StoreUnavailable
from holdfast.stores.object_address import SCHEMES


def folders_in(address: str) -> list[str]:
    """The names of the folders in it, sorted; [] where there are none, or no such place.

    Links are passed over. Raises StoreUnavailable for a place that cannot be listed: what may be
    there is not nothing. Raises BadAddress.
    """
    scheme, url, _ = address.partition("://")
    if not url:
        try:
            with os.scandir(address) as found:
                return sorted(each.name for each in found if each.is_dir(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StoreUnavailable(
                f"cannot list {address!r}: {error.strerror or error}",
                hint="Make the folder readable, or see that its file system is there.",
            ) from error
    if scheme.lower() not in SCHEMES:
        raise BadAddress(
            f"cannot list {address!r}", hint="Give a folder, s3://bucket/prefix, gs://… or az://…"
        )
    from holdfast.stores.object import ObjectStore  # slow to import

    return sorted(path.rpartition("/")[2] for path in ObjectStore(address).look("")[1])
