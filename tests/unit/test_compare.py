"""`paged-dist-compare`: statistics against brute force and published values, what is the same work, what is told."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from compared_rows import DECODE_ROW, as_json_lines, decode_rows, printed_line

from paged_dist.launch import compare
from paged_dist.launch.comparison import rank_statistics, record


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """`run(a, b, *options)` compares rows, or a file's text, in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(a, b, *options):
        for name, content in (("a.jsonl", a), ("b.jsonl", b)):
            text = content if isinstance(content, str | bytes) else as_json_lines(content)
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        try:
            code = compare.main(["a.jsonl", "b.jsonl", *options])
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        assert all(len(line) <= 80 for line in out.splitlines()), out
        return code, out, err

    return call


# Statistics


@pytest.mark.parametrize(("n_a", "n_b"), [(1, 1), (1, 4), (2, 3), (3, 3), (4, 4), (5, 3), (2, 7), (5, 5)])
@pytest.mark.parametrize("kinds", [2, 3, 6, 10**6])  # distinct values: many ties, some, none
def test_p_is_that_of_every_split_of_the_runs(n_a, n_b, kinds):
    rng = np.random.default_rng([n_a, n_b, kinds])
    for _ in range(5):
        pooled = rng.integers(kinds, size=n_a + n_b).astype(float)
        ranks = np.asarray([(pooled < v).sum() + ((pooled == v).sum() + 1) / 2 for v in pooled])
        off = ranks - ranks.mean()
        seen = off[:n_a].sum()
        splits = [sum(chosen) for chosen in itertools.combinations(off, n_a)]
        want = np.mean([abs(x) >= abs(seen) - 1e-9 for x in splits])
        p, above = rank_statistics.rank_test(pooled[:n_a], pooled[n_a:])
        assert p == pytest.approx(want, abs=1e-12)
        assert above == (0 if abs(seen) < 1e-9 else -np.sign(seen))


@pytest.mark.parametrize(
    ("n_a", "n_b", "most"),
    # The largest U that is significant at 5 %, two-sided: published tables of the Mann-Whitney test.
    [(4, 4, 0), (3, 5, 0), (2, 8, 0), (5, 5, 2), (6, 6, 5), (5, 8, 6), (8, 8, 13), (10, 10, 23), (20, 20, 127)],
)
def test_critical_values_are_those_of_published_tables(n_a, n_b, most):
    """Both of the test and of the interval, which goes from the U + 1st smallest to the U + 1st largest ratio."""

    def runs_with(u):
        b = np.arange(1.0, n_b + 1)
        a = []  # each below so many of b
        for left in range(n_a, 0, -1):
            more = min(n_b, u - sum(x for x, _ in a))
            a.append((more, n_b - more + 0.5 + left / 1000))
        return [x for _, x in a], b

    for u, significant in ((most, True), (most + 1, False)):
        p, above = rank_statistics.rank_test(*runs_with(u))
        assert (p <= rank_statistics.ALPHA) == significant and above == -1
    rng = np.random.default_rng(n_a)
    a, b = rng.random(n_a) + 1, rng.random(n_b) + 1
    ratios = sorted(y / x for x in a for y in b)
    assert rank_statistics.ratio_interval(a, b) == pytest.approx((ratios[most], ratios[-most - 1]))


def test_normal_approximation_agrees_with_the_exact_test_where_it_takes_over(monkeypatch):
    rng = np.random.default_rng(0)
    for decimals in (1, 9):  # tied, not tied
        a = np.round(rng.normal(3.0, 0.3, 55), decimals)
        b = np.round(rng.normal(3.1, 0.3, 55), decimals)
        monkeypatch.setattr(rank_statistics, "_EXACT_COST", 1e8)
        exact, spread = rank_statistics.rank_test(a, b), rank_statistics.ratio_interval(a, b)
        monkeypatch.setattr(rank_statistics, "_EXACT_COST", 0)
        near, near_spread = rank_statistics.rank_test(a, b), rank_statistics.ratio_interval(a, b)
        assert 0.01 < exact[0] < 0.5
        assert near == (pytest.approx(exact[0], rel=0.02), exact[1])
        assert near_spread == pytest.approx(spread, rel=2e-3)


# n_a, n_b, distinct values, b's shift, and what this project's own statistics said before scipy's took their place:
# p, the direction, the interval of the ratio. With and without ties; from 70 + 80 runs on by the normal approximation.
BEFORE_SCIPY = [
    (4, 4, 211, 70.25, 0.2, 1, 0.7181978798586572, 3.5325),
    (4, 4, 5, 2.0, 0.08571428571428572, 1, 0.9902912621359223, 1.06),
    (3, 6, 4, 1.0, 0.05952380952380952, 1, 1.0, 1.04),
    (8, 8, 211, 60.5, 0.03791763791763792, 1, 1.0202702702702702, 2.265),
    (8, 8, 6, 2.0, 0.06418026418026418, 1, 1.0, 1.0392156862745099),
    (12, 9, 211, -50.25, 0.24690912802367912, -1, 0.4991319444444444, 1.1575),
    (12, 9, 7, -2.0, 0.058690844758956216, -1, 0.9611650485436893, 1.0),
    (20, 20, 211, 35.5, 0.042984632900965054, 1, 1.0096153846153846, 1.4875776397515528),
    (20, 20, 9, 2.0, 0.022341598677624214, 1, 1.0, 1.0380952380952382),
    (40, 35, 211, 25.5, 0.07170817231042617, 1, 0.9887387387387387, 1.322289156626506),
    (40, 35, 13, 2.0, 0.017068291826777236, 1, 1.0, 1.0384615384615385),
    (60, 60, 211, 30.5, 0.004597113200663697, 1, 1.0496031746031746, 1.314516129032258),
    (60, 60, 3, 0.0, 1.0, 0, 1.0, 1.0),
    (70, 80, 211, 25.5, 0.009600740335128241, 1, 1.0329861111111112, 1.260752688172043),
    (70, 80, 20, 2.0, 0.02056119746065418, 1, 1.0, 1.0392156862745099),
    (150, 150, 5, 0.0, 0.8098466899775462, 1, 1.0, 1.0),
    (100, 100, 1, 0.0, 1.0, 0, 1.0, 1.0),
    (5, 5, 1, 0.0, 1.0, 0, 1.0, 1.0),
]


@pytest.mark.parametrize(("n_a", "n_b", "kinds", "shift", "p", "above", "low", "high"), BEFORE_SCIPY)
def test_statistics_are_those_from_before_scipy_s(n_a, n_b, kinds, shift, p, above, low, high):
    runs = lambda n, shift: [100.0 + 61 * i % 211 % kinds + shift for i in range(n)]
    a, b = runs(n_a, 0.0), runs(n_b + 3, shift)[3:]
    assert rank_statistics.rank_test(a, b) == (pytest.approx(p, rel=1e-12), above)
    assert rank_statistics.rank_test(b, a) == (pytest.approx(p, rel=1e-12), -above)
    assert rank_statistics.ratio_interval(a, b) == (low, high)


def heavy_tailed(rng, n):
    """Times as a shared host gives them: 2 % of noise, and now and then one that is far too long."""
    return 10 * np.exp(0.02 * rng.standard_normal(n) + 0.3 * (rng.random(n) < 0.15))


@pytest.mark.parametrize(("n_a", "n_b", "level"), [(4, 4, 2 / 70), (6, 6, 0.0411), (5, 7, 0.0480), (25, 40, 0.05)])
def test_runs_without_a_difference_are_noise_but_for_five_percent(n_a, n_b, level):
    draws, rng = 2000 if n_a < 25 else 300, np.random.default_rng([n_a, n_b])
    found = sum(
        rank_statistics.rank_test(heavy_tailed(rng, n_a), heavy_tailed(rng, n_b))[0] <= rank_statistics.ALPHA
        for _ in range(draws)
    )
    error = np.sqrt(level * (1 - level) / draws)
    assert level - 4 * error < found / draws < level + 4 * error
    assert found / draws < 0.07


@pytest.mark.parametrize(("n_a", "n_b"), [(4, 4), (6, 6), (5, 9)])
def test_interval_holds_the_true_ratio_and_goes_with_the_test(n_a, n_b):
    rng, held = np.random.default_rng([7, n_a, n_b]), 0
    for _ in range(1000):
        a, b = heavy_tailed(rng, n_a), 1.03 * heavy_tailed(rng, n_b)
        low, high = rank_statistics.ratio_interval(a, b)
        held += low < 1.03 < high
        assert (low < 1 < high) == (rank_statistics.rank_test(a, b)[0] > rank_statistics.ALPHA)
    assert 935 <= held <= 990


@pytest.mark.parametrize("direction", [1, -1])
def test_ten_percent_are_found_in_six_runs_of_two_percent_noise(direction):
    rng = np.random.default_rng(3)
    for _ in range(50):
        noisy = lambda centre: [
            DECODE_ROW | {"step_ms_p50": centre * np.exp(0.02 * rng.standard_normal())} for _ in range(6)
        ]
        r = record.compare_metric("step_ms_p50", noisy(10.0), noisy(10 * 1.1**direction))
        assert r["verdict"] == ("slower" if direction == 1 else "faster")
        assert r["ratio"] == pytest.approx(1.1**direction, rel=0.04)
        assert r["spread"][0] < r["ratio"] < r["spread"][1]


@pytest.mark.parametrize(
    ("have", "need"),
    [
        ((1, 1), (4, 4)),
        ((3, 3), (4, 4)),
        ((3, 4), (4, 4)),
        ((2, 6), (3, 6)),
        ((4, 4), (4, 4)),
        ((3, 5), (3, 5)),
        ((2, 8), (2, 8)),
        ((1, 38), (2, 38)),
        ((1, 39), (1, 39)),
    ],
)
def test_runs_needed_are_the_fewest_that_could_ever_tell(have, need):
    assert rank_statistics.runs_needed(*have) == need
    apart = lambda n: (np.arange(n[0]), 100.0 + np.arange(n[1]))
    assert rank_statistics.rank_test(*apart(need))[0] <= rank_statistics.ALPHA
    assert have == need or rank_statistics.rank_test(*apart(have))[0] > rank_statistics.ALPHA


@pytest.mark.parametrize(
    ("metric", "above", "below"),
    [
        ("tokens_per_s", "faster", "slower"),
        ("live_kv_bytes_per_s_per_chip", "faster", "slower"),
        ("peak_share", "faster", "slower"),
        ("step_ms_p50", "slower", "faster"),
        ("step_ms_mean", "slower", "faster"),
        ("compile_s", "slower", "faster"),
        ("live_kv_bytes_per_step", "higher", "lower"),
        ("oracle_worst_error", "higher", "lower"),
        ("rows_mean", "higher", "lower"),
    ],
)
def test_the_better_direction_follows_the_unit(metric, above, below):
    low, high = ([{metric: v + i} for i in range(4)] for v in (1, 11))
    assert record.compare_metric(metric, low, high)["verdict"] == above
    assert record.compare_metric(metric, high, low)["verdict"] == below


# What is told


def test_a_difference_reads_in_one_line_and_comes_out_as_json(run, tmp_path):
    a, b = decode_rows([1000, 1010, 990, 1005]), decode_rows([1100, 1120, 1090, 1110])
    code, out, err = run(a, b, "--metrics=tokens_per_s,step_ms_p50,tokens_per_s_per_chip", "--output=new/out.jsonl")
    assert (code, err) == (0, "")
    assert printed_line(out, "tokens_per_s") == "tokens_per_s 4+4 1002.5 1105 1.102 1.079..1.131 faster 0.029"
    assert printed_line(out, "step_ms_p50") == "step_ms_p50 4+4 10 10 1.000 1.000..1.000 noise 1.000"
    assert printed_line(out, "4+4") == "4+4 62.5 62.5 1.000 1.000..1.000 noise 1.000"  # below a long name
    assert "settings.layers=2" in out and "checksum same: 00112233aabbccdd" in out
    assert "only in" not in out and "differs" not in out
    record = json.loads((tmp_path / "new" / "out.jsonl").read_text())
    assert record["benchmark"] == "compare" and record["a"]["runs"] == record["b"]["runs"] == 4
    (found,) = record["groups"]
    assert found["metrics"][0] == {
        "metric": "tokens_per_s",
        "runs": [4, 4],
        "medians": [1002.5, 1105.0],
        "ratio": 1105 / 1002.5,
        "spread": [1090 / 1010, 1120 / 990],
        "spread_of": "95% interval",
        "p": pytest.approx(2 / 70),
        "verdict": "faster",
        "runs_needed": None,
    }


def test_three_runs_each_are_too_few_however_far_apart(run):
    _, out, _ = run(decode_rows([1, 2, 3]), decode_rows([101, 102, 103]), "--metrics=tokens_per_s")
    assert printed_line(out, "tokens_per_s").endswith(" [33.667..103] too few runs")
    assert "3+3 runs are too few for a verdict: 4+4 are needed" in out


def test_one_run_each_shows_the_spread_of_its_steps_as_within_run(run):
    slower = {"step_ms_p25": 18.0, "step_ms_p50": 20.0, "step_ms_p75": 27.0}
    _, out, _ = run(decode_rows([1000]), decode_rows([500], **slower), "--metrics=tokens_per_s,step_ms_p50")
    assert printed_line(out, "step_ms_p50").endswith(" 2.000 - too few runs")
    after = out[out.index("step_ms_p50") :].splitlines()[1]
    assert after == "    within-run, quartiles of the steps: 1.500..3.000"  # 18 / 12 and 27 / 9
    assert printed_line(out, "tokens_per_s").endswith(" 0.500 - too few runs")
    for other in (decode_rows([500] * 2, **slower), decode_rows([500], **slower | {"step_ms_p25": None})):
        assert "within-run" not in run(decode_rows([1000]), other, "--metrics=step_ms_p50")[1]


@pytest.mark.parametrize("bad", [None, "fast", True, [1], float("nan"), float("inf"), 1e300, 10**400, "absent"])
def test_a_value_that_is_none_is_shown_as_a_dash(run, bad):
    b = decode_rows([1000] * 5, peak_share=bad)
    if bad == "absent":
        b = decode_rows([1000] * 5)
    code, out, _ = run(
        decode_rows([1000] * 5, peak_share=0.5), b, "--metrics=tokens_per_s,peak_share", "--output=out.jsonl"
    )
    assert code == 0
    assert printed_line(out, "peak_share") == "peak_share 5+0 0.5 - - - -"
    b[0] = b[0] | {"peak_share": 0.25}
    out = run(decode_rows([1000] * 5, peak_share=0.5), b, "--metrics=peak_share")[1]
    assert printed_line(out, "peak_share").startswith("peak_share 5+1 0.5 0.25 0.500 ")


def test_zeros_and_negative_values_have_a_verdict_and_no_ratio(run):
    a, b = ([DECODE_ROW | {"x": v - i} for i in range(4)] for v in (0, 100))
    assert printed_line(run(a, b, "--metrics=x")[1], "x") == "x 4+4 -1.5 98.5 - - higher 0.029"


def test_extreme_numbers_and_names_stay_within_eighty_columns(run):
    """Checked by `run`; here that nothing is lost to it."""
    rng = np.random.default_rng(0)
    extreme = lambda n: [
        DECODE_ROW | {"tokens_per_s": 10.0 ** rng.uniform(-140, 140), "step_ms_p50": -(10.0 ** rng.uniform(90, 140))}
        for _ in range(n)
    ]
    for n in (1, 3, 4, 30, 150):
        name = {"workload": "trace" * 40, "settings": {f"{'s' * 90}{i}": "v" for i in range(3)}}
        a, b = ([r | name | {"w" * 100: 1.5} for r in extreme(n)] for _ in "ab")
        code, out, _ = run(a, b, f"--metrics=tokens_per_s,step_ms_p50,{'w' * 100}")
        assert code == 0 and out.replace("\n", "").replace(" ", "").count("w" * 100) == 1
        assert f"{n}+{n}" in printed_line(out, "tokens_per_s")


def test_nan_and_control_characters_in_a_row_do_no_harm(run, tmp_path):
    odd = {"workload": "a\x1b[31m\nb", "settings": DECODE_ROW["settings"] | {"soft_cap": float("nan"), "x": 1.0}}
    text = as_json_lines(decode_rows([1000] * 4, **odd)).replace('"x": 1.0', '"x": 1e999')
    code, out, _ = run(text, text, "--output=out.jsonl")
    assert code == 0 and "a\\u001b[31m\\nb" in out and "\x1b" not in out
    work = json.loads((tmp_path / "out.jsonl").read_text())["groups"][0]["work"]
    assert work["workload"] == odd["workload"] and not {"settings.soft_cap", "settings.x"} & set(work)


# What counts as the same work


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"settings": DECODE_ROW["settings"] | {"head_dim": 256}}, ["settings.head_dim: 128 | 256"]),
        ({"settings": DECODE_ROW["settings"] | {"soft_cap": 30.0}}, ["settings.soft_cap: - | 30.0"]),
        ({"mesh": {"data": 2, "context": 2, "model": 4}}, ["mesh.context: 1 | 2", "mesh.data: 4 | 2"]),
        ({"devices": {"TPU v4": 16}}, ["devices.TPU v5e: 16 | -", "devices.TPU v4: - | 16"]),
        ({"benchmark": "other"}, ["benchmark: decode | other"]),
        ({"mode": "served"}, ["mode: - | served"]),
        ({"processes": 1}, ["processes: 4 | 1"]),
        ({"workload": "a.csv"}, ["workload: the built-in workload | a.csv"]),
        ({"requests": 97}, ["requests: 96 | 97"]),
        ({"pool_pages": 64}, ["pool_pages: 512 | 64"]),
        ({"tokens": 8000}, ["tokens: 9000 | 8000"]),
        ({"prefill_tokens": 6}, ["prefill_tokens: 70000 | 6"]),
        ({"projected": True}, ["projected: false | true"]),
    ],
)
def test_other_work_is_not_compared_and_what_differs_is_named(run, change, told):
    """Of the nearest: b's first row differs in all of that and in one thing more."""
    nearest = decode_rows([1000] * 4, **change)
    code, out, err = run(decode_rows([1000] * 4), [nearest[0] | {"requests": 1, "mode": "far"}, *nearest])
    assert (code, out) == (1, "")
    first, *rest = err.splitlines()
    assert first == "paged-dist-compare: error: no work is in both; the nearest two, a | b:"
    assert [line.strip() for line in rest] == told


def test_what_the_work_does_not_depend_on_is_told_and_compared(run):
    a = decode_rows([1000] * 4, flags={"output": "x/a.jsonl", "profile_dir": None})
    later = {"versions": {"python": "3.11", "jax": "0.11.0", "libtpu": "1"}, "git_commit": "bbbb", "time": "later"}
    b = decode_rows([1000] * 3, **later, flags={"output": "y/b.jsonl", "profile_dir": "traces"})
    older = {k: v for k, v in DECODE_ROW["settings"].items() if k != "soft_cap"}  # which is null in the others
    b += decode_rows([1000], **later | {"git_commit": "cccc"}, projected=False, mode=None, settings=older)
    code, out, _ = run(a, b)
    assert code == 0 and "tokens_per_s 4+4 " in printed_line(out, "tokens_per_s")
    told = out[out.index("differs, a | b") :].split("\n\n")[0].splitlines()[1:]
    assert sorted(told) == [
        "flags.profile_dir: - | -, traces",
        "git_commit: aaaa | bbbb, cccc",
        "versions.jax: 0.10.2 | 0.11.0",
        "versions.jaxlib: 0.10.2 | -",
        "versions.libtpu: - | 1",
    ]


def test_flags_as_a_list_are_told_one_by_one():
    a, b = (
        [DECODE_ROW | {"flags": ["--batch=4", f"--output={o}", *more]}] for o, more in (("x", []), ("y", ["--nocheck"]))
    )
    assert record.differences(a, b) == {"flags.nocheck": [["-"], [""]]}
    assert record.differences(decode_rows([1], flags="-x"), decode_rows([1], flags="-y")) == {"flags": [["-x"], ["-y"]]}


def test_groups_are_told_apart_and_those_of_one_file_listed(run):
    seed = lambda n, **more: {"settings": DECODE_ROW["settings"] | {"seed": n}, **more}
    a = decode_rows([1000] * 4) + decode_rows([10, 11, 12, 13], **seed(1)) + decode_rows([5], **seed(2))
    b = (
        decode_rows([20, 21, 22, 23], **seed(1, git_commit="bbbb"))
        + decode_rows([1000] * 4)
        + decode_rows([5, 5], projected=True)
    )
    code, out, _ = run(a, b, "--metrics=tokens_per_s")
    assert code == 0
    whole, *parts = out.split("\nsettings.seed=")
    assert "settings.layers=2" in whole and "seed" not in whole
    same, other, only_a, only_b = parts
    assert same.startswith("0; projected=false\ndiffers, a | b: nothing\n") and "noise 1.000" in same
    assert other.startswith("1; projected=false\ndiffers, a | b\ngit_commit: aaaa | bbbb\n")
    assert printed_line(other, "tokens_per_s") == "tokens_per_s 4+4 11.5 21.5 1.870 1.538..2.300 faster 0.029"
    assert other.rstrip().endswith("only in a")
    assert only_a.startswith("2; projected=false: 1 run\n") and only_a.rstrip().endswith("only in b")
    assert only_b.startswith("0; projected=true: 2 runs\n")


def test_partial_runs_are_left_out_with_a_note(run):
    a = decode_rows([1000] * 4) + decode_rows([1] * 2, partial=True, tokens=3)
    b = decode_rows([1000] * 4, partial=False, oracle_passed=False)
    code, out, _ = run(a, b)
    assert code == 0 and printed_line(out, "tokens_per_s").startswith("tokens_per_s 4+4 1000 1000 ")
    assert "a  a.jsonl: 4 runs, 2 partial left out\nb  b.jsonl: 4 runs, 4 with oracle_passed false\n" in out
    assert "only in" not in out
    code, out, err = run(decode_rows([1] * 4, partial=True), b)
    assert (code, out) == (1, "") and err == "paged-dist-compare: error: a.jsonl: every run is partial\n"


def test_no_metric_in_common_is_nothing_comparable(run):
    code, out, err = run(decode_rows([1] * 4), decode_rows([1] * 4), "--metrics=tokens_a_second,x")
    assert (code, out) == (1, "") and "no row of both files has a value of tokens_a_second, x" in err


# Checksums

DIFFERS = "checksum differs: OUTPUTS ARE NOT THE SAME"


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ({}, 0, "checksum same: 00112233aabbccdd\n"),
        ({"checksum": None}, 0, None),
        ({"checksum": "ff"}, 1, f"{DIFFERS}\n    00112233aabbccdd | ff\n"),
        ({"checksum": "ff", "git_commit": "bbbb"}, 1, DIFFERS),
        ({"checksum": "ff", "versions": DECODE_ROW["versions"] | {"python": "3.12"}}, 1, DIFFERS),
        (
            {"checksum": "ff", "versions": DECODE_ROW["versions"] | {"jax": "0.11.0"}},
            0,
            "checksum differs, and so do versions",
        ),
        (
            {"checksum": "ff", "versions": DECODE_ROW["versions"] | {"libtpu": "1"}},
            0,
            "checksum differs, and so do versions",
        ),
    ],
)
def test_other_checksums_of_the_same_work_fail_unless_the_compiler_is_another(run, change, code, told):
    got, out, _ = run(decode_rows([1000] * 4), decode_rows([1000] * 4, **change))
    assert got == code
    assert ("OUTPUTS ARE NOT THE SAME" in out) == (code == 1)
    assert told in out if told else "checksum" not in out


def test_a_file_whose_own_runs_disagree_is_not_excused_by_another_compiler(run):
    newer = {"versions": DECODE_ROW["versions"] | {"jax": "0.11.0"}}
    b = decode_rows([1000], **newer, checksum="ff") + decode_rows([1000], **newer, checksum="ee")
    code, out, _ = run(decode_rows([1000]), b)
    assert code == 1 and f"{DIFFERS}\n    00112233aabbccdd | ee, ff\n" in out


def test_checksums_of_other_work_are_not_compared(run):
    other = decode_rows([1000], settings=DECODE_ROW["settings"] | {"seed": 5}, checksum="ff")
    code, out, _ = run(decode_rows([1000]), decode_rows([1000]) + other)
    assert code == 0 and "OUTPUTS" not in out


# Files


@pytest.mark.parametrize(
    "tail", ['{"tokens_per_s": 1', '{"a": "\u00e9'.encode()[:-1], b"\0\0\0", '{"a": 1,}\n', "[" * 5000]
)
@pytest.mark.parametrize("where", [0, 2, 4])
def test_a_broken_line_is_left_out_with_a_warning(run, tail, where):
    tail = tail if isinstance(tail, bytes) else tail.encode()
    a = decode_rows([1000] * 4)
    text = as_json_lines(a).encode().splitlines(keepends=True)
    code, out, err = run(b"".join([*text[:where], tail.rstrip(), b"\n", *text[where:]]), a)
    assert code == 0 and "tokens_per_s 4+4 " in printed_line(out, "tokens_per_s")
    assert err == f"paged-dist-compare: warning: a.jsonl: line {where + 1}: not JSON (half-written?), left out\n"


def test_a_last_line_without_its_newline_counts_and_blank_lines_do_not(run):
    a = decode_rows([1000] * 4)
    code, out, err = run("\n" + as_json_lines(a).replace("\n", "\r\n\r\n").rstrip(), a)
    assert (code, err) == (0, "") and "tokens_per_s 4+4 " in printed_line(out, "tokens_per_s")


GOOD = as_json_lines(decode_rows([1]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD + "[1, 2]\n" + GOOD, "b.jsonl: line 2: is JSON, but no object"),
        (GOOD + "\n7", "b.jsonl: line 3: is JSON, but no object"),
        ("", "b.jsonl: is empty"),
        ("\n \n", "b.jsonl: is empty"),
        ('{"benchmark"', "b.jsonl: holds no row"),
    ],
)
def test_a_file_that_is_no_json_lines_is_refused(run, text, says):
    assert run(GOOD, text) == (2, "", f"paged-dist-compare: error: {says}\n")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--metrics="], "--metrics: names no metric"),
        (["--metrics=, ,"], "--metrics: names no metric"),
        (["--metric=x"], "unrecognized arguments: --metric=x"),
        (["c.jsonl"], "unrecognized arguments: c.jsonl"),
        (["--output="], "--output='': is empty"),
        (["--output=."], "--output='.': is a folder"),
        (["--output=./b.jsonl"], "--output='./b.jsonl': is one of the files to compare"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(run, tmp_path, options, says):
    code, out, err = run(GOOD, GOOD, *options)
    assert (code, out) == (2, "") and err.startswith("paged-dist-compare: error: ") and says in err
    assert err.count("\n") == 1 and (tmp_path / "b.jsonl").read_text() == GOOD
