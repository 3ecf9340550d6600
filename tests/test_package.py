"""The wheel: one for every Python from 3.11 and every torch from 2.11, and it works away from the sources."""

import ctypes
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

USE = """
import torch, oplora
from torch import nn
from peft import LoraConfig, get_peft_model
model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
optimizer = oplora.AdamW(model, lr=1e-2)
model(torch.ones(1, 8)).sum().backward()
optimizer.step()
print(oplora.__file__)
"""


def run(*command: object, **env: str) -> str:
    return subprocess.run(
        [str(c) for c in command], env={**os.environ, **env}, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, as the build writes beside the sources
    source.mkdir()
    for name in ("csrc", "python", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        run("cp", "-r", ROOT / name, source / name)
    run("find", source, "-name", "*.so", "-delete")
    broken = folder / "toolkit/bin/nvcc"  # a compiler that fails must not keep anyone from installing for the CPU
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source)
    run(*pip, CUDA_HOME=str(folder / "toolkit"), OPLORA_CUDA="auto")
    return next(folder.glob("*.whl"))


def test_wheel_is_one_for_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"oplora-[\d.]+(\.dev\d+)?-cp311-abi3-linux_\w+\.whl", wheel.name)


def test_wheel_holds_the_libraries_and_no_sources_of_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"oplora/_core.abi3.so", "oplora/liboplora_torch.so", "oplora/py.typed"} <= set(names)
    assert all(name.startswith(("oplora/", "oplora-")) for name in names)
    assert "oplora/liboplora_cuda.so" not in names  # its compiler failed


def test_wheel_holds_every_module_of_the_package(wheel: Path) -> None:
    modules = {str(file.relative_to(ROOT / "python")) for file in (ROOT / "python").rglob("*.py")}
    assert modules <= set(zipfile.ZipFile(wheel).namelist())


def test_wheel_works_away_from_the_sources(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, wheel)
    out = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.strip() == str(tmp_path / "oplora" / "__init__.py")


def test_build_carries_no_flag_of_the_building_machine() -> None:
    build = (ROOT / "setup.py").read_text()
    assert "-march" not in build.replace("No -march", "")
    assert "-mtune" not in build and "-mavx" not in build


def undefined_symbols(library: str) -> list[str]:
    import oplora

    path = Path(oplora.__file__).with_name(library)
    return [line.split()[-1] for line in run("nm", "-D", "-u", path).splitlines()]


def test_torch_library_uses_the_stable_abi_alone() -> None:
    symbols = undefined_symbols("liboplora_torch.so")
    assert any(s.startswith("aoti_torch") for s in symbols)
    assert not [
        s for s in symbols if s.startswith(("_ZN3c10", "_ZN2at", "_ZNK3c10", "_ZNK2at", "_ZN5torch", "Py", "_Py"))
    ]


def test_numpy_module_needs_no_torch_and_no_openmp() -> None:
    symbols = undefined_symbols("_core.abi3.so")
    assert not [s for s in symbols if "torch" in s or s.startswith(("GOMP", "omp_"))]


def test_asking_for_cuda_without_its_compiler_says_what_to_install(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "OPLORA_CUDA": "1"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "nvcc is neither in" in done.stderr and "CUDA_HOME" in done.stderr


def cuda_library() -> Path:
    import oplora

    path = Path(oplora.__file__).with_name("liboplora_cuda.so")
    if not path.is_file():
        pytest.skip("built without nvcc")
    return path


def test_cuda_library_loads_where_there_is_no_gpu() -> None:
    library = ctypes.CDLL(str(cuda_library()))
    bytes_of = library.oplora_cuda_generate_backward_workspace_bytes
    bytes_of.restype = ctypes.c_int64
    bytes_of.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    assert bytes_of(0, 32, 128, 16385) == (2 + 1) * 32 * 8
    assert bytes_of(0, 0, 128, 16385) == -1


def test_cuda_library_needs_no_driver_and_no_torch_to_load_and_offers_its_own_names_alone() -> None:
    path = cuda_library()
    assert not [s for s in undefined_symbols(path.name) if s.startswith("cu") or "torch" in s]
    offered = [line.split()[-1] for line in run("nm", "-D", "--defined-only", path).splitlines()]
    assert offered and all(name.startswith("oplora_cuda_") for name in offered)


def test_public_names_are_the_documented_ones() -> None:
    import oplora

    assert set(oplora.__all__) == {
        "AdamW",
        "Generators",
        "Monitor",
        "OPLoRAConfig",
        "OPLoRAError",
        "cmmd",
        "create_oplora_optimizer",
        "for_trainer",
        "generate",
        "merge",
        "save_adapter",
        "stats",
        "wrap",
    }
    assert all(getattr(oplora, name).__doc__ for name in oplora.__all__)
    assert oplora.stats.__name__ == "stats" and callable(oplora.merge)


@pytest.mark.parametrize("modules", ["oplora, oplora._core", "oplora.__main__, oplora.files.merge_checkpoint"])
def test_importing_what_needs_no_torch_does_not_load_it(modules: str) -> None:
    out = run(sys.executable, "-c", f"import sys, {modules}; print('torch' in sys.modules)")
    assert out.strip() == "False"


def test_unknown_name_is_an_attribute_error_that_lists_the_names() -> None:
    import oplora

    with pytest.raises(AttributeError, match=r"no attribute 'Adam'; it has AdamW"):
        _ = oplora.Adam


def test_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(import oplora.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code, "README.md has no example that starts with `import oplora`"
    monkeypatch.chdir(tmp_path)
    assert "loss" in run(sys.executable, "-c", code.group(1))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
