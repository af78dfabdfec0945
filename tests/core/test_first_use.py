"""Threads that are the first to decode a type, all at once."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, threading
import msgspec
from holdfast.core import records

sys.setswitchinterval(1e-6)
kinds = [
    kind
    for kind in vars(records).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
]
together = threading.Barrier(4)

def decode():
    for kind in kinds:
        data = msgspec.json.encode({name: 1 for name in kind.__struct_encode_fields__})
        together.wait()
        try:
            msgspec.json.decode(data, type=kind)
        except msgspec.ValidationError:
            pass

threads = [threading.Thread(target=decode) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(kinds))
"""


def test_the_first_use_of_a_type_by_several_threads() -> None:
    """Where msgspec had not seen the types before, about one of six processes died of it."""
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert int(done.stdout) >= 18
