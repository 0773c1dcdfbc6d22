import functools

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from rlhf_jax import sweep as sweeping
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Scalar

KEYS = jax.random.split(jax.random.key(0), 3)


@pytree_dataclass
class Hyper:
    rate: Scalar = 0.5
    noise: Scalar = 0.0


def train(key, hyper):
    """Noisy descent of x^2 / 2."""

    def step(x, key):
        x = x - hyper.rate * x + hyper.noise * jax.random.normal(key)
        return x, {"error": jnp.abs(x)}

    x, history = jax.lax.scan(step, jnp.float32(1), jax.random.split(key, 4))
    return x, {**history, "score": -jnp.abs(x)}


run = functools.partial(sweeping.sweep, quiet=True)


def test_product_zip_and_draws():
    grid = sweeping.product(Hyper(), rate=[0.1, 0.2], noise=[0, 1, 2])
    np.testing.assert_allclose(grid.rate, np.float32([0.1] * 3 + [0.2] * 3))
    np.testing.assert_allclose(grid.noise, [0, 1, 2, 0, 1, 2])
    assert grid.noise.dtype == jnp.float32
    pairs = sweeping.zipped(Hyper(), rate=[0.1, 0.2], noise=[3, 4])
    np.testing.assert_allclose(pairs.noise, [3, 4])
    random = sweeping.drawn(
        KEYS[0],
        Hyper(),
        50,
        rate=lambda key, shape: 10 ** jax.random.uniform(key, shape, minval=-3, maxval=-1),
    )
    assert random.rate.shape == random.noise.shape == (50,)
    assert 1e-3 <= random.rate.min() < 4e-3 < 4e-2 < random.rate.max() <= 1e-1
    assert sweeping.product(Hyper()).rate.shape == (1,)


def test_fields_may_hold_trees_or_nothing():
    @pytree_dataclass
    class Outer:
        inner: Hyper
        rate: Scalar = 0.1
        absent: Hyper | None = None

    grid = sweeping.product(Outer(Hyper(noise=2.0)), rate=[0.1, 0.2, 0.3])
    np.testing.assert_allclose(grid.inner.noise, [2.0] * 3)
    np.testing.assert_allclose(grid.rate, np.float32([0.1, 0.2, 0.3]))
    assert grid.absent is None


def test_mistakes_in_settings_are_one_sentence():
    with pytest.raises(UserError, match="Hyper has no field 'lr': choose among rate, noise"):
        sweeping.product(Hyper(), lr=[1.0])
    with pytest.raises(UserError, match="as many values"):
        sweeping.zipped(Hyper(), rate=[1.0], noise=[1.0, 2.0])
    with pytest.raises(UserError, match="rate: no values"):
        sweeping.product(Hyper(), rate=[])


def test_every_run_is_the_run_alone():
    hypers = sweeping.product(Hyper(), rate=[0.1, 0.7], noise=[0.0, 0.3])
    results = run(train, KEYS, hypers)
    assert results.metrics["error"].shape == (4, 3, 4)
    for setting in range(4):
        for seed in range(3):
            alone = train(KEYS[seed], jax.tree.map(lambda x, i=setting: x[i], hypers))[1]
            np.testing.assert_allclose(
                results.metrics["error"][setting, seed], alone["error"], rtol=1e-6, atol=1e-7
            )
    np.testing.assert_array_equal(results.scores("error"), -results.metrics["score"])


@pytest.mark.parametrize("chunk_size", [1, 5, 7, 100])
def test_chunks_change_nothing(chunk_size):
    hypers = sweeping.product(Hyper(noise=0.2), rate=[0.1, 0.2, 0.3, 0.4])
    whole, parts = run(train, KEYS, hypers), run(train, KEYS, hypers, chunk_size=chunk_size)
    np.testing.assert_allclose(parts.metrics["error"], whole.metrics["error"], rtol=1e-6, atol=1e-7)


def test_one_compile_for_all_chunks():
    traces = []

    def counted(key, hyper):
        traces.append(1)
        return train(key, hyper)

    run(counted, KEYS, sweeping.product(Hyper(), rate=[0.1, 0.2]), chunk_size=2)
    assert len(traces) == 2  # one to learn the shapes, one to compile


def test_a_sweep_goes_on_after_the_last_chunk(tmp_path):
    hypers = sweeping.product(Hyper(noise=0.2), rate=[0.1, 0.2])
    folder = tmp_path / "sweep"
    whole = run(train, KEYS, hypers, chunk_size=2)
    killed = run(train, KEYS, hypers, chunk_size=2, folder=folder)
    (folder / "chunks" / "2.npz").unlink()
    (folder / "chunks" / "1.npz.part").write_bytes(b"torn")
    marked = files.read_arrays(folder / "chunks" / "0.npz")
    marked["score"][:] = 7.0
    files.write_arrays(folder / "chunks" / "0.npz", marked)
    again = run(train, KEYS, hypers, chunk_size=2, folder=folder)
    np.testing.assert_array_equal(again.metrics["score"].reshape(-1)[:2], 7.0)  # read, not run again
    np.testing.assert_array_equal(
        again.metrics["score"].reshape(-1)[2:], whole.metrics["score"].reshape(-1)[2:]
    )
    np.testing.assert_array_equal(killed.metrics["error"], whole.metrics["error"])
    with pytest.raises(UserError, match="holds another sweep"):
        run(train, KEYS, sweeping.product(Hyper(), rate=[0.1, 0.3]), chunk_size=2, folder=folder)


def test_seeds_are_added_to_a_sweep_that_is_done(tmp_path):
    keys = jax.random.split(jax.random.key(3), 7)
    hypers = sweeping.product(Hyper(noise=0.2))
    whole = run(train, keys, hypers, chunk_size=2)
    run(train, keys[:3], hypers, chunk_size=2, folder=tmp_path)  # its second chunk holds one run
    marked = files.read_arrays(tmp_path / "chunks" / "0.npz")
    marked["score"][:] = 7.0
    files.write_arrays(tmp_path / "chunks" / "0.npz", marked)
    more = run(train, keys, hypers, folder=tmp_path)  # in chunks of two, as before
    np.testing.assert_array_equal(more.metrics["score"][0, :2], 7.0)  # read, not run again
    np.testing.assert_array_equal(more.metrics["score"][0, 2:], whole.metrics["score"][0, 2:])
    for other in (keys[:6], keys[::-1]):
        with pytest.raises(UserError, match="holds another sweep"):
            run(train, other, hypers, chunk_size=2, folder=tmp_path)
    with pytest.raises(UserError, match="holds another sweep"):  # the new seeds are not at the end
        run(train, keys, sweeping.product(Hyper(noise=0.2), rate=[0.1, 0.2]), chunk_size=2, folder=tmp_path)


def test_the_table_is_tidy(tmp_path):
    results = run(train, KEYS, sweeping.product(Hyper(), rate=[0.1, 0.2]), folder=tmp_path)
    table = pq.read_table(tmp_path / "results.parquet").to_pandas()
    assert list(table.columns) == ["setting", "seed", "update", "rate", "noise", "error", "score"]
    assert len(table) == 2 * 3 * 4
    assert table.duplicated(["setting", "seed", "update"]).sum() == 0
    row = table[(table.setting == 1) & (table.seed == 2) & (table["update"] == 3)]
    assert float(row.error.iloc[0]) == results.metrics["error"][1, 2, 2]
    assert float(row.rate.iloc[0]) == np.float32(0.2)
    assert table.score.notna().sum() == 6
    assert table[table["update"] == 4].score.notna().all()


def test_summaries_and_comparisons():
    noise = np.random.default_rng(0).normal(size=(2, 8)) * 0.1
    results = sweeping.Results({"rate": np.array([1.0, 2.0])}, {"score": np.array([[0.0], [1.0]]) + noise})
    first, second = sweeping.summarize(results, "score")
    assert second.label == "rate=2"
    assert first.iqm.low <= first.iqm.mean <= first.iqm.high < second.iqm.low
    np.testing.assert_allclose(first.mean, noise[0].mean())
    assert sweeping.compare(results, "score", 1, 0).mean == 1.0
    with pytest.raises(UserError, match="no metric 'reward': choose among score"):
        sweeping.summarize(results, "reward")
    np.testing.assert_allclose(sweeping.performance_profile([1, 2, 3, 4], [0, 2, 9]), [1, 0.5, 0])


def test_pictures(tmp_path):
    results = run(train, KEYS, sweeping.product(Hyper(noise=0.1), rate=[0.1, 0.9]))
    sweeping.plot_curves(results, "error", tmp_path / "curves.svg")
    sweeping.plot_profiles(results, "score", tmp_path / "profiles.png")
    assert "<path" in (tmp_path / "curves.svg").read_text()
    assert (tmp_path / "profiles.png").stat().st_size > 1000
    with pytest.raises(UserError, match="'score' has no value for each update: choose among error"):
        sweeping.plot_curves(results, "score", tmp_path / "x.png")


def test_chunk_size_that_fits():
    def heavy(key, hyper):
        scratch = jax.random.normal(key, (64, 64)) * hyper.rate
        return None, {"score": jnp.linalg.norm(scratch @ scratch.T @ scratch)}

    hypers = sweeping.product(Hyper())
    size = sweeping.fitting_chunk_size(heavy, KEYS, hypers, memory_bytes=100 * 64 * 64 * 4)
    assert 10 <= size <= 110  # one to ten buffers of a run
    assert sweeping.fitting_chunk_size(heavy, KEYS, hypers, memory_bytes=1) == 1


def test_damaged_chunks_are_made_again_and_a_damaged_description_is_named(tmp_path, capsys):
    hypers, folder = sweeping.product(Hyper(noise=0.2)), tmp_path / "sweep"
    whole = run(train, KEYS, hypers, chunk_size=2, folder=folder)
    chunk, description = folder / "chunks" / "0.npz", folder / "chunks" / "sweep.json"
    content = chunk.read_bytes()
    flipped = [content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :] for i in range(0, len(content), 97)]
    for damaged in (b"", content[:99], *flipped[:12]):
        chunk.write_bytes(damaged)
        again = run(train, KEYS, hypers, chunk_size=2, folder=folder)
        for name, values in whole.metrics.items():
            np.testing.assert_array_equal(again.metrics[name], values)
        np.testing.assert_array_equal(files.read_arrays(chunk)["score"], whole.metrics["score"][0, :2])
    assert f"{chunk}: damaged" in capsys.readouterr().err
    text = description.read_bytes()
    for damaged in (b"", b"[]", b"{}", text[:40], text.replace(b"score", b"scope")):
        description.write_bytes(damaged)
        with pytest.raises(UserError, match=r"sweep\.json: .*remove .*chunks, and the sweep is made again"):
            run(train, KEYS, hypers, chunk_size=2, folder=folder)
