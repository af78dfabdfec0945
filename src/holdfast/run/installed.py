"""What is the program's own, and what belongs to packages."""

from __future__ import annotations

import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace


@lru_cache(maxsize=1024)
def is_installed(module: str) -> bool:
    """Whether a module is not the program's own: the standard library, a package."""
    if module == SimpleNamespace.__module__:
        return False  # its other classes hold nothing
    found = sys.modules.get(module)
    if found is None:
        return False  # code that was executed by hand
    file = vars(found).get("__file__")
    if not isinstance(file, str):
        return module != "__main__"  # compiled into the interpreter
    paths = sysconfig.get_paths()
    places = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    parents = Path(file).parents
    return any(Path(place) in parents for place in places) or any(
        parent.name in ("site-packages", "dist-packages") for parent in parents
    )
