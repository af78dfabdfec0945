"""The tree codec's public names."""

from holdfast.core.arrays import MemoryDestination as MemoryDestination
from holdfast.core.classes import Record as Record
from holdfast.core.decode import Fetch as Fetch
from holdfast.core.decode import TreeDecoder as TreeDecoder
from holdfast.core.encode import Captured as Captured
from holdfast.core.encode import CapturedLeaf as CapturedLeaf
from holdfast.core.encode import TreeEncoder as TreeEncoder
from holdfast.core.encode import capture as capture
from holdfast.core.files import Directory as Directory
from holdfast.core.files import File as File
from holdfast.core.leaves import Later as Later
from holdfast.core.leaves import settle as settle
from holdfast.core.report import Mismatch as Mismatch
from holdfast.core.stored import StoredDirectory as StoredDirectory
from holdfast.core.stored import StoredFile as StoredFile
