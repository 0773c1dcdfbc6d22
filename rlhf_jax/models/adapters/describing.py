"""Table of trainable parameters, for people."""

import re
from collections import Counter

from rlhf_jax.core.trees import named_leaves
from rlhf_jax.core.types import Params


def trainable_table(trained: Params, frozen: Params) -> str:
    """Trainable share, then a line for each kind of trained leaf, numbers in names as `*`."""
    sizes = {name: leaf.size for name, leaf in named_leaves(trained).items()}
    total = sum(sizes.values())
    share = total / (total + sum(leaf.size for leaf in named_leaves(frozen or {}).values()))
    numbers, counts = Counter[str](), Counter[str]()
    for name, size in sizes.items():
        pattern = re.sub(r"\d+(?=/|_)", "*", name)
        numbers[pattern] += size
        counts[pattern] += 1
    width = max(map(len, numbers), default=0)
    lines = [f"  {name:<{width}}  {counts[name]:>4} leaves  {numbers[name]:>12,}" for name in numbers]
    head = f"Trains {total:,} numbers in {len(sizes)} leaves, {share:.2%} of the model:"
    return "\n".join([head, *lines])
