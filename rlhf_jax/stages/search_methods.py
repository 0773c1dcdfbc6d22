"""The searches that `search.py` compares, each as one compiled program over a batch of prompts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Count, PositiveInt
from rlhf_jax.core.types import Array, Params, PRNGKeyArray, Sequences
from rlhf_jax.data.content_parts import refuse_images
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.packing import left_pad
from rlhf_jax.data.process_rewards import STEP_END
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.generation import Sampling, generate
from rlhf_jax.models import Policy, ScalarModel
from rlhf_jax.search import graph, interface, mcts, steps, tree
from rlhf_jax.search.interface import EvaluateFn, ProposeFn, SearchResult


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """Search options; the defaults cost two to sixteen whole samples each.

    Attributes:
      branching_factor: samples of the next step, of beam search, depth-first search and tree search.
      num_votes: samples of each step of breadth-first search with votes.
      beam_width: beams.
      expansions: of depth-first search, at most.
      num_simulations: of tree search, for each step.
      num_thoughts: solutions that the graph of thoughts begins with; an even number.
      refinements: how often it writes doubtful ones anew.
      depth: steps of a solution, at most.
      step_length: tokens of a step, at most.
      value_prompt: a question to the policy about what it has written so far, such as " Is this right?";
        empty for no search by its own answer.
      value_yes: the token that says that it is good, as a text.
      value_no: the token that says that it is not.
    """

    branching_factor: PositiveInt = 4
    num_votes: PositiveInt = 4
    beam_width: PositiveInt = 2
    expansions: PositiveInt = 10
    num_simulations: PositiveInt = 2
    num_thoughts: PositiveInt = 2
    refinements: Count = 1
    depth: PositiveInt = 6
    step_length: PositiveInt = 10
    value_prompt: str = ""
    value_yes: str = " yes"
    value_no: str = " no"


@dataclasses.dataclass(frozen=True)
class Judges:
    """Reward models; None where there is none.

    Attributes:
      process: scores steps.
      outcome: scores finished answers.
    """

    process: ScalarModel | None
    outcome: ScalarModel | None


@dataclasses.dataclass(frozen=True)
class Tools:
    """Parts of a search, for given parameters.

    Attributes:
      propose: (ways) -> candidates of the next step.
      process: value by the process reward model.
      outcome: value of finished answers by the outcome reward model.
      step_logits: of the process reward model.
      prompted: value by what the policy answers to the value prompt; None where there is none.
      end_ids: tokens that end a step.
    """

    propose: Callable[[int], ProposeFn]
    process: EvaluateFn
    outcome: EvaluateFn
    step_logits: steps.StepLogitsFn
    prompted: EvaluateFn | None
    end_ids: list[int]


SearchFn = Callable[[SearchOptions, Tools, steps.Solution, PRNGKeyArray], SearchResult]


def beam(options: SearchOptions, tools: Tools, roots: steps.Solution, key: PRNGKeyArray) -> SearchResult:
    """Step beam search by the process reward model."""
    judge = tree.value_scorer(tools.process)
    propose = tools.propose(options.branching_factor)
    return tree.breadth_first(
        propose, judge, steps.is_done, roots, key, beam_width=options.beam_width, depth=options.depth
    )


def tree_vote(options: SearchOptions, tools: Tools, roots: steps.Solution, key: PRNGKeyArray) -> SearchResult:
    """Tree of thoughts, breadth first: the step that most samples agree on. No reward model."""
    propose = tools.propose(options.num_votes)
    return tree.breadth_first(
        propose, tree.vote_scorer, steps.is_done, roots, key, beam_width=1, depth=options.depth
    )


def tree_prompted(
    options: SearchOptions, tools: Tools, roots: steps.Solution, key: PRNGKeyArray
) -> SearchResult:
    """Tree of thoughts, breadth first, by what the policy says of its own steps. No reward model."""
    assert tools.prompted is not None
    judge = tree.value_scorer(tools.prompted)
    propose = tools.propose(options.branching_factor)
    return tree.breadth_first(
        propose, judge, steps.is_done, roots, key, beam_width=options.beam_width, depth=options.depth
    )


def tree_depth(
    options: SearchOptions, tools: Tools, roots: steps.Solution, key: PRNGKeyArray
) -> SearchResult:
    """Tree of thoughts, depth first, back from steps that the process reward model doubts."""
    return tree.depth_first(
        tools.propose(options.branching_factor),
        tools.process,
        steps.is_done,
        roots,
        key,
        expansions=options.expansions,
        threshold=0.5,
        accept=0.5,
    )


def graph_thoughts(
    options: SearchOptions, tools: Tools, roots: steps.Solution, key: PRNGKeyArray
) -> SearchResult:
    """Graph of thoughts: several solutions, doubtful ones written anew, neighbours merged, the best kept."""
    keys = jax.random.split(key, 3)
    propose = tools.propose(1)

    def split(state: steps.Solution, key: PRNGKeyArray) -> tuple[steps.Solution, Array]:
        many = jax.tree.map(lambda x: x.repeat(options.num_thoughts, axis=0), state)
        ends, cost = interface.follow(propose, steps.is_done, many, key, steps=options.depth)
        shape = (len(state.length), options.num_thoughts)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), ends), cost.reshape(shape).sum(axis=1)

    parts = (propose, tools.step_logits, tools.end_ids)
    rewrite = steps.make_rewrite_fn(*parts, depth=options.depth)
    join = steps.make_join_fn(*parts, depth=options.depth)
    thoughts = graph.branch(split, tools.process, roots, keys[0])
    thoughts = graph.refine(rewrite, tools.process, thoughts, keys[1], rounds=options.refinements)
    thoughts = graph.merge(join, tools.process, thoughts, keys[2], size=2)
    best = graph.keep_best(thoughts, count=1)
    state = jax.tree.map(lambda x: x[:, 0], best.states)
    return SearchResult(state, best.values[:, 0], state.done, best.cost)


def tree_search(
    options: SearchOptions, tools: Tools, roots: steps.Solution, key: PRNGKeyArray
) -> SearchResult:
    """Monte Carlo tree search with values by the process reward model."""
    return mcts.monte_carlo_tree_search(
        tools.propose(options.branching_factor),
        tools.process,
        steps.is_done,
        roots,
        key,
        num_simulations=options.num_simulations,
        depth=options.depth,
    )


def tree_search_rollouts(
    options: SearchOptions, tools: Tools, roots: steps.Solution, key: PRNGKeyArray
) -> SearchResult:
    """Monte Carlo tree search with values by one rollout each, which the outcome reward model judges."""
    evaluate = interface.make_rollout_fn(tools.propose(1), tools.outcome, steps.is_done, steps=options.depth)
    return mcts.monte_carlo_tree_search(
        tools.propose(options.branching_factor),
        evaluate,
        steps.is_done,
        roots,
        key,
        num_simulations=options.num_simulations,
        depth=options.depth,
    )


METHODS: dict[str, tuple[SearchFn, str]] = {
    "tree of thoughts, votes": (tree_vote, ""),
    "tree of thoughts, value prompt": (tree_prompted, "value_prompt"),
    "beam, process reward": (beam, "process_reward"),
    "tree of thoughts, depth first": (tree_depth, "process_reward"),
    "graph of thoughts": (graph_thoughts, "process_reward"),
    "MCTS, process reward": (tree_search, "process_reward"),
    "MCTS, rollouts": (tree_search_rollouts, "outcome_reward"),
}
"""Search, and the option that it needs."""


def single_token(tokenizer: Tokenizer, text: str, flag: str) -> int:
    """The token that is this text.

    Raises:
      UserError: the tokenizer writes it with another number of tokens.
    """
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise UserError(f"{flag} {text!r} is {len(ids)} tokens for the policy: give one that is one")
    return ids[0]


def make_prompted_value(options: SearchOptions, policy: Policy, params: Params) -> EvaluateFn | None:
    """Value by the policy's answer to the value prompt; None where there is no prompt."""
    if not options.value_prompt:
        return None
    tokenizer, prefill = policy.tokenizer, policy.prefill

    def next_logits(texts: Sequences) -> Array:
        width = texts.tokens.shape[-1]
        rows = jax.tree.map(lambda x: x.reshape(-1, width), texts)
        logits, _ = prefill(params, rows.tokens, rows.positions, rows.segment_ids, width)
        return logits.reshape(*texts.tokens.shape[:-1], -1)

    return steps.make_prompted_value_fn(
        next_logits,
        tokenizer.encode(options.value_prompt),
        yes=single_token(tokenizer, options.value_yes, "--search.value-yes"),
        no=single_token(tokenizer, options.value_no, "--search.value-no"),
    )


def make_run(
    search: SearchFn,
    options: SearchOptions,
    policy: Policy,
    judges: Judges,
    *,
    temperature: float,
    prompt_length: int,
    max_new_tokens: int,
) -> Callable[[Sequence[PromptExample], PRNGKeyArray], tuple[list[str], np.ndarray, np.ndarray]]:
    """`run(prompts, key) -> (texts, finished, tokens)`, compiled once for each number of prompts."""
    tokenizer = policy.tokenizer
    end_ids = step_end_ids(tokenizer)
    prefill, decode = policy.prefill, policy.decode
    params: dict[str, Params] = {"policy": policy.params}
    params |= {
        name: judge.params
        for name, judge in (("process", judges.process), ("outcome", judges.outcome))
        if judge
    }

    def program(params: dict[str, Params], tokens: Array, mask: Array, key: PRNGKeyArray) -> Any:
        def sample(tokens: Array, mask: Array, key: PRNGKeyArray):
            return generate(
                prefill,
                decode,
                params["policy"],
                tokens,
                mask,
                key,
                max_new_tokens=options.step_length,
                eos_id=end_ids[0],
                pad_id=tokenizer.pad_id,
                sampling=Sampling(temperature=temperature),
            )

        def propose(branching_factor: int) -> ProposeFn:
            return steps.make_propose_fn(
                sample,
                branching_factor=branching_factor,
                step_length=options.step_length,
                end_ids=end_ids,
                eos_id=tokenizer.eos_id,
            )

        def scores(name: str, judge: ScalarModel | None) -> steps.StepLogitsFn:
            score = (judge.body if judge else policy).make_process_reward_fn()
            return lambda sequences: score(params[name], sequences)

        process = scores("process", judges.process)
        outcome = steps.make_outcome_value_fn(scores("outcome", judges.outcome))
        value = steps.make_process_value_fn(process, end_ids=end_ids)
        prompted = make_prompted_value(options, policy, params["policy"])
        tools = Tools(propose, value, outcome, process, prompted, end_ids)
        roots = steps.init_solution(tokens, mask, room=max_new_tokens)
        found = search(options, tools, roots, key)
        return found.states, steps.solution_mask(found.states), found.cost

    compiled = jax.jit(program)

    def run(prompts: Sequence[PromptExample], key: PRNGKeyArray) -> tuple[list[str], np.ndarray, np.ndarray]:
        refuse_images(prompts, "search")
        ids, mask = left_pad([prompt.ids for prompt in prompts], prompt_length, pad_id=tokenizer.pad_id)
        states, written, cost = jax.device_get(compiled(params, ids, mask, key))
        rows = zip(states.tokens, written, strict=True)
        texts = [tokenizer.decode(row[kept].tolist()) for row, kept in rows]
        return texts, states.done & ~states.failed, cost

    return run


def step_end_ids(tokenizer: Tokenizer) -> list[int]:
    """The token that ends a step.

    Raises:
      UserError: the tokenizer has no token for a new line alone.
    """
    ids = tokenizer.encode(STEP_END)
    if len(ids) != 1:
        raise UserError(
            f"the policy's tokenizer writes a new line as {len(ids)} tokens, and steps end with one: "
            "use a policy whose tokenizer has a token for it"
        )
    return ids
