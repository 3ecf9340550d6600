"""`oplora doctor`: what is installed, which kernels load, whether a GPU is used, and how to mend what is wrong."""

import ctypes
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

__all__ = ["Finding", "examine", "report"]

NEEDED = ("torch", "peft", "numpy", "safetensors", "tqdm")
USED_IF_THERE = ("transformers", "accelerate", "diffusers", "bitsandbytes", "matplotlib", "tensorboard")


@dataclass(frozen=True)
class Finding:
    """A line of the report. trouble: how to mend it, where something is wrong."""

    what: str
    found: str
    trouble: str | None = None


def examine() -> list[Finding]:
    """Every check, each on its own: one that fails keeps no other from being made."""
    return [finding for check in (_system, _packages, _core, _ops, _gpu, _step) for finding in _guarded(check)]


def report() -> bool:
    """Prints what was found; returns whether all is well."""
    findings = examine()
    for finding in findings:
        print(f"{finding.what:14} {finding.found}")
    troubles = [finding for finding in findings if finding.trouble]
    print()
    for finding in troubles:
        print(f"{finding.what}: {finding.trouble}")
    if not troubles:
        print("All is well.")
    return not troubles


def _guarded(check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except Exception as error:  # whatever is wrong with an installation is what the report is for
        return [Finding(check.__name__.strip("_"), "fails", f"{type(error).__name__}: {error}")]


def _system() -> list[Finding]:
    from . import __version__

    libc = " ".join(platform.libc_ver()).strip() or "no glibc"
    place = Path(__file__).parent
    return [
        Finding("oplora", f"{__version__}, in {place}"),
        Finding("system", f"Python {platform.python_version()}, {sys.platform} {platform.machine()}, {libc}"),
    ]


def _packages() -> list[Finding]:
    findings = []
    wanted = _wanted()
    for name in (*NEEDED, *USED_IF_THERE):
        try:
            there = version(name)
            fits = name not in wanted or wanted[name].contains(there, prereleases=True)
            mend = None if fits else f"oplora needs {name}{wanted[name]}: pip install '{name}{wanted[name]}'"
            findings.append(Finding(name, there, mend))
        except PackageNotFoundError:
            mend = f"oplora needs it: pip install {name}" if name in NEEDED else None
            findings.append(Finding(name, "not installed", mend))
    return findings


def _wanted() -> dict[str, Any]:
    """The versions that this installation of oplora asks for, by package; none of a folder that was not installed."""
    try:
        from packaging.requirements import Requirement  # peft's, which may be what is missing

        asked = [Requirement(line) for line in requires("oplora") or ()]
    except (ImportError, PackageNotFoundError):
        return {}
    return {one.name: one.specifier for one in asked if one.marker is None}


def _core() -> list[Finding]:
    core = import_module("._core", __package__)
    return [Finding("CPU kernels", f"load; instruction set {core.isa()} (OPLORA_ISA lowers it)")]


def _ops() -> list[Finding]:
    import_module(".ops", __package__)
    return [Finding("torch ops", "load")]


def _gpu() -> list[Finding]:
    import torch

    from .kernels import has_kernels

    kernels = _cuda_kernels() if has_kernels() else Finding("CUDA kernels", "not in this installation")
    if not torch.cuda.is_available():
        build = "built for the CPU" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        return [kernels, Finding("GPU", f"torch, {build}, sees none; training runs on the CPU")]
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if not has_kernels():
        mend = "install a wheel, or build with the CUDA toolkit 12.8 or newer: OPLORA_CUDA=1 pip install -v ."
        kernels = Finding(kernels.what, kernels.found, mend)
    return [kernels, Finding("GPU", f"{name}, sm_{major}{minor}, {torch.cuda.device_count()} of them")]


def _cuda_kernels() -> Finding:
    """Whether they load, with which CUDA runtime, and which the driver serves; 0 is none."""
    from .kernels import library_path

    driver, runtime = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(library_path()).oplora_cuda_ready(ctypes.byref(driver), ctypes.byref(runtime))
    served = f"the driver serves CUDA {_of_cuda(driver.value)}" if driver.value else "no NVIDIA driver here"
    return Finding("CUDA kernels", f"load; built with CUDA {_of_cuda(runtime.value)}, {served}")


def _of_cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _step() -> list[Finding]:
    """A step of training on every kind of device that there is."""
    import torch

    from .kernels import has_kernels

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() and has_kernels() else [])]
    findings = []
    for device in devices:
        label = f"step on {device}"
        try:
            before, after = _losses(device)
            wrong = None if after < before else f"the loss rose from {before:.3g} to {after:.3g}; please report it"
            findings.append(Finding(label, "trains" if wrong is None else "does not train", wrong))
        except Exception as error:
            findings.append(Finding(label, "fails", str(error)))
    return findings


def _losses(device: str) -> tuple[float, float]:
    """Of a tiny model, at the start and after twenty steps."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from .optim import AdamW

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"])).to(device)
        x, y = torch.randn(2, 16, 8, device=device)
    optimizer = AdamW(model)
    losses = []
    for _ in range(20):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]
