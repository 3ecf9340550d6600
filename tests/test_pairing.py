"""What is generated is found however parameters are handed over: the same bits; a sentence for what cannot be told."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import Net, assert_same_bits, make_model
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

import oplora

STATES = ("lean", "exact")
STARTS = ("paper", "keep")
both_states = pytest.mark.parametrize("state", STATES)
both_starts = pytest.mark.parametrize("init", STARTS)
LR = 1e-2


@pytest.fixture(autouse=True)
def _no_warning_of_ours(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    yield
    assert not [w for w in recwarn if issubclass(w.category, UserWarning) and "oplora" in str(w.message)]


def step(optimizer: torch.optim.Optimizer, tensors: Sequence[nn.Parameter], steps: int = 3) -> None:
    """Always the same gradients, in the order of the tensors."""
    random = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for p in tensors:
            p.grad = torch.randn(p.shape, generator=random, dtype=p.dtype)
        optimizer.step()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trained(model).items()}


def tensors_of(model: nn.Module) -> list[nn.Parameter]:
    return list(trained(model).values())


def pairs_of(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """All A and all B."""
    downs, ups = ([p for n, p in trained(model).items() if name in n] for name in ("lora_A", "lora_B"))
    return downs, ups


def optimize(params: Any, state: str, init: str, **options: Any) -> oplora.AdamW:
    return oplora.AdamW(params, lr=LR, weight_decay=0.1, state=state, init=init, **options)


# ---- the same bits ----


def as_kohya_has_it(model: nn.Module) -> list[dict[str, Any]]:
    """A group a part of the model, whose params are dict.values()."""
    return [
        {"params": trained(part).values(), "lr": LR}
        for part in (model.base_model.model.first, model.base_model.model.second)
    ]


def with_original_names(model: nn.Module) -> list[nn.Parameter]:
    for name, p in trained(model).items():
        p.original_name = name
    return tensors_of(model)[::-1]


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "parameters": lambda model: model.parameters(),
    "named_parameters": lambda model: model.named_parameters(),
    "trainable ones": tensors_of,
    "one group": lambda model: [{"params": tensors_of(model)}],
    "kohya": as_kohya_has_it,
    "downs, then ups": lambda model: [p for some in pairs_of(model) for p in some],
    "LoRA+": lambda model: [{"params": some, "lr": LR} for some in pairs_of(model)],
    "named groups": lambda model: [
        {"params": [(n, p) for n, p in trained(model).items() if name in n]} for name in ("lora_A", "lora_B")
    ],
    "frozen ones too, named": lambda model: [{"params": list(model.named_parameters())}],
    "compiled": lambda model: torch.compile(model, backend="eager").named_parameters(),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@both_states
@both_starts
@every_way
def test_parameters_give_the_bits_that_the_model_gives(way: Callable[[nn.Module], Any], init: str, state: str) -> None:
    model, twin = make_model(), make_model()
    step(optimize(model, state, init), tensors_of(model))
    step(optimize(way(twin), state, init), tensors_of(twin))
    assert_same_bits(bits(twin), bits(model))


@both_states
@both_starts
def test_original_names_give_the_bits_that_the_model_gives_in_any_order(init: str, state: str) -> None:
    """The order of the layers decides their seeds, so with one layer."""
    model, twin = make_model(target_modules=["first"]), make_model(target_modules=["first"])
    step(optimize(model, state, init), tensors_of(model))
    step(optimize(with_original_names(twin), state, init), tensors_of(twin))
    assert_same_bits(bits(twin), bits(model))


@both_states
@pytest.mark.parametrize("way", ["parameters", "named_parameters", "kohya"])
def test_biases_among_the_parameters_do_not_change_the_bits(way: str, state: str) -> None:
    model, twin = make_model(bias="all"), make_model(bias="all")
    step(optimize(model, state, "paper"), tensors_of(model))
    step(optimize(WAYS[way](twin), state, "paper"), tensors_of(twin))
    assert_same_bits(bits(twin), bits(model))


@both_states
@both_starts
def test_pefts_loraplus_at_equal_rates_gives_the_bits_of_the_model(init: str, state: str) -> None:
    model, twin = make_model(), make_model()
    step(oplora.AdamW(model, lr=LR, weight_decay=0.0, state=state, init=init), tensors_of(model))
    plus = create_loraplus_optimizer(
        twin,
        oplora.AdamW,
        lr=LR,
        loraplus_lr_ratio=1,
        loraplus_weight_decay=0.0,
        weight_decay=0.0,
        state=state,
        init=init,
    )
    step(plus, tensors_of(twin))
    assert_same_bits(bits(twin), bits(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@both_states
def test_parameters_of_other_dtypes_give_the_bits_that_the_model_gives(state: str, dtype: torch.dtype) -> None:
    model, twin = make_model(dtype), make_model(dtype)
    step(optimize(model, state, "paper"), tensors_of(model))
    step(optimize(twin.parameters(), state, "paper"), tensors_of(twin))
    assert_same_bits(bits(twin), bits(model))


# ---- modules of others ----


class Adapted(nn.Module):
    """A frozen layer with its down and up projections as children of any name, without a mark of PEFT's."""

    def __init__(self, base: nn.Module, down: tuple[str, nn.Module], up: tuple[str, nn.Module]) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        for name, child in (down, up):
            setattr(self, name, child)


class Others(nn.Module):
    def __init__(self, model: nn.Module, down: str, up: str) -> None:
        """Layers with the sizes and factors of the PEFT model."""
        super().__init__()
        for name in ("first", "second"):
            theirs = getattr(model.base_model.model, name)
            children = []
            for mine, its in ((down, theirs.lora_A["default"]), (up, theirs.lora_B["default"])):
                child = _like(its)
                children.append((mine, child))
            setattr(self, name, Adapted(_like(theirs.get_base_layer()), *children))


def _like(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Conv2d):
        like: nn.Module = nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size, bias=False)
    else:
        like = nn.Linear(module.in_features, module.out_features, bias=False)
    like.weight.data.copy_(module.weight.data)
    return like


class ConvNet(nn.Module):
    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(7, 9, kernel), nn.Conv2d(9, 5, 1)


def make_convolutions(kernel: int) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(ConvNet(kernel), LoraConfig(r=3, target_modules=["first", "second"]))


NAMES = {"torchtune": ("lora_a", "lora_b"), "kohya": ("lora_down", "lora_up")}
BASES = {"linear": make_model, "3x3": lambda: make_convolutions(3), "1x1": lambda: make_convolutions(1)}


@both_states
@both_starts
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize(
    "hand_over",
    [lambda m: m, lambda m: m.named_parameters(), lambda m: m.parameters()],
    ids=["module", "named", "nameless"],
)
def test_modules_of_others_give_pefts_bits(
    hand_over: Callable[[nn.Module], Any], base: Callable[[], nn.Module], names: tuple[str, str], init: str, state: str
) -> None:
    model = base()
    theirs = Others(model, *names)
    step(optimize(model, state, init), tensors_of(model))
    step(optimize(hand_over(theirs), state, init), tensors_of(theirs))
    for ours, its in zip(tensors_of(model), tensors_of(theirs), strict=True):
        assert torch.equal(ours, its)


def test_lora_without_its_wrapper_is_found_in_diffusers_old_names() -> None:
    names = ["to_q.lora.down.weight", "to_q.lora.up.weight", "block.down.weight"]
    shapes = [(3, 13), (11, 3), (5, 13)]
    named = [(n, nn.Parameter(torch.zeros(s))) for n, s in zip(names, shapes, strict=True)]
    assert "layers: 1," in repr(oplora.AdamW(named)) and "other parameters: 1" in repr(oplora.AdamW(named))


def test_adapter_name_chooses_among_named_parameters() -> None:
    model = make_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    text = repr(oplora.AdamW(model.named_parameters(), adapter_name="other"))
    assert "layers: 1," in text and "other parameters: 4" in text


def test_adalora_is_not_generated_by_its_names() -> None:
    """PEFT prunes between the steps what it trains."""
    torch.manual_seed(0)
    model = get_peft_model(Net(), AdaLoraConfig(init_r=3, total_step=10, target_modules=["first"]))
    with pytest.raises(oplora.OPLoRAError, match="there is no adapter"):
        oplora.AdamW(model.named_parameters())
    beside = zip(["x.lora_A", "x.lora_B"], weights(*PAIR), strict=True)
    assert "layers: 1," in repr(oplora.AdamW([*model.named_parameters(), *beside], init="keep"))


# ---- what is no pair ----


def plain_twin(model: nn.Module, chosen: Callable[[str], bool], steps: int = 3) -> dict[str, Tensor]:
    """What torch.optim.AdamW makes of some of the parameters, from the gradients that step() gives to all."""
    tensors = trained(model)
    optimizer = torch.optim.AdamW([p for n, p in tensors.items() if chosen(n)], lr=LR, weight_decay=0.1)
    step(optimizer, list(tensors.values()), steps)
    return {n: p.detach().clone() for n, p in tensors.items() if chosen(n)}


PLAIN = {
    "biases": dict(bias="all"),
    "modules_to_save": dict(target_modules=["first"], modules_to_save=["second"]),
}


@both_states
@pytest.mark.parametrize("config", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize(
    "way", [lambda m: m, lambda m: m.parameters(), lambda m: m.named_parameters()], ids=["model", "nameless", "named"]
)
def test_what_is_no_pair_gets_the_bits_of_torchs_adamw(
    way: Callable[[nn.Module], Any], config: dict[str, Any], state: str
) -> None:
    model, twin = make_model(**config), make_model(**config)
    step(optimize(way(model), state, "paper"), tensors_of(model))
    expected = plain_twin(twin, lambda name: "lora_" not in name)
    assert expected
    assert_same_bits({name: tensor for name, tensor in bits(model).items() if name in expected}, expected)


@both_states
def test_full_matrix_beside_nameless_pairs_gets_the_bits_of_torchs_adamw(state: str) -> None:
    model, matrices = make_model(), [nn.Parameter(torch.ones(11, 17)) for _ in range(2)]
    optimizer = optimize([*tensors_of(model), matrices[0]], state, "paper")
    plain = torch.optim.AdamW([matrices[1]], lr=LR, weight_decay=0.1)
    for _ in range(3):
        matrices[0].grad = torch.randn(11, 17)
        matrices[1].grad = matrices[0].grad.clone()
        plain.step(), optimizer.step()
    assert torch.equal(*matrices)


@both_states
def test_frozen_parameters_among_the_handed_over_ones_stay(state: str) -> None:
    model = make_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    step(optimize(model.parameters(), state, "paper"), tensors_of(model))
    assert_same_bits({n: p.detach() for n, p in model.named_parameters() if n in before}, before)


# ---- refusals ----


def weights(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape)) for shape in shapes]


PAIR = ((3, 13), (11, 3))
AMBIGUOUS = {
    "odd one out": [*PAIR, (3, 17)],
    "ups before downs": [(13, 3), (3, 11), (21, 3), (3, 5)],
    "square among them": [(3, 13), (3, 3), (11, 3)],
    "nothing in turn": [(3, 13), (3, 17), (11, 3), (3, 7), (5, 3), (9, 3)],
}


@pytest.mark.parametrize("shapes", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_ambiguous_shapes_are_refused_with_the_list_and_the_remedy(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(oplora.OPLoRAError) as raised:
        oplora.AdamW(weights(*shapes))
    message = str(raised.value)
    assert all(str(shape) in message for shape in shapes)
    assert "named_parameters()" in message and "original_name" in message


def test_names_settle_what_shapes_do_not() -> None:
    some = weights((3, 13), (3, 17), (11, 3), (3, 7), (5, 3), (9, 3))
    names = ["a.lora_A", "b.lora_A", "a.lora_B", "c.lora_A", "b.lora_B", "c.lora_B"]
    assert "layers: 3," in repr(oplora.AdamW(zip(names, some, strict=True), init="keep"))


NOTHING = {
    "a bias": [(3,)],
    "a full matrix": [(13, 13)],
    "square ones": [(5, 5), (5, 5)],
}


@pytest.mark.parametrize("shapes", NOTHING.values(), ids=NOTHING)
def test_parameters_without_an_adapter_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"no adapter among the .* parameters: .*torch.optim.AdamW"):
        oplora.AdamW(weights(*shapes))


def test_frozen_adapter_is_refused() -> None:
    with pytest.raises(oplora.OPLoRAError, match="none that is trainable"):
        oplora.AdamW(make_model().requires_grad_(False).parameters())


@pytest.mark.parametrize("model", [Net(), Net().requires_grad_(False)])
def test_module_without_an_adapter_is_refused(model: nn.Module) -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"no LoRA layer.*get_peft_model"):
        oplora.AdamW(model)


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "a set": (lambda: set(weights(*PAIR)), "a set, which has no order"),
    "a set in a group": (lambda: [{"params": set(weights(*PAIR))}], "a set, which has no order"),
    "an empty list": (list, "the list of parameters is empty"),
    "a group without params": (lambda: [{"lr": 1.0}], "group 0 is no dict with 'params'"),
    "a model in a group": (lambda: [{"params": make_model()}], "a PeftModel, expected tensors.*oplora.AdamW.model"),
    "None in a group": (lambda: [{"params": None}], "group 0 are a NoneType, expected tensors"),
    "a tensor after groups": (lambda: [{"params": weights(*PAIR)}, *weights((3,))], "group 1 is no dict"),
    "a float": (lambda: [*weights(*PAIR), 1.0], "hold a float, expected tensors"),
    "a float with a name": (lambda: [("lora_A", 1.0)], "hold a float, expected tensors"),
    "one tensor": (lambda: weights((3, 13))[0], "params is a Parameter, expected a module"),
    "a number": (lambda: 3, "params is a int, expected a module"),
    "None": (lambda: None, "params is a NoneType, expected a module"),
    "a dict": (lambda: {"params": weights(*PAIR)}, "params is a dict, expected a module"),
    "a model's state": (lambda: make_model().state_dict(), "params is a OrderedDict, expected a module"),
    "a tensor twice": (lambda: weights(*PAIR) * 2, "parameter 2, of shape .3, 13., is parameter 0 once more"),
    "a tensor in two groups": (
        lambda: [{"params": (pair := weights(*PAIR))}, {"params": pair[:1]}],
        "parameter 2, of shape .3, 13., is parameter 0 once more",
    ),
    "a result": (lambda: [p * 2 for p in weights(*PAIR)], "parameter 0, of shape .3, 13., was computed from others"),
    "a name twice": (lambda: zip(["x.lora_A"] * 2, weights(*PAIR), strict=True), "two tensors are lora_A of layer 'x'"),
    "some with names": (lambda: [("x.lora_A", weights((3, 13))[0]), *weights((11, 3))], "some have none. Give all"),
}


@pytest.mark.parametrize(("make", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_refused_with_a_sentence(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(oplora.OPLoRAError, match=message):
        oplora.AdamW(make())


def test_refusal_writes_nothing() -> None:
    some = weights(*PAIR)
    with pytest.raises(oplora.OPLoRAError):
        oplora.AdamW([*some, *weights((3, 17))])
    assert all(bool((p == 1).all()) for p in some)


# ---- what it says ----


@both_states
@pytest.mark.parametrize("preset", ["paper", "flat"])
def test_repr_tells_what_was_found(state: str, preset: str) -> None:
    text = repr(oplora.AdamW(make_model(bias="all"), state=state, hidden_width=7, preset=preset))
    assert f"preset {preset}, state {state}, hidden_width 7; layers: 2," in text
    assert "adapter tensors: 4, numbers in them: 180, other parameters: 2" in text


def test_print_of_auto_has_no_number_that_is_not_the_users() -> None:
    told = repr(oplora.AdamW(make_model(), preset="auto"))
    assert "preset auto, which finds the learning rate; layers: 2, adapter tensors: 4" in told
    assert "lr: 1.0" in told and "peak_lr" not in told


def test_log_line_tells_what_was_found(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="oplora"):
        oplora.AdamW(make_model().parameters(), hidden_width=7, preset="flat")
    (record,) = caplog.records
    assert record.name == "oplora" and record.levelno == logging.INFO
    assert "preset flat, state lean, hidden_width 7; layers: 2, adapter tensors: 4," in record.getMessage()


@pytest.mark.parametrize(("init", "says"), [("paper", True), ("keep", False)])
def test_log_line_and_repr_tell_that_a_was_overwritten(caplog: pytest.LogCaptureFixture, init: str, says: bool) -> None:
    with caplog.at_level(logging.INFO, logger="oplora"):
        text = repr(oplora.AdamW(make_model(), init=init))
    for line in (text, caplog.records[0].getMessage()):
        assert ("A was replaced by the generators' start (init='paper')" in line) == says
