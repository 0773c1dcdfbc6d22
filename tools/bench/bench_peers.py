"""The other side of tools/bench/bench_model.py: PyTorch with transformers, or Tunix, each in its own
interpreter.

Started with a peer's name and the sizes as JSON, it says `ready`, then does what each line of standard input
names (`train` or `generate`) once and answers with the seconds it took. Needs nothing of this project, so
that a peer's environment holds the peer alone: `pip install torch==2.13.0 transformers`, or
`pip install google-tunix`.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Task = Callable[[], None]


def transformers_tasks(sizes: dict[str, Any]) -> dict[str, Task]:
    """A Llama of `transformers`; AdamW of PyTorch, fused; on a GPU compiled, with flash attention."""
    import torch
    import transformers

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    dtype = getattr(torch, sizes["dtype"])
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
    model = model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    forward = torch.compile(model) if gpu else model
    vocab, prompts = sizes["vocab_size"], sizes["prompts"]
    tokens = torch.randint(1, vocab, (sizes["batch"], sizes["length"]), device=device)
    questions = torch.randint(1, vocab, (prompts, sizes["prompt_length"]), device=device)
    new = sizes["new_tokens"]

    def wait() -> None:
        if gpu:
            torch.cuda.synchronize()

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        forward(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        wait()

    @torch.no_grad()
    def generate() -> None:
        model.eval()
        options = {"do_sample": True, "top_k": 0, "min_new_tokens": new, "max_new_tokens": new}
        model.generate(questions, attention_mask=torch.ones_like(questions), **options)
        wait()

    return {"train": train, "generate": generate}


def tunix_tasks(sizes: dict[str, Any]) -> dict[str, Task]:
    """Tunix's Llama 3 and the loss of its trainer, AdamW of optax. (Its sampler wants a tokenizer.)"""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.models.llama3 import model as llama
    from tunix.sft import peft_trainer

    names = ("vocab_size", "num_layers", "intermediate_size", "num_heads", "num_kv_heads")
    config = llama.ModelConfig(
        **{name: sizes[name] for name in names},
        embed_dim=sizes["width"],
        head_dim=sizes["width"] // sizes["num_heads"],
        rope_theta=10_000,
        norm_eps=1e-6,
        weight_tying=True,
    )
    model = llama.Llama3(config, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, b2=0.95, weight_decay=0.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    shape = (sizes["batch"], sizes["length"])
    tokens = jax.random.randint(jax.random.key(0), shape, 1, sizes["vocab_size"])
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((shape[1], shape[1]), bool)), (shape[0], shape[1], shape[1]))

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        loss, gradients = nnx.value_and_grad(peft_trainer._default_loss_fn)(
            model, tokens, jnp.ones(shape, bool), positions, causal
        )
        optimizer.update(model, gradients)
        return loss

    def train() -> None:
        jax.block_until_ready(step(model, optimizer))

    return {"train": train}


PEERS = {"transformers": transformers_tasks, "tunix": tunix_tasks}


def main() -> None:
    """Serves until standard input ends."""
    # Libraries print what they like; answers have a channel of their own.
    answers, sys.stdout = sys.stdout, sys.stderr
    tasks = PEERS[sys.argv[1]](json.loads(sys.argv[2]))
    print("ready", *tasks, file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        tasks[line.strip()]()
        print(time.perf_counter() - start, file=answers, flush=True)


if __name__ == "__main__":
    main()
