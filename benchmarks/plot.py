"""Figures and tables of the results, from their files alone.

python benchmarks/plot.py                       results/*.json -> results/*.png
python benchmarks/plot.py --table               their markdown tables
python benchmarks/plot.py --pages README.md docs/cost.md    the same, between the markers in these files that name a
                                benchmark: <!-- bench_step:begin --> and <!-- bench_step:end -->
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import Row, read_rows

RESULTS = Path(__file__).parent / "results"
OURS = "oplora exact"
RIVALS = {  # in a row's words: in the tables' and the figures'
    "oplora exact, all units on": "the same, all units on",
    "eager, AdamW fused": "eager, AdamW fused",
    "eager, AdamW foreach": "eager, AdamW foreach",
    "lora, AdamW fused": "plain LoRA, AdamW fused",
    "lora, AdamW default": "plain LoRA, AdamW default",
}
KEPT = "eager, AdamW fused"  # shown under both allocators
STATES = {  # contenders of bench_lean and bench_width
    "oplora lean, sign": "lean, signs",
    "oplora lean, uniform": "lean, uniform",
    "oplora lean, kept": "lean, start kept",
    "oplora exact": "exact",
    "eager, AdamW fused": "eager",
    "lora, AdamW fused": "plain LoRA",
}


# ---- reading ----


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def one(rows: Iterable[Row], **columns: object) -> Row:
    """The row with these values."""
    found = where(rows, **columns)
    if len(found) != 1:
        raise SystemExit(f"{len(found)} rows with {columns}, expected one; run the benchmark again")
    return found[0]


def sizes_of(rows: Iterable[Row]) -> list[str]:
    return values_of(rows, "size")


def values_of(rows: Iterable[Row], column: str) -> list[Any]:
    """In the order of the file, each once."""
    return list(dict.fromkeys(row[column] for row in rows))


def where(rows: Iterable[Row], **columns: object) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in columns.items())]


# ---- tables: all ----


def markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def machine(row: Row) -> str:
    return (
        f"{row['device']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}, {row['isa']}, float32, "
        f"torch {row['torch']}, oplora {row['oplora']} ({row['commit']}), {row['date']}."
    )


# ---- tables: bench_step ----


def ratio(row: Row) -> str:
    return f"{row['ratio']:.2f}x ({row['ratio_20']:.2f} to {row['ratio_80']:.2f})"


def time_table(rows: list[Row]) -> str:
    steps = [row for row in of_kind(rows, "step") if row["allocator"] == "default"]
    kept = [row for row in of_kind(rows, "step") if row["allocator"] == "keeping"]

    def cells(size: str, n: int) -> list[str]:
        ours = one(steps, size=size, micro_batches=n, contender=OURS)
        rivals = [ratio(one(steps, size=size, micro_batches=n, contender=rival)) for rival in RIVALS]
        best = ratio(one(kept, size=size, micro_batches=n, contender=KEPT))
        return [f"{size} ({ours['w2_numbers'] / 1e6:.1f} M)", str(n), f"{ours['ms']:.1f} ms", *rivals, best]

    counts = sorted({row["micro_batches"] for row in steps})
    header = ["adapted layers (numbers in W2)", "micro-batches", "state exact", *RIVALS.values()]
    header.append(f"{RIVALS[KEPT]}, freed memory kept")
    return markdown(header, (cells(size, n) for size in sizes_of(steps) for n in counts))


def memory_table(rows: list[Row]) -> str:
    memory = of_kind(rows, "memory")

    def cell(size: str, contender: str) -> str:
        row = one(memory, size=size, contender=contender)
        return f"{row['held_bytes'] / 1e6:.0f} / {row['peak_bytes'] / 1e6:.0f}"

    header = ["MB held / at the peak", "state exact", *RIVALS.values()]
    return markdown(header, ([size, *(cell(size, c) for c in (OURS, *RIVALS))] for size in sizes_of(memory)))


def roofline_table(rows: list[Row]) -> str:
    def cells(row: Row) -> list[str]:
        speed = [f"{row[key]:.1f}" for key in ("gbps", "bandwidth_gbps")]
        return [
            row["size"],
            f"{row['live_fraction']:.0%}",
            f"{row['ms']:.1f} ms",
            *speed,
            f"{row['share_of_bandwidth']:.0%}",
            row["bound"],
        ]

    header = ["`step()` alone", "live columns", "time", "GB/s", "of the machine's", "share", "bound by"]
    return markdown(header, map(cells, of_kind(rows, "roofline")))


def step_tables(rows: list[Row]) -> str:
    training = of_kind(rows, "forward and backward")[0]
    parts = [
        "Time of an optimizer step with everything around it but the model's own forward and backward, as a\n"
        "multiple of state exact's (20% to 80% quantile of the rounds):",
        time_table(rows),
        "*Freed memory kept*: with glibc told to keep what is freed (`mallopt`). Otherwise, as training usually runs,\n"
        "every dW2 of the eager way pays for its pages anew.",
        "Memory beside the model, to which A and B belong:",
        memory_table(rows),
        "What bounds it:",
        roofline_table(rows),
        f"The model's own forward and backward ({training['size']}) take {ratio(training)}\n"
        "of the time they take under plain LoRA.",
        f"Measured on {machine(rows[0])}",
    ]
    return "\n\n".join(parts)


# ---- tables: bench_lean ----


def contenders_of(rows: Iterable[Row]) -> list[str]:
    there = {row["contender"] for row in rows}
    return [name for name in STATES if name in there]


def is_lora(contender: str) -> bool:
    return contender.startswith("lora")


def lean_memory_table(rows: list[Row]) -> str:
    def cells(row: Row) -> list[str]:
        numbers = [f"{row[key]:.1f}" for key in ("bytes_per_entry", "hidden_path_per_entry", "peak_per_entry")]
        width = "" if is_lora(row["contender"]) else str(row["hidden_width"])
        return [STATES[row["contender"]], width, *numbers]

    header = ["bytes an entry", "H", "held", "of them z, W1, c1", "at the peak"]
    return markdown(header, map(cells, rows))


def growing_with(rows: Iterable[Row], column: str) -> list[Row]:
    """The rows of kind growth in which N grows (factor_numbers, at H = 32 or whatever most have), or H."""
    other = {"factor_numbers": "hidden_width", "hidden_width": "factor_numbers"}[column]
    rows = of_kind(rows, "growth")
    spans = {value: len(values_of(where(rows, **{other: value}), column)) for value in values_of(rows, other)}
    found = where(rows, **{other: max(spans, key=spans.__getitem__)})
    return sorted(found, key=lambda row: int(row[column]))


def growth_table(rows: list[Row], column: str) -> str:
    names = contenders_of(rows)

    def cells(value: int) -> list[str]:
        found = {row["contender"]: row for row in where(rows, **{column: value})}
        return [f"{value:,}", *(f"{found[name]['ms']:.2f}" if name in found else "" for name in names)]

    header = [{"factor_numbers": "N", "hidden_width": "H"}[column], *(f"{STATES[name]}, ms" for name in names)]
    return markdown(header, map(cells, values_of(rows, column)))


def lean_step_table(rows: list[Row]) -> str:
    ours = rows[0]["over"]
    rivals = [name for name in contenders_of(rows) if name != ours]

    def cells(size: str, n: int) -> list[str]:
        found = where(rows, size=size, micro_batches=n)
        ratios = [ratio(one(found, contender=rival)) for rival in rivals]
        return [size, str(n), f"{one(found, contender=ours)['ms']:.1f} ms", *ratios]

    header = ["adapted layers", "micro-batches", STATES[ours], *(STATES[rival] for rival in rivals)]
    counts = sorted(values_of(rows, "micro_batches"))
    return markdown(header, (cells(size, n) for size in sizes_of(rows) for n in counts))


def lean_roofline_table(rows: list[Row]) -> str:
    def cells(row: Row) -> list[str]:
        what = [STATES[row["contender"]], f"{row['factor_numbers'] / 1e6:.1f} M", str(row["hidden_width"]), row["part"]]
        speed = [f"{row[key]:.1f}" for key in ("gbps", "bandwidth_gbps", "cached_gbps")]
        return [*what, f"{row['ms']:.1f} ms", *speed, f"{row['share_of_bandwidth']:.0%}", row["bound"]]

    header = [
        "`step()` alone",
        "N",
        "H",
        "part",
        "time",
        "GB/s",
        "of the machine's",
        "in the caches",
        "share",
        "bound by",
    ]
    return markdown(header, map(cells, rows))


def lean_tables(rows: list[Row]) -> str:
    """Of the kinds that the file has."""
    growth, steps = of_kind(rows, "growth"), of_kind(rows, "step")
    memory, roofline = of_kind(rows, "memory"), of_kind(rows, "roofline")
    parts: list[str] = []
    if memory:
        parts += [
            f"Bytes that training takes for each of {memory[0]['factor_numbers'] / 1e6:.1f} M factor entries "
            f"({memory[0]['size']}),\nthe entry and its gradient included:",
            lean_memory_table(memory),
        ]
    for column, title in (
        ("factor_numbers", "N, at H = {hidden_width}"),
        ("hidden_width", "H, at N = {factor_numbers:,}"),
    ):
        if growth:
            some = growing_with(growth, column)
            parts += [f"Time of `step()` alone against {title.format(**some[0])}:", growth_table(some, column)]
    if steps:
        parts += [
            "Time of an optimizer step with everything around it but the model's own forward and backward, as a\n"
            "multiple of the lean state's (20% to 80% quantile of the rounds):",
            lean_step_table(steps),
        ]
    if roofline:
        parts += ["What bounds it:", lean_roofline_table(roofline)]
    return "\n\n".join([*parts, f"Measured on {machine(rows[0])}"])


def lean_summary(rows: list[Row]) -> str:
    """Bytes and time of each way at H = 32, or what its rows have, and of the lean state at its widest."""
    memory, growth = of_kind(rows, "memory"), growing_with(rows, "hidden_width")
    widest = max(row["hidden_width"] for row in memory)
    shown = [(row, row["hidden_width"]) for row in memory if row["hidden_width"] in (32, widest)]

    def cells(row: Row, H: int) -> list[str]:
        width = "" if is_lora(row["contender"]) else str(H)
        times = where(growth, contender=row["contender"], hidden_width=H)
        time = f"{times[0]['ms']:.1f} ms" if times else ""
        return [STATES[row["contender"]], width, f"{row['bytes_per_entry']:.1f}", time]

    size = growth[0]["factor_numbers"]
    header = ["", "H", "bytes an entry", f"`step()`, {size / 1e6:.1f} M entries"]
    table = markdown(header, (cells(row, H) for row, H in shown))
    return f"{table}\n\nAn entry's value and gradient are counted in. Measured on {machine(rows[0])}"


# ---- tables: bench_cost ----

COSTS = {
    "lora, AdamW fused": "LoRA, `torch.optim.AdamW(fused=True)`",
    "oplora auto": "OP-LoRA, `oplora.AdamW(model)`",
    "oplora flat": '`preset="flat"`',
    "oplora paper": '`preset="paper"`',
}


def cost_tables(rows: list[Row]) -> str:
    """The GPU's cells are empty: nothing was measured there."""

    def cells(name: str, title: str) -> list[str]:
        row = one(rows, contender=name)
        return [title, f"{row['bytes_per_entry']:.0f}", f"{row['ms']:.1f} ms", f"{row['ratio']:.2f}", ""]

    header = ["", "bytes an entry", "step, CPU", "over LoRA's", "step, GPU"]
    table = markdown(header, (cells(*contender) for contender in COSTS.items()))
    row = rows[0]
    where_it_was = f"{row['device']}, {row['threads']} threads, {row['isa']}, torch {row['torch']}, {row['date']}"
    return f"{table}\n\n{row['factor_numbers'] / 1e6:.1f} M entries in {row['layers']} layers. {where_it_was}."


# ---- tables: bench_fidelity ----


@dataclass(frozen=True)
class Spread:
    """The losses of one setting over its seeds. The deviation is the sample's."""

    mean: float
    std: float
    runs: int
    diverged: int = 0

    @classmethod
    def of(cls, rows: Sequence[Row], column: str = "loss") -> "Spread":
        values = [row[column] for row in rows if row[column] is not None]
        mean = float(np.mean(values)) if values else math.nan
        std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return cls(mean, std, len(rows), len(rows) - len(values))

    def __str__(self) -> str:
        if self.runs == 0:
            return ""
        if self.diverged:
            return f"{self.diverged} of {self.runs} diverged"
        return f"{self.mean:.4f}" if math.isnan(self.std) else f"{self.mean:.4f} ± {self.std:.4f}"


@dataclass(frozen=True)
class Agreement:
    """One task at one rate, from one start: what each state ends at."""

    title: str
    setting: str
    lora: Spread
    exact: Spread
    lean: Spread

    @property
    def difference(self) -> float | None:
        """(lean's mean - exact's) in exact's standard deviations; None if there is none, or if a run diverged."""
        if self.exact.diverged or self.lean.diverged or not self.exact.std > 0 or not self.lean.runs:
            return None
        return (self.lean.mean - self.exact.mean) / self.exact.std

    def cells(self) -> list[str]:
        difference = self.difference
        last = ["", ""] if difference is None else [f"{difference:+.2f}", "yes" if abs(difference) <= 1 else "**no**"]
        return [self.title, self.setting, str(self.lora), str(self.exact), str(self.lean), *last]


def fidelity_summary(rows: Iterable[Row], start: str) -> list[Agreement]:
    """A line for each task, rate and set-up of the generators; two where the task holds data out."""
    rows = of_kind(rows, "run")
    lora = where(rows, state="lora")
    ours = where(rows, start=start)
    summary = []
    for task in values_of(ours, "task"):
        for lr, init, hidden_lr_ratio in dict.fromkeys(
            (row["lr"], row["init"], row["hidden_lr_ratio"]) for row in where(ours, task=task)
        ):
            same = where(ours, task=task, lr=lr, init=init, hidden_lr_ratio=hidden_lr_ratio)
            plain = where(lora, task=task, lr=lr)
            setting = f"{lr:g}" if (init, hidden_lr_ratio) == ("paper", 1.0) else f"{lr:g}, {init}, {hidden_lr_ratio:g}"
            for column, what in (("loss", ""), ("held_out", ", held out")):
                if any(row[column] is not None for row in same) or column == "loss":
                    spreads = (
                        Spread.of(some, column)
                        for some in (plain, where(same, state="exact"), where(same, state="lean"))
                    )
                    summary.append(Agreement(same[0]["title"] + what, setting, *spreads))
    return summary


def fidelity_tables(rows: list[Row]) -> str:
    header = ["final loss", "rate", "plain LoRA", "exact", "lean", "lean - exact, in stds", "within one"]
    parts = []
    for start in (start for start in values_of(rows, "start") if start is not None):
        summary = fidelity_summary(rows, start)
        known = [line.difference for line in summary if line.difference is not None]
        within = sum(abs(difference) <= 1 for difference in known)
        parts += [
            f'State lean against state exact, both from the start "{start}": mean and standard deviation over the '
            f"seeds. Of {len(known)} differences {within} are within one of exact's standard deviations.",
            markdown(header, (line.cells() for line in summary)),
        ]
    parts += [
        "*Rate*: with two words behind it where A and B keep PEFT's start and the hidden path's rate is so much lower.",
        f"Trained on {machine(rows[0])}",
    ]
    return "\n\n".join(parts)


def rank_tables(rows: list[Row]) -> str:
    ranks = sorted({(row["weight_rank"], row["moment_rank"]) for row in rows})
    settings = dict.fromkeys((row["title"], row["task"], row["lr"], row["hidden_lr_ratio"]) for row in rows)

    def cells(title: str, task: str, lr: float, ratio: float) -> list[str]:
        same = where(rows, task=task, lr=lr, hidden_lr_ratio=ratio)
        losses = [str(Spread.of(where(same, weight_rank=d, moment_rank=k))) for d, k in ranks]
        return [title, f"{lr:g}" if ratio == 1 else f"{lr:g}, paper, {ratio:g}", *losses]

    header = ["final loss of lean", "rate", *(f"d = {d}, k = {k}" for d, k in ranks)]
    return f"{markdown(header, (cells(*some) for some in settings))}\n\nTrained on {machine(rows[0])}"


# ---- tables: bench_width ----


def width_table(rows: list[Row]) -> str:
    """The lean state's losses by width and rate, exact's behind them where it ran."""
    rates = sorted(values_of(rows, "lr"))

    def cells(H: int) -> list[str]:
        lean, exact = (where(rows, state=state, hidden_width=H) for state in ("lean", "exact"))
        losses = [(mean_loss(where(lean, lr=lr)), mean_loss(where(exact, lr=lr))) for lr in rates]
        return [f"H = {H}", *(f"{mine} ({other})" if other else mine for mine, other in losses)]

    plain = where(rows, state="lora")
    lines = [["plain LoRA", *(mean_loss(where(plain, lr=lr)) for lr in rates)]]
    lines += [cells(H) for H in sorted(values_of(where(rows, state="lean"), "hidden_width"))]
    return markdown([rows[0]["title"], *(f"{lr:g}" for lr in rates)], lines)


def mean_loss(rows: Sequence[Row]) -> str:
    spread = Spread.of(rows)
    return str(spread) if spread.diverged or not spread.runs else f"{spread.mean:.4f}"


def width_memory_table(rows: list[Row]) -> str:
    names = [name for name in contenders_of(rows) if not is_lora(name)]

    def cell(name: str, H: int) -> str:
        row = one(rows, contender=name, hidden_width=H)
        return f"{row['bytes_per_entry']:.0f}{'' if row['measured'] else ' (counted)'}"

    widths = sorted({row["hidden_width"] for row in rows})
    header = ["bytes an entry", *(STATES[name] for name in names)]
    return markdown(header, ([f"H = {H}", *(cell(name, H) for name in names)] for H in widths))


def width_tables(rows: list[Row]) -> str:
    runs, memory = of_kind(rows, "run"), of_kind(rows, "memory")
    plain = next(row for row in memory if is_lora(row["contender"]))
    parts = ["Final losses of the lean state (of the exact one) by width and learning rate, means over the seeds:"]
    parts += [width_table(where(runs, task=task)) for task in values_of(runs, "task")]
    parts += [
        f"Bytes that training takes for an entry, on {plain['size']}; plain LoRA: {plain['bytes_per_entry']:.0f}.",
        width_memory_table(memory),
        f"Measured on {machine(memory[0])}",
    ]
    return "\n\n".join(parts)


# ---- tables: bench_gpu ----

GPU = {  # contenders whose step is timed alone
    "oplora auto": "preset auto",
    "oplora auto, captured": "the same, as a CUDA graph",
    "oplora lean, kept start": "preset flat: lean, kept start",
    "oplora lean": "lean, signs",
    "oplora lean, captured": "the same, as a CUDA graph",
    "oplora lean, uniform start": "lean, uniform",
    "oplora exact": "exact",
    "lora, AdamW fused": "plain LoRA, AdamW fused",
}


def gpu_cells(rows: list[Row], contender: str) -> list[str]:
    """Time, GB/s, share of the copy's, with gradients over plain LoRA, memory; empty where nothing was measured."""
    found = {
        kind: where(of_kind(rows, kind), contender=contender) for kind in ("step", "step with gradients", "memory")
    }
    step, whole, memory = (row[0] if row else {} for row in found.values())
    return [
        f"{step['ms']:.2f} ms" if step else "",
        f"{step['gbps']:.0f}" if step.get("gbps") else "",
        f"{step['of_copy']:.0%}" if step.get("of_copy") else "",
        ratio(whole) if whole.get("ratio") else "",
        f"{memory['peak_mb']:.0f}" if memory.get("peak_mb") else "",
    ]


def gpu_tables(rows: list[Row]) -> str:
    header = ["contender", "`step()`", "GB/s", "of the copy's", "with gradients, over plain LoRA", "MB at the peak"]
    parts = []
    sized = [row for row in rows if "size" in row]  # all but the bandwidth's
    for size in sizes_of(sized) or [""]:
        own = where(sized, size=size)
        lines = [[title, *gpu_cells(own, name)] for name, title in GPU.items()]
        parts += [f"{size}:" if size else "Not measured yet:", markdown(header, lines)]
    if rows:
        (copy,) = of_kind(rows, "bandwidth")
        parts.append(f"A copy moves {copy['copy_gbps']:.0f} GB/s. Measured on {machine(copy)}")
    return "\n\n".join(parts)


# ---- tables: bench_loops ----


def loops_table(rows: list[Row]) -> str:
    def cells(row: Row) -> list[str]:
        divider = f"{row['divider_ns']:.2f}" if row["divider_ns"] else ""
        return [row["loop"], f"{row['ns']:.2f}", divider, str(row["bytes"]), f"{row['memory_ns']:.2f}", row["bound"]]

    header = ["loop", "ns a row", "divider alone", "bytes", "ns from memory", "bound by"]
    return f"{markdown(header, map(cells, rows[2:]))}\n\nMeasured on {machine(rows[0])}"


# ---- between the markers ----


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "bench_step": step_tables,
    "bench_lean": lean_tables,
    "lean_summary": lean_summary,
    "bench_cost": cost_tables,
    "bench_fidelity": fidelity_tables,
    "bench_ranks": rank_tables,
    "bench_width": width_tables,
    "bench_gpu": gpu_tables,
    "bench_loops": loops_table,
}


SOURCES = {"lean_summary": "bench_lean"}  # of tables that aren't named as their file


def markers(stem: str) -> tuple[str, str]:
    return f"<!-- {stem}:begin -->", f"<!-- {stem}:end -->"


def replace_all(text: str, results: Path) -> str:
    """The text with the tables of each benchmark whose markers it has."""
    there = [stem for stem in TABLES if any(marker in text for marker in markers(stem))]
    if not there:
        raise SystemExit(f"the file has no {' ... '.join(markers(next(iter(TABLES))))}, nor another benchmark's")
    for stem in there:
        source = results / f"{SOURCES.get(stem, stem)}.json"
        missing = stem == "bench_gpu" and not source.exists()  # few have a GPU: its table's cells stay empty till then
        text = replace_between(text, stem, TABLES[stem]([] if missing else read_rows(source)))
    return text


def replace_between(text: str, stem: str, new: str) -> str:
    """The text with what lies between the two markers replaced."""
    begin, end = markers(stem)
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"the file has no {begin} ... {end}")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


# ---- figures ----


def draw_step(rows: list[Row], path: Path) -> None:
    """A panel for the time at each number of micro-batches (a multiple of oplora's), and one for memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row for row in of_kind(rows, "step") if row["allocator"] == "default"]
    memory = of_kind(rows, "memory")
    counts = sorted({row["micro_batches"] for row in steps})
    figure, axes = pyplot.subplots(
        1, len(counts) + 1, sharey=True, figsize=(5 * len(counts) + 5, 4.5), layout="constrained"
    )
    for panel, n in zip(axes, counts, strict=False):
        some = [row for row in steps if row["micro_batches"] == n]
        dots(panel, some, ("ratio_20", "ratio", "ratio_80"), 1)
        panel.set_xlabel(f"time / state exact's, micro-batches: {n}")
    dots(axes[-1], memory, ("peak_bytes", "peak_bytes", "peak_bytes"), 1e-6)
    axes[-1].set_xlabel("peak memory beside the model, MB")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"One optimizer step on {rows[0]['device']}, {rows[0]['threads']} threads")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def dots(axes: Any, rows: list[Row], columns: tuple[str, str, str], scale: float) -> None:
    """A line of dots for each size, with their low and high ends, on a logarithmic axis."""
    sizes = sizes_of(rows)
    for i, (contender, label) in enumerate({OURS: "oplora, state exact", **RIVALS}.items()):
        found = [one(rows, size=size, contender=contender) for size in sizes]
        low, middle, high = ([scale * row[column] for row in found] for column in columns)
        spread = [
            [m - x for m, x in zip(middle, low, strict=True)],
            [x - m for m, x in zip(middle, high, strict=True)],
        ]
        places = [s + 0.1 * (i - 2.5) for s in range(len(sizes))]
        axes.errorbar(middle, places, xerr=spread, fmt="o", markersize=5, label=label)
    axes.set_xscale("log")
    axes.set_yticks(range(len(sizes)), [size.replace(", r", ",\nr") for size in sizes])
    axes.grid(axis="x", which="both", alpha=0.25)


def draw_lean(rows: list[Row], path: Path) -> None:
    """The time of a step against N and against H, and the bytes an entry against H."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for panel, column in zip(axes, ("factor_numbers", "hidden_width"), strict=False):
        some = growing_with(rows, column)
        for name in contenders_of(some):
            curve(panel, where(some, contender=name), column, "ms", name)
        panel.set_ylabel("optimizer.step(), ms")
    axes[0].set_xlabel("factor entries N, at H = 32")
    axes[1].set_xlabel("hidden width H, at N = 1e6")
    memory = of_kind(rows, "memory")
    for name in contenders_of(memory):
        curve(axes[2], sorted(where(memory, contender=name), key=hidden_width), "hidden_width", "bytes_per_entry", name)
    axes[2].set(xlabel="hidden width H", ylabel="bytes an entry of the factors")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STATES))
    figure.suptitle(f"One optimizer step on {rows[0]['device']}, {rows[0]['threads']} threads")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def hidden_width(row: Row) -> int:
    width: int = row["hidden_width"]
    return width


def curve(axes: Any, rows: Sequence[Row], x: str, y: str, name: str) -> None:
    """A contender's line, in its colour, on logarithmic axes."""
    color = f"C{list(STATES).index(name)}"
    axes.plot([row[x] for row in rows], [row[y] for row in rows], "o-", color=color, label=STATES[name])
    axes.set(xscale="log", yscale="log")
    axes.grid(which="both", alpha=0.25)


def draw_width(rows: list[Row], path: Path) -> None:
    """For each task: the loss against the rate at every width, and the best rate's loss against the memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs, memory = of_kind(rows, "run"), of_kind(rows, "memory")
    names = values_of(runs, "task")
    figure, axes = pyplot.subplots(len(names), 2, figsize=(13, 4.5 * len(names)), squeeze=False, layout="constrained")
    for (left, right), task in zip(axes, names, strict=True):
        some = where(runs, task=task)
        loss_against_rate(left, some)
        loss_against_memory(right, some, memory)
        for panel in (left, right):
            panel.set(title=some[0]["title"], ylabel=loss_label(some), yscale="log")
            panel.grid(which="both", alpha=0.25)
            panel.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def loss_label(rows: Sequence[Row]) -> str:
    return "final loss over the optimum, - 1" if floor_of(rows) else "final loss"


def floor_of(rows: Sequence[Row]) -> float:
    """What no adapter of this rank can go below: 1 where the loss is over that, else not known."""
    return 1.0 if "factorisation" in rows[0]["task"] else 0.0


def loss_against_rate(axes: Any, rows: list[Row]) -> None:
    widths = sorted(values_of(where(rows, state="lean"), "hidden_width"))
    lines = {"plain LoRA": where(rows, state="lora")}
    lines |= {f"lean, H = {H}": where(rows, state="lean", hidden_width=H) for H in widths}
    for i, (label, line) in enumerate(lines.items()):
        rates = sorted(values_of(line, "lr"))
        losses = [Spread.of(where(line, lr=lr)).mean - floor_of(rows) for lr in rates]
        axes.plot(rates, losses, "s--" if i == 0 else "o-", color="black" if i == 0 else f"C{i - 1}", label=label)
    axes.set(xlabel="learning rate", xscale="log")


def best_loss(rows: list[Row]) -> float:
    """At the best rate; those at which a run diverged don't count."""
    spreads = [Spread.of(where(rows, lr=lr)) for lr in values_of(rows, "lr")]
    return min((spread.mean for spread in spreads if not spread.diverged), default=math.nan)


def loss_against_memory(axes: Any, rows: list[Row], memory: list[Row]) -> None:
    """The eager way is drawn at the exact state's losses: it trains the same."""
    for name in contenders_of(memory):
        state = "lora" if is_lora(name) else "lean" if "lean" in name else "exact"
        losses = where(rows, state=state)
        widths = [None] if state == "lora" else sorted(values_of(losses, "hidden_width"))
        sizes = [where(memory, contender=name, **({"hidden_width": H} if H else {}))[0] for H in widths]
        x = [row["bytes_per_entry"] for row in sizes]
        y = [best_loss(where(losses, hidden_width=H)) - floor_of(rows) for H in widths]
        axes.plot(x, y, "o-", color=f"C{list(STATES).index(name)}", label=STATES[name])
        for H, *place in zip(widths, x, y, strict=True):
            axes.annotate(f"{H}" if H else "", place, textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xlabel="bytes an entry of the factors (numbers: H), each at its best rate", xscale="log")
    axes.xaxis.set_minor_formatter("")


FIGURES: dict[str, Callable[[list[Row], Path], None]] = {
    "bench_step": draw_step,
    "bench_lean": draw_lean,
    "bench_width": draw_width,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--pages", type=Path, nargs="+", default=[])
    arguments = parser.parse_args()
    for page in arguments.pages:
        page.write_text(replace_all(page.read_text(), arguments.results))
    if arguments.pages:
        return
    measured = {stem: arguments.results / f"{stem}.json" for stem in TABLES}
    for stem, source in measured.items():
        if not source.exists():
            continue
        if arguments.table:
            print(TABLES[stem](read_rows(source)))
        elif stem in FIGURES:
            FIGURES[stem](read_rows(source), source.with_suffix(".png"))
            print(source.with_suffix(".png"))


if __name__ == "__main__":
    main()
