"""What training a prior needs of its tokenizer: what that run is, and the codes of all images.

A prior's job says `tokenizer: RUN`. Rank 0 reads that run once and puts what it is in the place of its name
(`resolve_tokenizer`); from there on a tokenizer with other weights is another job, and a run is never resumed with it.

Codes are made once for all priors on the same tokenizer and images, at RUN/codes/<hash of the two>. All ranks encode:
each batch is cut among them, the codes come together, and rank 0 writes, shard by shard, under a lock, so that two
jobs that need the same codes do not both make them. They are made by the very weights that the prior's checkpoint
holds, in fp32 whatever the prior's precision. A run that was stopped or killed goes on after the last whole shard.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vaedist.config.job import Job
from vaedist.config.settings import expand, parse
from vaedist.core.errors import UserError
from vaedist.data.format.index import INDEX_NAME, Index
from vaedist.data.loading.inputs import Inputs
from vaedist.data.loading.stream import EvaluationStream, EvaluationStreamConfig
from vaedist.data.packing.code_shards import CodeWriter, codes_folder, open_codes
from vaedist.data.packing.shard_writer import explain_write_errors
from vaedist.distributed.contexts import DistributedSampleContext
from vaedist.distributed.process_group import Group
from vaedist.models.bases.code_prior_config import Tokenizer, TokenizerConfig
from vaedist.models.contract import Variant
from vaedist.runs.checkpoint_paths import resolve_checkpoint, run_folder_of
from vaedist.runs.open_run import open_run
from vaedist.runs.run_lock import RunLock, RunLocked
from vaedist.runs.stop_request import StopRequest
from vaedist.runs.weights import weights_digest

_PATIENCE_S = 20.0
"""How long rank 0 waits for another job's codes before it answers the other ranks, which wait for it."""
_REPORT_S = 10.0
"""Between two lines about how far the codes are."""
_PIXELS = 1 << 20
"""Of images that one process encodes at once."""


# What the tokenizer is --------------------------------------------------------------------------------------


def resolve_tokenizer(job: Job, index: Index, group: Group) -> Job:
    """The job with its tokenizer, if it has one, described: read by rank 0, sent to all. Collective.

    Args:
        job: Resolved.
        index: The images.

    Raises:
        UserError: the tokenizer's run is not there, has no codes, takes other images, or is not the one that the
            job describes.
    """
    asked: TokenizerConfig | None = getattr(job.model, "tokenizer", None)
    if asked is None:
        return job
    run = asked if isinstance(asked, str) else asked.run
    found = json.loads(group.from_leader(lambda: json.dumps(_describe(run, index)).encode()))
    if not isinstance(asked, str) and asked.sha256 != found["sha256"]:
        raise UserError(
            f"the tokenizer {run} has changed: its weights have the sha256 {found['sha256'][:12]}, and this job was "
            f"begun with {asked.sha256[:12]}: give the checkpoint that has those with model.tokenizer.run=..., or "
            f"begin anew with model.tokenizer={run} --new-run"
        )
    tokenizer = parse(Tokenizer, found, where=f"the tokenizer {run}")
    return job.model_copy(update={"model": job.model.model_copy(update={"tokenizer": tokenizer})})


def _describe(path: str, index: Index) -> dict[str, Any]:
    try:
        run = open_run(expand(path, "model.tokenizer"))
    except UserError as error:
        raise UserError(f"model.tokenizer: {error}") from None
    model, shape = run.model, run.spec.image_shape
    if model.latent != "codes" or model.reads != "images":
        raise UserError(
            f"model.tokenizer: {path} is a run of {run.job.kind!r}, whose latent is not a map of codes: give "
            "a run of a variant that has one, such as vqvae"
        )
    if shape != index.shape:
        raise UserError(
            f"model.tokenizer: {path} takes images of shape {shape} (C, H, W) and {index.folder} has {index.shape}: "
            "give the data that it was trained on, or another tokenizer"
        )
    grid = model.codes(torch.zeros(1, *shape, dtype=torch.uint8)).shape[1:]
    if len(grid) != 2:
        raise UserError(
            f"model.tokenizer: {path} gives each image codes of shape {tuple(grid)}; a prior takes a map (h, w) of them"
        )
    return {
        "run": path,
        "sha256": weights_digest(model.state_dict()),
        "model": run.job.model.model_dump(mode="json"),
        "codes": model.num_codes,
        "grid": list(grid),
        "binarise": run.job.data.binarise,
        "seed": run.job.seed,
    }


def _section(model: Variant) -> Tokenizer | None:
    found = getattr(model.config, "tokenizer", None)
    return found if isinstance(found, Tokenizer) else None


# The codes of all images ------------------------------------------------------------------------------------


def code_shards(
    model: Variant,
    job: Job,
    images: Index,
    group: Group,
    stop: StopRequest,
    echo: Callable[[str], None],
) -> Index | None:
    """The codes of all `images`, made by `model.tokenizer` where they are missing. Collective.

    Args:
        model: A prior, its tokenizer's weights in place, on the group's device.
        job: Settled.
        images: The packed folder.
        stop: Looked at between batches.
        echo: Shows one line.

    Returns:
        The packed folder of codes; none where a stop was asked for before it was finished.

    Raises:
        UserError: the weights are not those that the job describes, or the folder cannot be written.
    """
    tokenizer = _section(model)
    assert tokenizer is not None, "a model that reads codes has the setting `tokenizer`"
    stamp = {
        "made_by": "vaedist-train",
        "tokenizer": tokenizer.model_dump(mode="json", exclude={"run"}),
        "images": images.identity,
    }
    with contextlib.ExitStack() as exits:
        maker = _CodeMaker(tokenizer, model, images, stamp, exits, echo)
        while (plan := json.loads(group.from_leader(maker.plan)))["wait"]:
            if _stop_requested(stop, group):
                return None
        folder = Path(plan["folder"])
        if plan["missing"]:
            encoder = copy.deepcopy(model.get_submodule("tokenizer")).to(torch.float32).eval()
            for split, shard in plan["missing"]:
                codes = _encode(encoder, Inputs(job), images, split, shard, group, stop)  # type: ignore[arg-type]
                if codes is None:
                    return None
                group.from_leader(partial(maker.write, split, shard, codes))
        if not plan["finished"]:
            group.from_leader(maker.finish)
    return open_codes(folder, stamp, images)


class _CodeMaker:
    """Rank 0's part: it looks, holds the lock, and writes."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: Variant,
        images: Index,
        stamp: Mapping[str, Any],
        exits: contextlib.ExitStack,
        echo: Callable[[str], None],
    ) -> None:
        self.tokenizer, self.model, self.images, self.stamp = tokenizer, model, images, stamp
        self.exits, self.echo = exits, echo
        self.lock: RunLock | None = None
        self.writer: CodeWriter | None = None
        self.waits = False
        self.left = 0
        self._reported = time.monotonic()

    def plan(self) -> bytes:
        """What all ranks shall do, as JSON: `folder`, `wait` (ask again), `finished`, `missing` shards."""
        if (
            digest := weights_digest(self.model.get_submodule("tokenizer").state_dict())
        ) != self.tokenizer.sha256:
            raise UserError(
                f"the tokenizer {self.tokenizer.run} has changed: its weights have the sha256 {digest[:12]}, and "
                f"this job was begun with {self.tokenizer.sha256[:12]}: begin anew with --new-run"
            )
        checkpoint = resolve_checkpoint(expand(self.tokenizer.run, "model.tokenizer.run"))
        folder = codes_folder((run_folder_of(checkpoint) or checkpoint).absolute(), self.stamp)
        plan: dict[str, Any] = {"folder": str(folder), "wait": False, "finished": True, "missing": []}
        if (folder / INDEX_NAME).exists():
            return json.dumps(plan).encode()
        with explain_write_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._locked(folder):
                return json.dumps(plan | {"wait": True}).encode()
            if not (folder / INDEX_NAME).exists():  # else the holder before us has finished
                self.writer = CodeWriter(folder, self.images, self.tokenizer.codes, self.stamp)
                plan |= {"finished": False, "missing": list(self.writer.missing())}
                self.left = len(plan["missing"])
                self.echo(f"codes: encoding the images of {self.images.folder} once, into {folder}")
        return json.dumps(plan).encode()

    def _locked(self, folder: Path) -> bool:
        """Take the lock, unless another job has it for longer than our patience."""
        deadline = time.monotonic() + _PATIENCE_S
        while self.lock is None:
            try:
                self.lock = self.exits.enter_context(RunLock.acquire(folder))
            except RunLocked as held:
                if not self.waits:
                    self.echo(f"codes: {held.owner} is making them; waiting for it")
                self.waits = True
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.5)
        return True

    def write(self, split: str, shard: int, codes: NDArray[np.int64]) -> bytes:
        assert self.writer is not None and self.lock is not None
        self.lock.check()
        with explain_write_errors(self.writer.folder):
            self.writer.write(split, shard, codes)
        self.left -= 1
        if time.monotonic() - self._reported > _REPORT_S:
            self._reported = time.monotonic()
            self.echo(f"codes: {self.left} shards left")
        return b""

    def finish(self) -> bytes:
        assert self.writer is not None and self.lock is not None
        self.lock.check()
        with explain_write_errors(self.writer.folder):
            self.writer.finish()
        return b""


def _stop_requested(stop: StopRequest, group: Group) -> bool:
    return bool(group.largest(torch.tensor([float(stop.requested)])))


@torch.no_grad()
def _encode(
    tokenizer: Variant,
    inputs: Inputs,
    images: Index,
    split: str,
    number: int,
    group: Group,
    stop: StopRequest,
) -> NDArray[np.int64] | None:
    """Codes (n, h, w) of one shard's images, on every rank; none where a stop was asked for. Collective."""
    shards = images.split(split)
    first, count = int(shards.starts[number]), int(shards.counts[number])
    rows = max(1, min(256, _PIXELS // (images.shape[1] * images.shape[2])))
    config = EvaluationStreamConfig(
        batch_size=rows * group.world, rank=group.rank, world=group.world, device=group.device,
        first=first, limit=count,
    )  # fmt: skip
    stream = EvaluationStream(images, split, config)
    parts = []
    with contextlib.closing(stream):
        for batch in stream:
            codes = tokenizer.codes(inputs.binarize(batch["image"], batch["key"]))
            parts.append(DistributedSampleContext(group, seed=0, samples=batch["sample"]).gather(codes).cpu())
            if _stop_requested(stop, group):
                return None
    return torch.cat(parts)[:count].numpy()
