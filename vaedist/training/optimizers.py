"""Adam and AdamW of torch, without importing torch's compiler.

`torch.optim` wraps each method of an optimizer for `torch.compile`; the first call imports `torch._dynamo`, which takes
about a second on every start of every rank and trial. Nothing here compiles an optimizer (`train.compile` compiles a
model's bodies), so the wrappers are removed; the arithmetic is torch's own.

With several processes DDP imports the compiler anyway.
"""

from __future__ import annotations

import inspect

import torch

_WRAPPED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
"""Methods of `torch.optim.Optimizer` that torch excludes from compilation, with a wrapper that imports the compiler."""


class Adam(torch.optim.Adam):
    """Kingma and Ba, "Adam: a method for stochastic optimization"; as `torch.optim.Adam`."""


class AdamW(torch.optim.AdamW):
    """Loshchilov and Hutter, "Decoupled weight decay regularization"; as `torch.optim.AdamW`."""


for _cls in (Adam, AdamW):
    for _name in _WRAPPED:
        setattr(_cls, _name, inspect.unwrap(getattr(torch.optim.Optimizer, _name)))
    _cls.step = torch.no_grad()(inspect.unwrap(_cls.step))  # type: ignore[method-assign]
