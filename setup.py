"""Builds two libraries around one static C core (csrc/core):

oplora._core          CPython and NumPy extension module, needs no torch
liboplora_torch.so    torch ops on the stable ABI; not a Python module, loaded by torch.ops.load_library

OPLORA_TORCH_DIR      the folder of the torch package, if it isn't found
"""

import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH_MIN = (2, 11)
SOURCES = sorted(str(p) for p in Path("csrc").rglob("*.*"))  # a change to any of them rebuilds what is stale
CORE = sorted(str(p) for p in Path("csrc/core").glob("*.c"))
# No -march: the core carries every instruction set and chooses at run time. -ffp-contract=off: the same bits on each.
CORE_CFLAGS = ["-std=c11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CORE_CFLAGS += ["-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wextra"]


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


class Library(Extension):
    """A shared library that lies in the package but is no Python module."""


class BuildExt(build_ext):
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
        super().build_extension(ext)


setup(
    libraries=[("oplora_core", {"sources": CORE, "obj_deps": {"": SOURCES}, "cflags": CORE_CFLAGS})],
    ext_modules=[
        Extension(
            "oplora._core",
            ["csrc/python/core_module.c"],
            depends=SOURCES,
            include_dirs=[numpy.get_include()],
            libraries=["m"],
            define_macros=[("Py_LIMITED_API", "0x030b0000")],
            py_limited_api=True,
            extra_compile_args=CORE_CFLAGS,
        ),
        Library(
            "oplora.liboplora_torch",
            ["csrc/torch/ops.cpp"],
            depends=SOURCES,
            libraries=["torch_cpu", "m"],
            define_macros=[
                ("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000".format(*TORCH_MIN)),
                ("TORCH_STABLE_ONLY", None),
            ],
            extra_compile_args=["-std=c++17", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra"],
            extra_link_args=["-Wl,--no-undefined"],
            language="c++",
        ),
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # one wheel for every Python and every torch
)
