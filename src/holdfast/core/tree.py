"""The tree codec: a state as JSON nodes and leaves, and back.

    captured = capture({"model": {"w": array}, "step": 3})       # nodes, leaves to copy
    decoder = TreeDecoder(manifest.leaves)
    values = decoder.apply(manifest.tree, into)                  # checks; changes nothing
    decoder.report()                                             # or StructureMismatch
    ...                                                          # fill decoder.requests
    decoder.run()                                                # now live objects change

**Nodes.** `null`, `true`, `false` and strings are themselves. A number with "." or "e"
is a float, any other an int of at most 53 bits. An array is a list. An object has a tag
under "!"; `docs/format.md` lists the fields of each:

    int float complex str bytes bytearray path range slice ellipsis
    date datetime time timedelta timezone zone
    dict odict defaultdict counter tuple set frozenset deque numbers
    enum namedtuple dataclass object pickle
    array scalar npstr npbytes objects
    random generator bitgenerator randomstate seedsequence
    file dir link                                   (link only in dir)
    ref
    <framework>.<...>                               (by that framework's adapter)

"v" is a value's content: an array of nodes; for dict-like tags and dataclasses an array
of [key node, value node]; for objects and adapters' nodes one node. Whatever has "v" as
its state can be looked into, selected and renamed without knowing its tag. Bytes are
"b64", or "leaf": the index of a leaf. Texts and bytes above 4 KiB and lists of more than
4096 equal-typed numbers ("numbers": an `I64` or `F64` leaf) are leaves, except in keys and
in items of sets, which must be there before the leaves are.

**Aliasing.** A mutable container, array, object or nested tuple that occurs again is
`{"!": "ref", "v": n}` there. The first one is marked: "id": n in an object; in a list a
first item `{"!": "id", "v": n}`, which is no item of the list. Arrays that are not one
object but share memory name one leaf (see `sharing`).

**Classes** (enum, dataclass, namedtuple) are names: `package.module:Class`. They are looked
up among loaded modules, checked to be of that kind, and made without their code; else the
value is a `Record`. An object with state_dict/load_state_dict is its state; it comes back
in the live object that the caller gives, or as that state.

**Depth**: at most 128 containers in each other.
"""

from holdfast.core.arrays import MemoryDestination as MemoryDestination
from holdfast.core.captured import Captured as Captured
from holdfast.core.captured import capture as capture
from holdfast.core.classes import Record as Record
from holdfast.core.decode import Fetch as Fetch
from holdfast.core.decode import TreeDecoder as TreeDecoder
from holdfast.core.encode import CapturedLeaf as CapturedLeaf
from holdfast.core.encode import TreeEncoder as TreeEncoder
from holdfast.core.files import Directory as Directory
from holdfast.core.files import File as File
from holdfast.core.leaves import Later as Later
from holdfast.core.leaves import settle as settle
from holdfast.core.report import Mismatch as Mismatch
from holdfast.core.stored import StoredDirectory as StoredDirectory
from holdfast.core.stored import StoredFile as StoredFile
