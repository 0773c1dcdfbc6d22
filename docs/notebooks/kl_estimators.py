# %% [markdown]
# # Estimators of the KL divergence, and their bias
#
# For actions of the policy, with l = log ref - log pi: k1 = -l, k2 = l^2 / 2, k3 = exp(l) - 1 - l (Schulman 2020). Two questions: is the value
# unbiased? Is the gradient? Over few actions both are answered by enumeration.

# %%
import jax
import jax.numpy as jnp

from rlhf_jax import kernels

logits = jnp.array([0.5, -1.0, 2.0, 0.0])
reference = jax.nn.log_softmax(jnp.array([0.0, 0.5, 0.5, -0.5]))


def exact(logits):
    return kernels.reverse_kl(logits, reference)


def expected_value(estimator):
    logp = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(logp) * estimator(logp, reference))


def expected_gradient(estimator):
    """Of the estimate as a loss: the sample is held, the gradient flows through log pi(a)."""
    probs = jax.nn.softmax(logits)
    of_action = jax.jacobian(lambda x: estimator(jax.nn.log_softmax(x), reference))(logits)
    return probs @ of_action


truth, slope = exact(logits), jax.grad(exact)(logits)
print(f"exact {truth:.4f}, gradient {slope}")
for name in ("k1", "k2", "k3"):
    estimator = getattr(kernels, name)
    value, gradient = expected_value(estimator), expected_gradient(estimator)
    print(f"{name}: value off by {value - truth:+.4f}, gradient off by {jnp.abs(gradient - slope).max():.4f}")

# %% [markdown]
# k1 and k3 have the right value; as a loss, k1 has no gradient on average, and k3 that of the other KL, KL(ref || pi). k2 has the right gradient and a
# biased value. So: report k1 or k3, put k1 into the reward, and take k2 where the KL is a loss. GRPO's paper takes k3.
#
# The noise, with samples:

# %%
logp = jax.nn.log_softmax(logits)
actions = jax.random.categorical(jax.random.key(0), logits, shape=(10_000,))
for name in ("k1", "k2", "k3"):
    found = getattr(kernels, name)(logp[actions], reference[actions])
    print(f"{name}: mean {found.mean():.4f}, deviation of one sample {found.std():.4f}")
