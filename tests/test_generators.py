"""oplora.Generators and create_oplora_optimizer: the general path, under any torch optimizer."""

import copy
import io

import pytest
import torch
from conftest import EagerGenerator, assert_same_bits, batches, factors, make_model, train
from torch import nn

import oplora

OPTIMIZERS = [
    (torch.optim.SGD, dict(lr=1e-2, momentum=0.9)),
    (torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.1)),
    (torch.optim.Adagrad, dict(lr=1e-2)),
    (torch.optim.RMSprop, dict(lr=1e-4)),
]


def test_parameters_have_the_papers_names_and_shapes() -> None:
    generators = oplora.Generators(make_model(), hidden_width=6, latent_width=9)
    shapes = {name: tuple(p.shape) for name, p in generators.named_parameters()}
    N = 3 * (13 + 21)
    prefix = "base_model.model.first.default"
    assert shapes[f"{prefix}.z"] == (9,)
    assert shapes[f"{prefix}.W1"] == (6, 9)
    assert shapes[f"{prefix}.c1"] == (6,)
    assert shapes[f"{prefix}.W2"] == (N, 6)
    assert shapes[f"{prefix}.c2"] == (N,)
    assert len(shapes) == 10


def test_factors_are_what_the_generators_predict() -> None:
    model = make_model()
    generators = oplora.Generators(model)
    for generator in generators:
        eager = EagerGenerator(dict(generator.named_parameters()), generator.factors.shapes)
        for parameter, value in zip(generator.factors.layer.parameters(), eager(), strict=True):
            torch.testing.assert_close(parameter, value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("init", ["paper", "keep"])
@pytest.mark.parametrize(("optimizer_cls", "options"), OPTIMIZERS, ids=lambda o: getattr(o, "__name__", ""))
def test_any_torch_optimizer_walks_the_eager_path(optimizer_cls: type, options: dict[str, float], init: str) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    ours = oplora.create_oplora_optimizer(model, optimizer_cls, init=init, **options)
    generators = list(oplora.Generators(twin, init=init))
    eager = [EagerGenerator(dict(g.named_parameters()), g.factors.shapes) for g in generators]
    with torch.no_grad():
        offsets = [
            [p - v for p, v in zip(g.factors.layer.parameters(), e(), strict=True)]
            for g, e in zip(generators, eager, strict=True)
        ]
    theirs = optimizer_cls([p for e in eager for p in e.parameters()], **options)
    for x, y in batches(20, torch.float64):
        ours.zero_grad()
        (model(x) - y).square().mean().backward()
        ours.step()
        theirs.zero_grad(), twin.zero_grad()
        (twin(x) - y).square().mean().backward()
        for g, e in zip(generators, eager, strict=True):
            torch.autograd.backward(e(), [p.grad for p in g.factors.layer.parameters()])
        theirs.step()
        with torch.no_grad():
            for g, e, offset in zip(generators, eager, offsets, strict=True):
                for p, v, o in zip(g.factors.layer.parameters(), e(), offset, strict=True):
                    p.copy_(v + o)
    for name, tensor in factors(model).items():
        torch.testing.assert_close(tensor, factors(twin)[name], rtol=1e-11, atol=1e-13)


def test_hidden_lr_ratio_is_a_rate_of_the_hidden_path() -> None:
    model = make_model()
    optimizer = oplora.create_oplora_optimizer(model, torch.optim.SGD, lr=0.5, hidden_lr_ratio=0.0)
    before = {n: p.detach().clone() for n, p in optimizer.generators.named_parameters()}
    train(model, optimizer, 3)
    for name, p in optimizer.generators.named_parameters():
        assert torch.equal(p, before[name]) == name.endswith((".z", ".W1", ".c1"))


def test_other_parameters_are_stepped_too() -> None:
    model = make_model(bias="all")
    optimizer = oplora.create_oplora_optimizer(model, torch.optim.SGD, lr=0.1)
    before = model.base_model.model.first.base_layer.bias.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(model.base_model.model.first.base_layer.bias, before)


def test_gradients_are_used_up_once() -> None:
    model = make_model()
    optimizer = oplora.create_oplora_optimizer(model, torch.optim.SGD, lr=0.0)
    x, y = next(batches(1, torch.float32))
    (model(x) - y).square().mean().backward()
    optimizer.generators.backward()
    once = [p.grad.clone() for p in optimizer.generators.parameters()]
    optimizer.generators.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(optimizer.generators.parameters(), once, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_accumulation_adds_up_in_the_generators() -> None:
    model = make_model(torch.float64)
    generators = oplora.Generators(model)
    data = list(batches(3, torch.float64))
    for x, y in data:
        (model(x) - y).square().mean().backward()
        generators.backward()
    apart = [p.grad.clone() for p in generators.parameters()]
    generators.zero_grad()
    sum((model(x) - y).square().mean() for x, y in data).backward()
    generators.backward()
    for p, g in zip(generators.parameters(), apart, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("init", ["paper", "keep"])
def test_resume_equals_uninterrupted_bit_for_bit(init: str) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model()
        return model, oplora.create_oplora_optimizer(model, torch.optim.AdamW, lr=1e-2, init=init)

    model, optimizer = make()
    train(model, optimizer, 3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    fresh, resumed = make()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_bits(factors(fresh), factors(model))
    assert train(fresh, resumed, 3) == train(model, optimizer, 3)


def test_state_of_another_optimizer_is_refused() -> None:
    model = make_model()
    optimizer = oplora.create_oplora_optimizer(model, torch.optim.AdamW, lr=1e-2)
    state = torch.optim.AdamW(optimizer.param_groups[0]["params"]).state_dict()
    with pytest.raises(oplora.OPLoRAError, match="no generators"):
        optimizer.load_state_dict(state)
    before = copy.deepcopy(optimizer.generators.state_dict())
    for other, message in ((make_model(r=2), "has shape"), (make_model(target_modules=["first"]), "of other layers")):
        state = oplora.create_oplora_optimizer(other, torch.optim.AdamW, lr=1e-2).state_dict()
        with pytest.raises(oplora.OPLoRAError, match=message):
            optimizer.load_state_dict(state)
    for name, tensor in optimizer.generators.named_parameters():
        assert torch.equal(tensor, before[name])


def test_merged_layer_refuses_backward() -> None:
    model = make_model()
    generators = oplora.Generators(model)
    x, y = next(batches(1, torch.float32))
    (model(x) - y).square().mean().backward()
    model.merge_adapter()
    with pytest.raises(oplora.OPLoRAError, match="is merged"):
        generators.backward()


def test_edits_between_steps_are_adopted() -> None:
    model = make_model()
    optimizer = oplora.create_oplora_optimizer(model, torch.optim.SGD, lr=1e-5)
    train(model, optimizer, 1)
    model.load_state_dict({n: torch.full_like(t, 0.5) for n, t in factors(model).items()}, strict=False)
    with pytest.warns(UserWarning, match="were changed since the last step"):
        train(model, optimizer, 1)
    assert all((t - 0.5).abs().max() < 0.1 for t in factors(model).values())


def test_generators_are_no_part_of_the_model() -> None:
    model = make_model()
    before = list(model.state_dict())
    oplora.create_oplora_optimizer(model, torch.optim.SGD, lr=0.1)
    assert list(model.state_dict()) == before
