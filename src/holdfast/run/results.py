"""`run.once` and `run.map`: what was computed once is there after a restart."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from holdfast.core.calls import Call, Rule, call_of, rule_for, short_name
from holdfast.core.rng import apply_rng, capture_rng
from holdfast.core.units import format_ago, format_seconds
from holdfast.errors import UsageError, briefly
from holdfast.manager import CheckpointManager
from holdfast.manager.results import Found, Results, names_in
from holdfast.run.console import Console
from holdfast.run.mapping import Executor, ResumableMap
from holdfast.run.stopping import Stopping

_WORTH_A_LINE_S = 1.0  # what is computed in less time, nobody misses

_RULE = "_holdfast_rule"
"""Attribute of what `once` returns: how its calls are named."""


class Durable:
    """The results of one run, for its program."""

    def __init__(
        self,
        manager: CheckpointManager,
        console: Console,
        stopping: Stopping,
        *,
        exit_code: int,
        check: Callable[[], None],
    ) -> None:
        """`check` raises where the run cannot be used."""
        self._manager = manager
        self._console = console
        self._stopping = stopping
        self._exit_code = exit_code
        self._check = check
        self._results: Results | None = None
        self._lock = threading.Lock()
        self._told: set[tuple[str, str]] = set()
        """What was said, and of which function."""
        self._names: dict[str, set[tuple[str, str]]] = {}

    def once(
        self,
        function: Callable[..., Any] | None,
        version: str | int | None,
        key: Callable[..., object] | None,
        depends: Iterable[object],
    ) -> Any:
        """See `Run.once`."""
        if function is None:
            return lambda function: self.once(function, version, key, depends)
        rule = rule_for(function, version, key, depends)

        @functools.wraps(function)
        @briefly
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(rule, args, kwargs)

        setattr(call, _RULE, rule)
        return call

    def map(
        self,
        function: Callable[[Any], Any],
        items: Iterable[Any],
        executor: Executor | None,
        version: str | int | None,
        key: Callable[[Any], object] | None,
        depends: Iterable[object],
        max_pending: int | None,
    ) -> Iterator[Any]:
        """See `Run.map`."""
        rule: Rule | None = getattr(function, _RULE, None)
        if rule is None:
            rule = rule_for(function, version, key, depends)
        elif (version, key, tuple(depends)) != (None, None, ()):
            raise UsageError(
                f"{rule.function.__qualname__} says itself when its results are used again",
                hint="Leave version=, key= and depends= to run.once, or give the plain function.",
            )
        if max_pending is None:
            max_pending = max(32, 4 * (os.cpu_count() or 1))
        if max_pending < 1:
            raise UsageError(f"max_pending={max_pending} lets nothing run", hint="At least 1.")
        mapped = ResumableMap(
            self._open(),
            rule,
            items,
            executor=executor,
            here=functools.partial(_without_traces, rule.function),
            max_pending=max_pending,
            console=self._console,
            stopping=self._stopping,
            address=self._manager.address,
            exit_code=self._exit_code,
            check=self._check,
            on_end=self._manager.results_changed,
        )
        return iter(mapped)

    def _open(self) -> Results:
        with self._lock:
            self._check()
            if self._results is None:
                if self._manager.mirror:
                    # What the mirror has is brought back first; and it is the run's writer that
                    # copies to it.
                    self._manager.acquire()
                self._results = Results.of(self._manager, self._console.loud)
            return self._results

    def _call(self, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        results = self._open()
        call = call_of(rule, args, kwargs)
        found = results.find(call)
        if found is not None:
            self._say_found(call, found)
            return found.value
        if self._changed(results, call):
            self._say(call, "changed", changed_line(self._manager.address, call))
        start = time.perf_counter()
        value = _without_traces(rule.function, *args, **kwargs)
        value = results.keep(call, value, time.perf_counter() - start)
        self._manager.results_changed()
        return value

    def _changed(self, results: Results, call: Call) -> bool:
        """Whether other code has stored a result of the same call."""
        with self._lock:
            names = self._names.get(call.function)
        if names is None:
            names = results.names(call.function)
            with self._lock:
                self._names[call.function] = names
        arguments, code = names_in(call)
        return any(at == arguments and by != code for at, by in names)

    def _say_found(self, call: Call, found: Found) -> None:
        if found.took_s >= _WORTH_A_LINE_S:
            age_s = max(0.0, time.time() - found.time_s)
            self._say(call, "found", found_line(self._manager.address, call, found.took_s, age_s))

    def _say(self, call: Call, what: str, line: str) -> None:
        """Once for each function."""
        with self._lock:
            if (call.function, what) in self._told:
                return
            self._told.add((call.function, what))
        self._console.say(line)


class CallsStored:
    """`once` and `map` of a `Run`."""

    _durable: Durable

    def once(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        version: str | int | None = None,
        key: Callable[..., object] | None = None,
        depends: Iterable[object] = (),
    ) -> Any:
        """Store what a function returns, and return that after a restart: `@run.once`, or
        `run.once(prepare)(path)`.

        It is found by the function's name, its arguments, or what `key(*args)` makes of them,
        and its own code with what it `depends` on, or `version`. What is returned is always
        made anew from what is stored. The global random states are put back after the call.

        Raises UnsupportedValue for what cannot be stored, or found by. See docs/results.md.
        """
        return self._durable.once(function, version, key, depends)

    @briefly
    def map(
        self,
        function: Callable[[Any], Any],
        items: Iterable[Any],
        *,
        executor: Executor | None = None,
        version: str | int | None = None,
        key: Callable[[Any], object] | None = None,
        depends: Iterable[object] = (),
        max_pending: int | None = None,
    ) -> Iterator[Any]:
        """`function(item)` of each item, in their order: as `once`, so that after a restart
        only what is missing is computed, from the first `next` on.

        With an `executor` of `concurrent.futures` at most `max_pending` are on their way. An
        item's error is raised when those that run are stored. A signal ends the process.
        """
        return self._durable.map(function, items, executor, version, key, depends, max_pending)


def _without_traces(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function` and put the global random states back: a program that finds the result
    stored goes on with the same random numbers as one that had to compute it."""
    before = capture_rng()
    try:
        return function(*args, **kwargs)
    finally:
        apply_rng(before)


def found_line(address: str, call: Call, took_s: float, age_s: float) -> str:
    """
    >>> found_line("runs/gpt", Call("prep:tokens", "", ""), 720, 7300)
    'runs/gpt: tokens: stored result used (2 h ago, computed in 12 min)'
    """
    ago, took = format_ago(age_s), format_seconds(took_s)
    return f"{address}: {short_name(call.function)}: stored result used ({ago}, computed in {took})"


def changed_line(address: str, call: Call) -> str:
    """
    >>> changed_line("runs/gpt", Call("prep:tokens", "", ""))
    'runs/gpt: tokens: its code has changed since its result was stored: computing it again'
    """
    name = short_name(call.function)
    changed = "its code has changed since its result was stored"
    return f"{address}: {name}: {changed}: computing it again"
