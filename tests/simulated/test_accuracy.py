"""What 8-bit caches cost in accuracy, through the whole path, and that the launcher tells a path that is wrong."""

from __future__ import annotations

import json

import flagsaver
import jax.numpy as jnp
import numpy as np
import pytest

import paged_dist
from paged_dist.launch import accuracy
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common import host
from paged_dist.launch.common.run_program import UsageError

SETTINGS = accuracy.AccuracySettings(2, 8, 2, 128, 64, 1, (128, 1024))


@pytest.fixture(scope="module")
def results():
    return accuracy.measure_errors(SETTINGS)


def of(results, dtype, case):
    return [r["error"] for r in results if (r["dtype"], r["case"]) == (dtype, case)]


@pytest.mark.filterwarnings("ignore:.*page_size=")
def test_errors_are_within_their_bounds_and_do_not_grow_with_length(results):
    assert len(results) == 2 * 2 * 3
    assert max(of(results, "int8", "plain")) < 0.015 and max(of(results, "float8_e4m3fn", "plain")) < 0.05
    assert max(of(results, "int8", "smoothed")) < 0.02
    assert max(r["own_error"] for r in results) < 0.005
    for dtype, case in accuracy.BOUNDS:
        short, long = of(results, dtype, case)
        assert long < 1.4 * short
    assert accuracy.failures(results) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*page_size=")
def test_heads_that_are_stored_padded_are_as_exact():
    s = SETTINGS._replace(head_dim=96, lengths=(128,))
    results = accuracy.measure_errors(s)
    assert accuracy.failures(results) == []
    record = {"settings": s._asdict(), "results": results, "failures": [], "versions": {}}
    assert "head_dim 96 (stored as 128), " in accuracy.accuracy_table(record).replace("\n           ", " ")


def test_outlier_channels_cost_int8_its_accuracy_and_smoothing_gives_it_back(results):
    assert min(of(results, "int8", "outliers")) > 2 * max(of(results, "int8", "smoothed"))


def test_logits_have_a_standard_deviation_of_one_in_every_case():
    s = SETTINGS._replace(lengths=(4096,))
    for data in accuracy.draw(s).values():
        query = data.query.astype(np.float64).reshape(2, 2, 4, 128)
        logits = np.einsum("bhgd,bthd->bhgt", query, data.keys) / np.sqrt(128)
        np.testing.assert_allclose(logits.std(axis=-1), 1, atol=0.06)


def settings_of(**values):
    """The flags as the console script sets them, and `values`."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    return flagsaver.flagsaver(**{**accuracy.ACCURACY_PROGRAM.defaults, **values})


def test_a_path_that_is_wrong_fails_the_run_which_says_so(monkeypatch, capsys, tmp_path):
    """Without the query's smoothing the cases without it are as they were, and the third is not."""
    right = paged_dist.sharded_paged_attention

    def unsmoothed(query, cache, *args, **kw):
        query = query if cache.key_smoothing is None else query / jnp.repeat(cache.key_smoothing, 4, axis=0)
        return right(query.astype(jnp.bfloat16), cache, *args, **kw)

    monkeypatch.setattr(accuracy, "sharded_paged_attention", unsmoothed)
    monkeypatch.setattr(host, "simulate_devices", lambda *_, **__: None)
    path = tmp_path / "out.jsonl"
    with settings_of(context_lengths=["64"], output=str(path)):
        assert accuracy.main(()) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    record = json.loads(path.read_text())
    assert record["benchmark"] == "accuracy" and record["settings"]["lengths"] == [64]
    assert record["failures"] and all(", smoothed, 64 tokens: " in line for line in record["failures"])
    assert [line.removeprefix("FAILED: ") for line in out.splitlines() if "FAILED" in line] == record["failures"]
    row = next(line for line in out.splitlines() if line.split()[:1] == ["64"]).split()
    assert row[1] == f"{100 * of(record['results'], 'int8', 'plain')[0]:.2f}"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(context_lengths=["128", "x"]), "--context_lengths='128,x': must be whole numbers"),
        (dict(context_lengths=["0"]), "--context_lengths='0': must be whole numbers of tokens, at least 1"),
        (dict(page_size=48), "page_size=48: with int8 and fp8 must divide 128"),
        (dict(num_kv_heads=3), "--num_q_heads=8: must be a multiple of --num_kv_heads=3"),
        (dict(head_dim=0), "--head_dim=0: must be at least 1"),
        (dict(seed=-1), "--seed=-1: must be at least 0"),
    ],
)
def test_bad_flags_are_refused_before_anything_runs(monkeypatch, change, says):
    monkeypatch.setattr(host, "simulate_devices", lambda *_, **__: None)
    monkeypatch.setattr(accuracy, "measure_errors", lambda s: pytest.fail("went on to measure"))
    with settings_of(**change), pytest.raises(UsageError) as refusal:
        accuracy.main(())
    assert says in str(refusal.value)
