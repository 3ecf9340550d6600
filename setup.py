"""Builds three libraries around one static C core (csrc/core):

oplora._core          CPython and NumPy extension module, needs no torch
liboplora_torch.so    torch ops on the stable ABI; not a Python module, loaded by torch.ops.load_library
liboplora_cuda.so     the CUDA kernels behind a plain C interface, with the CUDA runtime inside; needs nvcc

OPLORA_TORCH_DIR      the folder of the torch package, if it isn't found
OPLORA_CUDA           auto (the default: build the CUDA library if nvcc is found), 0 (do not), 1 (fail without nvcc)
OPLORA_CUDA_ARCHS     the GPU architectures it carries, as in "80 90"; newer ones use its PTX. By default that of the
                      GPU that is there; without one 75, whose PTX every newer GPU compiles once, at first use
CUDA_HOME             where nvcc is, if it isn't on PATH
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH_MIN = (2, 11)
SOURCES = sorted(str(p) for p in Path("csrc").rglob("*.*"))  # a change to any of them rebuilds what is stale
CORE = sorted(str(p) for p in Path("csrc/core").glob("*.c"))
CUDA = sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))
# What liboplora_torch.so and liboplora_cuda.so share. Its hash is built into both, so that one which was left behind by
# another build is refused when it is loaded. The Makefile makes the same for its own builds.
INTERFACE = [
    "csrc/core/oplora_core.h",
    "csrc/shared/find_rate.h",
    "csrc/shared/shared.h",
    *sorted(map(str, set(Path("csrc/cuda").glob("*.h")) - {Path("csrc/cuda/device.h")})),
]
INTERFACE_HASH = hashlib.sha256(b"".join(Path(header).read_bytes() for header in INTERFACE)).hexdigest()[:16]
# No -march: the core carries every instruction set and chooses at run time. -ffp-contract=off: the same bits on each.
CORE_CFLAGS = ["-std=c11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CORE_CFLAGS += ["-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wextra"]

OLDEST_ARCH = "75"
# -fmad=false -ftz=true: the bits of the core, which fuses nothing and counts subnormals as zero
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-ftz=true", "-cudart=static"]
NVCC_FLAGS += ["--threads=0", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def torch_dir():
    """torch's folder, without importing it. pip's isolated build runs the target environment's interpreter, so
    sysconfig still names that environment's site-packages although they are not on sys.path."""
    spec = importlib.util.find_spec("torch")
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    places = [
        os.environ.get("OPLORA_TORCH_DIR"),
        spec and spec.submodule_search_locations and spec.submodule_search_locations[0],
        *(os.path.join(sysconfig.get_path(k), "torch") for k in ("purelib", "platlib")),
        os.path.join(sysconfig.get_path("purelib", vars=base), "torch"),
    ]
    for place in filter(None, places):
        header = Path(place, "include/torch/headeronly/version.h")
        if header.is_file():
            found = re.findall(r"TORCH_VERSION_M(?:AJOR|INOR) (\d+)", header.read_text())
            if tuple(map(int, found)) >= TORCH_MIN:
                return Path(place)
    raise SystemExit(
        "oplora: PyTorch {}.{} or newer was not found.\nInstall it first (pip install torch), or set OPLORA_TORCH_DIR "
        "to the folder of the torch package.\nLooked in: {}".format(*TORCH_MIN, ", ".join(filter(None, places)))
    )


def nvcc():
    """The path of the CUDA compiler, or None where the CUDA library is not to be built."""
    want = os.environ.get("OPLORA_CUDA", "auto")
    if want not in ("auto", "0", "1"):
        raise SystemExit(f"oplora: OPLORA_CUDA is {want!r}, expected auto, 0 or 1.")
    if want == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    path = shutil.which("nvcc", path=os.path.join(home, "bin")) or shutil.which("nvcc")
    if not path and want == "1":
        raise SystemExit(
            f"oplora: OPLORA_CUDA=1, but nvcc is neither in {home}/bin nor on PATH. Install the CUDA toolkit 12.8 or "
            "newer and set CUDA_HOME to its folder, or leave OPLORA_CUDA out to install for the CPU."
        )
    return path


def cuda_archs():
    """The architectures to compile for, and why these."""
    if asked := re.findall(r"[^\s;,]+", os.environ.get("OPLORA_CUDA_ARCHS", "")):
        archs = [name.replace(".", "") for name in asked]  # "9.0" is how nvidia-smi writes it
        if wrong := [name for name, arch in zip(asked, archs, strict=True) if not re.fullmatch(r"\d{2,3}[af]?", arch)]:
            raise SystemExit(f'oplora: OPLORA_CUDA_ARCHS has {wrong[0]!r}, expected architectures as in "80 90".')
        return archs, "as OPLORA_CUDA_ARCHS says"
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
        if archs := sorted({line.strip().replace(".", "") for line in told.splitlines()}, key=int):
            return archs, "of this machine's GPU"
    except (OSError, subprocess.SubprocessError, ValueError):
        pass  # no driver, or one that is too old to be asked
    return [OLDEST_ARCH], "no GPU is here; newer ones compile its PTX at first use, OPLORA_CUDA_ARCHS names others"


class Library(Extension):
    """A shared library that lies in the package but is no Python module."""


def cuda_library():
    """Optional unless it is asked for: an nvcc that fails must not keep anyone from installing for the CPU."""
    return [Library("oplora.liboplora_cuda", CUDA, optional=os.environ.get("OPLORA_CUDA") != "1")] if nvcc() else []


class BuildExt(build_ext):
    def run(self):
        if not sys.platform.startswith("linux"):
            raise SystemExit(
                f"oplora: it runs on Linux, and this is {sys.platform}. On Windows install it inside WSL 2; on macOS "
                "inside a Linux container, which trains on the CPU."
            )
        super().run()

    def get_ext_filename(self, fullname):
        ext = self.ext_map.get(fullname) or self.ext_map.get(fullname.rpartition(".")[2])
        if isinstance(ext, Library):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext):
        return [] if isinstance(ext, Library) else super().get_export_symbols(ext)

    def build_extension(self, ext):
        if ext.name == "oplora.liboplora_torch":  # here, so that an sdist or the metadata need no torch
            torch = torch_dir()
            ext.library_dirs.append(str(torch / "lib"))
            ext.extra_compile_args.append(f"-isystem{torch / 'include'}")
        if ext.name == "oplora.liboplora_cuda":
            self.build_cuda(ext)
        else:
            super().build_extension(ext)

    def build_cuda(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        newest = max(Path(source).stat().st_mtime for source in SOURCES)
        archs, why = cuda_archs()
        stamp = Path(self.build_temp, "liboplora_cuda.archs")
        known = stamp.read_text() if stamp.is_file() else ""
        if not self.force and known == " ".join(archs) and target.is_file() and target.stat().st_mtime > newest:
            return
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        core = Path(self.get_finalized_command("build_clib").build_clib, "liboplora_core.a")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a build that fails leaves none of other sources behind
        began = time.monotonic()
        print(f"oplora: compiling {len(ext.sources)} CUDA files for sm_{', sm_'.join(archs)} ({why})", flush=True)
        self.spawn(
            [
                nvcc(),
                *NVCC_FLAGS,
                f"-DOPLORA_CUDA_INTERFACE={INTERFACE_HASH}",
                *codes,
                *ext.sources,
                str(core),
                "-o",
                str(target),
            ]
        )
        print(f"oplora: compiled the CUDA files in {time.monotonic() - began:.0f} s", flush=True)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(" ".join(archs))


setup(
    libraries=[("oplora_core", {"sources": CORE, "obj_deps": {"": SOURCES}, "cflags": CORE_CFLAGS})],
    ext_modules=[
        Extension(
            "oplora._core",
            ["csrc/python/arguments.c", "csrc/python/core_module.c"],
            depends=SOURCES,
            include_dirs=[numpy.get_include()],
            define_macros=[("Py_LIMITED_API", "0x030b0000")],
            py_limited_api=True,
            extra_compile_args=CORE_CFLAGS,
            extra_link_args=["-lm"],  # behind the core, which calls it
        ),
        Library(
            "oplora.liboplora_torch",
            ["csrc/torch/cuda_ops.cpp", "csrc/torch/ops.cpp"],
            depends=SOURCES,
            libraries=["torch_cpu", "dl", "m"],
            define_macros=[
                ("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000".format(*TORCH_MIN)),
                ("TORCH_STABLE_ONLY", None),
                ("OPLORA_CUDA_INTERFACE", INTERFACE_HASH),
            ],
            extra_compile_args=["-std=c++17", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra"],
            extra_link_args=["-Wl,--no-undefined"],
            language="c++",
        ),
        *cuda_library(),
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # one wheel for every Python and every torch
)
