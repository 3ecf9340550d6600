"""oplora.AdamW in trainers that are started from the command line, LLaMA-Factory, ms-swift and axolotl, by the very
files that docs/trainers.md shows. Each is skipped where it is missing: their pins are their own, so each wants an
environment of its own, with `pip install torch==2.13.0 llamafactory` (or ms-swift, or axolotl). LLaMA-Factory imports
torchaudio; on the CPU an empty module of this name will do."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DOCUMENT = Path(__file__).parents[2] / "docs/trainers.md"
VOCABULARY, STEPS = 64, 20


def base() -> LlamaForCausalLM:
    """Of two layers, with random weights, always from the same seed."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.2, **sizes))


def counting() -> list[list[str]]:
    return [[str((start + i) % 60 + 2) for i in range(12)] for start in range(24)]


def write_model(folder: Path) -> None:
    base().save_pretrained(folder / "model")
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0")
    made.save_pretrained(folder / "model")


def shown(after: str) -> str:
    """The first block of Python after a heading."""
    found = re.search(rf"^## {after}\n.*?```python\n(.*?)```", DOCUMENT.read_text(), re.M | re.S)
    assert found is not None
    return found[1]


def run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def assert_trained(adapter: Path, checkpoint: Path) -> None:
    """By oplora.AdamW, and PEFT reads it."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert {int(entry["step"]) for entry in state.values() if "step" in entry} == {STEPS}
    assert all("generated" in entry for entry in state.values())
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    saved = load_file(adapter / "adapter_model.safetensors")
    read = get_peft_model_state_dict(PeftModel.from_pretrained(base(), adapter))
    assert saved.keys() == read.keys() and all(torch.equal(read[name], tensor) for name, tensor in saved.items())
    assert all(bool(tensor.count_nonzero()) for name, tensor in saved.items() if "lora_B" in name)


def test_llama_factory_by_a_start_script(tmp_path: Path) -> None:
    pytest.importorskip("llamafactory")
    write_model(tmp_path)
    rows = [{"instruction": " ".join(some[:4]), "input": "", "output": " ".join(some[4:])} for some in counting()]
    (tmp_path / "counting.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"counting": {"file_name": "counting.json"}}))
    (tmp_path / "train_oplora.py").write_text(shown("LLaMA-Factory"))
    (tmp_path / "config.yaml").write_text(
        "model_name_or_path: model\nstage: sft\ndo_train: true\nfinetuning_type: lora\nlora_rank: 4\n"
        "lora_target: q_proj,v_proj,down_proj\ndataset: counting\ndataset_dir: .\ntemplate: empty\ncutoff_len: 32\n"
        f"output_dir: out\nper_device_train_batch_size: 8\nmax_steps: {STEPS}\nlogging_steps: 1\nreport_to: none\n"
        "use_cpu: true\n"
    )
    run([sys.executable, "train_oplora.py", "config.yaml"], tmp_path)
    assert_trained(tmp_path / "out", tmp_path / f"out/checkpoint-{STEPS}")


def test_ms_swift_by_a_plugin(tmp_path: Path) -> None:
    pytest.importorskip("swift.optimizers")
    write_model(tmp_path)
    told = [[(" ".join(some[:4]), "user"), (" ".join(some[4:]), "assistant")] for some in counting()]
    rows = [{"messages": [{"role": role, "content": content} for content, role in some]} for some in told]
    (tmp_path / "counting.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "oplora_swift.py").write_text(shown("ms-swift"))
    ours = "--external_plugins oplora_swift.py --optimizer oplora"
    model = "--model ./model --model_type llama --template dummy --torch_dtype float32 --use_hf true"
    lora = "--tuner_type lora --target_modules q_proj v_proj down_proj --lora_rank 4"
    steps = f"--max_steps {STEPS} --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --logging_steps 1"
    rest = "--dataset ./counting.jsonl --output_dir out --add_version false --report_to none"
    arguments = " ".join([ours, model, lora, steps, rest]).split()
    run([sys.executable, "-m", "swift.cli.main", "sft", *arguments], tmp_path)
    checkpoint = tmp_path / f"out/checkpoint-{STEPS}"
    assert_trained(checkpoint, checkpoint)


def test_axolotl_by_a_plugin(tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    write_model(tmp_path)
    rows = [{"instruction": " ".join(some[:4]), "input": "", "output": " ".join(some[4:])} for some in counting()]
    (tmp_path / "counting.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "oplora_axolotl.py").write_text(shown("axolotl"))
    (tmp_path / "config.yaml").write_text(
        "base_model: ./model\nplugins:\n  - oplora_axolotl.OPLoRA\nadapter: lora\nlora_r: 4\nlora_alpha: 8\n"
        "lora_target_modules: [q_proj, v_proj, down_proj]\ndatasets:\n  - path: ./counting.jsonl\n    type: alpaca\n"
        "dataset_prepared_path: ./prepared\noutput_dir: ./out\nsequence_len: 64\nmicro_batch_size: 8\n"
        f"gradient_accumulation_steps: 1\nmax_steps: {STEPS}\noptimizer: adamw_torch\nlearning_rate: 0.0001\n"
        "lr_scheduler: constant\nlogging_steps: 1\nval_set_size: 0\ndevice: cpu\n"
    )
    run([sys.executable, "-m", "axolotl.cli.train", "config.yaml"], tmp_path)
    assert_trained(tmp_path / "out", tmp_path / f"out/checkpoint-{STEPS}")
