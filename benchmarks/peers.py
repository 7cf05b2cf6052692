"""What other trainers make of stock PEFT's adapter on experts, called where they are installed.

- `unsloth`: unsloth_zoo's own forward of stacked experts, LoRA kept apart and run by `grouped_mm`.
- `axolotl`: ScatterMoE's Triton kernels with LoRA fused into them.

Both take the model `block.py` builds for the contender `peft` and put a forward of their own on PEFT's wrappers: same
factors, same base, another way to compute. They patch PEFT's classes; here the patch goes on the instances alone, so
that the contender `peft` stays what it is. What they call when they hand a wrapper back to PEFT raises, because then
PEFT would be timed under another's name; and `check` compares with a loop over experts before anything is timed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec
from types import MethodType, ModuleType
from typing import Any

import torch
from common import NotTimed
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

PARAMETERS = ("gate_up_proj", "down_proj")
# Largest relative error of any compared tensor: rounding stays well below, a wrong layout is at 1.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-3}


class PeerError(NotTimed):
    """A peer that is not there, does not run, or computes something else."""


def _import(name: str, bare: tuple[str, ...]) -> ModuleType:
    """Import a module without running the `__init__` of the packages in `bare`.

    Those set up a whole trainer (datasets, trl, xformers, a GPU); the modules used here need torch and Triton alone.
    """
    for package in bare:
        if package not in sys.modules:
            spec = find_spec(package)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            sys.modules[package] = module_from_spec(spec)
    return import_module(name)


def _handed_back(self: ParamWrapper, *args: Any, **kwargs: Any) -> Tensor:
    raise PeerError(f"handed {self.parameter_name} back to PEFT's own forward; what it would time is PEFT")


def wrappers(model: nn.Module) -> dict[str, ParamWrapper]:
    """PEFT's wrappers of the experts' parameters, by the parameter's name."""
    return {module.parameter_name: module for module in model.modules() if isinstance(module, ParamWrapper)}


def unsloth(model: nn.Module) -> None:
    """Run the adapted experts by unsloth_zoo's forward, on a GPU by its backend `grouped_mm` (its default)."""
    package = "unsloth_zoo.temporary_patches"
    with tempfile.TemporaryDirectory() as folder:  # it copies itself into ./unsloth_compiled_cache otherwise
        before = os.environ.get("UNSLOTH_COMPILE_LOCATION")
        os.environ["UNSLOTH_COMPILE_LOCATION"] = folder
        moe: Any = _import(f"{package}.moe_utils", bare=("unsloth_zoo", package))
        if before is None:
            del os.environ["UNSLOTH_COMPILE_LOCATION"]
        else:
            os.environ["UNSLOTH_COMPILE_LOCATION"] = before
    # Imported in every forward, and left out silently where the import fails.
    for name in ("moe_utils_bnb4bit", "moe_utils_fp8", "moe_routed", "gpt_oss_routed"):
        import_module(f"{package}.{name}")
    found = wrappers(model)
    experts = next(iter(found.values())).get_base_layer()
    if type(experts).__name__ == "GptOssExperts":
        raise PeerError("GptOssExperts take another path in unsloth_zoo, which is not called here")
    backend = moe.select_moe_backend()
    if experts.down_proj.is_cuda and backend != "grouped_mm":
        raise PeerError(f"selected its backend {backend!r}, expected 'grouped_mm': see UNSLOTH_MOE_BACKEND")
    moe._original_param_wrapper_forward = _handed_back
    experts.forward = MethodType(moe.forward_moe_backend, experts)
    for wrapper in found.values():
        wrapper.forward = MethodType(moe._patched_param_wrapper_forward, wrapper)


def axolotl(model: nn.Module) -> None:
    """Run the adapted experts by Axolotl's ScatterMoE kernels."""
    kernels = "axolotl.integrations.kernels"
    fast: Any = _import(f"{kernels}.libs.scattermoe_lora.experts_lora_fastpath", bare=(kernels,))
    stock = ParamWrapper.forward
    ParamWrapper.forward = _handed_back  # what its forward falls back to
    try:
        fast.patch_paramwrapper_fastpath()
        forward: Any = ParamWrapper.forward
    finally:
        ParamWrapper.forward = stock
    found = wrappers(model)
    for wrapper in found.values():
        wrapper.forward = MethodType(forward, wrapper)
    next(iter(found.values())).get_base_layer().config._experts_implementation = "scattermoe"


# contender: (distribution, what puts its forward on the model)
PEERS: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "unsloth": ("unsloth_zoo", unsloth),
    "axolotl": ("axolotl", axolotl),
}


def installed() -> dict[str, str]:
    """The peers that are installed, and their versions."""
    found = {}
    for name, (distribution, _) in PEERS.items():
        if find_spec(distribution) is not None:
            try:
                found[name] = version(distribution)
            except PackageNotFoundError:  # unpacked without its metadata
                found[name] = "of unknown version"
    return found


def attach(name: str, model: nn.Module) -> None:
    """Put a peer's forward on a model with stock PEFT's adapter on its experts.

    Raises:
        PeerError: the peer is not installed, cannot be imported, or lacks what is called here.
    """
    distribution, put = PEERS[name]
    if name not in installed():
        raise PeerError(f"{distribution} is not installed: pip install --no-deps {distribution}")
    try:
        put(model)
    except (ImportError, AttributeError) as error:
        raise PeerError(f"{distribution} {installed()[name]} has changed or lacks a dependency: {error!r}") from error


def _own(a: Tensor, b: Tensor, expert: int, count: int) -> tuple[Tensor, Tensor]:
    """One expert's A `(r, in)` and B `(out, r)`, as views of A `(E * r, in)` and B `(out, r * E)`, expert fastest."""
    return a.view(count, -1, a.shape[1])[expert], b.view(len(b), -1, count)[:, :, expert]


def _project(experts: Any, name: str, expert: int, rows: Tensor, delta: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert].double()
    weight = weight.T if experts.is_transposed else weight
    out = rows @ (weight + delta).T
    return out + getattr(experts, f"{name}_bias")[expert].double() if experts.has_bias else out


def loop(model: nn.Module, x: Tensor, index: Tensor, weights: Tensor, probe: Tensor) -> dict[str, Tensor]:
    """Output and gradients by a plain loop over experts in float64, one expert held at a time.

    Args:
        model: experts with stock PEFT's adapters on both projections.
        x, probe: `(T, H)`, the input and the gradient of the output.
        index, weights: `(T, k)`.

    Returns:
        float64: "output" and "x" `(T, H)`, "weights" `(T, k)`, and a gradient of every trainable parameter by its name.
    """
    found = wrappers(model)
    experts: Any = found["down_proj"].get_base_layer()
    pairs = [(found[name].lora_A["default"].weight, found[name].lora_B["default"].weight) for name in PARAMETERS]
    up_scale, down_scale = (found[name].scaling["default"] for name in PARAMETERS)
    gradients = [tuple(torch.zeros_like(factor, dtype=torch.float64) for factor in pair) for pair in pairs]
    output, of_x, of_weights = (torch.zeros_like(like, dtype=torch.float64) for like in (x, x, weights))
    count = len(experts.down_proj)

    for expert in range(count):
        tokens, choices = (index == expert).nonzero(as_tuple=True)
        leaves = [x[tokens], weights[tokens, choices], *(part for pair in pairs for part in _own(*pair, expert, count))]
        leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
        rows, routed, up_a, up_b, down_a, down_b = leaves
        inner = experts._apply_gate(_project(experts, "gate_up_proj", expert, rows, up_scale * up_b @ up_a))
        out = routed[:, None] * _project(experts, "down_proj", expert, inner, down_scale * down_b @ down_a)
        output.index_add_(0, tokens, out.detach())
        of_rows, of_routed, *of_factors = torch.autograd.grad(out, leaves, probe[tokens].double())
        of_x.index_add_(0, tokens, of_rows)
        of_weights[tokens, choices] = of_routed
        views = [view for pair in gradients for view in _own(*pair, expert, count)]
        for view, gradient in zip(views, of_factors, strict=True):
            view.copy_(gradient)

    names = {parameter: name for name, parameter in model.named_parameters()}
    of_parameters = {
        names[factor]: gradient
        for pair, found_pair in zip(pairs, gradients, strict=True)
        for factor, gradient in zip(pair, found_pair, strict=True)
    }
    return {"output": output, "x": of_x, "weights": of_weights, **of_parameters}


def check(model: nn.Module, x: Tensor, index: Tensor, weights: Tensor, probe: Tensor) -> float:
    """The largest relative error of a model's output and gradients against `loop`, by the Frobenius norm.

    Raises:
        PeerError: the model does not run, gives no gradient to something that is trained, trains something else, or is
            further off than rounding explains.
    """
    leaves = {"x": x, "weights": weights, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    try:
        output = model(x, index, weights)
        output.backward(probe)
    except PeerError:
        raise
    except Exception as error:  # foreign code: whatever it raises, the other contenders are to be measured
        raise PeerError(f"does not run: {error!r}") from error
    got = {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    for leaf in leaves.values():
        leaf.grad = None
    expected = loop(model, x, index, weights, probe)
    if missing := [name for name in expected.keys() | got.keys() if got.get(name) is None or name not in expected]:
        raise PeerError(f"expected gradients of x, the weights and the factors alone; it differs in {sorted(missing)}")
    errors = {name: float((got[name].double() - value).norm() / value.norm()) for name, value in expected.items()}
    limit = TOLERANCE[x.dtype]
    if not all(error <= limit for error in errors.values()):  # also where one is NaN
        listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        raise PeerError(
            f"differs from a float64 loop over experts: relative errors {listed}; expected below {limit:.0e}"
        )
    return max(errors.values())
