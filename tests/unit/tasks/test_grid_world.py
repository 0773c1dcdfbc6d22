"""The grid world: what moves, what is seen, who succeeds."""

import numpy as np

from rlhf_jax.tasks import grid_world, shapes
from rlhf_jax.tasks.shapes import Scene


def world(agent, target):
    things = [None] * 9
    things[target] = ("red", "ring")
    return grid_world.World(Scene(tuple(things)), agent, target)


def test_moves_are_those_of_a_map_and_end_at_the_edge():
    centre = world(4, 0)
    assert [centre.step(action).agent for action in "nswe"] == [1, 7, 3, 5]
    assert [world(0, 8).step(action).agent for action in "nswe"] == [0, 3, 0, 1]
    assert centre.step("north").agent == 4
    assert centre.best_actions() == ["n", "w"]
    assert world(5, 4).step("w").is_done


def test_the_agent_is_seen_where_it_is():
    rng = np.random.default_rng(0)
    for agent in (1, 4, 8):
        image = grid_world.draw(world(agent, 0), rng)
        black = np.argwhere(image.max(axis=-1) < 30)
        assert {(y // 8) * 3 + x // 8 for y, x in black.tolist()} == {agent}


def test_rows_imitate_steps_towards_the_target_but_for_slips():
    for row in grid_world.rows("train", 100, 0):
        assert row["completion"] in row["actions"]
    away = [
        row["completion"] not in row["actions"] for row in grid_world.rows("train", 300, 0, slip_rate=0.3)
    ]
    assert 0.2 < np.mean(away) < 0.4


def test_the_instruction_alone_leaves_the_action_open():
    found = grid_world.rows("train", 1000, 0)
    for action in grid_world.MOVES:
        assert 0.3 < np.mean([action in row["actions"] for row in found]) < 0.5


def test_who_knows_the_way_succeeds_and_who_stands_still_does_not():
    def know(rows):
        return [row["actions"][0] if row["actions"] else "" for row in rows]

    assert grid_world.success_rate(know, 50, 0) == 1
    assert grid_world.success_rate(lambda rows: ["stay"] * len(rows), 50, 0) == 0


def test_actions_are_rewarded_by_what_they_do():
    assert grid_world.nearer(["", ""], ["n", "w"], actions=[["n", "w"], ["s"]], images=[]) == [1.0, 0.0]


def test_instructions_and_actions_have_tokens():
    tokenizer = shapes.shapes_tokenizer()
    for row in grid_world.rows("train", 30, 0):
        assert tokenizer.decode(tokenizer.encode(row["prompt"])) == row["prompt"]
        assert len(tokenizer.encode(row["completion"])) == 1
