"""AdamW whose step is one fused pass over parameters, gradients and state: many tensors in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmengine.ops import adamw as ops
from llmengine.optim.main_grad import gradient_of

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

    Of a parameter with a `main_grad` (`MainGradients`) that is the gradient: the step reads float32, whatever the
    parameter is, and zero_grad fills the buffer with zeros.

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
                        for name, dtype in _state_dtypes(group, parameter.dtype).items()
                        if name in state
                    }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, gradient_scale: Tensor | float | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure`, called first, returns.

        gradient_scale: gradients count times this (the factor of clipping by norm, say), at no cost.
        Raises RuntimeError for sparse gradients, and for main_grad buffers under a GradScaler.
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        mains = [getattr(p, "main_grad", None) for group in self.param_groups for p in group["params"]]
        if filled := [main for main in mains if main is not None]:
            torch._foreach_zero_(filled)

    def _calls(self, group: dict[str, Any], first: int) -> list[_Call]:
        """The group's parameters that have gradients, by device and dtypes. first: the number of the group's first."""
        calls: dict[tuple[torch.device, torch.dtype, torch.dtype], _Call] = {}
        for number, parameter in enumerate(group["params"], first):
            gradient = gradient_of(parameter)
            if gradient is None:
                continue
            if gradient is not parameter.grad and getattr(self, "found_inf", None) is not None:
                raise RuntimeError("AdamW: a torch.amp.GradScaler scales .grad, and knows nothing of main_grad buffers")
            if gradient.layout != torch.strided:
                raise RuntimeError("AdamW does not support sparse gradients; use torch.optim.SparseAdam for them")
            key = (parameter.device, parameter.dtype, gradient.dtype)
            call = calls.get(key)
            if call is None:
                call = calls[key] = _Call(parameter.device, _state_dtypes(group, parameter.dtype))
            call.add(parameter, gradient, self.state[parameter], number)
        return list(calls.values())

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


def _state_dtypes(group: dict[str, Any], weights: torch.dtype) -> dict[str, torch.dtype]:
    """What the group's options keep of a parameter of that dtype, and in which dtypes."""
    has_master = group["master_weights"] and weights in SIXTEEN_BITS
    moments = torch.float32 if has_master else weights
    if group["state_dtype"] is not None and weights != torch.float64:
        moments = group["state_dtype"]
    dtypes = {"step": torch.float32, "exp_avg": moments, "exp_avg_sq": moments}
    if group["amsgrad"]:
        dtypes["max_exp_avg_sq"] = moments
    if has_master:
        dtypes["master"] = torch.float32
    return dtypes


def _first_state(name: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    if name == "step":
        return torch.zeros((), dtype=dtype, device=parameter.device)
    if name == "master":
        return parameter.detach().to(dtype)
    return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)


class _Call:
    """The lists of one call of the operator."""

    def __init__(self, device: torch.device, state_dtypes: dict[str, torch.dtype]) -> None:
        self.device = device
        self.parameters: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.numbers: list[int] = []
        self.state_dtypes = state_dtypes
        self.states: dict[str, list[Tensor]] = {name: [] for name in state_dtypes}

    def add(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], number: int) -> None:
        """What the state lacks, all of it before the first step, is made."""
        self.parameters.append(parameter)
        self.gradients.append(gradient)
        self.numbers.append(number)
        for name, tensors in self.states.items():
            if name not in state:
                state[name] = _first_state(name, parameter, self.state_dtypes[name])
            tensors.append(state[name])

    def run(self, group: dict[str, Any], multiplier: Tensor | None, found_inf: Tensor | None) -> None:
        lr = group["lr"] if isinstance(group["lr"], Tensor) else torch.tensor(group["lr"], dtype=torch.float64)
        beta1, beta2 = group["betas"]
        states = self.states
        ops.adamw(
            self.parameters, self.gradients, states["exp_avg"], states["exp_avg_sq"], states.get("max_exp_avg_sq", []),
            states.get("master", []), states["step"], self.numbers, lr, multiplier, found_inf, beta1, beta2,
            group["eps"], group["weight_decay"], group["maximize"], group["stochastic_rounding"], group["seed"],
        )  # fmt: skip
