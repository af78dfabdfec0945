"""Becomes the command: `python -I -S shim.py PARENT COMMAND...`.

Between fork and exec, where no thread of the supervisor's is in the way, it asks the kernel
for a SIGTERM when the supervisor dies. So a command whose supervisor was killed with SIGKILL
saves and ends, instead of going on with nobody to watch it beside the one that comes after.
"""

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        try:
            import ctypes

            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        except (ImportError, OSError, AttributeError):
            pass  # a Python without ctypes
        if os.getppid() != parent:  # it was killed before we asked
            os._exit(128 + signal.SIGTERM)
    # Python ignores these two at its start, and exec would hand that on.
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"holdfast run: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        # As shells have it.
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


main()
