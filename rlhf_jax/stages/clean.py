"""Cleaning of rows to learn from: what is broken, foreign, repeated or given away by a benchmark is left out.

    rlhf clean --out runs/clean --data my.jsonl --benchmarks gsm8k/test.jsonl
    rlhf clean --out runs/clean --data a.jsonl b.parquet --language en --jaccard-threshold 0.9
    rlhf clean --out runs/clean --solutions gsm8k/model_solutions.jsonl \\
        --duplicates-by answer

Rows are pairs, conversations or prompts, as the training scripts take them. The folder gets `rows.jsonl`
(rows as they were, each with the `source` it came from), `dropped.jsonl` (the others, with where they stood,
the reason and what was seen), `report.json`, and `report.html` to read. GSM8K's 7,473 rows against 800
questions take about 5 s of one core.
"""

import dataclasses
import html
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Count, PositiveInt, Seed, Share, ShareBelow1
from rlhf_jax.data.cleaning import rules as cleaning
from rlhf_jax.data.cleaning.rules import Dropped, Limits, Outcome, RowText
from rlhf_jax.data.pairs import solution_rows
from rlhf_jax.data.sources import Row, read_rows
from rlhf_jax.metrics import Progress, final_table
from rlhf_jax.stages import option_checks
from rlhf_jax.training.run_folder import describe_run

Rule = Callable[[Sequence[RowText], Callable[[int], None]], Outcome]

_SHOWN = 400  # characters of an example in the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Cleaning options: the data, and the thresholds.

    Attributes:
      out: folder of the cleaned rows.
      data: files of rows, or tfds:NAME[:SPLIT].
      solutions: files whose rows hold a `question` and objects of `solution` and `is_correct`; each solution
        becomes a row.
      benchmarks: files of questions that must not be learnt.
      limits: what a row must be like by itself.
      jaccard_threshold: rows whose Jaccard similarity (of word n-grams) to an earlier one reaches this are
        dropped; 0 to drop exact repetitions alone.
      ngram_size: words in such an n-gram.
      duplicates_by: which part of two rows is compared.
      decontamination_ngram: words in a run that a row shares with a benchmark's question.
      overlap_share: rows whose shared runs cover more of a question than this are dropped; 0 for any run.
      overlap_rows: runs that more rows than this have are phrases and count for nothing; 0 for no limit.
      examples: of each reason in the report.
      seed: of the hash functions that find candidates.
      quiet: show no progress.
    """

    out: Path
    data: tuple[str, ...] = ()
    solutions: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()
    limits: tyro.conf.OmitArgPrefixes[Limits] = Limits()
    jaccard_threshold: Share = 0.8
    ngram_size: PositiveInt = 3
    duplicates_by: cleaning.Part = "all"
    decontamination_ngram: PositiveInt = 8
    overlap_share: ShareBelow1 = 0.5
    overlap_rows: Count = 0
    examples: Count = 5
    seed: Seed = 0
    quiet: bool = False


def load(options: Options) -> list[tuple[str, Row]]:
    """All rows with the sources they come from.

    Raises:
      UserError: no data, or a file that cannot be read.
    """
    if not options.data and not options.solutions:
        raise UserError("there is nothing to clean: give --data or --solutions")
    found = [(spec, row) for spec in options.data for row in read_rows(spec)]
    return found + [(spec, row) for spec in options.solutions for row in solution_rows(read_rows(spec))]


def rules(options: Options, benchmark: Sequence[RowText]) -> dict[str, Rule]:
    """Cleaning rules for readable rows, in order."""
    made: dict[str, Rule] = {
        "limits": lambda texts, _: cleaning.drop_faulty(texts, options.limits),
        "exact": lambda texts, _: cleaning.drop_exact_duplicates(texts, by=options.duplicates_by),
    }
    if options.jaccard_threshold:
        made["near"] = lambda texts, progress: cleaning.drop_near_duplicates(
            texts,
            jaccard_threshold=options.jaccard_threshold,
            ngram_size=options.ngram_size,
            by=options.duplicates_by,
            seed=options.seed,
            progress=progress,
        )
    if benchmark:
        made["benchmarks"] = lambda texts, progress: cleaning.drop_contaminated(
            texts,
            benchmark,
            size=options.decontamination_ngram,
            least_share=options.overlap_share,
            most_rows=options.overlap_rows,
            progress=progress,
        )
    return made


def clean(options: Options, rows: Sequence[Row], benchmark: Sequence[RowText]) -> Outcome:
    """Rows through all rules; a row is dropped by the first that it breaks."""
    texts, dropped = cleaning.readable(rows)
    for name, rule in rules(options, benchmark).items():
        with Progress(name, len(texts), quiet=options.quiet) as progress:
            texts, more = rule(texts, progress.update)
        dropped += more
    return texts, dropped


# Report ---------------------------------------------------------------------------------------------


def summarise(
    options: Options, sources: dict[str, str], kept: Sequence[RowText], dropped: Sequence[Dropped]
) -> dict[str, Any]:
    """The report: rows in and out by source, counts by reason, and examples.

    Args:
      sources: of each row, by where it stands.
    """
    reasons = Counter(item.reason for item in dropped)
    by_source: dict[str, Counter[str]] = {source: Counter() for source in sources.values()}
    for item in kept:
        by_source[sources[item.row.where]]["kept"] += 1
    for item in dropped:
        by_source[sources[item.row.where]][item.reason] += 1
    examples = {
        reason: [
            {
                "where": d.row.where,
                "detail": d.detail,
                "row": json.dumps(d.row.fields, ensure_ascii=False)[:_SHOWN],
            }
            for d in [item for item in dropped if item.reason == reason][: options.examples]
        ]
        for reason in reasons
    }
    return {
        "rows": len(kept) + len(dropped),
        "kept": len(kept),
        "dropped": dict(reasons.most_common()),
        "sources": {source: dict(counts) for source, counts in by_source.items()},
        "examples": examples,
    }


def page(report: dict[str, Any]) -> str:
    """The report as one page without script or network."""
    reasons = ["kept", *report["dropped"]]

    def cells(values: Sequence[Any], tag: str = "td") -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values) + "</tr>"

    counts = [
        cells([source, sum(found.values()), *(found.get(reason, 0) for reason in reasons)])
        for source, found in report["sources"].items()
    ]
    sections = [
        f"<h2>{html.escape(reason)}: {report['dropped'][reason]:,}</h2><table>"
        + cells(["where", "what was seen", "row"], "th")
        + "".join(cells([shown["where"], shown["detail"], shown["row"]]) for shown in examples)
        + "</table>"
        for reason, examples in report["examples"].items()
    ]
    head = cells(["source", "rows", *reasons], "th")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Cleaned rows</title><style>"
        ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;"
        "margin:2rem auto;padding:0 1rem}table{border-collapse:collapse;width:100%}"
        "th,td{text-align:left;vertical-align:top;"
        "padding:.35rem .6rem;border-bottom:1px solid #8884;overflow-wrap:anywhere}</style>"
        f"<h1>{report['kept']:,} of {report['rows']:,} rows kept</h1>"
        f"<table>{head}{''.join(counts)}</table>{''.join(sections)}</html>\n"
    )


def run(options: Options) -> None:
    """Reads, cleans and writes."""
    found = load(options)
    sources = {row.where: source for source, row in found}
    questions = [row for spec in options.benchmarks for row in read_rows(spec)]
    benchmark, unreadable = cleaning.readable(questions)
    if unreadable:
        raise UserError(f"{unreadable[0].row.where}: {unreadable[0].detail}")
    kept, dropped = clean(options, [row for _, row in found], benchmark)
    report = summarise(options, sources, kept, dropped)
    left = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items())
    if not kept:
        raise UserError(f"none of {len(found)} rows is left ({left}): widen the limits")
    describe_run(options.out, option_checks.to_json(options), stage="clean_data")
    rows = [{"source": sources[item.row.where], **item.row.fields} for item in kept]
    files.write_lines(options.out / "rows.jsonl", rows)
    files.write_lines(
        options.out / "dropped.jsonl",
        [
            {"where": d.row.where, "reason": d.reason, "detail": d.detail, "row": d.row.fields}
            for d in dropped
        ],
    )
    files.write_json(options.out / "report.json", report)
    files.write_text(options.out / "report.html", page(report))
    if not options.quiet:
        final_table(
            "cleaned",
            ["rows", "count"],
            [("read", len(found)), *report["dropped"].items(), ("kept", len(kept))],
        )
        print(f"Report: {options.out / 'report.html'}")
