"""The `model` section of a job: which kinds there are, and the settings of each.

A kind is a file in `vaedist/models`; its `Config` checks the section. Shipped kinds keep theirs in `<kind>_config.py`
beside it, which loads without torch, as everything does that only reads a job. The package is named here, not
imported, because models lie above the settings.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationInfo
from pydantic_core import PydanticKnownError

from vaedist.config.settings import Strict, parse
from vaedist.core.errors import UserError, did_you_mean

PACKAGE = "vaedist.models"
_SETTINGS = "_config"
_KIND = re.compile(r"[a-z0-9][a-z0-9_]*")


def _modules() -> set[str]:
    found = pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__)
    return {module.name for module in found if not module.ispkg and _KIND.fullmatch(module.name)} - {
        "contract"
    }


def kinds() -> tuple[str, ...]:
    """Every kind of model."""
    return tuple(sorted(name for name in _modules() if not name.endswith(_SETTINGS)))


def kind_module(kind: str, *, settings: bool = False) -> Any:
    """The module of a kind, with its `Config` and `Model`; with `settings` its `Config` alone, without torch if it can.

    Raises:
        UserError: there is no such kind; the nearest and all that exist are named.
    """
    if kind not in kinds():
        raise UserError(f"unknown model kind {kind!r}{did_you_mean(kind, kinds())}")
    name = kind + _SETTINGS if settings and kind + _SETTINGS in _modules() else kind
    return importlib.import_module(f"{PACKAGE}.{name}")


def model_config(section: Mapping[str, Any], where: str = "model") -> Strict:
    """A `model` section as the `Config` of its kind, defaults filled in.

    Args:
        section: What a job file or a checkpoint says.
        where: The file, for the message.

    Raises:
        UserError: one sentence about the first mistakes.
    """
    kind = section.get("kind")
    if not isinstance(kind, str):
        raise UserError(f"{where}: model.kind is missing: name the variant, for example `kind: vqvae`")
    config: Strict = parse(kind_module(kind, settings=True).Config, dict(section), where, prefix="model")
    return config


def _validated(section: Any, info: ValidationInfo) -> Strict:
    if isinstance(section, Strict):
        return section
    if not isinstance(section, Mapping):
        raise PydanticKnownError("dict_type")
    return model_config(section, (info.context or {}).get("where", "model"))


ModelConfig = Annotated[SerializeAsAny[Strict], BeforeValidator(_validated)]
"""A `model` section in other settings: validated by its kind's `Config`, of which it is an instance."""
