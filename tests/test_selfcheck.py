"""The self-check of a run: each fault ends it with exit code 3 and the line that says what is wrong."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

FAULTS = {
    "curve from zero": "✗ learns from the first step on: learning rate 0.00e+00",
    "ddp": "✗ no DDP: every rank trains a DistributedDataParallel of its own",
    "own start": "✗ same start: ",
    "own start --lora_variant=ffa": "✗ same start: ",
    "shared gradients": "✗ federated: 2 client(s) with 1 adapter(s) before the averaging, 1 after it",
    "rows of others": "✗ federated: 2 client(s) with 1 adapter(s) before the averaging, 1 after it",
    "same rows": "✗ fresh data next round: 0 of 4 rows of second turns are not in the first",
    "ranks apart": "✗ federated: 2 adapters after the averaging",
}


@pytest.fixture(scope="module")
def faulty(small_inputs, tmp_path_factory):
    """Exit code and output of a run with each of FAULTS, all in one program, as their ranks write to its output."""
    folder = tmp_path_factory.mktemp("faulty")
    flags = "--world_size 2 --num_rounds 2 --local_steps 1 --warmup_steps 1 --per_device_train_batch_size 2".split()
    (folder / "faulty.py").write_text(f"""
import functools, sys, main, workers
if __name__ == "__main__":
    for number, case in enumerate({list(FAULTS)}):
        fault, *more = case.split(" --")
        flags = {flags + small_inputs} + [f"--{{flag}}" for flag in more] + ["--output_dir", "{folder}/" + str(number)]
        code = 0
        try:
            main.main(flags, target=functools.partial(workers.faulty_rank, fault))
        except SystemExit as stop:
            code = stop.code
        print(f"exit code {{code}}\\n===", flush=True)
""")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.run(
        [sys.executable, str(folder / "faulty.py")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    return dict(zip(FAULTS, process.stdout.split("===\n")))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_self_check_ends_the_run_with_exit_code_3(faulty, fault):
    output = faulty[fault]
    assert output.endswith("exit code 3\n"), output
    assert FAULTS[fault] in output and output.count("✗") == 1
    assert "main.py: a self-check failed, see its line" in output and "Traceback" not in output
