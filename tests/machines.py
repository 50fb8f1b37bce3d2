"""Machines on one machine: network namespaces, each with an address of its own on a switch between them."""

import contextlib
import os
import shutil
import subprocess
import sys
import uuid

from conftest import ROOT

os.environ["PATH"] += ":/usr/sbin:/sbin"  # where ip and tc are, which the PATH of a user may lack


def ip(*words, namespace=None):
    command = [*(["ip", "netns", "exec", namespace] if namespace else []), *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def why_not():
    """Return why there can be no namespaces here, "" where there can."""
    if not shutil.which("ip") or not shutil.which("tc"):
        return "needs ip and tc: apt install iproute2"
    try:
        ip("ip", "netns", "add", name := f"fed-{uuid.uuid4().hex[:6]}")
        ip("ip", "netns", "del", name)
        return ""
    except subprocess.CalledProcessError as error:
        return f"needs network namespaces: {error.stderr.strip()}"


class Machines:
    """`number` machines with the addresses 10.77.0.1, .2 and so on, and a switch, which is 10.77.0.254."""

    def __init__(self, number):
        self.tag, self.processes = uuid.uuid4().hex[:5], []
        self.names, self.switch = [f"fed-{self.tag}-{i}" for i in range(number)], f"fed-{self.tag}-s"
        for name in [*self.names, self.switch]:
            ip("ip", "netns", "add", name)
            ip("ip", "link", "set", "lo", "up", namespace=name)
        ip("ip", "link", "add", "bridge", "type", "bridge", namespace=self.switch)
        ip("ip", "address", "add", "10.77.0.254/24", "dev", "bridge", namespace=self.switch)
        ip("ip", "link", "set", "bridge", "up", namespace=self.switch)
        for i, name in enumerate(self.names):
            pair = ("type", "veth", "peer", "name", "eth0", "netns", name)
            ip("ip", "link", "add", f"port{i}", *pair, namespace=self.switch)
            ip("ip", "link", "set", f"port{i}", "master", "bridge", "up", namespace=self.switch)
            ip("ip", "address", "add", f"{self.address(i)}/24", "dev", "eth0", namespace=name)
            ip("ip", "link", "set", "eth0", "up", namespace=name)

    def address(self, i):
        return f"10.77.0.{i + 1}"

    def cut(self, i, state="down"):
        """Pull the plug of machine `i`, or put it in again."""
        ip("ip", "link", "set", f"port{i}", state, namespace=self.switch)

    def limit(self, rate):
        """Let no machine send, nor receive, more than `rate`, such as 100mbit."""
        for i, name in enumerate(self.names):
            for device, namespace in ((f"port{i}", self.switch), ("eth0", name)):
                queue = ("tbf", "rate", rate, "burst", "256kb", "latency", "400ms")
                ip("tc", "qdisc", "replace", "dev", device, "root", *queue, namespace=namespace)

    def disturb(self, milliseconds, loss):
        """Make what the two machines send each other arrive later, and `loss` percent of the packets not at all."""
        try:
            for i in range(2):
                queue = ("netem", "delay", f"{milliseconds}ms", "loss", f"{loss}%")
                ip("tc", "qdisc", "replace", "dev", f"port{i}", "root", *queue, namespace=self.switch)
        except subprocess.CalledProcessError:  # this kernel has no netem
            for i, name in enumerate(self.names):
                ip("ip", "link", "set", f"port{i}", "nomaster", namespace=self.switch)
                ip(sys.executable, ROOT / "tests" / "wire.py", "eth0", namespace=name)
            script = (sys.executable, ROOT / "tests" / "wire.py")
            wire = self.start(None, *script, "port0", "port1", milliseconds / 1000, loss / 100)
            assert wire.stdout.readline() == "ready\n"

    def sent(self, i):
        """Return how many bytes machine `i` has sent, with all headers."""
        statistics = ip("cat", "/sys/class/net/eth0/statistics/tx_bytes", namespace=self.names[i])
        return int(statistics)

    def round_trip(self):
        """Return how many seconds machine 0 waits until machine 1 has refused a connection."""
        script = "import socket, sys, time; t = time.time(); socket.socket().connect_ex((sys.argv[1], 9)); "
        command = (sys.executable, "-c", f"{script}print(time.time() - t)", self.address(1))
        return float(ip(*command, namespace=self.names[0]))

    def start(self, i, *command, **popen):
        """Start a command on machine `i`, or on the switch (None)."""
        namespace = self.switch if i is None else self.names[i]
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *map(str, command)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **popen,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def torchrun(self, i, *flags, nodes=None, ranks=1, store=0, sharing=False, more=(), conf="", prefix=()):
        """Start main.py under torchrun on machine `i`; the agents meet in a store on machine `store`.

        With `sharing`, the ranks meet in that store, too, as torchrun does by default; without, rank 0 has another.
        """
        meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{self.address(store)}:29400", "--rdzv_id", self.tag]
        command = [*prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes or len(self.names), *meet]
        host = f"is_host={int(i == store)}"  # which it finds out by names, and these machines have none
        command += ["--rdzv_conf", ",".join(filter(None, [host, conf])), "--local_addr", self.address(i)]
        command += ["--nproc_per_node", ranks, *more, ROOT / "main.py", *flags]
        return self.start(i, *command, env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(not sharing))})

    def close(self):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
        for name in [*self.names, self.switch]:
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in ip("ip", "netns", "pids", name).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), 9)
            ip("ip", "netns", "del", name)


@contextlib.contextmanager
def machines(number):
    made = Machines(number)
    try:
        yield made
    finally:
        made.close()
