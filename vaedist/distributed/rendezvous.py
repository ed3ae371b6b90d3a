"""Where the ranks of a run meet: a TCP store, whose address and secret the launcher puts into the environment."""

from __future__ import annotations

import hmac
import os
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from vaedist.core.errors import UserError
from vaedist.distributed.liveness.stalls import print_to_stderr

_STORE_SECONDS = 10.0


def lower_debug_level(rank: int) -> None:
    """Lower TORCH_DISTRIBUTED_DEBUG=DETAIL to INFO: torch 2.13's gloo crashes (SIGSEGV) under it."""
    debug: Any = dist  # torch does not export these names to type checkers
    if debug.get_debug_level() == debug.DebugLevel.DETAIL:
        debug.set_debug_level(debug.DebugLevel.INFO)
        os.environ["TORCH_DISTRIBUTED_DEBUG"] = "INFO"
        if rank == 0:
            print_to_stderr(
                "TORCH_DISTRIBUTED_DEBUG=DETAIL crashes torch's gloo, so the ranks use INFO instead"
            )


def meet_ranks(rank: int, world: int, timeout_s: float) -> Store:
    """Meet the other ranks in a TCP store, where the environment says.

    Raises:
        UserError: the store cannot be reached in time, or ranks are missing: which.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    descriptor = os.environ.get("VAEDIST_STORE_FD") if rank == 0 else None
    options: dict[str, Any] = {"master_listen_fd": int(descriptor)} if descriptor else {}
    if descriptor and torch.__version__ < "2.8":
        options["use_libuv"] = False  # its store could not take over a socket before (pytorch#150215)
    try:
        store: Store = TCPStore(
            address,
            port,
            world_size=None,
            is_master=rank == 0 and not agent_hosts,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            **options,
        )
    except (RuntimeError, dist.DistError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {rank} could not reach the rendezvous at {address}:{port} within {timeout_s:.0f} s: {reason}"
        ) from None
    # One prefix per start: torchrun keeps its store over restarts and counts them.
    store = PrefixStore(f"vaedist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.set(f"here/{rank}", "1")
    deadline = time.monotonic() + timeout_s
    while True:
        missing = [other for other in range(world) if not store.check([f"here/{other}"])]
        if not missing:
            _verify_secret(store, rank, world)
            return store
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, missing))
            raise UserError(
                f"rank {rank} waited {timeout_s:.0f} s at {address}:{port}, but of {world} ranks "
                f"these never came: {ranks}; look at their logs, then start again"
            )
        time.sleep(0.05)


def _verify_secret(store: Store, rank: int, world: int) -> None:
    """Prove to the others that this process knows the launcher's secret (`VAEDIST_STORE_SECRET`), and ask for theirs.

    Any program that reaches the port can use the TCP store. Each rank writes a challenge, and answers all of them with
    an HMAC (RFC 2104) of challenge and ranks, so an answer that was overheard proves nothing.

    Raises:
        UserError: a process gave a wrong answer, so it does not belong to this run.
    """
    secret = os.environ.get("VAEDIST_STORE_SECRET", "")
    if not secret:
        return

    def answer(question: str, by: int, to: int) -> str:
        return hmac.new(secret.encode(), f"{question} {by} {to}".encode(), "sha256").hexdigest()

    mine = secrets.token_hex(16)
    store.set(f"question/{rank}", mine)
    for other in range(world):
        question = store.get(f"question/{other}").decode(errors="replace")
        store.set(f"answer/{rank}/{other}", answer(question, rank, other))
    for other in range(world):
        if not hmac.compare_digest(store.get(f"answer/{other}/{rank}"), answer(mine, other, rank).encode()):
            raise UserError(
                f"what called itself rank {other} at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} does not "
                "know this run's secret: another program talks to the port; start again, and tell the cluster's admin"
            )


class CollectiveCounts:
    """The ranks' numbers of collectives, in the store where they met: `Peers` of the stall monitor.

    It has a connection of its own, because the main thread holds the other one while it waits in the store.
    """

    def __init__(self, rank: int, world: int) -> None:
        self._mine, self._all = f"collectives/{rank}", [f"collectives/{other}" for other in range(world)]
        self._place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store: Store | None = None

    def publish(self, collectives: int) -> None:
        self._ask(lambda store: store.set(self._mine, str(collectives)))

    def counts(self) -> Sequence[int]:
        def read(store: Store) -> list[int]:
            return [int(store.get(key)) for key in self._all if store.check([key])]

        return self._ask(read) or ()

    def _ask(self, question: Callable[[Store], Any]) -> Any:
        """The answer; None while the store does not answer."""
        try:
            if self._store is None:
                deadline = timedelta(seconds=_STORE_SECONDS)
                store = TCPStore(*self._place, is_master=False, timeout=deadline, wait_for_workers=False)
                self._store = PrefixStore(f"vaedist/{self._restart}/liveness", store)
            return question(self._store)
        except (RuntimeError, ValueError, dist.DistError):
            self._store = None  # the process that holds the store is gone or stopped, which others notice
            return None
