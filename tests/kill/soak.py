"""`make soak`: a thousand SIGKILLs and more, over all scripts, at random points.

    python -m tests.kill.soak --kills 1000

Every run that was killed must end with the bits and losses of the one that was not, and
after every kill all checkpoints that are listed must be whole. Prints a table; exits 1
at the first difference and keeps that folder.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.kill.driver import OVERLAP, PLACES, SAVING, Script, differing, kill_at_each, reference

SCRIPTS = [
    ("generic", ()),
    ("generic", ()),
    ("torch_train", ("0",)),
    ("generic", ()),
    ("torch_train", ("2",)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="holdfast-soak-"))
    print(f"seed {options.seed}, folder {folder}", flush=True)
    chance = random.Random(options.seed)
    whole = {
        (name, args): reference(name, folder / "-".join(["whole", name, *args]), *args)
        for name, args in dict.fromkeys(SCRIPTS)
    }
    kills: Counter[str] = Counter()
    runs = starts = 0
    began = time.monotonic()
    while kills.total() < options.kills:
        name, args = SCRIPTS[runs % len(SCRIPTS)]
        wanted, counts = whole[name, args]
        script = Script(name, folder / f"run{runs}", args)
        for _ in range(2):
            points = tuple(p for p in (*SAVING, *OVERLAP, *PLACES) if counts[p] or p == "restore")
            kill_at_each(script, points, counts, chance.randrange(1 << 30))
            script.run(kill_after_s=chance.uniform(0.1, 2.0))
        differences = differing(script.finish(), wanted)
        runs, starts, kills = runs + 1, starts + script.starts, kills + script.kills
        if differences:
            print(f"DIFFERENT in {script.folder}: {differences}, {dict(script.kills)}")
            sys.exit(1)
        shutil.rmtree(script.folder)
        print(f"{kills.total():5} kills, {runs} runs equal", flush=True)
    shutil.rmtree(folder)
    minutes = (time.monotonic() - began) / 60
    print(f"\n{kills.total()} SIGKILLs over {runs} runs ({starts} processes) in {minutes:.0f} min:")
    for point, count in sorted(kills.items()):
        print(f"  {point:<12} {count:>5}")
    print("every run ended bit-equal to the uninterrupted one; no checkpoint was unreadable")


if __name__ == "__main__":
    main()
