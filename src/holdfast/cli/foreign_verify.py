"""`holdfast verify FILE`: what the format of a foreign file lets check, and what it does not."""

from __future__ import annotations

import os.path
from typing import TYPE_CHECKING

from holdfast.cli.options import watched
from holdfast.cli.render import error_json, print_json, shown, wrapped
from holdfast.core.units import format_size
from holdfast.errors import DamagedObject

if TYPE_CHECKING:
    from holdfast.foreign import Foreign

_SHORT = 24
_HINT = "Copy or download it again, or take another checkpoint."


def verify_foreign(path: str, *, as_json: bool) -> int:
    """Check the file or folder; the exit status. Raises DamagedObject after the page."""
    from holdfast.foreign import open_foreign

    try:
        with open_foreign(os.path.expanduser(path)) as foreign, watched(f"verifying {path}"):
            problems = foreign.check()
    except DamagedObject as found:
        found.hint = found.hint or _HINT
        raise
    error = DamagedObject(path, "; ".join(problems[:3]), hint=_HINT) if problems else None
    if as_json:
        value = {
            "file": path,
            "kind": foreign.file.kind,
            "nbytes": foreign.file.nbytes,
            "intact": not problems,
            "problems": problems,
            "checked": list(foreign.proof.checked),
            "unchecked": list(foreign.proof.unchecked),
        }
        print_json({"ok": error is None, **error_json(error), **value})
        return 4 if error else 0
    print(verified_text(path, foreign, problems))
    if error:
        raise error
    return 0


def verified_text(
    path: str, foreign: Foreign, problems: list[str], width: int | None = None
) -> str:
    """The page: what was checked, what cannot be, what is wrong."""
    proof, file = foreign.proof, foreign.file
    lines = [shown(f"{path}: {file.kind}, {format_size(file.nbytes)}")]
    for title, said in (("checked", proof.checked), ("cannot be checked", proof.unchecked)):
        lines += ["", title, *(wrapped(f"  {one}", indent=4, width=width) for one in said)]
    lines.append("")
    lines += [f"DAMAGED: {shown(problem)}" for problem in problems[:_SHORT]]
    if len(problems) > _SHORT:
        lines.append(f"… {len(problems) - _SHORT:,} more (--json shows all)")
    if not problems:
        lines.append("No damage found.")
    return "\n".join(lines)
