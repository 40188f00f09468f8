"""``python -m benchmarks.speed``: rollout, scoring and a whole step against a naive loop, in
ratios.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks.speed.bench import bench_table, run_bench
from unmaskrl.utils.files import write_json


def main() -> None:
    """Time every case, print the table, and write every figure if asked to."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    options.add_argument("--quick", action="store_true", help="smaller shapes, under a minute")
    options.add_argument("--repeats", type=int, default=3, help="timings per case (default 3)")
    options.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options.add_argument("--json", metavar="OUT", help="write every figure")
    args = options.parse_args()
    console = Console()

    def report(text: str) -> None:
        console.print(text, highlight=False)

    result = run_bench(repeats=args.repeats, quick=args.quick, threads=args.threads, report=report)
    console.print(bench_table(result))
    if args.json:
        write_json(Path(args.json), result)


if __name__ == "__main__":
    main()
