"""The keys of a run's objects, and how they are read back from untrusted names."""

from __future__ import annotations

import re
import secrets

RUN_INFO = "holdfast.json"
LOG = "log/"
MANIFESTS = "manifests/"
PACKS = "packs/"
SEGMENTS = "segments/"
FRAGMENTS = "fragments/"
EVENTS = "events/"
MIRRORS = "mirrors/"
RESULTS = "results/"

_ENTRY = re.compile(r"log/(\d{12})\.json")
_MANIFEST = re.compile(r"manifests/([0-9a-f]{64})\.json")
_OWNED = re.compile(
    r"(?:packs|segments|fragments)/((\d{6,})-[0-9a-f]{16}-(?:\d+(?:-\d+)?|outcome))\.\w+"
)
_FRAGMENT = re.compile(r"fragments/(\d{6,})-([0-9a-f]{16})-(\d+)\.json")
_MIRROR = re.compile(r"mirrors/(\d{6,})\.json")
_COMING = re.compile(r"mirrors/(\d{6,})-coming\.json")
_EVENTS = re.compile(r"events/(\d{6,})\.jsonl")
_RESULT = re.compile(r"results/[0-9a-f]{16}/([0-9a-f]{32})-([0-9a-f]{16})\.safetensors")
_NAME = re.compile(r"\d{6,}-[0-9a-f]{16}-\d+(?:-\d+)?")


def new_nonce() -> str:
    """A save's or commit's random name: 64 bits, never reused."""
    return secrets.token_hex(8)


def entry_key(number: int) -> str:
    """Zero-padded, so that the order of names is the order of entries."""
    return f"{LOG}{number:012}.json"


def entry_number(key: str) -> int | None:
    """The number of a log entry's key, or None for any other key."""
    match = _ENTRY.fullmatch(key)
    return int(match[1]) if match else None


def manifest_key(id: str) -> str:
    return f"{MANIFESTS}{id}.json"


def manifest_id(key: str) -> str | None:
    match = _MANIFEST.fullmatch(key)
    return match[1] if match else None


def pack_name(epoch: int, nonce: str, rank: int, index: int) -> str:
    return f"{epoch:06}-{nonce}-{rank}-{index}"


def pack_key(name: str) -> str:
    return f"{PACKS}{name}.safetensors"


def pack_of(key: str) -> str:
    """The name in a pack's key; "" for any other key."""
    name = key.removeprefix(PACKS).removesuffix(".safetensors")
    return name if key == pack_key(name) else ""


def segment_name(epoch: int, nonce: str, index: int) -> str:
    return f"{epoch:06}-{nonce}-{index}"


def segment_key(name: str) -> str:
    return f"{SEGMENTS}{name}.json"


def fragment_key(epoch: int, nonce: str, rank: int) -> str:
    return f"{FRAGMENTS}{epoch:06}-{nonce}-{rank}.json"


def fragment_rank(key: str, epoch: int, nonce: str) -> int | None:
    """Whose fragment of this save a key is; None for any other key."""
    match = _FRAGMENT.fullmatch(key)
    ours = match is not None and int(match[1]) == epoch and match[2] == nonce
    return int(match[3]) if match and ours else None


def outcome_key(epoch: int, nonce: str) -> str:
    """What became of a save of several ranks."""
    return f"{FRAGMENTS}{epoch:06}-{nonce}-outcome.json"


def events_key(epoch: int) -> str:
    """What happened while the writer of this epoch held the run."""
    return f"{EVENTS}{epoch:06}.jsonl"


def events_epoch(key: str) -> int | None:
    """The epoch of an events key, or None for any other key."""
    match = _EVENTS.fullmatch(key)
    return int(match[1]) if match else None


def mirror_key(epoch: int) -> str:
    """Where the writer of this epoch wrote down where its mirror is."""
    return f"{MIRRORS}{epoch:06}.json"


def mirror_epoch(key: str) -> int | None:
    """The epoch of a mirror's key, or None for any other key."""
    match = _MIRROR.fullmatch(key)
    return int(match[1]) if match else None


def coming_key(epoch: int) -> str:
    """What the writer of this epoch was to bring back from the mirror."""
    return f"{MIRRORS}{epoch:06}-coming.json"


def coming_epoch(key: str) -> int | None:
    """The epoch of such a key, or None for any other key."""
    match = _COMING.fullmatch(key)
    return int(match[1]) if match else None


def results_of(function: str) -> str:
    """Where the results of a function are; `function` is the digest of its name."""
    return f"{RESULTS}{function[:16]}/"


def result_key(function: str, arguments: str, code: str) -> str:
    """Of one result, by three digests. They are cut: the object repeats them whole."""
    return f"{results_of(function)}{arguments[:32]}-{code[:16]}.safetensors"


def result_names(key: str) -> tuple[str, str] | None:
    """(arguments, code) in a result's key, both cut; None for any other key."""
    match = _RESULT.fullmatch(key)
    return (match[1], match[2]) if match else None


def is_name(name: str) -> bool:
    """Whether `name` has the form that packs and segments are given."""
    return _NAME.fullmatch(name) is not None


def owner(key: str) -> tuple[str, int] | None:
    """(name, epoch of the writer that made it) of a pack, segment or fragment key."""
    match = _OWNED.fullmatch(key)
    return (match[1], int(match[2])) if match else None
