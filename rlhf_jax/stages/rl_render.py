"""An episode as an animated GIF, drawn from what the agent saw."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.core import files
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops.runs import Run

MOST_FRAMES = 250


def record(
    run: Run, state: Any, env: Environment, env_params: Any, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Observations and rewards of one deterministic episode."""

    def step(scan_state: tuple[Any, Any], key: jax.Array):
        world, carry = scan_state
        batched = jax.tree.map(lambda x: x[None], world)
        is_first = batched.episode_length == 0
        action, carry = run.act(state, batched.obs, is_first, carry, key, deterministic=True)
        world, seen = env.auto_reset_step(key, world, action[0], env_params, world)
        carry = run.observe_reward(carry, seen.reward[None])
        return (world, carry), (seen.obs, seen.reward, seen.done)

    reset_key, key = jax.random.split(jax.random.key(seed))
    scan_state = (env.reset(reset_key, env_params), run.initial_carry(1))
    play = jax.jit(lambda scan_state: jax.lax.scan(step, scan_state, jax.random.split(key, env.max_steps))[1])
    obs, rewards, done = jax.device_get(play(scan_state))
    length = int(np.argmax(done)) + 1 if done.any() else len(done)
    return obs[:length], rewards[:length]


def render(env: Environment, obs: np.ndarray, rewards: np.ndarray, path: Path) -> None:
    """Writes the GIF.

    Raises:
      UserError: it cannot be written.
    """
    from matplotlib.animation import PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    writer = PillowWriter(fps=25)
    every = -(-len(obs) // MOST_FRAMES)
    totals = np.cumsum(rewards)
    with files.writing(path) as local, writer.saving(figure, str(local), dpi=80):
        for frame in range(0, len(obs), every):
            axes.clear()
            draw(env, axes, obs[frame])
            axes.set_title(f"{env.name}  step {frame + 1}  return {totals[frame]:.6g}", fontsize=8)
            writer.grab_frame()


def draw(env: Environment, axes: Any, obs: np.ndarray) -> None:
    """One frame: geometry where it is known, planes or a bar for each number elsewhere."""
    axes.set_xticks([])
    axes.set_yticks([])
    if env.name == "CartPole-v1":
        position, angle = obs[0], obs[2]
        axes.plot([-2.4, 2.4], [0, 0], color="0.7")
        axes.plot([position - 0.25, position + 0.25], [0, 0], linewidth=12, solid_capstyle="butt")
        axes.plot([position, position + np.sin(angle)], [0, np.cos(angle)], linewidth=4, color="C1")
        axes.set(xlim=(-2.6, 2.6), ylim=(-0.5, 1.5))
    elif env.name == "Pendulum-v1":
        _chain(axes, [np.arctan2(obs[1], obs[0])])
    elif env.name == "Acrobot-v1":
        first, second = np.arctan2(obs[1], obs[0]), np.arctan2(obs[3], obs[2])
        _chain(axes, [np.pi - first, np.pi - first - second])
        axes.axhline(1, color="0.7", linestyle=":")
    elif env.name.startswith("MountainCar"):
        hill = np.linspace(-1.2, 0.6, 100)
        axes.plot(hill, np.sin(3 * hill), color="0.7")
        axes.plot(obs[0], np.sin(3 * obs[0]), "o", markersize=10)
    elif obs.ndim >= 2:
        planes = obs.reshape(*obs.shape[:2], -1) > 0
        shown = np.max(planes * np.arange(1, planes.shape[2] + 1), axis=2)
        axes.imshow(shown, cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
    else:
        axes.bar(np.arange(obs.size), obs.reshape(-1))


def _chain(axes: Any, angles: list[float]) -> None:
    """Links of length 1 from the origin, angles from upright."""
    x, y = np.cumsum([0.0, *np.sin(angles)]), np.cumsum([0.0, *np.cos(angles)])
    axes.plot(x, y, "o-", linewidth=4)
    size = len(angles) + 0.3
    axes.set(xlim=(-size, size), ylim=(-size, size), aspect="equal")
