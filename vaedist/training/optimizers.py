"""Optimizers that do not import torch's compiler.

`torch.optim` prepares each of its methods for being traced: the first call imports `torch._dynamo`, which takes as
long as the rest of a start on one device (1.1 s of a core), on every start of every rank and every trial of a search.
Nothing here traces an optimizer: `train.compile` compiles a model's bodies. What lies under those preparations is the
same arithmetic, called here directly, without gradients, as torch calls it.

With several processes DDP imports it anyway.
"""

from __future__ import annotations

import inspect

import torch

_PREPARED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
"""Methods of `torch.optim.Optimizer` that `torch.compile` is to leave alone, which asks the compiler to be there."""


class Adam(torch.optim.Adam):
    """Kingma and Ba, "Adam: a method for stochastic optimization"; as `torch.optim.Adam`."""


class AdamW(torch.optim.AdamW):
    """Loshchilov and Hutter, "Decoupled weight decay regularization"; as `torch.optim.AdamW`."""


for _cls in (Adam, AdamW):
    for _name in _PREPARED:
        setattr(_cls, _name, inspect.unwrap(getattr(torch.optim.Optimizer, _name)))
    _cls.step = torch.no_grad()(inspect.unwrap(_cls.step))  # type: ignore[method-assign]
