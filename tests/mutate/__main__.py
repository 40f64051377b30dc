"""``python -m tests.mutate``: lists the changes of the program that no test notices."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import named, operators
from .run import Mutant, Verdict, run

ROOT = Path(__file__).parents[2]


def randomly(count: int, seed: int) -> list[Mutant]:
    """*count* random changes of the modules in which an error can lose a guest."""
    files = [path.relative_to(ROOT).as_posix() for place in named.MODULES for path in sorted(ROOT.glob(place))]
    found = operators.sample(ROOT, files, count, seed)
    return [Mutant(change, named.tests_of(change.file)) for change in found]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a change survived, 2 for bad arguments or tests that fail unchanged."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("--named", action="store_true", help="the named changes (without either: both kinds)")
    parser.add_argument("--random", type=int, metavar="N", help="N random changes (default 100)")
    parser.add_argument("--seed", type=int, default=10, help="for the random ones (default %(default)s)")
    parser.add_argument("--only", metavar="TEXT", help="those whose name or place has TEXT in it")
    parser.add_argument("--jobs", type=int, default=1, help="at a time (default %(default)s)")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="of each (default %(default)s)")
    parser.add_argument("--list", action="store_true", help="print them and run nothing")
    parser.add_argument("--json", metavar="FILE", help="write all verdicts there")
    given = parser.parse_args(arguments)
    both = not given.named and given.random is None
    mutants = named.mutants(ROOT) if given.named or both else []
    if given.random is not None or both:
        mutants += randomly(100 if given.random is None else given.random, given.seed)
    if given.only:
        mutants = [mutant for mutant in mutants if given.only in str(mutant)]
    if given.list:
        sys.stdout.writelines(f"{mutant}\n" for mutant in mutants)
        return 0

    def told(verdict: Verdict) -> None:
        sys.stdout.write(f"{verdict.outcome:8} {verdict.seconds:5.0f} s  {verdict.mutant}\n")
        sys.stdout.flush()

    complaints: list[str] = []
    verdicts = run(ROOT, mutants, jobs=given.jobs, limit=given.limit, told=told, broken=complaints.append)
    if given.json:
        Path(given.json).write_text(json.dumps([verdict.as_json() for verdict in verdicts], indent=1) + "\n")
    survivors = [verdict for verdict in verdicts if verdict.outcome == "survived"]
    sys.stdout.write(f"{len(survivors)} of {len(verdicts)} survived\n")
    sys.stdout.writelines(f"  {verdict.mutant}\n" for verdict in survivors)
    sys.stderr.writelines(f"{complaint}\n" for complaint in complaints)
    return 2 if complaints else 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
