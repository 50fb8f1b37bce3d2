"""Being one of torchrun's ranks, on one machine or several with one --output_dir."""

import contextlib
import datetime
import fcntl
import os
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from fllama import basemodel, checkpoints, gpus, options
from fllama.launch import STOPPED, EndRun, describe_error, die_with_parent, leave
from fllama.options import fail

SIOCGIFADDR = 0x8915  # of the kernel's sockios.h: the address of a network interface
LOCAL_FLAGS = "model_name dataset_path".split()  # that may differ between machines


def quiet_but_first():
    """Let only the first rank of each machine speak: all read the same flags."""
    if int(os.environ["LOCAL_RANK"]) > 0:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (as long as the process lives, or until `join`)


def join(args, num_gpus, prepared_run, target):
    """Be a rank of torchrun: check and prepare together with the others, then run `target(rank, args, run)`.

    Rank 0 finds and tokenizes the rows for all, into --output_dir, which all machines must see; the first rank of each
    machine finds the model there. A run that is in output_dir is gone on with: torchrun ends all ranks, and starts them
    anew, when one of them fails, or a machine comes or goes. `prepared_run` is main.prepared_run. Returns whether this
    rank has finished the run and may publish it.
    """
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    other_machine = rank > 0 and local_rank == 0  # that of rank 0 is checked by prepared_run
    check_of_gpus = gpus.start_check(num_gpus, options.ranks_here(args)) if other_machine else None
    die_with_parent()  # an agent that is killed leaves nobody
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))  # of Ctrl-C, torchrun sends that
    check_store()
    choose_interface()
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=args.timeout))
    meeting = Meeting()
    sys.stderr = sys.__stderr__

    flags = checkpoints.make_config(args)
    hosts = meeting.share(
        lambda: {"host": socket.gethostname(), "machine": int(os.environ["GROUP_RANK"]), "flags": flags}
    )
    meeting.share(lambda: check_flags(hosts) if rank == 0 else None)
    with contextlib.ExitStack() as stack:
        share_output_dir(args, rank, hosts, meeting, stack)
        args.resume = (Path(args.output_dir) / "config.json").exists()
        models = meeting.share(lambda: find_model_here(args, local_rank))  # (folder, digest) from first ranks
        meeting.share(lambda: check_models(hosts, models) if rank == 0 else None)
        meeting.share(lambda: gpus.finish_check(check_of_gpus))
        run, args = meeting.share(lambda: prepare_for_all(args, rank, prepared_run, stack))[0]
        if run is None:
            return rank == 0
        machine_of_rank = tuple(host["machine"] for host in hosts)
        model_path, _ = models[rank - local_rank]
        run = replace(run, model_path=model_path, machine_of_rank=machine_of_rank, num_gpus=num_gpus)
        try:
            target(rank, args, run)
        except EndRun as ended:
            say_why(rank, ended)
            stack.close()
            leave(ended.code)
        except Exception as error:
            traceback.print_exc()
            print(f"main.py: rank {rank} failed: {describe_error(error)}", file=sys.stderr)
            stack.close()
            leave(1)
        return rank == 0


def say_why(rank, ended):
    """Say how the run has ended, in time: torchrun ends all ranks with the first one."""
    if ended.code == STOPPED:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)  # seconds: torchrun is about to end this rank, too, and takes an end before that for a failure
    elif rank == 0:
        print(f"main.py: {ended.text}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # seconds: for rank 0 to say it


# -----------------------------------------------------------------------------
# preparing together


class Meeting:
    """Small messages of all ranks during the preparation, in which one may wait for hours for a download."""

    def __init__(self):
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))

    def share(self, function):
        """Call `function` on every rank; returns the results of all, and ends all ranks if it failed on one."""
        result, failure = None, None
        try:
            result = function()
        except BaseException as error:  # the others have to hear of it; this rank says why
            failure = error
        results = [None] * dist.get_world_size()
        dist.all_gather_object(results, (result, failure is not None), group=self.group)  # all ranks participate
        if failure:
            raise failure
        if any(failed for _, failed in results):
            time.sleep(2)  # seconds: torchrun ends all ranks with the first, which is to be the one that has said why
            raise SystemExit(1)
        return [result for result, _ in results]


def find_model_here(args, local_rank):
    """Find the model on this machine, on its first rank; returns (folder, digest), None on the others."""
    if local_rank > 0:
        return None
    model_path, _, _ = basemodel.find_model(args)
    return model_path, basemodel.digest_of_model(model_path)


def prepare_for_all(args, rank, prepared_run, stack):
    """Prepare the run on rank 0; returns (Run, flags). What has to be undone at the end goes on `stack`."""
    run = stack.enter_context(prepared_run(args)) if rank == 0 else None
    args.hf_token = None  # the ranks read from this disk only
    return run, args


def share_output_dir(args, rank, hosts, meeting, stack):
    """Make --output_dir, and refuse to start if it is not one folder for all machines."""
    folder = Path(args.output_dir)

    def make():
        if rank > 0:
            return None
        stack.enter_context(checkpoints.locked_output_dir(folder))
        mark = files.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".here-"))
        return Path(mark.name).name

    with contextlib.ExitStack() as files:
        mark = meeting.share(make)[0]
        seen = meeting.share(lambda: (folder / mark).exists())

    def check():
        for host, sees in zip(hosts, seen):
            if rank == 0 and not sees:
                machine = f"machine {host['machine']} ({host['host']})"
                problem = f"--output_dir {folder} is not one folder for all machines: {machine} has another"
                fail(f"{problem}; name one that all share")

    meeting.share(check)


def check_flags(hosts):
    """Refuse machines that were started with other flags."""
    for name in hosts[0]["flags"]:
        if name not in LOCAL_FLAGS:
            refuse_differences(f"--{name} is not the same", hosts, [host["flags"][name] for host in hosts])


def check_models(hosts, models):
    """Refuse machines that have another model; `models` has (folder, digest) from the first rank of each."""
    first_hosts, digests = [], []
    for host, model in zip(hosts, models):
        if model:
            first_hosts.append(host)
            digests.append(model[1][:8])
    refuse_differences("--model_name: the digest of the model is not the same", first_hosts, digests)


def refuse_differences(what, hosts, values):
    if all(value == values[0] for value in values):
        return
    by_machine = {f"machine {host['machine']} ({host['host']})": value for host, value in zip(hosts, values)}
    found = ", ".join(f"{machine} {value}" for machine, value in by_machine.items())
    fail(f"{what} on all machines: {found}")


# -----------------------------------------------------------------------------
# the network


def check_store():
    """Refuse torchrun's shared store if ranks may be started again: PyTorch 2.13 does not let them in."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    several = int(os.environ["GROUP_WORLD_SIZE"]) > 1
    if shared and (several or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0):
        fail(
            "torchrun's ranks cannot start again in its shared store: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 first"
        )


def choose_interface():
    """Let gloo and NCCL use the network interface by which this machine reaches the first one; loopback if alone."""
    if {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} <= set(os.environ):
        return
    interface = "lo"
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        interface = find_interface(os.environ["MASTER_ADDR"])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without =, NCCL takes all names that begin like it


def find_interface(address):
    """Return the name of the network interface by which this machine reaches `address`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((socket.gethostbyname(address), 9))  # sends nothing
        except OSError as error:
            fail(f"{address}, as torchrun calls the first machine, is unknown here ({error}): give it --local_addr")
        own_address = probe.getsockname()[0]
        if own_address.startswith("127."):
            fail(f"{address} is this machine only to itself: give torchrun --local_addr and an address that all reach")
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                request = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(request[20:24]) == own_address:
                    return name
    fail(f"no interface has {own_address} as its first address: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME")
