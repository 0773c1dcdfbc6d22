"""Health checks of a training run: the known ways in which it goes wrong, found in its metrics, with advice.

Detection is pure: a check is a function of the means of metrics over the last steps and over the first
ones, and of thresholds. A `HealthMonitor` remembers those means. Shown the lines of `metrics.jsonl` again,
it is in the state in which the run was, so a resumed run says what an unbroken one does.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

HEALTH = "health/"
"""Before the name of a check in the metrics: 1 at each step at which it fails."""

_WATCHED = (
    "frac_reward_zero_std",
    "kl",
    "entropy",
    "length",
    "sampling_logp_diff",
    "clip_fraction",
    "reward_outliers",
    "unscorable_share",
)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Bounds of the health checks; infinity (for shares of the start, 0) for never.

    Attributes:
      window: steps over whose mean metrics are judged; an episode ends after as many without trouble.
      start: first steps, whose mean is what entropy and length are compared with.
      zero_std_groups: share of groups whose rewards are all equal.
      kl: to the reference, in nats per token.
      entropy_share: entropy, as a share of the start's.
      length_factor: length, or its inverse, as a multiple of the start's.
      sampling_logp_diff: mean |delta log-prob| between sampler and trainer, in nats per token.
      clip_fraction: share of tokens whose ratio has passed a bound.
    """

    window: int = 5
    start: int = 5
    zero_std_groups: float = 0.9
    kl: float = 0.3
    entropy_share: float = 0.1
    length_factor: float = 2.0
    sampling_logp_diff: float = 0.05
    clip_fraction: float = 0.5


Means = Mapping[str, float]
DetectFn = Callable[[Means, Means, Thresholds], str | None]
"""(means of the last steps, means of the first steps, thresholds) -> what is wrong, or None.

A metric that a run does not have is in neither; the first means come when the first steps are over.
"""


def zero_std_groups(recent: Means, first: Means, limits: Thresholds) -> str | None:
    """Groups whose rewards are all equal have no advantage, and teach nothing."""
    share = recent.get("frac_reward_zero_std", 0.0)
    if share < limits.zero_std_groups:
        return None
    return (
        f"in {share:.0%} of the groups all answers are worth the same, so that nothing is learned from them"
    )


def kl_explosion(recent: Means, first: Means, limits: Thresholds) -> str | None:
    """The policy has left the reference."""
    if not {"kl", "length"} <= recent.keys():
        return None
    kl = recent["kl"] / max(recent["length"], 1.0)
    return f"the KL to the reference is {kl:.2f} nats a token" if kl > limits.kl else None


def entropy_collapse(recent: Means, first: Means, limits: Thresholds) -> str | None:
    """Answers are all alike, so exploration is over."""
    if not ("entropy" in recent and first.get("entropy", 0.0) > 0):
        return None
    share = recent["entropy"] / first["entropy"]
    if share >= limits.entropy_share:
        return None
    return f"the entropy is {recent['entropy']:.3g} nats a token, {share:.0%} of what it was at the start"


def length_drift(recent: Means, first: Means, limits: Thresholds) -> str | None:
    """Answers have become much longer or shorter, which rewards may favour for no good reason."""
    if not ("length" in recent and first.get("length", 0.0) > 0):
        return None
    factor = max(recent["length"], 1e-9) / first["length"]
    if max(factor, 1 / factor) <= limits.length_factor:
        return None
    return f"answers have {recent['length']:.0f} tokens, and had {first['length']:.0f} at the start"


def sampler_mismatch(recent: Means, first: Means, limits: Thresholds) -> str | None:
    """The sampler is not the policy that the trainer takes it for."""
    sampling_logp_diff = recent.get("sampling_logp_diff", 0.0)
    if sampling_logp_diff <= limits.sampling_logp_diff:
        return None
    return f"sampler and trainer differ by {sampling_logp_diff:.2g} nats a token"


def clipped_ratios(recent: Means, first: Means, limits: Thresholds) -> str | None:
    """Most tokens have lost their gradient to the bounds of the ratio."""
    share = recent.get("clip_fraction", 0.0)
    return f"{share:.0%} of the tokens have a clipped ratio" if share > limits.clip_fraction else None


def reward_outliers(recent: Means, first: Means, limits: Thresholds) -> str | None:
    """Rewards so far from all others that they were cut."""
    share = recent.get("reward_outliers", 0.0)
    return f"{share:.2%} of the rewards are far from all seen before, and were cut" if share > 0 else None


def unscored_answers(recent: Means, first: Means, limits: Thresholds) -> str | None:
    """No reward says anything of any answer, so that nothing is learned."""
    return "no answer had a reward" if recent.get("unscorable_share", 0.0) >= 1 else None


@dataclasses.dataclass(frozen=True)
class HealthCheck:
    """One known failure.

    Attributes:
      name: in the metrics, behind `health/`.
      title: in a few words.
      advice: what to do about it.
      detect: whether it is there.
    """

    name: str
    title: str
    advice: str
    detect: DetectFn


HEALTH_CHECKS = (
    HealthCheck(
        "zero_std_groups",
        "groups of equal rewards",
        "raise the group size or the temperature, choose prompts that are neither solved nor hopeless, give "
        "a finer reward, or draw again until answers differ (dynamic sampling)",
        zero_std_groups,
    ),
    HealthCheck(
        "kl_explosion",
        "KL explosion",
        "lower the learning rate, raise the KL coefficient (or beta), and look for a hacked reward",
        kl_explosion,
    ),
    HealthCheck(
        "entropy_collapse",
        "entropy collapse",
        "raise the upper clipping range (epsilon high), the temperature or the entropy coefficient, or stop: "
        "where the score is as good as it gets, this is how it looks",
        entropy_collapse,
    ),
    HealthCheck(
        "length_drift",
        "length drift",
        "read the samples; give a limit of new tokens that fits, a penalty on length, or an algorithm "
        "without a bias of length (dr_grpo)",
        length_drift,
    ),
    HealthCheck(
        "sampler_mismatch",
        "sampler and trainer differ",
        "sample and score at the same temperature and dtype, update the sampler's parameters, or correct "
        "with truncated importance sampling",
        sampler_mismatch,
    ),
    HealthCheck(
        "clipped_ratios",
        "clipped ratios",
        "lower the learning rate, take fewer iterations or minibatches, or widen the clipping range",
        clipped_ratios,
    ),
    HealthCheck(
        "reward_outliers",
        "reward outliers",
        "look at what the reward function gives for the answers in the samples, and bound it",
        reward_outliers,
    ),
    HealthCheck(
        "unscored_answers",
        "answers without a reward",
        "see why the reward function returns None for every row (is it a field of the rows that it cannot "
        "read?), or why no server answers",
        unscored_answers,
    ),
)


@dataclasses.dataclass(frozen=True)
class HealthWarning:
    """A health check that has begun to fail.

    Attributes:
      check: which.
      found: what is wrong, in a sentence.
    """

    check: HealthCheck
    found: str

    def __str__(self) -> str:
        """In one line, with the advice."""
        return f"{self.check.title}: {self.found}: {self.check.advice}"


class HealthMonitor:
    """Runs all health checks on the metrics of one step after the other."""

    def __init__(self, thresholds: Thresholds = Thresholds()) -> None:
        self._limits = thresholds
        self._last = {name: collections.deque[float](maxlen=thresholds.window) for name in _WATCHED}
        self._first: dict[str, list[float]] = {name: [] for name in _WATCHED}
        self._quiet_for: dict[str, int] = {}  # failing checks -> steps since they last failed

    def see(self, metrics: Mapping[str, Any]) -> tuple[list[HealthWarning], dict[str, int]]:
        """Takes the metrics of a step; what is missing or not finite is left out.

        Returns:
          (checks that begin to fail, `health/...` metrics of those that fail).
        """
        for name in _WATCHED:
            value = math.nan if metrics.get(name) is None else float(metrics[name])
            if math.isfinite(value):
                self._last[name].append(value)
                if len(self._first[name]) < self._limits.start:
                    self._first[name].append(value)
        recent = _means(self._last, self._limits.window)
        first = _means(self._first, self._limits.start)
        begun = []
        for check in HEALTH_CHECKS:
            found = check.detect(recent, first, self._limits)
            if found is not None:
                if check.name not in self._quiet_for:
                    begun.append(HealthWarning(check, found))
                self._quiet_for[check.name] = 0
            elif check.name in self._quiet_for:
                self._quiet_for[check.name] += 1
                if self._quiet_for[check.name] >= self._limits.window:
                    del self._quiet_for[check.name]
        return begun, {f"{HEALTH}{name}": 1 for name in self._quiet_for}


def _means(values: Mapping[str, Any], count: int) -> dict[str, float]:
    """Of the metrics that have come `count` times."""
    return {name: math.fsum(some) / count for name, some in values.items() if len(some) == count}
