"""The logs of a run: rounds.jsonl, the lists of losses, the terminal's lines, and trackers."""

import collections
import concurrent.futures
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from fllama import report
from fllama.clients import copy_to_host
from fllama.options import keeps_own_models

CHECKED = 4096  # columns of the table that `checksum` sums
HINTED_ERROR = 0.1  # from this aggregation error on, a run is told once what can be done about it


@dataclass
class RankReport:
    """What a rank tells all others after a round."""

    turns: list  # of its clients, without what is bulky
    global_loss: tuple | None  # evaluate.Loss on its share of the global held-out rows
    drift: dict  # client -> distance of its update from the average, relative to the norm of the latter
    checksum: float  # of the averaged parameters
    memory: float  # peak, GB
    bytes_sent: int  # by its clients
    bytes_between_machines: int
    asked_to_stop: bool


class RunLog:
    """What a run says and writes. Rank 0 writes; the other ranks have the same object, which then does nothing.

    Files are written by a thread while the next round trains: the sha256 of an 8 B model's LoRA takes 0.2 s.
    """

    def __init__(self, rank, args, rows, rounds_done):
        """`rows` is the rank's ClientData: its plan says how many steps the bar has."""
        turns = [len(played.shares[rank]) for played in rows.plan]
        num_steps, steps_done = args.local_steps * sum(turns), args.local_steps * sum(turns[:rounds_done])
        self.args, self.is_writer = args, rank == 0
        self.writer = concurrent.futures.ThreadPoolExecutor(1)
        self.written = self.writer.submit(int)
        hidden = None if self.is_writer and not args.quiet else True  # None: shown on a terminal
        self.bar = tqdm(total=num_steps, initial=steps_done, unit="step", disable=hidden, dynamic_ncols=True)
        self.tracker = start_tracker(args) if self.is_writer and args.report_to != "none" else None
        self.hinted = False
        self.clock = time.perf_counter()

    def say(self, text):
        """Print a line above the bar, unless --quiet."""
        if self.is_writer and not self.args.quiet:
            self.bar.write(text)

    def warn(self, text):
        """Print a line above the bar, even with --quiet."""
        if self.is_writer:
            self.bar.write(text)

    def lap(self):
        """Return the seconds since the last call."""
        before, self.clock = self.clock, time.perf_counter()
        return round(self.clock - before, 4)

    def round(self, number, rate, reports, rejected, update_norm, error, seconds, averaged, spent=None):
        """Log a round, from the reports of all ranks; `averaged` (P,) is the new shared vector.

        `spent` is a function that returns the epsilon that was spent so far; it takes some milliseconds.
        """
        if not self.is_writer:
            return
        entry = round_entry(number, rate, reports, rejected, update_norm, error, seconds)
        local_digests = [turn.digest for turn in turns_of(reports)] if keeps_own_models(self.args) else []
        if self.tracker:
            self.tracker.log(curves_of(entry), step=number * self.args.local_steps)
        self.wait()
        self.written = self.writer.submit(self.write_round, entry, start_copy(averaged), local_digests, spent)

    def write_round(self, entry, averaged, local_digests, spent=None):
        vector, copied = averaged
        if copied:
            copied.synchronize()
        digests = [digest(vector), *local_digests]
        entry["digest"] = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        entry["epsilon"] = spent() if spent else None
        folder = Path(self.args.output_dir)
        for name, loss in losses_of(entry):
            utils.append_loss_to_file(folder / name, loss)
        with open(folder / "rounds.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.say(report.round_line(self.args, entry))
        error = entry["aggregation_error"] or 0
        if error > HINTED_ERROR and not self.hinted and self.args.aggregator != "svd":
            self.hinted = True
            self.say(
                f"  averaging A and B apart makes an error of {error:.0%} of the product that they stand for here; "
                "--lora_variant ffa or rolora, --aggregator svd, or fewer --local_steps make less; which is better, "
                "--compare tells"
            )

    def wait(self):
        """Wait until all that was logged is written; raises what went wrong."""
        self.written.result()

    def close(self):
        self.wait()
        self.bar.close()
        if self.tracker:
            self.tracker.finish()  # an exit hook would not do: processes of the fork server have none


# -----------------------------------------------------------------------------
# what is logged of a round


def turns_of(reports):
    """Return the turns of all ranks' reports, in the order of clients."""
    turns = []
    for each in reports:
        turns += each.turns
    return sorted(turns, key=lambda turn: turn.client)


def round_entry(number, rate, reports, rejected, update_norm, error, seconds):
    """Return what rounds.jsonl holds of a round, but for the digest."""
    turns = turns_of(reports)
    good = [turn for turn in turns if turn.client not in rejected]
    drift = {}
    for each in reports:
        drift |= each.drift
    evaluated = (turns[0].eval_loss if turns else reports[0].global_loss) is not None  # dp_fedavg may draw nobody
    eval_losses = [turn.eval_loss.mean() for turn in turns] if evaluated else None
    return {
        "round": number,
        "train_loss": sum(turn.train_loss for turn in good) / len(good) if good else None,
        "eval_loss": global_loss(reports, good) if evaluated else None,
        "learning_rate": rate,
        "clients": [turn.client for turn in turns],
        "rejected": list(rejected),
        "weights": [turn.weight for turn in turns],
        "client_train_loss": [turn.train_loss for turn in turns],
        "client_eval_loss": eval_losses,
        "drift": sum(drift.values()) / max(1, len(good)),
        "client_drift": [drift.get(turn.client) for turn in turns],
        "aggregation_error": error,
        "update_norm": update_norm,
        "bytes": sum(each.bytes_sent for each in reports),
        "bytes_between_machines": sum(each.bytes_between_machines for each in reports),
        "tokens": sum(turn.tokens for turn in turns),
        "peak_memory_gb": round(max(each.memory for each in reports), 3),
        "seconds": seconds,
    }


def global_loss(reports, turns):
    """Return the loss on the global held-out rows, in nats per answer token; of several models, the mean."""
    if turns and turns[0].global_eval_loss:
        return sum(turn.global_eval_loss.mean() for turn in turns) / len(turns)
    return sum(each.global_loss.nats for each in reports) / sum(each.global_loss.tokens for each in reports)


# -----------------------------------------------------------------------------
# files


def losses_of(entry):
    """Yield (file name, loss) of what a round adds to the lists of losses."""
    if entry["eval_loss"] is not None:
        yield "global_eval_loss.json", entry["eval_loss"]
    for kind in ("train_loss", "eval_loss"):
        for client, loss in zip(entry["clients"], entry[f"client_{kind}"] or []):
            yield f"client_{client}_{kind}.json", loss


def read_rounds(output_dir):
    """Return the rounds that rounds.jsonl holds, one dict each, oldest first; a torn line is left out."""
    path, rounds = Path(output_dir, "rounds.jsonl"), []
    if not path.exists():
        return rounds
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rounds.append(json.loads(line))
        except ValueError:  # a run that was killed while it wrote
            continue
    return rounds


def cut_back_logs(output_dir, last_round):
    """Write the logs anew with the rounds up to `last_round`, so that a resumed run logs no round twice."""
    folder = Path(output_dir)
    rounds = [entry for entry in read_rounds(folder) if entry["round"] <= last_round]
    lines = "".join(json.dumps(entry) + "\n" for entry in rounds)
    utils.write_aside(folder / "rounds.jsonl", lines)
    for path in [*folder.glob("client_*_loss.json"), *folder.glob("global_eval_loss.json")]:
        path.unlink()
    losses = collections.defaultdict(list)
    for entry in rounds:
        for name, loss in losses_of(entry):
            losses[name].append(loss if math.isfinite(loss) else None)
    for name, values in losses.items():
        utils.write_aside(folder / name, json.dumps(values))


def read_losses(path):
    """Return the list of losses in a file, NaN for null."""
    return [float("nan") if loss is None else loss for loss in json.loads(Path(path).read_text(encoding="utf-8"))]


# -----------------------------------------------------------------------------
# trackers


def start_tracker(args):
    """Start the tracker of --report_to: one for the federation, not one per rank."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # seconds that the launching process need not spend

    kind = LOGGER_TYPE_TO_CLASS[args.report_to]
    name = Path(args.output_dir).name
    tracker = kind(name, logging_dir=f"{args.output_dir}/runs") if kind.requires_logging_directory else kind(name)
    tracker.start()
    return tracker


def curves_of(entry):
    """Return the curves of the federation and of each of its clients, by name."""
    curves = {f"federation/{name}": value for name, value in entry.items() if isinstance(value, float)}
    for kind in ("train_loss", "eval_loss"):
        for client, loss in zip(entry["clients"], entry[f"client_{kind}"] or []):
            curves[f"client_{client}/{kind}"] = loss
    return curves


# -----------------------------------------------------------------------------
# digests


def start_copy(vector):
    """Start to copy a vector to the host, beside the next round; returns (copy, the CUDA event of its end or None)."""
    copy, copied = copy_to_host(vector), None
    if vector.is_cuda:
        copied = torch.cuda.Event()
        copied.record()
    return copy, copied


def digest(vector):
    """Return the sha256 of a vector's bytes, in hexadecimal."""
    return hashlib.sha256(vector.cpu().numpy()).hexdigest()


def checksum(vector):
    """Return a whole number, as a float64 tensor, that tells vectors apart by their bits and where they are.

    Quicker than sha256, and nobody waits for a GPU. The bits are summed by row and by column of a table of CHECKED
    columns, and each sum counts by its place.
    """
    bits = vector.view(torch.int32)
    whole = len(bits) // CHECKED * CHECKED
    total = weighted_sum(bits[whole:].long())
    table = bits[:whole].view(-1, CHECKED)
    total += 31 * weighted_sum(table.sum(dim=0)) + 1000003 * weighted_sum(table.sum(dim=1))
    return (total & (2**53 - 1)).double()  # exact in a float64


def weighted_sum(values):
    """Return the sum of whole numbers, each times its place, counted from 1."""
    return (values * torch.arange(1, len(values) + 1, device=values.device)).sum()
