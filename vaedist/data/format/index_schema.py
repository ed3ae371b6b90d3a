"""What `index.json` may contain: every file is checked against this before anything uses it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from vaedist.config.settings import Strict

FORMAT = 1
"""The newest format that this version reads, and the one that it writes."""
_HASH = Field(pattern="^[0-9a-f]{64}$")


class FieldEntry(Strict):
    name: str
    dtype: Literal["uint8", "uint16", "uint32", "int64"]
    shape: tuple[int, ...]
    codec: Literal["png", "npy", "column"]


class ShardEntry(Strict):
    tar: str
    columns: str
    count: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = _HASH
    columns_sha256: str = _HASH

    @model_validator(mode="after")
    def _paths_stay_inside(self) -> ShardEntry:
        for path in (self.tar, self.columns):
            parts = path.split("/")
            if not all(parts) or {".", ".."} & set(parts) or "\0" in path:
                raise ValueError(f"the path {path!r} is not a plain path inside the folder")
        return self


class SplitEntry(Strict):
    count: int = Field(ge=0)
    shards: tuple[ShardEntry, ...]

    @model_validator(mode="after")
    def _counts_add_up(self) -> SplitEntry:
        if self.count != sum(shard.count for shard in self.shards):
            raise ValueError("the counts of the shards do not add up to the split's")
        return self


class IndexDocument(Strict):
    format: Literal[1]
    identity: str = _HASH
    fields: tuple[FieldEntry, ...]
    classes: tuple[str, ...]
    splits: dict[str, SplitEntry]
    source: dict[str, Any] = Field(default_factory=dict)
    struck: tuple[Any, ...] = ()

    @property
    def content(self) -> FieldEntry:
        """The field that holds the samples: `image` or `codes`."""
        return next(field for field in self.fields if field.name in ("image", "codes"))

    @model_validator(mode="after")
    def _has_images_or_codes(self) -> IndexDocument:
        if sum(field.name in ("image", "codes") for field in self.fields) != 1:
            raise ValueError("expected one field `image`, or one field `codes`")
        content, shape = self.content, self.content.shape
        if content.name == "image" and (content.dtype != "uint8" or content.codec == "column"):
            raise ValueError("expected one field `image` of dtype uint8 and codec png or npy")
        if content.name == "codes" and (content.dtype not in ("uint16", "uint32") or content.codec != "npy"):
            raise ValueError("expected a field `codes` of dtype uint16 or uint32 and codec npy")
        axes = "[C, H, W]" if content.name == "image" else "[h, w]"
        wrong_size = min(shape, default=0) < 1 or max(shape) > 65536 or np.prod(shape, dtype=float) > 2**28
        if len(shape) != axes.count(",") + 1 or wrong_size:
            raise ValueError(f"the {content.name} shape {list(shape)} is not a sensible {axes}")
        return self
