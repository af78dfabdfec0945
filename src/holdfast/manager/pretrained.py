"""A checkpoint as a folder that Transformers or PEFT loads.

Weights come from the checkpoint; what is written beside them (config.json, the tokenizer's
files) from a folder, or from the checkpoint's state if the run tracks it there:

    {"model": <tensors>, "pretrained_files": {"config.json": "{…}", "tokenizer.json": "{…}"}}

at the top or below one name. Needs neither Transformers nor PEFT.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from holdfast.core.adapters import NOTHING
from holdfast.core.address import printable, some_of
from holdfast.core.records import Manifest, Record
from holdfast.core.stored import is_safe_name
from holdfast.core.tree import TreeDecoder, settle
from holdfast.core.types import Node
from holdfast.errors import StateError, UsageError
from holdfast.manager.export import check_packs, metadata_of
from holdfast.manager.exported import Exported
from holdfast.manager.nodes import leaf_indexes, mapping_pairs
from holdfast.manager.peft_names import adapter_names
from holdfast.manager.reader import ChunkReader
from holdfast.manager.scratch import check_target, write_whole
from holdfast.manager.tensors import (
    Stored,
    below,
    check_no_others,
    names_of,
    shards,
    sync_file,
    tensors_of,
    write_bytes,
    write_shards,
)
from holdfast.repo.repo import Repo

FILES = "pretrained_files"
MODEL = "model"
SHARD_BYTES = 5 * 10**9
"""Larger models are cut, as Transformers cuts them."""

_CONFIG = {"hf": "config.json", "peft": "adapter_config.json"}
_STEM = {"hf": "model", "peft": "adapter_model"}
# What would make the one folder a mixture with the other.
_NOT_FOR = {"hf": ("adapter_config.json",), "peft": ("config.json", "generation_config.json")}
# Weights of the model before: never beside the new ones.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|pkl|pickle|npz)(\.index\.json)?", re.I
)
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def export_pretrained(
    repo: Repo,
    record: Record,
    kind: str,
    folder: Path,
    *,
    only: str = "",
    files: Path | None = None,
    adapter: str = "",
    shard_bytes: int | None = None,
    replace: bool = False,
) -> Exported:
    """Write `folder` for Transformers ("hf") or PEFT ("peft").

    `only` names the model in the state, else it is `model`. Raises UsageError where there is
    no such model, no config, or another kind of model; DamagedObject; nothing is left behind.
    """
    check_target(folder, replace=replace)
    manifest = repo.manifest(record)
    list(leaf_indexes(manifest.tree))  # raises for a tree that is too deep for what recurses
    model, beside = _find(manifest.tree, only)
    left_out: list[str] = []
    texts: dict[str, bytes | Path] = {}
    if files is not None:
        texts |= _files_in(files)
    else:
        there = _tracked_files(manifest, beside)
        if kind == "peft":
            there, adapter = _of_adapter(there, adapter)
        for name, node in there.items():
            path = f"{beside}/{name}"
            if "/" in name or _WEIGHTS.fullmatch(name):
                left_out.append(f"{path}: {'in a folder' if '/' in name else 'other weights'}")
            else:
                texts[name] = _data(repo, record, manifest, node, path)
    texts = {name: data for name, data in texts.items() if name not in _NOT_FOR[kind]}
    data, config = _config(texts, kind, model, files)
    tensors, others = tensors_of(manifest, cast(Node, below(manifest.tree, model)))
    if not tensors:
        raise UsageError(
            f"{model!r} holds no tensor",
            hint=f"Name the model: --only NAME: {_names(manifest.tree)}.",
        )
    left_out += [f"{model}/{name}: no tensor" for name in others]
    if kind == "hf":
        _refuse_adapters(tensors, model)
        chosen = _once(tensors, config)
        texts["config.json"] = _with_dtype(data, config, chosen)
        parts = shards(chosen, shard_bytes or SHARD_BYTES)
    else:
        parts = [_adapter(tensors, config, adapter)]
    check_packs(repo, record, manifest, [one for part in parts for one in part])
    stem = _STEM[kind]
    check_no_others(folder, [*names_of(stem, len(parts)), *texts])

    def write(scratch: Path) -> list[Path]:
        metadata = metadata_of(repo, record)
        written = write_shards(repo, record, manifest, parts, scratch, stem, metadata)
        for name, data in texts.items():
            written.append(scratch / name)
            if isinstance(data, bytes):
                write_bytes(scratch / name, data)
            else:
                shutil.copyfile(data, scratch / name)
                sync_file(scratch / name)
        return written

    paths = [folder / path.name for path in write_whole(folder, write)]
    return Exported(kind, folder, paths, [one.name for part in parts for one in part], left_out)


# -- where things are ---------------------------------------------------------


def _find(tree: Node, only: str) -> tuple[str, str]:
    """(path of the model, path of the files, "" if there are none)."""
    homes = ["", *(key for key, _ in mapping_pairs(tree) or [] if isinstance(key, str))]
    of_files = [home for home in homes if _is_dict(tree, _join(home, FILES))]
    if only:
        only = only.rstrip("/")
        if _is_dict(tree, _join(only, FILES)) and _is_dict(tree, _join(only, MODEL)):
            return _join(only, MODEL), _join(only, FILES)
        if not _is_dict(tree, only):
            raise UsageError(
                f"the checkpoint has no model at {only!r}", hint=f"It has {_names(tree)}."
            )
        beside = _join(only.rpartition("/")[0], FILES)
        if not _is_dict(tree, beside):
            beside = _join(of_files[0], FILES) if len(of_files) == 1 else ""
        return only, beside
    found = [home for home in of_files if _is_dict(tree, _join(home, MODEL))]
    if not found:
        found = [home for home in homes if _is_dict(tree, _join(home, MODEL))]
        found = [""] if "" in found else found
    if not found:
        raise UsageError(
            "the checkpoint has no model",
            hint=f"Say which part of the state it is, with --only NAME: {_names(tree)}.",
        )
    if len(found) > 1:
        models = some_of([_join(home, MODEL) for home in found])
        raise UsageError(
            f"the checkpoint has {len(found)} models: {models}", hint="Name one: --only NAME."
        )
    files = [_join(home, FILES) for home in (*found, "") if home in of_files]
    return _join(found[0], MODEL), files[0] if files else ""


def _join(home: str, name: str) -> str:
    return f"{home}/{name}" if home else name


def _is_dict(tree: Node, path: str) -> bool:
    node = below(tree, path)
    return node is not None and mapping_pairs(node) is not None


def _names(tree: Node) -> str:
    names = [key for key, value in mapping_pairs(tree) or [] if isinstance(key, str)]
    return some_of(sorted(names)) if names else "nothing"


# -- files --------------------------------------------------------------------


def _files_in(folder: Path) -> Iterator[tuple[str, Path]]:
    if not folder.is_dir():
        raise UsageError(
            f"{printable(str(folder))} is not a folder",
            hint="Name the one that has config.json: --files FOLDER.",
        )
    for path in sorted(folder.iterdir()):
        if path.is_file() and not _WEIGHTS.fullmatch(path.name):
            yield path.name, path


def _tracked_files(manifest: Manifest, beside: str) -> dict[str, Node]:
    """Files of the state, by names that anybody may have chosen. Raises StateError for one
    that leads out of a folder."""
    found: dict[str, Node] = {}
    pairs = mapping_pairs(cast(Node, below(manifest.tree, beside))) if beside else None
    for key, node in pairs or []:
        if not isinstance(key, str) or not all(map(_is_plain_name, key.split("/"))):
            raise StateError(
                f"{beside!r} of the checkpoint names a file {str(key)[:80]!r}, which is no plain "
                "file name",
                hint="Take the files from a folder instead: --files FOLDER.",
            )
        found[key] = node
    return found


def _of_adapter(files: dict[str, Node], adapter: str) -> tuple[dict[str, Node], str]:
    """(files with that adapter's config at the top, which adapter), "" = not known yet.

    The config of an adapter that is not called "default" is in a folder of its name, where PEFT
    puts it.
    """
    name = _CONFIG["peft"]
    own = [path.removesuffix(f"/{name}") for path in files if path.endswith(f"/{name}")]
    if not adapter and name not in files and len(own) == 1:
        adapter = own[0]
    if not own or adapter in ("", "default"):
        return files, adapter
    configs = {name, *(f"{one}/{name}" for one in own)}
    others = {path: node for path, node in files.items() if path not in configs}
    return others | ({name: files[f"{adapter}/{name}"]} if adapter in own else {}), adapter


def _is_plain_name(name: str) -> bool:
    return is_safe_name(name) and "\\" not in name and name.isprintable()


def _data(repo: Repo, record: Record, manifest: Manifest, node: Node, path: str) -> bytes:
    reader = ChunkReader(repo, record, manifest)
    decoder = TreeDecoder(manifest.leaves, fetch=reader.fetch, scope=manifest.tree)
    if not isinstance(node, str) and not (isinstance(node, dict) and _is_data(node)):
        raise StateError(
            f"{path!r} is not the text of a file", hint="Its values must be str or bytes."
        )
    value = decoder.decode(node, NOTHING, path)
    reader.fetch(decoder.requests)
    decoder.run()
    value = settle(value)
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else bytes(value)


def _is_data(node: Mapping[str, Node]) -> bool:
    return node.get("!") in ("str", "bytes", "bytearray")


def _config(
    texts: Mapping[str, bytes | Path], kind: str, model: str, files: Path | None
) -> tuple[bytes, dict[str, Any]]:
    """(as it is, what it says)."""
    name = _CONFIG[kind]
    if name not in texts:
        where = f"in {printable(str(files))}" if files else f"below {FILES!r} in the checkpoint"
        raise UsageError(
            f"there is no {name} for {model!r}: it is not {where}",
            hint="Name a folder that has it: --files FOLDER (files= in Python), such as the one "
            "that the model was loaded from.",
        )
    data = texts[name]
    data = data.read_bytes() if isinstance(data, Path) else data
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is no JSON: {error}", hint="--files FOLDER has others.") from None
    if not isinstance(config, dict):
        raise UsageError(f"{name} holds no object", hint="--files FOLDER has others.")
    return data, cast(dict[str, Any], config)


# -- Transformers -------------------------------------------------------------


def _refuse_adapters(tensors: Mapping[str, Stored], model: str) -> None:
    adapted = [name for name in tensors if ".base_layer." in name or ".lora_A." in name]
    if adapted:
        raise UsageError(
            f"{model!r} is a model with a PEFT adapter ({adapted[0]})",
            hint="Export the adapter, with --to peft, or track the model that "
            "merge_and_unload() gives.",
        )


def _once(tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> list[Stored]:
    """The tensors to be written. Word embeddings that are tied, which is what a config can
    tell of, are there once, by their first name: Transformers ties them again. Any other
    tensor is there for each of its names: one that is missing would be random after loading."""
    tied = all(_values(config, "tie_word_embeddings"))
    sizes = [size for size in _values(config, "vocab_size") if isinstance(size, int)]
    known: set[object] = set()
    found: list[Stored] = []
    for one in tensors.values():
        if not (tied and one.place in known and one.shape and one.shape[0] in sizes):
            found.append(one)
        known.add(one.place)
    return found


def _values(config: Mapping[str, Any], name: str) -> list[Any]:
    """What `name` is in a config and in those inside of it."""
    found: list[Any] = []
    waiting: list[Any] = [config]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            pairs = cast(dict[str, Any], item)
            found += [value for key, value in pairs.items() if key == name]
            waiting += pairs.values()
    return found


def _with_dtype(data: bytes, config: dict[str, Any], tensors: list[Stored]) -> bytes:
    """config.json that says of which dtype the weights are, as Transformers has it say: it
    loads them as what is written there."""
    dtype = next((_FLOATS[one.dtype] for one in tensors if one.dtype in _FLOATS), None)
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if dtype is None or config.get(key) == dtype or "quantization_config" in config:
        return data
    return f"{json.dumps({**config, key: dtype}, indent=2)}\n".encode()


# -- PEFT ---------------------------------------------------------------------


def _adapter(
    tensors: Mapping[str, Stored], config: Mapping[str, Any], adapter: str
) -> list[Stored]:
    found: list[Stored] = []
    known: set[object] = set()
    for name, original in adapter_names(tensors, config, adapter).items():
        one = tensors[original]
        # Of tied embeddings PEFT saves the first; all else it copies.
        if "trainable_tokens_delta" in name and one.place in known:
            continue
        known.add(one.place)
        found.append(one._replace(name=name))
    return found
