"""Runs of one rank side by side, one per GPU: each main.py in a process of its own."""

import argparse
import os
import subprocess
import sys
import time

from fllama import gpus, launch
from fllama.options import ASSETS

POLL = 0.2  # seconds between looks at who has ended


def run_side_by_side(runs, num_gpus):
    """Run main.py for each (title, folder, args, words), one per GPU and never two on the same; returns exit codes.

    What a run prints is in run.log, in its folder. After a request to stop, the runs under way finish their round and
    save; a second one ends them at once.
    """
    free, codes, running = gpus.visible_gpus(num_gpus), [None] * len(runs), {}
    waiting = list(enumerate(runs))
    try:
        while waiting or running:
            while waiting and free:
                number, run = waiting.pop(0)
                running[number] = gpu, _ = free[0], start(run, free.pop(0))
                print(f"{run[0]}, on GPU {gpu}", flush=True)
            time.sleep(POLL)
            for number, (gpu, process) in list(running.items()):
                codes[number] = process.poll()
                if codes[number] is not None:
                    del running[number]
                    free.append(gpu)
                    problem = f", exit code {codes[number]}: {runs[number][1] / 'run.log'}" if codes[number] else ""
                    print(f"{runs[number][0]}, ended{problem}", flush=True)
    except SystemExit:  # see main.stop
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
        raise
    finally:
        for _, process in running.values():
            process.kill()
            process.wait()
    return codes


def start(run, gpu):
    """Start main.py on one GPU; returns its process."""
    _, folder, args, words = run
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    if args.hf_token:
        environment["HF_TOKEN"] = args.hf_token
    command = [sys.executable, str(ASSETS.parent / "main.py"), *words_of_process(args, words)]
    with open(folder / "run.log", "ab") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then asks them to stop
            preexec_fn=launch.die_with_parent,
        )


def words_of_process(args, words):
    """Return the flags of a run for a process of its own: without the token, and resumed only if it was begun."""
    decided = argparse.ArgumentParser(add_help=False)
    decided.add_argument("--hf_token")
    for flag in ("--resume", "--overwrite"):
        decided.add_argument(flag, action="store_true")
    _, words = decided.parse_known_args(words)
    return words + ["--resume"] * args.resume + ["--overwrite"] * args.overwrite
