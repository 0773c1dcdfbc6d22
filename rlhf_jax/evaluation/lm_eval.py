"""A model as the common harness (EleutherAI's lm-evaluation-harness, `pip install lm_eval`) wants it.

`HarnessModel` answers its three kinds of requests on plain texts and needs nothing of it; `lm_eval_model`
gives it the harness's class, and is the only place where lm_eval is imported.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.templates import TemplateError, render
from rlhf_jax.evaluation.likelihood import (
    cut_request,
    make_continuation_fn,
    opening_ids,
    plain_request,
    rolling_requests,
    score_requests,
)
from rlhf_jax.generation import Sampling
from rlhf_jax.models import Policy
from rlhf_jax.rollout.texts import make_answer_texts_fn

_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p")


class HarnessModel:
    """Log-likelihoods and answers of a model, text in and text out.

    Attributes:
      chat: whether texts come from `lay_out`, in which special tokens count as such.
    """

    def __init__(
        self, model: Policy, *, batch_size: int = 16, max_length: int = 2048, max_new_tokens: int = 256
    ) -> None:
        """Args: longer contexts than `max_length` tokens lose their beginning, as the harness has it;
        `max_new_tokens` is what a request that names no limit gets.
        """
        self.chat = False
        self._model, self._batch_size = model, batch_size
        self._max_length, self._max_new_tokens = max_length, max_new_tokens
        self._score = jax.jit(make_continuation_fn(model.make_greedy_match_fn()))

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each (context, continuation) in nats, and whether greedy decoding says it.

        Raises:
          UserError: a continuation is longer than `max_length`.
        """
        requests = [
            plain_request(self._model.tokenizer, *pair, f"request {number}", special=self.chat)
            for number, pair in enumerate(pairs)
        ]
        longest = max((int(request.mask.sum()) for request in requests), default=0)
        if longest >= self._max_length:
            raise UserError(f"{longest} tokens to score do not fit {self._max_length}: raise the length")
        return [(each.logp, each.greedy) for each in self._likelihoods(requests)]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-probability of whole texts in nats, long ones window by window."""
        windows = [rolling_requests(self._model.tokenizer, text, self._max_length) for text in texts]
        scored = iter(self._likelihoods([request for several in windows for request in several]))
        return [sum(next(scored).logp for _ in several) for several in windows]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Answers to (context, options); options are those of the harness: `until`, `max_gen_toks`, ...

        Raises:
          UserError: an option is not known.
        """
        kinds: dict[str, list[int]] = {}
        for place, (_, options) in enumerate(requests):
            kinds.setdefault(repr(sorted(options.items())), []).append(place)
        found = [""] * len(requests)
        for places in kinds.values():
            texts = self._generate([requests[place][0] for place in places], requests[places[0]][1])
            for place, text in zip(places, texts, strict=True):
                found[place] = text
        return found

    def lay_out(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """A conversation by the tokenizer's chat template. From now on special tokens count as such.

        Raises:
          UserError: the template fails.
        """
        self.chat = True
        tokenizer = self._model.tokenizer
        variables = {**tokenizer.names, "messages": list(messages), "tools": None, "documents": None}
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            return render(tokenizer.chat_template, [variables], ("", ""))[0]
        except TemplateError as error:
            raise UserError(str(error)) from error

    def _likelihoods(self, requests: Sequence[Any]) -> list[Any]:
        cut = [cut_request(request, self._max_length) for request in requests]
        found: dict[int, Any] = {}
        for batch in score_requests(self._score, self._model.params, cut, batch_size=self._batch_size):
            found |= batch
        return [found[place] for place in range(len(requests))]

    def _generate(self, contexts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        unknown = [name for name in options if name not in _KNOWN]
        if unknown:
            raise UserError(f"generation option {unknown[0]!r} is not known: use {', '.join(_KNOWN)}")
        new = int(options.get("max_gen_toks", self._max_new_tokens))
        until = options.get("until") or ()
        answer = make_answer_texts_fn(
            self._model,
            max_new_tokens=new,
            stop=[until] if isinstance(until, str) else list(until),
            sampling=_sampling(options),
            batch_size=self._batch_size,
        )
        tokenizer = self._model.tokenizer
        prompts = []
        for context in contexts:
            ids = tokenizer.encode(context, special=self.chat)
            whole = [*opening_ids(tokenizer, ids), *ids] or [tokenizer.eos_id]
            prompts.append(whole[-max(self._max_length - new, 1) :])
        found = {place: said for batch in answer(prompts, jax.random.key(0)) for place, said in batch.items()}
        return [found[place].text for place in range(len(prompts))]


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """Greedy unless sampling is asked for, or a temperature given."""
    temperature = float(options.get("temperature", 1.0 if options.get("do_sample") else 0.0))
    if not options.get("do_sample", temperature > 0):
        return Sampling(temperature=0.0)
    filters = {name: options[name] for name in ("top_k", "top_p", "min_p") if options.get(name) is not None}
    return Sampling(temperature=temperature, **filters)


def lm_eval_model(model: Policy, *, name: str, **options: Any) -> Any:
    """`model` as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=..., tasks=[...])`.

    Args:
      name: what the harness calls the tokenizer in its caches.
      options: of `HarnessModel`.

    Raises:
      UserError: lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports] (optional)
    except ImportError as error:
        raise UserError("the harness is not installed: pip install lm_eval") from error
    ours = HarnessModel(model, **options)

    class Adapter(LM):
        """Passes requests on."""

        tokenizer_name = name

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return ours.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return ours.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Any) -> list[str]:
            return ours.generate_until([request.args for request in requests])

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return ours.lay_out(chat_history, add_generation_prompt=add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return model.tokenizer.chat_template

    return Adapter()
