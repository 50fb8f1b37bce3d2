"""Whatever happens to a run: a finished model, or a clear sentence and a run that goes on with the same bits."""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import report
import torch
from conftest import ROOT, SMALL_RUN, read_adapters, write_rows
from safetensors.torch import load_file
from transformers import AutoConfig
from workers import poisoned_rank, troubled_rank

import main
import utils

FLAGS = [*SMALL_RUN, "--learning_rate", "1e-2"]


def assert_same(folder, other):
    """What does not depend on time is equal in the logs of two runs, and so are the bits of what they have trained."""
    for key in ("round", "digest", "train_loss", "eval_loss", "learning_rate", "client_drift", "tokens"):
        assert [entry[key] for entry in utils.read_rounds(folder)] == [
            entry[key] for entry in utils.read_rounds(other)
        ], key
    for path in other.glob("*_loss.json"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert torch.equal(read_adapters(folder), read_adapters(other))
    before, after = (json.loads((run / "summary.json").read_text()) for run in (folder, other))
    assert all(before[name] == after[name] for name in ("exact_match", "f1", "eval_loss", "tokens"))


def in_order_of_the_model(adapter):
    """The tensors of a saved adapter (of one layer) in one vector."""
    names = [f".{name}.lora_{part}." for name in utils.LORA_TARGETS for part in "AB"]
    tensors = [tensor.reshape(-1) for name in names for key, tensor in adapter.items() if name in key]
    assert len(tensors) == len(adapter)
    return torch.cat(tensors)


def assert_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def undisturbed(small_inputs, tmp_path_factory):
    """A function that returns the folder of an undisturbed run with more flags; each is made once."""

    @functools.cache
    def run(more=""):
        folder = tmp_path_factory.mktemp("undisturbed")
        main.main([*FLAGS, *small_inputs, *more.split(), "--output_dir", str(folder)])
        return folder

    return run


@pytest.fixture
def run_here(small_inputs, tmp_path, capsys):
    """A function that runs main in this process, the ranks in theirs; returns (exit code, what main said on stderr)."""

    def run(more="", target=main.run_rank):
        code = 0
        try:
            main.main([*FLAGS, *small_inputs, *more.split(), "--output_dir", str(tmp_path)], target=target)
        except SystemExit as error:
            code = error.code
        run.output, errors = capsys.readouterr()
        server = psutil.Process(main.multiprocessing.forkserver._forkserver._forkserver_pid)
        assert not [child for child in server.children() if child.status() != psutil.STATUS_ZOMBIE]
        assert not list(tmp_path.glob(".prepared-*"))
        return code, errors

    return run


# -----------------------------------------------------------------------------
# a rank dies, stops, or does not answer


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("trouble", ["killed in a step", "killed in a collective", "killed while saving"])
def test_killed_rank(run_here, undisturbed, tmp_path, trouble, victim):
    code, errors = run_here(target=functools.partial(troubled_rank, trouble, victim))
    killed = rf"main.py: rank {victim} was ended by SIGKILL \(as the kernel does when memory runs out\)"
    assert code == 1 and re.fullmatch(rf"{killed}; --resume goes on after round 1 of 4\n", errors), errors
    assert run_here("--resume") == (0, "")
    assert_same(tmp_path, undisturbed())


MANY = "--num_clients 6 --clients_per_round 4 "  # two turns a round and rank


@pytest.mark.parametrize(
    ("trouble", "victim", "more"),
    [
        ("stopped in a step", 0, MANY + "--scaffold --prox_mu 0.1"),
        ("stopped in a step", 1, "--lora_variant rolora --aggregator fedadam"),
        ("stopped ahead of the others", 1, "--lora_variant fedsa"),
        ("stopped in a later turn", 1, MANY + "--aggregator median"),
        ("stopped while evaluating", 1, ""),
        ("stopped while saving", 0, MANY + "--seed 10"),  # in the next round a client moves from rank 0 to 1
        ("stopped while saving", 1, MANY + "--seed 10"),
    ],
)
def test_stopped_rank_loses_nothing(run_here, undisturbed, tmp_path, trouble, victim, more):
    """SIGTERM to one rank: all finish their step and save, in the middle of a round, and the run goes on from there."""
    code, errors = run_here(f"{more} --restarts 1", functools.partial(troubled_rank, trouble, victim))
    expected = rf"main.py: rank {victim} was ended by SIGTERM, and all have saved; restart 1 of 1 in round (\d) of 4\n"
    assert code == 0 and re.fullmatch(expected, errors), errors
    assert_same(tmp_path, undisturbed(more))


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize(
    ("trouble", "more"),
    [
        ("stopped in a step", "--local_steps 4 --scaffold --prox_mu 0.1"),  # in round 1
        ("stopped in a later turn", "--local_steps 3 --lora_variant fedsa --seed 10"),  # in round 2
    ],
)
def test_goes_on_with_more_or_fewer_ranks(run_here, undisturbed, tmp_path, trouble, more, world_size):
    """Two ranks with two clients each were stopped in the middle of turns; others take over, to the same bits."""
    code, errors = run_here(MANY + more, functools.partial(troubled_rank, trouble, 1))
    assert code == 1 and "and all have saved; --resume goes on in round" in errors
    (checkpoint,) = (tmp_path / "checkpoints").glob("*_part")
    assert 2 in utils.read_progress(checkpoint)[1].values()  # steps of a turn
    assert run_here(f"{MANY}{more} --resume --world_size {world_size}") == (0, "")
    for key in ("digest", "train_loss", "tokens", "client_drift"):
        expected, found = ([r[key] for r in utils.read_rounds(run)] for run in (undisturbed(MANY + more), tmp_path))
        assert found == expected, key
    assert torch.equal(read_adapters(tmp_path), read_adapters(undisturbed(MANY + more)))


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("no answer in a collective", "; no word from rank 1; --resume"),
        ("slow", "rank 0 failed: TimeoutError: no sign of rank 1 for 0.1 minutes (--timeout)"),
        ("disk full", "; make room on the disk of --output_dir"),
        ("exception", "rank 1 failed: RuntimeError: something with a line"),
        ("out of memory", "OutOfMemoryError: CUDA out of memory; lower --per_device_train_batch_size, then"),
    ],
)
def test_failed_rank(run_here, undisturbed, tmp_path, trouble, message):
    code, errors = run_here("--timeout 0.1", target=functools.partial(troubled_rank, trouble, 1))
    assert code == 1 and errors.splitlines()[-1].endswith("; --resume goes on after round 1 of 4")
    assert message in errors.splitlines()[-1]
    if trouble in ("slow", "disk full"):
        assert run_here("--resume") == (0, "")
        assert_same(tmp_path, undisturbed())


# -----------------------------------------------------------------------------
# signals to the program, as users and schedulers send them


def start(folder, *flags, round_to_reach=1, prefix=(), **popen):
    """Start a run, wait until a round has been logged; returns the process and all its descendants."""
    command = [*prefix, sys.executable, str(ROOT / "main.py"), *FLAGS, *flags, "--output_dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)
    deadline = time.monotonic() + 120
    while len(utils.read_rounds(folder)) < round_to_reach:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process, psutil.Process(process.pid).children(recursive=True)


def find_ranks(process):
    """The ranks: forked from the server, in the order in which they were started."""
    servers = [child for child in psutil.Process(process.pid).children() if "forkserver" in " ".join(child.cmdline())]
    return sorted((rank for server in servers for rank in server.children()), key=lambda rank: rank.pid)


def start_script(folder, flags, target):
    """Start a run in folder/out, with another target, as a program of its own."""
    (folder / "script.py").write_text(f"""
import functools, signal, main, workers
if __name__ == "__main__":
    signal.signal(signal.SIGINT, main.stop)
    main.main({[*flags, "--output_dir", str(folder / "out")]}, target=functools.partial({target}))
""")
    return subprocess.Popen(
        [sys.executable, str(folder / "script.py")], env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


LONG = ["--num_rounds", "40", "--eval_rounds", "40", "--save_rounds", "10"]
DEFAULT_SIGINT = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # even under `&`


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_program(run_here, undisturbed, small_inputs, tmp_path, number, code):
    process, processes = start(tmp_path, *LONG, *small_inputs, start_new_session=True, preexec_fn=DEFAULT_SIGINT)
    os.killpg(
        process.pid, number
    )  # as terminals and schedulers do; ranks ignore one, and the program repeats the other
    _, errors = process.communicate(timeout=15)
    assert process.returncode == code
    first, last = errors.splitlines()
    assert first == "main.py: finishing the step and saving; once more ends it at once"
    assert re.fullmatch(r"main.py: stopped; --resume goes on in round \d+ of 40", last)
    assert_gone(processes)
    assert run_here(" ".join([*LONG, "--resume"])) == (0, "")
    assert_same(tmp_path, undisturbed(" ".join(LONG)))


def test_stopped_twice(small_inputs, tmp_path):
    """The second Ctrl-C does not wait for the step, which takes a minute here."""
    process = start_script(tmp_path, [*FLAGS, *small_inputs], 'workers.troubled_rank, "slow", 1')
    while not utils.read_rounds(tmp_path / "out"):
        time.sleep(0.01)
    processes = psutil.Process(process.pid).children(recursive=True)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 130 and errors.count("\n") == 1
    assert_gone(processes)


def test_killed_program_leaves_nobody(small_inputs, run_here, undisturbed, tmp_path):
    """Started as by a job script that uses `&`, with SIGINT ignored; one rank is suspended, and cannot see it end."""
    ignored = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    process, processes = start(tmp_path, *LONG, *small_inputs, preexec_fn=ignored)
    find_ranks(process)[1].suspend()
    process.kill()
    assert len(processes) >= 3
    assert_gone(processes)
    process.communicate()
    assert run_here(" ".join([*LONG, "--resume"])) == (0, "")
    assert_same(tmp_path, undisturbed(" ".join(LONG)))


def test_two_runs_at_once(undisturbed, small_inputs, tmp_path):
    """And SIGINT to ranks, which is nothing: one that it ended would look as if it had finished."""
    runs = [start(tmp_path / name, *LONG, *small_inputs, round_to_reach=0)[0] for name in ("a", "b")]
    while not utils.read_rounds(tmp_path / "a"):
        time.sleep(0.01)
    for rank in find_ranks(runs[0]):
        rank.send_signal(signal.SIGINT)
    for run in runs:
        assert run.communicate(timeout=120)[1] == "" and run.returncode == 0
    for name in ("a", "b"):
        assert_same(tmp_path / name, undisturbed(" ".join(LONG)))


def test_twenty_random_kills(undisturbed, small_inputs, tmp_path):
    """Of any rank at any time, also while it starts: with --restarts the same bits as of the undisturbed run."""
    flags = "--num_rounds 240 --eval_rounds 240 --save_rounds 2"
    process, _ = start(tmp_path, *flags.split(), *small_inputs, "--restarts", "20", round_to_reach=0)
    choose, kills = random.Random(5), 0
    while kills < 20:
        time.sleep(choose.uniform(0, 1))
        while len(ranks := find_ranks(process)) < 2 and process.poll() is None:  # of this start
            time.sleep(0.01)
        assert process.poll() is None, f"it was finished after {kills} kills"
        choose.choice(ranks).kill()
        kills += 1
        assert_gone(ranks)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors.count("was ended by SIGKILL") == errors.count("restart ") == 20
    assert_same(tmp_path, undisturbed(flags))


# -----------------------------------------------------------------------------
# what is on the disk


@pytest.fixture
def copy(undisturbed, tmp_path):
    """A run to resume: of 4 rounds, but it has not published its model; checkpoints of rounds 3 and 4."""
    shutil.copytree(undisturbed(), tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "federated_global_model")
    return tmp_path


def test_every_torn_file_is_noticed(copy):
    checkpoint = copy / "checkpoints" / "round_00004"
    assert utils.find_fault(checkpoint) is None
    manifest = checkpoint / "manifest.json"
    paths = {path for path in checkpoint.iterdir() if path != manifest}
    assert {path.name for path in paths} == {"client_0.pt", "client_1.pt", "federation.pt"}
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert utils.find_fault(checkpoint) == f"{path.name} is torn"
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert utils.find_fault(checkpoint) == f"{path.name} is damaged"
        path.unlink()
        assert utils.find_fault(checkpoint) == f"{path.name} is missing"
        path.write_bytes(content)
    content = manifest.read_text()
    for text in ("", content[:100], "[]", "{}"):
        manifest.write_text(text)
        assert utils.find_fault(checkpoint) == "manifest.json is torn"
    manifest.write_text(content.replace('"round": 4', '"round": 5'))
    assert utils.find_fault(checkpoint) == "manifest.json is of round 5"
    manifest.unlink()
    assert utils.find_fault(checkpoint) == "manifest.json is missing"
    manifest.write_text(content)
    assert utils.find_newest(copy) == checkpoint


def test_resume_passes_over_what_is_torn(copy, run_here, undisturbed):
    """Of the newest checkpoint one file, of the logs one of each kind; then no checkpoint is whole."""
    (copy / "checkpoints" / "round_00004" / "client_1.pt").write_bytes(b"")
    shutil.copy(copy / "client_0_train_loss.json", copy / "kept")
    (copy / "client_0_train_loss.json").write_text((copy / "kept").read_text()[:-5])
    (copy / "client_1_train_loss.json").write_text("")
    assert run_here("--resume") == (0, "")
    output = run_here.output
    assert "passing over checkpoints/round_00004: client_1.pt is torn" in output
    assert "resuming after round 3 of 4" in output and "client_1_train_loss.json.torn" in output
    assert (copy / "client_1_train_loss.json.torn").read_text() == ""
    assert json.loads((copy / "client_0_train_loss.json").read_text()) == json.loads((copy / "kept").read_text())
    assert len(json.loads((copy / "client_1_train_loss.json").read_text())) == 1
    for path in undisturbed().glob("client_*_train_loss.json"):
        shutil.copy(path, copy)
    assert_same(copy, undisturbed())
    shutil.rmtree(copy / "federated_global_model")
    for path in (copy / "checkpoints").glob("round_*/manifest.json"):
        path.unlink()
    code, errors = run_here("--resume")  # which would begin at the beginning
    assert code == 2 and "no checkpoint in" in errors and "is whole" in errors
    assert len(list((copy / "checkpoints").glob("torn_round_00004_*"))) == 1
    assert len(utils.read_rounds(copy)) == 4


def test_torn_logs(tmp_path):
    path = tmp_path / "client_0_train_loss.json"
    whole = "[1.5, 2.5]"
    cases = {"": [], "[": [], "[1.5, 2": [1.5], whole: [1.5, 2.5], "[1.5, 2.5,": [1.5, 2.5], "null": []}
    for text, losses in cases.items():
        path.write_text(text)
        utils.append_loss_to_file(path, 7.25)
        assert json.loads(path.read_text()) == [*losses, 7.25]
        torn = path.with_name(f"{path.name}.torn")
        assert torn.exists() == (text != whole) and (not torn.exists() or torn.read_text() == text)
        torn.unlink(missing_ok=True)
    utils.append_loss_to_file(path, float("nan"))
    assert json.loads(path.read_text()) == [7.25, None]
    entry = {"round": 1, "eval_loss": None, "clients": [0]}
    lines = [json.dumps(entry | {"round": number}) for number in (1, 2, 3)]
    torn = "\n".join([lines[0], lines[1][:9], lines[2]]) + "\n"
    (tmp_path / "rounds.jsonl").write_text(torn)
    utils.cut_back_logs(tmp_path, 3)
    assert [entry["round"] for entry in utils.read_rounds(tmp_path)] == [1, 3]
    assert (tmp_path / "rounds.jsonl.torn").read_text() == torn


def test_logs_that_are_gone_end_no_run(copy, run_here):
    """After the last round there is nothing left to log: the figure and the summary do with what there is."""
    for path in [*copy.glob("*_loss.json"), copy / "rounds.jsonl"]:
        path.write_text("")
    assert run_here("--resume") == (0, "")
    summary = json.loads((copy / "summary.json").read_text())
    assert summary["eval_loss"] == {"first": None, "last": None} and summary["exact_match"]["after"] >= 0
    assert read_adapters(copy).norm() > 0


def test_torn_config_and_changed_data_are_refused(copy, run_here, tmp_path_factory, small_inputs):
    other = tmp_path_factory.mktemp("other") / "rows.jsonl"
    lines = open(small_inputs[3]).read().splitlines()
    other.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    kept = shutil.copy(small_inputs[3], other.parent / "kept")
    try:
        shutil.copy(other, small_inputs[3])  # under the same name
        code, errors = run_here("--resume")
    finally:
        shutil.copy(kept, small_inputs[3])
    assert code == 2 and "was started with other rows or another tokenizer" in errors
    (copy / "config.json").write_text("{")
    code, errors = run_here("--resume")
    assert code == 2 and "the flags of the run, cannot be read" in errors
    (copy / "config.json").unlink()
    code, errors = run_here()  # which would remove the checkpoints
    assert code == 2 and "already holds a run" in errors


def test_no_room_is_noticed_before_a_model_is_loaded(run_here, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    code, errors = run_here(target=None)
    assert code == 2 and "0.00 GB free, and the run needs" in errors


def test_a_checkpoint_is_as_large_as_foretold(undisturbed, small_inputs):
    """Within a third."""
    size = sum(path.stat().st_size for path in undisturbed().glob("checkpoints/round_00004/*"))
    args = main.parse_args(FLAGS)
    parameters = utils.count_lora_parameters(AutoConfig.from_pretrained(small_inputs[1]), args.lora_r)
    assert parameters == read_adapters(undisturbed()).numel()
    assert size / 1.5 < utils.checkpoint_bytes(args, parameters) < size * 1.5


# -----------------------------------------------------------------------------
# data that is odd, but right


def test_a_megabyte_and_all_alphabets(run_here, tmp_path, sample_rows):
    """One row of 110 is a million characters long: it is counted and left out; no rank trains on an empty answer."""
    rows = sorted(sample_rows, key=lambda row: len(row["context"]))[:100]
    for text in (
        "Ünïcödé",
        "日本語",
        "עברית",
        "\u202eمرحبا",
        "\U0001f9ea\u200d\U0001f52c",
        "a\u0301",
        "\u0000",
        "<|eot_id|>",
        "{{ x }}",
    ):
        rows.append({"id": text, "context": f"Rx: {text} 30 mg.", "question": text, "answers": {"text": [text]}})
    rows.append(
        {"id": "long", "context": "Rx: " + 10**6 * "x", "question": "How much?", "answers": {"text": ["30 mg"]}}
    )
    code, errors = run_here(f"--dataset_path {write_rows(tmp_path / 'odd.jsonl', rows)}")
    assert (code, errors) == (0, "")
    line = "1 of 110 train rows are longer than --max_length 1024 and were cut, 1 of them before the answer: those are"
    assert line in run_here.output
    parts = json.loads((tmp_path / "partition.json").read_text())
    assert max(max(part["rows"]) for part in parts["clients"]) <= 108 >= max(parts["held_out"])
    assert all(entry["train_loss"] > 0 for entry in utils.read_rounds(tmp_path))


def test_fewer_rows_than_a_batch(run_here, tmp_path, sample_rows):
    """One client with one row to train on, one to hold out, and two of the global held-out set."""
    path = write_rows(tmp_path / "few.jsonl", sample_rows[:4])
    assert run_here(f"--num_clients 1 --per_device_train_batch_size 8 --dataset_path {path}") == (0, "")
    assert [entry["weights"] for entry in utils.read_rounds(tmp_path)] == [[1]] * 4
    code, errors = run_here(f"--overwrite --num_clients 2 --dataset_path {path}", target=None)
    assert code == 2 and "4 training rows, 2 clients need 6; lower --num_clients" in errors


# -----------------------------------------------------------------------------
# updates that would spoil the average


def test_bad_updates():
    assert utils.find_bad_updates({0: 1.0, 1: 2.0, 2: 3.0}) == {}
    assert utils.find_bad_updates({2: float("nan"), 0: 1.0, 1: float("inf")}) == {1: "not finite", 2: "not finite"}
    assert utils.find_bad_updates({0: 1.0, 1: 1000.0}) == {}
    assert utils.find_bad_updates({0: 1.0, 1: 1500.0}) == {1: "1,500 times as long as the median"}
    assert utils.find_bad_updates({0: 0.0, 1: 0.0, 2: 1.0}) == {}  # nothing is a multiple of nothing
    assert utils.find_bad_updates({0: float("nan")}) == {0: "not finite"}


@pytest.mark.parametrize(
    ("poison", "more"),
    [(float("nan"), ""), (1e6, "--scaffold"), (float("nan"), "--lora_variant fedsa"), (1e6, "--aggregator krum")],
)
def test_a_bad_update_is_left_out_on_any_layout(run_here, tmp_path, poison, more):
    """Client 1 of 5; it takes part again in the next round."""
    adapters = []
    for size in (1, 5):
        flags = f"{more} --num_clients 5 --world_size {size} --overwrite"
        assert run_here(flags, functools.partial(poisoned_rank, poison, [1])) == (0, "")
        rounds = utils.read_rounds(tmp_path)
        assert [entry["rejected"] for entry in rounds] == [[], [1], [], []]
        assert all(entry["clients"] == [0, 1, 2, 3, 4] for entry in rounds)
        assert rounds[1]["client_drift"][1] is None and None not in rounds[2]["client_drift"]
        assert json.loads((tmp_path / "summary.json").read_text())["rejected"] == 1
        adapters.append(read_adapters(tmp_path))
    assert adapters[0].isfinite().all() and torch.equal(adapters[0], adapters[1])


def test_a_client_that_is_left_out_is_named(small_inputs, tmp_path):
    process = start_script(tmp_path, [*FLAGS, *small_inputs], "workers.poisoned_rank, 1e9, [0]")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    line = r"  client 0 is left out of round 2: its update is [\d,]{7,} times as long as the median\n"
    assert len(re.findall(line, output)) == 1 and output.count("left out") == 1


def test_bad_updates_of_the_first_round(run_here, tmp_path):
    """Two adapters full of NaN have the same bits: no reason for the self-check to end the run."""
    target = functools.partial(poisoned_rank, float("nan"), [1, 2], bad_round=1)
    assert run_here("--num_clients 5", target) == (0, "")
    assert [entry["rejected"] for entry in utils.read_rounds(tmp_path)] == [[1, 2], [], [], []]


def test_a_model_of_its_own_goes_back_to_before_the_turn(run_here, tmp_path):
    flags = "--aggregator none --num_rounds 2"
    assert run_here(flags, functools.partial(poisoned_rank, float("nan"), [1])) == (0, "")
    saved = torch.load(tmp_path / "checkpoints" / "round_00001" / "client_1.pt")["record"]["private"]
    after = load_file(tmp_path / "client_models" / "client_1" / "adapter_model.safetensors")
    assert torch.equal(saved, in_order_of_the_model(after))
    assert any(tensor.norm() > 0 for name, tensor in after.items() if "lora_B" in name)


def test_on_bad_update_fail(run_here, tmp_path):
    target = functools.partial(poisoned_rank, float("nan"), [1])
    code, errors = run_here("--on_bad_update fail --restarts 3", target)
    assert code == 3 and errors == (
        "main.py: round 2: the update of client 1 is not finite; lower --learning_rate\n"
    )  # no restart: it would come to the same
    assert [path.name for path in (tmp_path / "checkpoints").glob("round_*")] == ["round_00001"]


def test_all_updates_are_bad(run_here, tmp_path):
    """The run ends with the model of the round before."""
    code, errors = run_here(target=functools.partial(poisoned_rank, float("nan"), [0, 1]))
    assert code == 3 and errors == (
        "main.py: round 2: the update of every client is not finite; lower --learning_rate. "
        "What round 1 has come to is in federated_global_model\n"
    )
    (first,) = utils.read_rounds(tmp_path)
    saved = load_file(tmp_path / "federated_global_model" / "adapter_model.safetensors")
    kept = torch.load(tmp_path / "checkpoints" / "round_00001" / "federation.pt")["lora"]
    assert first["round"] == 1 and torch.equal(in_order_of_the_model(saved), kept)
    assert report.round_line(main.parse_args(FLAGS), first)
