"""Pickles, and PyTorch's files, which are pickles with the tensors' bytes beside them."""

from __future__ import annotations

from dataclasses import replace

from holdfast.errors import DamagedObject
from holdfast.foreign.contents import Budget, Contents, contents_of, runs_of
from holdfast.foreign.described import ForeignFile
from holdfast.foreign.machine import MAX_PICKLE_BYTES, Items, Walked, walk
from holdfast.foreign.source import Source
from holdfast.foreign.zips import Archive, ends_like_zip

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The value of the first pickle in files of before PyTorch 1.6."""
_OLD_STARTS = b"(]})lcdIFLSVUXKMJNGi"
"""The operations that a pickle of protocol 0 or 1 can start with."""
_SCRIPT = "TorchScript: a program of its own"
_LEGACY_TAR = "PyTorch (tar, of 2016)"
_JOBLIB = "joblib.numpy_pickle.NumpyArrayWrapper"
"""What stands in front of an array's bytes in joblib's files, in the middle of the pickle."""
_LIMIT = "its pickle has more than {:,} bytes: the rest was not looked at"


def describe_torch(archive: Archive) -> ForeignFile:
    """A zip archive by `torch.save` or `torch.jit.save`. Raises DamagedObject."""
    source = archive.source
    pickles = [name for name in archive.entries if is_program(name)]
    if len(pickles) != 1:
        raise DamagedObject(source.name, f"it has {len(pickles)} entries named data.pkl")
    base = pickles[0][: -len("data.pkl")]
    walked, contents = _walk(archive.read(pickles[0], max_bytes=MAX_PICKLE_BYTES + 1))
    file = _described("PyTorch (zip)", source, walked, contents)
    notes = [*archive.notes, *file.notes]
    problems, runs = list(file.problems), list(file.runs)
    for key, storage in contents.storages.items():
        entry = archive.entries.get(f"{base}data/{key}")
        if entry is None:
            problems.append(f"the bytes of storage {key[:40]!r} are missing")
        elif entry.nbytes != storage.nbytes or entry.encrypted:
            problems.append(
                f"storage {key[:40]!r} has {entry.nbytes:,} bytes instead of {storage.nbytes:,}"
            )
    order = f"{base}byteorder"
    if order in archive.entries and archive.read(order, max_bytes=8) == b"big":
        notes.append("its numbers are big-endian")
    if any(name.lower().startswith(f"{base}code/".lower()) for name in archive.entries):
        file = replace(file, kind="TorchScript (zip)")
        runs.insert(0, _SCRIPT)
    return replace(file, notes=tuple(notes), problems=tuple(problems), runs=tuple(runs))


def is_program(name: str) -> bool:
    """Whether an archive's entry of this name is the pickle that PyTorch loads: its zip
    reader takes upper and lower case for the same."""
    return name.lower() == "data.pkl" or name.lower().endswith("/data.pkl")


def describe_pickle(source: Source) -> ForeignFile | None:
    """A pickle, or a file by `torch.save` of before version 1.6.

    None if it is neither. Pickles of protocols 0 and 1 have no mark at their start: a
    damaged one is told from any other text by its calls, which are obeyed before an
    unpickler comes to the damage.
    """
    head = source.read(0, min(source.nbytes, 2))
    marked = len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5
    if not marked and (not head or head[0] not in _OLD_STARTS):
        return None
    data = source.read(0, min(source.nbytes, MAX_PICKLE_BYTES + 1))
    walked, contents = _walk(data)
    if not marked and walked.problem and not walked.calls:
        return None
    if not walked.problem and walked.value == LEGACY_MAGIC:
        file = _describe_legacy(source, data, walked)
    else:
        file = _described("pickle", source, walked, contents)
        if not walked.problem and walked.end < source.nbytes:
            after = source.nbytes - walked.end
            file = replace(file, notes=(*file.notes, f"{after:,} bytes follow the pickle"))
        if walked.problem and _JOBLIB in file.runs:
            file = replace(
                file,
                kind="joblib",
                runs=(*file.runs, "and whatever stands behind its first array"),
                notes=(*file.notes, "only what stands in front of its first array was looked at"),
                problems=(),
            )
    if ends_like_zip(source):
        note = "it ends like a zip archive: programs disagree about what it is"
        file = replace(file, notes=(*file.notes, note))
    return file


def _walk(data: bytes, start: int = 0) -> tuple[Walked, Contents]:
    walked = walk(data[:MAX_PICKLE_BYTES] if len(data) > MAX_PICKLE_BYTES else data, start)
    if walked.problem and len(data) > MAX_PICKLE_BYTES:
        walked.problem = _LIMIT.format(MAX_PICKLE_BYTES)
    return walked, contents_of(walked.value)


def _described(kind: str, source: Source, walked: Walked, contents: Contents) -> ForeignFile:
    problems = [walked.problem] if walked.problem else []
    return ForeignFile(
        kind,
        source.nbytes,
        leaves=tuple(contents.leaves),
        values=tuple(contents.values),
        runs=tuple(runs_of(walked)),
        notes=tuple(contents.notes),
        problems=(*problems, *contents.problems),
    )


def _describe_legacy(source: Source, data: bytes, magic: Walked) -> ForeignFile:
    """Magic number, version, system, the object, the storages' keys: five pickles; then
    each storage: its number of elements, and they."""
    walked, runs, end = magic, dict.fromkeys(runs_of(magic)), magic.end
    contents = Contents()
    problems: list[str] = []
    keys: list[str] = []
    budget = Budget()
    for part in ("its version", "its system", "its object", "its keys"):
        walked = budget.walk(data, end)
        end = walked.end
        runs |= dict.fromkeys(runs_of(walked))
        if walked.problem:
            problems.append(f"{part}: {walked.problem}")
            break
        if part == "its object":
            contents = contents_of(walked.value)
        elif part == "its keys" and isinstance(walked.value, Items):
            keys = [key for key in walked.value.items if isinstance(key, str)]
    if not problems:
        problems += contents.problems
        known = [contents.storages[key].nbytes for key in keys if key in contents.storages]
        if len(known) == len(keys) and end + sum(known) + 8 * len(keys) > source.nbytes:
            problems.append("the bytes of its tensors are cut off")
    return ForeignFile(
        "PyTorch (before 1.6)",
        source.nbytes,
        leaves=tuple(contents.leaves),
        values=tuple(contents.values),
        runs=tuple(runs),
        notes=tuple(contents.notes),
        problems=tuple(problems),
    )


def looks_like_tar(head: bytes) -> bool:
    """Whether a file that starts so is a tar archive: by its checksum, as old ones have no
    other mark."""
    if len(head) < 512:
        return False
    field = head[148:156]
    summed = head[:148] + b" " * 8 + head[156:512]
    # Some writers have summed signed bytes.
    sums = sum(summed), sum(byte - 256 if byte > 127 else byte for byte in summed)
    try:
        return _tar_number(field) in sums
    except ValueError:
        return False


def _tar_number(field: bytes) -> int:
    """As Python's tarfile reads it: octal text, or large numbers in binary. ValueError."""
    if field[0] in (0x80, 0xFF):
        number = int.from_bytes(field[1:], "big")
        return number if field[0] == 0x80 else number - (1 << 8 * (len(field) - 1))
    return int(field.partition(b"\0")[0].decode("ascii").strip() or "0", 8)


def describe_tar(source: Source) -> ForeignFile:
    """A tar archive by the first versions of PyTorch: recognized, its pickles looked through.

    Raises DamagedObject.
    """
    at = 0
    runs: dict[str, None] = {}
    values: list[tuple[str, str]] = []
    problems: list[str] = []
    budget, nbytes_left = Budget(), MAX_PICKLE_BYTES
    while at + 512 <= source.nbytes and len(values) < 100:
        header = source.read(at, 512)
        if not header.strip(b"\0"):
            break
        name = header[:100].rstrip(b"\0").decode("utf-8", "surrogateescape")
        try:
            nbytes = _tar_number(header[124:136])
        except ValueError as error:
            raise DamagedObject(source.name, "its tar archive is malformed") from error
        if at + 512 + nbytes > source.nbytes or nbytes < 0:
            problems.append(f"its entry {name!r} is cut off")
            break
        values.append((name, f"<{nbytes:,} bytes>"))
        # Each of them: what is a pickle depends on names, and names can be told in other ways.
        data = source.read(at + 512, min(nbytes, nbytes_left))
        nbytes_left -= len(data)
        walked = budget.walk(data)
        runs |= dict.fromkeys(runs_of(walked))
        if name == "pickle" and walked.problem:
            problems.append(walked.problem)
        at += 512 + -(-nbytes // 512) * 512
    if not any(name == "pickle" for name, _ in values) and not problems:
        raise DamagedObject(source.name, "it is a tar archive, but none of PyTorch's")
    return ForeignFile(
        _LEGACY_TAR,
        source.nbytes,
        values=tuple(values),
        runs=tuple(runs),
        notes=("its tensors are not listed: load it with the PyTorch of its time",),
        problems=tuple(problems),
    )
