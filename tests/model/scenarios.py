"""Bounded configurations."""
from .entries import *
from .programs import *
from .world import Scenario, Thread
C0 = Record("c0", ("p0",))
C1 = Record("c1", ("p1",))
FIRST = Entry(1, "first", None, (), 1, "A", "A", "open", (C0,))
SECOND = Entry(2, "second", (1, "first"), (), 1, "A", "A", "save", (C0, C1))
LOG = (FIRST, SECOND)
PACKS = ("p0", "p1")
CHILD_LOG = (Entry(1, "child", None, (), 0, "", "", "open", ()),)
