"""What a client keeps between its turns: its optimizer state goes out and comes back bit for bit."""

import argparse

import bitsandbytes as bnb
import pytest
import torch

import utils
from fllama.clients import (
    ClientState,
    LocalClients,
    Turn,
    count_bytes,
    create_optimizer_state,
    load_optimizer_state,
    save_optimizer_state,
)

SHAPES = [(64, 80), (16,), (4097,)]  # bitsandbytes keeps small tensors in float32
OPTIMIZERS = {
    "adamw_torch": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "sgd with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "paged_adamw_32bit": lambda parameters: bnb.optim.PagedAdamW32bit(parameters, lr=0.01, weight_decay=0.1),
    "adamw_8bit": lambda parameters: bnb.optim.AdamW8bit(parameters, lr=0.01, weight_decay=0.1),
}


def new_parameters():
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def take_steps(optimizer, parameters, client, number):
    """Two steps with gradients that only this client has in this round."""
    generator = torch.Generator().manual_seed(100 * number + client)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = (client + 1) * torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


def new_clients(name="adamw_torch", state="keep", private=()):
    """The clients of a rank, and their parameters."""
    parameters = new_parameters()
    trained = [*parameters, *private]
    optimizer = OPTIMIZERS[name](trained)
    create_optimizer_state(optimizer)
    first_private = utils.flatten_parameters(private)
    args = argparse.Namespace(client_state=state)
    return LocalClients(args, optimizer, None, list(private), first_private), parameters


def equal_states(state, other):
    """Whether two saved optimizer states have the same bits."""
    assert state.keys() == other.keys()
    for kind, value in state.items():
        if torch.is_tensor(value) and not torch.equal(value, other[kind]):
            return False
        if not torch.is_tensor(value) and value != other[kind]:
            return False
    return True


def places_of(optimizer):
    """Where the tensors of an optimizer's state are in memory."""
    places = []
    for state in optimizer.state.values():
        places += [value.data_ptr() for value in state.values() if torch.is_tensor(value)]
    return places


# -----------------------------------------------------------------------------
# the optimizer's state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_creating_the_state_changes_no_parameter_and_no_later_step(name):
    """The same bits as of a fresh optimizer, which creates its state at its first step."""
    fresh, created = new_parameters(), new_parameters()
    optimizers = [OPTIMIZERS[name](parameters) for parameters in (fresh, created)]
    create_optimizer_state(optimizers[1])
    assert all(map(torch.equal, fresh, created)) and optimizers[1].param_groups[0]["lr"] == 0.01
    assert all(parameter.grad is None for parameter in created)
    for number in range(3):
        for optimizer, parameters in zip(optimizers, (fresh, created)):
            take_steps(optimizer, parameters, client=0, number=number)
        assert all(map(torch.equal, fresh, created))
    assert not torch.equal(fresh[0], new_parameters()[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clients_in_turn_are_clients_apart(name):
    """Three clients in turn in one optimizer, and each with an optimizer of its own: the same bits in every round.

    Client 1 plays in every second round only, and each round begins from another start.
    """
    clients, parameters = new_clients(name)
    apart = {}
    for client in range(3):
        own = new_parameters()
        apart[client] = own, OPTIMIZERS[name](own)
    for number in range(5):
        start = torch.randn(sum(parameter.numel() for parameter in parameters))
        for client in (0, 1, 2) if number % 2 == 0 else (2, 0):
            clients.begin_turn(client, 1.0, parameters, start)
            utils.unflatten_parameters(parameters, start)
            take_steps(clients.optimizer, parameters, client, number)
            own, optimizer = apart[client]
            utils.unflatten_parameters(own, start)
            take_steps(optimizer, own, client, number)
            assert all(map(torch.equal, parameters, own)), (client, number)
    clients.put_away()
    assert all(clients.state_of(client).optimizer is not None for client in range(3))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_comes_back_bit_for_bit(name):
    clients, parameters = new_clients(name)
    optimizer = clients.optimizer
    fresh = save_optimizer_state(optimizer)
    take_steps(optimizer, parameters, client=0, number=1)
    saved = save_optimizer_state(optimizer)
    places = places_of(optimizer)
    load_optimizer_state(optimizer, None)
    assert equal_states(save_optimizer_state(optimizer), fresh)
    load_optimizer_state(optimizer, saved)
    assert equal_states(save_optimizer_state(optimizer), saved)
    assert places_of(optimizer) == places  # in place: bitsandbytes' paged tensors stay paged
    assert name == "sgd" or not equal_states(saved, fresh)
    take_steps(optimizer, parameters, client=0, number=2)
    assert name == "sgd" or not equal_states(save_optimizer_state(optimizer), saved)  # what was saved is a copy


def test_code_books_are_not_saved():
    """bitsandbytes' 8-bit code book is the same for all clients."""
    clients, _ = new_clients("adamw_8bit")
    kinds = set(save_optimizer_state(clients.optimizer))
    assert not any(kind.startswith("qmap") for kind in kinds)
    assert {"step", "state1 torch.uint8", "state1 torch.float32", "absmax1 torch.float32"} <= kinds


def test_reset_begins_every_turn_with_a_new_state():
    """Even of a client that is alone on its rank; nothing waits for it."""
    for players in ([0], [0, 1]):
        clients, parameters = new_clients(state="reset")
        start = torch.zeros(sum(parameter.numel() for parameter in parameters))
        for number in range(3):
            for client in players:
                clients.begin_turn(client, 1.0, parameters, start)
                utils.unflatten_parameters(parameters, start)
                own = new_parameters()
                utils.unflatten_parameters(own, start)
                take_steps(clients.optimizer, parameters, client, number)
                take_steps(OPTIMIZERS["adamw_torch"](own), own, client, number)
                assert all(map(torch.equal, parameters, own))
        clients.put_away()
        assert all(state.optimizer is None for state in clients.states.values())


# -----------------------------------------------------------------------------
# clients come and go


def new_private():
    return [torch.nn.Parameter(torch.full((3,), 5.0))]


def test_private_parameters_wait_for_their_client():
    private = new_private()
    clients, parameters = new_clients(private=private)
    start = torch.zeros(sum(parameter.numel() for parameter in parameters))
    for client in range(2):
        turn = clients.begin_turn(client, 10.0, parameters, start)
        assert private[0].tolist() == turn.private_before.tolist() == [5, 5, 5]  # as all begin
        assert (turn.client, turn.weight) == (client, 10) and turn.residuals is clients.state_of(client).residuals
        private[0].data.fill_(client)
    for client in range(2):
        clients.load_own_model(client)
        assert private[0].tolist() == [client] * 3
    assert not any(parameter.any() for parameter in parameters)  # what is shared is not touched


def test_a_client_alone_stays_in_the_model():
    """It is not loaded again, as the averaging has left the round's start in the model."""
    clients, parameters = new_clients()
    clients.load(0, parameters, torch.zeros(sum(parameter.numel() for parameter in parameters)))
    before = utils.flatten_parameters(parameters)
    clients.load(0, parameters, torch.ones(len(before)))
    assert torch.equal(utils.flatten_parameters(parameters), before) and clients.state_of(0).optimizer is None


def test_a_snapshot_is_a_copy():
    private = new_private()
    clients, parameters = new_clients(private=private)
    start = torch.zeros(sum(parameter.numel() for parameter in parameters))
    clients.load(0, parameters, start)
    clients.state_of(0).control = torch.ones(2)
    take_steps(clients.optimizer, [*parameters, *private], 0, 1)
    snapshot = clients.snapshot(0)
    kept, moments = snapshot.private.clone(), snapshot.optimizer["exp_avg torch.float32"].clone()
    take_steps(clients.optimizer, [*parameters, *private], 0, 2)
    assert torch.equal(snapshot.private, kept) and torch.equal(snapshot.optimizer["exp_avg torch.float32"], moments)
    assert torch.equal(snapshot.control, torch.ones(2)) and snapshot.private.shape == (3,)
    assert clients.current == 0 and clients.state_of(0).optimizer is None  # it is still in the model
    clients.put_away()
    assert clients.snapshot(0) is clients.states[0]


@pytest.mark.parametrize("current", [True, False])
def test_undo_brings_a_client_back_to_before_its_turn(current):
    """With a new optimizer state, in the model or not; the other client keeps its own."""
    private = new_private()
    clients, parameters = new_clients(private=private)
    trained, start = [*parameters, *private], torch.zeros(sum(parameter.numel() for parameter in parameters))
    for client in (1, 0):  # 0 is in the model
        clients.load(client, parameters, start)
        take_steps(clients.optimizer, trained, client, 1)
    bad = 0 if current else 1
    other = clients.snapshot(1 - bad)
    moments, others_private = other.optimizer, other.private
    clients.undo(Turn(bad, 1.0, {}, private_before=torch.tensor([7.0, 8.0, 9.0])))
    clients.load(bad, parameters, start)
    assert private[0].tolist() == [7, 8, 9]
    fresh = save_optimizer_state(clients.optimizer)
    assert not fresh["exp_avg torch.float32"].any() and not fresh["step torch.float32"].any()
    clients.load(1 - bad, parameters, start)
    assert equal_states(save_optimizer_state(clients.optimizer), moments)
    assert torch.equal(private[0], others_private)


class Post:
    """A communicator whose messages wait in a list."""

    def __init__(self, rank, machine_of_rank, letters):
        self.rank, self.machine_of_rank, self.letters = rank, machine_of_rank, letters
        self.bytes_between_machines = 0

    def send(self, value, destination):
        self.letters.append((self.rank, destination, value))

    def receive(self, source):
        sender, destination, value = self.letters.pop(0)
        assert (sender, destination) == (source, self.rank)
        return value


@pytest.mark.parametrize("machines", [(0, 0, 0), (0, 1, 1)])
def test_a_client_moves_with_all_that_it_has(machines):
    letters, ranks = [], []
    for _ in range(3):
        ranks.append(new_clients(private=new_private()))
    (clients, parameters), (others, _), (third, _) = ranks
    start = torch.zeros(sum(parameter.numel() for parameter in parameters))
    clients.load(4, parameters, start)
    take_steps(clients.optimizer, parameters, 4, 1)
    state = clients.snapshot(4)
    clients.states[4].residuals["sum"] = torch.ones(6)
    posts = [Post(rank, machines, letters) for rank in range(3)]
    for (each, _), post in zip(ranks, posts):
        each.move([(4, 0, 1)], post)
    assert 4 not in clients.states and clients.current is None and not third.states and not letters
    moved = others.states[4]
    assert equal_states(moved.optimizer, state.optimizer) and torch.equal(moved.private, state.private)
    assert moved.residuals["sum"].tolist() == [1] * 6
    if machines[1] == 0:
        assert [post.bytes_between_machines for post in posts] == [0, 0, 0]
    else:
        moments = 2 * sum(parameter.numel() for parameter in clients.optimizer.param_groups[0]["params"])
        steps = len(clients.optimizer.param_groups[0]["params"])
        assert [post.bytes_between_machines for post in posts] == [4 * (moments + steps + 3 + 6), 0, 0]


def test_count_bytes():
    state = ClientState(
        optimizer=[{"a": torch.zeros(3), "b": 7}], control=torch.zeros(2), residuals={"x": torch.zeros(5)}
    )
    assert count_bytes(vars(state)) == 4 * (3 + 2 + 5)
    assert count_bytes(None) == count_bytes("text") == 0


def test_a_report_of_a_turn_has_nothing_bulky():
    turn = Turn(3, 2.0, {"x": torch.ones(9)}, update=torch.ones(9), adapter=torch.ones(9), gradient=torch.ones(9))
    turn.private_before, turn.train_loss = torch.ones(9), 0.5
    report = turn.report()
    assert not any(torch.is_tensor(value) for value in vars(report).values()) and report.residuals is None
    assert (report.client, report.weight, report.train_loss) == (3, 2.0, 0.5) and turn.update is not None


def test_the_host_waits_before_it_reads_what_a_gpu_may_be_writing(monkeypatch):
    """Paged state is host memory that kernels write to; and copies to the host have to end before they are used."""
    clients, _ = new_clients("adamw_torch")
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts: done.append("read") or cat(parts))
    saved = save_optimizer_state(clients.optimizer)
    assert done[0] == "wait" and done[-1] == "wait" and "read" in done
    done.clear()
    load_optimizer_state(clients.optimizer, saved)
    assert done == ["wait"]
