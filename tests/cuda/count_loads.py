"""Fails if a kernel has more loads in its PTX than loads.txt allows.

python tests/cuda/count_loads.py build/nvcc/adamw_lean.ptx
"""

import re
import sys
from pathlib import Path

LIMITS = Path(__file__).with_name("loads.txt")


def loads_of(ptx: str) -> dict[str, int]:
    """Loads of every kernel, by its name with a bool template argument: update_kernel<true>."""
    counts = {}
    for name, body in re.findall(r"\.entry (\w+)\((.*?)\n\}\n", ptx, re.DOTALL):
        kernel = re.search(r"\d([a-z_]+_kernel)(?:ILb([01])E)?", name)
        if not kernel:
            raise SystemExit(f"count_loads: {name} is not named as kernels are, ..._kernel")
        plain, argument = kernel.groups()
        argument = {None: "", "0": "<false>", "1": "<true>"}[argument]
        counts[plain + argument] = len(re.findall(r"\bld\.(?!param)", body))
    return counts


def limits_of(source: str) -> dict[str, int]:
    rows = [line.split() for line in LIMITS.read_text().splitlines() if line and not line.startswith("#")]
    return {kernel: int(most) for name, kernel, most in rows if name == source}


def main(path: Path) -> None:
    counts, limits = loads_of(path.read_text()), limits_of(path.stem)
    if missing := limits.keys() - counts.keys():
        raise SystemExit(f"{path}: no kernel {', '.join(sorted(missing))}, which {LIMITS} names. Mend its name there.")
    for kernel, most in limits.items():
        if counts[kernel] > most:
            raise SystemExit(
                f"{path}: {kernel} has {counts[kernel]} loads, more than the {most} of {LIMITS}. Something is read "
                "again for every row: copy it into a local before the loop. If rows need more, raise the number."
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
