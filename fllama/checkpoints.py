"""The output folder of a run, its checkpoints, and going on from one."""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import utils
from fllama import runlog
from fllama.clients import ClientState
from fllama.options import fail

GLOBAL_MODEL, CLIENT_MODELS = "federated_global_model", "client_models"  # folders of what a run has trained
KEPT_CHECKPOINTS = 2
FINISHED = "finished"  # instead of a checkpoint to go on from
RUN_FILES = """checkpoints federated_global_model* client_models* client_*_loss.json global_eval_loss.json rounds.jsonl
loss.png runs samples.json scores.json canaries.json privacy.jsonl merged_model summary.json partition.json
config.json""".split()  # what --overwrite removes
# flags that may change when a run is resumed, and flags that config.json does not hold
NOT_MATHEMATICS = """output_dir eval_rounds save_rounds report_to restarts timeout backend num_gpus versions world_size
started show_rows max_new_tokens"""
NOT_IN_CONFIG = "hf_token overwrite resume dry_run compare repeats seeds sweep ask context merge push_to_hub quiet"


@dataclass
class Server:
    """What the federation knows, the same on all ranks; saved in a checkpoint as federation.pt."""

    start: torch.Tensor  # (P,) shared LoRA parameters as the next round begins
    first_private: torch.Tensor  # private LoRA parameters of every client before its first turn
    control: torch.Tensor | None = None  # SCAFFOLD's c (P,): mean of all clients' c_i
    strategy_states: list = field(
        default_factory=list
    )  # a dict per part of the variant: RoLoRA's A and B have one each
    rounds_done: int = 0
    scores_before: dict = field(default_factory=dict)  # exact match, F1 and samples before training

    def strategy_state(self, number):
        """Return the dict of the averaging strategy for round `number`."""
        return self.strategy_states[(number - 1) % len(self.strategy_states)]


# -----------------------------------------------------------------------------
# the output folder, before a run


@contextlib.contextmanager
def locked_output_dir(folder):
    """Make the folder, private to the user, and keep other runs out of it as long as the context lasts."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is writing to --output_dir {folder}; wait for it, or name another")
    except OSError as error:
        fail(f"cannot write to --output_dir {folder}: {error.strerror}")
    try:
        yield
    finally:
        os.close(lock)


def check_output_dir(args):
    """Make sure that output_dir holds no run but the one to resume; removes nothing."""
    folder = Path(args.output_dir)
    if not (folder / "config.json").exists() and not any(folder.glob("checkpoints/round_*")):
        if args.resume:
            fail(f"--resume: {folder} holds no run; leave --resume out to start one")
    elif not args.resume and not args.overwrite:
        choices = "--resume continues it, --overwrite removes it, or name another --output_dir"
        fail(f"{folder} already holds a run: {choices}")


def find_checkpoint(args, config):
    """Return the newest whole checkpoint of the run to resume, or FINISHED if nothing is left to do.

    None if a run starts from the beginning. `config` is what config.json would hold.
    """
    if not args.resume:
        return None
    folder = Path(args.output_dir)
    check_config(folder, config)
    newest = find_newest(folder)
    if not newest and any(folder.glob("checkpoints/round_*")):
        fail(f"--resume: no checkpoint in {folder} is whole, see above; mend one, or start anew with --overwrite")
    last_round = round_of(newest)
    if last_round == args.num_rounds and is_finished(folder):
        return FINISHED
    print(f"resuming after round {last_round} of {args.num_rounds}", flush=True)
    return newest


def check_config(folder, config):
    """Refuse to go on with a run that was started with other flags."""
    earlier, changes = read_config(folder), []
    for name, value in config.items():
        if name not in NOT_MATHEMATICS.split() and value != earlier.get(name):
            changes.append(f"{name} {earlier.get(name)} (now {value})")
    if changes:
        fail(f"--resume: the run in {folder} was started with {', '.join(changes)}")
    if config["optim"].startswith("paged") and bool(config["num_gpus"]) != bool(earlier["num_gpus"]):
        fail(f"--resume: {config['optim']} pages on a GPU only, and this run changes between GPU and CPU; start anew")


def read_config(folder):
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        fail(f"--resume: {folder}/config.json, the flags of the run, cannot be read; --overwrite starts anew")


def start_of_run(args):
    """Return when the run began (datetime): the day that chat templates see, also after --resume."""
    now = datetime.datetime.now().replace(microsecond=0)
    if not args.resume:
        return now
    return datetime.datetime.fromisoformat(read_config(Path(args.output_dir)).get("started", now.isoformat()))


def make_config(args, **more):
    """Return what config.json holds: every flag, never the token, and what else is given."""
    return {name: value for name, value in vars(args).items() if name not in NOT_IN_CONFIG.split()} | more


def open_output_dir(args, checkpoint, config, partition):
    """Remove what an overwritten run left, or what a resumed one left after its last checkpoint; write config.json and
    partition.json.

    The digest of the rows in `config` must be that of the run to resume.
    """
    folder = Path(args.output_dir)
    if args.resume and (digest := read_config(folder).get("data_digest")) != config["data_digest"]:
        fail(f"--resume: the run in {folder} was started with other rows or another tokenizer (digest {digest})")
    if args.overwrite:
        for pattern in RUN_FILES:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if args.resume:
        cut_back(folder, checkpoint)
    utils.write_aside(folder / "partition.json", json.dumps(partition) + "\n")
    utils.write_aside(folder / "config.json", json.dumps(config, indent=2) + "\n")


def is_finished(folder):
    return (folder / GLOBAL_MODEL).exists() or (folder / CLIENT_MODELS).exists()


def cut_back(folder, checkpoint):
    """Put away what a run has left after the checkpoint from which it goes on, None: from the beginning."""
    for path in folder.glob("checkpoints/staging_*"):  # of a checkpoint that was not finished
        shutil.rmtree(path)
    for path in folder.glob("checkpoints/round_*"):
        if path.name > (checkpoint.name if checkpoint else ""):
            path.rename(path.with_name(f"torn_{path.name}_{time.time_ns()}"))
    for name in (GLOBAL_MODEL, CLIENT_MODELS):  # of a run that ended by itself; this one is not finished
        if (folder / name).exists():
            shutil.rmtree(folder / f"{name}.old", ignore_errors=True)
            (folder / name).rename(folder / f"{name}.old")
    runlog.cut_back_logs(folder, round_of(checkpoint))


# -----------------------------------------------------------------------------
# one checkpoint: a folder with federation.pt, a file per client, and a manifest of their sizes and sha256


def round_of(checkpoint):
    """Return how many rounds a run had finished at a checkpoint: 2 for `round_00002`, 0 for None."""
    return int(checkpoint.name.split("_")[1]) if checkpoint else 0


def write_checkpoint(output_dir, server, lora, clients, comm):
    """Write the files of a checkpoint into a folder for `commit_checkpoint`; all ranks participate.

    Every rank writes its clients, so that any number of ranks can go on from them; rank 0 writes the server and all
    LoRA parameters. Returns {file name: [size, sha256]} of all ranks' files.
    """
    staging = staging_folder(output_dir, server.rounds_done)
    staging.mkdir(parents=True, exist_ok=True)
    files = {}

    def write(name, content):
        torch.save(content, staging / name)
        files[name] = seal(staging / name)

    for client in clients.states:
        write(f"client_{client}.pt", vars(clients.snapshot(client)))
    if comm.residuals:
        write(f"machine_{comm.machine}.pt", comm.residuals)
    if comm.rank == 0:
        write("federation.pt", vars(server) | {"lora": utils.flatten_parameters(lora)})
    return {name: seals for part in comm.meet(files) for name, seals in part.items()}


def commit_checkpoint(output_dir, rounds_done, files, comm):
    """Make a checkpoint of the files by one rename, and remove all but the newest; all ranks participate."""
    if comm.rank == 0:
        folder, staging = Path(output_dir, "checkpoints"), staging_folder(output_dir, rounds_done)
        manifest = {"round": rounds_done, "files": files}
        utils.write_aside(staging / "manifest.json", json.dumps(manifest))
        flush(staging / "manifest.json")
        for log in [*Path(output_dir).glob("*_loss.json"), Path(output_dir, "rounds.jsonl")]:
            if log.exists():
                flush(log)  # a checkpoint has every round before it in the logs, even after a power cut
        flush(staging)
        staging.rename(folder / f"round_{rounds_done:05d}")
        flush(folder)
        for old in sorted(folder.glob("round_*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
    comm.meet()  # nobody begins another before this one is moved


def staging_folder(output_dir, rounds_done):
    """Return where the files of a checkpoint are written: another folder each time, as other machines cache names."""
    return Path(output_dir, "checkpoints", f"staging_{rounds_done:05d}")


def load_server(checkpoint, device):
    """Return (Server, all LoRA parameters) as of a checkpoint, on `device`."""
    content = torch.load(checkpoint / "federation.pt", weights_only=True, map_location=device)
    lora = content.pop("lora")
    return Server(**content), lora


def load_clients(checkpoint, clients):
    """Return the ClientStates of those of `clients` that have played before the checkpoint."""
    states = {}
    for client in clients:
        path = checkpoint / f"client_{client}.pt"
        if path.exists():
            states[client] = ClientState(**torch.load(path, weights_only=True, map_location="cpu"))
    return states


def load_machine_residuals(checkpoint, comm):
    """Return what rounding kept back of this machine's sums; if the number of machines changed, the first has all."""
    paths = sorted(checkpoint.glob("machine_*.pt"))
    if comm.num_machines == 1 or not comm.is_first_here():
        return {}
    if len(paths) == comm.num_machines:
        paths = [checkpoint / f"machine_{comm.machine}.pt"]
    elif comm.machine > 0:
        paths = []
    residuals = {}
    for path in paths:
        for name, kept in torch.load(path, weights_only=True, map_location="cpu").items():
            residuals[name] = residuals.get(name, 0) + kept
    return residuals


def seal(path):
    """Flush a file to the disk; returns [size, sha256], as the manifest lists them."""
    flush(path)
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def flush(path):
    """Wait until a file, or the names in a folder, are on the disk itself."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def find_newest(output_dir):
    """Return the newest whole checkpoint, None without one; says which are passed over, and why."""
    for checkpoint in sorted(Path(output_dir).glob("checkpoints/round_*"), reverse=True):
        fault = find_fault(checkpoint)
        if not fault:
            return checkpoint
        print(f"passing over checkpoints/{checkpoint.name}: {fault}", flush=True)
    return None


def find_fault(checkpoint):
    """Return what is wrong with a checkpoint, or None if all files match the manifest."""
    name = "manifest.json"
    try:
        manifest = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        if manifest["round"] != round_of(checkpoint):
            return f"{name} is of round {manifest['round']}"
        for name, (size, digest) in manifest["files"].items():
            with open(checkpoint / name, "rb") as file:
                if os.fstat(file.fileno()).st_size != size:
                    return f"{name} is torn"
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} is damaged"
    except FileNotFoundError:
        return f"{name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{name} is torn"
    return None
