"""oplora.AdamW(state="exact") walks the path of torch.optim.AdamW over generators that autograd runs through."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from conftest import EagerGenerator, batches, factors, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_good_as_torch
from torch import Tensor, nn

import oplora
import oplora.definition
from oplora.engines.settings import views as views_of

STEPS = 100


def eager_generators(model: nn.Module, **options: object) -> list[tuple[oplora.definition.Generator, EagerGenerator]]:
    generators = oplora.Generators(model, **options)
    return [(g, EagerGenerator(dict(g.named_parameters()), g.factors.shapes)) for g in generators]


class EagerTraining:
    """The same model whose factors are outputs of the generators in every forward: the author's way."""

    def __init__(
        self, dtype: torch.dtype, lr: float, weight_decay: float, ratio: float, init: str = "paper", **options: object
    ) -> None:
        self.model = make_model(dtype)
        self.start = factors(self.model)
        self.pairs = eager_generators(self.model, init=init, **options)
        weights, biases = [e.W2 for _, e in self.pairs], [e.c2 for _, e in self.pairs]
        hidden = [p for _, e in self.pairs for p in (e.z, e.W1, e.c1)]
        outer = weights + biases
        narrower = 32 / weights[0].shape[1]  # W2's rate for the width, at which it decays as c2 does
        groups = [
            {"params": weights, "lr": lr * narrower, "weight_decay": weight_decay / narrower},
            {"params": biases},
            {"params": hidden, "lr": lr * ratio},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
        self.parameters = outer + hidden
        with torch.no_grad():
            starts = [eager() for _, eager in self.pairs]
        self.bases = [
            [
                p.detach().clone() - s if init == "keep" else None
                for p, s in zip(g.factors.layer.parameters(), start, strict=True)
            ]
            for (g, _), start in zip(self.pairs, starts, strict=True)
        ]

    def step(self, x: Tensor, y: Tensor, max_norm: float | None) -> None:
        self.optimizer.zero_grad()
        replaced = {}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for (generator, eager), bases in zip(self.pairs, self.bases, strict=True):
            for parameter, value, base in zip(generator.factors.layer.parameters(), eager(), bases, strict=True):
                replaced[names[id(parameter)]] = value if base is None else base + value
        loss = (torch.func.functional_call(self.model, replaced, (x,)) - y).square().mean()
        loss.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, max_norm)
        self.optimizer.step()

    def factors(self) -> Tensor:
        pieces: list[Tensor] = []
        with torch.no_grad():
            for (_, eager), bases in zip(self.pairs, self.bases, strict=True):
                pieces += [v if base is None else base + v for v, base in zip(eager(), bases, strict=True)]
        return torch.cat([piece.flatten() for piece in pieces])


@cache
def run_eager(dtype: torch.dtype, max_norm: float | None, steps: int = STEPS, **options: object) -> Tensor:
    training = EagerTraining(dtype, **options)
    for x, y in batches(steps, dtype):
        training.step(x, y, max_norm)
    return training.factors()


def run_ours(dtype: torch.dtype, max_norm: float | None, ratio: float, steps: int = STEPS, **options: object) -> Tensor:
    model = make_model(dtype)
    optimizer = oplora.AdamW(model, state="exact", hidden_lr_ratio=ratio, **options)
    for x, y in batches(steps, dtype):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        if max_norm is not None:
            optimizer.clip_grad_norm_(max_norm)
        optimizer.step()
    return torch.cat([p.flatten() for p in optimizer.param_groups[0]["params"]]).detach()


CASES = [
    dict(lr=lr, weight_decay=weight_decay, max_norm=max_norm, ratio=ratio)
    for lr in (1e-3, 1e-2)
    for weight_decay in (0.0, 0.1)
    for max_norm in (None, 0.05)
    for ratio in (1.0,)
] + [
    dict(lr=1e-2, weight_decay=0.1, max_norm=None, ratio=0.1),
    dict(lr=1e-2, weight_decay=0.1, max_norm=0.05, ratio=0.0),
]


@pytest.mark.parametrize("init", ["paper", "keep"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_equals_eager_in_float64(case: dict[str, float], init: str) -> None:
    truth = run_eager(torch.float64, init=init, **case)
    ours = run_ours(torch.float64, init=init, **case)
    assert (ours - truth).norm() <= 1e-12 * truth.norm()


CLIPPED = [case for case in CASES if case["max_norm"] is not None or case["ratio"] != 1.0]


@pytest.mark.parametrize("case", CLIPPED, ids=str)  # float64 has them all; these take seconds each
def test_exact_float32_is_as_good_as_eager_float32(case: dict[str, float]) -> None:
    # the rounding error of one run is chance: its scale shows over several starts
    runs = [
        (
            run_ours(torch.float32, seed=s, **case),
            run_eager(torch.float32, seed=s, **case),
            run_eager(torch.float64, seed=s, **case),
        )
        for s in range(6)
    ]
    assert_as_good_as_torch(*(torch.cat(pieces) for pieces in zip(*runs, strict=True)))


@settings(max_examples=25, deadline=None)
@given(
    hidden_width=st.sampled_from([1, 2, 7, 30, 32, 70]),
    latent_width=st.sampled_from([1, 3, 128]),
    seed=st.integers(0, 2**64 - 1),
    weight_decay=st.sampled_from([0.0, 0.01, 1.0]),
    lr=st.sampled_from([0.0, 1e-4, 3e-2]),
    init=st.sampled_from(["paper", "keep"]),
)
def test_exact_equals_eager_for_any_width_and_seed(
    hidden_width: int, latent_width: int, seed: int, weight_decay: float, lr: float, init: str
) -> None:
    case = dict(
        hidden_width=hidden_width, latent_width=latent_width, seed=seed, weight_decay=weight_decay, lr=lr, init=init
    )
    truth = run_eager(torch.float64, None, steps=12, ratio=1.0, **case)
    ours = run_ours(torch.float64, None, steps=12, ratio=1.0, **case)
    assert (ours - truth).norm() <= 1e-12 * max(1.0, float(truth.norm()))


@pytest.mark.parametrize("start", ["uniform", "sign"])
def test_exact_equals_eager_from_either_start(start: str) -> None:
    model = make_model(torch.float64)
    optimizer = oplora.AdamW(model, lr=1e-2, state="exact", start=start)
    pairs = []
    for state in optimizer._stepper.states:
        eager = EagerGenerator(views_of(state.pieces()["parameters"], 32, 128), state.factors.shapes)
        pairs.append((eager, state.factors.layer))
    reference = torch.optim.AdamW([p for eager, _ in pairs for p in eager.parameters()], lr=1e-2)
    for x, y in batches(20, torch.float64):
        optimizer.zero_grad(), reference.zero_grad()
        (model(x) - y).square().mean().backward()
        for eager, layer in pairs:
            torch.autograd.backward(eager(), [p.grad for p in layer.parameters()])
        optimizer.step(), reference.step()
    for eager, layer in pairs:
        for ours, truth in zip(layer.parameters(), eager(), strict=True):
            assert (ours - truth).norm() <= 1e-12 * truth.norm()


def waking_gradients() -> Iterator[tuple[float, float]]:
    """(sign of the push on c1, scale of g): turns units off and on again."""
    yield from ((1.0, 1.0), (-1.0, 1.0), (-1.0, 0.0), (1.0, 3.0), (1.0, 1e-3), (-1.0, 1.0)) * 6


def test_units_that_die_and_come_back_follow_eager_adamw() -> None:
    model = make_model(torch.float64)
    optimizer = oplora.AdamW(model, state="exact", lr=2e-2, weight_decay=0.3, hidden_width=16, latent_width=4)
    state = optimizer._stepper.states[0]
    pieces = state.pieces()
    views, moving, decay = views_of(pieces["parameters"], 16, 4), pieces["moving"], pieces["decay"].view(-1, 16)
    eager = EagerGenerator(views, state.factors.shapes)
    others = [eager.z, eager.W1, eager.c1, eager.c2]
    weights = {"params": [eager.W2], "lr": 4e-2, "weight_decay": 0.15}  # twice the rate at half the width
    reference = torch.optim.AdamW([weights, {"params": others}], lr=2e-2, weight_decay=0.3)
    rng = torch.Generator().manual_seed(3)
    live = set()
    for sign, scale in waking_gradients():
        for p in state.factors.layer.parameters():
            p.grad = torch.randn(p.shape, generator=rng, dtype=torch.float64) * scale
        shift = torch.randn(16, generator=rng, dtype=torch.float64) * 0.1 * sign
        with torch.no_grad():  # from outside, so that units cross zero often
            views["c1"].add_(shift)
            eager.c1.add_(shift)
        # a column that was still owes its decay before it may be read
        fired = torch.relu(views["W1"] @ views["z"] + views["c1"]) > 0
        owed = torch.where(fired & (moving == 0), decay[0], torch.ones_like(decay[0]))
        views["W2"].mul_(owed)
        decay[:, fired] = 1.0
        live.add(int(fired.sum()))
        reference.zero_grad()
        v = torch.cat([piece.flatten() for piece in eager()])
        v.backward(torch.cat([p.grad.flatten() for p in state.factors.layer.parameters()]))
        reference.step()
        optimizer.step()
        ours = torch.cat([p.detach().flatten() for p in state.factors.layer.parameters()])
        truth = torch.cat([piece.detach().flatten() for piece in eager()])
        assert (ours - truth).norm() <= 1e-12 * truth.norm()
    assert len(live) > 3


def test_true_columns_are_decay_times_stored_ones() -> None:
    model = make_model(torch.float64)
    optimizer = oplora.AdamW(model, state="exact", lr=1e-2, weight_decay=0.5, hidden_lr_ratio=0.0)
    start = views_of(optimizer._stepper.states[0].pieces()["parameters"], 32, 128)["W2"].clone()
    for x, y in batches(10, torch.float64):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    pieces = optimizer._stepper.states[0].pieces()
    still = pieces["moving"] == 0
    assert 0 < int(still.sum()) < 32
    assert torch.equal(views_of(pieces["parameters"], 32, 128)["W2"][:, still], start[:, still])
    decay = pieces["decay"].view(-1, 32)
    assert torch.allclose(decay[:, still], torch.tensor((1 - 1e-2 * 0.5) ** 10, dtype=torch.float64), rtol=1e-14)
    assert not views_of(pieces["exp_avg_sq"], 32, 128)["W2"][:, still].any()


def tiny_llama(dtype: torch.dtype) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config).to(dtype), lora, autocast_adapter_dtype=False)


def run_llama(dtype: torch.dtype, ours: bool) -> Tensor:
    model = tiny_llama(dtype)
    tokens = torch.randint(0, 97, (STEPS, 2, 16), generator=torch.Generator().manual_seed(5))
    options = dict(lr=1e-3, weight_decay=0.01)  # at which no unit comes so near to zero that rounding decides
    pairs = []
    if ours:
        optimizer: torch.optim.Optimizer = oplora.AdamW(model, state="exact", **options)
    else:
        pairs = eager_generators(model)
        optimizer = torch.optim.AdamW([p for _, e in pairs for p in e.parameters()], **options)
    for ids in tokens:
        model.zero_grad()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for generator, eager in pairs:  # g flows through the autograd of the eager generator
            g = [p.grad for p in generator.factors.layer.parameters()]
            torch.autograd.backward(eager(), g)
        optimizer.step()
        with torch.no_grad():
            for generator, eager in pairs:
                for p, value in zip(generator.factors.layer.parameters(), eager(), strict=True):
                    p.copy_(value)
    return torch.cat([f.flatten() for f in factors(model).values()])


def test_exact_equals_eager_on_a_transformer_in_float64() -> None:
    truth = run_llama(torch.float64, ours=False)
    assert (run_llama(torch.float64, ours=True) - truth).norm() <= 1e-12 * truth.norm()


def test_exact_float32_is_as_good_as_eager_on_a_transformer() -> None:
    truth = run_llama(torch.float64, ours=False)
    assert_as_good_as_torch(run_llama(torch.float32, ours=True), run_llama(torch.float32, ours=False), truth)
