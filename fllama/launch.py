"""One process per rank on this machine: their environment, watching them, stop requests, restarts."""

import contextlib
import ctypes
import math
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import torch.multiprocessing as mp

from fllama import checkpoints, gpus, runlog
from fllama.options import ASSETS, first_line

STOPPED = 143  # exit code of a rank that has finished its round and saved after a request to stop
PR_SET_PDEATHSIG = 1  # of the kernel's prctl.h
# with these in its environment, accelerate takes a rank for a DDP worker and averages every gradient
LAUNCHER_VARIABLES = """LOCAL_RANK RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT
PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK
OMPI_COMM_WORLD_LOCAL_SIZE MV2_COMM_WORLD_RANK MV2_COMM_WORLD_SIZE MV2_COMM_WORLD_LOCAL_RANK MV2_COMM_WORLD_LOCAL_SIZE
ACCELERATE_USE_CPU ACCELERATE_USE_FSDP ACCELERATE_USE_DEEPSPEED ACCELERATE_USE_PARALLELISM_CONFIG
ACCELERATE_MIXED_PRECISION ACCELERATE_DYNAMO_BACKEND ACCELERATE_TORCH_DEVICE""".split()
# for glibc: without it, a step on the CPU spends a tenth of its time on getting back pages that the last one has freed
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
MAKE_ROOM = "; make room on the disk of --output_dir"
LOST_RANK = "; another rank is gone, or took longer than --timeout"
ADVICE = {  # by a part of the message of an error in a rank
    "OutOfMemoryError": "; lower --per_device_train_batch_size, then --max_length, or --optim paged_adamw_32bit",
    "imed out waiting": LOST_RANK,  # these four are gloo's
    "pair closure": LOST_RANK,
    "onnection closed by peer": LOST_RANK,
    "onnection reset by peer": LOST_RANK,
    "PytorchStreamWriter failed": MAKE_ROOM,
    "unexpected pos": MAKE_ROOM,  # of the same writer
    "o space left": MAKE_ROOM,
    "File too large": MAKE_ROOM,
}


class EndRun(Exception):
    """Ends the run on all ranks, with an exit code and a sentence for the user."""

    def __init__(self, code, text):
        super().__init__(text)
        self.code, self.text = code, text


class StopRequest:
    """Whether this rank was asked to stop, by SIGTERM: the round under way is finished and saved first."""

    def __init__(self, announcement=None):
        """`announcement` is a function that returns what to say then, None if somebody else says it."""
        self.asked, self.announcement = False, announcement
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number, frame):
        if self.announcement and not self.asked:
            print(f"main.py: {self.announcement()}", file=sys.stderr, flush=True)
        self.asked = True

    def ignore(self):
        """From now on, SIGTERM ends the process at once."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# -----------------------------------------------------------------------------
# in the process of a rank


def isolate_rank(rank, args, run):
    """Give the process of one rank an environment of its own; before anything that reads it is imported."""
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    if run.num_gpus:
        rank_here = rank - run.machine_of_rank.index(run.machine_of_rank[rank])
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.visible_gpus(run.num_gpus)[rank_here % run.num_gpus]
    # unless torchrun's ranks have said otherwise, all are on this machine, and nobody else has to see them
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")  # without =, NCCL takes all names that begin like it


@dataclass
class ExitReport:
    """How a rank ended."""

    code: int = 0
    text: str = ""
    trace: str = ""
    time: float = 0.0


def run_and_report(rank, target, args, run, parent, writers):
    """Run one rank so that it dies with its parent, and reports its exit to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()  # the pipe covers the time before this, and this a rank that cannot look at its pipe
    if not run.num_gpus:  # the parent is the server, which lives as long as somebody can reach it
        os.close(multiprocessing.forkserver._forkserver._forkserver_alive_fd)
    threading.Thread(target=die_when_closed, args=(parent,), daemon=True).start()
    report = ExitReport()
    try:
        target(rank, args, run)
    except EndRun as ended:
        report = ExitReport(ended.code, ended.text)
    except BaseException as error:
        report = ExitReport(1, describe_error(error), traceback.format_exc()[-10_000:])
    flush_streams()
    report.time = time.time()
    writers[rank].send(report)  # from now on, the parent may end this process
    leave(report.code)


def flush_streams():
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


def leave(code):
    """End this process without destructors, which may wait for other ranks: NCCL's for up to --timeout minutes."""
    flush_streams()
    os._exit(code)


def describe_error(error):
    """Return what went wrong in a rank, in one line, with advice where there is some."""
    text = f"{type(error).__name__}: {first_line(error)}"
    for sign, advice in ADVICE.items():
        if sign in text:
            return text + advice
    return text


def die_with_parent():
    """Have the kernel, if that is Linux's, kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def die_when_closed(parent):
    """Wait until the other end of the pipe is closed, as it is when the parent ends, however it ends."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)


# -----------------------------------------------------------------------------
# in the parent


def start_imports():
    """On a machine without GPUs, start the process that all ranks are forked from: it imports what they need, once.

    It saves 6.5 CPU-seconds and 490 MB a rank.
    """
    os.environ |= KEEP_FREED_MEMORY | os.environ
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ASSETS.parent), os.environ.get("PYTHONPATH"))))
    multiprocessing.set_forkserver_preload(["federated"])
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers send it to all; ranks need the server to save
    multiprocessing.forkserver.ensure_running()
    signal.signal(signal.SIGTERM, handler)


def run_to_the_end(target, args, run):
    """Launch the ranks, again after a failure as often as --restarts says, each time from the last checkpoint.

    Ends the program with the exit code of the ranks unless all have finished.
    """
    folder = Path(args.output_dir)
    for attempt in range(args.restarts + 1):
        with tempfile.TemporaryDirectory(prefix="federated-") as rendezvous:  # output_dir may be on a network disk
            code, message = launch(target, args, replace(run, rendezvous=f"{rendezvous}/attempt_{attempt}"))
        if not code:
            return
        if code != 1:  # it would come to the same again
            print(f"main.py: {message}", file=sys.stderr)
            raise SystemExit(code)
        run = replace(run, checkpoint=checkpoints.find_newest(folder))
        where = f"after round {checkpoints.round_of(run.checkpoint)} of {args.num_rounds}"
        if attempt == args.restarts:
            advice = f"; --resume goes on {where}" if run.checkpoint else ""  # else it would come to the same
            print(f"main.py: {message}{advice}", file=sys.stderr)
            raise SystemExit(1)
        print(f"main.py: {message}; restart {attempt + 1} of {args.restarts} {where}", file=sys.stderr, flush=True)
        checkpoints.cut_back(folder, run.checkpoint)


def launch(target, args, run):
    """Run `target(rank, args, run)` in one process per rank; returns (exit code, message), (0, "") if all finished.

    On Ctrl-C or SIGTERM, all ranks finish the round under way and save; then the program ends.
    """
    parent, alive = multiprocessing.Pipe(duplex=False)  # nobody writes: its end tells the ranks that we have ended
    readers, writers = zip(*(multiprocessing.Pipe(duplex=False) for _ in range(args.world_size)))
    reports, processes = [None] * args.world_size, []
    try:
        processes = mp.start_processes(
            run_and_report,
            args=(target, args, run, parent, writers),
            nprocs=args.world_size,
            join=False,
            start_method="spawn" if run.num_gpus else "forkserver",
        ).processes
        for writer in writers:
            writer.close()
        asked = None
        try:
            wait_for_ranks(processes, readers, reports)
        except SystemExit as signalled:  # see main.stop
            asked = signalled
            message = f"{describe_stop(args)}; once more ends it at once"
            print(f"main.py: {message}", file=sys.stderr, flush=True)
        if asked or any(report and report.code == STOPPED for report in reports):  # of a signal to one rank alone
            wait_for_ranks(processes, readers, reports, stop=True)
        finished = all(report and report.code == 0 for report in reports)
        if asked:
            end_stopped(args, processes, reports, asked, finished)
        if finished:
            return 0, ""
        deadline = time.monotonic() + 1
        while not all(reports) and time.monotonic() < deadline:  # for those that fail over it to say so
            time.sleep(0.05)
            collect_reports(readers, reports)
        return describe_failure(processes, reports)
    finally:
        alive.close()
        for process in processes:
            process.kill()  # what is on disk is whole at any time
            process.join()


def describe_stop(args):
    """Say what a request to stop does, and how long a round takes at the moment."""
    rounds = runlog.read_rounds(args.output_dir)
    duration = "no round has ended yet"
    if rounds:
        duration = f"a round takes about {math.ceil(sum(rounds[-1]['seconds'].values()))} s"
    return f"finishing the round and saving ({duration})"


def wait_for_ranks(processes, readers, reports, stop=False):
    """Collect the exit reports until all are in, or a rank has ended otherwise than it should.

    Nobody waits for the process of a rank that has reported. With `stop`, ask all ranks to finish their round, save and
    end.
    """
    good = (0, STOPPED) if stop else (0,)
    if stop:
        for process in processes:
            process.terminate()
    while not all(reports):
        alive = [process.is_alive() for process in processes]
        collect_reports(readers, reports)  # a rank that had ended before has reported, or never will
        waiting = []
        for rank, report in enumerate(reports):
            if report is None and not alive[rank] or report and report.code not in good:
                return
            if report is None:
                waiting += [processes[rank].sentinel, readers[rank]]
        if waiting:
            multiprocessing.connection.wait(waiting)


def collect_reports(readers, reports):
    for rank, reader in enumerate(readers):
        with contextlib.suppress(EOFError, OSError):  # it ended without a report
            if reports[rank] is None and reader.poll():
                reports[rank] = reader.recv()


def end_stopped(args, processes, reports, asked, finished):
    """End the program after a request to stop, `asked`; says where the run goes on.

    Also where the run has just `finished`: a comparison would go on with the next one.
    """
    if finished:
        print("main.py: stopped, and this run has just finished", file=sys.stderr)
        raise asked
    if any(report and report.trace for report in reports):
        print(f"main.py: {describe_failure(processes, reports)[1]}", file=sys.stderr)
    newest = checkpoints.find_newest(args.output_dir)
    where = f"after round {checkpoints.round_of(newest)} of {args.num_rounds}"
    print(f"main.py: stopped; --resume goes on {where}", file=sys.stderr)
    raise asked


def describe_failure(processes, reports):
    """Return (exit code, message) of the rank that failed first: one without a report, or the first to report."""
    for rank, process in enumerate(processes):
        if reports[rank] is None and not process.is_alive():
            code = process.exitcode
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            hint = " (as the kernel does when memory runs out)" if code == -signal.SIGKILL else ""
            return 1, f"rank {rank} {how}{hint}"
    failed = [report for report in reports if report and report.code != 0]
    # rather one that did not end itself, and knows why
    first = min(failed, key=lambda report: (not report.trace, report.text.startswith("LostContact"), report.time))
    silent = [str(rank) for rank, report in enumerate(reports) if report is None]
    missing = f"; no report from rank {', '.join(silent)}" if silent else ""
    if first.code == STOPPED:
        return 1, first.text + (missing or ", and all have saved")
    if not first.trace:  # it has ended itself
        return first.code, first.text
    print(first.trace, file=sys.stderr)
    return 1, f"rank {reports.index(first)} failed: {first.text}{missing if 'imed out' in first.text else ''}"
