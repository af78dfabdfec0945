"""What a GCS bucket holds and which requests it refuses: the rules, without HTTP."""

from __future__ import annotations

import base64
import hashlib
import itertools
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

PART_MIN_BYTES = 5 << 20
"""Of every part of a multipart upload but the last, as at GCS."""


class Refused(Exception):
    """A request that GCS refuses, with the status and the code that it gives."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Object:
    data: bytes
    generation: int
    modified_s: float
    parts: int = 0
    """Of the multipart upload that made it; 0 for a plain one."""

    @property
    def md5(self) -> bytes | None:
        """GCS knows none for what came in parts."""
        return None if self.parts else hashlib.md5(self.data).digest()

    @property
    def etag(self) -> str:
        """The MD5 of a plain object; for one that came in parts, nothing that can be computed."""
        opaque = base64.b64encode(self.generation.to_bytes(8)).decode()
        return f'"{self.md5.hex() if self.md5 else opaque}"'


@dataclass
class Upload:
    key: str
    parts: dict[int, bytes] = field(default_factory=dict[int, bytes])


@dataclass(frozen=True)
class Page:
    objects: list[tuple[str, Object]]
    prefixes: list[str]
    next: str | None
    """Where the next page begins, None if there is none."""


class Bucket:
    """Every method is atomic. `careless`: conditions are ignored, as some servers do.

    `condition` is the generation that the live object must have, 0 for "none is there".
    """

    def __init__(self, *, careless: bool = False) -> None:
        self._careless = careless
        self._objects: dict[str, Object] = {}
        self._uploads: dict[str, Upload] = {}
        self._lock = threading.Lock()
        self._last_generation = 0
        self._numbers = itertools.count(1)

    # -- objects -----------------------------------------------------------------------

    def put(self, key: str, data: bytes, condition: int | None = None) -> Object:
        with self._lock:
            self._check(key, condition)
            return self._store(key, data)

    def get(self, key: str, condition: int | None = None) -> Object:
        with self._lock:
            self._check(key, condition)
            return self._live(key)

    def copy(self, source: str, key: str, condition: int | None = None) -> Object:
        with self._lock:
            found = self._live(source)
            self._check(key, condition)
            return self._store(key, found.data)

    def delete(self, key: str, condition: int | None = None) -> None:
        with self._lock:
            self._live(key)
            self._check(key, condition)
            del self._objects[key]

    def page(self, *, prefix: str, delimiter: str, after: str, at_most: int) -> Page:
        """The names above `after`, in the order of their UTF-8 bytes."""
        objects: list[tuple[str, Object]] = []
        prefixes: list[str] = []
        last = ""
        with self._lock:
            for key in sorted(self._objects, key=str.encode):
                if not key.startswith(prefix) or key.encode() <= after.encode():
                    continue
                head, found, _ = key[len(prefix) :].partition(delimiter or "\0")
                folder = prefix + head + delimiter if found else None
                if folder is not None and (folder in prefixes or after.startswith(folder)):
                    last = key if folder in prefixes else last
                    continue
                if len(objects) + len(prefixes) == at_most:
                    return Page(objects, prefixes, last)
                last = key
                if folder is None:
                    objects.append((key, self._objects[key]))
                else:
                    prefixes.append(folder)
        return Page(objects, prefixes, None)

    # -- uploads in parts: no conditions, GCS has none for them ----------------------------

    def begin(self, key: str) -> str:
        with self._lock:
            name = f"upload{next(self._numbers)}"
            self._uploads[name] = Upload(key)
            return name

    def add_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        """The part's ETag."""
        if not 1 <= number <= 10_000:
            raise Refused(400, "InvalidArgument", "Part number must be between 1 and 10000.")
        with self._lock:
            self._upload(key, upload).parts[number] = data
        return part_etag(data)

    def complete(self, key: str, upload: str, named: Iterable[tuple[int, str]]) -> Object:
        """Join the parts that are named, by number and ETag."""
        with self._lock:
            parts = self._upload(key, upload).parts
            chosen = list(named)
            numbers = [number for number, _ in chosen]
            if not chosen or numbers != sorted(set(numbers)):
                raise Refused(400, "InvalidPartOrder", "The list of parts was not in order.")
            for number, etag in chosen:
                if number not in parts or part_etag(parts[number]).strip('"') != etag.strip('"'):
                    raise Refused(400, "InvalidPart", f"Part {number} could not be found.")
            if any(len(parts[number]) < PART_MIN_BYTES for number in numbers[:-1]):
                raise Refused(400, "EntityTooSmall", "A part is smaller than 5 MiB.")
            del self._uploads[upload]
            data = b"".join(parts[number] for number in numbers)
            return self._store(key, data, len(numbers))

    def abort(self, key: str, upload: str) -> None:
        with self._lock:
            self._upload(key, upload)
            del self._uploads[upload]

    def uploads(self) -> list[tuple[str, str]]:
        """Key and name of each that is neither completed nor aborted."""
        with self._lock:
            return [(upload.key, name) for name, upload in self._uploads.items()]

    # -- below the lock ------------------------------------------------------------------

    def _check(self, key: str, condition: int | None) -> None:
        found = self._objects.get(key)
        generation = found.generation if found else 0
        if condition not in (None, generation) and not self._careless:
            raise Refused(
                412,
                "PreconditionFailed",
                "At least one of the pre-conditions you specified did not hold.",
            )

    def _live(self, key: str) -> Object:
        if key not in self._objects:
            raise Refused(404, "NoSuchKey", "The specified key does not exist.")
        return self._objects[key]

    def _upload(self, key: str, name: str) -> Upload:
        upload = self._uploads.get(name)
        if upload is None or upload.key != key:
            raise Refused(404, "NoSuchUpload", "The requested upload was not found.")
        return upload

    def _store(self, key: str, data: bytes, parts: int = 0) -> Object:
        now_s = time.time()
        self._last_generation = max(self._last_generation + 1, int(now_s * 1e6))
        made = Object(data, self._last_generation, now_s, parts)
        self._objects[key] = made
        return made


def part_etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
