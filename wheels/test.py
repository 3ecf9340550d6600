"""Installs a wheel as a user would, and trains: `make test-wheel`, or `python wheels/test.py dist/oplora-....whl`.

Each version of torch gets a fresh environment, in which no compiler is on the PATH. It takes minutes and some
gigabytes, most of them torch's. --torch names other versions, --python another interpreter, --keep where to leave the
environments.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TORCHES = ("torch==2.11.0", "torch==2.13.0")  # the oldest, and the one that the Makefile installs
TRAINING = """
import torch, oplora
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
torch.manual_seed(0)
x, y = torch.randn(2, 64, 32)
base = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
start = {name: value.clone() for name, value in base.state_dict().items()}
for preset in ("auto", "flat", "paper"):
    base = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    base.load_state_dict(start)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"]))
    optimizer = oplora.AdamW(model, lr=1e-2, preset=preset)
    losses = []
    for _ in range(40):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0], (preset, losses[0], losses[-1])
    oplora.save_adapter(model, "adapter")
    fresh = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    fresh.load_state_dict(start)
    assert torch.equal(PeftModel.from_pretrained(fresh, "adapter")(x), model(x)), preset
print("trains with torch", torch.__version__)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", default=TORCHES, metavar="REQUIREMENT")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="make the environments here, and leave them")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp())
    try:
        for number, torch in enumerate(options.torch):
            try_wheel(options.wheel.resolve(), torch, options.python, folder.resolve() / f"environment-{number}")
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def try_wheel(wheel: Path, torch: str, python: str, folder: Path) -> None:
    run(python, "-m", "venv", folder)
    binaries = folder / "bin"
    environment = {**os.environ, "PATH": str(binaries)}  # Python and pip, and no compiler
    environment.pop("PYTHONPATH", None)
    for compiler in ("cc", "gcc", "g++", "clang", "nvcc"):
        assert shutil.which(compiler, path=str(binaries)) is None
    run(binaries / "pip", "install", "--quiet", torch, env=environment)
    run(binaries / "pip", "install", "--quiet", "peft>=0.20", "safetensors", "tqdm", "numpy", env=environment)
    began = time.monotonic()
    run(binaries / "pip", "install", "--quiet", "--only-binary=:all:", wheel, env=environment)
    print(f"{wheel.name}: installed beside {torch} in {time.monotonic() - began:.1f} s", flush=True)
    run(binaries / "oplora", "doctor", cwd=folder, env=environment)
    run(binaries / "python", "-c", TRAINING, cwd=folder, env=environment)


def run(*command: object, **options: object) -> None:
    done = subprocess.run([str(part) for part in command], check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"wheel test: {' '.join(map(str, command))[:200]} failed.")


if __name__ == "__main__":
    main()
