"""Several machines under torchrun: the same result as one, whatever happens to them or to the wires between."""

import argparse
import functools
import json
import re
import shlex
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, read_adapters
from machines import ip, machines, why_not

import federated
import main
import utils

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
FLAGS = "--num_clients 8 --num_rounds 12 --local_steps 2 --eval_rounds 6 --per_device_train_batch_size 1".split()
FLAGS += "--learning_rate 1e-2 --lora_dropout 0.1".split()
# so that a machine is missed soon, and the rest go on soon
SOON = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=4"
SHORT_SILENCE = "import federated, main\nfederated.BEAT, federated.SILENCE = 1, 8\nmain.main()\n"


def end(processes, timeout=150):
    """Wait for torchrun on all machines; returns their outputs."""
    watch = threading.Timer(timeout, lambda: [process.kill() for process in processes])
    watch.start()
    with ThreadPoolExecutor() as pool:  # none of them waits for a reader
        outputs = list(pool.map(lambda process: process.communicate()[0], processes))
    watch.cancel()
    codes = [process.returncode for process in processes]
    assert codes == [0] * len(processes), "\n\n".join(output[-5000:] for output in outputs)
    return outputs


def wait_for_round(folder, number):
    deadline = time.monotonic() + 120
    while len(utils.read_rounds(folder)) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def digests(folder, number=12):
    rounds = utils.read_rounds(folder)
    assert [entry["round"] for entry in rounds] == list(range(1, number + 1))
    return [entry["digest"] for entry in rounds]


def distance(folder, other):
    a, b = read_adapters(folder), read_adapters(other)
    return ((a - b).norm() / b.norm()).item()


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
    """(folder, outputs, bytes sent) of an undisturbed FedAvg run of two machines with a rank and a disk each."""
    folder = tmp_path_factory.mktemp("two")
    with machines(2) as both:
        started = [
            both.torchrun(i, *FLAGS, *small_inputs, "--output_dir", folder / str(i), sharing=True) for i in (0, 1)
        ]
        outputs = end(started)
        return folder, outputs, [both.sent(i) for i in (0, 1)]


def test_same_result_as_one_machine(two_machines, one_machine):
    folder, outputs, _ = two_machines
    assert distance(folder / "0", one_machine(2)) <= 1e-5
    assert len(set(digests(folder / "0"))) == 12
    assert "2 rank(s) on 2 machines" in outputs[0] and "round 12/12" in outputs[0]
    assert not re.search("round|rows|clients", outputs[1])  # one machine speaks for all


def test_bytes_between_machines(two_machines, small_inputs):
    """FedAvg: 8 bytes for each number of the adapter from machine to machine, and a copy of the new checkpoint."""
    folder, _, sent = two_machines
    parameters = read_adapters(folder / "0").numel()
    reported = [entry["bytes_between_machines"] for entry in utils.read_rounds(folder / "0")]
    copied = sum(path.stat().st_size for path in (folder / "0" / "checkpoints" / "round_00012").glob("*.pt"))
    averaged = [number - copied for number in reported]
    assert all(abs(number - 8 * parameters) < 0.05 * copied for number in averaged[:5])
    # for the aggregation error, half of 8 adapters of one projection, (16, 64) and (64, 16), in evaluated rounds
    assert averaged[5] - averaged[0] == 8 * 2 * 16 * 64 * 4 / 2
    assert sum(reported) < sum(sent) < 1.3 * sum(reported) + 2e6  # on the wire, with all headers and words


def test_every_disk_has_the_checkpoints(two_machines):
    folder, _, _ = two_machines
    for name in ("round_00011", "round_00012"):
        first, second = (folder / i / "checkpoints" / name for i in "01")
        assert utils.find_fault(first) is None and utils.find_fault(second) is None
        assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()
    assert not list(folder.glob("*/.*")) and not (folder / "1" / "federated_global_model").exists()


@pytest.mark.parametrize(("ranks", "more"), [(2, "--aggregator median --lora_variant fedsa"), (4, "--scaffold")])
def test_more_ranks_and_one_disk(one_machine, small_inputs, tmp_path, ranks, more):
    """The agents meet in a store of ours on a third machine, and nobody listens on more than one address."""
    with machines(2) as both:
        server = both.start(None, sys.executable, ROOT / "main.py", "--rendezvous", "10.77.0.254:29555")
        while "--rdzv_endpoint 10.77.0.254:29555" not in server.stdout.readline():
            assert server.poll() is None
        flags = [*FLAGS, *small_inputs, *more.split(), "--output_dir", tmp_path]
        started = [both.torchrun(i, *flags, ranks=ranks, store="10.77.0.254:29555") for i in (0, 1)]
        wait_for_round(tmp_path, 2)
        listening = [ip("ss", "-Hltn", namespace=name).splitlines() for name in (both.switch, *both.names)]
        addresses = [{line.split()[3].rpartition(":")[0] for line in lines} for lines in listening]
        assert addresses == [{"10.77.0.254"}, {"10.77.0.1"}, {"10.77.0.2"}]
        end(started)
    assert distance(tmp_path, one_machine(2 * ranks, more)) <= (0 if "median" in more else 1e-5)
    if "median" in more:
        assert digests(tmp_path) == digests(one_machine(2 * ranks, more))


def test_clients_that_are_found_in_the_data(small_inputs, tmp_path):
    """A client of each of two sites; how many there are is known late."""
    flags = [*FLAGS[2:], *small_inputs, "--partition", "column", "--partition_column", "site"]
    with machines(2) as both:
        end([both.torchrun(i, *flags, "--num_rounds", "3", "--output_dir", tmp_path / f"{i}") for i in (0, 1)])
    rounds = utils.read_rounds(tmp_path / "0")
    assert len(rounds) == 3 and all(r["bytes_between_machines"] > 0 and r["clients"] == [0, 1] for r in rounds)


# -----------------------------------------------------------------------------
# what happens to machines and wires


def test_killed_rank(two_machines, small_inputs, tmp_path):
    """torchrun's --max_restarts: from the last complete round, to the same bits; here with torchrun's own store."""
    with machines(2) as both:
        flags = [*FLAGS, *small_inputs, "--output_dir", tmp_path]
        started = [both.torchrun(i, *flags, more=["--max_restarts", "1"], sharing=True) for i in (0, 1)]
        wait_for_round(tmp_path, 4)
        (rank,) = find_ranks(started[1])
        rank.kill()
        outputs = end(started)
    assert re.search(r"resuming after round \d+ of 12", outputs[0])
    assert digests(tmp_path) == digests(two_machines[0] / "0")


def main_rank(agent):
    """The number of the one rank of an agent."""
    return int(find_ranks(agent)[0].environ()["RANK"])


def find_ranks(agent):
    return [child for child in psutil.Process(agent.pid).children(recursive=True) if "--num_clients" in child.cmdline()]


def test_a_machine_is_lost_and_comes_back(one_machine, small_inputs, tmp_path):
    """Each with a disk of its own. The other plays all clients, and the one that is back takes over its part."""
    (tmp_path / "impatient.py").write_text(SHORT_SILENCE)
    median = ["--aggregator", "median", "--num_rounds", "80"]  # has the same bits on any layout
    with machines(2) as both:

        def start(i):
            flags = [*FLAGS, *median, *small_inputs, "--output_dir", tmp_path / f"{i}"]
            more = ["--max_restarts", "3"]
            return both.torchrun(i, *flags, nodes="1:2", conf=SOON, more=more, script=tmp_path / "impatient.py")

        started = [start(0), start(1)]
        wait_for_round(tmp_path / "0", 3)
        workers = find_ranks(started[1])
        started[1].kill()
        psutil.wait_procs(workers, timeout=10)
        assert not any(worker.is_running() for worker in workers)  # an agent that is killed leaves nobody
        number = len(utils.read_rounds(tmp_path / "0"))
        wait_for_round(tmp_path / "0", number + 2)
        shutil.rmtree(tmp_path / "1")  # it comes back with nothing
        outputs = end([started[0], start(1)])
    assert "no sign of machine 1 for 8 seconds" in outputs[0] or "Connection" in outputs[0]
    assert "1 rank(s)" in outputs[0] and outputs[0].count("2 rank(s) on 2 machines") == 2
    undisturbed = one_machine(2, " ".join(median))
    assert digests(tmp_path / "0", 80) == digests(undisturbed, 80)
    assert torch.equal(read_adapters(tmp_path / "0"), read_adapters(undisturbed))


@pytest.mark.parametrize("beats", [0, 3])
def test_silence(monkeypatch, capsys, beats):
    """A machine is missed that falls silent, also one that does so before its first sign of life."""
    store, ended, start = dist.HashStore(), threading.Event(), time.monotonic()
    for name, seconds in {"BEAT": 0.05, "SILENCE": 0.5}.items():
        monkeypatch.setattr(federated, name, seconds)
    leaving = threading.Event()
    monkeypatch.setattr(federated, "LEAVING", leaving)
    monkeypatch.setattr(federated.os, "_exit", lambda code: (ended.set(), leaving.set()))
    args = argparse.Namespace(machines=[0, 0, 1], store=store)
    threading.Thread(target=federated.watch_machines, args=(0, args), daemon=True).start()
    for number in range(beats):
        store.set("alive/2", str(number))
        time.sleep(0.2)
    assert ended.wait(5) and time.monotonic() - start > 0.2 * max(beats - 1, 0) + 0.5
    assert "no sign of machine 1 for 0.5 seconds" in capsys.readouterr().err


def test_cut_for_20_seconds(two_machines, small_inputs, tmp_path):
    with machines(2) as both:
        started = [both.torchrun(i, *FLAGS, *small_inputs, "--output_dir", tmp_path) for i in (0, 1)]
        wait_for_round(tmp_path, 4)
        both.cut(1)
        time.sleep(20)
        number = len(utils.read_rounds(tmp_path))
        both.cut(1, "up")
        end(started)
    assert number < 12 and digests(tmp_path) == digests(two_machines[0] / "0")


def test_far_apart_over_a_bad_line(two_machines, small_inputs, tmp_path):
    """100 ms there and back, and 1% of the packets are lost. One word is always under way, also when the ranks end."""
    (tmp_path / "talkative.py").write_text("import federated, main\nfederated.BEAT = 0.001\nmain.main()\n")
    with machines(2) as both:
        both.disturb(50, 1)
        assert both.round_trip() > 0.1
        flags = [*FLAGS, *small_inputs, "--output_dir"]
        script = tmp_path / "talkative.py"
        end([both.torchrun(i, *flags, tmp_path / f"{i}", script=script) for i in (0, 1)], timeout=280)
    assert digests(tmp_path / "0") == digests(two_machines[0] / "0")
    far, near = (utils.read_rounds(folder / "0") for folder in (tmp_path, two_machines[0]))
    assert [r["bytes_between_machines"] for r in far] == [r["bytes_between_machines"] for r in near]
    assert all(r["seconds"]["average"] > 0.1 for r in far)


@pytest.mark.parametrize("lost", [1, 0])
def test_cut_for_good(one_machine, small_inputs, tmp_path, lost):
    """Even machine 0, which has the store of the ranks, where the agents meet on a third."""
    (tmp_path / "impatient.py").write_text(SHORT_SILENCE)
    with machines(2) as both:
        server = both.start(None, sys.executable, ROOT / "main.py", "--rendezvous", "10.77.0.254:29555")
        while "--rdzv_endpoint 10.77.0.254:29555" not in server.stdout.readline():
            assert server.poll() is None
        flags = [*FLAGS, "--aggregator", "median", *small_inputs]
        more = {"nodes": "1:2", "conf": SOON, "more": ["--max_restarts", "2"], "script": tmp_path / "impatient.py"}
        more["store"] = "10.77.0.254:29555"
        started = [both.torchrun(i, *flags, "--output_dir", tmp_path / f"{i}", **more) for i in (0, 1)]
        wait_for_round(tmp_path / "0", 3)
        ranks = {main_rank(process): i for i, process in enumerate(started)}
        first, second = ranks[0], ranks[1]  # torchrun may number the machines otherwise
        both.cut((first, second)[lost])
        left = (second, first)[lost]
        (output,) = end([started[left]])
    assert ("no sign of machine 1 for 8 seconds", "no answer from the store")[lost == 0] in output
    assert digests(tmp_path / f"{left}") == digests(one_machine(2, "--aggregator median"))
    assert len(json.loads((tmp_path / f"{left}" / "client_0_train_loss.json").read_text())) == 12


# -----------------------------------------------------------------------------
# what is refused


def test_machines_that_disagree(small_inputs, tmp_path):
    """Other rows on one of them; then another flag."""
    lines = open(small_inputs[3]).read().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    other = [*small_inputs[:3], str(tmp_path / "rows.jsonl")]
    cases = [
        (other, r"--dataset_path: the digest of the rows is not the same on all machines: machine 0 \(\S+\) \w{8}, "),
        ([*small_inputs, "--seed", "7"], r"--seed is not the same on all machines: machine 0 \(\S+\) 42, machine 1 "),
    ]
    for second, expected in cases:
        with machines(2) as both:
            started = [
                both.torchrun(i, *FLAGS, *flags, "--output_dir", tmp_path / f"{i}")
                for i, flags in enumerate((small_inputs, second))
            ]
            for process in started:
                output = process.communicate(timeout=60)[0]
                assert process.returncode == 1 and re.search(f"main.py: error: {expected}", output), output
        assert not (tmp_path / "0" / "config.json").exists()


def test_full_disk(small_inputs, tmp_path):
    """What machine 0 says is heard, though torchrun ends all its ranks with the first that ends."""
    ip("mount", "-t", "tmpfs", "-o", "size=16k", "none", tmp_path)
    try:
        with machines(1) as one:
            process = one.torchrun(0, *FLAGS, *small_inputs, "--output_dir", tmp_path, ranks=2)
            output = process.communicate(timeout=60)[0]
    finally:
        ip("umount", tmp_path)
    assert process.returncode == 1 and "main.py: cannot write: [Errno 28] No space left on device" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--world_size 3", "--world_size 3: torchrun has started 4 ranks; leave it out"),
        ("--num_clients 3", "torchrun has started 4 ranks for 3 clients; lower --nproc_per_node or --nnodes"),
        ("--overwrite", "--overwrite is not for torchrun, which may start a run many times; leave it out, or"),
        ("--compare local,fedavg", "--compare is not for torchrun"),
        ("--backend nccl", "--backend nccl: 0 GPUs for 2 ranks"),
    ],
)
def test_flags_under_torchrun(monkeypatch, capsys, flags, message):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main.parse_args(["--world_size", "4"]).num_clients == 4
    with pytest.raises(SystemExit):
        main.parse_args(flags.split())
    assert message in capsys.readouterr().err


def test_which_checkpoint_machines_have_together():
    """Files in the order of machines 0 and 1; the newest of which every file is somewhere, and of one seal."""
    sizes = {"a": 1, "b": 2}
    old, new = ["s", sizes, ["a", "b"]], ["t", sizes, ["a"]]
    assert utils.find_common([{}, {}]) is None
    assert utils.find_common([{"round_2": old, "round_3": new}, {"round_3": ["t", sizes, ["b"]]}]) == (
        "round_3", "t", sizes, {"a": [0], "b": [1]},
    )  # fmt: skip
    assert utils.find_common([{"round_2": old, "round_3": new}, {"round_3": ["u", sizes, ["b"]]}]) == (
        "round_2", "s", sizes, {"a": [0], "b": [0]},
    )  # fmt: skip


def test_slurm_script_of_the_readme():
    """Its flags are torchrun's and main.py's."""
    from torch.distributed.run import get_args_parser

    (script,) = [b for b in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "#SBATCH" in b]
    assert "--ntasks-per-node=1" in script and "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in script
    _, *words = shlex.split(script.replace("\\\n", " ").partition("srun ")[2])
    place = words.index("main.py")
    parsed = get_args_parser().parse_args(words[: place + 1])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_backend) == ("2", "8", "c10d")
    assert parsed.max_restarts == 3 and parsed.rdzv_endpoint == "$first:29400"
    assert "first=$(scontrol show hostnames" in script and "--nodes=2" in script and "--gpus-per-node=8" in script
    args = main.parse_args(["--world_size", "16", *words[place + 1 :]])
    assert args.num_clients == 16 and args.model_name == "meta-llama/Llama-3.1-8B-Instruct"
