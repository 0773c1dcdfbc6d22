"""A campaign of faults: how often is what goes wrong told in one sentence, or mended, and how often not?

    python tools/faults.py --out runs/faults --minutes 60
    python tools/faults.py --out runs/faults --minutes 60 --page docs/results/faults.md

With `--tally FILE`, the counts of other seeds, days and machines stand in the table of the page as well.

Case number n of a kind is drawn from (seed, kind, n) alone, and its outcome is a line of `cases.jsonl`: a
campaign that was stopped goes on with the same command, and `--replay KIND:N` does one case again. Each kind
is one function of a module `faults_in_*`. Outcomes:

right        nothing changed, the fault was named in one sentence, or the run ended to the bit
unexplained  a traceback, a hang, or a sentence that names nothing
silent       something else was computed, and nothing was said
"""

import argparse
import collections
import datetime
import json
import pathlib
import platform
import random
import shutil
import sys
import tempfile
import time
import traceback
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))  # the kinds, also where this is imported
import fault_world
import faults_in_commands  # noqa: F401 (registers its kinds)
import faults_in_foreign  # noqa: F401 (the same)
import faults_in_inputs  # noqa: F401
import faults_in_runs  # noqa: F401

OUTCOMES = ("right", "unexplained", "silent")


class Campaign:
    """Cases of all kinds in turn, each kind getting the same time.

    Args:
      out: folder of the outcomes and of the runs that are damaged.
      seed: of all cases.
      kinds: names of the kinds; empty for all.
    """

    def __init__(self, out: pathlib.Path, seed: int, kinds: list[str]) -> None:
        self.path, self.seed = out / "cases.jsonl", seed
        out.mkdir(parents=True, exist_ok=True)
        self.world = fault_world.World(out.resolve() / "world")
        self.kinds = {name: fault_world.KINDS[name] for name in kinds or fault_world.KINDS}
        self.found = _read(self.path)
        self.cases = collections.Counter(case["kind"] for case in self.found)

    def run(self, seconds: float, cases: int = 0) -> None:
        """Does cases until the time is over, or until each kind has so many."""
        end = time.monotonic() + seconds
        spent = dict.fromkeys(self.kinds, 0.0)
        while time.monotonic() < end:
            due = [name for name in self.kinds if not cases or self.cases[name] < cases]
            if not due:
                return
            name = min(due, key=lambda kind: spent[kind])
            began = time.monotonic()
            self.case(name, self.cases[name])
            spent[name] += time.monotonic() - began

    def case(self, kind: str, number: int) -> dict[str, Any]:
        """Does one case, and notes what came of it."""
        rng = random.Random(f"{self.seed} {kind} {number}")
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=f"{kind}_", dir=self.world.root))
        try:
            what, outcome, said, *faults = self.kinds[kind](self.world, rng, scratch)
        except Exception:  # of the campaign itself or of what it tries: it is a finding either way
            what, outcome, said, *faults = "", "unexplained", traceback.format_exc()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        case = {"kind": kind, "number": number, "what": what, "outcome": outcome, "said": said[-2000:]}
        case["faults"] = faults[0] if faults else 1
        self.found.append(case)
        self.cases[kind] += 1
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(case) + "\n")
        return case

    def table(self) -> list[tuple[str, int, int, int, int]]:
        """(kind, tried, right, unexplained, silent) of each kind, in faults."""
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        for case in self.found:
            counts[case["kind"], case["outcome"]] += case.get("faults", 1)
        rows = []
        for name in self.kinds:
            right, unexplained, silent = (counts[name, outcome] for outcome in OUTCOMES)
            rows.append((name, right + unexplained + silent, right, unexplained, silent))
        return rows


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    *whole, torn = path.read_text(encoding="utf-8").split("\n")
    if torn:  # of a campaign that was killed
        path.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    return [json.loads(line) for line in whole]


def markdown(rows: list[tuple[str, int, int, int, int]]) -> str:
    """The table."""
    of_all = ("all", *map(sum, zip(*(numbers for _, *numbers in rows), strict=True)))
    lines = ["| kind | tried | right | unexplained | silent |", "|---|---|---|---|---|"]
    titles = {
        name: (kind.__doc__ or name).split("\n")[0].rstrip(".") for name, kind in fault_world.KINDS.items()
    }
    for name, *numbers in [*rows, of_all]:
        lines.append(f"| {titles.get(name, name)} | " + " | ".join(f"{n:,}" for n in numbers) + " |")
    return "\n".join(lines)


def counted(path: pathlib.Path | None, campaign: Campaign) -> dict[str, dict[str, Any]]:
    """The counts of all seeds, this campaign's among them; in the file, where there is one."""
    seeds = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
    counts = {name: numbers for name, _, *numbers in campaign.table()}
    seeds[str(campaign.seed)] = {"date": datetime.date.today().isoformat(), "counts": counts}
    seeds = dict(sorted(seeds.items(), key=lambda item: int(item[0])))
    if path is not None:
        whole = path.with_name(path.name + ".new")
        whole.write_text(json.dumps(seeds, indent=1) + "\n", encoding="utf-8")
        whole.replace(path)
    return seeds


def total(seeds: dict[str, dict[str, Any]]) -> list[tuple[str, int, int, int, int]]:
    """(kind, tried, right, unexplained, silent) of each kind over all seeds."""
    rows = []
    for name in fault_world.KINDS:
        each = [of["counts"][name] for of in seeds.values() if name in of["counts"]]
        if any(map(sum, each)):
            right, unexplained, silent = map(sum, zip(*each, strict=True))
            rows.append((name, right + unexplained + silent, right, unexplained, silent))
    return rows


def page(campaign: Campaign, seeds: dict[str, dict[str, Any]]) -> str:
    """The page of results."""
    dates = sorted({of["date"] for of in seeds.values()})
    failed = [case for case in campaign.found if case["outcome"] != "right"]
    lines = [
        "# Faults",
        "",
        "What happens when a process is killed, a file is damaged, a disk is full, or an input is not what",
        "it should be. The campaign draws its cases at random and counts; its generators are not examples",
        "of the tests.",
        "",
        "    python tools/faults.py --out runs/faults --seed SEED --page docs/results/faults.md "
        "--tally docs/results/faults.json",
        "",
        f"{' to '.join(dates[:: max(len(dates) - 1, 1)])}, seeds {', '.join(seeds)}, {platform.machine()}, "
        "CPU; `--kinds` and `--cases`",
        "say which faults and how many. Right: nothing changed, the fault was named in one sentence, or the",
        "run that was stopped ended to the bit. Unexplained: a traceback or a hang. Silent: something else",
        "was computed and nothing said.",
        "",
        markdown(total(seeds)),
        "",
    ]
    if failed:
        lines += ["What was not right, by kind (the same case again: `--replay KIND:NUMBER`):", ""]
    for kind in dict.fromkeys(case["kind"] for case in failed):
        several = [case for case in failed if case["kind"] == kind]
        for case in several[:5]:
            last = case["said"].strip().splitlines()[-1:] or [""]
            said = last[0][:120].replace("`", "'")
            lines.append(f"- `{kind}:{case['number']}` {case['outcome']}: {case['what'][:120]}: `{said}`")
        if len(several) > 5:
            lines.append(f"- `{kind}`: {len(several) - 5} more")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="A campaign of faults.")
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="folder of outcomes; it is gone on with"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="of this session")
    parser.add_argument("--cases", type=int, default=0, help="of each kind at most; 0 for any number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=[], choices=list(fault_world.KINDS))
    parser.add_argument("--page", type=pathlib.Path, help="where the page of results is written")
    parser.add_argument(
        "--tally", type=pathlib.Path, help="a file of the counts of all seeds, which is added to"
    )
    parser.add_argument("--replay", default="", help="KIND:NUMBER of one case to do again")
    options = parser.parse_args()
    campaign = Campaign(options.out, options.seed, options.kinds)
    if options.replay:
        kind, _, number = options.replay.partition(":")
        print(json.dumps(campaign.case(kind, int(number)), indent=1))
        return
    campaign.run(60 * options.minutes, options.cases)
    print(markdown(campaign.table()))
    seeds = counted(options.tally, campaign)
    if options.page:
        options.page.write_text(page(campaign, seeds), encoding="utf-8")
    sys.exit(any(case["outcome"] != "right" for case in campaign.found))


if __name__ == "__main__":
    main()
