"""Random damage to what a merge reads: headers, configurations, indexes. No crash, and OUT is whole or not there.

    python tests/fuzz_files.py 100000

prints what the refusals were. test_files_fuzzed.py runs a few hundred.
"""

import collections
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from oplora.errors import OPLoRAError
from oplora.files.merge_checkpoint import merge_checkpoint

PREFIX = "base_model.model."
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 3, 1 << 31, 1 << 63, 1e308, -0.0, "", "F32", "fc", "LORA", "(", "llama", "\0"),
    *([], {}, [1], [0, 4], [5, 7], {"fc": 3}, {"(": 1}, {"fc": "x"}, [[0, 2]], ["fc"], {"a": {"b": []}}),
]
KEYS = [
    *("dtype", "shape", "data_offsets", "r", "lora_alpha", "peft_type", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("fan_in_fan_out", "use_dora", "target_parameters", "modules_to_save", "bias", "task_type", "auto_mapping"),
    *("model_type", "architectures", "tie_word_embeddings", "weight_map", "use_future", "__metadata__", "fc.weight"),
    *(
        "num_hidden_layers",
        "vocab_size",
        "hidden_size",
        PREFIX + "fc.lora_A.weight",
        PREFIX + "fc.bias",
        "adapter_config",
    ),
]


def write_good(folder: Path) -> None:
    for name in ("base", "adapter"):
        (folder / name).mkdir()
    weights = {"fc.weight": torch.ones(5, 7), "fc.bias": torch.zeros(5), "e.weight": torch.ones(4, 3)}
    save_file(weights, folder / "base/model.safetensors")
    index = {"metadata": {"total_size": 208}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
    (folder / "base/model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "base/config.json").write_text(json.dumps({"tie_word_embeddings": False, "hidden_size": 8}))
    factors = {"fc.lora_A.weight": torch.ones(2, 7), "fc.lora_B.weight": torch.ones(5, 2), "fc.bias": torch.ones(5)}
    save_file({PREFIX + name: tensor for name, tensor in factors.items()}, folder / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {}, "modules_to_save": None, "bias": "none"}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))


def damaged_object(chance: random.Random, value: Any) -> Any:
    """One or a few places changed, taken away or added, at any depth."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        return {**value, key: damaged_object(chance, value[key])}
    if isinstance(value, dict) and chance.random() < 0.5:
        left = dict(list(value.items())[chance.randrange(2) :])
        return {**left, chance.choice(KEYS): chance.choice(VALUES)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], damaged_object(chance, value[place]), *value[place + chance.randrange(1, 3) :]]
    if type(value) is int and chance.random() < 0.5:
        return value + chance.choice([-1, 1, 4, -4, 1 << 32])
    return chance.choice(VALUES)


def damaged_bytes(chance: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.randrange(1, 5)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed[: chance.randrange(len(changed))] if chance.random() < 0.2 else changed)


def damage(chance: random.Random, path: Path) -> None:
    content = path.read_bytes()
    if chance.random() < 0.25:
        path.write_bytes(damaged_bytes(chance, content))
    elif path.suffix == ".json":
        path.write_text(json.dumps(damaged_object(chance, json.loads(content))))
    else:
        length = int.from_bytes(content[:8], "little")
        text = json.dumps(damaged_object(chance, json.loads(content[8 : 8 + length]))).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def run(count: int, seed: int = 0) -> collections.Counter[str]:
    """How often each kind of thing came of it; an AssertionError or any other where it should not have."""
    chance, outcomes = random.Random(seed), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as root:
        Path(root, "good").mkdir()
        write_good(Path(root, "good"))
        files = [path.relative_to(root) for path in sorted(Path(root, "good").rglob("*")) if path.is_file()]
        good = {path: Path(root, path).read_bytes() for path in files}
        for number in range(count):
            touched = {chance.choice(files) for _ in range(chance.choice([1, 1, 1, 2]))}
            for path in touched:
                damage(chance, Path(root, path))
            outcomes[_merge(Path(root), number)] += 1
            for path in touched:
                Path(root, path).write_bytes(good[path])
    return outcomes


def _merge(root: Path, number: int) -> str:
    out = root / "out"
    try:
        merge_checkpoint(root / "good/base", root / "good/adapter", out, progress=False)
    except OPLoRAError as error:
        left = {path.name for path in root.iterdir()} - {"good"}
        if left or len(str(error)) < 40:
            raise AssertionError(f"case {number}: {left} are left, or the message says little: {error}") from error
        return type(error).__name__
    for path in out.glob("*.safetensors"):
        load_file(path)
    shutil.rmtree(out)
    return "merged"


if __name__ == "__main__":
    print(dict(run(int(sys.argv[1]))))
