"""AdamW whose step is one fused pass over parameters, gradients and state: many tensors in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmengine.ops import adamw as ops

# Of how state is kept: beside torch.optim.AdamW's, in every param_group.
OPTIONS = ("master_weights", "stochastic_rounding", "state_dtype", "seed")
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019), in the place of `torch.optim.AdamW`: same arguments, same results, same state.

    lr, betas, eps, weight_decay, amsgrad, maximize, and groups of parameters with values of their own: as PyTorch's; lr
        may be a tensor of one element. `fused`, `foreach` and `capturable` may be given but change nothing: the step is
        always fused, and its counters are always with the parameters. differentiable=True is a ValueError.
    master_weights: of 16-bit parameters, float32 copies are kept and updated, with float32 moments, and the parameters
        are their roundings. Who changes such a parameter otherwise, between steps, deletes its "master" from `state`.
    stochastic_rounding: what is stored in bfloat16 (weights without masters, bfloat16 moments) is rounded up or down by
        chance, so that its expectation is exact and updates below half a unit in the last place are not lost.
        Reproducible: a function of `seed`, the step and the element's place. float16 parameters are a ValueError.
    state_dtype: of the moments, torch.float32 or torch.bfloat16. None: the parameter's, as in PyTorch, or float32 with
        master_weights. In bfloat16 without stochastic_rounding the second moment hardly ever falls, here as in PyTorch.

    float32 and bfloat16 parameters have kernels; float16 ones on a GPU; others run, slowly, on the reference. Strided
    parameters are copied in and out.

    `state_dict` is that of torch.optim.AdamW(fused=True), with "master" where there are masters; each loads the
    other's. `load_state_dict` takes hyperparameters from what it loads, but the three options above from the
    constructor. Torch's GradScaler is obeyed without a wait for the device; gradients are left as they are (PyTorch's
    step unscales them).
    """

    # GradScaler then leaves unscaling to the step, in which the optimizer has attributes grad_scale and found_inf.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        if differentiable:
            raise ValueError("AdamW: differentiable=True is not supported: the step is fused; use torch.optim.AdamW")
        if state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"AdamW: state_dtype is {state_dtype}; allowed: None, torch.float32, torch.bfloat16")
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, fused=True)
        self.defaults |= {
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "state_dtype": state_dtype,
            "seed": seed,
        }
        for group in self.param_groups:
            self._complete(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if OPTIONS[0] in self.defaults:  # otherwise the constructor completes it
            self._complete(self.param_groups[-1])

    def _complete(self, group: dict[str, Any]) -> None:
        for option in OPTIONS:
            group.setdefault(option, self.defaults[option])
        for parameter in group["params"]:
            if not parameter.is_floating_point():
                raise ValueError(f"AdamW: params has a tensor of {parameter.dtype}; allowed: real floating dtypes")
            if group["stochastic_rounding"] and parameter.dtype == torch.float16:
                raise ValueError("AdamW: stochastic_rounding takes bfloat16 and float32 parameters, got float16")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group |= {"fused": True, "foreach": None, "differentiable": False}
            for option in OPTIONS:
                group.setdefault(option, self.defaults[option])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer.load_state_dict. It would cast all state to the parameters' dtype: here state keeps
        the dtypes that this optimizer's options ask for."""
        options = [{option: group[option] for option in OPTIONS[:3]} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own, saved in zip(self.param_groups, options, state_dict["param_groups"], strict=True):
            group |= own
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                if state := state_dict["state"].get(key):
                    self.state[parameter] = {
                        name: torch.as_tensor(state[name]).to(parameter.device, dtype)
                        for name, dtype in _state_dtypes(group, parameter).items()
                        if name in state
                    }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, gradient_scale: Tensor | float | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure`, called first, returns.

        gradient_scale: gradients count times this (the factor of clipping by norm, say), at no cost.
        Raises RuntimeError for sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for group in self.param_groups:
            for call in self._calls(group, first):
                call.run(group, self._multiplier(gradient_scale, call.device), self._found_inf(call.device))
            first += len(group["params"])
        return loss

    def _calls(self, group: dict[str, Any], first: int) -> list[_Call]:
        """The group's parameters that have gradients, by device and dtype. first: the number of the group's first."""
        calls: dict[tuple[torch.device, torch.dtype], _Call] = {}
        for number, parameter in enumerate(group["params"], first):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout != torch.strided:
                raise RuntimeError("AdamW does not support sparse gradients; use torch.optim.SparseAdam for them")
            key = (parameter.device, parameter.dtype)
            call = calls.get(key) or calls.setdefault(key, _Call(parameter.device))
            call.add(parameter, gradient, self._state(parameter, group), number)
        return list(calls.values())

    def _state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's, as far as this step uses it; what is missing, all of it before the first step, is made."""
        state, used = self.state[parameter], _state_dtypes(group, parameter)
        for name, dtype in used.items():
            if name in state:
                continue
            if name == "step":
                state[name] = torch.zeros((), dtype=dtype, device=parameter.device)
            elif name == "master":
                state[name] = parameter.detach().to(dtype)
            else:
                state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        return {name: state[name] for name in used}

    def _multiplier(self, gradient_scale: Tensor | float | None, device: torch.device) -> Tensor | None:
        """What gradients are multiplied by: the caller's scale, and out of a GradScaler's."""
        from_scaler: Tensor | None = getattr(self, "grad_scale", None)
        if gradient_scale is None and from_scaler is None:
            return None
        scale = torch.as_tensor(1.0 if gradient_scale is None else gradient_scale, dtype=torch.float32, device=device)
        return scale if from_scaler is None else scale / from_scaler.to(device, torch.float32)

    def _found_inf(self, device: torch.device) -> Tensor | None:
        found: Tensor | None = getattr(self, "found_inf", None)
        return None if found is None else found.to(device, torch.float32, non_blocking=True)


def _state_dtypes(group: dict[str, Any], parameter: Tensor) -> dict[str, torch.dtype]:
    """What the group's options keep of a parameter, in which dtypes."""
    has_master = group["master_weights"] and parameter.dtype in SIXTEEN_BITS
    moments = torch.float32 if has_master else parameter.dtype
    if group["state_dtype"] is not None and parameter.dtype != torch.float64:
        moments = group["state_dtype"]
    dtypes = {"step": torch.float32, "exp_avg": moments, "exp_avg_sq": moments}
    if group["amsgrad"]:
        dtypes["max_exp_avg_sq"] = moments
    if has_master:
        dtypes["master"] = torch.float32
    return dtypes


@dataclass
class _Call:
    """The lists of one call of the operator."""

    device: torch.device
    parameters: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def add(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], number: int) -> None:
        self.parameters.append(parameter)
        self.gradients.append(gradient)
        self.exp_avgs.append(state["exp_avg"])
        self.exp_avg_sqs.append(state["exp_avg_sq"])
        if "max_exp_avg_sq" in state:
            self.max_exp_avg_sqs.append(state["max_exp_avg_sq"])
        if "master" in state:
            self.masters.append(state["master"])
        self.steps.append(state["step"])
        self.numbers.append(number)

    def run(self, group: dict[str, Any], multiplier: Tensor | None, found_inf: Tensor | None) -> None:
        lr = group["lr"] if isinstance(group["lr"], Tensor) else torch.tensor(group["lr"], dtype=torch.float64)
        beta1, beta2 = group["betas"]
        ops.adamw(
            self.parameters, self.gradients, self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.masters,
            self.steps, self.numbers, lr, multiplier, found_inf, beta1, beta2, group["eps"], group["weight_decay"],
            group["maximize"], group["stochastic_rounding"], group["seed"],
        )  # fmt: skip
