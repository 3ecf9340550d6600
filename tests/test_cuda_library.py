"""liboplora_cuda.so as it is found: what does not fit is refused, with what it is, where it lies and how to mend it."""

import ctypes
import os
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import oplora.ops  # noqa: F401

STAND_IN = """
const int oplora_cuda_on_cpu = 1;
const char *oplora_cuda_interface(void) {{ return "{interface}"; }}
int oplora_cuda_ready(int *driver, int *runtime) {{ *driver = {driver}; *runtime = 13000; return {error}; }}
const char *oplora_cuda_strerror(int error) {{ return error == {launch_error} ? "what CUDA says" : "?"; }}
int oplora_cuda_generate_f32() {{ return {launch_error}; }}
"""


def interface_of(library: Path) -> str:
    function = ctypes.CDLL(str(library)).oplora_cuda_interface
    function.restype = ctypes.c_char_p
    return function().decode()


def stand_in(folder: Path, source: str) -> Path:
    (folder / "library.c").write_text(source)
    library = folder / "liboplora_cuda.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", str(folder / "library.c"), "-o", str(library)], check=True)
    return library


def launch(library: str) -> str:
    """In a process that has called no library yet, as the first is kept: what is raised."""
    os.environ["OPLORA_CUDA_LIBRARY"] = library
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    ones = (torch.ones(shape) for shape in ((2,), (3, 2), (3,), (4, 3), (4,)))
    try:
        torch.ops.oplora.generate.default.redispatch(on_cuda, *ones)
    except Exception as error:
        return re.sub(r"\s+", " ", str(error))
    return "nothing was raised"


def told_of(library: Path) -> str:
    """What a call that needs the library raises. A signal would break the pool."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["oplora.ops"])  # imports torch once for all of them
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(launch, str(library)).result()


def made(folder: Path, cuda_on_cpu: Path, **numbers: object) -> Path:
    values = {"interface": interface_of(cuda_on_cpu), "driver": 13000, "error": 0, "launch_error": 0, **numbers}
    return stand_in(folder, STAND_IN.format(**values))


def test_a_library_of_other_headers_is_refused(tmp_path: Path, cuda_on_cpu: Path) -> None:
    library = made(tmp_path, cuda_on_cpu, interface="0123456789abcdef")
    told = told_of(library)
    for part in (
        str(library),
        "0123456789abcdef",
        interface_of(cuda_on_cpu),
        "OPLORA_CUDA=1 pip install",
        "--no-binary=oplora",
    ):
        assert part in told, told


def test_a_library_from_before_hashes_is_refused(tmp_path: Path) -> None:
    library = stand_in(tmp_path, "int oplora_cuda_version(void) { return 3; }")
    told = told_of(library)
    for part in (str(library), "no oplora_cuda_interface", "OPLORA_CUDA=1 pip install"):
        assert part in told, told


@pytest.mark.parametrize(
    ("driver", "parts"),
    [
        (12040, ("up to 12.4", "built with CUDA 13.0", "driver for CUDA 13.0 or newer", "toolkit 12.x, from 12.8 on")),
        (11080, ("up to 11.8", "built with CUDA 13.0", "driver for CUDA 13.0 or newer")),
        (0, ("no NVIDIA driver", "built with CUDA 13.0")),
    ],
)
def test_a_driver_that_is_too_old_is_told_before_a_launch(
    tmp_path: Path, cuda_on_cpu: Path, driver: int, parts: tuple[str, ...]
) -> None:
    library = made(tmp_path, cuda_on_cpu, driver=driver, error=35, launch_error=35)
    told = told_of(library)
    for part in ("CUDA kernels do not run here", str(library), *parts):
        assert part in told, told
    assert "11.x" not in told


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (98, "OPLORA_CUDA_ARCHS"),
        (209, "OPLORA_CUDA_ARCHS"),
        (222, "driver for CUDA 13.0 or newer"),
        (719, "what CUDA says"),
    ],
)
def test_an_error_of_a_launch_says_what_to_do(tmp_path: Path, cuda_on_cpu: Path, error: int, part: str) -> None:
    told = told_of(made(tmp_path, cuda_on_cpu, launch_error=error))
    assert part in told and "what CUDA says" in told, told


def test_every_header_that_both_sides_include_is_in_the_hash() -> None:
    root = Path(__file__).parents[1]
    makefile = (root / "Makefile").read_text()
    setup = (root / "setup.py").read_text()
    shared, todo = set(), ["csrc/torch/cuda_ops.cpp"]
    while todo:
        file = root / todo.pop()
        for name in re.findall(r'#include "([^"]+)"', file.read_text()):
            header = (file.parent / name).resolve().relative_to(root)
            if str(header) not in shared:
                shared.add(str(header))
                todo.append(str(header))
    ours = {header for header in shared if not header.startswith("csrc/torch/")}
    by_name = {"csrc/core/oplora_core.h", "csrc/shared/find_rate.h", "csrc/shared/shared.h"}
    assert ours == {*by_name, *map(str, hashed(root))}
    assert all(header in makefile and header in setup for header in by_name)
    assert "csrc/cuda/device.h" in makefile and "csrc/cuda/device.h" in setup


def hashed(root: Path) -> list[Path]:
    return [p.relative_to(root) for p in (root / "csrc/cuda").glob("*.h") if p.name != "device.h"]
