"""Which places can say something about this machine's end. Sends no request.

The environment is read here:

- HOLDFAST_NOTICES: which places are listened to, as "aws,file"; "none" for none of them;
- AWS_EC2_METADATA_SERVICE_ENDPOINT, GCE_METADATA_HOST, HOLDFAST_AZURE_METADATA_ENDPOINT: where
  a cloud's metadata service is, which makes this a machine of that cloud;
- AWS_EC2_METADATA_DISABLED: "true" if Amazon's must not be asked;
- SLURM_JOB_END_TIME; HOLDFAST_NOTICE_FILE: the file that is there from a notice on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.notices import slurm

LINK_LOCAL = "http://169.254.169.254"
"""Where the metadata service of every cloud is. Not by name: that takes a resolver."""

_DMI = Path("/sys/class/dmi/id")
# Of every virtual machine of Azure, so that others of Hyper-V are none.
_AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"


@dataclass(frozen=True)
class Place:
    """Where notices can come from."""

    name: str
    """"aws", "gcp", "azure", "slurm" or "file"."""
    where: str
    """What is asked: an address, a path, a time; "" = there is no such place here."""
    why: str
    """What says that it is here, or that it is not."""

    @property
    def found(self) -> bool:
        return bool(self.where)


def detect(environ: Mapping[str, str] = os.environ, dmi: Path = _DMI) -> tuple[Place, ...]:
    """Every place that Holdfast knows, whether it is here or not."""
    places = (
        _aws(environ, dmi),
        _gcp(environ, dmi),
        _azure(environ, dmi),
        _slurm(environ),
        _file(environ),
    )
    left_out = "HOLDFAST_NOTICES leaves it out"
    return tuple(
        one if is_wanted(one.name, environ) else Place(one.name, "", left_out) for one in places
    )


def is_wanted(name: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether HOLDFAST_NOTICES lets this place be listened to.

    >>> is_wanted("aws", {}), is_wanted("aws", {"HOLDFAST_NOTICES": "file, gcp"})
    (True, False)
    """
    wanted = {one.strip() for one in environ.get("HOLDFAST_NOTICES", "").lower().split(",")}
    return wanted <= {"", "all"} or name.lower() in wanted


def _aws(environ: Mapping[str, str], dmi: Path) -> Place:
    if environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return Place("aws", "", "AWS_EC2_METADATA_DISABLED")
    if endpoint := environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        return Place("aws", endpoint, "AWS_EC2_METADATA_SERVICE_ENDPOINT")
    if _read(dmi / "sys_vendor") == "Amazon EC2":
        return Place("aws", LINK_LOCAL, "sys_vendor is Amazon EC2")
    if _read(dmi / "bios_version").endswith(".amazon"):  # older instances, on Xen
        return Place("aws", LINK_LOCAL, "bios_version is Amazon's")
    return Place("aws", "", "the hardware is not Amazon's")


def _gcp(environ: Mapping[str, str], dmi: Path) -> Place:
    if host := environ.get("GCE_METADATA_HOST"):
        return Place("gcp", f"http://{host}", "GCE_METADATA_HOST")
    if (name := _read(dmi / "product_name")) == "Google Compute Engine":
        return Place("gcp", LINK_LOCAL, f"product_name is {name}")
    return Place("gcp", "", "the hardware is not Google's")


def _azure(environ: Mapping[str, str], dmi: Path) -> Place:
    if endpoint := environ.get("HOLDFAST_AZURE_METADATA_ENDPOINT"):
        return Place("azure", endpoint, "HOLDFAST_AZURE_METADATA_ENDPOINT")
    if _read(dmi / "chassis_asset_tag") == _AZURE_TAG:
        return Place("azure", LINK_LOCAL, "chassis_asset_tag is Azure's")
    return Place("azure", "", "the hardware is not Azure's")


def _slurm(environ: Mapping[str, str]) -> Place:
    end = slurm.end_s(environ)
    return Place("slurm", "" if end is None else f"{end:.0f}", "SLURM_JOB_END_TIME")


def _file(environ: Mapping[str, str]) -> Place:
    return Place("file", environ.get("HOLDFAST_NOTICE_FILE", ""), "HOLDFAST_NOTICE_FILE")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
