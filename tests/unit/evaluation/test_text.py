"""BLEU and ROUGE against sacreBLEU and rouge-score, frozen."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from rlhf_jax.evaluation.statistics import bootstrap_interval, paired_bootstrap
from rlhf_jax.evaluation.text import (
    bleu,
    bleu_statistics,
    longest_common_subsequence,
    rouge_l,
    rouge_n,
    tokenize_13a,
    tokenize_rouge,
)

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[2] / "golden" / "evaluation_peers.json").read_text(encoding="utf-8")
)["texts"]


def test_tokens_are_those_of_the_peers():
    for text, tokens in GOLDEN["tokens_13a"].items():
        assert tokenize_13a(text) == tokens, text
    for text, tokens in GOLDEN["tokens_rouge"].items():
        assert tokenize_rouge(text) == tokens, text


@pytest.mark.parametrize("name", sorted(GOLDEN["corpora"]))
def test_bleu_is_that_of_sacrebleu(name):
    statistics = bleu_statistics(*GOLDEN["corpora"][name])
    for smoothing, score in GOLDEN["bleu"][name].items():
        assert bleu(statistics, smoothing=smoothing) == pytest.approx(score, abs=1e-12), smoothing


def test_rouge_is_that_of_rouge_score():
    texts = GOLDEN["hypotheses"], GOLDEN["references"]
    for found, name in [
        (rouge_n(*texts, order=1), "rouge1"),
        (rouge_n(*texts, order=2), "rouge2"),
        (rouge_l(*texts), "rougeL"),
    ]:
        np.testing.assert_allclose(found, GOLDEN["rouge"][name], atol=1e-12)


def test_identities_and_order():
    hypotheses, references = GOLDEN["corpora"]["random"]
    same = bleu_statistics(hypotheses, hypotheses)
    assert bleu(same) == pytest.approx(1)
    np.testing.assert_allclose(rouge_l(hypotheses, hypotheses), 1)
    rows = bleu_statistics(hypotheses, references)
    assert bleu(rows[::-1]) == bleu(rows)  # of a corpus, the order is nothing
    assert bleu(rows) != pytest.approx(np.mean([bleu(row[None]) for row in rows]))  # nor is it a mean


def test_common_subsequence_against_every_subsequence():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = (list(map(str, rng.integers(3, size=rng.integers(0, 7)))) for _ in range(2))
        common = {
            chosen
            for size in range(len(first) + 1)
            for chosen in itertools.combinations(first, size)
            if chosen in set(itertools.combinations(second, size))
        }
        assert longest_common_subsequence(first, second) == max(map(len, common))


def test_an_interval_and_a_comparison_recompute_the_corpus():
    hypotheses, references = GOLDEN["corpora"]["random"]
    rows = bleu_statistics(hypotheses, references)
    interval = bootstrap_interval(rows, statistic_fn=bleu, resamples=300)
    assert interval.mean == bleu(rows)
    assert interval.low < interval.mean < interval.high
    worse = bleu_statistics([text.rpartition(" ")[0] for text in hypotheses], references)
    found = paired_bootstrap([rows], [worse], statistic_fn=bleu, resamples=300)
    assert found.difference.mean == pytest.approx(bleu(worse) - bleu(rows))
    assert found.difference.high < 0
    assert found.p_value < 0.02


def test_bad_input():
    with pytest.raises(ValueError, match="2 hypotheses cannot be held against 1"):
        bleu_statistics(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="example 1 has no reference"):
        rouge_l(["a", "b"], ["a", []])
