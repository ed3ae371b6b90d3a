"""Classes as the user names them, and as a model takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vaedist.core.errors import NotDefined, UserError, did_you_mean
from vaedist.runs.open_run import Run

_CLASSES_NAMED = 64


def class_numbers(run: Run, given: Sequence[str] | None) -> list[int] | None:
    """Numbers of classes by name or number, -1 for `none`; None where nothing was given.

    Raises:
        NotDefined: the model knows no classes.
        UserError: it does not know this one.
    """
    if given is None:
        return None
    if not run.model.conditional:
        raise NotDefined("--class is not defined, because the model was not trained with classes")
    numbers = {str(number): number for number in range(len(run.classes))}
    numbers |= {"none": -1} | {name: number for number, name in enumerate(run.classes)}
    for name in given:
        if name not in numbers:
            valid = [*run.classes, "none"][:_CLASSES_NAMED]
            raise UserError(f"--class: the model knows no class {name!r}{did_you_mean(name, valid)}")
    return [numbers[name] for name in given]


def single_class(classes: Sequence[int] | None) -> int | None:
    """The one class, or None for none. A model that was not trained without classes refuses it."""
    return None if classes is None or classes[0] < 0 else classes[0]


def class_labels(run: Run, label: int | None, rows: int) -> Tensor | None:
    """The class for each row; None where none was named."""
    return None if label is None else torch.full((rows,), label, dtype=torch.int64, device=run.device)
