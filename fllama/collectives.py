"""What ranks send each other: small messages, sums, and shards of vectors."""

import datetime
import itertools
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from fllama import narrow
from fllama.narrow import Encoded, encode, scales_of_stretch


class LostContact(ConnectionError):
    """A rank ends because another one did, and does not know which."""


class Client(NamedTuple):
    """One client of the round, as a strategy sees it."""

    number: int
    weight: float  # rows that it trains on
    update: torch.Tensor  # float32 (P,): how far its shared LoRA parameters moved in this round


class Update(NamedTuple):
    """What a client hands in for the averaging."""

    client: int
    weight: float
    update: torch.Tensor | Path  # (P,), or the file that holds it
    residuals: dict  # what rounding to a narrow dtype kept back (error feedback); changed by `Clients`


# -----------------------------------------------------------------------------
# a strategy's view of the round


class Clients:
    """The clients of a round. A strategy is called once on every rank, and uses three methods:

    sum     sums over all clients of the round, by one all-reduce
    shards  a share of the coordinates of every client, by one all-to-all
    join    the whole vector again, from the shares of all ranks

    All ranks take part in each of them, in the same order. `start` (P,) are the shared LoRA parameters as the round
    began, `shapes` the shapes of their tensors.
    """

    def __init__(self, comm, turns, start, shapes=(), part=""):
        """`turns` are what this rank's clients handed in, with the attributes of Update."""
        self.comm, self.turns, self.start, self.shapes, self.part = comm, turns, start, shapes, part
        self.calls = 0  # each call has residuals of its own

    def load(self, turn):
        return Client(turn.client, turn.weight, load_vector(turn.update, self.comm.device))

    def sum(self, terms):
        """Return the sums over all clients of what `terms(client)` returns: a tensor, a number, or a tuple of these.

        float32 tensors, summed in float64, so that it does not matter which rank plays which client. All terms travel
        in one all-reduce. Exceptions are long vectors with a narrow --average_dtype (`Communicator.sum_codes`) and
        between machines (`Communicator.sum_by_machine`). A later sum may depend on an earlier one.
        """
        comm, name = self.comm, self.next_name("sum")
        sums, together, codes = None, None, None
        for turn in self.turns:
            values = as_tensors(terms(self.load(turn)))
            if sums is None:
                sums, together = make_sums(comm, values)
                codes = [[] for _ in values]
            for i, value in enumerate(values):
                if comm.sends_codes(value):
                    encoded = self.encode(turn, value, f"{name} {i}")
                    codes[i].append(encoded)
                    comm.bytes_sent += encoded.num_bytes()
                else:
                    add(sums[i], value, first=turn is self.turns[0])
                    comm.bytes_sent += 4 * value.numel() * (value.numel() > 1)
        if sums is None:  # none of this rank's clients counts: it only needs the shapes
            values = as_tensors(terms(Client(-1, 1.0, torch.ones_like(self.start))))
            sums, together = make_sums(comm, values)
            codes = [[] for _ in values]
            for each in sums:
                each.zero_()

        if len(together):
            comm.all_reduce(together)
        results = []
        for i, value in enumerate(values):
            if comm.sends_codes(value):
                total = comm.sum_codes(codes[i], value.numel())
            elif comm.sums_by_machine(value):
                total = comm.sum_by_machine(sums[i], f"{name} {i}")
            else:
                total = sums[i]
            results.append(total.float().view(value.shape))
        return tuple(results) if len(results) > 1 else results[0]

    def shards(self, sizes=None):
        """Return (values, weights): this rank's share of the coordinates of every client, in the order of clients.

        values is float32 (clients, C), weights float64 (clients,). Rank r has the r-th stretch of every update,
        sizes[r] long; by default all are equally long. Nobody holds the whole updates of all clients.
        """
        name, encoded = self.next_name("shards"), []
        for turn in self.turns:
            update = self.load(turn).update
            if self.comm.is_narrow(update):
                encoded.append(self.encode(turn, update, name))
            else:
                encoded.append(Encoded(turn.client, turn.weight, update))
            self.comm.bytes_sent += encoded[-1].num_bytes()
        dtype = self.comm.average_dtype if self.comm.is_narrow(self.start) else "float32"
        return self.comm.exchange(encoded, sizes or self.even_sizes(), dtype)

    def join(self, values, sizes=None):
        """Return the vector (P,) of which rank r has the r-th stretch, `values`, sizes[r] long."""
        return self.comm.join(values, sizes or self.even_sizes())

    def sum_over_ranks(self, tensor):
        """Return the sum of a float64 tensor over all ranks: of products of shards, for instance."""
        self.comm.all_reduce(tensor)
        return tensor

    def own_stretch(self, vector, sizes=None):
        """Return this rank's stretch of a vector (P,)."""
        return vector.split(sizes or self.even_sizes())[self.comm.rank]

    def even_sizes(self):
        return even_sizes(self.start.numel(), self.comm.world_size)

    def encode(self, turn, vector, name):
        codes, scales = encode(vector.to(self.comm.device), self.comm.average_dtype, turn.residuals, name)
        return Encoded(turn.client, turn.weight, codes, scales)

    def next_name(self, method):
        self.calls += 1
        return f"{self.part} {method} {self.calls}"


def make_sums(comm, values):
    """Return (sums, together): a float64 vector per term; those that one all-reduce takes are parts of `together`."""
    sizes = [value.numel() for value in values if comm.sums_together(value)]
    together = torch.empty(sum(sizes), dtype=torch.float64, device=comm.device)
    views, sums = iter(together.split(sizes)), []
    for value in values:
        if comm.sums_together(value):
            sums.append(next(views))
        else:
            size = 0 if comm.sends_codes(value) else value.numel()
            sums.append(torch.empty(size, dtype=torch.float64, device=comm.device))
    return sums, together


def add(total, value, first):
    """Add a term to a float64 sum (P,), or begin it."""
    value = value.reshape(-1).to(total.device)
    if first:
        total.copy_(value)
    else:
        total.add_(value)


def as_tensors(terms):
    """Return what a strategy sums as a list of tensors."""
    terms = terms if isinstance(terms, tuple) else (terms,)
    return [torch.as_tensor(term) for term in terms]


def load_vector(vector, device):
    """Return a vector (P,), from its file if it is in one."""
    if isinstance(vector, (str, Path)):
        return torch.load(vector, weights_only=True, map_location=device)
    return vector


def even_sizes(total, parts):
    """Return the lengths of `parts` stretches of `total` coordinates, at most one apart."""
    size, rest = divmod(total, parts)
    return [size + (i < rest) for i in range(parts)]


# -----------------------------------------------------------------------------
# ranks and machines


class Communicator:
    """All that ranks send each other, in the order of a round:

    1. `meet`: a message of some hundred bytes from every rank to every rank, over gloo. Norms of the updates before the
       averaging, reports after it. It waits for the slowest rank, and names those that are missing.
    2. `all_reduce` (float32 updates): sums in float64. 16 bytes per number and rank for a client's 4.
    3. `sum_codes` (narrow updates): `exchange` gives every rank the codes of all clients for its share of the
       coordinates; it adds them up in float64; `join` sends the sums back as bfloat16.
    4. `sum_by_machine` (several machines): a sum within each machine in float64, then steps as in 3 between the first
       ranks of the machines only, in --average_dtype; then a broadcast within each machine.

    Over NCCL, vectors travel from GPU to GPU and messages still over gloo. One rank alone needs no process group.
    """

    def __init__(
        self, rank, world_size, backend="gloo", machine_of_rank=None, average_dtype="float32", timeout_minutes=30
    ):
        self.rank, self.world_size, self.average_dtype = rank, world_size, average_dtype
        self.device = torch.device("cuda" if backend == "nccl" else "cpu")
        self.timeout = datetime.timedelta(minutes=timeout_minutes)
        self.machine_of_rank = list(machine_of_rank or [0] * world_size)
        self.machine = self.machine_of_rank[rank]
        self.num_machines = len(set(self.machine_of_rank))
        self.residuals = {}  # of the sums that this machine sends to others
        self.bytes_sent = 0  # by the clients of this rank: the vectors that their strategy passed on
        self.bytes_between_machines = 0  # sent by this rank to ranks on other machines
        # process groups: None is the default one, gloo's, of all ranks
        self.everyone = self.here = self.firsts = None
        if world_size > 1 and backend != dist.get_backend():
            self.everyone = dist.new_group(backend=backend, timeout=self.timeout)
        if self.num_machines > 1:
            for machine in range(self.num_machines):  # all ranks make all groups
                group = dist.new_group(self.ranks_of(machine), backend=backend, timeout=self.timeout)
                if machine == self.machine:
                    self.here = group
            firsts = [self.ranks_of(machine)[0] for machine in range(self.num_machines)]
            self.firsts = dist.new_group(firsts, backend=backend, timeout=self.timeout)

    @classmethod
    def of_default_group(cls):
        """Return the communicator of torch.distributed's default process group."""
        return cls(dist.get_rank(), dist.get_world_size(), dist.get_backend())

    def ranks_of(self, machine):
        return [rank for rank, its_machine in enumerate(self.machine_of_rank) if its_machine == machine]

    def is_first_here(self):
        """Whether this rank is the first one on its machine."""
        return self.ranks_of(self.machine)[0] == self.rank

    # ---- messages

    def meet(self, message=None):
        """Wait until all ranks are here; returns the message of every rank, in the order of ranks.

        Raises TimeoutError, with the numbers of the ranks that are missing.
        """
        if self.world_size == 1:
            return [message]
        began = time.monotonic()
        try:
            dist.monitored_barrier(timeout=self.timeout, wait_all_ranks=True)
        except RuntimeError as error:
            minutes = self.timeout.total_seconds() / 60
            missing = re.search(r"Ranks ([\d, ]+) failed", str(error))
            if not missing:  # only rank 0 knows who
                raise LostContact(f"rank 0 gave up waiting, or is gone (--timeout {minutes:g})") from None
            if time.monotonic() - began < 0.9 * self.timeout.total_seconds():
                raise ConnectionError(f"rank {missing[1]} is gone") from None
            raise TimeoutError(f"no sign of rank {missing[1]} for {minutes:g} minutes (--timeout)") from None
        messages = [None] * self.world_size
        dist.all_gather_object(messages, message)  # all ranks participate
        return messages

    def send(self, value, destination):
        """Send an object to the rank `destination`, which calls `receive`."""
        dist.send_object_list([value], dst=destination)

    def receive(self, source):
        values = [None]
        dist.recv_object_list(values, src=source)
        return values[0]

    # ---- vectors

    def broadcast(self, vector):
        """Replace a vector by that of rank 0, on all ranks."""
        if self.world_size > 1:
            dist.broadcast(vector, src=0, group=self.everyone)  # all ranks participate

    def all_reduce(self, tensor):
        """Replace a tensor by its sum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.everyone)  # all ranks participate

    def is_narrow(self, vector):
        """Whether a vector is sent in fewer bits than it has."""
        return self.average_dtype != "float32" and vector.numel() >= narrow.CODE_BLOCK

    def sums_by_machine(self, vector):
        return self.num_machines > 1 and vector.numel() >= narrow.CODE_BLOCK

    def sends_codes(self, vector):
        """Whether each client's vector travels for itself, and not the sum of this rank's clients."""
        return self.is_narrow(vector) and self.num_machines == 1

    def sums_together(self, vector):
        return not self.is_narrow(vector) and not self.sums_by_machine(vector)

    def sum_codes(self, encoded, size, group=None, dtype=None):
        """Return the sum (size,) of the vectors of all senders, added up in float64."""
        sizes = even_sizes(size, self.size_of(group))
        values, _ = self.exchange(encoded, sizes, dtype or self.average_dtype, group)
        sums = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
        for value in values:
            sums += value
        return self.join(sums, sizes, group)

    def sum_by_machine(self, vector, name="", dtype=None):
        """Return the sum (P,), float32, of the float64 vectors of all ranks."""
        dtype = dtype or self.average_dtype
        dist.reduce(vector, group=self.here, group_dst=0)  # all ranks of this machine participate
        total = torch.empty(len(vector), device=vector.device)
        if self.is_first_here():
            codes, scales = encode(vector, dtype, self.residuals, name)
            encoded = Encoded(self.machine, 1.0, codes, scales)
            total = self.sum_codes([encoded], len(vector), self.firsts, dtype)
        dist.broadcast(total, group=self.here, group_src=0)  # all ranks of this machine participate
        return total

    def sum_vector(self, vector):
        """Return the sum of the float64 vectors (P,) of all ranks; between machines it travels as float32."""
        if self.num_machines > 1:
            return self.sum_by_machine(vector, dtype="float32")
        self.all_reduce(vector)
        return vector

    def exchange(self, encoded, sizes, dtype="float32", group=None):
        """Give every rank its stretch of the vectors of all senders, by one all-to-all.

        `encoded` are the vectors (P,) that this rank sends, of `dtype`; rank r gets the r-th stretch of each, sizes[r]
        long. Returns (values, weights): float32 (senders, C) and float64 (senders,), in the order of senders.
        """
        heads = [(each.sender, each.weight, each.scales) for each in encoded]
        rank, size = self.rank_in(group), sizes[self.rank_in(group)]
        everyone = self.gather(heads, group)
        sent = interleave([each.codes for each in encoded], sizes, getattr(torch, dtype), self.device)
        received = sent
        if self.size_of(group) > 1:
            received = sent.new_empty(sum(len(part) for part in everyone) * size)
            lengths_in = [len(part) * size for part in everyone]
            lengths_out = [len(encoded) * each for each in sizes]
            # all ranks of the group participate
            dist.all_to_all_single(received, sent, lengths_in, lengths_out, group=group or self.everyone)
            self.count_bytes(lengths_out, sent.element_size(), group)

        heads = list(itertools.chain.from_iterable(everyone))
        values = received.view(len(heads), size).float()
        weights = torch.empty(len(heads), dtype=torch.float64, device=values.device)
        senders = []
        for i, (sender, weight, scales) in enumerate(heads):
            senders.append(sender)
            weights[i] = weight
            if scales is not None:
                values[i] *= scales_of_stretch(scales, sum(sizes[:rank]), size, values.device)
        order = sorted(range(len(senders)), key=senders.__getitem__)
        if order != list(range(len(senders))):
            values, weights = values[order], weights[order]
        return values, weights

    def join(self, values, sizes, group=None):
        """Return the vector (P,) of which rank r has the r-th stretch, sizes[r] long; every rank gets all of it.

        It travels as float32, or as bfloat16 with a narrow --average_dtype; between machines only once.
        """
        dtype = torch.float32 if self.average_dtype == "float32" else torch.bfloat16
        vector = values.new_empty(sum(sizes), dtype=dtype)
        stretches = vector.split(sizes)
        stretches[self.rank_in(group)].copy_(values)
        if group or self.num_machines == 1:
            self.spread(stretches, group)
            return vector.float()
        self.spread([stretches[rank] for rank in self.ranks_of(self.machine)], self.here)
        if self.is_first_here():
            sizes_by_machine = [0] * self.num_machines
            for machine, size in zip(self.machine_of_rank, sizes):
                sizes_by_machine[machine] += size
            self.spread(vector.split(sizes_by_machine), self.firsts)
        dist.broadcast(vector, group=self.here, group_src=0)  # all ranks of this machine participate
        return vector.float()

    def spread(self, parts, group):
        """Send the i-th part from the i-th rank of the group to all others."""
        if self.size_of(group) == 1:
            return
        works = []
        for i, part in enumerate(parts):
            if len(part):
                works.append(dist.broadcast(part, group=group or self.everyone, group_src=i, async_op=True))
        for work in works:
            work.wait()  # all ranks of the group participate
        if group is self.firsts and group:
            own = parts[self.rank_in(group)]
            self.bytes_between_machines += own.numel() * own.element_size() * (len(parts) - 1)

    # ---- groups: None means all ranks

    def size_of(self, group):
        return dist.get_world_size(group) if group else self.world_size

    def rank_in(self, group):
        return dist.get_rank(group) if group else self.rank

    def gather(self, value, group):
        """Return the value of every rank of the group; of all ranks over gloo."""
        if self.size_of(group) == 1:
            return [value]
        values = [None] * self.size_of(group)
        dist.all_gather_object(values, value, group=group)  # all ranks of the group participate
        return values

    def count_bytes(self, lengths_out, width, group):
        """Count what leaves this machine: everything between the first ranks, else what goes to ranks elsewhere."""
        machines = range(len(lengths_out)) if group is self.firsts and group else self.machine_of_rank
        for machine, length in zip(machines, lengths_out):
            if machine != self.machine:
                self.bytes_between_machines += length * width


def interleave(vectors, sizes, dtype, device):
    """Return the first stretches of all vectors, then the second ones, and so on, as one vector to send."""
    if len(vectors) == 1:
        return vectors[0]
    stretches = [vector.split(sizes) for vector in vectors]
    parts = list(itertools.chain.from_iterable(zip(*stretches)))
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)
