"""The benchmarks' own arithmetic, and that they run. Their figures are nobody's test."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_step  # noqa: E402
import harness  # noqa: E402
import plot  # noqa: E402

# ---- harness ----


def test_quantiles_of_known_numbers():
    assert harness.quantiles([5.0, 1.0, 4.0, 2.0, 3.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert harness.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_ratios_are_within_rounds():
    # each round is twice as slow as the one before; the ratio is 3 in all of them
    columns = harness.ratio_columns([3.0, 6.0, 12.0], over=[1.0, 2.0, 4.0])
    assert columns == {"ratio": 3.0, "ratio_20": 3.0, "ratio_80": 3.0}


def test_in_turns_alternates_the_order_and_leaves_out_the_warm_up():
    order = []
    contenders = {
        name: harness.Contender(lambda name=name: order.append(name), before=lambda: order.append("before"))
        for name in "ab"
    }
    seconds = harness.in_turns(contenders, rounds=2)
    assert [name for name in order if name != "before"] == ["a", "b", "b", "a", "a", "b"]
    assert order[::2] == ["before"] * 6
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_in_turns_times_the_run_alone():
    slow = harness.Contender(lambda: time.sleep(0.02), before=lambda: time.sleep(0.3))
    assert 0.02 <= min(harness.in_turns({"slow": slow}, rounds=2)["slow"]) < 0.3


def test_in_turns_stops_at_the_limit_after_three_rounds():
    seconds = harness.in_turns({"a": harness.Contender(lambda: None)}, rounds=50, limit_s=0)
    assert len(seconds["a"]) == 3


def test_bytes_held_counts_each_storage_once():
    x = torch.zeros(1000)
    nested = {
        "x": x,
        "parts": [x[:10], x.view(10, 100)],
        "pair": (torch.zeros(3, dtype=torch.float64), None, 2),
    }
    assert harness.bytes_held(nested) == 4000 + 24
    assert harness.bytes_held(nested, by_others=[x[3:]]) == 24


def test_peak_memory_sees_what_is_freed_again():
    with harness.PeakMemory() as peak:
        torch.ones(2**24)
    slack = 2**20  # the kernel adds up each thread's pages in batches
    assert 2**26 - slack <= peak.bytes < 2**26 + 2**24


def test_write_rows_leaves_one_whole_file(tmp_path):
    path = tmp_path / "new" / "rows.json"
    harness.write_rows(path, [{"ms": 1.5}])
    harness.write_rows(path, [{"ms": 2.5}, {"ms": 3.5}])
    assert harness.read_rows(path) == [{"ms": 2.5}, {"ms": 3.5}]
    assert os.listdir(path.parent) == ["rows.json"]


# ---- bench_step ----

TOY = bench_step.Size("toy", ((6, 10), (4, 4)), r=2, hidden_width=3)
GENERATORS = [n * 3 + n + 3 * 128 + 3 + 128 for n in (32, 16)]  # W2, c2, W1, c1, z


def held(name: str) -> int:
    method = bench_step.METHODS[name](bench_step.Inputs(TOY))
    bench_step.two_micro_batches(method)  # torch.optim makes its moments in the first step
    return bench_step.two_micro_batches(method)


def test_eager_holds_four_arrays():
    step_counts = 2 * 5 * 4  # a float of torch.optim.AdamW for each parameter
    assert held("eager, AdamW fused") == 4 * 4 * sum(GENERATORS) + step_counts


def test_oplora_holds_three_arrays_and_the_factors_gradients():
    columns = 2 * 3 * (8 + 1)  # what each column owes to weight decay, and whether it moves
    assert held("oplora exact") == 3 * 4 * sum(GENERATORS) + 4 * (32 + 16) + columns


def test_plain_lora_holds_moments_and_gradients():
    assert held("lora, AdamW fused") == 3 * 4 * (32 + 16) + 4 * 4


def test_micro_batches_add_up_the_same_gradient():
    lora = bench_step.lora_fused(bench_step.Inputs(TOY))
    eager = bench_step.eager_fused(bench_step.Inputs(TOY))
    for _ in range(3):
        lora.micro_batch()
        eager.micro_batch()
    factors = [p.grad.flatten() for p in lora.factors]
    biases = [generator[2].bias.grad for generator in eager.generators]  # dL/dc2 is g
    torch.testing.assert_close(torch.cat(factors), torch.cat(biases))


def test_all_units_are_live_when_turned_on():
    some = bench_step.with_gradients(bench_step.oplora_exact, TOY)
    all_units = bench_step.with_gradients(bench_step.oplora_all_units, TOY)
    some.step()
    all_units.step()
    assert 0 < bench_step.live_fraction(some) < 1
    assert bench_step.live_fraction(all_units) == 1


def test_bytes_needed_of_a_toy():
    assert bench_step.bytes_needed(TOY, live=0.5) == 28 * 72 + 32 * 48


@pytest.mark.parametrize(
    ("ms", "call_ms", "cached_gbps", "bound"),
    [
        (12.0, 9.0, 1.0, "memory"),
        (20.0, 1.0, 50.0, "memory"),
        (20.0, 1.0, 5.0, "arithmetic"),
        (20.0, 15.0, 50.0, "calls"),
    ],
)
def test_bound_is_the_memory_from_70_percent_on_or_the_longest_part(ms, call_ms, cached_gbps, bound):
    row = {
        "bytes_needed": 1e8,
        "bandwidth_gbps": 10.0,
        "ms": ms,
        "call_ms": call_ms,
        "cached_gbps": cached_gbps,
    }
    columns = bench_step.bound_columns(row)
    assert columns["bound"] == bound
    assert columns["gbps"] == pytest.approx(100 / ms)


def test_bench_step_quick_runs(tmp_path):
    output = tmp_path / "step.json"
    command = [sys.executable, str(BENCHMARKS / "bench_step.py"), "--quick", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())
    kinds = [row["kind"] for row in rows]
    assert kinds == ["memory"] * 6 + ["step"] * 12 + ["roofline"] * 2 + ["forward and backward"] + ["step"] * 6
    assert all(row["device"] and row["threads"] and row["torch"] and row["isa"] for row in rows)
    assert plot.tables(rows)


# ---- plot ----


def made_up_rows() -> list[harness.Row]:
    facts = {
        "device": "CPU",
        "threads": 2,
        "isa": "avx2",
        "torch": "2.13",
        "oplora": "0.1",
        "commit": "abc",
        "date": "d",
    }
    facts |= {"allocator": "default"}
    rows = []
    for i, contender in enumerate(bench_step.METHODS):
        common = {"size": "a model, r = 8", "contender": contender, "w2_numbers": 2_500_000, **facts}
        times = {"ms": 10.0 * (i + 1), "ratio": i + 1.0, "ratio_20": i + 0.5, "ratio_80": i + 1.5}
        rows.append({"kind": "memory", "held_bytes": 3_000_000 * i, "peak_bytes": 4_000_000 * (i + 1), **common})
        for allocator in ("default", "keeping") if contender == plot.KEPT else ("default",):
            rows += [{"kind": "step", "micro_batches": n, **times, **common, "allocator": allocator} for n in (1, 8)]
        if "oplora" in contender:
            speed = {
                "ms": 4.0,
                "gbps": 15.0,
                "bandwidth_gbps": 20.0,
                "share_of_bandwidth": 0.75,
                "bound": "memory",
            }
            rows.append({"kind": "roofline", "live_fraction": 0.5, **speed, **common})
    training = {"kind": "forward and backward", "ratio": 1.0, "ratio_20": 0.99, "ratio_80": 1.01}
    return [*rows, {**training, "size": "LLaMA", "contender": "oplora exact", **facts}]


def test_tables_of_made_up_rows():
    lines = plot.tables(made_up_rows()).splitlines()
    time_line = next(line for line in lines if line.startswith("| a model, r = 8 (2.5 M) | 8 |"))
    assert time_line.split(" | ")[2:5] == ["10.0 ms", "2.00x (1.50 to 2.50)", "3.00x (2.50 to 3.50)"]
    assert "| a model, r = 8 | 0 / 4 | 3 / 8 | 6 / 12 | 9 / 16 | 12 / 20 | 15 / 24 |" in lines
    assert "| a model, r = 8 | 50% | 4.0 ms | 15.0 | 20.0 | 75% | memory |" in lines


def test_tables_need_every_row():
    with pytest.raises(SystemExit, match="run the benchmark again"):
        plot.tables([row for row in made_up_rows() if row["contender"] != "eager, AdamW fused"])


def test_readme_is_replaced_between_the_markers(tmp_path, monkeypatch):
    (tmp_path / "bench_step.json").write_text(json.dumps(made_up_rows()))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{plot.BEGIN}\nstale table\n{plot.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["plot.py", "--results", str(tmp_path), "--readme", str(readme)])
    for _ in range(2):  # a second time changes nothing
        plot.main()
        text = readme.read_text()
        assert text.startswith(f"before\n{plot.BEGIN}\n\nTime of")
        assert text.endswith(f"\n\n{plot.END}\nafter\n")
        assert "stale table" not in text
        assert text.count(plot.time_table(made_up_rows())) == 1


def test_readme_without_markers_is_refused():
    with pytest.raises(SystemExit, match="bench_step:begin"):
        plot.replace_between("no markers", "new")


def test_plot_writes_a_png(tmp_path):
    plot.draw_step(made_up_rows(), tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
