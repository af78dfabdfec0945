"""Random numbers of each library: the global stream, and generator objects.

Data pipelines draw from both. This module puts one face on them, so that code which
runs in turns with the training loop can be given a stream of its own
(`PrivateStreams`) and generators held by samplers and datasets can be found, recorded
and set back.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from holdfast.core.frameworks import loaded_adapters
from holdfast.core.rng import numpy_state, numpy_state_from, python_state, python_state_from

DIGEST_BYTES = 16


class Library(Protocol):
    """One library that makes random numbers."""

    name: str

    def get(self) -> Any:
        """The state of the global stream, opaque."""
        ...

    def set(self, state: Any) -> None:
        """Put a state from `get` back."""
        ...

    def seed(self, digest: bytes) -> None:
        """Seed the global stream from 16 bytes."""
        ...

    def fingerprint(self, state: Any) -> bytes:
        """Bytes that differ where states from `get` differ."""
        ...

    def owns(self, value: object) -> bool:
        """Whether `value` is a generator object of this library."""
        ...

    def is_global(self, generator: Any) -> bool:
        """Whether it is the object behind a global stream, which is always saved."""
        ...

    def read(self, generator: Any) -> dict[str, Any]:
        """The generator's state as a plain tree."""
        ...

    def write(self, generator: Any, state: dict[str, Any]) -> None:
        """Set a state from `read`. Raises if it is another kind's."""
        ...

    def reseed(self, generator: Any, digest: bytes) -> None:
        """Seed a generator object from 16 bytes, in place."""
        ...

    def seeded(self, generator: Any) -> bool:
        """Whether the program certainly chose this generator's seed. False: it may also
        have come from the operating system."""
        ...

    def array(self, value: object) -> np.ndarray[Any, Any] | None:
        """`value` as an array if it is this library's array type, without copying."""
        ...


class PythonRandom:
    """The `random` module."""

    name = "python"

    def get(self) -> Any:
        return random.getstate()

    def set(self, state: Any) -> None:
        random.setstate(state)

    def seed(self, digest: bytes) -> None:
        random.seed(int.from_bytes(digest, "little"))

    def fingerprint(self, state: Any) -> bytes:
        return repr(state).encode()

    def owns(self, value: object) -> bool:
        return isinstance(value, random.Random) and not isinstance(value, random.SystemRandom)

    def is_global(self, generator: random.Random) -> bool:
        return generator is getattr(random.random, "__self__", None)

    def read(self, generator: random.Random) -> dict[str, Any]:
        return python_state(generator.getstate())

    def write(self, generator: random.Random, state: dict[str, Any]) -> None:
        generator.setstate(python_state_from(state))

    def reseed(self, generator: random.Random, digest: bytes) -> None:
        generator.seed(int.from_bytes(digest, "little"))

    def seeded(self, generator: random.Random) -> bool:
        return False

    def array(self, value: object) -> None:
        return None


class NumpyRandom:
    """numpy's global RandomState, RandomState objects and Generators."""

    name = "numpy"

    def get(self) -> Any:
        return np.random.get_state(legacy=False)

    def set(self, state: Any) -> None:
        np.random.set_state(state)

    def seed(self, digest: bytes) -> None:
        np.random.seed(np.frombuffer(digest, np.uint32))

    def fingerprint(self, state: Any) -> bytes:
        return repr(_flat(state)).encode()

    def owns(self, value: object) -> bool:
        return isinstance(value, np.random.Generator | np.random.RandomState)

    def is_global(self, generator: Any) -> bool:
        if isinstance(generator, np.random.RandomState):
            return generator is getattr(np.random.random, "__self__", None)
        shared: Any = np.random  # its type stubs lack the function
        return generator.bit_generator is shared.get_bit_generator()

    def read(self, generator: Any) -> dict[str, Any]:
        if isinstance(generator, np.random.RandomState):
            return numpy_state(generator.get_state(legacy=False))
        return numpy_state(generator.bit_generator.state)

    def write(self, generator: Any, state: dict[str, Any]) -> None:
        if isinstance(generator, np.random.RandomState):
            generator.set_state(numpy_state_from(state))
        else:
            generator.bit_generator.state = numpy_state_from(state)

    def reseed(self, generator: Any, digest: bytes) -> None:
        words = np.frombuffer(digest, np.uint32)
        if isinstance(generator, np.random.RandomState):
            generator.seed(words)
        else:
            bits = generator.bit_generator
            bits.state = type(bits)(np.random.SeedSequence([int(word) for word in words])).state

    def seeded(self, generator: Any) -> bool:
        if isinstance(generator, np.random.RandomState):
            return False
        sequence = getattr(generator.bit_generator, "seed_seq", None)
        entropy = getattr(sequence, "entropy", None)
        # What NumPy takes from the system has 128 bits.
        return entropy is not None and not (isinstance(entropy, int) and entropy >= 1 << 64)

    def array(self, value: object) -> np.ndarray[Any, Any] | None:
        return value if isinstance(value, np.ndarray) else None


PYTHON = PythonRandom()
NUMPY = NumpyRandom()


def libraries() -> tuple[Library, ...]:
    """Python, numpy, and each framework in memory (`random_library` in its data module)."""
    found: list[Library] = [PYTHON, NUMPY]
    for adapter in loaded_adapters():
        library = getattr(data_module(adapter.name), "random_library", None)
        if library is not None:
            found.append(library)
    return tuple(found)


def owner_of(value: object, known: Iterable[Library]) -> Library | None:
    """The library whose generator object `value` is."""
    return next((library for library in known if library.owns(value)), None)


def data_module(framework: str) -> Any:
    """`holdfast.<framework>.data`, which knows its loaders and generators; None without."""
    name = f"holdfast.{framework}.data"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None  # this framework has no data loaders


class PrivateStreams:
    """Global random streams for code that runs in turns with the training loop.

    Code that yields items (a generator, a lazy sampler) draws whenever it is asked for
    one, between the draws of the training step. Replayed without the training step it
    would see other numbers. So each turn runs in a `with` block of one object: the first
    turn draws from the global streams, as it would without us, and every later turn
    from streams derived from them, which training neither sees nor moves. A replay from
    the same start gives the same numbers.
    """

    def __init__(self) -> None:
        self._libraries = libraries()
        self._private: list[Any] | None = None
        self._outer: list[Any] = []

    def __enter__(self) -> None:
        if self._private is not None:
            self._outer = [library.get() for library in self._libraries]
            self._put(self._private)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._private is None:
            self._private = self._derived()
        else:
            self._private = [library.get() for library in self._libraries]
            self._put(self._outer)

    def _derived(self) -> list[Any]:
        # Not a copy of the global state: training would draw the very same numbers,
        # and noise in the data would be correlated with dropout.
        derived: list[Any] = []
        for library in self._libraries:
            outer = library.get()
            library.seed(digest(library.name.encode(), library.fingerprint(outer)))
            derived.append(library.get())
            library.set(outer)
        return derived

    def _put(self, states: Iterable[Any]) -> None:
        for library, state in zip(self._libraries, states, strict=True):
            library.set(state)


def digest(*parts: bytes) -> bytes:
    """16 bytes that depend on every part. Part of what "exact" means: never change it."""
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()


def _flat(state: Any) -> Any:
    if isinstance(state, dict):
        return [(key, _flat(value)) for key, value in state.items()]
    return state.tobytes() if isinstance(state, np.ndarray) else state
