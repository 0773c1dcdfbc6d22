"""What sacreBLEU, rouge-score and scikit-learn say of fixed examples: tests/golden/evaluation_peers.json.

In an environment of its own, as these are not needed to run anything else:

    pip install sacrebleu==2.6.0 rouge-score==0.1.2 scikit-learn==1.9.1
    python tools/goldens/make_goldens_text.py

The file holds the examples beside the numbers. BLEU and ROUGE are from 0 to 1; ROUGE is without stemming.
"""

import json
import pathlib
import random
from typing import Any

import numpy as np
import rouge_score.rouge_scorer
import rouge_score.tokenize
import sacrebleu
import sacrebleu.tokenizers.tokenizer_13a
import sklearn
import sklearn.linear_model
import sklearn.metrics

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "evaluation_peers.json"

HYPOTHESES = [
    "The robe takes 3 bolts in total.",
    "She earns $1,234.50 a day -- that's 10% more; isn't it?",
    "Tom &amp; Ana said: &quot;no, thanks&quot; (twice)",
    "a cat sat on a mat and a cat sat on a mat",
    "",
    "Über 3-5 Äpfel, 2.5 kg, e.g. [red] {green} <yellow>!",
    "well-\nknown facts,\nin two lines",
    "rain rain rain rain rain",
]
REFERENCES = [
    ["A robe takes 3 bolts of fiber in total.", "It takes 3 bolts in all."],
    ["She earns $1,234.5 a day, that is 10% more, isn't it?"],
    ['Tom & Ana said "no thanks" twice.', "Tom and Ana refused (twice)"],
    ["the cat sat on the mat and another cat sat on a mat"],
    ["nothing was said", "-"],
    ["About 3-5 apples, 2.5 kg, e.g. [red] {green} <yellow>!"],
    ["wellknown facts, in two lines", "well-known facts in lines"],
    ["the rain in Spain stays mainly in the plain, rain or not"],
]
SMOOTHINGS = {"exp": ("exp", None), "add_one": ("add-k", 1), "none": ("none", None)}


def corpus_bleu(hypotheses: list[str], references: list[list[str]], smoothing: str) -> float:
    """sacreBLEU's score, as a share."""
    most = max(map(len, references))
    columns: Any = [[refs[n] if n < len(refs) else None for refs in references] for n in range(most)]
    method, value = SMOOTHINGS[smoothing]
    return sacrebleu.corpus_bleu(hypotheses, columns, smooth_method=method, smooth_value=value).score / 100


def texts() -> dict[str, Any]:
    """Tokens, BLEU of several corpora, ROUGE of every example."""
    tokenizer = sacrebleu.tokenizers.tokenizer_13a.Tokenizer13a()
    rng = random.Random(0)
    words = ["one", "two", "three", "four", "five", ",", "."]
    longer = [" ".join(rng.choices(words, k=rng.randint(3, 14))) for _ in range(40)]
    noisy = [[" ".join(rng.choice(words) if rng.random() < 0.3 else w for w in t.split())] for t in longer]
    corpora = {
        "signs": (HYPOTHESES, REFERENCES),
        "short": (HYPOTHESES[:2], REFERENCES[:2]),
        "no_four_grams": (["a b c", "b c"], [["a b d"], ["b c"]]),
        "nothing_shared": (["a b c d e"], [["v w x y z"]]),
        "orders_missed": (["a b x c y d"], [["a b q c r d"]]),
        "random": (longer, noisy),
    }
    scorer = rouge_score.rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    rouge: dict[str, list[list[float]]] = {"rouge1": [], "rouge2": [], "rougeL": []}
    for hypothesis, references in zip(HYPOTHESES, REFERENCES, strict=True):
        for name, score in scorer.score_multi(references, hypothesis).items():
            rouge[name].append([score.precision, score.recall, score.fmeasure])
    flat = [text for texts in REFERENCES for text in texts]
    return {
        "hypotheses": HYPOTHESES,
        "references": REFERENCES,
        "tokens_13a": {text: tokenizer(text).split() for text in [*HYPOTHESES, *flat]},
        "tokens_rouge": {text: rouge_score.tokenize.tokenize(text, None) for text in [*HYPOTHESES, *flat]},
        "corpora": {name: list(corpus) for name, corpus in corpora.items()},
        "bleu": {n: {s: corpus_bleu(*corpus, s) for s in SMOOTHINGS} for n, corpus in corpora.items()},
        "rouge": rouge,
    }


def labels() -> dict[str, Any]:
    """Counts, rankings, and a logistic fit of preferences on lengths."""
    rng = np.random.default_rng(0)
    truth = rng.random(60) < 0.3
    scores = np.round(truth + rng.normal(size=60), 1)  # with ties
    answers = scores > 0.7
    curve = sklearn.metrics.precision_recall_curve(truth, scores)
    longer_by = rng.normal(20, 30, size=300)
    wins = rng.random(300) < 1 / (1 + np.exp(-(-0.4 + 1.5 * np.tanh(longer_by / 30))))
    inputs = np.tanh(longer_by / np.std(longer_by))[:, None]
    fit = sklearn.linear_model.LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000).fit(inputs, wins)
    return {
        "truth": truth.tolist(),
        "scores": scores.tolist(),
        "answers": answers.tolist(),
        "roc_auc": sklearn.metrics.roc_auc_score(truth, scores),
        "average_precision": sklearn.metrics.average_precision_score(truth, scores),
        "curve_precision": curve[0][:-1][::-1].tolist(),
        "curve_recall": curve[1][:-1][::-1].tolist(),
        "brier_score": sklearn.metrics.brier_score_loss(truth, 1 / (1 + np.exp(-scores))),
        "precision": sklearn.metrics.precision_score(truth, answers),
        "recall": sklearn.metrics.recall_score(truth, answers),
        "f1": sklearn.metrics.f1_score(truth, answers),
        "accuracy": sklearn.metrics.accuracy_score(truth, answers),
        "wins": wins.tolist(),
        "longer_by": longer_by.tolist(),
        "win_rate_at_equal_length": float(1 / (1 + np.exp(-fit.intercept_[0]))),
    }


def main() -> None:
    """Makes the file."""
    made_with = f"sacrebleu {sacrebleu.__version__}, rouge-score 0.1.2, scikit-learn {sklearn.__version__}"
    found = {"made_with": made_with, "texts": texts(), "labels": labels()}
    OUT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{OUT.name}: {made_with}")


if __name__ == "__main__":
    main()
