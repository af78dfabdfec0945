"""Checks of saves and restores on a GPU: `python -m tests.gpu`, under three minutes.

pytest does not collect it: machines that run the tests have no GPU. With `--device cpu` the
same checks run without what only a device has, which tells that this program works.
Prints a line for each check, then a table of what saves cost; exit status 1 if one failed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from tests.gpu.checks import CHECKS, Place
from tests.gpu.ranks import ranks
from tests.gpu.speed import table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="a part of the names of checks")
    parser.add_argument("--mib", type=int, default=0, help="size of the state that is timed")
    args = parser.parse_args()
    place = Place(torch.device(args.device))
    print(f"torch {torch.__version__}, {place.name}")
    failed = 0
    for name, check in {**CHECKS, "ranks": ranks}.items():
        if args.only not in name:
            continue
        folder = Path(tempfile.mkdtemp(prefix="holdfast-gpu-"))
        start = time.perf_counter()
        torch.manual_seed(0)
        try:
            said = check(place, folder)
            print(f"ok      {time.perf_counter() - start:6.2f} s  {name}: {said}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {time.perf_counter() - start:6.2f} s  {name}", flush=True)
            traceback.print_exc(file=sys.stdout)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if not args.only:
        mib = args.mib or (4096 if place.is_gpu else 256)
        print(table(place, mib), flush=True)
    print(f"{failed} check(s) failed" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
