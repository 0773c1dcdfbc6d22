"""AlphaZero on tic-tac-toe, connect four and games of pgx: self-play, and Elo with and without search.

    rlhf alphazero --out runs/tic_tac_toe
    rlhf alphazero --out runs/connect_four --game connect-four --steps 200
    rlhf alphazero --out runs/othello --game pgx:othello    # pip install 'rlhf_jax[games]'

The agents of the run's checkpoints, each with and without search, and a random player meet in a round robin;
`results.json`, `elo.svg` and `report.html` say what came out. At tic-tac-toe the exact solution also counts
the lines of play that each agent loses, over every reply of its opponent.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax.checkpoint import CheckpointManager, restore_params
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Count, LearningRate, PositiveInt, Width
from rlhf_jax.core.types import Metrics, Params
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.evaluation.ratings import bradley_terry_ratings
from rlhf_jax.metrics.pictures import name_ends, picture
from rlhf_jax.metrics.progress import Progress, final_table
from rlhf_jax.rl import games
from rlhf_jax.rl.algorithms import alphazero
from rlhf_jax.stages import edges, option_checks, option_groups
from rlhf_jax.training import run_loop
from rlhf_jax.training.run_folder import describe_run

GAMES = {
    "tic-tac-toe": games.TIC_TAC_TOE,
    "small-connect-four": games.SMALL_CONNECT_FOUR,
    "connect-four": games.CONNECT_FOUR,
}
SOLVED = ("tic-tac-toe",)
EXTERNAL = "pgx:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of AlphaZero.

    Attributes:
      game: tic-tac-toe, small-connect-four on 5 x 5 cells, connect-four on 6 x 7, or pgx:NAME.
      games: played side by side in self-play.
      plies: moves of each of them a step; 0 for those of the longest game.
      opening: a new game of self-play begins after 0 to this many random moves.
      num_simulations: of the search, for each move of self-play.
      max_num_considered_actions: actions that the root of the search looks at, at most.
      widths: of the network's layers.
      num_epochs: over the moves of a step.
      num_minibatches: of an epoch; divide games x plies.
      learning_rate: at its peak.
      play_simulations: of the search in the round robin.
      openings: games of each pair begin after so many different openings, either side first.
      opening_plies: random moves of those openings.
    """

    run: tyro.conf.OmitArgPrefixes[option_groups.RunOptions] = option_groups.RunOptions(
        Path("runs/alphazero"), steps=120, save_every=20, max_to_keep=100
    )
    game: str = "tic-tac-toe"
    games: PositiveInt = 128
    plies: Count = 0
    opening: Count = 4
    num_simulations: PositiveInt = 32
    max_num_considered_actions: PositiveInt = 16
    widths: tuple[Width, ...] = (128, 128)
    num_epochs: PositiveInt = 2
    num_minibatches: PositiveInt = 4
    learning_rate: LearningRate = 2e-3
    play_simulations: PositiveInt = 32
    openings: PositiveInt = 16
    opening_plies: Count = 2


@dataclasses.dataclass(frozen=True)
class Agent:
    """Player of the round robin.

    Attributes:
      iteration: steps of training; None for the random player.
      num_simulations: of its search; 0 for none.
    """

    iteration: int | None
    num_simulations: int

    @property
    def name(self) -> str:
        """For tables and files."""
        if self.iteration is None:
            return "random"
        return f"{self.iteration}, " + (
            f"{self.num_simulations} simulations" if self.num_simulations else "no search"
        )


def find_game(name: str) -> games.Game:
    """The game of that name.

    Raises:
      UserError: there is none.
    """
    if name.startswith(EXTERNAL):
        return games.PgxGame(name.removeprefix(EXTERNAL))
    if name not in GAMES:
        raise UserError(f"--game {name}: there is none: choose one of {', '.join(GAMES)}, {EXTERNAL}NAME")
    return GAMES[name]


def make_config(options: Options, game: games.Game) -> alphazero.Config:
    """Training configuration from the options."""
    plies = options.plies or game.length
    option_checks.check_divides(
        "--num-minibatches", options.num_minibatches, "--games x --plies", options.games * plies
    )
    return alphazero.Config(
        iterations=options.run.num_steps,
        num_games=options.games,
        plies=plies,
        opening=options.opening,
        num_simulations=options.num_simulations,
        max_num_considered_actions=options.max_num_considered_actions,
        widths=options.widths,
        num_epochs=options.num_epochs,
        num_minibatches=options.num_minibatches,
    )


def train(options: Options, game: games.Game, config: alphazero.Config) -> dict[int, Params]:
    """Trains, and gives the parameters at the beginning and at every checkpoint."""
    init_state, play, learn = alphazero.make_iteration(config, game)
    hyper = alphazero.Hyper(learning_rate=jnp.float32(options.learning_rate))
    play, learn = (
        jax.jit(function, donate_argnums=0, compiler_options=compiler_options()) for function in (play, learn)
    )
    meter = options.run.meter()

    def iterate(state: alphazero.State, _: int) -> tuple[alphazero.State, Metrics]:
        state, batch = meter.timed("rollout", play, state)
        return meter.timed("update", learn, state, hyper, batch)

    key = jax.random.key(options.run.seed)
    first = jax.jit(init_state)(key)
    snapshots = {0: jax.tree.map(np.asarray, first.learner.params)}
    run_loop(
        first,
        iterate,
        options.run.loop(),
        stage="alphazero",
        folder=options.run.out,
        resume=options.run.resume,
        run_config=option_checks.to_json(options),
        loggers=edges.loggers(options, "alphazero"),
        meter=meter,
    )
    folder = options.run.out / "checkpoints"
    for step in CheckpointManager(folder).steps():
        snapshots[step] = restore_params(folder, snapshots[0], step=step, name="learner/params")[1]
    return snapshots


# Round robin ---------------------------------------------------------------------------------------


def round_robin(
    options: Options, game: games.Game, config: alphazero.Config, snapshots: dict[int, Params]
) -> tuple[list[Agent], np.ndarray]:
    """Every pair of agents plays every opening twice; points [agents, agents], half a point for a draw.

    Pairs that an interrupted round robin has played are read from `matches.json`.
    """
    agents = [Agent(None, 0)]
    agents += [Agent(step, count) for count in (0, options.play_simulations) for step in sorted(snapshots)]
    _, apply = alphazero.make_network(config, game)
    opening_key, match_key = jax.random.split(jax.random.key(options.run.seed + 1))
    plies = jnp.full(options.openings, options.opening_plies)
    openings = games.random_openings(game, opening_key, plies)

    def player(agent: Agent, params: Params) -> games.ChooseFn:
        if agent.iteration is None:
            return games.random_choice(game)
        return alphazero.make_player(
            game,
            apply,
            params,
            num_simulations=agent.num_simulations,
            max_num_considered_actions=options.max_num_considered_actions,
        )

    programs: dict[Any, Callable[..., jax.Array]] = {}

    def points(ours: Agent, theirs: Agent, number: int) -> float:
        kinds = tuple((agent.iteration is None, agent.num_simulations) for agent in (ours, theirs))
        if kinds not in programs:
            programs[kinds] = jax.jit(
                lambda a, b, key: games.play_match(game, player(ours, a), player(theirs, b), openings, key)
            )
        params = [snapshots[agent.iteration or 0] for agent in (ours, theirs)]
        return float(jnp.sum(programs[kinds](*params, jax.random.fold_in(match_key, number)) + 1) / 2)

    path = options.run.out / "matches.json"
    played = files.read_json(path, otherwise={})
    table, pairs = np.zeros((len(agents),) * 2), list(itertools.combinations(range(len(agents)), 2))
    with Progress("round robin", len(pairs), quiet=options.run.quiet) as progress:
        for number, (i, j) in enumerate(pairs):
            name = f"{agents[i].name} - {agents[j].name}"
            if name not in played:
                played[name] = points(agents[i], agents[j], number)
                files.write_json(path, played)
            table[i, j], table[j, i] = played[name], 2 * options.openings - played[name]
            progress.update(number + 1)
    return agents, table


def lost_lines(
    game: games.LineGame, config: alphazero.Config, snapshots: dict[int, Params], agents: Sequence[Agent]
) -> list[dict[str, Any]]:
    """For each agent, the lines of play it loses against every reply, and its share of best moves."""
    values = games.solve(game)
    boards = [board for board in values if not games.is_over(game, board)]
    count = len(boards)
    stones = jnp.asarray(boards, jnp.int8).reshape(count, game.rows, game.columns)
    nobody = jnp.zeros(count, jnp.int8)
    positions = games.Position(stones, jnp.ones(count, jnp.int8), nobody, jnp.zeros(count, bool))
    _, apply = alphazero.make_network(config, game)

    def choices(params: Params, num_simulations: int) -> jax.Array:
        choose = alphazero.make_player(game, apply, params, num_simulations=num_simulations)
        return choose(positions, jax.random.key(0))

    compiled = jax.jit(choices, static_argnums=1)
    found = []
    for agent in agents:
        if agent.iteration is None:
            continue
        chosen = np.asarray(compiled(snapshots[agent.iteration], agent.num_simulations))
        policy = dict(zip(boards, chosen.tolist(), strict=True))
        best = [policy[board] in games.best_moves(game, values, board) for board in boards]
        lost = [games.losing_lines(game, values, policy.__getitem__, first=first) for first in (True, False)]
        found.append({"agent": agent.name, "lost_first": lost[0], "lost_second": lost[1]})
        found[-1]["best_moves"] = float(np.mean(best))
    return found


# What comes out ------------------------------------------------------------------------------------


def plot(path: Path, agents: Sequence[Agent], elo: np.ndarray, error: np.ndarray, title: str) -> None:
    """Elo over training, with and without search."""
    with picture(path, 1, 1, height=3.2) as (axes,):
        lines = {}
        for count in sorted({agent.num_simulations for agent in agents if agent.iteration is not None}):
            rows = [k for k, a in enumerate(agents) if a.iteration is not None and a.num_simulations == count]
            steps = [agents[row].iteration or 0 for row in rows]
            drawn = axes.errorbar(steps, elo[rows], yerr=1.96 * error[rows], marker="o", capsize=3)
            lines[f"search, {count} simulations" if count else "network alone"] = drawn.lines[0]
        axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel="steps of training", ylabel="Elo, 0 = random player", title=title)
        axes.margins(x=0.02)
        name_ends(axes, lines)


def run(options: Options) -> None:
    """Trains, lets the agents meet, and writes what came out."""
    option_checks.check(options, options.run, "alphazero")
    if min(options.num_simulations, options.play_simulations, options.games, options.openings) < 1:
        raise UserError(
            "--num-simulations, --play-simulations, --games and --openings are 1 or more: raise them"
        )
    if -(-options.run.num_steps // options.run.save_every) > options.run.max_to_keep:
        raise UserError(
            f"--max-to-keep {options.run.max_to_keep} would remove checkpoints that the Elo curve needs: "
            "raise it, or --save-every"
        )
    game = find_game(options.game)
    config = make_config(options, game)
    describe_run(options.run.out, option_checks.to_json(options), stage="alphazero")
    snapshots = train(options, game, config)
    agents, table = round_robin(options, game, config, snapshots)
    ratings = bradley_terry_ratings(table)
    results: dict[str, Any] = {
        "game": options.game,
        "agents": [
            {
                "agent": a.name,
                "iteration": a.iteration,
                "simulations": a.num_simulations,
                "elo": e,
                "error": s,
            }
            for a, e, s in zip(agents, ratings.elo.tolist(), ratings.error.tolist(), strict=True)
        ],
        "points": table.tolist(),
        "games_a_pair": 2 * options.openings,
    }
    if options.game in SOLVED:
        results["against_every_reply"] = lost_lines(GAMES[options.game], config, snapshots, agents)
    files.write_json(options.run.out / "results.json", results)
    plot(options.run.out / "elo.svg", agents, ratings.elo, ratings.error, options.game)
    if not options.run.quiet:
        show(results)
    edges.finish(options.run, kind="other")


def show(results: dict[str, Any]) -> None:
    """Prints the ratings, and what the exact solution says."""
    lost = {row["agent"]: row for row in results.get("against_every_reply", [])}
    columns = ["agent", "Elo", "standard error"]
    columns += ["lines lost, first", "lines lost, second", "best moves"] if lost else []
    rows = []
    for agent in results["agents"]:
        row = lost.get(agent["agent"])
        told = [row["lost_first"], row["lost_second"], f"{row['best_moves']:.1%}"] if row else [None] * 3
        rows.append([agent["agent"], f"{agent['elo']:.0f}", f"{agent['error']:.0f}", *(told if lost else [])])
    final_table(f"{results['game']}: {results['games_a_pair']} games a pair", columns, rows)
