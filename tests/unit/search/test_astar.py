"""A*: grids and the 8-puzzle, against breadth-first search and Bellman-Ford in plain Python."""

import collections
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.search.astar import a_star, route_states

SIZE = 12
MOVES = jnp.array([[-1, 0], [1, 0], [0, -1], [0, 1]])


def make_successors(prices):
    """Moves on a grid; to enter a cell costs its price, and an infinite one is a wall."""

    def successors(state):
        cells = jnp.stack([state // SIZE, state % SIZE]) + MOVES
        inside = jnp.all((cells >= 0) & (cells < SIZE), axis=1)
        states = jnp.where(inside, cells[:, 0] * SIZE + cells[:, 1], 0)
        price = prices.reshape(-1)[states]
        return states, price, inside & jnp.isfinite(price)

    return successors


def manhattan(goal):
    def heuristic(states):
        return (abs(states // SIZE - goal // SIZE) + abs(states % SIZE - goal % SIZE)).astype(float)

    return heuristic


def true_costs(prices):
    """Bellman-Ford from cell 0."""
    cost = np.full((SIZE, SIZE), np.inf)
    cost[0, 0] = 0
    for _ in range(SIZE * SIZE):
        padded = np.pad(cost, 1, constant_values=np.inf)
        nearest = np.minimum.reduce(
            [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        )
        cost = np.minimum(cost, nearest + prices)
    return cost


def test_grids_with_walls_and_prices():
    rng = np.random.default_rng(0)
    prices = rng.integers(1, 5, (20, SIZE, SIZE)).astype(np.float32)
    prices[rng.random(prices.shape) < 0.3] = np.inf
    prices[:, 0, 0] = prices[:, -1, -1] = 1
    goal = SIZE * SIZE - 1

    def solve(heuristic):
        def one(prices):
            return a_star(make_successors(prices), heuristic, 0, goal, num_states=SIZE * SIZE)

        return jax.jit(jax.vmap(one))(jnp.asarray(prices))

    found, blind = solve(manhattan(goal)), solve(lambda states: jnp.zeros(states.shape))
    exact = np.array([true_costs(each)[-1, -1] for each in prices])
    np.testing.assert_allclose(found.cost, exact)
    np.testing.assert_allclose(blind.cost, exact)
    assert np.isfinite(exact).any()
    assert np.isinf(exact).any()
    assert int(found.expanded.sum()) < int(blind.expanded.sum())
    for number, cost in enumerate(exact):
        route = route_states(jax.tree.map(lambda x, k=number: x[k], found), 0, goal)
        assert bool(route) == math.isfinite(cost)
        if route:
            steps = list(itertools.pairwise(route))
            assert all(abs(a // SIZE - b // SIZE) + abs(a % SIZE - b % SIZE) == 1 for a, b in steps)
            assert sum(prices[number].reshape(-1)[b] for _, b in steps) == cost


def test_an_inconsistent_heuristic_opens_states_again():
    """0 -> 1 -> 2 -> 3 is cheap, but 1 looks far from the goal; 2 is first reached by the dear way."""
    table = jnp.array([[1, 2], [2, 2], [3, 3], [3, 3]])
    prices = jnp.array([[1.0, 3.0], [1.0, 1.0], [3.0, 3.0], [0.0, 0.0]])
    there = jnp.array([[True, True], [True, False], [True, False], [False, False]])
    found = a_star(
        lambda s: (table[s], prices[s], there[s]),
        lambda s: jnp.array([0.0, 4.0, 0.0, 0.0])[s],
        0,
        3,
        num_states=4,
    )
    assert float(found.cost) == 5
    assert route_states(found, 0, 3) == [0, 1, 2, 3]
    assert int(found.expanded) == 4  # state 2 twice


# The 8-puzzle ----------------------------------------------------------------------------------------

ORDERS = list(itertools.permutations(range(8)))


def puzzle_tables():
    """States of the 3 x 2 puzzle (blank is 0): successors as a table, by plain Python."""
    boards = list(itertools.permutations(range(6)))
    number = {board: k for k, board in enumerate(boards)}
    table, there = np.zeros((len(boards), 4), int), np.zeros((len(boards), 4), bool)
    for board, k in number.items():
        row, column = divmod(board.index(0), 3)
        for way, (down, right) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
            r, c = row + down, column + right
            if 0 <= r < 2 and 0 <= c < 3:
                swapped = list(board)
                swapped[row * 3 + column], swapped[r * 3 + c] = swapped[r * 3 + c], 0
                table[k, way], there[k, way] = number[tuple(swapped)], True
    return np.array(boards), number, table, there


def test_sliding_puzzle_against_breadth_first_search():
    boards, number, table, there = puzzle_tables()
    goal = number[(1, 2, 3, 4, 5, 0)]
    distance = {goal: 0}
    waiting = collections.deque([goal])
    while waiting:
        state = waiting.popleft()
        for after in table[state][there[state]]:
            if after not in distance:
                distance[int(after)] = distance[state] + 1
                waiting.append(int(after))
    assert len(distance) == 360  # half of the boards

    places = np.argsort(boards, axis=1)  # of each tile
    apart = abs(places // 3 - places[goal] // 3) + abs(places % 3 - places[goal] % 3)
    estimate = jnp.asarray(apart[:, 1:].sum(axis=1), float)
    ways, exist = jnp.asarray(table), jnp.asarray(there)

    def solve(start):
        moves = jnp.ones(4)
        return a_star(
            lambda s: (ways[s], moves, exist[s]), lambda s: estimate[s], start, goal, num_states=720
        )

    starts = np.random.default_rng(0).permutation(720)[:64]
    found = jax.jit(jax.vmap(solve))(jnp.asarray(starts))
    np.testing.assert_array_equal(found.cost, [distance.get(int(start), math.inf) for start in starts])
    hardest = max(distance, key=lambda state: distance[state])
    assert distance[hardest] == 21
    one = jax.jit(solve)(hardest)
    assert float(one.cost) == 21
    assert len(route_states(one, hardest, goal)) == 22
    assert int(one.expanded) < 360
