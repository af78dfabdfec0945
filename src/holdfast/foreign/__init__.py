"""Files of other makes, described without loading them: nothing in them is run.

`describe` looks at a `.safetensors`, `.npy`, `.npz`, pickle or PyTorch file and says what
it holds and which names it would import and call. Pure functions on bytes (`source`),
bounded in memory and time whatever the file says; no framework, no NumPy, and never
`pickle.load`: pickles are walked by a machine that only takes notes (`machine`).
"""

from __future__ import annotations

from holdfast.foreign.described import ForeignFile as ForeignFile
from holdfast.foreign.described import ForeignLeaf as ForeignLeaf
from holdfast.foreign.reading import describe as describe
from holdfast.foreign.source import FileSource as FileSource
