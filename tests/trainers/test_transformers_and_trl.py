"""oplora.for_trainer in transformers' Trainer and TRL's trainers: the optimizer of the model that they train, whoever
makes it. Every trainer takes 20 steps on its own objective."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_trainer import SEQUENCE, VOCABULARY, examples, make_model, run, sequences, settings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, Trainer, TrainingArguments

import oplora

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
STEPS = 20


def arguments(folder: Path, kind: type = TrainingArguments, **changes: Any) -> Any:
    return kind(str(folder), **settings(max_steps=STEPS, **changes))


def make_trainer(folder: Path, model: Any, handed: Any, **changes: Any) -> Trainer:
    handed = {"optimizer_cls_and_kwargs": handed} | (
        {"model": model} if isinstance(model, PeftModel) else {"model_init": model}
    )
    return Trainer(args=arguments(folder, **changes), train_dataset=examples(), **handed)


def fresh() -> PeftModel:
    """As model_init: a new model each time, which nobody else has."""
    return make_model(dropout=0.0)


def reads_back(model: PeftModel, folder: Path, base: Any) -> None:
    """What was trained is what PEFT reads."""
    model.save_pretrained(folder / "adapter")
    read = PeftModel.from_pretrained(base, folder / "adapter").state_dict()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(torch.equal(read[name], p) for name, p in trained.items())
    assert any(p.count_nonzero() for name, p in trained.items() if "lora_B" in name)


# ---- Trainer ----


def test_for_trainer_trains_as_the_optimizer_of_the_model_does(tmp_path: Path) -> None:
    model, twin = make_model(dropout=0.0), make_model(dropout=0.0)
    losses = run(make_trainer(tmp_path, model, oplora.for_trainer()))
    optimizer = oplora.AdamW(twin)
    expected = Trainer(twin, arguments(tmp_path), train_dataset=examples(), optimizers=(optimizer, None))
    assert run(expected) == losses
    assert losses[-1] < losses[0] - 0.04
    reads_back(model, tmp_path, make_model().unload())


def test_model_that_the_trainer_makes_is_trained(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fresh, oplora.for_trainer())
    losses = run(trainer)
    assert losses[-1] < losses[0] - 0.04
    again = run(trainer)  # makes another model
    assert again[:STEPS] == losses[:STEPS]


def test_model_that_nobody_trains_is_warned_about(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fresh, (oplora.AdamW, {"model": make_model()}))
    with pytest.warns(UserWarning, match=r"no gradient in any.*for_trainer") as told:
        trainer.train()
    assert sum("no gradient in any" in str(warning.message) for warning in told) == 1


def of_groups(trainer: Trainer) -> dict[str, Any]:
    group = trainer.create_optimizer().param_groups[0]
    return {name: group[name] for name in ("lr", "weight_decay", "betas", "eps")}


@pytest.mark.parametrize("kind", ["auto", "flat"])
def test_arguments_that_were_set_reach_the_optimizer_unless_given(tmp_path: Path, kind: str) -> None:
    def numbers(given: dict[str, Any], **changes: Any) -> dict[str, Any]:
        trainer = make_trainer(tmp_path, make_model(), None, **changes)
        trainer.optimizer_cls_and_kwargs = oplora.for_trainer(trainer.args, preset=kind, **given)
        return of_groups(trainer)

    own = oplora.AdamW(make_model(), preset=kind).defaults
    assert numbers({}) == {**{name: own[name] for name in ("weight_decay", "betas", "eps")}, "lr": 5e-5}
    changed = {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_epsilon": 1e-6}
    expected = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, own["betas"][1]), "eps": 1e-6}
    assert numbers({}, **changed) == expected
    assert numbers({"lr": 1.0, "betas": (0.7, 0.9)}, **changed) == {**expected, "lr": 1.0, "betas": (0.7, 0.9)}


def test_model_in_the_place_of_the_arguments_is_refused() -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"expected TrainingArguments, got \w+\. The model is not needed"):
        oplora.for_trainer(torch.nn.Linear(2, 2))


# ---- TRL ----


@pytest.fixture
def trl() -> Any:
    return pytest.importorskip("trl")


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return made


def dataset(columns: dict[str, list[Any]]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def text(ids: Tensor) -> str:
    return " ".join(map(str, ids.tolist()))


def preferences(prompts: bool) -> Any:
    """Counting on is liked, counting down is not."""
    half = SEQUENCE // 2
    told = {"prompt": [text(ids[:half]) for ids in sequences()]} if prompts else {}
    chosen, rejected = ([text(ids[half:]) for ids in some] for some in (sequences(), sequences().flip(1)))
    return dataset({**told, "chosen": chosen, "rejected": rejected})


def test_sft_trainer_with_an_adapter_of_its_own_trains(trl: Any, tmp_path: Path) -> None:
    config = arguments(tmp_path, trl.SFTConfig, bf16=False)
    trainer = trl.SFTTrainer(
        make_model().unload(),
        config,
        train_dataset=dataset({"input_ids": sequences().tolist()}),
        processing_class=tokenizer(),
        peft_config=LORA,
        optimizer_cls_and_kwargs=oplora.for_trainer(config),
    )
    losses = run(trainer)
    assert losses[-1] < losses[0] - 0.04
    reads_back(trainer.model, tmp_path, make_model().unload())


def test_dpo_trainer_trains(trl: Any, tmp_path: Path) -> None:
    trainer = trl.DPOTrainer(
        make_model().unload(),
        args=arguments(tmp_path, trl.DPOConfig, bf16=False),
        train_dataset=preferences(prompts=True),
        processing_class=tokenizer(),
        peft_config=LORA,
    )
    trainer.optimizer_cls_and_kwargs = oplora.for_trainer(trainer.args)
    losses = run(trainer)
    assert losses[-1] < losses[0] - 0.01
    reads_back(trainer.model, tmp_path, make_model().unload())


def test_reward_trainer_trains(trl: Any, tmp_path: Path) -> None:
    config = make_model().unload().config
    config.pad_token_id, config.num_labels = 0, 1

    def base() -> LlamaForSequenceClassification:
        torch.manual_seed(1)
        return LlamaForSequenceClassification(config)

    lora = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(base(), lora)
    settings_ = arguments(tmp_path, trl.RewardConfig, bf16=False)
    trainer = trl.RewardTrainer(
        model,
        args=settings_,
        train_dataset=preferences(prompts=False),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=oplora.for_trainer(settings_),
    )
    losses = run(trainer)
    assert losses[-1] < losses[0] - 0.01
    reads_back(model, tmp_path, base())


def test_grpo_trainer_trains(trl: Any, tmp_path: Path) -> None:
    """Rewarded are low numbers: after some steps there are more of them. Preset "auto" finds no rate in 20 steps: the
    gradients of so few completions agree on nothing."""

    def low(completions: list[str], **_: Any) -> list[float]:
        return [sum(int(word) < VOCABULARY // 2 for word in completion.split()) / 16 for completion in completions]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own
        trainer = trl.GRPOTrainer(
            make_model(dropout=0.0).unload(),
            reward_funcs=low,
            args=arguments(tmp_path, trl.GRPOConfig, bf16=False, learning_rate=1e-2, max_completion_length=16),
            train_dataset=dataset({"prompt": [text(ids[:4]) for ids in sequences()]}),
            processing_class=tokenizer(),
            peft_config=LORA,
        )
        trainer.optimizer_cls_and_kwargs = oplora.for_trainer(trainer.args, preset="flat")
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == STEPS and sum(rewards[-5:]) > sum(rewards[:5])
    reads_back(trainer.model, tmp_path, make_model().unload())
