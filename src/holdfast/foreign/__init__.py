"""Files of other makes: described, compared, checked and imported; nothing in them is run.

`describe` looks at one file and says what it holds and which names it would import and call.
`open_foreign` opens a file or a folder: tensors can be read then, in pieces. Bounded in
memory and time whatever the file says; no framework, and never `pickle.load`: pickles are
walked by a machine that only takes notes (`machine`). NumPy is imported where tensors are
read, and h5py for HDF5 files.
"""

from __future__ import annotations

from holdfast.foreign.described import ForeignFile as ForeignFile
from holdfast.foreign.described import ForeignLeaf as ForeignLeaf
from holdfast.foreign.opened import Foreign as Foreign
from holdfast.foreign.opening import is_foreign as is_foreign
from holdfast.foreign.opening import open_foreign as open_foreign
from holdfast.foreign.reading import describe as describe
from holdfast.foreign.source import FileSource as FileSource
