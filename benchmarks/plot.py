"""Figures and tables of the results, from their files alone.

python benchmarks/plot.py                       results/*.json -> results/*.png
python benchmarks/plot.py --table               the markdown tables of results/bench_step.json
python benchmarks/plot.py --readme README.md    the same, between the markers in that file
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness import Row, read_rows

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- bench_step:begin -->", "<!-- bench_step:end -->"
OURS = "oplora exact"
RIVALS = {  # in a row's words: in the tables' and the figures'
    "oplora exact, all units on": "the same, all units on",
    "eager, AdamW fused": "eager, AdamW fused",
    "eager, AdamW foreach": "eager, AdamW foreach",
    "lora, AdamW fused": "plain LoRA, AdamW fused",
    "lora, AdamW default": "plain LoRA, AdamW default",
}


KEPT = "eager, AdamW fused"  # shown under both allocators


# ---- reading ----


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def one(rows: Iterable[Row], **columns: object) -> Row:
    """The row with these values."""
    found = [row for row in rows if all(row.get(key) == value for key, value in columns.items())]
    if len(found) != 1:
        raise SystemExit(f"{len(found)} rows with {columns}, expected one; run the benchmark again")
    return found[0]


def sizes_of(rows: Iterable[Row]) -> list[str]:
    """In the order of the file."""
    return list(dict.fromkeys(row["size"] for row in rows))


# ---- the README's tables ----


def markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


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
    header = ["adapted layers (numbers in W2)", "micro-batches", "`oplora.AdamW`", *RIVALS.values()]
    header.append(f"{RIVALS[KEPT]}, freed memory kept")
    return markdown(header, (cells(size, n) for size in sizes_of(steps) for n in counts))


def memory_table(rows: list[Row]) -> str:
    memory = of_kind(rows, "memory")

    def cell(size: str, contender: str) -> str:
        row = one(memory, size=size, contender=contender)
        return f"{row['held_bytes'] / 1e6:.0f} / {row['peak_bytes'] / 1e6:.0f}"

    header = ["MB held / at the peak", "`oplora.AdamW`", *RIVALS.values()]
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


def tables(rows: list[Row]) -> str:
    first, training = rows[0], of_kind(rows, "forward and backward")[0]
    machine = (
        f"{first['device']}, {first['threads']} threads, {first['isa']}, float32, torch {first['torch']}, "
        f"oplora {first['oplora']} ({first['commit']}), {first['date']}."
    )
    parts = [
        "Time of an optimizer step with everything around it but the model's own forward and backward, as a\n"
        "multiple of `oplora.AdamW`'s (20% to 80% quantile of the rounds):",
        time_table(rows),
        "*Freed memory kept*: with glibc told to keep what is freed (`mallopt`). Otherwise, as training usually runs,\n"
        "every dW2 of the eager way pays for its pages anew.",
        "Memory beside the model, to which A and B belong:",
        memory_table(rows),
        "What bounds it:",
        roofline_table(rows),
        f"The model's own forward and backward ({training['size']}) take {ratio(training)}\n"
        "of the time they take under plain LoRA.",
        f"Measured on {machine}",
    ]
    return "\n\n".join(parts)


def replace_between(text: str, new: str) -> str:
    """The text with what lies between the two markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the file has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


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
        panel.set_xlabel(f"time / oplora.AdamW's, micro-batches: {n}")
    dots(axes[-1], memory, ("peak_bytes", "peak_bytes", "peak_bytes"), 1e-6)
    axes[-1].set_xlabel("peak memory beside the model, MB")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"One optimizer step on {rows[0]['device']}, {rows[0]['threads']} threads")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def dots(axes: Any, rows: list[Row], columns: tuple[str, str, str], scale: float) -> None:
    """A line of dots for each size, with their low and high ends, on a logarithmic axis."""
    sizes = sizes_of(rows)
    for i, (contender, label) in enumerate({OURS: "oplora.AdamW", **RIVALS}.items()):
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


FIGURES: dict[str, Callable[[list[Row], Path], None]] = {"bench_step": draw_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--readme", type=Path)
    arguments = parser.parse_args()
    if arguments.table or arguments.readme:
        new = tables(read_rows(arguments.results / "bench_step.json"))
        if arguments.readme:
            arguments.readme.write_text(replace_between(arguments.readme.read_text(), new))
        else:
            print(new)
        return
    for stem, draw in FIGURES.items():
        source = arguments.results / f"{stem}.json"
        draw(read_rows(source), source.with_suffix(".png"))
        print(source.with_suffix(".png"))


if __name__ == "__main__":
    main()
