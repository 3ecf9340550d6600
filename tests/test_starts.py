"""Adapters that start from PEFT's own initialisations and keep it: PiSSA, OLoRA, EVA, orthogonal."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import Net, assert_same_bits, batches, factors, train
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from torch import Tensor, nn

import oplora
from oplora.errors import OPLoRARuntimeError

STARTS = ["pissa", "pissa_niter_4", "olora", "orthogonal", "eva", "eva, ranks redistributed"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False"),
    pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights"),
]
both_states = pytest.mark.parametrize("state", ["lean", "exact"])
every_start = pytest.mark.parametrize("start", STARTS)
cut_from_the_base = pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])


def base() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def run_eva(model: nn.Module) -> None:
    """On data that varies most in one direction, so that the second layer deserves the larger rank."""
    torch.manual_seed(1)
    initialize_lora_eva_weights(
        model,
        [torch.randn(64, 13) * torch.tensor([10.0] + [1.0] * 12)],
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: inputs[0],
        show_progress_bar=False,
    )


def eva_model(rho: float) -> nn.Module:
    """Before EVA has looked at data; rho above 1 lets it move ranks between layers."""
    config = EvaConfig(rho=rho)
    lora = LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights="eva", eva_config=config)
    return get_peft_model(base(), lora)


def started(start: str) -> nn.Module:
    """Net with an adapter that starts so, always from the same seed."""
    if start.startswith("eva"):
        model = eva_model(rho=2.0 if "redistributed" in start else 1.0)
        run_eva(model)
        return model
    return get_peft_model(
        base(), LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], init_lora_weights=start)
    )


def inputs() -> Tensor:
    return next(batches(1, torch.float32))[0]


def train_on_one_batch(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    return [train(model, optimizer, 1)[0] for _ in range(steps)]


@both_states
@every_start
def test_kept_start_is_left_bit_for_bit(start: str, state: str) -> None:
    model = started(start)
    before, output = factors(model), model(inputs())
    oplora.AdamW(model, init="keep", state=state)
    assert_same_bits(factors(model), before)
    assert torch.equal(model(inputs()), output)


@both_states
def test_generator_of_a_kept_start_adds_nothing_at_first(state: str) -> None:
    """W2 is 0, so weight decay pulls towards the start and the first line search is along directions of g alone."""
    optimizer = oplora.AdamW(started("pissa"), init="keep", state=state)
    for generator in optimizer._stepper.states:
        assert not any(piece.count_nonzero() for piece in generator.engine.generate(generator))


@every_start
def test_kept_start_trains_as_generators_under_torch_adamw_do(start: str) -> None:
    model, twin = started(start), started(start)
    ours = oplora.AdamW(model, lr=1e-2, state="exact", init="keep")
    theirs = oplora.create_oplora_optimizer(twin, torch.optim.AdamW, lr=1e-2, weight_decay=1e-2, init="keep")
    train(model, ours, 4), train(twin, theirs, 4)
    for name, tensor in factors(model).items():
        torch.testing.assert_close(tensor, factors(twin)[name], rtol=1e-4, atol=1e-5)


@both_states
@every_start
def test_training_from_a_kept_start_lowers_the_loss(start: str, state: str) -> None:
    model = started(start)
    losses = train_on_one_batch(model, oplora.AdamW(model, lr=1e-2, init="keep", state=state), 20)
    assert losses[-1] < 0.5 * losses[0]


@both_states
@every_start
def test_adapter_trained_from_a_kept_start_reloads_with_equal_outputs(start: str, state: str, tmp_path: Path) -> None:
    model = started(start)
    train(model, oplora.AdamW(model, lr=1e-2, init="keep", state=state), 3)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(inputs()), model(inputs()))


@both_states
@every_start
def test_resume_from_a_kept_start_is_bit_for_bit(start: str, state: str) -> None:
    model, fresh = started(start), started(start)
    optimizer = oplora.AdamW(model, lr=1e-2, init="keep", state=state)
    train(model, optimizer, 2)
    resumed = oplora.AdamW(fresh, lr=1.0, init="keep", state=state)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(fresh, resumed, 2) == train(model, optimizer, 2)
    assert_same_bits(factors(fresh), factors(model))


@both_states
@cut_from_the_base
def test_adapter_converted_at_saving_gives_equal_outputs_on_the_untouched_base(
    start: str, state: str, tmp_path: Path
) -> None:
    model = started(start)
    model.save_pretrained(tmp_path / "initial")
    train(model, oplora.AdamW(model, lr=1e-2, init="keep", state=state), 3)
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    converted = PeftModel.from_pretrained(base(), tmp_path / "lora")
    assert converted.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(converted(inputs()), model(inputs()), rtol=1e-5, atol=2e-6)


@both_states
@cut_from_the_base
def test_converting_in_the_middle_of_training_leaves_its_bits(start: str, state: str, tmp_path: Path) -> None:
    model, twin = started(start), started(start)
    model.save_pretrained(tmp_path / "initial")
    optimizers = [oplora.AdamW(m, lr=1e-2, init="keep", state=state) for m in (model, twin)]
    train(model, optimizers[0], 2), train(twin, optimizers[1], 2)
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert train(model, optimizers[0], 2) == train(twin, optimizers[1], 2)
    assert_same_bits(factors(model), factors(twin))


@both_states
def test_eva_is_kept_with_a_warning_where_nobody_asked_for_it(state: str) -> None:
    model = started("eva")
    before = factors(model)
    with pytest.warns(UserWarning, match="2 of 2 layers hold a start of their own .*EVA"):
        oplora.AdamW(model, state=state)
    assert_same_bits(factors(model), before)


@both_states
def test_eva_that_changes_ranks_under_the_optimizer_is_refused(state: str) -> None:
    model = eva_model(rho=2.0)
    optimizer = oplora.AdamW(model, init="keep", state=state)
    run_eva(model)
    before = factors(model)
    with pytest.raises(OPLoRARuntimeError, match=r"shape.*new optimizer"):
        train(model, optimizer, 1)
    assert_same_bits(factors(model), before)
