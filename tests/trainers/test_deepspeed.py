"""oplora.AdamW under DeepSpeed's ZeRO, by deepspeed.initialize and by transformers' Trainer. Skipped where deepspeed is
missing: `DS_BUILD_OPS=0 pip install deepspeed` into an environment of its own; the CPU and gloo are enough.

tests/test_pieces.py has all that does not need DeepSpeed itself.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import assert_same_bits
from peft import PeftModel
from ranks import Ranks, join_group, leave_it_to_accelerate
from test_fsdp2 import STEPS, Bits, assert_close, data, make_chain, part, train_alone, trained
from test_pieces import CONFIGS, of_list, of_loraplus, of_model, run_half
from torch import nn

import oplora

pytest.importorskip("deepspeed")

Config = dict[str, Any]
ON_HOST = {"offload_optimizer": {"device": "cpu"}}


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    group = Ranks(join_group, ("peft", "accelerate", "deepspeed"), request.param)
    yield group
    group.stop(wait=True)


@pytest.fixture
def fresh_ranks() -> Iterator[Ranks]:
    """Which join no group: whoever runs there does."""
    group = Ranks(leave_it_to_accelerate, ("peft", "accelerate", "deepspeed"))
    yield group
    group.stop(wait=False)


def engine_of(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int, zero: Config, **config: Any) -> Any:
    import deepspeed

    common = {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True}
    settings = {**common, "zero_optimization": {"stage": stage, **zero}, **config}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def train(engine: Any, some: Any) -> list[float]:
    losses = []
    for batch in some:
        x, y = part(batch, dist.get_rank(), dist.get_world_size())
        loss = (engine(x) - y).square().mean()
        engine.backward(loss)
        engine.step()
        loss = loss.detach().float()
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
    return losses


def trained_by(engine: Any) -> Bits:
    """What it trained, whole."""
    import deepspeed

    parameters = [p for p in engine.module.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
        return trained(engine.module)


# ---- all stages ----


def run_zero(make: Callable[..., Any], model: Config, stage: int, zero: Config, config: Config) -> tuple[Bits, str]:
    chain = make_chain(**model)
    engine = engine_of(chain, make(chain), stage, zero, **config)
    train(engine, data(50))
    return trained_by(engine), type(engine.optimizer).__name__


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("config", CONFIGS)
def test_zero_trains_as_one_process(ranks: Ranks, config: str, stage: int) -> None:
    alone = make_chain(**CONFIGS[config])
    train_alone(alone, oplora.AdamW(alone), data(50), ranks.world)
    for bits, kind in ranks.run(run_zero, of_model, CONFIGS[config], stage, {}, {}):
        assert kind.startswith("DeepSpeedZeroOptimizer")
        assert_close(bits, trained(alone), torch.float32)


WAYS: dict[str, tuple[Config, Config]] = {
    "in turn": ({"round_robin_gradients": True}, {}),
    "few at once": ({"sub_group_size": 30, "stage3_param_persistence_threshold": 0}, {}),
    "on the host": (ON_HOST, {"zero_force_ds_cpu_optimizer": False}),
    "reduced at once": ({"reduce_scatter": False, "contiguous_gradients": False}, {}),
}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("make", [of_model, of_list, of_loraplus])
@pytest.mark.parametrize("way", WAYS)
def test_groups_and_ways_of_zero_train_as_one_process(ranks: Ranks, way: str, make: Any, stage: int) -> None:
    config = CONFIGS["biases and a head"]
    alone = make_chain(**config)
    train_alone(alone, make(alone), data(50), ranks.world)
    for bits, _ in ranks.run(run_zero, make, config, stage, *WAYS[way]):
        assert_close(bits, trained(alone), torch.float32)


def run_bfloat16(stage: int, zero: Config) -> tuple[Bits, str, set[Any]]:
    model = make_chain(torch.bfloat16)
    optimizer = oplora.AdamW(model)
    settings = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, **FLOAT32}
    engine = engine_of(model, optimizer, stage, zero, **settings)
    train(engine, data(STEPS, torch.bfloat16))
    return trained_by(engine), type(engine.optimizer).__name__, {p.dtype for p in optimizer.state}


FLOAT32 = {"communication_data_type": "fp32"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_model_trains_by_float32_pieces(ranks: Ranks, stage: int) -> None:
    alone = run_half(ranks.world)
    for bits, kind, dtypes in ranks.run(run_bfloat16, stage, {}):
        assert kind == "BF16_Optimizer" if stage == 1 else kind.startswith("DeepSpeedZeroOptimizer")
        assert dtypes == {torch.float32}
        for name, tensor in bits.items():
            torch.testing.assert_close(tensor, alone[name], rtol=0.02, atol=1e-3)


def clip(stage: int) -> Bits:
    model = make_chain(**CONFIGS["biases and a head"])
    engine = engine_of(model, oplora.AdamW(model), stage, {}, gradient_clipping=0.05)
    train(engine, data(20))
    return trained_by(engine)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradient_clipping_of_deepspeed_is_followed(ranks: Ranks, stage: int) -> None:
    alone = make_chain(**CONFIGS["biases and a head"])
    optimizer = oplora.AdamW(alone)
    optimizer.register_step_pre_hook(lambda *_: clip_as_deepspeed(alone))
    train_alone(alone, optimizer, data(20), ranks.world)
    for bits in ranks.run(clip, stage):
        assert_close(bits, trained(alone), torch.float32)


def clip_as_deepspeed(model: nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def poison(stage: int) -> tuple[str, Bits, Bits]:
    """Infinity in one process; what the step says, if DeepSpeed does not skip it, and the step after it."""
    runs, message = [], ""
    for poisoned in (False, True):
        model = make_chain(**CONFIGS["biases and a head"])
        engine = engine_of(model, oplora.AdamW(model), stage, {}, bf16={"enabled": False})
        first, second, third = data(3)
        train(engine, [first])
        if poisoned:
            x, y = part(second, dist.get_rank(), dist.get_world_size())
            engine.backward((engine(x) - y).square().mean() * (torch.inf if dist.get_rank() == 1 else 1.0))
            try:
                engine.step()
            except oplora.OPLoRAError as error:
                message = str(error)
        train(engine, [third])
        runs.append(trained_by(engine))
    return message, runs[0], runs[1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_infinity_changes_nothing_in_any_process(ranks: Ranks, stage: int) -> None:
    for _, clean, poisoned in ranks.run(poison, stage):
        assert_same_bits(poisoned, clean)


def resume(make: Callable[..., Any], stage: int, folder: Path, config: Config) -> tuple[Bits, Bits]:
    """Ten steps; and five, saved by the engine, and five more by another one that has loaded them."""
    some, dtype = data(10), torch.bfloat16 if "bf16" in config else torch.float32
    some = [(x.to(dtype), y.to(dtype)) for x, y in some]
    whole, early, late = (make_chain(dtype, **CONFIGS["biases and a head"]) for _ in range(3))
    never_saved = engine_of(whole, make(whole), stage, {}, **config)
    train(never_saved, some)
    engine = engine_of(early, make(early), stage, {}, **config)
    train(engine, some[:5])
    engine.save_checkpoint(str(folder))
    engine = engine_of(late, make(late), stage, {}, **config)
    engine.load_checkpoint(str(folder))
    train(engine, some[5:])
    return trained_by(engine), trained_by(never_saved)


@pytest.mark.parametrize("config", [{}, {"bf16": {"enabled": True}}], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("make", [of_model, of_loraplus])
def test_checkpoint_of_the_engine_is_gone_on_from(
    ranks: Ranks, make: Any, stage: int, config: Config, tmp_path: Path
) -> None:
    for resumed, whole in ranks.run(resume, make, stage, tmp_path, config):
        assert_same_bits(resumed, whole)


# ---- without ZeRO, and refused ----


def run_without_zero(steps: int) -> Bits:
    model = make_chain()
    train(engine_of(model, oplora.AdamW(model), 0, {}), data(steps))
    return trained(model)


def test_stage_0_trains_as_one_process(ranks: Ranks) -> None:
    alone = make_chain()
    train_alone(alone, oplora.AdamW(alone), data(20), ranks.world)
    for bits in ranks.run(run_without_zero, 20):
        assert_close(bits, trained(alone), torch.float32)


def message_of_late_optimizer() -> str:
    import deepspeed

    model = make_chain()
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}
    deepspeed.initialize(model=model, config=config)
    with pytest.raises(oplora.OPLoRAError) as raised:
        oplora.AdamW(model)
    return str(raised.value)


def test_optimizer_of_parameters_that_stage_3_has_cut_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(message_of_late_optimizer):
        assert "ZeRO-3" in message and "Make the optimizer first" in message


# ---- transformers' Trainer ----


def run_trainer(stage: int, folder: Path, resumed: bool) -> tuple[list[float], Bits, str]:
    """20 steps, from the checkpoint of the tenth on if resumed. With DeepSpeed, Trainer drops what optimizers=(...)
    hands over."""
    from accelerate import PartialState
    from test_trainer import examples, make_model, settings
    from transformers import Trainer, TrainingArguments

    # of itself accelerate takes DeepSpeed on GPUs only
    os.environ |= {"ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true"}
    PartialState(backend="gloo")
    config = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    common = settings(max_steps=20, save_strategy="steps", save_steps=10, deepspeed=config, use_cpu=False)
    common |= {"per_device_train_batch_size": 4, "accelerator_config": {"use_configured_state": True}}
    model, arguments = make_model(dropout=0.0), TrainingArguments(str(folder), **common)
    handed = oplora.for_trainer(arguments)
    trainer = Trainer(model, arguments, train_dataset=examples(), optimizer_cls_and_kwargs=handed)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-10") if resumed else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model(str(folder / f"adapter-{resumed}"))
    assert trainer.args.world_size == 2
    return losses, trained_by(trainer.deepspeed), type(trainer.deepspeed.optimizer).__name__


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_trainer_trains_resumes_and_saves_what_peft_reads(fresh_ranks: Ranks, stage: int, tmp_path: Path) -> None:
    from test_trainer import make_model

    once = fresh_ranks.run(run_trainer, stage, tmp_path, False)
    fresh_ranks.stop(wait=False)
    fresh_ranks.start()
    again = fresh_ranks.run(run_trainer, stage, tmp_path, True)
    for (losses, bits, kind), (resumed, same, _) in zip(once, again, strict=True):
        assert kind.startswith("DeepSpeedZeroOptimizer")
        assert losses[-1] < losses[0] - 0.04
        assert resumed == losses
        assert_same_bits(same, bits)
        read = PeftModel.from_pretrained(make_model().unload(), tmp_path / "adapter-True").state_dict()
        for name, tensor in bits.items():
            assert torch.equal(read[name], tensor), name
