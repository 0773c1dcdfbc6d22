"""Starting point of a stage: the policy that is named or a new one, and its tokenizer."""

import functools

import jax
import jax.numpy as jnp

from rlhf_jax import distributed, models
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Params
from rlhf_jax.data.tokenizers import Tokenizer, byte_tokenizer, load_tokenizer
from rlhf_jax.models import Policy
from rlhf_jax.stages import embedded
from rlhf_jax.stages.option_groups import ArchOptions, RunOptions
from rlhf_jax.stages.vision_options import with_image_token


def starting_model(
    model: str,
    tokenizer: str | Tokenizer,
    data: str,
    options: ArchOptions,
    run: RunOptions,
    policy: Policy | None = None,
) -> Policy:
    """The policy named `model`, or a new one.

    Args:
      run: how it is loaded, and the seed of a new one.
      tokenizer: itself, or where to find it; empty for that of `model`, of the embedded task, or for bytes.
      policy: given as an object, which takes the place of all that.

    Raises:
      UserError: options that contradict each other, or no policy in `model`.
    """
    if policy is not None:
        return policy
    if model:
        if tokenizer:
            raise UserError("a tokenizer and --model exclude each other: a policy brings its own tokenizer")
        policy = run.load(model)
        if options != ArchOptions():
            ours = options.config(policy.tokenizer)
            models.check_same_architecture(ours, policy.architecture, f"--model {model}")
        return policy
    chosen = find_tokenizer(tokenizer, data)
    if options.vision.image_size:
        chosen = with_image_token(chosen)
    config = options.config(chosen)
    if run.plan:
        return models.make_policy(config, models.param_shapes(config), chosen)
    params = distributed.init_sharded(functools.partial(models.init_params, config), jax.random.key(run.seed))
    return models.make_policy(config, params, chosen)


def find_tokenizer(tokenizer: str | Tokenizer, data: str) -> Tokenizer:
    """The tokenizer itself, or where it says; empty for that of the embedded task, or for bytes."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer:
        return load_tokenizer(tokenizer)
    return embedded.task_tokenizer(data) or byte_tokenizer()


def copied(params: Params) -> Params:
    """Parameters whose buffers may be donated while the originals stay (as the frozen reference)."""
    return jax.tree.map(jnp.copy, params)
