"""What the wheel for everybody is built with: wheels/build.py, setup.py. wheels/test.py tries the wheel itself."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheel_build", ROOT / "wheels/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_linker_is_offered_no_version_that_old_glibc_lacks(build: ModuleType, tmp_path: Path) -> None:
    tools = build.Toolchain(os.uname().machine)
    build.old_symbols(tools, tmp_path)
    code = tmp_path / "uses.c"
    code.write_text(
        "#include <dlfcn.h>\n#include <math.h>\n#include <pthread.h>\n"
        'double use(double x) { pthread_join(0, 0); return dlsym(0, "x") ? pow(x, x) : log(x); }\n'
    )
    library = tmp_path / "uses.so"
    command = ["gcc", "-shared", "-fPIC", "-fno-builtin", f"-L{tmp_path}", str(code), "-ldl", "-lm", "-o", str(library)]
    subprocess.run(command, check=True)
    listed = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    needed = {name: version for version, name in re.findall(r"GLIBC_([\d.]+)\)\s+(\w+)$", listed, re.M)}
    assert {"pow", "log", "dlsym", "pthread_join"} <= needed.keys()
    assert all(build.numbers(version) <= build.GLIBC for version in needed.values())


def test_compiler_that_is_missing_is_named(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"aarch64-linux-gnu-g\+\+ is not there.*apt-get install g\+\+-aarch64"):
        build.Toolchain("aarch64")


# ---- from source ----


def archs(monkeypatch: pytest.MonkeyPatch, path: Path, asked: str | None) -> tuple[list[str], str]:
    """What setup.py's cuda_archs answers with these programs on the PATH."""
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.delenv("OPLORA_CUDA_ARCHS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OPLORA_CUDA_ARCHS", asked)
    tree = ast.parse((ROOT / "setup.py").read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "cuda_archs")
    namespace = {"os": os, "re": re, "subprocess": subprocess, "OLDEST_ARCH": "75"}
    exec(compile(ast.Module([function], []), "setup.py", "exec"), namespace)
    return namespace["cuda_archs"]()


def test_source_is_compiled_for_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n8.6\\n9.0\\n'\n")
    smi.chmod(0o755)
    assert archs(monkeypatch, tmp_path, None)[0] == ["86", "90"]
    for asked in ("80;100", "8.0 10.0", " 80, 100"):
        assert archs(monkeypatch, tmp_path, asked)[0] == ["80", "100"]
    assert archs(monkeypatch, tmp_path, " ")[0] == ["86", "90"]


@pytest.mark.parametrize("asked", ["sm_90", "8.6+PTX", "90 all"])
def test_architecture_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str) -> None:
    with pytest.raises(SystemExit, match=rf"OPLORA_CUDA_ARCHS has '{re.escape(asked.split()[-1])}'.*\"80 90\""):
        archs(monkeypatch, tmp_path, asked)


def test_source_without_a_gpu_is_compiled_for_the_oldest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    for program in (None, "", "echo No devices were found", "exit 6"):
        if program is not None:
            smi.write_text(f"#!/bin/sh\n{program}\n")
            smi.chmod(0o755)
        found, why = archs(monkeypatch, tmp_path, None)
        assert found == ["75"] and "OPLORA_CUDA_ARCHS" in why


def test_build_of_the_wheel_and_the_makefile_have_the_same_architectures(build: ModuleType) -> None:
    (listed,) = re.findall(r"^CUDA_ARCHS \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert listed == build.CUDA_ARCHS


def test_other_systems_are_told_where_it_runs() -> None:
    code = "import sys, numpy, setuptools.command.build_ext; sys.platform = 'darwin'; "
    code += "sys.argv = ['setup.py', 'build_ext']; exec(open('setup.py').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "it runs on Linux, and this is darwin. On Windows install it inside WSL 2; on macOS" in done.stderr
