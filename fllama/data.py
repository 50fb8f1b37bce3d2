"""The rows of the clients of one rank, in the order in which they read them."""

import collections
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from torch.utils.data import DataLoader
from trl import pack_dataset

import utils
from fllama import checkpoints, options

GLOBAL_EVAL_ROWS = 512  # at most so many of the global held-out rows are evaluated
OWN_EVAL_ROWS = 16  # at most so many of a client's own held-out rows are evaluated in a round; at the end all are


@dataclass
class ClientData:
    """What a rank knows of the data, and who plays when."""

    rows: datasets.Dataset  # all training rows of the run
    held_out: list  # the numbers of the rows that each part of the split holds out
    scored: list  # the parts whose held-out rows are scored at the end
    num_train: list  # how many rows each client trains on, which is its weight
    global_held_out: datasets.Dataset  # the same on all ranks
    global_numbers: list  # of its rows: the same row has the same number, however the rows are dealt out
    num_questions: int  # at most so many of its rows are answered before and after training, for exact match and F1
    plan: list  # of the rounds, see utils.plan_rounds
    rank: int
    rows_per_turn: int  # or sequences, with --packing
    sequences: datasets.Dataset  # what the clients of this rank train on: rows, or packs of rows
    own: dict  # client -> the numbers of its sequences
    schedules: dict  # client -> the order in which it reads them, over all its turns
    turns_before: dict  # (round, client) -> how many turns the client has had before

    def rows_of_turn(self, client, number):
        """Return the numbers of the sequences that `client` reads in round `number`: it goes on where it stopped."""
        first = self.turns_before[number, client] * self.rows_per_turn
        order = self.schedules[client][first : first + self.rows_per_turn]
        return self.own[client][order].tolist()

    def sequences_of_turn(self, client, number):
        return self.sequences.select(self.rows_of_turn(client, number))

    def own_parts(self, client):
        """Return the parts of the split whose held-out rows are the client's: its own; several with --centralized."""
        return [client] if len(self.num_train) > 1 else self.scored

    def own_held_out(self, client):
        """Return the client's own held-out rows that are evaluated in a round."""
        parts = [self.held_out[part][:OWN_EVAL_ROWS] for part in self.own_parts(client)]
        return self.rows.select(np.concatenate(parts))

    def global_share(self):
        """Return this rank's share of the global held-out rows."""
        return share_of(self.global_held_out, self.rank, len(self.plan[0].shares))

    def questions(self):
        """Return the held-out questions that are answered before and after training."""
        questions = answerable(self.global_held_out)
        return questions.select(range(min(self.num_questions, len(questions))))

    def last_played_here(self, rounds_done):
        """Return the clients whose last turn in the first `rounds_done` rounds was on this rank."""
        rank_of_client = {}
        for played in self.plan[:rounds_done]:
            for rank, share in enumerate(played.shares):
                rank_of_client |= dict.fromkeys(share, rank)
        return [client for client, rank in rank_of_client.items() if rank == self.rank]


def answerable(rows):
    """Return the rows that ask something: all but plain texts."""
    return rows.select([number for number, length in enumerate(rows["prompt_length"]) if length > 0])


def share_of(rows, rank, world_size):
    return rows.select(range(rank, len(rows), world_size))


def load_client_data(rank, args, run, drawn=None):
    """Return the ClientData of one rank. No row is in two of its parts; every client reads only its own.

    `drawn` are the clients of every round if they were drawn elsewhere.
    """
    data = datasets.load_from_disk(run.data_path)
    split = json.loads(Path(run.data_path, "parts.json").read_text(encoding="utf-8"))
    if "held_out" in data:
        shuffled = utils.split_evenly(len(data["held_out"]), 1, options.split_seed(args))[0].tolist()
    else:
        shuffled = split["global"]
    global_numbers = shuffled[:GLOBAL_EVAL_ROWS]
    global_held_out = data["held_out" if "held_out" in data else "train"].select(global_numbers)

    clients, per_round = options.training_clients(args)
    plan = utils.plan_rounds(
        clients, per_round, args.num_rounds, args.world_size, args.seed, run.machine_of_rank, drawn
    )
    turns_before, turns = {}, collections.Counter()
    for number, played in enumerate(plan, start=1):
        for client in played.clients():
            turns_before[number, client] = turns[client]
            turns[client] += 1
    rounds_left = plan[checkpoints.round_of(run.checkpoint) :]
    playing = sorted({client for played in rounds_left for client in played.shares[rank]})
    sequences, own = data["train"], {client: np.array(split["train"][client]) for client in playing}
    if args.packing and playing:
        sequences, own = pack_rows(sequences, own, args.max_length)
    rows_per_turn = args.local_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    schedules = {}
    for client, numbers in own.items():
        schedules[client] = utils.schedule_rows(len(numbers), turns[client] * rows_per_turn, [args.seed, client])
    return ClientData(
        rows=data["train"],
        held_out=split["held_out"],
        scored=split["scored"],
        num_train=[len(part) for part in split["train"]],
        global_held_out=global_held_out,
        global_numbers=global_numbers,
        num_questions=args.eval_questions,
        plan=plan,
        rank=rank,
        rows_per_turn=rows_per_turn,
        sequences=sequences,
        own=own,
        schedules=schedules,
        turns_before=turns_before,
    )


def read_batches(sequences, trainer):
    """Return an iterator of the batches of `sequences`, in their order."""
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in sequences.column_names]
    batch_size = trainer.args.per_device_train_batch_size
    return iter(DataLoader(sequences.select_columns(columns), batch_size, collate_fn=trainer.data_collator))


def count_tokens(sequences):
    if "seq_lengths" in sequences.column_names:  # packs of rows
        return sum(sum(lengths) for lengths in sequences["seq_lengths"])
    return sum(sequences["length"])


def digest_of(sequences):
    """Return a sha256 of the tokens of some sequences."""
    return hashlib.sha256(json.dumps(sequences["input_ids"][:]).encode()).hexdigest()


# -----------------------------------------------------------------------------
# packing


def pack_rows(rows, own, max_length):
    """Pack the rows of each client, {client: row numbers}, into sequences of up to `max_length` tokens, best fit first.

    Returns the sequences of all these clients and {client: sequence numbers}; none has rows of two clients.
    """
    packs, numbers, total = [], {}, 0
    for client, part in own.items():
        columns = rows.select(part).select_columns(["input_ids", "labels"])
        packs.append(pack_dataset(columns, max_length, map_kwargs={"keep_in_memory": True}))
        numbers[client] = np.arange(total, total + len(packs[-1]))
        total += len(packs[-1])
    return datasets.concatenate_datasets(packs), numbers


def collate_packs(collate, sequences):
    """Make a batch of packed sequences in which no row can see another.

    Without an attention mask, transformers takes its masks from the positions, which start anew with each row.
    """
    batch = collate(sequences)
    del batch["attention_mask"]
    batch["labels"][batch["position_ids"] == 0] = -100  # no row predicts the first token of the next
    return batch
