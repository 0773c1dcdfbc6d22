# %% [markdown]
# # Seeds and learning rates in one program
#
# A whole run is a pure function, `train(key, hyper)`. A sweep is `vmap` over keys and settings, compiled once.

# %%
import jax

from rlhf_jax.rl.algorithms import ppo
from rlhf_jax.rl.envs import environments
from rlhf_jax.sweep import compare, product, summarize, sweep

env, env_params = environments.make("CartPole-v1")
train = ppo.make_train(ppo.Config(total_steps=40_960), env, env_params)


def train_and_report(key, hyper):
    state, history = train(key, hyper)
    return state, {"last_return": history["episode_return_sum"][-1] / history["episodes"][-1]}


rates = [1e-4, 1e-3, 1e-2]
hypers = product(ppo.default_hyper(), learning_rate=rates)
results = sweep(train_and_report, jax.random.split(jax.random.key(0), 4), hypers, quiet=True)

# %% [markdown]
# Interquartile means over seeds with bootstrap intervals, and how probably one setting beats another.

# %%
for rate, found in zip(rates, summarize(results, "last_return"), strict=True):
    print(f"learning rate {rate:g}: {found.iqm:.0f}")
print(f"1e-3 beats 1e-4 with probability {compare(results, 'last_return', 1, 0):.2f}")
