"""Published weights by name: seconds to load, to the first answer, and greedy tokens a second.

    python tools/bench/bench_named.py
    python tools/bench/bench_named.py --rows 1 8 --new 64

No token ends a row, so that each writes the same number of tokens. Least of `--rounds` times, after one that
compiles and does not count.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import rlhf_jax as rj
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.packing import left_pad
from rlhf_jax.generation import Sampling, generate
from rlhf_jax.models import Policy

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      model: a name, a folder or a file.
      rows: answered side by side.
      new: tokens of an answer.
      rounds: of which the fastest counts.
    """

    model: str = "smollm2-135m-instruct"
    rows: tuple[int, ...] = (1, 8, 32)
    new: int = 64
    rounds: int = 3


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Of one call, and what it returns."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, result


def greedy_program(policy: Policy, rows: int, new: int) -> Callable[[], Any]:
    """The same question so many times."""
    ids = encode_prompt(policy.tokenizer, QUESTION)
    tokens, mask = map(jnp.asarray, left_pad([ids] * rows, len(ids)))

    @jax.jit
    def decode(params: Any) -> Any:
        return generate(
            policy.prefill,
            policy.decode,
            params,
            tokens,
            mask,
            jax.random.key(0),
            max_new_tokens=new,
            eos_id=-1,
            pad_id=0,
            sampling=Sampling(0.0),
        ).sequences.tokens

    return lambda: decode(policy.params)


def main() -> None:
    """Parses the command line and prints a line for each number."""
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    jax.config.update("jax_enable_compilation_cache", False)
    took, policy = seconds(lambda: rj.load(options.model))
    print(f"load: {took:.1f} s")
    took, answer = seconds(lambda: policy.chat(QUESTION, max_new_tokens=32, temperature=0))
    print(f"first answer, compilation included: {took:.1f} s: {answer!r}")
    took, _ = seconds(lambda: policy.chat(QUESTION, max_new_tokens=32, temperature=0))
    print(f"the same once more: {took:.2f} s")
    for rows in options.rows:
        program = greedy_program(policy, rows, options.new)
        first, _ = seconds(program)
        best = min(seconds(program)[0] for _ in range(options.rounds))
        print(f"{rows} rows: {rows * options.new / best:.1f} tokens/s (first call {first:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
