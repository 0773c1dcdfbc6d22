"""Our engine and one behind a real HTTP server, which answers with the same model."""

import contextlib
import functools
import http.server
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.tokenizers import character_tokenizer
from rlhf_jax.models import hf
from rlhf_jax.rollout.engines import HTTPEngine, HTTPOptions, LocalEngine, publish_from_disk, sampler_mismatch
from rlhf_jax.rollout.sampler import make_generate_fn

TOKENIZER = character_tokenizer("0123456789+=")
CONFIG = models.dense_config(vocab_size=TOKENIZER.vocab_size, width=8, num_layers=1, num_heads=2)
PROMPTS = [
    PromptExample(np.array(TOKENIZER.encode(text), np.int32), text, {}, "a:1")
    for text in ("1+2=", "7=", "12+13=", "4+4=", "5=")
]
PROMPT, NEW = 6, 5


SCORE = jax.jit(models.make_score_fn(CONFIG))


@functools.cache
def policy(seed):
    params = models.init_params(CONFIG, jax.random.key(seed))
    return jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params)


@functools.cache
def sampler():
    return make_generate_fn(CONFIG, TOKENIZER, prompt_length=PROMPT, max_new_tokens=NEW)


class Server(http.server.ThreadingHTTPServer):
    """Serves the policy of `params`; the first of `faults` to come say what goes wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.params, self.faults, self.requests, self.lock = policy(0), [], [], threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def options(self, **more):
        return HTTPOptions(
            f"http://127.0.0.1:{self.server_port}", backoff=0.01, prompts_per_request=2, connections=2, **more
        )


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            fault = self.server.faults.pop(0) if self.server.faults else None
        if self.path == "/update_weights_from_disk":
            self.server.params = hf.load(body["model_path"])[1]
            return self.answer({"success": True})
        if fault == "busy":
            return self.answer({"error": "busy"}, 503)
        if fault == "unknown":
            return self.answer({"error": "no such model"}, 404)
        if fault == "torn":
            return self.answer(None)
        if fault == "slow":
            threading.Event().wait(0.6)
        reply = {"choices": self.choices(body)[::-1]}
        if fault == "fewer":
            reply["choices"].pop()
        if fault == "text only":
            reply["choices"] = [{"index": 0, "text": "4"}, {"index": 1, "text": "4"}]
        if fault == "other ids":
            reply["choices"][0]["token_ids"][0] = 99
        return self.answer(reply)

    def choices(self, body):
        prompts = [PromptExample(np.array(ids, np.int32), "", {}, "") for ids in body["prompt"]]
        kept = len(prompts)
        prompts += [prompts[-1]] * (len(PROMPTS) - kept)  # one shape for every request, and for ours
        with self.server.lock:
            rollout = sampler()(self.server.params, prompts, jax.random.key(body["seed"]))
        found = []
        for index in range(kept):
            mask = np.asarray(rollout.sequences.mask[index])
            ids = np.asarray(rollout.sequences.tokens[index])[mask].tolist()
            logp = np.asarray(rollout.logp[index])[mask].tolist()
            tokens = [f"token_id:{token}" for token in ids]
            choice = {"index": index, "logprobs": {"token_logprobs": logp, "tokens": tokens}}
            found.append(choice | ({"token_ids": ids} if index else {}))
        return found

    def answer(self, reply, status=200):
        data = b'{"choices": [' if reply is None else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have given up
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def running():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running):
    running.faults, running.requests, running.params = [], [], policy(0)
    return running


def engine(server, publish=lambda params, version: None, **more):
    options = server.options(**more)
    made = HTTPEngine(options, TOKENIZER, prompt_length=PROMPT, max_new_tokens=NEW, publish=publish)
    made.update_params(policy(0), 1)
    return made


def test_answers_of_the_server_are_a_rollout_that_rescores(server):
    rollout = engine(server).generate(1, PROMPTS, jax.random.key(0))
    assert [len(body["prompt"]) for body in server.requests].count(2) == 2
    assert {len(body["prompt"]) for body in server.requests} == {1, 2}
    local = LocalEngine(sampler())
    local.update_params(policy(0), 1)
    ours = local.generate(1, PROMPTS, jax.random.key(0))
    prompts = slice(None), slice(PROMPT)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[prompts], b[prompts]), rollout.sequences, ours.sequences
    )
    assert jax.tree.map(jnp.shape, rollout.sequences) == jax.tree.map(jnp.shape, ours.sequences)
    for found in (rollout, ours):
        assert sampler_mismatch(SCORE, policy(0), found) < 1e-5
        mask = np.asarray(found.sequences.mask)
        tokens = np.asarray(found.sequences.tokens)
        last = [row[kept][-1] for row, kept in zip(tokens, mask, strict=True)]
        np.testing.assert_array_equal(found.finished, np.array(last) == TOKENIZER.eos_id)
    assert sampler_mismatch(SCORE, policy(1), rollout) > 0.1


def test_new_parameters_reach_the_server(server, tmp_path):
    publish = publish_from_disk(server.options(), tmp_path / "weights", CONFIG, TOKENIZER)
    remote = engine(server, publish)
    remote.update_params(policy(3), 2)
    jax.tree.map(np.testing.assert_array_equal, server.params, policy(3))
    with pytest.raises(ValueError, match="version 2, not 1"):
        remote.generate(1, PROMPTS, jax.random.key(0))
    rollout = remote.generate(2, PROMPTS, jax.random.key(0))
    assert sampler_mismatch(SCORE, policy(3), rollout) < 1e-5
    assert hf.load_config(tmp_path / "weights").vocab_size == CONFIG.vocab_size


@pytest.mark.parametrize("faults", [["busy", "torn", "busy"], ["slow"]])
def test_what_fails_on_the_way_is_tried_again(server, faults):
    server.faults = list(faults)
    rollout = engine(server, timeout=0.4 if "slow" in faults else 60).generate(1, PROMPTS, jax.random.key(0))
    assert len(server.requests) == 3 + len(faults)
    assert rollout.sequences.mask.any(axis=1).all()


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["busy"] * 20, "no answer in 4 attempts .*503.*is the server up"),
        (["unknown"] * 3, "the server refuses .*404.*no such model"),
        (["fewer"] * 3, "not as many choices"),
        (["text only"] * 3, "must return token ids"),
        (["other ids"] * 3, "99 is no id of 15 tokens"),
    ],
)
def test_answers_that_cannot_be_used_are_named(server, faults, message):
    server.faults = list(faults)
    with pytest.raises(UserError, match=message):
        engine(server).generate(1, PROMPTS, jax.random.key(0))


def test_a_server_that_is_not_there(server):
    options = HTTPOptions("http://127.0.0.1:9", retries=1, backoff=0.01, timeout=2)
    made = HTTPEngine(options, TOKENIZER, prompt_length=PROMPT, max_new_tokens=NEW, publish=lambda *_: None)
    made.update_params(None, 0)
    with pytest.raises(UserError, match="no answer in 2 attempts"):
        made.generate(0, PROMPTS, jax.random.key(0))
