"""Which expert is an MLP, under which names its projections go, and what its activation is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_moe.layouts.blocks import expert_activation, expert_form, expert_leaf_names
from tests.remote_code import RemoteConfig
from tests.remote_code.kimi import LatentExpert, TanhGate
from tests.remote_code.parts import GatedMLP

from .test_blocks import OLD, Case


class Expert(nn.Module):
    """Three linears and whatever forward the test gives it."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], *names: str, p: float = 0.0):
        super().__init__()
        self.function = function
        for name in names or ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, nn.Linear(8, 8))
        self.act_fn = nn.GELU()
        self.dropout = nn.Dropout(p)
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.function.function(self, x) if isinstance(self.function, Hidden) else self.function(self, x)


class Hidden:
    """Holds a function as data, so that it is not taken for the expert's activation."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]):
        self.function = function


def make(function: Callable[[nn.Module, Tensor], Tensor], *names: str, p: float = 0.0) -> nn.Module:
    return Expert(Hidden(function), *names, p=p)


GATED = {
    "plain": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)),
    "other order": lambda m, x: m.down_proj(m.up_proj(x) * m.act_fn(m.gate_proj(x))),
    "torch.mul": lambda m, x: m.down_proj(torch.mul(m.act_fn(m.gate_proj(x)), m.up_proj(x))),
    "method": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)).mul(m.up_proj(x))),
    "dropout of nothing": lambda m, x: m.dropout(m.down_proj(m.dropout(m.act_fn(m.gate_proj(x)) * m.up_proj(x)))),
}
UNKNOWN = {
    "two activations": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.act_fn(m.up_proj(x))),
    "no activation": lambda m, x: m.down_proj(m.gate_proj(x) * m.up_proj(x)),
    "scaled input": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x * m.scale)) * m.up_proj(x)),
    "scaled result": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)) * m.scale,
    "residual": lambda m, x: x + m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)),
    "in sequence": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(m.gate_proj(x))),
    "clamped": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x).clamp(-1, 1)),
    "one projection twice": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.gate_proj(x)),
    "depends on values": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)) if x.sum() > 0 else x,
    "depends on shapes": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)) if len(x.shape) else x,
    "a tuple": lambda m, x: (m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)), None),
    "nothing": lambda m, x: None,
}


@pytest.mark.parametrize("function", GATED.values(), ids=GATED)
def test_gated(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    expert = make(function)
    assert expert_leaf_names(expert) == ("gate_proj", "up_proj", "down_proj")
    assert expert_activation(expert) is expert.act_fn


@pytest.mark.parametrize("function", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    assert expert_form(make(function)) is None
    assert expert_leaf_names(make(function)) is None
    assert expert_activation(make(function)) is None


def test_dropout_counts() -> None:
    assert expert_form(make(GATED["dropout of nothing"], p=0.1)) is None


def test_names_come_from_the_forward() -> None:
    """`w1`, `w3`, `w2` by what they do, not by what they are called."""
    usual = make(lambda m, x: m.w2(m.act_fn(m.w1(x)) * m.w3(x)), "w1", "w2", "w3")
    swapped = make(lambda m, x: m.w2(m.act_fn(m.w3(x)) * m.w1(x)), "w1", "w2", "w3")
    assert expert_leaf_names(usual) == ("w1", "w3", "w2")
    assert expert_leaf_names(swapped) == ("w3", "w1", "w2")


@pytest.mark.parametrize("names", [("up_proj", "down_proj"), ("fc1", "fc2"), ("wi", "wo")], ids="-".join)
def test_ungated(names: tuple[str, str]) -> None:
    up, down = names
    expert = make(lambda m, x: getattr(m, down)(m.act_fn(getattr(m, up)(x))), *names)
    assert expert_leaf_names(expert) == (None, up, down)
    assert expert_activation(expert) is expert.act_fn


def test_functional_activation() -> None:
    """A function of torch, its options bound; working in place is not one of them."""
    plain = make(lambda m, x: m.down_proj(F.silu(m.gate_proj(x), inplace=True) * m.up_proj(x)))
    bound = make(lambda m, x: m.down_proj(F.gelu(m.gate_proj(x), approximate="tanh") * m.up_proj(x)))
    pre = torch.randn(5)
    assert torch.equal(expert_activation(plain)(pre), F.silu(pre))
    assert isinstance(expert_activation(bound), partial)
    assert torch.equal(expert_activation(bound)(pre), F.gelu(pre, approximate="tanh"))


@pytest.mark.parametrize("kind", ["module", "function", "bound"])
def test_activation_inside_a_compiled_function(kind: str) -> None:
    """Whoever asks during a forward may be compiled: the expert is not recognised again within the graph."""
    functions = {
        "module": GATED["plain"],
        "function": lambda m, x: m.down_proj(torch.tanh(m.gate_proj(x)) * m.up_proj(x)),
        "bound": lambda m, x: m.down_proj(F.gelu(m.gate_proj(x), approximate="tanh") * m.up_proj(x)),
    }
    expert, pre = make(functions[kind]), torch.randn(5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: expert_activation(expert)(x), fullgraph=True, backend="eager")
    want = {"module": expert.act_fn, "function": torch.tanh, "bound": partial(F.gelu, approximate="tanh")}[kind]
    assert torch.equal(compiled(pre), want(pre))
    assert torch.equal(expert_activation(expert)(pre), want(pre))


def test_fused_activation() -> None:
    """An activation of gate and up together is described, and never handed out as one of the gate alone."""
    expert = LatentExpert(RemoteConfig(hidden_act="situ"), 8)
    form = expert_form(expert)
    assert form is not None and form.fused and isinstance(form.activation, TanhGate)
    assert (form.gate, form.up, form.down) == ("w1", "w3", "w2") == expert_leaf_names(expert)
    assert expert_activation(expert) is None
    other_dim = make(lambda m, x: m.down_proj(m.act_fn(torch.cat([m.gate_proj(x), m.up_proj(x)], dim=0))))
    assert expert_form(other_dim) is None


def test_adapted_and_meta_experts() -> None:
    """Projections may be any linear, on any device: nothing is computed."""
    peft = pytest.importorskip("peft")
    expert = GatedMLP(8, 16).to("meta")
    assert expert_leaf_names(expert) == ("gate_proj", "up_proj", "down_proj")
    wrapped = nn.ModuleDict({"expert": GatedMLP(8, 16)})
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["gate_proj", "down_proj"]), wrapped)
    assert type(wrapped["expert"].gate_proj).__name__ == "Linear" and hasattr(wrapped["expert"].gate_proj, "base_layer")
    assert expert_leaf_names(wrapped["expert"]) == ("gate_proj", "up_proj", "down_proj")


def test_not_experts() -> None:
    for module in (nn.Linear(4, 4), nn.Identity(), nn.ModuleList([nn.Linear(4, 4)]), nn.Sequential(nn.Linear(4, 4))):
        assert expert_form(module) is None


@pytest.mark.parametrize(
    ("family", "expert", "config", "names"),
    [
        ("nllb_moe", "NllbMoeDenseActDense", {"d_model": 16, "encoder_ffn_dim": 24}, (None, "fc1", "fc2")),
        ("switch_transformers", "SwitchTransformersDenseActDense", {"d_model": 16, "d_ff": 24}, (None, "wi", "wo")),
    ],
    ids=["nllb", "switch"],
)
def test_experts_that_look_at_dtypes(family: str, expert: str, config: dict, names: tuple) -> None:
    import importlib

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configuration = getattr(module, "NllbMoeConfig" if family == "nllb_moe" else "SwitchTransformersConfig")(**config)
    arguments = (configuration, configuration.encoder_ffn_dim) if family == "nllb_moe" else (configuration,)
    made = getattr(module, expert)(*arguments)
    assert expert_leaf_names(made) == names
    assert expert_activation(made) is made.act


@pytest.mark.parametrize("case", OLD, ids=str)
def test_every_family(case: Case) -> None:
    expert = case.build().experts[0]
    names = ("w1", "w3", "w2") if hasattr(expert, "w1") else ("gate_proj", "up_proj", "down_proj")
    assert expert_leaf_names(expert) == names
    assert expert_activation(expert) is expert.act_fn
