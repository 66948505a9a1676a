"""Two hosts on one machine: a network namespace and a host name each, a slowed link between them.

Ranks of one host share memory as ever; those of different hosts reach one another by TCP alone. Both see the
same files.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.mpirun import REPOSITORY, finished, is_open_mpi, job_environment, mpirun, why_no_mpi

SUBNET = "10.213.77"
# a message leaves at once; else its sender has to look again when the receiver is there, which it does not
# while it computes
EAGER = (
    *("--mca", "btl_tcp_eager_limit", "2097152", "--mca", "btl_tcp_max_send_size", "2097152"),
    *("--mca", "btl_tcp_sndbuf", "4194304", "--mca", "btl_tcp_rcvbuf", "4194304"),
)
TOOLS = ("ip", "tc", "unshare", "hostname")


@dataclass(frozen=True)
class Wire:
    """The link between the hosts: `rate` in bytes per second, `delay` in seconds one way."""

    rate: float
    delay: float = 0.0


@dataclass(frozen=True)
class Hosts:
    """Namespaces and host names, and the script that starts commands on the other host."""

    names: tuple[str, str]
    addresses: tuple[str, str]
    agent: Path

    def run(
        self, ranks_each: int, module: str, *arguments: str, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """An MPI job of so many ranks on each host, started on the first."""
        where = ",".join(f"{address}:{ranks_each}" for address in self.addresses)
        command = [
            *(str(mpirun()), "-n", str(2 * ranks_each), "--host", where, "--bind-to", "none"),
            *("--prtemca", "plm_ssh_agent", str(self.agent), "--prtemca", "plm_ssh_no_tree_spawn", "1"),
            *("--prtemca", "prte_if_include", f"{SUBNET}.0/24"),
            *("--mca", "btl", "tcp,sm,self", "--mca", "btl_tcp_if_include", f"{SUBNET}.0/24"),
            *EAGER,
            *("-x", "PYTHONPATH", "-x", "OMP_NUM_THREADS"),
            *(sys.executable, "-m", module, *arguments),
        ]
        return finished(
            [str(self.agent), self.addresses[0], *command], job_environment(), REPOSITORY, timeout
        )


@cache
def why_no_hosts() -> str | None:
    """Why there can be no two hosts here, or None."""
    if why_no_mpi() is not None:
        return why_no_mpi()
    if not is_open_mpi():
        return "the flags that start ranks in namespaces are Open MPI's"
    if os.geteuid() != 0:
        return "making network namespaces takes root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"there is no {', '.join(missing)}"
    try:
        with two_hosts(Wire(1e9)):
            return None
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


@contextmanager
def two_hosts(wire: Wire) -> Iterator[Hosts]:
    """Makes them, and removes them. Raises CalledProcessError where that is not possible."""
    mark = f"gpp{os.getpid()}"
    names, addresses = (f"{mark}a", f"{mark}b"), (f"{SUBNET}.1", f"{SUBNET}.2")
    with tempfile.TemporaryDirectory() as folder:
        agent = Path(folder) / "agent"
        agent.write_text(_agent(names, addresses))
        agent.chmod(0o755)
        try:
            for name in names:
                _do("ip", "netns", "add", name)
                _do("ip", "-n", name, "link", "set", "lo", "up")
            ends = ("veth0", names[0]), ("veth0", names[1])
            _do("ip", "link", "add", *_at(*ends[0]), "type", "veth", "peer", "name", *_at(*ends[1]))
            for (device, name), address in zip(ends, addresses, strict=True):
                _do("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
                _do("ip", "-n", name, "link", "set", device, "up")
                _do("tc", "-n", name, "qdisc", "add", "dev", device, "root", *_discipline(wire))
            yield Hosts(names, addresses, agent)
        finally:
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


@cache
def has_netem() -> bool:
    """Whether the kernel can delay packets; it can hold them back to a rate without."""
    name = f"gpp{os.getpid()}n"
    try:
        _do("ip", "netns", "add", name)
        _do("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
        return True
    except (subprocess.CalledProcessError, OSError):
        return False
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _at(device: str, namespace: str) -> Sequence[str]:
    return (device, "netns", namespace)


def _discipline(wire: Wire) -> Sequence[str]:
    bits = f"{wire.rate * 8:.0f}bit"
    if has_netem():
        return ("netem", "delay", f"{wire.delay * 1e6:.0f}us", "rate", bits, "limit", "10000")
    if wire.delay:
        raise ValueError("this kernel has no netem: the link can have a rate, but no delay")
    return ("tbf", "rate", bits, "burst", "64kb", "latency", "1s")


def _agent(names: Sequence[str], addresses: Sequence[str]) -> str:
    """What mpirun calls as if it were ssh: an address and a command."""
    cases = "\n".join(f"{a}) name={n} ;;" for n, a in zip(names, addresses, strict=True))
    return (
        "#!/bin/sh\n"
        f"address=$1; shift\ncase $address in\n{cases}\n*) echo no host $address >&2; exit 1 ;;\nesac\n"
        "exec ip netns exec $name unshare -u sh -c \"hostname $name && exec sh -c '$*'\"\n"
    )


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
