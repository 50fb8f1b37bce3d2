"""Nothing listens beyond this machine, nothing is asked of a network, and nothing private is written down."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import assert_nowhere, run_main
from runs import FLAGS, LONG, assert_gone, start, start_script, wait_for_round

import main
from fllama import checkpoints

TOKEN = "hf_neverToBeSeen"


RENAME = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"


def test_nothing_listens_beyond_loopback(small_inputs, tmp_path):
    """On a host whose name stands for an outer address, as names mostly do: gloo would listen there."""
    addresses = [address.address for each in psutil.net_if_addrs().values() for address in each if address.family == 2]
    outer = next((address for address in addresses if not address.startswith("127.")), None)
    rename = ["unshare", "--uts", sys.executable, "-c", RENAME, outer]
    if not outer or subprocess.run([*rename, "true"], capture_output=True).returncode:
        pytest.skip("no outer address, or no right to give this host another name for a moment")
    process, processes = start(tmp_path, *LONG, *small_inputs, prefix=rename)
    sockets = [socket for each in [process.pid, *(p.pid for p in processes)] for socket in open_sockets(each)]
    listening = [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN or not socket.raddr]
    process.terminate()
    process.communicate()
    assert_gone(processes)
    assert len(listening) >= 2  # gloo's, one a rank
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}


def open_sockets(pid):
    """The kernel's own list."""
    try:
        return psutil.Process(pid).net_connections(kind="inet")
    except psutil.NoSuchProcess:
        return []


NOTICE = """
import os, socket
def noticed(name, original):
    def call(*args, **kwargs):
        if name == "getaddrinfo" or args[0].family != socket.AF_UNIX:
            with open(os.environ["NOTICED"], "a") as file:
                file.write(f"{name} {args[-1] if name != 'getaddrinfo' else args[0]}\\n")
        return original(*args, **kwargs)
    return call
for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
    setattr(owner, name, noticed(name, getattr(owner, name)))
"""


def test_no_connection_is_tried_when_all_is_on_disk(small_inputs, tmp_path):
    """Python's sockets, which the libraries of Hugging Face use, write down every attempt, in all processes."""
    (tmp_path / "sitecustomize.py").write_text(NOTICE)
    environment = {"PYTHONPATH": str(tmp_path), "NOTICED": str(tmp_path / "noticed"), "HF_HOME": str(tmp_path / "home")}
    process = run_main(*FLAGS, *small_inputs, "--output_dir", tmp_path / "out", **environment)
    assert process.returncode == 0, process.stderr
    assert not (tmp_path / "noticed").exists(), (tmp_path / "noticed").read_text()
    process = run_main("--model_name", "org/tiny", "--output_dir", tmp_path / "hub", **environment)
    assert process.returncode == 2 and (tmp_path / "noticed").exists()  # the net has no holes


@pytest.mark.slow  # some of it is in test_main.py
@pytest.mark.parametrize("flags", ["--model_name org/gated", "--dataset_path org/none"])
def test_token_is_in_no_message_about_the_hub(hub, tmp_path, flags):
    environment = {"HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    process = run_main(*flags.split(), "--output_dir", tmp_path / "out", **environment)
    assert process.returncode == 2, process.stderr
    assert_nowhere(TOKEN, process.stdout + process.stderr, tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        f"--hf_tokn {TOKEN}",
        f"--hf_token {TOKEN} --world_size {TOKEN}",
        f"--hf_token {TOKEN}\u00e9",
        f"--hf_token {TOKEN} --model_name ./{TOKEN}",
        f"--hf_token {TOKEN} --max_length 1",
    ],
)
def test_token_is_in_no_message(capfd, tmp_path, flags):
    with pytest.raises(SystemExit) as stop:
        main.main([*flags.split(), "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert_nowhere(TOKEN, "".join(capfd.readouterr()), tmp_path)


@pytest.mark.slow
def test_token_and_rows_stay_private_in_a_run_that_fails(small_inputs, tmp_path):
    """No rank has the token, in its environment or its arguments; a traceback, checkpoints and logs hold no text."""
    rows = [json.loads(line) | {"context": f"Patient Adelheid: {i}"} for i, line in enumerate(open(small_inputs[3]))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*FLAGS, *small_inputs[:2], "--dataset_path", str(tmp_path / "rows.jsonl"), "--hf_token", TOKEN]
    os.environ["HF_TOKEN"] = TOKEN
    try:
        process = start_script(tmp_path, flags, 'workers.troubled_rank, "exception", 1')
    finally:
        del os.environ["HF_TOKEN"]
    wait_for_round(tmp_path / "out", 1, process)
    children = psutil.Process(process.pid).children(recursive=True)
    seen = " ".join(text for child in children for text in [*child.cmdline(), *child.environ().values()])
    output = "".join(process.communicate())
    assert process.returncode == 1 and "RuntimeError: something with a line" in output
    assert_gone(children)
    assert seen.count("forkserver") >= 3
    (tmp_path / "script.py").unlink()
    (tmp_path / "rows.jsonl").unlink()
    for secret in (TOKEN, "Adelheid"):
        assert_nowhere(secret, output + seen, tmp_path)


def test_output_dir_is_private(small_inputs, tmp_path):
    os.umask(0o022)
    with checkpoints.locked_output_dir(tmp_path / "out"):
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_code_that_comes_with_a_model_is_not_run(small_inputs, tmp_path, capsys, monkeypatch):
    for path in Path(small_inputs[1]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nEvil = None\n")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((tmp_path / name).read_text())
        config["auto_map"] = {
            "AutoConfig": "evil.Evil",
            "AutoModelForCausalLM": "evil.Evil",
            "AutoTokenizer": ["evil.Evil", None],
        }
        (tmp_path / name).write_text(json.dumps(config | {"model_type": "evil"} if name == "config.json" else config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # to whoever asks whether it may be run
    with pytest.raises(SystemExit) as stop:
        main.main([*FLAGS, "--model_name", str(tmp_path), *small_inputs[2:], "--output_dir", str(tmp_path / "out")])
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and len(errors.splitlines()) == 1, errors
    assert not (tmp_path / "ran").exists()
