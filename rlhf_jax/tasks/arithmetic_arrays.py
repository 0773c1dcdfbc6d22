"""The embedded task in traceable form: problems and verdicts as arrays, so that a whole run can be jitted.

The same index gives the same problem, and the same tokens, as `arithmetic` and the chat template do.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.masks import last_unmasked_index
from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.examples import ANSWER_MARK
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.tasks.arithmetic import (
    BLOCK,
    Level,
    Problem,
    Split,
    heldout_slot,
    num_problems,
    widest_completion,
)

_LINE_START = f"\n{ANSWER_MARK} "
_INT32_DIGITS = 10
_NO_CHARACTER = -1


@dataclasses.dataclass(frozen=True, eq=False)
class ArithmeticTask:
    """A level together with a tokenizer. Its arrays are constants of the program that uses them.

    Attributes:
      level: which problems.
      prefix: ids of the chat prompt before the problem.
      suffix: ids of `=?` and of the chat prompt after it.
      character_ids: id of each ASCII character that problems are written in, 0 elsewhere.
      token_texts: [V, L] code points of each token's text, -1 beyond its end; special tokens have none.
      pad_id: fills prompts on the left.
      eos_id: ends a completion.
      completion_length: tokens of the longest solution, the end-of-sequence token included.
    """

    level: Level
    prefix: np.ndarray
    suffix: np.ndarray
    character_ids: np.ndarray
    token_texts: np.ndarray
    pad_id: int
    eos_id: int
    completion_length: int

    @property
    def prompt_length(self) -> int:
        """P: tokens of the longest prompt."""
        digits = len(str(self.level.high))
        return len(self.prefix) + self.level.operands * (digits + 1) - 1 + len(self.suffix)

    def sample(
        self, key: PRNGKeyArray, split: Split, batch: int
    ) -> tuple[Int[Array, "B P"], Bool[Array, "B P"], Int[Array, " B"]]:
        """Draws problems of a split uniformly, with replacement; see `prompts`."""
        indices = jax.random.randint(key, (batch,), 0, num_problems(self.level, split))
        return self.prompts(indices, split)

    def prompts(
        self, indices: Int[Array, " B"], split: Split
    ) -> tuple[Int[Array, "B P"], Bool[Array, "B P"], Int[Array, " B"]]:
        """Problems of a split by their index.

        Returns:
          (tokens, mask, answers): chat prompts, left-padded; which of the tokens are theirs; true answers.
        """
        operands, signs = _problems(self.level, indices, split)
        answers = operands[:, 0] + jnp.sum(signs * operands[:, 1:], axis=1)
        body, is_there = self._problem_tokens(operands, signs)
        tokens = jnp.concatenate([_rows(self.prefix, indices), body, _rows(self.suffix, indices)], axis=1)
        mask = jnp.concatenate(
            [_rows(self.prefix >= 0, indices), is_there, _rows(self.suffix >= 0, indices)], axis=1
        )
        # Stable, so what is there keeps its order and all that is not moves to the left.
        order = jnp.argsort(mask, axis=1, stable=True)
        tokens = jnp.take_along_axis(jnp.where(mask, tokens, self.pad_id), order, axis=1)
        return tokens, jnp.take_along_axis(mask, order, axis=1), answers

    def verify(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], answers: Int[Array, " B"]
    ) -> Float[Array, " B"]:
        """1 where the text of a completion passes `rewards.verifiers.exact_answer`, else 0.

        Works on the characters of the tokens, so it does not matter which tokens spell the answer.

        Args:
          tokens: completions, or whole sequences.
          mask: tokens of the completion, its end-of-sequence token included.
        """
        texts = jnp.where(mask[..., None], jnp.asarray(self.token_texts)[tokens], _NO_CHARACTER)
        is_there = texts != _NO_CHARACTER
        lengths = jnp.sum(is_there, axis=-1)
        through = jnp.cumsum(lengths, axis=1)
        total = through[:, -1]
        # Characters of the whole completion that stand behind each character.
        behind = (total[:, None] - through + lengths)[..., None] - 1 - jnp.arange(texts.shape[-1])
        expected, line_length = _answer_lines(answers)
        nearest = jnp.clip(behind, 0, expected.shape[1] - 1)
        wanted = jnp.take_along_axis(expected[:, None], nearest, axis=2)
        in_line = is_there & (behind < line_length[:, None, None])
        is_answer = jnp.all(~in_line | (texts == wanted), axis=(1, 2))
        # All four marks also mean that nothing of the line is missing, but for the newline of an only line.
        is_marked_once = jnp.sum(texts == ord(ANSWER_MARK[0]), axis=(1, 2)) == len(ANSWER_MARK)
        last = jnp.take_along_axis(tokens, last_unmasked_index(mask)[:, None], axis=1)[:, 0]
        is_finished = (last == self.eos_id) & jnp.any(mask, axis=1)
        return (is_answer & is_marked_once & is_finished).astype(jnp.float32)

    def _problem_tokens(
        self, operands: Int[Array, "B K"], signs: Int[Array, "B J"]
    ) -> tuple[Int[Array, "B W"], Bool[Array, "B W"]]:
        """Ids of `7+8+6`, in columns wide enough for the longest numbers, and which columns are used."""
        digits, used = _digits(operands, len(str(self.level.high)))
        numbers = ord("0") + digits[..., ::-1]
        operators = jnp.where(signs > 0, ord("+"), ord("-"))
        operators = jnp.pad(operators, ((0, 0), (1, 0)))[..., None]  # none before the first number
        characters = jnp.concatenate([operators, numbers], axis=2).reshape(len(operands), -1)[:, 1:]
        used = jnp.pad(used[..., ::-1], ((0, 0), (0, 0), (1, 0)), constant_values=True)
        return jnp.asarray(self.character_ids)[characters], used.reshape(len(operands), -1)[:, 1:]


def make_task(level: Level, tokenizer: Tokenizer) -> ArithmeticTask:
    """Reads off a tokenizer, and its chat template, how problems of a level are written.

    Raises:
      UserError: the tokenizer does not write every character of a problem as one token.
    """
    characters = "".join(sorted(set("0123456789=?" + level.operators)))
    ids = {character: tokenizer.encode(character) for character in characters}
    sample = Problem(
        (90123, 45678) + (level.high,) * (level.operands - 2), level.operators[0] * (level.operands - 1)
    )
    body = [index for character in sample.text for index in ids[character]]
    prompt = encode_prompt(tokenizer, sample.text)
    places = [start for start in range(len(prompt)) if prompt[start : start + len(body)] == body]
    if any(len(found) != 1 for found in ids.values()) or len(places) != 1:
        raise UserError(
            "the arithmetic task needs a tokenizer that writes each digit and sign as one token, such as "
            "rlhf_jax.tasks.arithmetic.arithmetic_tokenizer()"
        )
    start, end = places[0], places[0] + len(body)
    character_ids = np.zeros(128, np.int32)
    character_ids[[ord(character) for character in characters]] = [
        ids[character][0] for character in characters
    ]
    return ArithmeticTask(
        level=level,
        prefix=np.asarray(prompt[:start], np.int32),
        suffix=np.asarray(prompt[end - len("=?") :], np.int32),
        character_ids=character_ids,
        token_texts=_token_texts(tokenizer),
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        completion_length=len(tokenizer.encode(widest_completion(level))) + 1,
    )


def _token_texts(tokenizer: Tokenizer) -> np.ndarray:
    """[V, L] code points of the text of each token, padded with -1."""
    texts = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
    table = np.full((len(texts), max(map(len, texts))), _NO_CHARACTER, np.int32)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = [ord(character) for character in text]
    return table


def _problems(
    level: Level, indices: Int[Array, " B"], split: Split
) -> tuple[Int[Array, "B K"], Int[Array, "B J"]]:
    """Operands and signs (+1, -1) of problems; the arithmetic of `level_index` and `problem`."""
    if split == "heldout":
        rest = BLOCK * indices + _heldout_slots(indices)
    else:
        block, slot = jnp.divmod(indices, BLOCK - 1)
        is_behind = (block < level.size // BLOCK) & (slot >= _heldout_slots(block))
        rest = BLOCK * block + slot + is_behind
    signs, numbers = [], []
    for _ in range(level.operands - 1):
        rest, digit = jnp.divmod(rest, len(level.operators))
        signs.append(jnp.asarray([1 if sign == "+" else -1 for sign in level.operators])[digit])
    for _ in range(level.operands):
        rest, digit = jnp.divmod(rest, level.high - level.low + 1)
        numbers.append(level.low + digit)
    return jnp.stack(numbers[::-1], axis=1), jnp.stack(signs[::-1], axis=1)


def _heldout_slots(blocks: Int[Array, " B"]) -> Int[Array, " B"]:
    return heldout_slot(blocks.astype(jnp.uint32)).astype(blocks.dtype)


def _digits(numbers: Int[Array, "*S"], width: int) -> tuple[Int[Array, "*S W"], Bool[Array, "*S W"]]:
    """Decimal digits of non-negative numbers, units first, and which of them are written."""
    powers = jnp.asarray([10**place for place in range(width)], numbers.dtype)
    digits = numbers[..., None] // powers % 10
    return digits, (numbers[..., None] >= powers) | (jnp.arange(width) == 0)


def _answer_lines(answers: Int[Array, " B"]) -> tuple[Int[Array, "B W"], Int[Array, " B"]]:
    """Code points of `\\n#### answer` from its last character backwards, and how many they are."""
    digits, used = _digits(jnp.abs(answers), _INT32_DIGITS)
    num_digits = jnp.sum(used, axis=1)[:, None]
    is_negative = answers[:, None] < 0
    start = np.asarray([ord(character) for character in reversed(_LINE_START)])
    place = jnp.arange(_INT32_DIGITS + 1 + len(start))
    behind_start = jnp.clip(place - num_digits - is_negative, 0, len(start) - 1)
    line = jnp.where(is_negative & (place == num_digits), ord("-"), jnp.asarray(start)[behind_start])
    padded = jnp.pad(ord("0") + digits, ((0, 0), (0, 1 + len(start))))
    line = jnp.where(place < num_digits, padded, line)
    return line, num_digits[:, 0] + is_negative[:, 0] + len(start)


def _rows(values: np.ndarray, like: Int[Array, " B"]) -> Array:
    return jnp.broadcast_to(values, (len(like), len(values)))
