"""The command line: runs cases, prints their tables, writes docs/benchmarks."""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from bench import machine, outcome, plots, report
from bench.apart import apart
from bench.cases import CASES
from bench.cases.buckets import s3fs_is_installed
from bench.cases.common import Options
from bench.cases.flows import other_is_installed
from bench.others import orbax_is_installed

ROOT = Path(__file__).resolve().parent.parent
_PAGE = Path("docs/benchmarks.md")
_FIGURES = Path("docs/benchmarks/figures.json")
_QUICK = Options(Path(), mib=3, large_mib=6, tensors=50, rounds=1, quick=True)


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    folder = Path(given.folder or tempfile.gettempdir()).resolve()
    names = given.case or list(CASES)
    usual = _QUICK if given.quick else Options(folder)
    options = Options(
        folder=folder,
        mib=given.mib or usual.mib,
        large_mib=given.large_mib or usual.large_mib,
        tensors=given.tensors or usual.tensors,
        rounds=given.rounds or usual.rounds,
        quick=given.quick,
    )
    for name, installed in (
        ("Orbax", orbax_is_installed()),
        ("s3fs", s3fs_is_installed()),
        ("metaflow-checkpoint", other_is_installed()),
    ):
        if not installed:
            print(f"{name} is not installed and takes no part: pip install 'holdfast[bench]'")
    if given.write_docs and not plots.can_plot():
        print("Matplotlib is not installed, no plots: pip install 'holdfast[bench]'")
    known = outcome.load(given.root / _FIGURES)
    failed = False
    for name in names:
        case = CASES[name]
        print(f"{name}: {case.about}", flush=True)
        start = time.perf_counter()
        try:
            found = apart(case.run, options) if case.apart else case.run(options)
        except Exception:  # noqa: BLE001 - the others are still to be measured
            traceback.print_exc()
            failed = True
            continue
        found.taken_s = time.perf_counter() - start
        found.command = _command(name, given)
        found.date = datetime.datetime.now(datetime.UTC).date().isoformat()
        found.machine = machine.describe(folder)
        known[name] = found
        print("\n" + report.section(found, None), flush=True)
        if given.write_docs:
            _write(given.root, known)
    return 1 if failed else 0


def _write(root: Path, known: dict[str, outcome.Outcome]) -> None:
    """Write what is known so far; cases that were not run keep their figures."""
    ordered = {name: known[name] for name in CASES if name in known}
    outcome.store(root / _FIGURES, ordered)
    pictures: dict[str, str] = {}
    if plots.can_plot():
        for name, found in ordered.items():
            CASES[name].draw(found, root / _FIGURES.parent / f"{name}.svg")
            pictures[name] = f"{_FIGURES.parent.name}/{name}.svg"
    report.write_page(root / _PAGE, ordered.values(), pictures)


def _command(name: str, given: argparse.Namespace) -> str:
    """What runs one case again, at the same size."""
    words = ["python -m bench --case", name, *(["--quick"] if given.quick else [])]
    for option in ("mib", "large_mib", "tensors", "rounds"):
        if (value := getattr(given, option)) is not None:
            words += [f"--{option.replace('_', '-')}", str(value)]
    return " ".join(words)


def _parser() -> argparse.ArgumentParser:
    minutes = sum(case.minutes for case in CASES.values())
    lines = [f"  {n:8} {c.minutes:3.0f} min  {c.about}" for n, c in CASES.items()]
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Saves and restores with Holdfast and others, side by side. "
        "Use a machine on which nothing else runs.",
        epilog="\n".join([f"cases, with the time that they take ({minutes:.0f} min):", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", action="append", choices=CASES, help="only this; repeatable")
    parser.add_argument("--mib", type=int, help="size of a state (default 1024)")
    parser.add_argument("--large-mib", type=int, help="size of the large state (default 10 GB)")
    parser.add_argument("--tensors", type=int, help="number of small tensors (default 20,000)")
    parser.add_argument("--rounds", type=int, help="rounds after the warm-up (default 5)")
    parser.add_argument("--folder", help="on the disk that is measured (default: temporary)")
    parser.add_argument("--quick", action="store_true", help="tiny states, one round: a test")
    parser.add_argument("--write-docs", action="store_true", help=f"update {_PAGE} and its plots")
    parser.add_argument("--root", type=Path, default=ROOT, help="where docs/ is")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
