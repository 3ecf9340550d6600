"""save_adapter's files, read by the libraries that own the formats, in a process that has no oplora."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline
from peft import BdLoraConfig, IA3Config, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import oplora

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "proj_in", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
FLUX = [*ATTENTION, "add_q_proj", "add_k_proj", "to_add_out", "norm1.linear", "norm.linear", "proj_mlp", "proj_out"]
RSLORA: dict[str, Any] = {"r": 4, "lora_alpha": 3, "use_rslora": True}
MIXED: dict[str, Any] = {"r": 2, "lora_alpha": 5, "rank_pattern": {"to_q": 3, "conv1": 1}, "alpha_pattern": {"to_k": 7}}

# pipeline, and what its components are adapted with
CASES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "sd, convolutions, mixed ranks": ("sd", {"unet": {"target_modules": ATTENTION + CONVOLUTIONS, **MIXED}}),
    "sd, rsLoRA": (
        "sd",
        {"unet": {"target_modules": ATTENTION, **RSLORA}, "text_encoder": {"target_modules": TEXT, **RSLORA}},
    ),
    "sd, DoRA": (
        "sd",
        {
            "unet": {"target_modules": ATTENTION + CONVOLUTIONS, "r": 3, "lora_alpha": 4, "use_dora": True},
            "text_encoder": {"target_modules": TEXT, "r": 2, "lora_alpha": 3, "use_dora": True},
        },
    ),
    "sdxl": (
        "sdxl",
        {
            "unet": {"target_modules": ATTENTION + CONVOLUTIONS, **MIXED},
            "text_encoder": {"target_modules": TEXT, "r": 2, "lora_alpha": 3},
            "text_encoder_2": {"target_modules": TEXT, **RSLORA},
        },
    ),
    "flux": (
        "flux",
        {
            "transformer": {"target_modules": FLUX, "r": 2, "lora_alpha": 3, "rank_pattern": {"attn.to_k": 3}},
            "text_encoder": {"target_modules": TEXT, "r": 2, "lora_alpha": 5},
        },
    ),
}

# diffusers takes kohya's dora_scale for another thing, and reads Flux in its full width alone: test_export_kohya.py
NOT_READ = {("kohya", "sd, DoRA"), ("kohya", "flux")}
FORMATS = [(kind, case) for kind in ("peft", "diffusers", "kohya") for case in CASES if (kind, case) not in NOT_READ]

# reads jobs [kind, file, folder of a pipeline, result] of a JSON: what a user's program does
READER = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import tiny_pipelines
from diffusers import DiffusionPipeline
from peft import PeftModel
for kind, file, folder, result in json.loads(Path(sys.argv[2]).read_text()):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    if kind == "peft":
        for part in Path(file).iterdir():
            PeftModel.from_pretrained(getattr(pipeline, part.name), str(part))
    else:
        path = Path(file)
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
    torch.save([tiny_pipelines.predict(pipeline), tiny_pipelines.encode(pipeline)], result)
assert "oplora" not in sys.modules
"""


def adapted(case: str) -> DiffusionPipeline:
    """The case's pipeline with adapters in which nothing is at its start."""
    name, components = CASES[case]
    pipeline = tiny_pipelines.PIPELINES[name]()
    for component, config in components.items():
        add_adapter(getattr(pipeline, component), LoraConfig(**config))
    return pipeline


def add_adapter(model: nn.Module, config: LoraConfig) -> nn.Module:
    model.add_adapter(config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
            if ".lora_magnitude_vector." in name:
                parameter.mul_(torch.rand_like(parameter).add(0.7))
    return model


def mapping(pipeline: DiffusionPipeline, case: str) -> dict[str, nn.Module]:
    return {name: getattr(pipeline, name) for name in CASES[case][1]}


def outputs(pipeline: DiffusionPipeline) -> list[Tensor]:
    return [tiny_pipelines.predict(pipeline), tiny_pipelines.encode(pipeline)]


def read_elsewhere(jobs: list[list[str]], folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-c", READER, str(Path(__file__).parent), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def keys_of(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def read_back(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[list[Tensor], list[Tensor]]]:
    """By (format, case): what the model gave that was saved, and what a fresh process gives that loaded the file."""
    root = tmp_path_factory.mktemp("export")
    jobs, expected = [], {}
    for number, case in enumerate(CASES):
        pipeline = adapted(case)
        bare = tiny_pipelines.save(tiny_pipelines.PIPELINES[CASES[case][0]](), root / f"bare-{number}")
        for kind in ("peft", "diffusers", "kohya"):
            if (kind, case) not in FORMATS:
                continue
            target = root / f"{kind}-{number}"
            oplora.save_adapter(mapping(pipeline, case), target, format=kind)
            file = target if kind == "peft" else next(target.iterdir())
            jobs.append([kind, str(file), str(bare), str(root / f"{kind}-{number}.pt")])
            expected[kind, case] = outputs(pipeline), Path(jobs[-1][-1])
    read_elsewhere(jobs, root)
    return {key: (ours, torch.load(path)) for key, (ours, path) in expected.items()}


@pytest.mark.parametrize(("kind", "case"), FORMATS)
def test_file_read_by_its_owner_gives_the_models_output(kind, case, read_back):
    ours, theirs = read_back[kind, case]
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-6 * one.abs().max()


def test_the_adapters_of_the_cases_change_the_outputs():
    for case, (name, components) in CASES.items():
        before, after = outputs(tiny_pipelines.PIPELINES[name]()), outputs(adapted(case))
        for changed in range(2 if "text_encoder" in components else 1):
            assert (before[changed] - after[changed]).abs().max() > 1e-2 * before[changed].abs().max()


def test_diffusers_file_holds_factors_under_uniform_names_and_nothing_else(tmp_path):
    case = "sd, rsLoRA"
    pipeline = adapted(case)
    oplora.save_adapter(pipeline, tmp_path, format="diffusers")
    expected = {}
    for component, model in mapping(pipeline, case).items():
        level = "text_model." if component == "text_encoder" else ""
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                expected[f"{component}.{level}{name.replace('.default', '')}"] = tuple(parameter.shape)
    assert keys_of(tmp_path / "pytorch_lora_weights.safetensors") == expected
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_trained_adapter_leaves_nothing_of_its_generators(tmp_path):
    unet = adapted("sd, rsLoRA").unet
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    optimizer = oplora.AdamW(unet, lr=1e-2, init="keep")
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    oplora.save_adapter(unet, tmp_path, format="diffusers")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys_of(next(tmp_path.iterdir())))


def test_pipeline_mapping_and_module_give_the_same_file(tmp_path):
    pipeline = adapted("sd, convolutions, mixed ranks")
    for name, model in {"a": pipeline, "b": {"unet": pipeline.unet}, "c": pipeline.unet}.items():
        oplora.save_adapter(model, tmp_path / f"{name}.safetensors", format="diffusers")
    a, b, c = (path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert a == b == c


def test_peft_model_gives_the_file_of_the_injected_adapter(tmp_path):
    config = LoraConfig(r=2, target_modules=ATTENTION)
    torch.manual_seed(0)
    wrapped = get_peft_model(tiny_pipelines.stable_diffusion().unet, config)
    torch.manual_seed(0)
    injected = tiny_pipelines.stable_diffusion().unet
    injected.add_adapter(config)
    injected.load_state_dict(wrapped.get_base_model().state_dict())
    oplora.save_adapter(wrapped, tmp_path / "a.safetensors", format="diffusers")
    oplora.save_adapter(injected, tmp_path / "b.safetensors", format="diffusers")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_peft_folder_of_an_injected_adapter_is_that_of_a_peft_model(tmp_path):
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"])
    injected = tiny_pipelines.stable_diffusion().unet
    injected.add_adapter(config)
    wrapped = get_peft_model(tiny_pipelines.stable_diffusion().unet, config)
    for name, model in {"injected": injected, "wrapped": wrapped}.items():
        oplora.save_adapter(model, tmp_path / name)
    one, other = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("injected", "wrapped"))
    assert one == other
    weights = [keys_of(tmp_path / n / "adapter_model.safetensors") for n in ("injected", "wrapped")]
    assert weights[0] == weights[1]


def test_named_adapters_go_into_subfolders(tmp_path):
    unet = tiny_pipelines.stable_diffusion().unet
    for name in ("one", "two"):
        unet.add_adapter(LoraConfig(target_modules=["to_q"]), adapter_name=name)
    oplora.save_adapter({"unet": unet}, tmp_path)
    assert sorted(p.parent.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.json")) == [
        "unet/one",
        "unet/two",
    ]


def test_half_precision_factors_are_folded_in_float32(tmp_path):
    unet = adapted("sd, rsLoRA").unet.to(torch.bfloat16)
    oplora.save_adapter(unet, tmp_path, format="diffusers")
    with safe_open(next(tmp_path.iterdir()), "pt") as file:
        key = next(k for k in file.keys() if k.endswith("lora_B.weight"))  # noqa: SIM118
        B = unet.get_parameter(key.removeprefix("unet.").replace("lora_B.weight", "lora_B.default.weight"))
        assert torch.equal(file.get_tensor(key), B.float() * (3 / 2))


def test_layers_that_the_active_adapter_leaves_alone_are_not_in_the_file(tmp_path):
    unet = add_adapter(tiny_pipelines.stable_diffusion().unet, LoraConfig(r=2, target_modules=["to_q"]))
    unet.add_adapter(LoraConfig(r=3, target_modules=["to_k"]), adapter_name="other")
    unet.set_adapter("other")
    oplora.save_adapter(unet, tmp_path / "x.safetensors", format="diffusers")
    keys = load_file(tmp_path / "x.safetensors")
    assert keys and all(".to_k.lora_" in key for key in keys)


# ---- what is refused ----


def merged(pipeline: DiffusionPipeline) -> nn.Module:
    pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.merge()
    return pipeline.unet


def two_active(pipeline: DiffusionPipeline) -> nn.Module:
    pipeline.unet.add_adapter(LoraConfig(target_modules=["to_q"]), adapter_name="other")
    pipeline.unet.set_adapter(["default", "other"])
    return pipeline.unet


def with_nan(pipeline: DiffusionPipeline) -> nn.Module:
    next(p for n, p in pipeline.unet.named_parameters() if "lora_B" in n).data[0, 0] = float("nan")
    return pipeline.unet


def with_config(**config: Any) -> Callable[[DiffusionPipeline], nn.Module]:
    def make(_: DiffusionPipeline) -> nn.Module:
        return add_adapter(tiny_pipelines.stable_diffusion().unet, LoraConfig(target_modules=["to_q"], **config))

    return make


def ia3(_: DiffusionPipeline) -> nn.Module:
    config = IA3Config(target_modules=["to_q"], feedforward_modules=[])
    return get_peft_model(tiny_pipelines.stable_diffusion().unet, config)


def embedding(pipeline: DiffusionPipeline) -> nn.Module:
    text_encoder = tiny_pipelines.stable_diffusion().text_encoder
    text_encoder.add_adapter(LoraConfig(target_modules=["token_embedding"]))
    return text_encoder


def no_adapter_active(pipeline: DiffusionPipeline) -> nn.Module:
    for module in pipeline.unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([])
    return pipeline.unet


def blocks(_: DiffusionPipeline) -> Any:
    config = LoraConfig(r=2, target_modules=["0"], use_bdlora=BdLoraConfig(target_modules_bd_a=["0"], nblocks=2))
    return {"transformer": get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)}


def two_transformers(_: DiffusionPipeline) -> Any:
    config = LoraConfig(r=2, target_modules=["0"])
    names = "transformer", "transformer_2"
    return {name: get_peft_model(nn.Sequential(nn.Linear(4, 4)), config) for name in names}


def no_place(_: DiffusionPipeline) -> nn.Module:
    return get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"]))


REFUSALS = {
    merged: "attn1.to_q is merged into its base",
    two_active: r"has 2 active adapters \(default, other\).*set_adapter with one of: default, other",
    with_nan: "lora_B of layer unet.*NaN or infinity",
    with_config(lora_bias=True): "lora_bias=True",
    with_config(bias="all"): "bias='all'",
    with_config(modules_to_save=["conv_in"]): r"modules_to_save=\['conv_in'\]",
    ia3: "peft.tuners.ia3.layer.Linear; diffusers' and kohya's files hold LoRA",
    embedding: "token_embedding.*Embedding, lora_embedding",
    no_adapter_active: "has no active adapter. Call set_adapter with one of: default",
    blocks: r"transformer\.0 \(Linear, BdLoraLinearVariant\) is none that",
    two_transformers: r"no layers of transformer_2 .*'transformer': pipeline.transformer_2",
    no_place: "Sequential has no place of its own in a diffusers pipeline",
    lambda _: tiny_pipelines.stable_diffusion(): "no part of the StableDiffusionPipeline has an adapter; it has vae",
    lambda _: tiny_pipelines.stable_diffusion().unet: "UNet2DConditionModel has no adapter",
    lambda _: 3: "a mapping of names to models.*got int",
}


@pytest.mark.parametrize(("make", "message"), REFUSALS.items(), ids=map(str, range(len(REFUSALS))))
def test_what_no_file_holds_is_refused_by_name(make, message, tmp_path):
    model = make(adapted("sd, rsLoRA"))
    with pytest.raises(oplora.OPLoRAError, match=f"(?s){message}"):
        oplora.save_adapter(model, tmp_path, format="diffusers")
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    """A limit on the size of files is what a full disk is to a program."""
    unet = adapted("sd, rsLoRA").unet
    oplora.save_adapter(unet, tmp_path, format="diffusers")
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    child = os.fork()
    if not child:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
            import signal

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            try:
                oplora.save_adapter(unet, tmp_path, format="diffusers")
            except oplora.OPLoRAError as error:
                code = 0 if "Free some space" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == before
