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
from rlhf_jax.core.types import Sequences
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.tokenizers import character_tokenizer
from rlhf_jax.generation import Sampling
from rlhf_jax.models import hf
from rlhf_jax.rewards.functions import Scored
from rlhf_jax.rollout.dynamic_sampling import term_means, without_failed
from rlhf_jax.rollout.engines import (
    HTTPEngine,
    failed_rows,
    make_engine,
    parse_engine,
    publish_from_disk,
    sampling_logp_diff,
)
from rlhf_jax.rollout.http_json import HTTPOptions
from rlhf_jax.rollout.sampler import make_generate_fn

TOKENIZER = character_tokenizer("0123456789+=")
CONFIG = models.dense_config(vocab_size=TOKENIZER.vocab_size, width=8, num_layers=1, num_heads=2)
POLICY = models.make_policy(CONFIG, None, TOKENIZER)
PROMPTS = [
    PromptExample(np.array(TOKENIZER.encode(text), np.int32), text, {}, "a:1")
    for text in ("1+2=", "7=", "12+13=", "4+4=", "5=")
]
PROMPT, NEW = 6, 5


SCORE = jax.jit(models.make_logprob_fn(CONFIG))


@functools.cache
def policy(seed):
    params = models.init_params(CONFIG, jax.random.key(seed))
    return jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params)


def nudged(size):
    """The policy, moved a little."""
    return jax.tree.map(
        lambda x: x + size * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), policy(0)
    )


@functools.cache
def sampler():
    return make_generate_fn(POLICY, prompt_length=PROMPT, max_new_tokens=NEW)


class Server(http.server.ThreadingHTTPServer):
    """Serves the policy of `params`; the first of `faults` to come say what goes wrong.

    A fault is the name of one, or a function that spoils the reply.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.clean()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def clean(self):
        self.params, self.faults, self.requests, self.paths, self.deaf = policy(0), [], [], [], False

    def options(self, **more):
        more = {"backoff": 0.01, "prompts_per_request": 2, "connections": 2, **more}
        return HTTPOptions(f"http://127.0.0.1:{self.server_port}", **more)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.paths.append(self.path)
            asked = self.path == "/v1/completions" and not body.get("echo")
            if asked:
                self.server.requests.append(body)
            fault = self.server.faults.pop(0) if self.server.faults and asked else None
        if self.path in ("/update_weights_from_disk", "/collective_rpc"):
            path = body.get("model_path") or body["kwargs"]["weights_path"]
            if not self.server.deaf:
                self.server.params = hf.load(path)[1]
            return self.answer({"success": True} if "model_path" in body else {"results": [None]})
        if self.path == "/reset_prefix_cache":
            return self.send(b"")
        if body.get("echo"):
            return self.answer({"choices": [self.echo(body["prompt"][0])]})
        if fault in RAW:
            return self.raw(RAW[fault])
        if fault == "busy":
            return self.answer({"error": "busy"}, 503)
        if fault == "unknown":
            return self.answer({"error": "no such model"}, 404)
        if fault == "slow":
            threading.Event().wait(2.5)
        if fault == "dripping":
            return self.drip()
        reply = {"choices": self.choices(body)[::-1]}
        if callable(fault):
            fault(reply["choices"])
        return self.answer(reply)

    def choices(self, body):
        prompts = [PromptExample(np.array(ids, np.int32), "", {}, "") for ids in body["prompt"]]
        prompts = [prompt for prompt in prompts for _ in range(body["n"])]
        kept = len(prompts)
        assert kept <= len(PROMPTS)
        prompts += [prompts[-1]] * (len(PROMPTS) - kept)  # one shape for every request, and for ours
        with self.server.lock:
            rollout = sampler()(self.server.params, prompts, jax.random.key(body["seed"]))
        found = []
        for index in range(kept):
            mask = np.asarray(rollout.sequences.mask[index])
            ids = np.asarray(rollout.sequences.tokens[index])[mask].tolist()
            logp = np.asarray(rollout.logp[index])[mask].tolist()
            tokens = [f"token_id:{token}" for token in ids]
            why = "stop" if rollout.finished[index] else "length"
            choice = {"index": index, "logprobs": {"token_logprobs": logp, "tokens": tokens}}
            found.append(choice | {"finish_reason": why} | ({"token_ids": ids} if index else {}))
        return found

    def echo(self, ids):
        """Log-probs of a prompt, and of a token more, as servers give them."""
        rows = jnp.array([ids], jnp.int32)
        ones = jnp.ones(rows.shape, jnp.int32)
        sequences = Sequences(rows, jnp.arange(len(ids))[None], ones, ones.astype(bool))
        logp = np.asarray(SCORE(self.server.params, sequences).logp)[0]
        return {"index": 0, "logprobs": {"token_logprobs": [None, *logp[1:].tolist(), -0.5]}}

    def answer(self, reply, status=200):
        self.send(json.dumps(reply).encode(), status)

    def send(self, data, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have given up
            self.wfile.write(data)

    def raw(self, data):
        with contextlib.suppress(OSError):
            self.wfile.write(data)
            self.wfile.flush()
            self.connection.shutdown(2)

    def drip(self):
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(100):
                self.wfile.write(b" ")
                self.wfile.flush()
                threading.Event().wait(0.05)

    def log_message(self, *_):
        pass


RAW = {
    "torn": b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices": [',
    "no status": b"HELLO\r\n\r\n",
    "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "long header": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n{}",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 300 + b"\r\n{}",
    "deep": b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 200_000,
    "huge": b"HTTP/1.1 200 OK\r\nContent-Length: 1099511627776\r\n\r\n{}",
}


@pytest.fixture(scope="module")
def running():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running):
    running.clean()
    return running


def engine(server, publish=None, logprob_fn=None, group_size=1, allow_filters=False, **more):
    return HTTPEngine(
        server.options(**more),
        TOKENIZER,
        prompt_length=PROMPT,
        max_new_tokens=NEW,
        group_size=group_size,
        publish=publish,
        logprob_fn=logprob_fn,
        allow_filters=allow_filters,
    )


def ask(engine, params=None, prompts=PROMPTS, seed=0, *sampling):
    return engine(policy(0) if params is None else params, prompts, jax.random.key(seed), *sampling)


def test_answers_of_the_server_are_a_rollout_that_rescores(server):
    rollout = ask(engine(server))
    assert [len(body["prompt"]) for body in server.requests].count(2) == 2
    assert {len(body["prompt"]) for body in server.requests} == {1, 2}
    ours = sampler()(policy(0), PROMPTS, jax.random.key(0))
    prompts = slice(None), slice(PROMPT)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[prompts], b[prompts]), rollout.sequences, ours.sequences
    )
    assert jax.tree.map(jnp.shape, rollout.sequences) == jax.tree.map(jnp.shape, ours.sequences)
    for found in (rollout, ours):
        assert sampling_logp_diff(SCORE, policy(0), found) < 1e-5
        mask = np.asarray(found.sequences.mask)
        tokens = np.asarray(found.sequences.tokens)
        last = [row[kept][-1] for row, kept in zip(tokens, mask, strict=True)]
        np.testing.assert_array_equal(found.finished, np.array(last) == TOKENIZER.eos_id)
    assert sampling_logp_diff(SCORE, policy(1), rollout) > 0.1
    assert not failed_rows(rollout).any()


def test_a_group_s_prompt_is_sent_once_and_its_answers_differ(server):
    prompts = [prompt for prompt in PROMPTS[:3] for _ in range(2)]
    rollout = ask(engine(server, group_size=2), prompts=prompts)
    assert sorted((len(body["prompt"]), body["n"]) for body in server.requests) == [(1, 2), (2, 2)]
    sent = sorted(tuple(ids) for body in server.requests for ids in body["prompt"])
    assert sent == sorted(tuple(prompt.ids.tolist()) for prompt in PROMPTS[:3])
    tokens, mask = np.asarray(rollout.sequences.tokens), np.asarray(rollout.sequences.mask)
    for row, prompt in enumerate(prompts):
        assert tokens[row, PROMPT - len(prompt.ids) : PROMPT].tolist() == prompt.ids.tolist()
    assert any(
        tokens[row][mask[row]].tolist() != tokens[row + 1][mask[row + 1]].tolist() for row in (0, 2, 4)
    )
    assert sampling_logp_diff(SCORE, policy(0), rollout) < 1e-5
    with pytest.raises(ValueError, match="groups of 2 equal ones"):
        ask(engine(server, group_size=2), prompts=PROMPTS[:2])


def test_sampling_is_sent_and_what_servers_do_not_know_is_refused(server):
    filtered = Sampling(temperature=0.5, top_k=4, top_p=0.75)
    with pytest.raises(UserError, match=r"top_k, top_p leaves tokens out .* sample at a temperature alone"):
        ask(engine(server), None, PROMPTS[:1], 0, filtered)
    ask(engine(server, allow_filters=True), None, PROMPTS[:1], 0, filtered)
    (body,) = server.requests
    assert (body["temperature"], body["top_k"], body["top_p"]) == (0.5, 4, 0.75)
    assert body["stop_token_ids"] == [TOKENIZER.eos_id]
    assert "min_p" not in body
    with pytest.raises(UserError, match="typical_p is not known to servers"):
        ask(engine(server, allow_filters=True), None, PROMPTS, 0, Sampling(typical_p=0.5))


def test_most_likely_answers_are_asked_for_one_by_one(server):
    prompts = [prompt for prompt in PROMPTS[:2] for _ in range(2)]
    ask(engine(server, group_size=2), None, prompts, 0, Sampling(temperature=0.0))
    assert {body["n"] for body in server.requests} == {1}
    assert sum(len(body["prompt"]) for body in server.requests) == 4


# Weights ---------------------------------------------------------------------------------------------


def write(path, params):
    hf.save(path, CONFIG, params, TOKENIZER)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_published_weights_arrive_and_are_proven(server, tmp_path, kind):
    publish = publish_from_disk(server.options(), tmp_path, write, kind=kind)
    remote = engine(server, publish, SCORE)
    ask(remote, policy(3))
    jax.tree.map(np.testing.assert_array_equal, server.params, policy(3))
    ask(remote, dict(policy(3)))  # the same arrays
    assert remote.version == 1
    rollout = ask(remote, policy(4))
    assert remote.version == 2
    assert sampling_logp_diff(SCORE, policy(4), rollout) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights_0", "weights_1"]
    assert ("/reset_prefix_cache" in server.paths) == (kind == "vllm")


def test_a_server_that_keeps_its_weights_is_found_out(server, tmp_path):
    publish = publish_from_disk(server.options(), tmp_path, write, kind="sglang")
    remote = engine(server, publish, SCORE)
    ask(remote, policy(0))
    ask(remote, nudged(1e-4))
    server.deaf = True
    with pytest.raises(UserError, match="not those of weights 3"):
        ask(remote, policy(3))


def test_a_small_change_that_did_not_arrive_is_found_out_too(server, tmp_path):
    publish = publish_from_disk(server.options(), tmp_path, write, kind="sglang")
    remote = engine(server, publish, SCORE)
    ask(remote, policy(0))
    server.deaf = True
    with pytest.raises(UserError, match=r"weights 2 did not arrive: ours moved by .*, the server's by 0"):
        ask(remote, nudged(1e-4))


def test_a_server_with_fixed_weights_must_hold_ours_and_takes_no_others(server):
    with pytest.raises(UserError, match="not those of weights 1"):
        ask(engine(server, None, SCORE), policy(3))
    remote = engine(server, None, SCORE)
    ask(remote)
    ask(remote)
    with pytest.raises(UserError, match="cannot be given new weights"):
        ask(remote, policy(3))


def test_a_refused_publication_is_said(server, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Handler, "answer", lambda self, reply, status=200: self.send(b'{"success": false, "message": "no"}')
    )
    publish = publish_from_disk(server.options(), tmp_path, write, kind="sglang")
    with pytest.raises(UserError, match=r"version 1 was not taken \(no\)"):
        ask(engine(server, publish))


# Faults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults", [["busy", "torn", "busy"], ["slow"], ["dripping"], *([name] for name in RAW if name != "torn")]
)
def test_what_fails_on_the_way_is_tried_again(server, faults):
    server.faults = list(faults)
    hurried = {"slow", "dripping"} & set(faults)
    rollout = ask(engine(server, timeout=1.5 if hurried else 60))
    assert len(server.requests) == 3 + len(faults)
    assert rollout.sequences.mask.any(axis=1).all()


def test_rows_without_an_answer_come_back_empty(server):
    server.faults = ["busy"] * 4
    rollout = ask(engine(server, connections=1))
    np.testing.assert_array_equal(failed_rows(rollout), [True, True, False, False, False])
    assert not np.asarray(rollout.finished)[:2].any()
    assert np.asarray(rollout.logp)[:2].tolist() == np.zeros((2, PROMPT + NEW)).tolist()
    rest = jax.tree.map(lambda x: x[2:], rollout)
    assert sampling_logp_diff(SCORE, policy(0), rest) < 1e-5


def test_a_failed_row_is_unscorable():
    rewards = np.array([1.0, 0.0, 0.5], np.float32)
    scored = Scored(rewards, np.array([False, False, True]), {"a": rewards, "b": rewards + 1})
    found = without_failed(scored, np.array([False, True, False]))
    assert found.unscorable.tolist() == [False, True, True]
    assert term_means(found) == {"reward/a": 1.0, "reward/b": 2.0}


def change(**fields):
    return lambda choices: choices[0].update(fields)


def change_logp(value):
    return lambda choices: choices[0]["logprobs"]["token_logprobs"].__setitem__(0, value)


def change_id(value):
    return lambda choices: choices[0]["token_ids"].__setitem__(0, value)


def cut_off(choices):
    seven = {"token_ids": TOKENIZER.encode("7"), "logprobs": {"token_logprobs": [-1.0]}}
    choices[0].update(seven | {"finish_reason": "stop"})


def text_only(choices):
    choices[:] = [{"index": 0, "text": "4"}, {"index": 1, "text": "4"}]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("busy", "no answer in 4 attempts .*503.*is the server up"),
        ("unknown", "the server refuses .*404.*no such model"),
        (list.pop, "not as many choices"),
        (text_only, "must return token ids"),
        (change_id(99), "99 is no id of 15 tokens"),
        (change_id(True), "True is no whole number"),
        (change(index=0), "indices of choices"),
        (change(index=7), "indices of choices"),
        (change(index=float("nan")), "nan is no whole number"),
        (change_logp(-1e308), "is no log-prob"),
        (change_logp(-(10**400)), "int too large"),
        (change_logp(0.5), "0.5 is no log-prob"),
        (change(token_ids=None, logprobs={"token_logprobs": [-1.0], "tokens": [1]}), "cannot be read"),
        (change(token_ids=[], logprobs={"token_logprobs": [], "tokens": []}), "0 tokens"),
        (
            change(
                token_ids=TOKENIZER.encode("7"), logprobs={"token_logprobs": [-1.0]}, finish_reason="stop"
            ),
            "was cut off",
        ),
    ],
)
def test_answers_that_cannot_be_used_are_named(server, fault, message):
    server.faults = [fault] * 20
    with pytest.raises(UserError, match=message):
        ask(engine(server), prompts=PROMPTS[:2])


def test_redirects_are_not_followed(server):
    RAW["elsewhere"] = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n"
    try:
        server.faults = ["elsewhere"] * 20
        with pytest.raises(UserError, match=r"the server refuses .status 302"):
            ask(engine(server))
    finally:
        del RAW["elsewhere"]


def test_a_server_that_is_not_there():
    options = HTTPOptions("http://127.0.0.1:9", retries=1, backoff=0.01, timeout=2)
    made = HTTPEngine(options, TOKENIZER, prompt_length=PROMPT, max_new_tokens=NEW)
    with pytest.raises(UserError, match="no answer in 2 attempts"):
        ask(made)


# By name ---------------------------------------------------------------------------------------------


def test_engines_by_name(server, tmp_path, monkeypatch):
    assert parse_engine("local") == ("local", "")
    for spec in ("vllm", "http://x", "vllm:localhost:8000", "trt:http://x"):
        with pytest.raises(UserError, match=r"give local, vllm:http://HOST:PORT"):
            parse_engine(spec)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    spec = f"sglang:{server.options().url}#mine"
    shared = {"prompt_length": PROMPT, "max_new_tokens": NEW, "logprob_fn": SCORE}
    made = make_engine(spec, TOKENIZER, write=write, folder=tmp_path, **shared)
    rollout = ask(made, policy(2))
    assert sampling_logp_diff(SCORE, policy(2), rollout) < 1e-5
    assert {body["model"] for body in server.requests} == {"mine"}
    assert "secret" not in repr(made._options)
