"""--engine: stages whose answers come from a real HTTP server, which loads the weights that they publish."""

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
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import hf
from rlhf_jax.rollout.sampler import make_generate_fn
from rlhf_jax.training.run_folder import load_policy

pytestmark = pytest.mark.slow
PROMPT, NEW = 160, 8


class Server(http.server.ThreadingHTTPServer):
    """Knows nothing of the policy but the Hugging Face folders that it is told to load."""

    daemon_threads = True

    def __init__(self, tokenizer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer, self.loaded, self.lock, self.drop = tokenizer, [], threading.Lock(), 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def load(self, path):
        config, self.params = hf.load(path)
        self.loaded.append(path)
        if len(self.loaded) == 1:
            shared = {"prompt_length": PROMPT, "max_new_tokens": NEW}
            policy = models.make_policy(config, self.params, self.tokenizer)
            self.sample = make_generate_fn(policy, **shared)
            self.score = jax.jit(policy.make_logprob_fn())


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            if self.path == "/update_weights_from_disk":
                self.server.load(body["model_path"])
                reply = {"success": True}
            elif body.get("echo"):
                reply = {"choices": [self.echo(body["prompt"][0])]}
            elif self.server.drop:
                self.server.drop -= 1
                return self.send_error(503)
            else:
                reply = {"choices": self.choices(body)}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return None

    def choices(self, body):
        prompts = [PromptExample(np.array(ids, np.int32), "", {}, "") for ids in body["prompt"]]
        prompts = [prompt for prompt in prompts for _ in range(body["n"])]
        rollout = self.server.sample(self.server.params, prompts, jax.random.key(body["seed"]))
        found = []
        for index, kept in enumerate(np.asarray(rollout.sequences.mask)):
            ids, logp = (
                np.asarray(x[index])[kept].tolist() for x in (rollout.sequences.tokens, rollout.logp)
            )
            found.append({"index": index, "token_ids": ids, "logprobs": {"token_logprobs": logp}})
        return found

    def echo(self, ids):
        rows = jnp.array([ids], jnp.int32)
        ones = jnp.ones(rows.shape, jnp.int32)
        sequences = Sequences(rows, jnp.arange(len(ids))[None], ones, ones.astype(bool))
        logp = np.asarray(self.server.score(self.server.params, sequences).logp)[0]
        return {"index": 0, "logprobs": {"token_logprobs": [None, *logp[1:].tolist(), -0.5]}}

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tiny):
    made = Server(load_policy(tiny.finished("sft")).tokenizer)
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize(
    ("stage", "more"),
    [("grpo", ()), ("grpo", ("--adapter.kind", "lora", "--adapter.rank", 2)), ("ppo", ())],
)
def test_a_stage_learns_from_a_server_s_answers(stage, more, tiny, tmp_path, server):
    engine = f"sglang:http://127.0.0.1:{server.server_port}"
    rate = ("--learning-rate", 1e-2, "--optimizer.schedule", "constant")
    out = tiny.run(stage, tmp_path / "run", "--engine", engine, "--steps", 3, *rate, *more)
    steps = read_metrics(out)[1:]
    assert len(server.loaded) == 3  # once a step
    assert len(set(server.loaded)) == 2
    assert all(line["sampling_logp_diff"] < 1e-4 for line in steps)
    assert all(line["length"] > 0 and line["unscorable"] == 0 for line in steps if "unscorable" in line)


def test_answers_that_did_not_come_are_unscorable(tiny, tmp_path, server, monkeypatch):
    from rlhf_jax.rollout import engines

    one = engines.HTTPOptions

    def hurried(*args, **options):
        return one(*args, **options, retries=0, prompts_per_request=1, connections=1)

    monkeypatch.setattr(engines, "HTTPOptions", hurried)
    server.drop = 1
    engine = f"sglang:http://127.0.0.1:{server.server_port}"
    out = tiny.run("grpo", tmp_path / "run", "--engine", engine, "--steps", 2)
    assert [line["unscorable"] for line in read_metrics(out)[1:]] == [2, 0]


def test_an_engine_that_is_none(tiny, tmp_path):
    with pytest.raises(UserError, match="engine 'vllm': give local, vllm:http://HOST:PORT"):
        tiny.run("grpo", tmp_path / "run", "--engine", "vllm")
