"""The address at which the other nodes of a job reach this one, and the network interface that has it.

A host name is not enough on a cluster: Debian gives a machine's own name the address 127.0.1.1, a node name of Slurm
need not resolve, and a node has several networks. So several sources are tried in turn, and an address is taken only if
this machine has it and it is not a loopback one:

1. the interface that the user or the site names (`GLOO_SOCKET_IFNAME`, `NCCL_SOCKET_IFNAME`), should it be here;
2. the node name that Slurm gave, and the host name;
3. the `NodeAddr` of `scontrol show node`;
4. the address that the kernel would use to talk to the node that started the step (no packet is sent for that).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Mapping

from vaedist.core.errors import UserError
from vaedist.slurm import batch_job

_SIOCGIFADDR = 0x8915
"""netdevice(7): the IPv4 address of an interface."""

_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def node_address(environment: Mapping[str, str] = os.environ) -> str:
    """This node's IPv4 address on the network of the job.

    Raises:
        UserError: no source knows one.
    """
    ours = interfaces()
    for address in _candidates(environment, ours):
        if address in ours.values() and not address.startswith("127."):
            return address
    raise UserError(
        f"{socket.gethostname()} does not know its own address on the cluster's network (it has "
        f"{', '.join(f'{address} on {name}' for name, address in ours.items()) or 'none'}): name the interface in the "
        "site file (interface: eth0), or set GLOO_SOCKET_IFNAME"
    )


def interfaces() -> dict[str, str]:
    """IPv4 address by interface of this machine; interfaces without one are left out."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                asked = struct.pack("256s", name.encode())
                found[name] = socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, asked)[20:24])
    return found


def gloo_interface(address: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What makes gloo talk over the interface that has `address`; a setting of the user's stays, if it
    names an interface that is here and leads to other machines.

    gloo would resolve the host name, and between nodes 127.0.1.1 is a hang.
    """
    ours = interfaces()
    asked = [ours.get(name, "127.") for name in environment.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    if any(not one.startswith("127.") for one in asked):
        return {}
    name = next((name for name, has in ours.items() if has == address), None)
    return {"GLOO_SOCKET_IFNAME": name} if name else {}


def _candidates(environment: Mapping[str, str], ours: Mapping[str, str]) -> Iterator[str]:
    for variable in _VARIABLES:
        for name in environment.get(variable, "").split(","):
            if name in ours:
                yield ours[name]
    node = batch_job.node_name(environment)
    for name in (node, socket.gethostname()):
        yield from _resolved(name)
    if node:
        yield from _resolved(batch_job.node_address(node))
    if launcher := batch_job.launch_address(environment):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((launcher, 9))
            yield probe.getsockname()[0]


def _resolved(name: str) -> list[str]:
    if not name:
        return []
    with contextlib.suppress(OSError):
        return [str(found[4][0]) for found in socket.getaddrinfo(name, None, socket.AF_INET)]
    return []
