"""The benchmarks' own arithmetic, and that they run. Their figures are nobody's test."""

import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_cost  # noqa: E402
import bench_fidelity  # noqa: E402
import bench_gpu  # noqa: E402
import bench_lean  # noqa: E402
import bench_loops  # noqa: E402
import bench_step  # noqa: E402
import bench_training  # noqa: E402
import bench_width  # noqa: E402
import harness  # noqa: E402
import on_gpu  # noqa: E402
import pictures  # noqa: E402
import plot  # noqa: E402
import tasks  # noqa: E402

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


def test_model_is_pretrained_once_and_then_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = torch.nn.Linear(3, 2)
    harness.pretrained(trained, lambda: torch.nn.init.ones_(trained.weight), "it")
    again = torch.nn.Linear(3, 2)
    harness.pretrained(again, lambda: pytest.fail("trained again"), "it")
    assert torch.equal(again.weight, trained.weight) and torch.equal(again.bias, trained.bias)
    assert not any(p.requires_grad for p in again.parameters())
    assert [path.name for path in (tmp_path / "runs/paper").iterdir()] == ["it.pt"]


def test_model_without_a_name_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    harness.pretrained(torch.nn.Linear(3, 2), lambda: None, None)
    assert not list(tmp_path.iterdir())


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
    columns = 2 * 3 * (2 * 8 + 1)  # what each column owes to the decay of either factor, and whether it moves
    numbers = 2 * 7 * 8  # of each layer's step, its count among them
    assert held("oplora exact") == 3 * 4 * sum(GENERATORS) + 4 * (32 + 16) + columns + numbers


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


def test_bench_step_quick_runs(quick):
    rows = quick(bench_step)
    kinds = [row["kind"] for row in rows]
    assert kinds == ["memory"] * 6 + ["step"] * 12 + ["roofline"] * 2 + ["forward and backward"] + ["step"] * 6
    assert all(row["device"] and row["threads"] and row["torch"] and row["isa"] for row in rows)
    assert plot.step_tables(rows)


# ---- tasks ----


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs a benchmark's quick mode in this process, which has its libraries; returns the rows that it left."""

    def quick(benchmark, *arguments):
        output = tmp_path / f"{benchmark.__name__}.json"
        monkeypatch.setattr(sys, "argv", [benchmark.__name__, "--quick", "--output", str(output), *arguments])
        threads = torch.get_num_threads()
        try:
            benchmark.main()
        finally:
            torch.set_num_threads(threads)
        return harness.read_rows(output)

    return quick


def toy_case(seed):
    return tasks.oplora_case("toy factorisation", "exact", "sign", tasks.Rate(1e-2), seed)


def test_factorisation_starts_at_m_over_its_rank_r_optimum():
    problem = tasks.Factorisation(seed=0, n=12, r=2)
    U, S, V = torch.linalg.svd(problem.M)
    best = (problem.M - (U[:, :2] * S[:2]) @ V[:2]).square().mean()
    assert problem.loss().item() == pytest.approx((problem.M.square().mean() / best).item(), rel=1e-4)


def test_rotated_by_a_quarter_turn_and_back():
    images = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    quarter = torch.full((3,), math.pi / 2)
    torch.testing.assert_close(pictures.rotated(images, quarter), images.rot90(1, (1, 2)))
    torch.testing.assert_close(pictures.rotated(pictures.rotated(images, quarter), -quarter), images)


def test_rings_look_alike_at_any_angle():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 29), torch.linspace(-1, 1, 29), indexing="ij")
    rings = torch.exp(-(((x**2 + y**2).sqrt() - 0.5) ** 2) / 0.05)[None].repeat(5, 1, 1)
    turned = pictures.rotated(rings, pictures.random_angles(5, torch.Generator().manual_seed(0)))
    inner = slice(5, 24)
    assert (turned - rings)[:, inner, inner].abs().max() < 0.04


def test_pretrained_digits_are_known_upright_and_not_rotated():
    model, images, labels = tasks.pretrained_on(pictures.toy)
    upright, _ = pictures.toy()
    hits = [(model(x.flatten(1)).argmax(1) == labels).float().mean() for x in (upright, images)]
    assert hits[0] > 0.95
    assert hits[1] < 0.8


def test_runs_of_a_case_have_the_same_losses_and_other_seeds_others():
    first, again, other = (tasks.run(toy_case(seed)) for seed in (0, 0, 1))
    assert first["losses"] == again["losses"] != other["losses"]
    assert [mark for mark, _ in first["losses"]] == [2, 8, 24]
    assert first["loss"] == first["losses"][-1][1]
    assert tasks.case_of(first) == toy_case(0)


def test_lora_run_holds_16_bytes_an_entry_and_its_steps_of_torch():
    row = tasks.run(tasks.lora_case("toy factorisation", 1e-2, 0))
    assert row["held_bytes"] == 16 * row["factor_numbers"] + 2 * 4  # a step count for A and one for B
    assert row["start"] is row["hidden_width"] is row["init"] is None


def test_run_that_diverges_says_where():
    row = tasks.run(tasks.lora_case("toy factorisation", 1e20, 0))
    assert row["loss"] is None
    assert 0 < row["diverged_at"] < row["steps"]
    json.dumps(row, allow_nan=False)


def test_mean_before_a_mark_is_of_the_tail():
    task = tasks.TOYS["toy digits"]
    assert task.tail == 4
    assert task.mean_before(6, [9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 50.0]) == 2.5
    assert task.mean_before(1, [9.0, 1.0]) == 9.0


def test_run_all_goes_on_where_it_was(tmp_path, capsys):
    output = tmp_path / "rows.json"
    cases = [tasks.lora_case("toy factorisation", lr, 0) for lr in (1e-3, 1e-2)]
    tasks.run_all(cases[:1], output, {"commit": "old"}, 1, apart=False)
    rows = tasks.run_all(cases[::-1], output, {"commit": "new"}, 1, apart=False)
    assert [(row["lr"], row["commit"]) for row in rows] == [(1e-2, "new"), (1e-3, "old")]
    rows = tasks.run_all(cases[:1], output, {"commit": "newer"}, 1, fresh=True, apart=False)
    assert [(row["lr"], row["commit"]) for row in rows] == [(1e-3, "newer")]
    assert {row["lr"]: row["commit"] for row in harness.read_rows(output)} == {1e-2: "new", 1e-3: "newer"}
    assert "1/1" in capsys.readouterr().out


# ---- bench_fidelity ----


def test_fidelity_plan_pairs_the_states_from_the_same_seeds():
    cases = list(bench_fidelity.plan(["factorisation", "smollm2"], ["sign"], seeds=3))
    for state in ("exact", "lean"):
        some = [case for case in cases if case.state == state]
        assert {case.seed for case in some} == {0, 1, 2}
        assert {case.start for case in some} == {"sign"}
    assert len([case for case in cases if case.state == "lean"]) == 3 * (3 + 3)
    assert len([case for case in cases if case.state == "exact"]) == 3 * (3 + 3)
    assert [case.seed for case in cases if case.state == "lora" and case.task == "smollm2"] == [0, 0, 0]
    assert len(set(cases)) == len(cases)


def test_bench_fidelity_quick_runs_and_resumes(quick, capsys):
    rows = quick(bench_fidelity, "--threads", "1")
    assert {row["task"] for row in rows} == set(tasks.TOYS)
    assert {row["state"] for row in rows} == {"lora", "exact", "lean"}
    assert all(row["device"] and row["torch"] and row["isa"] and row["threads"] == 1 for row in rows)
    assert all(row["loss"] is not None and row["bytes_per_entry"] >= 16 for row in rows)
    assert plot.fidelity_tables(rows).count("| a random LLaMA on counting, held out |") == 2
    capsys.readouterr()
    assert quick(bench_fidelity, "--threads", "1") == rows
    assert capsys.readouterr().out.startswith(f"{len(rows)} rows")


def test_ranks_are_compared_on_lean_alone(quick):
    rows = quick(bench_fidelity, "--ranks", "--threads", "1")
    assert {row["state"] for row in rows} == {"lean"}
    assert {(row["weight_rank"], row["moment_rank"]) for row in rows} == set(bench_fidelity.RANKS)
    assert "d = 8, k = 4" in plot.rank_tables(rows)


def test_quick_rows_stay_out_of_the_results(monkeypatch, capsys):
    every = (bench_cost, bench_fidelity, bench_gpu, bench_lean, bench_loops, bench_step, bench_training, bench_width)
    for benchmark in every:
        monkeypatch.setattr(sys, "argv", [benchmark.__name__, "--quick"])
        with pytest.raises(SystemExit):
            benchmark.main()
    assert capsys.readouterr().err.count("--quick needs --output") == len(every)


# ---- bench_cost ----


def test_bench_cost_quick_runs(quick):
    rows = quick(bench_cost, "--threads", "1")
    assert [row["contender"] for row in rows] == list(plot.COSTS)
    assert rows[0]["ratio"] == 1 and all(row["ms"] > 0 and row["bytes_per_entry"] >= 16 for row in rows)
    assert plot.cost_tables(rows).count("| ms |") == 0 and plot.cost_tables(rows).count(" ms | ") == 4


@pytest.mark.parametrize("page", ["README.md", "docs/cost.md", "docs/lean.md", "docs/cuda.md"])
def test_page_has_the_tables_of_the_committed_results(page):
    text = (Path(__file__).parents[1] / page).read_text()
    assert plot.replace_all(text, plot.RESULTS) == text


# ---- bench_width ----


def test_bench_width_quick_runs(quick):
    rows = quick(bench_width, "--seeds", "1")
    memory, runs = plot.of_kind(rows, "memory"), plot.of_kind(rows, "run")
    assert len(memory) == 1 + 3 * 2
    assert {row["hidden_width"] for row in runs if row["state"] == "lean"} == {8, 32}
    tables = plot.width_tables(rows)
    assert tables.count("| H = 32 |") == 3
    assert tables.count("| plain LoRA |") == 2


@pytest.mark.parametrize("name", [bench_lean.EXACT, bench_lean.EAGER])
def test_counted_bytes_are_those_that_are_held(name):
    size = bench_lean.layers(1, 5, width=64, r=4)
    method = bench_lean.METHODS[name](bench_step.Inputs(size))
    bench_step.two_micro_batches(method)
    held = bench_step.two_micro_batches(method)
    assert bench_width.counted_row(name, size)["held_bytes"] == pytest.approx(held, rel=0.01)


# ---- bench_lean ----


def test_bench_lean_quick_runs(quick):
    rows = quick(bench_lean, "--threads", "1")
    kinds = [row["kind"] for row in rows]
    assert kinds == ["memory"] * 6 + ["growth"] * 10 + ["step"] * 10 + ["roofline"] * 9
    assert all(row["device"] and row["threads"] and row["torch"] and row["isa"] for row in rows)
    assert plot.lean_tables(rows).count("| measuring |") == 3
    assert quick(bench_lean, "--threads", "1", "--kinds", "roofline")[:26] == rows[:26]


def test_bench_loops_quick_runs(quick):
    rows = quick(bench_loops)
    assert all(0 < row["ns"] < 1000 and row["bound"] in ("memory", "divider", "arithmetic") for row in rows)
    assert plot.loops_table(rows).count("lean_update21") == 1


def test_large_states_are_left_out():
    at_32 = {
        name: [size for size in bench_lean.growth_sizes(False) if bench_lean.fits(name, size)]
        for name in bench_lean.METHODS
    }
    sizes = {name: {(bench_lean.numbers(size), size.hidden_width) for size in found} for name, found in at_32.items()}
    assert max(sizes[bench_lean.OURS]) == (229 * 131072, 32)
    assert max(sizes[bench_lean.EXACT]) == (76 * 131072, 32)
    assert max(H for _, H in sizes[bench_lean.EXACT]) == 128
    assert max(sizes[bench_lean.EAGER]) == (8 * 131072, 32)
    assert max(H for _, H in sizes[bench_lean.OURS]) == 2048


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
    lines = plot.step_tables(made_up_rows()).splitlines()
    time_line = next(line for line in lines if line.startswith("| a model, r = 8 (2.5 M) | 8 |"))
    assert time_line.split(" | ")[2:5] == ["10.0 ms", "2.00x (1.50 to 2.50)", "3.00x (2.50 to 3.50)"]
    assert "| a model, r = 8 | 0 / 4 | 3 / 8 | 6 / 12 | 9 / 16 | 12 / 20 | 15 / 24 |" in lines
    assert "| a model, r = 8 | 50% | 4.0 ms | 15.0 | 20.0 | 75% | memory |" in lines


def test_tables_need_every_row():
    with pytest.raises(SystemExit, match="run the benchmark again"):
        plot.step_tables([row for row in made_up_rows() if row["contender"] != "eager, AdamW fused"])


def test_readme_is_replaced_between_the_markers(tmp_path, monkeypatch):
    (tmp_path / "bench_step.json").write_text(json.dumps(made_up_rows()))
    readme = tmp_path / "README.md"
    begin, end = plot.markers("bench_step")
    readme.write_text(f"before\n{begin}\nstale table\n{end}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["plot.py", "--results", str(tmp_path), "--pages", str(readme)])
    for _ in range(2):  # a second time changes nothing
        plot.main()
        text = readme.read_text()
        assert text.startswith(f"before\n{begin}\n\nTime of")
        assert text.endswith(f"\n\n{end}\nafter\n")
        assert "stale table" not in text
        assert text.count(plot.time_table(made_up_rows())) == 1


def test_readme_without_markers_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="bench_step:begin"):
        plot.replace_all("no markers", tmp_path)


def test_readme_without_the_second_marker_is_refused():
    with pytest.raises(SystemExit, match="bench_lean:end"):
        plot.replace_between("<!-- bench_lean:begin -->", "bench_lean", "new")


def made_up_runs() -> list[harness.Row]:
    """Two seeds: exact ends at 1 and 3, lean at 2 and 5."""
    facts = {key: value for key, value in made_up_rows()[0].items() if key not in ("kind", "size", "contender")}
    case = {"kind": "run", "task": "digits", "title": "a task", "lr": 1e-3, "held_out": None, **facts}
    ours = {"start": "sign", "init": "paper", "hidden_lr_ratio": 1.0, "hidden_width": 32}
    ends = {"exact": (1.0, 3.0), "lean": (2.0, 5.0)}
    rows = [{**case, **ours, "state": state, "loss": loss} for state, losses in ends.items() for loss in losses]
    return [*rows, {**case, **dict.fromkeys(ours), "state": "lora", "loss": 4.0}]


def test_fidelity_summary_of_made_up_runs():
    (line,) = plot.fidelity_summary(made_up_runs(), "sign")
    assert line.cells()[:5] == ["a task", "0.001", "4.0000", "2.0000 ± 1.4142", "3.5000 ± 2.1213"]
    assert line.difference == pytest.approx(1.5 / math.sqrt(2))
    assert line.cells()[5:] == ["+1.06", "**no**"]
    assert "Of 1 differences 0 are within one" in plot.fidelity_tables(made_up_runs())


def test_fidelity_summary_of_a_run_that_diverged():
    rows = made_up_runs()
    rows[3]["loss"] = None
    (line,) = plot.fidelity_summary(rows, "sign")
    assert line.cells()[4:] == ["1 of 2 diverged", "", ""]


def made_up_widths() -> list[harness.Row]:
    """Exact and lean lose the same; a wider generator and a higher rate lose less."""
    runs = made_up_runs()
    rows = [
        {**row, "lr": lr, "hidden_width": width, "loss": 1 / (lr * (width or 1))}
        for row in (runs[0], runs[2], runs[4])
        for lr in (0.01, 0.1)
        for width in ((None,) if row["state"] == "lora" else (8, 32))
    ]
    memory = {
        **made_up_rows()[0],
        "kind": "memory",
        "size": "one layer",
        "peak_per_entry": 9.0,
        "hidden_path_per_entry": 1.0,
    }
    contenders = {"lora, AdamW fused": 0, "oplora lean, sign": 1, "oplora exact": 12, "eager, AdamW fused": 16}
    return rows + [
        {**memory, "contender": name, "hidden_width": H, "bytes_per_entry": 16 + factor * H, "measured": H == 8}
        for name, factor in contenders.items()
        for H in (8, 32)
    ]


def test_width_tables_of_made_up_rows():
    lines = plot.width_tables(made_up_widths()).splitlines()
    assert "| plain LoRA | 100.0000 | 10.0000 |" in lines
    assert "| H = 32 | 3.1250 (3.1250) | 0.3125 (0.3125) |" in lines
    assert "| H = 8 | 24 | 112 | 144 |" in lines
    assert "| H = 32 | 48 (counted) | 400 (counted) | 528 (counted) |" in lines


def made_up_growth() -> list[harness.Row]:
    """Lean from 8 to 32 units and 1e5 to 1e6 entries; the eager way only for the smaller N."""
    memory = plot.of_kind(made_up_widths(), "memory")
    times = {"kind": "growth", "ratio": 1.0, "over": "oplora lean, sign"}
    return memory + [
        {**memory[0], **times, "contender": name, "factor_numbers": N, "hidden_width": H, "ms": N / 1e6 + H / 1e3}
        for name in ("oplora lean, sign", "eager, AdamW fused")
        for N, H in ((10**5, 32), (10**6, 32), (3 * 10**6, 32), (10**6, 8), (10**6, 128))
        if "lean" in name or (N <= 10**6 and H == 32)
    ]


def test_lean_tables_of_made_up_rows():
    rows = [{**row, "factor_numbers": row.get("factor_numbers", 10**6)} for row in made_up_growth()]
    lines = plot.lean_tables(rows).splitlines()
    assert "Time of `step()` alone against N, at H = 32:" in lines
    assert "| 3,000,000 | 3.03 |  |" in lines
    assert "Time of `step()` alone against H, at N = 1,000,000:" in lines
    assert "| 32 | 1.03 | 1.03 |" in lines
    assert "| lean, signs | 8 | 24.0 | 1.0 | 9.0 |" in lines


def test_new_plots_write_a_png(tmp_path):
    plot.draw_lean(made_up_growth(), tmp_path / "lean.png")
    plot.draw_width(made_up_widths(), tmp_path / "width.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_writes_a_png(tmp_path):
    plot.draw_step(made_up_rows(), tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


# ---- bench_gpu ----


def test_bench_gpu_writes_rows_of_every_contender(tmp_path):
    """On the CPU, where it measures nothing of a GPU but runs the same way."""
    path = tmp_path / "gpu.json"
    bench_gpu.main(["--quick", "--device", "cpu", "--output", str(path)], print_row=lambda _: None)
    rows = harness.read_rows(path)
    for kind in ("step with gradients", "memory"):
        assert {row["contender"] for row in rows if row["kind"] == kind} == set(bench_gpu.METHODS)
    assert {row["contender"] for row in rows if row["kind"] == "step"} == {*bench_gpu.OURS, bench_gpu.LORA}
    assert all(row["gbps"] > 0 for row in rows if row["kind"] == "step")
    filled = plot.gpu_tables(rows)
    assert "A copy moves" in filled
    assert next(line for line in filled.splitlines() if line.startswith("| lean, signs")).count(" ms |") == 1


def test_the_gpu_table_is_empty_where_nothing_was_measured(tmp_path):
    begin, end = plot.markers("bench_gpu")
    text = plot.replace_all(f"{begin}{end}", tmp_path)
    assert "Not measured yet" in text
    assert "| lean, signs |  |  |  |  |  |" in text


def test_bench_training_writes_a_row_of_every_contender(tmp_path):
    path = tmp_path / "training.json"
    bench_training.main(["--quick", "--device", "cpu", "--steps", "1", "--output", str(path)], print_row=lambda _: None)
    rows = harness.read_rows(path)
    assert [row["contender"] for row in rows] == [*bench_training.CONTENDERS, bench_training.AGAIN]
    assert all(row["ms"] > row["step_ms"] >= row["host_ms"] > 0 for row in rows if "left_out" not in row)
    assert sum("left_out" in row for row in rows) <= 1  # bitsandbytes


def test_part_of_on_gpu_that_takes_too_long_is_stopped_and_says_so(tmp_path):
    slow = on_gpu.Part([sys.executable, "-c", "import time; print('begun'); time.sleep(60)"], limit_s=3)
    assert on_gpu.run("slow", slow, tmp_path)["ended"] == "stopped after 3 s"
    assert (tmp_path / "slow.log").read_text() == "begun\n"
    absent = on_gpu.Part([], 1, needs="no-such-program")
    assert on_gpu.run("absent", absent, tmp_path)["ended"] == "left out: there is no no-such-program"


def test_on_gpu_runs_nothing_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        on_gpu.main(["--output", str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()


def test_on_gpu_ends_within_eight_minutes(tmp_path):
    assert sum(part.limit_s for part in on_gpu.parts(tmp_path, "90", []).values()) <= 8 * 60


def test_bench_gpu_measures_nothing_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        bench_gpu.main(["--output", str(tmp_path / "gpu.json")])
    assert not (tmp_path / "gpu.json").exists()


def test_bench_gpu_leaves_out_what_does_not_fit(monkeypatch):
    # plain LoRA and preset auto take 20, state lean 28 twice, with a kept start 32, state exact 60, eager 76
    room = 186 * sum(TOY.factor_sizes)
    monkeypatch.setattr(bench_gpu, "free_bytes", lambda _: room)
    left_out = [row["contender"] for row in bench_gpu.rows_of(TOY, "cpu", 3, 1.0) if row["kind"] == "left out"]
    assert left_out == [bench_gpu.EXACT, bench_gpu.EAGER]
