"""What lies directly below an address, folder or bucket: runs are found so, not read."""

from __future__ import annotations

import os

from holdfast.stores.object_address import SCHEMES


def folders_in(address: str) -> list[str]:
    """The names of the folders in it, sorted; [] where there are none, or no such place.

    Links are passed over. Raises StoreError for a bucket that cannot be listed.
    """
    scheme, url, _ = address.partition("://")
    if not url:
        try:
            with os.scandir(address) as found:
                return sorted(each.name for each in found if each.is_dir(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
    if scheme.lower() not in SCHEMES:
        return []
    from holdfast.stores.object import ObjectStore  # slow to import

    return sorted(path.rpartition("/")[2] for path in ObjectStore(address).look("")[1])
