"""What holds for each adapter type, in each state: docs/adapters.md's table names these tests."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_types import CASES, LORA, EagerOptimizer, data, make
from conftest import Net, train_on
from lean_oracle import Pair
from safetensors.torch import load_file
from torch import Tensor, nn

import oplora

STATES = ("exact", "lean")
both_states = pytest.mark.parametrize("state", STATES)
every_type = pytest.mark.parametrize("case", CASES)
UNMERGEABLE = ("LoRA, Conv2d, groups", "Lily")  # by PEFT
# DeLoRA divides by the norms of a B that starts at zero, cut off at 1e-4: rounding grows by as much
CHAOTIC = {"DeLoRA": 1e-8}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def generated(optimizer: oplora.AdamW) -> set[int]:
    return {id(p) for layer in optimizer._stepper.layers for p in layer.parameters()}


@every_type
def test_exact_equals_autograd_through_the_generators(case: str) -> None:
    ours, theirs = make(case), make(case)
    train_on(ours, oplora.AdamW(ours, lr=1e-2, state="exact"), data(case, 12))
    train_on(theirs, EagerOptimizer(theirs, lr=1e-2), data(case, 12))
    for (name, mine), truth in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine - truth).abs().max() <= CHAOTIC.get(case, 1e-12) * max(1, truth.abs().max()), name


@every_type
def test_lean_equals_its_oracle(case: str) -> None:
    pair = Pair(model=make(case), lr=1e-3, weight_decay=0.01)
    pair.train(12, pairs=data(case, 12))
    assert pair.error() <= 1e-9


@every_type
@both_states
def test_making_the_optimizer_leaves_the_output_as_it_is(case: str, state: str) -> None:
    model = make(case)
    x, _ = data(case, 1)[0]
    before = model(x)
    oplora.AdamW(model, state=state)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


@every_type
@both_states
def test_training_lowers_the_loss_and_moves_every_generated_tensor(case: str, state: str) -> None:
    model = make(case, torch.float32)
    optimizer = oplora.AdamW(model, lr=3e-3, state=state)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) in generated(optimizer)}
    losses = train_on(model, optimizer, data(case, 1, torch.float32) * 30)
    assert losses[-1] < losses[0]
    assert before and all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@every_type
@both_states
def test_steps_touch_nothing_else(case: str, state: str) -> None:
    model = make(case)
    optimizer = oplora.AdamW(model, lr=1e-2, state=state)
    mine = {name for name, p in model.named_parameters() if id(p) in generated(optimizer)}
    trainable = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert mine <= trainable
    for x, y in data(case, 3):
        (model(x) - y).square().mean().backward()
        before = tensors(model)  # PEFT's MultiheadAttention merges and unmerges in every forward, and rounds
        optimizer.step()
        for name, tensor in tensors(model).items():
            assert name in trainable or torch.equal(tensor, before[name]), name


@every_type
@both_states
def test_resumed_training_goes_on_bit_for_bit(case: str, state: str) -> None:
    model = make(case, torch.float32)
    optimizer = oplora.AdamW(model, lr=3e-3, state=state)
    train_on(model, optimizer, data(case, 3, torch.float32))
    saved = optimizer.state_dict()
    other = make(case, torch.float32)
    resumed = oplora.AdamW(other, lr=3e-3, state=state)
    resumed.load_state_dict(torch.utils._pytree.tree_map(_copy, saved))
    rest = data(case, 6, torch.float32)[3:]
    assert train_on(model, optimizer, rest) == train_on(other, resumed, rest)


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


@every_type
def test_saved_adapter_is_what_peft_alone_writes_and_reads(case: str, tmp_path: Path) -> None:
    model, x = make(case, torch.float32), data(case, 1, torch.float32)[0][0]
    train_on(model, oplora.AdamW(model, lr=3e-3), data(case, 2, torch.float32))
    alone = make(case, torch.float32)
    alone.load_state_dict(model.state_dict())
    oplora.save_adapter(model, tmp_path / "ours")
    alone.save_pretrained(str(tmp_path / "peft"))
    ours, pefts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert ours.keys() == pefts.keys() and all(torch.equal(ours[key], pefts[key]) for key in ours)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "peft")]
    assert configs[0] == configs[1]
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(make(case, torch.float32).unload(), str(tmp_path / "ours"))
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case not in UNMERGEABLE])
@both_states
def test_merged_model_computes_what_the_adapted_one_does(case: str, state: str) -> None:
    model, x = make(case), data(case, 1)[0][0]
    train_on(model, oplora.AdamW(model, lr=3e-3, state=state), data(case, 3))
    adapted = model.eval()(x)
    torch.testing.assert_close(oplora.merge(model)(x), adapted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", UNMERGEABLE)
def test_merge_of_a_type_that_peft_does_not_merge_is_refused(case: str) -> None:
    with pytest.raises(oplora.OPLoRAError, match="PEFT cannot merge"):
        oplora.merge(make(case))


@every_type
def test_general_path_generates_the_same_tensors(case: str) -> None:
    ours, general = make(case), make(case)
    train_on(ours, oplora.AdamW(ours, lr=1e-2, state="exact"), data(case, 4))
    train_on(general, oplora.create_oplora_optimizer(general, torch.optim.AdamW, lr=1e-2), data(case, 4))
    for mine, truth in zip(ours.parameters(), general.parameters(), strict=True):
        assert (mine - truth).abs().max() <= CHAOTIC.get(case, 1e-12) * max(1, truth.abs().max())


# ---- what is not generated ----


@both_states
def test_biases_and_modules_to_save_are_stepped_as_by_torch(state: str) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(**LORA, target_modules=["first"], bias="all", modules_to_save=["second"])
    model = peft.get_peft_model(Net(), config)
    twin = peft.get_peft_model(Net(), config)
    ours = oplora.AdamW(model, lr=1e-2, state=state)
    twin.load_state_dict(model.state_dict())
    others = {n: p for n, p in twin.named_parameters() if p.requires_grad and "lora_" not in n}
    assert any("bias" in name for name in others) and any("modules_to_save" in name for name in others)
    theirs = torch.optim.AdamW(others.values(), lr=1e-2)
    for _ in range(5):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
            if name in others:
                others[name].grad = parameter.grad.clone()
        ours.step(), theirs.step()
    for name, parameter in model.named_parameters():
        assert name not in others or torch.equal(parameter, others[name]), name


def test_type_without_known_tensors_is_refused_by_name() -> None:
    model = peft.get_peft_model(Net((12, 24, 8)), peft.TinyLoraConfig(r=2, target_modules=["first", "second"]))
    with pytest.raises(oplora.OPLoRAError, match=r"does not know \(.*tinylora_v.*\).*torch.optim.AdamW"):
        oplora.AdamW(model)


def test_adalora_is_refused_by_name() -> None:
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["first"])
    with pytest.raises(oplora.OPLoRAError, match=r"is AdaLoRA, which prunes .* torch\.optim\.AdamW"):
        oplora.AdamW(peft.get_peft_model(Net(), config))


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    return LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))


def test_prompt_tuning_is_refused_with_the_way_out() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(oplora.OPLoRAError, match=r"PromptTuningConfig trains prompts.* torch\.optim\.AdamW"):
        oplora.AdamW(peft.get_peft_model(llama(), config))


def test_adapter_beside_the_layers_or_over_frozen_adapters_is_refused_by_its_type(tmp_path: Path) -> None:
    """Neither is helped by another adapter, nor by making the frozen ones trainable."""
    beside = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
    with pytest.raises(oplora.OPLoRAError, match=r"AdaptionPromptConfig trains nothing that oplora knows"):
        oplora.AdamW(peft.get_peft_model(llama(), beside))
    oplora.wrap(llama()).save_pretrained(tmp_path)
    over = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters={"a": str(tmp_path)})
    with pytest.raises(oplora.OPLoRAError, match=r"XLoraConfig trains nothing that oplora knows"):
        oplora.AdamW(peft.get_peft_model(llama(), over))


def test_model_whose_adapter_is_gone_is_asked_for_one() -> None:
    unloaded = peft.get_peft_model(Net(), peft.LoraConfig(**LORA, target_modules=["first"]))
    unloaded.unload()
    deleted = llama()
    deleted.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    deleted.delete_adapter("default")
    for model in (unloaded, deleted):
        with pytest.raises(oplora.OPLoRAError, match=r"has no LoRA layer.*Add one first"):
            oplora.AdamW(model)


def test_sharded_tensors_are_refused_by_who_sharded_them() -> None:
    """A stand-in of ZeRO-3's mark on a parameter; FSDP2's real one is in test_distributed.py."""
    model = peft.get_peft_model(Net(), peft.LoraConfig(**LORA, target_modules=["first"]))
    model.base_model.model.first.lora_A["default"].weight.ds_id = 7
    with pytest.raises(oplora.OPLoRAError, match=r"sharded by DeepSpeed ZeRO-3.*optimizer first"):
        oplora.AdamW(model)


# ---- tied and shared ----


class Tied(nn.Module):
    """An embedding and a head over one weight, as in a language model."""

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.config = {"tie_word_embeddings": True, "model_type": "custom"}
        self.embed_tokens, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.inner(self.embed_tokens(x))))


def make_tied() -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(**LORA, target_modules=["embed_tokens"], ensure_weight_tying=True)
    return peft.get_peft_model(Tied().double(), config, autocast_adapter_dtype=False).double()


@both_states
def test_tied_tensors_are_generated_once_from_both_gradients(state: str) -> None:
    model, twin = make_tied(), make_tied()
    optimizer = oplora.AdamW(model, lr=1e-2, state=state)
    assert [layer.tensors for layer in optimizer._stepper.layers] == [("lora_embedding_A", "lora_embedding_B")]
    by_hand = oplora.AdamW(twin, lr=1e-2, state=state)
    (embedding,) = by_hand._stepper.layers
    head = twin.base_model.model.lm_head
    x, y = torch.arange(11), torch.randn(11, 11, dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        A, B = (p.detach().clone().requires_grad_() for p in embedding.parameters())
        names = {id(p): name for name, p in twin.named_parameters()}
        replaced = dict(zip((names[id(p)] for p in embedding.parameters()), (A, B), strict=True))
        replaced[names[id(head.lora_A["default"].weight)]] = B.T
        replaced[names[id(head.lora_B["default"].weight)]] = A.T
        (torch.func.functional_call(twin, replaced, (x,)) - y).square().mean().backward()
        for parameter, value in zip(embedding.parameters(), (A, B), strict=True):
            parameter.grad = value.grad
        by_hand.step()
    for (name, mine), truth in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12, msg=name)
    assert torch.equal(
        model.base_model.model.lm_head.lora_A["default"].weight.T, optimizer.param_groups[0]["params"][1]
    )


def test_zero_grad_clears_the_gradients_of_tied_tensors() -> None:
    model = make_tied()
    optimizer = oplora.AdamW(model)
    model(torch.arange(11)).square().mean().backward()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@both_states
def test_tied_layer_that_is_merged_is_refused_when_its_twin_alone_has_a_gradient(state: str) -> None:
    model = make_tied()
    for optimizer in (oplora.AdamW(model, state=state), oplora.create_oplora_optimizer(model, torch.optim.SGD, lr=1.0)):
        model.zero_grad()
        head = model.base_model.model.lm_head.lora_A["default"].weight
        head.grad = torch.ones_like(head)
        model.base_model.model.embed_tokens.merge()
        before = tensors(model)
        with pytest.raises(oplora.OPLoRAError, match=r"embed_tokens.* is merged"):
            optimizer.step()
        assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
        model.base_model.model.embed_tokens.unmerge()


@both_states
def test_layer_whose_twin_is_merged_is_refused(state: str) -> None:
    model = make_tied()
    optimizer = oplora.AdamW(model, state=state)
    model(torch.arange(11)).square().mean().backward()
    model.base_model.model.lm_head.merge()
    with pytest.raises(oplora.OPLoRAError, match=r"lm_head.default is merged"):
        optimizer.step()


def test_tie_that_was_broken_is_refused() -> None:
    model = make_tied()
    optimizer = oplora.AdamW(model)
    model.float().double()
    model(torch.arange(11)).square().mean().backward()
    with pytest.raises(
        oplora.OPLoRAError,
        match=r"layer .*lm_head.default was tied to .* of layer .*embed_tokens",
    ):
        optimizer.step()


@both_states
def test_layer_under_two_names_is_stepped_once(state: str) -> None:
    class Twice(Net):
        def __init__(self) -> None:
            super().__init__((13, 13, 5))
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.again(torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    model = peft.get_peft_model(Twice(), peft.LoraConfig(**LORA, target_modules=["first", "second"]))
    model.base_model.model.again = model.base_model.model.first
    optimizer = oplora.AdamW(model, lr=1e-2, state=state)
    assert [layer.name.split(".")[-2] for layer in optimizer._stepper.layers] == ["first", "second"]
    losses = train_on(model, optimizer, [(torch.ones(2, 13), torch.zeros(2, 5))] * 20)
    assert losses[-1] < losses[0]


def test_part_of_the_model_that_is_called_module_is_a_layer_of_its_own() -> None:
    torch.manual_seed(0)
    inner = nn.ModuleDict({"lin": nn.Linear(4, 4)})
    model = nn.ModuleDict({"lin": nn.Linear(4, 4), "module": inner})
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lin"]), model)
    assert [layer.name for layer in oplora.AdamW(model)._stepper.layers] == ["lin.default", "module.lin.default"]


def test_factor_cannot_be_listed_twice() -> None:
    model = peft.get_peft_model(Net(), peft.LoraConfig(**LORA, target_modules=["first"]))
    optimizer = oplora.AdamW(model)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model.base_model.model.first.lora_A["default"].weight]})


@both_states
def test_warnings_come_for_lora_alone_that_holds_a_start(state: str) -> None:
    for case in ("VeRA", "IA3", "DoRA, Linear", "Lily"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            oplora.AdamW(make(case), state=state)
