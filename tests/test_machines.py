"""Several machines under torchrun: the same result as one, whatever happens to them or to the wires between."""

import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from conftest import ROOT, read_adapters
from machines import ip, machines, why_not
from safetensors.torch import load_file, save_file

import main
from fllama.checkpoints import find_fault
from fllama.runlog import read_losses, read_rounds

needs_machines = pytest.mark.skipif(bool(why_not()), reason=why_not())
FLAGS = "--num_clients 8 --num_rounds 12 --local_steps 2 --eval_rounds 6 --per_device_train_batch_size 1".split()
FLAGS += "--learning_rate 1e-2 --lora_dropout 0.1".split()
MEDIAN = "--aggregator median".split()  # has the same bits whoever plays whom
OWN_TRACEBACK = rf'File "{ROOT}/(main|federated|utils|fllama/)'  # libraries may lie in ROOT, too
# so that torchrun misses a machine soon, and the rest go on soon
SOON = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=4"


def outputs_of(processes, timeout=120):
    """Wait until torchrun has ended on all machines, and kill it if it does not; returns the outputs."""
    watch = threading.Timer(timeout, lambda: [process.kill() for process in processes])
    watch.start()
    with ThreadPoolExecutor() as pool:  # none of them waits for a reader
        outputs = list(pool.map(lambda process: process.communicate()[0], processes))
    watch.cancel()
    return outputs


def end(processes, timeout=120):
    """Wait for torchrun on all machines, which must succeed; returns the outputs."""
    outputs = outputs_of(processes, timeout)
    codes = [process.returncode for process in processes]
    assert codes == [0] * len(processes), "\n\n".join(output[-5000:] for output in outputs)
    return outputs


def wait_for_round(folder, number, processes):
    deadline = time.monotonic() + 90
    while not read_rounds(folder) or read_rounds(folder)[-1]["round"] < number:
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            raise AssertionError("\n\n".join(process.communicate()[0][-5000:] for process in processes))
        time.sleep(0.02)


def digests(folder, num_rounds=12):
    rounds = read_rounds(folder)
    assert [entry["round"] for entry in rounds] == list(range(1, num_rounds + 1))
    for client in range(8):
        assert len(read_losses(folder / f"client_{client}_train_loss.json")) == num_rounds
    return [entry["digest"] for entry in rounds]


def distance(folder, other):
    a, b = read_adapters(folder), read_adapters(other)
    return ((a - b).norm() / b.norm()).item()


def find_ranks(agent):
    return [child for child in psutil.Process(agent.pid).children(recursive=True) if "--num_clients" in child.cmdline()]


def assert_nobody_is_left(both):
    for name in both.names:
        assert not ip("ip", "netns", "pids", name).split()


@pytest.fixture(scope="module")
def one_machine(small_inputs, tmp_path_factory):
    """A function that returns the folder of a run of main.py alone with so many ranks; each is made once."""

    @functools.cache
    def run(world_size, more=""):
        folder = tmp_path_factory.mktemp("one")
        flags = [*FLAGS, *small_inputs, *more.split(), "--world_size", str(world_size)]
        main.main([*flags, "--output_dir", str(folder)])
        return folder

    return run


@pytest.fixture(scope="module")
def two_machines(small_inputs, tmp_path_factory):
    """(folder, outputs, bytes sent) of an undisturbed FedAvg run of two machines with a rank each."""
    folder = tmp_path_factory.mktemp("two")
    with machines(2) as both:
        outputs = end([both.torchrun(i, *FLAGS, *small_inputs, "--output_dir", folder) for i in (0, 1)])
        return folder, outputs, [both.sent(i) for i in (0, 1)]


# -----------------------------------------------------------------------------
# undisturbed


@needs_machines
@pytest.mark.slow
def test_same_result_as_one_machine(two_machines, one_machine):
    folder, outputs, _ = two_machines
    assert distance(folder, one_machine(2)) <= 1e-5
    assert len(set(digests(folder))) == 12
    assert "2 rank(s) on 2 machines" in outputs[0] and "round 12/12" in outputs[0]
    assert not re.search("round|rows|clients", outputs[1])  # one machine speaks for all
    for name in ("round_00011", "round_00012"):
        assert find_fault(folder / "checkpoints" / name) is None
    assert not list(folder.glob(".*"))


@needs_machines
@pytest.mark.slow
def test_bytes_between_machines(two_machines):
    """FedAvg: 8 bytes for each number of the adapter, 4 to where the sums are formed and 4 back."""
    folder, _, sent = two_machines
    parameters = read_adapters(folder).numel()
    reported = [entry["bytes_between_machines"] for entry in read_rounds(folder)]
    # for the aggregation error, half of 8 adapters of one projection, (16, 64) and (64, 16), in evaluated rounds
    evaluated = 8 * parameters + 8 * 2 * 16 * 64 * 4 // 2
    assert reported == ([8 * parameters] * 5 + [evaluated]) * 2
    assert sum(reported) < sum(sent) < 1.3 * sum(reported) + 0.5e6  # on the wire, with all headers and messages


@needs_machines
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "more"), [(1, "--aggregator median --lora_variant fedsa"), (2, "--scaffold")])
def test_more_strategies_and_ranks(one_machine, small_inputs, tmp_path, ranks, more):
    """Beside torchrun's own stores, nobody listens on more than the address by which machines reach each other."""
    with machines(2) as both:
        flags = [*FLAGS, *small_inputs, *more.split(), "--output_dir", tmp_path]
        started = [both.torchrun(i, *flags, ranks=ranks) for i in (0, 1)]
        wait_for_round(tmp_path, 2, started)
        store = find_ranks(started[0])[0].environ()["MASTER_PORT"]
        listening = [ip("ss", "-Hltn", namespace=name).splitlines() for name in both.names]
        sockets = [{line.split()[3] for line in lines} - {"*:29400", f"*:{store}"} for lines in listening]
        end(started)
    for i in (0, 1):
        assert len(sockets[i]) >= ranks
        assert {address.rpartition(":")[0] for address in sockets[i]} == {both.address(i)}
    assert distance(tmp_path, one_machine(2 * ranks, more)) <= (0 if "median" in more else 1e-5)
    if "median" in more:
        assert digests(tmp_path) == digests(one_machine(2 * ranks, more))


@needs_machines
@pytest.mark.slow
def test_clients_that_are_found_in_the_data(small_inputs, tmp_path):
    """A client of each of two sites; how many there are is known late. Only rank 0 needs the rows."""
    lines = [json.loads(line) for line in open(small_inputs[3])]
    rows = [line | {"site": "north" if i % 3 else "south"} for i, line in enumerate(lines)]
    (tmp_path / "sites.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*FLAGS[2:], *small_inputs[:2], "--partition", "column", "--partition_column", "site"]
    with machines(2) as both:
        paths = [tmp_path / "sites.jsonl", tmp_path / "missing.jsonl"]
        more = ["--num_rounds", "3", "--output_dir", tmp_path / "out", "--dataset_path"]
        end([both.torchrun(i, *flags, *more, paths[i]) for i in (0, 1)])
    rounds = read_rounds(tmp_path / "out")
    assert len(rounds) == 3 and all(r["bytes_between_machines"] > 0 and r["clients"] == [0, 1] for r in rounds)


# -----------------------------------------------------------------------------
# what happens to ranks, agents and jobs


@needs_machines
@pytest.mark.slow
def test_killed_rank(two_machines, small_inputs, tmp_path):
    """torchrun's --max_restarts: from the last complete round, to the same bits."""
    with machines(2) as both:
        flags = [*FLAGS, *small_inputs, "--output_dir", tmp_path]
        started = [both.torchrun(i, *flags, more=["--max_restarts", "1"]) for i in (0, 1)]
        wait_for_round(tmp_path, 4, started)
        (rank,) = find_ranks(started[1])
        rank.kill()
        outputs = end(started)
    assert re.search(r"resuming after round \d+ of 12", outputs[0])
    assert digests(tmp_path) == digests(two_machines[0])


@needs_machines
@pytest.mark.slow
def test_a_machine_is_lost_and_comes_back(one_machine, small_inputs, tmp_path):
    """The other one plays all clients meanwhile. When that is back, they finish the round, save, share again."""
    median = [*MEDIAN, "--num_rounds", "100", "--eval_rounds", "50"]
    with machines(2) as both:

        def start(i):
            flags = [*FLAGS, *median, *small_inputs, "--output_dir", tmp_path]
            return both.torchrun(i, *flags, nodes="1:2", conf=SOON, more=["--max_restarts", "3"])

        started = [start(0), start(1)]
        wait_for_round(tmp_path, 3, started)
        workers = find_ranks(started[1])
        started[1].kill()
        psutil.wait_procs(workers, timeout=10)
        assert workers and not any(worker.is_running() for worker in workers)  # an agent that is killed leaves nobody
        wait_for_round(tmp_path, read_rounds(tmp_path)[-1]["round"] + 3, started[:1])
        outputs = end([started[0], start(1)])
        assert_nobody_is_left(both)
    assert "1 rank(s)" in outputs[0] and outputs[0].count("2 rank(s) on 2 machines") == 2
    assert "finishing the round and saving" in outputs[0]
    undisturbed = one_machine(2, " ".join(median))
    assert digests(tmp_path, 100) == digests(undisturbed, 100)
    assert torch.equal(read_adapters(tmp_path), read_adapters(undisturbed))


@needs_machines
@pytest.mark.slow
def test_a_job_is_stopped(two_machines, small_inputs, tmp_path):
    """By SIGTERM to all machines, then by Ctrl-C on one: the round under way is finished and saved."""
    with machines(2) as both:

        def start():
            return [both.torchrun(i, *FLAGS, *small_inputs, "--output_dir", tmp_path) for i in (0, 1)]

        for number, stop in ((3, signal.SIGTERM), (6, signal.SIGINT)):
            started = start()
            wait_for_round(tmp_path, number, started)
            for process in started if stop == signal.SIGTERM else started[:1]:
                os.killpg(process.pid, stop)
            outputs = outputs_of(started, timeout=40)
            assert all(process.returncode for process in started)
            assert_nobody_is_left(both)
            said = r"finishing the round and saving \(a round takes about \d+ s\); torchrun waits 30 s for it"
            assert re.search(said, outputs[0])
            last = read_rounds(tmp_path)[-1]["round"]
            assert number <= last < 12 and find_fault(tmp_path / "checkpoints" / f"round_{last:05d}") is None
            assert not (tmp_path / "federated_global_model").exists()
        outputs = end(start())
    assert f"resuming after round {last} of 12" in outputs[0]
    assert digests(tmp_path) == digests(two_machines[0])


# -----------------------------------------------------------------------------
# what happens to the wires


@needs_machines
@pytest.mark.slow
def test_cut_for_20_seconds(two_machines, small_inputs, tmp_path):
    with machines(2) as both:
        started = [both.torchrun(i, *FLAGS, *small_inputs, "--output_dir", tmp_path) for i in (0, 1)]
        wait_for_round(tmp_path, 4, started)
        both.cut(1)
        time.sleep(20)
        number = len(read_rounds(tmp_path))
        both.cut(1, "up")
        end(started)
    assert number < 12 and digests(tmp_path) == digests(two_machines[0])


@needs_machines
@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0])
def test_cut_for_good(one_machine, small_inputs, tmp_path, lost):
    """After --timeout, the machine with the agents' store goes on alone, also if the other one had rank 0."""
    left = 1 - lost
    with machines(2) as both:
        flags = [*FLAGS, *MEDIAN, *small_inputs, "--timeout", "0.2", "--output_dir", tmp_path]
        more = {"nodes": "1:2", "conf": SOON, "more": ["--max_restarts", "3"], "store": left}
        started = [both.torchrun(i, *flags, **more) for i in (0, 1)]
        wait_for_round(tmp_path, 3, started)
        both.cut(lost)
        (output,) = end([started[left]])
    assert "--timeout" in output
    assert digests(tmp_path) == digests(one_machine(2, " ".join(MEDIAN)))


@needs_machines
@pytest.mark.slow
def test_far_apart_over_a_bad_line(two_machines, small_inputs, tmp_path):
    """100 ms there and back, and 1% of the packets are lost."""
    with machines(2) as both:
        both.disturb(50, 1)
        assert both.round_trip() > 0.1
        flags = [*FLAGS, *small_inputs, "--output_dir", tmp_path]
        end([both.torchrun(i, *flags) for i in (0, 1)], timeout=200)
    assert digests(tmp_path) == digests(two_machines[0])
    far, near = read_rounds(tmp_path), read_rounds(two_machines[0])
    assert [r["bytes_between_machines"] for r in far] == [r["bytes_between_machines"] for r in near]
    assert all(r["seconds"]["average"] > 0.1 for r in far)


# -----------------------------------------------------------------------------
# what is refused


def assert_refused(both, flags, pattern, folders, **more):
    """Both machines, each with its flags, end over one line that fits the pattern, and write nothing into `folders`."""
    started = [both.torchrun(i, *flags[i], **{name: values[i] for name, values in more.items()}) for i in (0, 1)]
    outputs = outputs_of(started, timeout=100)
    assert [process.returncode in (1, 2) for process in started] == [True, True], "\n\n".join(outputs)
    lines = [line for output in outputs for line in output.splitlines() if line.startswith("main.py: ")]
    assert len(lines) == 1 and re.fullmatch(f"main.py: error: {pattern}", lines[0]), "\n\n".join(outputs)
    for output in outputs:
        assert not re.search(OWN_TRACEBACK, output), output  # no traceback but torchrun's own
    for folder in folders:
        assert not folder.exists() or not list(folder.iterdir())
    assert_nobody_is_left(both)


@needs_machines
@pytest.mark.slow
@pytest.mark.parametrize("what", ["flag", "model", "output_dir", "mount"])
def test_machines_that_disagree(small_inputs, tmp_path, what):
    out, other = tmp_path / "out", tmp_path / "other"
    usual = [*FLAGS, *small_inputs, "--output_dir", out]
    first, second, prefix = usual, list(usual), ()
    both_machines = r"on all machines: machine 0 \(\S+\) {}, machine 1 \(\S+\) {}"
    if what == "flag":
        second += ["--seed", "7"]
        pattern = "--seed is not the same " + both_machines.format("42", "7")
    elif what == "model":
        shutil.copytree(small_inputs[1], other)
        tensors = load_file(other / "model.safetensors")
        save_file(
            {name: tensor + 1e-3 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"}
        )
        second += ["--model_name", other]
        pattern = "--model_name: the digest of the model is not the same " + both_machines.format(r"\w{8}", r"\w{8}")
    elif what == "output_dir":
        other.mkdir()
        second += ["--output_dir", other]
        pattern = "--output_dir is not the same " + both_machines.format(out, other)
    else:
        out.mkdir()
        prefix = ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', out]
        pattern = rf"--output_dir {out} is not one folder for all machines: machine 1 \(\S+\) has another; .*"
    with machines(2) as both:
        folders = [out] if what == "model" else [out, other]
        assert_refused(both, [first, second], pattern, folders, prefix=[(), prefix])


@needs_machines
@pytest.mark.slow
def test_shared_store_is_refused(small_inputs, tmp_path):
    """PyTorch 2.13 does not let ranks that start again into torchrun's own store."""
    pattern = ".*: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 first"
    flags = [*FLAGS, *small_inputs, "--output_dir", tmp_path / "out"]
    with machines(2) as both:
        started = [both.torchrun(i, *flags, sharing=True) for i in (0, 1)]
        for output in outputs_of(started, timeout=100):
            lines = [line for line in output.splitlines() if line.startswith("main.py: ")]
            assert len(lines) == 1 and re.fullmatch(f"main.py: error: {pattern}", lines[0]), output
    assert all(process.returncode == 1 for process in started) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shared", "machines", "restarts", "refused"),
    [("True", 1, 0, False), ("True", 2, 0, True), ("True", 1, 1, True), ("False", 2, 3, False), (None, 1, 0, False)],
)
def test_which_stores_are_refused(monkeypatch, capsys, shared, machines, restarts, refused):
    from fllama.machines import check_store

    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    if shared:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(machines))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))
    if not refused:
        check_store()
        return
    with pytest.raises(SystemExit) as stop:
        check_store()
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@needs_machines
@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_full_disk(small_inputs, tmp_path, number):
    """What machine 0 says is heard, though torchrun ends all its ranks with the first that ends."""
    out = tmp_path / "out"
    out.mkdir()
    ip("mount", "-t", "tmpfs", "-o", "size=16k", "none", out)
    try:
        with machines(number) as each:
            flags = [*FLAGS, *small_inputs, "--output_dir", out]
            started = [each.torchrun(i, *flags, ranks=2 // number) for i in range(number)]
            outputs = outputs_of(started, timeout=100)
    finally:
        ip("umount", out)
    assert all(process.returncode == 1 for process in started)
    assert "main.py: cannot write: [Errno 28] No space left on device" in outputs[0]
    assert sum(output.count("main.py: cannot write") for output in outputs) == 1
    for output in outputs:
        assert not re.search(OWN_TRACEBACK, output), output  # no traceback but torchrun's own


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--world_size 3", "--world_size 3: torchrun has started 4 ranks; leave it out"),
        ("--num_clients 3", "torchrun has started 4 ranks for 3 clients; lower --nproc_per_node or --nnodes"),
        ("--overwrite", "--overwrite is not for torchrun, which may start a run many times; leave it out, or"),
        ("--compare local,fedavg", "--compare is not for torchrun"),
        ("--restarts 1", "--restarts is not for torchrun"),
        ("--backend nccl", "--backend nccl: 0 GPUs for 2 ranks"),
    ],
)
def test_flags_under_torchrun(monkeypatch, capsys, flags, message):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    args = main.parse_args([])
    assert (args.world_size, args.num_clients, args.save_rounds) == (4, 4, 1)
    with pytest.raises(SystemExit) as stop:
        main.parse_args(flags.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


# -----------------------------------------------------------------------------
# one machine, and Slurm


def test_standalone(small_inputs, tmp_path):
    """torchrun on one machine needs no variable, and its ranks listen on loopback only."""
    flags = [*FLAGS[2:], *small_inputs, "--num_rounds", "6", "--num_clients", "2", "--output_dir", tmp_path]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {name: value for name, value in os.environ.items() if "TORCH_DISABLE_SHARE" not in name}
    process = subprocess.Popen(
        list(map(str, [*command, ROOT / "main.py", *flags])),
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for_round(tmp_path, 1, [process])
    ranks = find_ranks(process)
    sockets = [socket for rank in ranks for socket in rank.net_connections(kind="inet")]
    (output,) = end([process])
    listening = {socket.laddr.ip.removeprefix("::ffff:") for socket in sockets if socket.status == psutil.CONN_LISTEN}
    assert len(ranks) == 2 and listening and listening <= {"127.0.0.1", "::1"}
    assert "gloo, 2 rank(s)\n" in output and "round 6/6" in output
    assert [entry["bytes_between_machines"] for entry in read_rounds(tmp_path)] == [0] * 6


def test_slurm_script_of_the_docs():
    """Its flags are torchrun's and main.py's."""
    from torch.distributed.run import get_args_parser

    text = (ROOT / "docs" / "machines.md").read_text()
    (script,) = [block for block in re.findall(r"```bash\n(.*?)```", text, re.S) if "#SBATCH" in block]
    assert "--ntasks-per-node=1" in script and "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in script
    _, *words = shlex.split(script.replace("\\\n", " ").partition("srun ")[2], comments=True)
    place = words.index("main.py")
    parsed = get_args_parser().parse_args(words[: place + 1])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_backend) == ("2", "8", "c10d")
    assert parsed.max_restarts == 3 and parsed.rdzv_endpoint == "$first:29400"
    assert "first=$(scontrol show hostnames" in script and "--nodes=2" in script and "--gpus-per-node=8" in script
    args = main.parse_args(["--world_size", "16", *words[place + 1 :]])
    assert args.num_clients == 16 and args.model_name == "meta-llama/Llama-3.1-8B-Instruct"
