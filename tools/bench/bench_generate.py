"""Speed of generation: batches, shared prompts, continuous batching, speculation; `transformers` beside it.

    python tools/bench/bench_generate.py
    python tools/bench/bench_generate.py --peer-python ~/peers/bin/python  # torch and transformers live there

A random decoder of 3.4 million parameters in float32. Greedy where a peer is compared, without an end token,
so that every row writes the same number of tokens. Least of `--rounds` times, the two sides in turn.
"""

import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from rlhf_jax import generation, models
from rlhf_jax.data.packing import bucket_batches, left_pad
from rlhf_jax.generation import Sampling
from rlhf_jax.models import hf

NO_END, PAD, END = -1, 0, 1
Part = Literal["peer", "shared", "tails", "speculative", "lengths"]

PEER = """
import json, sys, time, torch, transformers
torch.set_num_threads(int(sys.argv[2]))
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
for line in sys.stdin:
    batch, prompt, new = json.loads(line)
    tokens = torch.randint(2, model.config.vocab_size, (batch, prompt))
    with torch.no_grad():
        start = time.perf_counter()
        found = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new,
                               min_new_tokens=new, do_sample=False, pad_token_id=0)
        seconds = time.perf_counter() - start
    assert found.shape == (batch, prompt + new)
    print(json.dumps(seconds), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      peer_python: an interpreter that has torch and transformers; empty for no peer.
      batches: rows side by side.
      prompt: tokens of a prompt.
      new: tokens of an answer.
      rounds: times that each is measured.
      threads: of the peer.
      width: of the decoder.
      layers: of the decoder.
      group_prompt: tokens of a prompt that eight answers share.
      parts: which measurements.
    """

    peer_python: str = ""
    batches: tuple[int, ...] = (1, 8, 64)
    prompt: int = 32
    new: int = 96
    rounds: int = 3
    threads: int = 2
    width: int = 256
    layers: int = 4
    group_prompt: int = 256
    parts: tuple[Part, ...] = ("peer", "shared", "tails", "speculative", "lengths")


class Timer:
    """Compiles a function, runs it once, then times it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        start = time.perf_counter()
        self.function = jax.jit(function).lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - start
        self.arguments = arguments
        self.seconds: list[float] = []
        jax.block_until_ready(self.function(*arguments))

    def run(self) -> Any:
        """One round."""
        start = time.perf_counter()
        result = jax.block_until_ready(self.function(*self.arguments))
        self.seconds.append(time.perf_counter() - start)
        return result

    @property
    def least(self) -> float:
        """Seconds of the fastest round."""
        return min(self.seconds)


def in_turn(rounds: int, *runs: Callable[[], Any]) -> None:
    """Runs them in turn, so that what else the machine does meets all alike."""
    for _ in range(rounds):
        for run in runs:
            run()


def random_prompts(count: int, length: int, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Tokens and mask."""
    tokens = jax.random.randint(jax.random.key(count), (count, length), 2, vocab_size)
    return tokens, jnp.ones(tokens.shape, bool)


class Peer:
    """`transformers.generate` in a process of its own."""

    def __init__(self, python: str, folder: Path, threads: int) -> None:
        command = [python, "-c", PEER, str(folder), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.versions = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("error: the peer ended; does --peer-python have torch and transformers?")
        return json.loads(line)

    def seconds(self, batch: int, prompt: int, new: int) -> float:
        """One call."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([batch, prompt, new]) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


# Measurements --------------------------------------------------------------------------------------


def against_peer(options: Options, config: models.ModelConfig, params: Any, table: Table) -> None:
    """Greedy tokens a second at several batch sizes."""
    prefill, decode = models.make_decode_fns(config)
    greedy = functools.partial(
        generation.generate, prefill, decode, max_new_tokens=options.new, eos_id=NO_END, pad_id=PAD,
        sampling=Sampling(temperature=0.0),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        hf.save(Path(folder), config, params)
        peer = Peer(options.peer_python, Path(folder), options.threads) if options.peer_python else None
        for batch in options.batches:
            tokens, mask = random_prompts(batch, options.prompt, config.vocab_size)
            ours = Timer(greedy, params, tokens, mask, jax.random.key(0))
            theirs: list[float] = []
            if peer is not None:
                peer.seconds(batch, options.prompt, 4)
            runs = [ours.run]
            if peer is not None:
                runs.append(lambda b=batch, t=theirs: t.append(peer.seconds(b, options.prompt, options.new)))
            in_turn(options.rounds, *runs)
            rate = batch * options.new / ours.least
            other = f"{batch * options.new / min(theirs):,.0f}" if theirs else "-"
            ratio = f"{min(theirs) / ours.least:.2f}" if theirs else "-"
            table.add_row(
                f"greedy, batch {batch}", f"{rate:,.0f}", other, ratio, f"{ours.compile_seconds:.1f}"
            )
        if peer is not None:
            table.caption = f"peer: {peer.versions}"
            peer.close()


def shared_prompts(options: Options, config: models.ModelConfig, params: Any, table: Table) -> None:
    """Eight answers a prompt: the prompt read once, against read eight times."""
    fns = models.make_decode_fns(config)
    sample = functools.partial(
        generation.generate, *fns, max_new_tokens=options.new // 2, eos_id=NO_END, pad_id=PAD
    )
    tokens, mask = random_prompts(4, options.group_prompt, config.vocab_size)
    once = Timer(functools.partial(sample, group_size=8), params, tokens, mask, jax.random.key(0))
    every = Timer(sample, params, tokens.repeat(8, 0), mask.repeat(8, 0), jax.random.key(0))
    in_turn(options.rounds, once.run, every.run)
    count = 32 * (options.new // 2)
    table.add_row(
        f"prompts of {options.group_prompt} shared by 8 / not shared",
        f"{count / once.least:,.0f}",
        f"{count / every.least:,.0f}",
        f"{every.least / once.least:.2f}",
        f"{once.compile_seconds:.1f}",
    )


def long_tails(options: Options, config: models.ModelConfig, params: Any, table: Table) -> None:
    """Answers of geometric length, 128 of them: 16 slots refilled, against batches of 16."""
    count, slots, longest = 128, 16, 4 * options.new
    tokens, mask = random_prompts(count, options.prompt, config.vocab_size)
    prefill, decode = models.make_decode_fns(config)
    # The end comes with probability 1/32 whatever the model says: mean 32, a tail up to the limit.
    ending = functools.partial(with_end, probability=1 / 32)
    first, following = ending(prefill), ending(decode)
    extend = ending(models.make_extend_fn(config))
    ends = {"max_new_tokens": longest, "eos_id": END, "pad_id": PAD}
    keys = generation.row_keys(jax.random.key(0), count)
    continuous = Timer(
        functools.partial(
            generation.continuous_batching_generate, first, extend,
            max_num_seqs=slots, prefill_batch_size=2, **ends,
        ),
        params, tokens, mask, keys,
    )  # fmt: skip
    static = functools.partial(generation.generate, first, following, **ends)

    def in_batches(params: Any, tokens: jax.Array, mask: jax.Array, keys: jax.Array) -> Any:
        parts = jax.tree.map(lambda x: x.reshape(-1, slots, *x.shape[1:]), (tokens, mask, keys))
        return jax.lax.map(lambda part: static(params, *part), parts)

    batched = Timer(in_batches, params, tokens, mask, keys)
    in_turn(options.rounds, continuous.run, batched.run)
    lengths = np.asarray(continuous.run().sequences.mask.sum(axis=1))
    other = np.asarray(batched.run().sequences.mask.sum(axis=-1)).reshape(-1)
    if not np.array_equal(lengths, other):
        sys.exit("error: the two sides did not sample the same answers")
    table.add_row(
        f"rollouts/s, {slots} slots / batches of {slots}; length {lengths.mean():.0f} to {lengths.max()}",
        f"{count / continuous.least:.1f}",
        f"{count / batched.least:.1f}",
        f"{batched.least / continuous.least:.2f}",
        f"{continuous.compile_seconds:.1f}",
    )


def with_end(fn: Callable[..., Any], *, probability: float) -> Callable[..., Any]:
    """The callable of a model whose answers end with this probability at every token."""

    def ending(*arguments: Any) -> Any:
        logits, cache = fn(*arguments)
        is_end = jnp.arange(logits.shape[-1]) == END
        others = jax.nn.logsumexp(jnp.where(is_end, -jnp.inf, logits), axis=-1, keepdims=True)
        odds = jnp.log(probability / (1 - probability))
        return jnp.where(is_end, others + odds, logits), cache

    return ending


def speculation(options: Options, config: models.ModelConfig, params: Any, table: Table) -> None:
    """One row, four guesses of a draft model with a quarter of the layers, and of the row's own past."""
    tokens, mask = random_prompts(1, options.prompt, config.vocab_size)
    prefill, decode = models.make_decode_fns(config)
    greedy = {"max_new_tokens": options.new, "eos_id": NO_END, "pad_id": PAD, "sampling": Sampling(0.0)}
    plain = Timer(
        functools.partial(generation.generate, prefill, decode, **greedy),
        params,
        tokens,
        mask,
        jax.random.key(0),
    )
    small = dataclasses.replace(config, num_layers=1)
    first = {name: leaf for name, leaf in params.items() if not name.startswith("layer_")}
    draft = generation.draft_model_proposer(
        models.make_decode_fns(small)[0],
        models.make_extend_fn(small),
        {**first, "layer_0": params["layer_0"]},
        num_speculative_tokens=4,
        eos_id=NO_END,
    )
    for name, proposer in (
        ("its first layer", draft),
        ("what it said before", generation.prompt_lookup_proposer(num_speculative_tokens=4)),
        ("its own passes (lookahead)", generation.lookahead_proposer(num_speculative_tokens=4)),
    ):
        speculate = functools.partial(
            generation.speculative_decode,
            prefill,
            models.make_extend_fn(config),
            proposer=proposer,
            **greedy,
        )
        timer = Timer(speculate, params, tokens, mask, jax.random.key(0))
        in_turn(options.rounds, timer.run, plain.run)
        rollout, acceptance = timer.run()
        if not np.array_equal(rollout.sequences.tokens, plain.run().sequences.tokens):
            sys.exit("error: greedy speculation is not greedy")
        share = float(acceptance.num_accepted_tokens.sum() / acceptance.num_draft_tokens.sum())
        table.add_row(
            f"speculative, guesses of {name}: {share:.0%} kept / plain",
            f"{options.new / timer.least:,.0f}",
            f"{options.new / plain.least:,.0f}",
            f"{plain.least / timer.least:.2f}",
            f"{timer.compile_seconds:.1f}",
        )


def many_lengths(options: Options, config: models.ModelConfig, params: Any, table: Table) -> None:
    """Programs compiled for prompts of 64 lengths, in buckets; without them it is one a length."""
    lengths = range(4, 260, 4)
    programs: list[tuple[int, ...]] = []

    @jax.jit
    def greedy(params: Any, tokens: jax.Array, mask: jax.Array) -> Any:
        programs.append(tokens.shape)  # runs when the function is traced, which is once a program
        return generation.generate(
            *models.make_decode_fns(config), params, tokens, mask, jax.random.key(0),
            max_new_tokens=2, eos_id=NO_END, pad_id=PAD, sampling=Sampling(temperature=0.0),
        )  # fmt: skip

    start = time.perf_counter()
    for columns, places in bucket_batches(list(lengths), size=4):
        prompts = [np.full(lengths[place], 2) for place in places]
        jax.block_until_ready(greedy(params, *left_pad(prompts, columns, pad_id=PAD)))
    seconds = time.perf_counter() - start
    table.add_row(
        f"programs for prompts of {len(lengths)} lengths, 4 to 256: in buckets / one a length",
        f"{len(programs)}",
        f"{len(lengths)}",
        f"{len(lengths) / len(programs):.1f}",
        f"{seconds:.1f}",
    )


PARTS = {
    "peer": against_peer,
    "shared": shared_prompts,
    "tails": long_tails,
    "speculative": speculation,
    "lengths": many_lengths,
}


def main() -> None:
    """Measures part after part and prints a table of each."""
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    config = models.dense_config(
        vocab_size=1024, width=options.width, num_layers=options.layers, num_heads=8, num_kv_heads=8
    )
    params = models.init_params(config, jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{size:,} parameters, {options.prompt} -> {options.new} tokens, jax {jax.__version__}")
    for part in options.parts:
        table = Table()
        for column in ("what", "ours, tokens/s", "other", "ratio", "compile, s"):
            table.add_column(column, justify="left" if column == "what" else "right")
        PARTS[part](options, config, params, table)
        Console(width=130).print(table)


if __name__ == "__main__":
    main()
