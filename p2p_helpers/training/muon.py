"""Muon for matrices and convolution kernels, AdamW for the rest, as one optimiser."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["MuonAdamW", "flat", "split_parameters"]


def split_parameters(model: nn.Module, edges: tuple[str, ...]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the weights of hidden linear and convolution layers, and all other parameters.

    Parameters
    ----------
    model : nn.Module
    edges : tuple of str
        Layers with one of these in a part of their name are first or last layers and count among the others.
    """
    hidden = {id(module.weight) for name, module in model.named_modules()
              if isinstance(module, nn.Linear | nn.Conv2d) and not set(name.split(".")) & set(edges)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return ([parameter for parameter in parameters if id(parameter) in hidden],
            [parameter for parameter in parameters if id(parameter) not in hidden])


def flat(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """See a kernel (out, in, kh, kw) as a matrix (out, in*kh*kw), in the order in which `like` lies in memory."""
    if like.ndim == 4 and not like.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)     # (out, kh, kw, in): channels last
    return tensor.flatten(1)


class MuonAdamW:
    """`torch.optim.Muon` over flattened views of the hidden weights beside `torch.optim.AdamW` over the others.

    The order of a matrix's columns does not matter to Muon (its update of a permuted matrix is the permuted update),
    so a kernel in either memory format is updated through a view.

    Parameters
    ----------
    model : nn.Module
        Already on its device and in its memory format: the views share its storage.
    muon_lr, adamw_lr : float
        Base learning rates, which `scale` multiplies. Muon's is in units of the update's spectral norm, times
        sqrt(max(1, rows / columns)) (Keller Jordan's convention).
    edges : tuple of str
        See `split_parameters`.

    Raises
    ------
    RuntimeError
        Where torch has no `torch.optim.Muon` (before 2.9).
    """

    def __init__(self, model: nn.Module, muon_lr: float, adamw_lr: float, edges: tuple[str, ...]):
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(f"training needs torch >= 2.9 for torch.optim.Muon; this is torch {torch.__version__}")
        self.hidden, others = split_parameters(model, edges)
        self.views = [nn.Parameter(flat(parameter.detach(), like=parameter)) for parameter in self.hidden]
        if any(view.data_ptr() != parameter.data_ptr() for view, parameter in zip(self.views, self.hidden)):
            raise ValueError("model: a weight lies in memory neither by rows nor channels last")
        self.parts = {"muon": torch.optim.Muon(self.views, lr=muon_lr, weight_decay=0.),
                      "adamw": torch.optim.AdamW(others, lr=adamw_lr, weight_decay=0., betas=(.9, .98), fused=True)}
        self.base = {"muon": muon_lr, "adamw": adamw_lr}
        self.parameters = self.hidden + others

    def scale(self, factor: float) -> None:
        """Set both learning rates to `factor` times their base."""
        for name, part in self.parts.items():
            for group in part.param_groups:
                group["lr"] = factor * self.base[name]

    def step(self) -> None:
        """Update the model from its gradients and forget them."""
        for view, parameter in zip(self.views, self.hidden):
            view.grad = None if parameter.grad is None else flat(parameter.grad, like=parameter)
        for part in self.parts.values():
            part.step()
        for parameter in [*self.views, *self.parameters]:
            parameter.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state as named tensors, fit for safetensors."""
        return {f"{name}.{index}.{key}": value for name, part in self.parts.items()
                for index, state in part.state_dict()["state"].items() for key, value in state.items()}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over the state that `tensors` gave."""
        for name, part in self.parts.items():
            state: dict[int, dict[str, torch.Tensor]] = {}
            for path, value in tensors.items():
                owner, index, key = path.split(".")
                if owner == name:
                    state.setdefault(int(index), {})[key] = value
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})

