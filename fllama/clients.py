"""What a client keeps between its turns, what it hands in, and moving it from rank to rank."""

from dataclasses import dataclass, field, replace

import torch

import utils


@dataclass
class ClientState:
    """What a client keeps in host memory between its turns; saved in a checkpoint as one file per client."""

    optimizer: dict | None = None  # of all parameters, by kind: AdamW's moments
    scaler: dict | None = None  # fp16: state of the gradient scaler
    private: torch.Tensor | None = None  # LoRA parameters that it does not share
    control: torch.Tensor | None = None  # SCAFFOLD's c_i (P,): its mean gradient of its last turn
    residuals: dict = field(default_factory=dict)  # what rounding to a narrow dtype kept back (error feedback)


@dataclass
class Turn:
    """What a client hands in after its local steps of a round."""

    client: int
    weight: float  # rows that it trains on
    residuals: dict  # those of its ClientState
    update: object = None  # float32 (P,), or the file that holds it
    norm: float = 0.0  # of the update; infinite if a private parameter is not finite
    train_loss: float = 0.0  # nats per answer token, mean over the local steps
    tokens: int = 0  # of the rows that it read
    step_skipped: bool = False  # by fp16's gradient scaler
    gradient: torch.Tensor | None = None  # SCAFFOLD: the mean gradient of its local steps (P,), in host memory
    private_before: torch.Tensor | None = None  # its private parameters before its local steps
    adapter: torch.Tensor | None = None  # for the aggregation error
    digest: str | None = None  # of its adapter before the averaging
    rows_read: list | None = None  # for the self-check: the numbers of the rows, and a digest of their tokens
    tokens_digest: str | None = None
    eval_loss: tuple | None = None  # evaluate.Loss on its own held-out rows
    global_eval_loss: tuple | None = None  # the same of its own model on the global held-out rows

    def report(self):
        """Return what the other ranks get to know of this turn."""
        bulky = {"update": None, "residuals": None, "adapter": None, "gradient": None, "private_before": None}
        return replace(self, **bulky)


class LocalClients:
    """The clients of one rank: one is in the model and the optimizer, the others wait in host memory.

    A client that is alone on its rank stays in the model from round to round.
    """

    def __init__(self, args, optimizer, scaler, private, first_private):
        """`private` are the parameters of the model that are not shared, `first_private` what they begin as."""
        self.keep_optimizer = args.client_state == "keep"
        self.optimizer, self.scaler = optimizer, scaler
        self.private, self.first_private = private, first_private
        self.states = {}  # client -> ClientState
        self.current = None  # the client in the model

    def state_of(self, client):
        return self.states.setdefault(client, ClientState())

    def begin_turn(self, client, weight, parameters, start):
        """Bring a client into the model for its turn; returns the Turn, still without steps."""
        self.load(client, parameters, start)
        if not self.keep_optimizer:
            load_optimizer_state(self.optimizer, None)
        residuals = self.state_of(client).residuals
        return Turn(client, weight, residuals, private_before=utils.flatten_parameters(self.private))

    def load(self, client, parameters, start):
        """Bring a client into the model: its optimizer state, its private parameters, the round's start (P,)."""
        if client == self.current:
            return
        self.put_away()
        state = self.state_of(client)
        load_optimizer_state(self.optimizer, state.optimizer)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        utils.unflatten_parameters(self.private, self.first_private if state.private is None else state.private)
        utils.unflatten_parameters(parameters, start)
        state.optimizer = state.scaler = state.private = None  # now in the model
        self.current = client

    def load_own_model(self, client):
        """Bring in the private parameters of a client; what is shared is the same for all."""
        self.load(client, parameters=[], start=torch.empty(0))

    def put_away(self):
        """Bring the client in the model back to host memory."""
        if self.current is not None:
            self.states[self.current] = self.snapshot(self.current)
        self.current = None

    def snapshot(self, client):
        """Return the whole state of a client; of the one in the model, a copy in host memory."""
        state = self.state_of(client)
        if client != self.current:
            return state
        return replace(
            state,
            optimizer=save_optimizer_state(self.optimizer) if self.keep_optimizer else None,
            scaler=self.scaler.state_dict() if self.scaler else None,
            private=utils.flatten_parameters(self.private) if self.private else None,
        )

    def undo(self, turn):
        """Bring a client back to before its turn, with a new optimizer state: that may be what went wrong."""
        if turn.client == self.current:
            self.current = None
        state = self.state_of(turn.client)
        state.optimizer = None
        state.private = turn.private_before

    def move(self, moves, comm):
        """Send clients to the ranks that play them now; the two ranks of each move participate."""
        for client, source, destination in moves:
            if comm.rank == source:
                if client == self.current:
                    self.put_away()
                state = self.states.pop(client)
                comm.send(state, destination)
                if comm.machine_of_rank[source] != comm.machine_of_rank[destination]:
                    comm.bytes_between_machines += count_bytes(vars(state))
            elif comm.rank == destination:
                self.states[client] = comm.receive(source)


# -----------------------------------------------------------------------------
# the state of an optimizer


def create_optimizer_state(optimizer):
    """Create the state that an optimizer makes at its first step, all zero, by a step that changes nothing.

    Clients then take turns in the same tensors. load_state_dict() would replace bitsandbytes' paged tensors by ordinary
    ones on the GPU, and clearing the state would leave them behind.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    load_optimizer_state(optimizer, None)


def save_optimizer_state(optimizer):
    """Copy an optimizer's state into host memory.

    Returns {kind: one vector of all parameters, or a list with a number of each}; see `state_by_kind`.
    """
    saved = {}
    for kind, values in state_by_kind(optimizer).items():
        if torch.is_tensor(values[0]):
            saved[kind] = copy_to_host(torch.cat([value.reshape(-1) for value in values]))
        else:
            saved[kind] = list(values)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # once for all kinds
    return saved


def load_optimizer_state(optimizer, saved):
    """Copy a saved state back, in place; None is a new state: zeros, as optimizers begin."""
    for kind, values in state_by_kind(optimizer).items():
        if not torch.is_tensor(values[0]):
            numbers = saved[kind] if saved else [0] * len(values)
            for parameter, number in zip(optimizer_parameters(optimizer), numbers):
                optimizer.state[parameter][kind] = number
        elif saved:
            utils.unflatten_parameters(values, saved[kind])
        else:
            torch._foreach_zero_(values)


def state_by_kind(optimizer):
    """Return {kind: values of all parameters}, of everything that an optimizer keeps, such as AdamW's two moments.

    A kind is a name, of tensors with their dtype (8-bit optimizers keep small ones in 32 bits), and whether they are
    paged: those are in the host's memory, small ones of the same optimizer on the GPU.
    """
    kinds = {}
    for parameter in optimizer_parameters(optimizer):
        for name, value in optimizer.state.get(parameter, {}).items():
            if is_code_book(name):
                continue
            kind = name
            if torch.is_tensor(value):
                kind += f" {value.dtype}" + " paged" * getattr(value, "is_paged", False)
            kinds.setdefault(kind, []).append(value)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # paged tensors are read and written by the host itself
    return kinds


def copy_to_host(vector):
    """Return a vector in host memory; a copy from a GPU is on its way until torch.cuda.synchronize()."""
    if vector.device.type == "cpu":
        return vector
    copy = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)  # page-locked, without which it would wait
    return copy.copy_(vector, non_blocking=True)


def optimizer_parameters(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def is_code_book(name):
    """Whether this is bitsandbytes' 8-bit code book, the same for all clients."""
    return name.startswith("qmap")


def count_bytes(value):
    """Return how many bytes the tensors in lists and dicts have."""
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(count_bytes(part) for part in value) if isinstance(value, (list, tuple)) else 0
