"""A training program for each rule of docs/loop.md for which "end it and start it again" says
something. The docstring's first line names the rules; the function's name is the rule's.

Programs say what a user would write, and follow the docs where those say that something else
is not exact. `job.place(kind)` is where the process may end.
"""

from __future__ import annotations

from tests.matrix.job import Program
from tests.matrix.programs import data, loops, saving, tracking

_written: dict[str, Program] = {
    name: program
    for module in (loops, saving, tracking, data)
    for name, program in vars(module).items()
    if name.startswith("rule_")
}
PROGRAMS = {name: _written[name] for name in sorted(_written)}
