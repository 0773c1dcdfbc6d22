"""Recurrent layers: one state a row, carried from token to token.

    rnn    h' = tanh(x W + b + h U)
    gru    r = sigma(x W_r + b_r + h U_r),   z = sigma(x W_z + b_z + h U_z)
           n = tanh(x W_n + b_n + r (h U_n + c)),   h' = (1 - z) n + z h
    lstm   i, f, o = sigma(x W + b + h U),   g = tanh(x W_g + b_g + h U_g)
           c' = f c + i g,   h' = o tanh(c')

A token at position 0 begins with a state of zeros, so samples packed in a row do not see each other; padding
leaves the state as it is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.types import Array, Bool, Float
from rlhf_jax.models.attention.backends import AttentionContext
from rlhf_jax.models.config import AttentionBackend, Cell, Recurrence
from rlhf_jax.models.layers import Linear

State = tuple[Float[Array, "B H"], ...]
"""(h,), or (h, c) of an LSTM."""

GATES = {"rnn": 1, "gru": 3, "lstm": 4}


class RecurrentLayer(nn.Module):
    """Runs one cell over the tokens of every row: all products with W at once, those with U in turn."""

    spec: Recurrence
    width: int
    output_std: float
    backend: AttentionBackend  # of attention: there is one way to run a cell
    param_dtype: Any
    dtype: Any

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B T D"], context: AttentionContext, cache: State | None
    ) -> tuple[Float[Array, "B T D"], State | None]:
        """Returns the states after each token, and with a cache the last one, which it is to keep."""
        cell, hidden = self.spec.cell, self.spec.hidden_size
        std = hidden**-0.5
        shape = (hidden, GATES[cell] * hidden)
        linear = Linear(
            shape[1],
            use_bias=True,
            init_std=inputs.shape[-1] ** -0.5,
            param_dtype=self.param_dtype,
            dtype=self.dtype,
            name="input",
        )
        recurrent = self.param("recurrent", nn.initializers.normal(std), shape, self.param_dtype)
        from_input = linear(inputs)
        step = STEPS[cell]
        offset = jnp.zeros((), self.dtype)
        if cell == "gru":
            bias = self.param("new_bias", nn.initializers.zeros, (hidden,), self.param_dtype)
            offset = bias.astype(self.dtype)
        if cell == "lstm":
            # A fresh cell remembers: its forget gate begins at sigma(1) (Jozefowicz et al. 2015).
            offset = jnp.ones((), self.dtype)
        zeros = jnp.zeros((inputs.shape[0], hidden), self.dtype)
        begin = (zeros,) * (2 if cell == "lstm" else 1) if cache is None else cache
        state, outputs = run_cell(
            step,
            from_input,
            recurrent.astype(self.dtype),
            offset,
            begin,
            context.present,
            context.present & (context.positions == 0),
        )
        if hidden != self.width:
            project = Linear(
                self.width,
                init_std=self.output_std,
                param_dtype=self.param_dtype,
                dtype=self.dtype,
                name="output",
            )
            outputs = project(outputs)
        return outputs, None if cache is None else state


Step = Callable[[Array, Array, Array, State], State]


def run_cell(
    step: Step,
    from_input: Float[Array, "B T G"],
    recurrent: Float[Array, "H G"],
    offset: Array,
    state: State,
    present: Bool[Array, "B T"],
    first: Bool[Array, "B T"],
) -> tuple[State, Float[Array, "B T H"]]:
    """The states after the last token, and the outputs h of all."""

    def advance(state: State, inputs: tuple[Array, ...]) -> tuple[State, Array]:
        gates, is_present, is_first = inputs
        begun = tuple(jnp.where(is_first[:, None], 0, part) for part in state)
        new = step(gates, recurrent, offset, begun)
        kept = tuple(jnp.where(is_present[:, None], a, b) for a, b in zip(new, state, strict=True))
        return kept, kept[0]

    over_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (from_input, present, first))
    state, outputs = jax.lax.scan(advance, state, over_time)
    return state, jnp.swapaxes(outputs, 0, 1)


def _rnn(gates: Array, recurrent: Array, offset: Array, state: State) -> State:
    del offset
    return (jnp.tanh(gates + state[0] @ recurrent),)


def _gru(gates: Array, recurrent: Array, offset: Array, state: State) -> State:
    (hidden,) = state
    of_input, of_state = jnp.split(gates, 3, axis=-1), jnp.split(hidden @ recurrent, 3, axis=-1)
    reset, update = (jax.nn.sigmoid(a + b) for a, b in zip(of_input[:2], of_state[:2], strict=True))
    new = jnp.tanh(of_input[2] + reset * (of_state[2] + offset))
    return ((1 - update) * new + update * hidden,)


def _lstm(gates: Array, recurrent: Array, offset: Array, state: State) -> State:
    hidden, memory = state
    enter, forget, new, leave = jnp.split(gates + hidden @ recurrent, 4, axis=-1)
    memory = jax.nn.sigmoid(forget + offset) * memory + jax.nn.sigmoid(enter) * jnp.tanh(new)
    return jax.nn.sigmoid(leave) * jnp.tanh(memory), memory


STEPS: dict[Cell, Step] = {"rnn": _rnn, "gru": _gru, "lstm": _lstm}
