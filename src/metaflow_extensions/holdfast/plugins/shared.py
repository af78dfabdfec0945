"""What the decorators have in common. Imported with Metaflow itself, in every process."""

import os
from functools import cache
from importlib.util import find_spec

from metaflow.exception import MetaflowException

# Compiled for one Python and one kind of machine, so that a code package cannot bring them.
NEEDED = ("numpy", "blake3", "xxhash", "msgspec")
_NEEDED_FOR = {"s3": ("obstore",), "gs": ("obstore",), "azure": ("obstore",)}
_SWITCHES = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0", "none"), False),
}


class NotInstalled(MetaflowException):
    headline = "Holdfast is not complete"


def text_as_value(value):
    """What `--with` gives as text."""
    none = isinstance(value, str) and value.strip().lower() in ("none", "null", "")
    return None if none else value


def switch(value):
    """True or False, also from text; what is neither stays."""
    return _SWITCHES.get(str(value).lower(), value)


def check_installed(who, datastore):
    """Raise if this task's environment, often another one than that of `run`, lacks something.

    `who` is what the message begins with.
    """
    needed = NEEDED + _NEEDED_FOR.get(datastore, ())
    missing = [name for name in needed if find_spec(name) is None]
    if not missing:
        return
    from holdfast import __version__

    packages = f'"holdfast": "{__version__}"'
    if "obstore" in needed:
        packages += ', "obstore": ">=0.12,<0.13"'
    raise NotInstalled(
        f"{who} needs what is not installed where the step runs: {', '.join(missing)}. "
        f"Add it there: @pypi(packages={{{packages}}}) above the step, or the same packages in "
        "its image."
    )


@cache  # asked for once for each step with a decorator, in every run
def package():
    """Every file of Holdfast, for tasks on other machines."""
    import holdfast

    root = os.path.dirname(holdfast.__file__)
    files = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if name.endswith((".py", ".typed"))
    ]
    return [(file, os.path.join("holdfast", os.path.relpath(file, root))) for file in files]
