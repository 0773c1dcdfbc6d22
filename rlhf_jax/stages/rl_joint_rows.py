"""The rows of the table of several agents: as `rl_rows`, for environments in which several act at once.

What a row does not name is the default of the algorithm's `Config` and `Hyper`, which are those published for
MPE. Budgets are small: a tenth of what is usual, or less.
"""

from rlhf_jax.stages.rl_rows import Row

_SPREAD, _TAG, _SMAX, _KITCHEN = (
    "mpe_simple_spread",
    "mpe_simple_tag",
    "smax_3m",
    "overcooked_cramped_room",
)
_ONE_SHOT = ("rollout.num_envs=64", "rollout.num_steps=1", "hyper.learning_rate=5e-3")
_ONE_SHOT_REPLAY = (
    "run.num_envs=4",
    "run.train_every=5",
    "run.updates=2",
    "run.batch_size=64",
    "run.capacity=2000",
    "run.learning_starts=200",
    "hyper.learning_rate=5e-3",
)
_ONE_SHOT_VALUES = (*_ONE_SHOT_REPLAY, "hyper.epsilon_steps=4000", "hyper.target_update_interval=20")
_ONE_SHOT_GRADIENT = (*_ONE_SHOT_REPLAY, "hyper.actor_learning_rate=5e-3")
# As in JaxMARL's own scripts for PPO.
_LONG = (
    "rollout.num_envs=16",
    "rollout.num_steps=128",
    "update.num_ppo_epochs=4",
    "update.num_minibatches=4",
)
_VALUES = (
    "run.num_envs=16",
    "run.updates=4",
    "run.batch_size=512",
    "hyper.learning_rate=1e-3",
    "hyper.epsilon_steps=100000",
    "hyper.target_update_interval=100",
)
# A budget this small is better spent on a shorter horizon, and on more updates of fewer steps.
_SHORT = "hyper.gamma=0.95"
_SPREAD_PPO, _SPREAD_VALUES = (*_LONG, _SHORT), (*_VALUES, _SHORT)
_OWN = (*_SPREAD_PPO, "shared=false")
_MATRIX = {
    "ippo": _ONE_SHOT,
    "mappo": _ONE_SHOT,
    "vdn": _ONE_SHOT_VALUES,
    "qmix": _ONE_SHOT_VALUES,
    "maddpg": _ONE_SHOT_GRADIENT,
}
_UNTRAINED = "untrained"

# In the order in which they are run.
ROWS = (
    *(Row("coordination_game", algo, 8_000, 10.0, "by enumeration", of) for algo, of in _MATRIX.items()),
    *(Row("climbing_game", algo, 8_000, 11.0, "by enumeration", of) for algo, of in _MATRIX.items()),
    Row(_SPREAD, "ippo", 6_400, None, settings=("hyper.learning_rate=0",), variant=_UNTRAINED),
    Row(
        _SPREAD,
        "ippo",
        500_000,
        None,
        settings=_SPREAD_PPO,
        note=(
            "With the paper's 128 environments, 10 epochs of one batch and gamma .99, four seeds returned "
            "-34.1, -24.7, -42.9 and -33.2 after 200,000 steps: training returns fall to -42 at first, while "
            "values of 100 steps ahead are learned, and are back at -28 at the end."
        ),
    ),
    Row(_SPREAD, "mappo", 500_000, None, settings=_SPREAD_PPO),
    Row(_SPREAD, "vdn", 500_000, None, settings=_SPREAD_VALUES),
    Row(
        _SPREAD,
        "qmix",
        500_000,
        None,
        settings=_SPREAD_VALUES,
        note=(
            "With hypernetworks that begin ten times as large four seeds returned -74.5, -76.1, -59.4 and "
            "-74.5: joint values grew to 640, where no reward is above 0."
        ),
    ),
    Row(_SPREAD, "maddpg", 500_000, None),
    Row("mpe_simple_spread_continuous", "maddpg", 500_000, None),
    Row(
        _TAG,
        "ippo",
        6_400,
        None,
        settings=("hyper.learning_rate=0",),
        variant=_UNTRAINED,
        note="The score is the adversaries' mean return, against a prey that learns as well.",
    ),
    Row(_TAG, "ippo", 500_000, None, settings=_OWN),
    Row(_TAG, "mappo", 500_000, None, settings=_OWN),
    Row(_TAG, "maddpg", 500_000, None),
    Row(
        _SMAX,
        "ippo",
        4_096,
        None,
        settings=(*_LONG, "hyper.learning_rate=0"),
        variant=_UNTRAINED,
        note="A battle that is won returns 2.",
    ),
    Row(_SMAX, "ippo", 500_000, None, settings=_LONG),
    Row(_SMAX, "mappo", 500_000, None, settings=_LONG),
    Row(_SMAX, "vdn", 500_000, None, settings=_VALUES),
    Row(_SMAX, "qmix", 500_000, None, settings=_VALUES),
    Row(
        _KITCHEN,
        "ippo",
        1_000_000,
        None,
        settings=_LONG,
        note="A soup that is served counts 20; agents learn from the shaped reward as well.",
    ),
    Row(_KITCHEN, "mappo", 1_000_000, None, settings=_LONG),
    Row(_KITCHEN, "vdn", 1_000_000, None, settings=_VALUES),
    Row(_KITCHEN, "qmix", 1_000_000, None, settings=_VALUES),
)
