"""Settings as frozen, strict pydantic models: reading and overriding them, and error messages about them.

An unknown key is an error that names the nearest valid one. The first mistakes are reported in one sentence with the
file and the dotted key; nothing is ignored. Each field has a resume policy:

| policy | on resume |
|---|---|
| `free` | may differ: length, intervals, cache, threads |
| `override` | may differ with `--override`, and the change is recorded: learning rate, weights |
| `fixed` | may never differ: data, model shape, seed, global batch, lanes (the default) |
"""

from __future__ import annotations

import copy
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from vaedist.core.errors import UserError, did_you_mean

ResumePolicy = Literal["free", "override", "fixed"]


def free(default: Any = ..., **options: Any) -> Any:
    """`pydantic.Field` of a setting that may differ when a run is resumed."""
    return Field(default, json_schema_extra={"resume": "free"}, **options)


def overridable(default: Any = ..., **options: Any) -> Any:
    """`pydantic.Field` of a setting that may differ, with `--override`, when a run is resumed."""
    return Field(default, json_schema_extra={"resume": "override"}, **options)


class Strict(BaseModel):
    """Base of every settings class: unknown keys are refused and instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yes_is_no_number(cls, content: Any) -> Any:
        """YAML reads `yes`, `on` and `true` as booleans, which pydantic would take for a 1."""
        for name, value in content.items() if isinstance(content, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields:
                types_ = set(_branches(cls.model_fields[name].annotation))
                if types_ & {int, float} and bool not in types_:
                    raise PydanticCustomError(
                        "truth", "input should be a number", {"name": name, "value": value}
                    )
        return content


def number_or(default: str) -> Discriminator:
    """Distinguishes a plain number from a section with a `kind`, so that a message is about the one that was meant.

    Args:
        default: The section's `kind` where it names none.
    """

    def tag(value: Any) -> str:
        if isinstance(value, dict):
            return str(value.get("kind", default))
        return value.kind if isinstance(value, Strict) and hasattr(value, "kind") else NUMBER

    return Discriminator(tag)


NUMBER = "number"
"""The tag of the plain number beside `number_or` and `number_or_list`."""
LIST = "list"
"""The tag of the list beside `number_or_list`."""


def number_or_list() -> Discriminator:
    """Distinguishes a plain number from a list of numbers, so that a message is about the one that was meant."""
    return Discriminator(lambda value: LIST if isinstance(value, list | tuple) else NUMBER)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last one."""


def _no_duplicates(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}; give the path of a YAML file") from None
    try:
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UserError(
            f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}; mend that line"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines at the top level")
    return content


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `content` with each `key.sub=value` set; values are read as YAML (`null`, `[1, 2]`, `1e-3`)."""
    result = copy.deepcopy(content)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"{override!r} is not a setting: write key.sub=value, for example train.steps=100"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"{override!r}: the value is not valid YAML; quote it") from None
        parts = key.split(".")
        section = result
        for depth, part in enumerate(parts[:-1]):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UserError(f"{override!r}: {'.'.join(parts[: depth + 1])} is a value, not a section")
        section[parts[-1]] = value
    return result


_Model = TypeVar("_Model", bound=BaseModel)


def parse(cls: type[_Model], content: Any, where: str, prefix: str = "") -> _Model:
    """`cls` from plain data, or one sentence about the first mistakes in it.

    Args:
        cls: A settings class.
        content: What a YAML file or the command line said.
        where: The file, for the message.
        prefix: Dotted key of `content` inside that file, such as `model`.

    Raises:
        UserError: naming the file, the key, and for unknown keys the nearest and all valid ones.
    """
    try:
        return cls.model_validate(content, context={"where": where})
    except ValidationError as error:
        sentences = [_sentence(cls, problem, prefix) for problem in error.errors()[:3]]
        raise UserError(f"{where}: {'; '.join(sentences)}") from None


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What names a run, a search or a site, and so a folder."""
_SECTION = "input should be a section of `key: value` lines"
_PLAIN = {
    "int_parsing": "input should be a whole number",
    "int_type": "input should be a whole number",
    "int_from_float": "input should be a whole number",
    "float_parsing": "input should be a number",
    "float_type": "input should be a number",
    "bool_parsing": "input should be true or false",
    "bool_type": "input should be true or false",
    "string_type": "input should be text",
    "dict_type": _SECTION,
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
    "list_type": "input should be a list",
    "tuple_type": "input should be a list",
}
"""pydantic's messages that speak of Python, in words of a YAML file."""


def _sentence(cls: type[BaseModel], problem: Any, prefix: str) -> str:
    location = [str(part) for part in problem["loc"]]
    fields, keys = _resolve_location(cls, location)
    key = ".".join(([prefix] if prefix else []) + keys)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{did_you_mean(location[-1], fields)}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    if problem["type"] == "union_tag_invalid" and problem["ctx"]["discriminator"].endswith("()"):
        kinds = problem["ctx"]["expected_tags"].replace(f"'{NUMBER}', ", "")
        return f"{key}: there is no kind {problem['ctx']['tag']!r}: give a number or one of {kinds}"
    if problem["type"] == "union_tag_invalid":
        kinds = [kind.strip(" '") for kind in problem["ctx"]["expected_tags"].split(",")]
        return (
            f"{key}: there is no kind {problem['ctx']['tag']!r}{did_you_mean(problem['ctx']['tag'], kinds)}"
        )
    if problem["type"] == "truth":
        name, value = problem["ctx"]["name"], problem["ctx"]["value"]
        return f"{key}{'.' if key else ''}{name}: {problem['msg']} (it is {value})"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "string_pattern_mismatch" and problem["ctx"]["pattern"] == NAME:
        message = "input should be letters, digits and . _ - only, a letter or digit first"
    message = _PLAIN.get(problem["type"], message[:1].lower() + message[1:])
    if problem["type"] == "value_error" and not key:
        return message
    given = problem["input"]
    shown_value = f" (it is {given!r})" if isinstance(given, str | int | float | bool | None) else ""
    return f"{key}: {message}{shown_value}"


def _resolve_location(cls: Any, location: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Valid keys of the section that holds the last part of `location`, and its keys without pydantic's union tags."""
    current: list[Any] = [cls]
    fields: tuple[str, ...] = ()
    keys: list[str] = []
    for part in location:
        models = [kind for kind in current if isinstance(kind, type) and issubclass(kind, BaseModel)]
        tagged = [model for model in models if part in (model.__name__, _tag(model))]
        if tagged:
            current = tagged
            fields = tuple(tagged[0].model_fields)
            continue
        if part in (NUMBER, LIST, "str", "int", "float", "bool") or not (
            models or any(typing.get_origin(kind) in (dict, tuple, list) for kind in current)
        ):
            continue  # pydantic's name for a scalar branch of a union
        fields = tuple(dict.fromkeys(name for model in models for name in model.model_fields))
        keys.append(part)
        inner = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        inner += [
            typing.get_args(kind)[-1] for kind in current if typing.get_origin(kind) in (dict, tuple, list)
        ]
        current = [branch for annotation in inner for branch in _branches(annotation)]
    return fields, keys


def _branches(annotation: Any) -> list[Any]:
    """The types that a field may have, unions and `Annotated` opened."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _branches(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [branch for part in typing.get_args(annotation) for branch in _branches(part)]
    return [annotation]


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return None if field is None else str(field.default)


def expand(path: str, what: str) -> Path:
    """`path` with `~` and environment variables replaced.

    Raises:
        UserError: a variable in it is not set.
    """
    expanded = os.path.expandvars(os.path.expanduser(path))
    unset = re.search(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?", expanded)
    if unset:
        raise UserError(
            f"{what} is {path!r}, but ${unset.group(1)} is not set: export it, or give the path itself"
        )
    return Path(expanded)


def resume_policy(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, ResumePolicy]]:
    """Dotted key and resume policy of every field, outermost first; a field that states none is `fixed`.

    A section's own policy holds for all keys below it; `*` stands for any key of a mapping (`train.optim.*.clip`).
    """
    for name, field in cls.model_fields.items():
        extra = field.json_schema_extra
        policy = extra.get("resume") if isinstance(extra, dict) else None
        key = f"{prefix}{name}"
        inner = []
        for branch in _branches(field.annotation):
            star = typing.get_origin(branch) is dict
            model = typing.get_args(branch)[-1] if star else branch
            if isinstance(model, type) and issubclass(model, BaseModel) and model.model_fields:
                inner.append((model, f"{key}.*." if star else f"{key}."))
        if policy is not None or not inner:
            yield key, typing.cast(ResumePolicy, policy or "fixed")
            continue
        for model, below in inner:
            yield from resume_policy(model, below)
