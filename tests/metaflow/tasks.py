"""Tasks without Metaflow: their checkpoints, in a folder or a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.metaflow.checkpoints import Checkpoints
from holdfast.metaflow.places import Place, Root, RunName
from tests.support.servers import service


def in_bucket(place: service.Place) -> Root:
    url, mark, query = place.address.partition("?")
    return Root(url, mark + query)


def task(
    root: Root | Path,
    *,
    run: str = "7",
    origin: str = "",
    attempt: int = 0,
    foreach: tuple[int, ...] = (),
    **options: Any,
) -> Checkpoints:
    """Those of step `fit` of flow `Train`, as one attempt sees them."""
    return Checkpoints(
        Root(str(root)) if isinstance(root, Path) else root,
        Place("Train", "fit", RunName(run, origin), foreach),
        pathspec=f"Train/{run}/fit/2",
        attempt=attempt,
        **options,
    )


def written(folder: Path, **files: str) -> Path:
    """`folder`, with these files only changed or added."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Relative path and text of every file; "/" for an empty folder, "-> target" for a link."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_text()
        elif not any(path.iterdir()):
            found[name] = "/"
    return found
