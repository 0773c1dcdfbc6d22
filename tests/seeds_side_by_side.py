"""What algorithms of control reach: seeds trained in one program, then evaluated."""

import functools

import jax
import numpy as np
from tiers import OPTIMIZED

from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.runs import make_train_fn


def evaluation_returns(run, env, hyper, *, seeds):
    """Mean return of each seed's policy in the end, [seeds], over 16 episodes."""
    train = jax.vmap(make_train_fn(run), (0, None))
    keys = jax.random.split(jax.random.key(0), seeds)
    states, _ = jax.jit(train, compiler_options=OPTIMIZED)(keys, hyper)
    score = functools.partial(evaluate, run, episodes=16, deterministic=True)
    scores = jax.vmap(lambda state, key: score(state, *env, key))
    returns, _ = jax.jit(scores, compiler_options=OPTIMIZED)(states, keys)
    return np.mean(returns, axis=1)
