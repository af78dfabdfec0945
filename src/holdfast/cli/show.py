"""`holdfast show`: what one checkpoint, or a file of another make, holds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli import nodes
from holdfast.cli.foreign import is_foreign, show_file
from holdfast.cli.options import json_option, opened, selector_of
from holdfast.cli.render import (
    Column,
    checkpoint_json,
    metric_text,
    name_shown,
    plural,
    print_json,
    saved_text,
    shown,
    table,
    wrapped,
)
from holdfast.core.address import parse_reference
from holdfast.core.units import format_size
from holdfast.repo.check import leaf_nbytes

if TYPE_CHECKING:
    from holdfast.core.records import Manifest
    from holdfast.manager.info import CheckpointInfo

# A longer list of leaves or settings is what --leaves and --json are for.
_SHORT = 24


@click.command(
    short_help="Show what a checkpoint, or another file, holds.",
    epilog="""\b
Examples:
  holdfast show runs/mnist                  # the latest
  holdfast show runs/mnist@best:val_loss
  holdfast show runs/mnist@41200 --leaves   # every tensor, array and file
  holdfast show runs/mnist@a-tag --json
  holdfast show model.pt                    # a file of another make
  holdfast show checkpoints/step_400        # a folder of shards, or by DCP""",
)
@click.argument("reference", metavar="REF|FILE")
@click.option("--leaves", "with_leaves", is_flag=True, help="List every leaf of the state.")
@json_option
def show(reference: str, with_leaves: bool, as_json: bool) -> int:
    """Show what a checkpoint holds: state, metrics, position, config, environment.

    Reads its description only; nothing in it is run or loaded. So it is with a FILE by
    PyTorch (.pt, .pth, .bin), safetensors, pickle, NumPy (.npy, .npz), Keras (.keras,
    .weights.h5), XGBoost or LightGBM, and with a folder of shards or by PyTorch's
    DCP; it says which code would run if a program loaded it.
    """
    if is_foreign(reference):
        return show_file(reference, with_leaves=with_leaves, as_json=as_json)
    wanted = parse_reference(reference)
    with opened(wanted.address) as run:
        info = run.info(selector_of(wanted))
        manifest = run.manifest(info.id)
    if as_json:
        print_json({"ok": True, **_json(info, manifest, with_leaves)})
    else:
        print(checkpoint_text(info, manifest, time.time(), with_leaves=with_leaves))
    return 0


def _json(info: CheckpointInfo, manifest: Manifest, with_leaves: bool) -> dict[str, Any]:
    value: dict[str, Any] = {
        "checkpoint": checkpoint_json(info),
        "world_size": manifest.world_size,
        "state": [
            {
                "name": part.name,
                "leaves": part.leaves,
                "nbytes": part.nbytes,
                "dtypes": list(part.dtypes),
                **({} if part.leaves else {"value": part.value}),
            }
            for part in nodes.parts(manifest)
        ],
        "loop": nodes.runtime_entry(manifest, "loop"),
        "config": manifest.config,
        "environment": manifest.environment,
    }
    if with_leaves:
        value["leaves"] = [
            {
                "path": leaf.path,
                "dtype": leaf.dtype,
                "shape": list(leaf.shape),
                "nbytes": leaf_nbytes(leaf),
            }
            for leaf in nodes.state_leaves(manifest)
        ]
    return value


def checkpoint_text(
    info: CheckpointInfo,
    manifest: Manifest,
    now_s: float,
    *,
    with_leaves: bool = False,
    width: int | None = None,
) -> str:
    """The page about one checkpoint."""
    facts = [
        ("saved", saved_text(info.time_s, now_s)),
        ("size", _size(info, manifest)),
        ("id", info.id),
        ("ranks", _ranks(manifest)),
        ("why saved", info.note),
        ("tags", ", ".join(info.tags)),
        ("pinned", "yes" if info.pinned else ""),
        ("pickled", "yes: loading it needs allow_pickle=True" if info.pickled else ""),
        ("metrics", _metrics(info.metrics)),
        ("position", "; ".join(nodes.loops(nodes.runtime_entry(manifest, "loop")))),
    ]
    sections = [
        shown(f"{info.address}@{info.step}: step {info.step:,}"),
        _facts(facts, width),
        _state(manifest, width),
    ]
    if with_leaves:
        sections.append(_leaves(manifest, width))
    for title, value in (("config", manifest.config), ("environment", manifest.environment)):
        if value:
            sections.append(_tree(title, value))
    return "\n\n".join(sections)


def _size(info: CheckpointInfo, manifest: Manifest) -> str:
    own, compressed = nodes.new_and_compressed(manifest)
    if info.new_bytes >= info.nbytes or (compressed and own == info.nbytes):
        smaller = f", compressed to {format_size(info.new_bytes)}" if compressed else ""
        return f"{format_size(info.nbytes)}, all of it written for this checkpoint{smaller}"
    new = f"{format_size(info.new_bytes)} written for this checkpoint" if info.new_bytes else ""
    if new and compressed:
        new += f" (compressed; {format_size(own)} before)"
    shared = "the rest shared with others" if new else "all of it shared with other checkpoints"
    return ", ".join(filter(None, (format_size(info.nbytes), new, shared)))


def _ranks(manifest: Manifest) -> str:
    """ "" for a checkpoint of one process."""
    ranks = manifest.world_size
    return (
        f"{ranks:,}; values, random states and positions are those of rank 0" if ranks > 1 else ""
    )


def _metrics(metrics: Mapping[str, float]) -> str:
    names = sorted(metrics)
    said = [f"{name_shown(name)} {metric_text(metrics[name])}" for name in names[:_SHORT]]
    more = f" and {len(names) - _SHORT:,} more (--json shows all)" if len(names) > _SHORT else ""
    return ", ".join(said) + more


def _facts(facts: list[tuple[str, str]], width: int | None) -> str:
    said = [(name, text) for name, text in facts if text]
    widest = max(len(name) for name, _ in said)
    return "\n".join(
        wrapped(f"{name:<{widest}}  {text}", indent=widest + 2, width=width) for name, text in said
    )


def _state(manifest: Manifest, width: int | None) -> str:
    """What the state is made of; below it the values that are no tensor, array or file."""
    parts = nodes.parts(manifest)
    rows = [
        [
            part.name,
            f"{part.leaves:,}" if part.leaves else "",
            format_size(part.nbytes) if part.leaves else "",
            ", ".join(part.dtypes) if part.leaves else "values, below",
        ]
        for part in parts
    ]
    columns = [
        Column("STATE", elastic=True),
        Column("LEAVES", right=True),
        Column("SIZE", right=True),
        Column("TYPES", elastic=True),
    ]
    values = {part.name: part.value for part in parts if not part.leaves}
    text = table(columns, rows, width) if rows else "The state is empty."
    return f"{text}\n\n{_tree('values', values)}" if values else text


def _leaves(manifest: Manifest, width: int | None) -> str:
    rows = [
        [leaf.path, leaf.dtype, str(list(leaf.shape)), format_size(leaf_nbytes(leaf))]
        for leaf in nodes.state_leaves(manifest)
    ]
    columns = [
        Column("LEAF", elastic=True),
        Column("TYPE"),
        Column("SHAPE", elastic=True),
        Column("SIZE", right=True),
    ]
    return table(columns, rows, width) if rows else "No leaves: the state has plain values only."


def _tree(title: str, value: Any) -> str:
    lines = [
        f"  {nodes.cut_text(path)}: {text}" if path else f"  {text}"
        for path, text in nodes.flat(value)
    ]
    more = len(lines) - _SHORT
    if more > 1:
        lines = [*lines[:_SHORT], f"  … {plural(more, 'line')} more (--json shows all)"]
    return "\n".join([title, *map(shown, lines)])
