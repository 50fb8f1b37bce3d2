"""The life of one rank: `local_train`. A round reads as in FedAvg (McMahan et al. 2017): local steps, one averaging.

Words: a client is who owns rows; a rank plays several clients in turn; a Turn is what a client hands in for a round; an
update is how far its shared LoRA parameters moved, as one float32 vector (P,).
"""

import datetime
import math
import os
import resource
import statistics
import sys

import numpy as np
import torch
import torch.distributed as dist

import utils
from fllama import audit, checkpoints, data, evaluate, launch, options, privacy, publish, report, runlog, selfcheck
from fllama.accountant import Ledger, announce
from fllama.clients import LocalClients
from fllama.collectives import Communicator, load_vector
from fllama.model import build_optimizer, build_trainer, load_model, load_tokenizer, lora_parameters, silence_libraries
from fllama.terminal import forgive_readers

NO_TENSOR = "nothing"  # in no tensor's name
BAD_RATIO = 1000  # an update longer than so many times the median of its round is rejected


def local_train(rank, args, run):
    """Train this rank's clients in federation with those of the other ranks, and leave behind what a run leaves.

    `args` are the flags, `run` is what preparation has found (prepare.Run). Raises launch.EndRun with exit code 3 if
    this would not be federated learning or no update can be used, and with 143 after a request to stop.
    """
    device = torch.device("cuda", 0) if run.num_gpus else torch.device("cpu")
    comm = join_ranks(rank, args, run)
    privacy.check_dtype(args, device)
    rows = data.load_client_data(rank, args, run, privacy.draw_clients(args, run, comm))
    model, tokenizer = load_model(args, run.model_path, device), load_tokenizer(run.model_path)
    trainer = build_trainer(args, run, device, model, tokenizer)  # a toolbox: its train() is never called
    learning_rate_at = build_optimizer(args, trainer)  # (round, local step) -> rate; sets trainer.optimizer
    lora, private = lora_parameters(model), private_parameters(args, model)
    server, clients = start_or_resume(args, run, comm, trainer, rows, lora, private)
    private_by_row, ledger = options.private_by_row(args), None
    if private_by_row:
        privacy.watch_rows(model)
    if rank == 0 and not args.quiet:
        report.print_header(args, run, rows, server, clients, model.get_memory_footprint())
    if not run.checkpoint:
        server.scores_before = evaluate.score_before(args, comm, trainer, rows)
    log = runlog.RunLog(rank, args, rows, server.rounds_done)
    if run.guarantee:
        ledger = Ledger(args, run.guarantee)
        announce(args, log, ledger, rows.plan[server.rounds_done :], count_trained(args, model))
    first_round = server.rounds_done + 1
    # what all ranks must agree on: all of LoRA; after a resume only the shared part, as each client has its own rest
    start = server.start if run.checkpoint else utils.flatten_parameters(lora)
    first_rate = learning_rate_at(min(first_round, args.num_rounds), 0)  # after the last, nothing is left to learn
    selfcheck.before_training(comm, log, trainer, start, first_rate, rows, bool(run.checkpoint) or private_by_row)
    measured = selfcheck.measured_parameters(lora, max(1, len(rows.plan[0].clients())))
    strategy = options.strategy_of(args, run.guarantee)
    alternates = len(variant_of(args)) > 1  # RoLoRA trains B and A in turn
    stop_request = launch.StopRequest(announcement(rank, args, run))  # Ctrl-C and SIGTERM
    number, ended = server.rounds_done, ""

    for number in range(first_round, args.num_rounds + 1):
        evaluating, saving = is_due(args, number, args.eval_rounds), is_due(args, number, args.save_rounds)
        plan = rows.plan[number - 1]
        trained, shared = parts_of_round(args, number)
        if number == first_round or alternates:
            parameters = train_parts(model, trained, shared)
        clients.move(plan.moves, comm)  # to the ranks that play them now
        if ledger:
            ledger.commit(comm, number, plan)  # what is about to leave the clients is spent, whatever happens now

        # 1. local training: this rank plays its clients in turn, and talks to nobody
        turns = []
        for client in plan.shares[rank]:
            turn = clients.begin_turn(client, rows.num_train[client], parameters, server.start)
            sequences, batches = read_turn(args, run, trainer, rows, turn, number)
            turn.tokens = data.count_tokens(sequences)
            loss = local_steps(
                args, trainer, batches, parameters, server, clients.state_of(client), turn, number, learning_rate_at
            )
            hand_in(turn, loss, parameters, private, server.start)
            if number == first_round and not private_by_row:
                turn.tokens_digest = data.digest_of(sequences)
            if number == first_round or private:
                turn.digest = runlog.digest(utils.flatten_parameters(lora))
            if evaluating and not private:
                turn.adapter = utils.flatten_parameters(measured, comm.device)
            if client != plan.shares[rank][-1]:
                put_aside(turn, f"{run.data_path}_update_{rank}_{len(turns)}.pt")
            turns.append(turn)
            log.bar.update(args.local_steps)

        # 2. averaging: one all-reduce; afterwards all ranks have the same shared LoRA
        norms = comm.meet({turn.client: turn.norm for turn in turns})  # waits for the slowest rank
        seconds = {"local": log.lap()}
        rejected = reject_bad_updates(args, log, number, norms)
        # with dp_fedavg, a round without clients is noise, and the run goes on: its length must not tell of anybody
        if rejected and len(rejected) == len(plan.clients()) and args.aggregator != "dp_fedavg":
            ended = f"round {number}: the update of every client is not finite; lower --learning_rate"
            utils.unflatten_parameters(parameters, server.start)
            undo_rejected(clients, turns, rejected)
            break
        good = [turn for turn in turns if turn.client not in rejected]
        state = server.strategy_state(number)
        average = utils.federated_average(model, args.world_size, server.start, good, strategy, state, comm, shared)
        averaged = server.start = utils.flatten_parameters(parameters, comm.device)
        update_norm, drift, checksum = measure(good, average, averaged)
        check_average(log, number, update_norm)
        if args.scaffold:
            move_control(args, comm, server, clients, good)
        undo_rejected(clients, turns, rejected)
        seconds["average"] = log.lap()

        # 3. now and then: evaluate, log, save (all ranks participate)
        measuring = evaluating and not private and plan.clients()  # dp_fedavg may draw nobody
        error = selfcheck.aggregation_error(comm, good, measured) if measuring else None
        global_loss = evaluate.evaluate_round(trainer, rows, turns, clients) if evaluating else None
        own_report = runlog.RankReport(
            turns=[turn.report() for turn in turns],
            global_loss=global_loss,
            drift=drift,
            checksum=checksum,
            memory=peak_memory(),
            bytes_sent=comm.bytes_sent,
            bytes_between_machines=comm.bytes_between_machines,
            asked_to_stop=stop_request.asked,
        )
        comm.bytes_sent = comm.bytes_between_machines = 0
        reports = comm.meet(own_report)
        selfcheck.after_averaging(args, comm, log, reports, rejected, first=number == first_round)
        seconds["eval"] = log.lap()

        server.rounds_done = number
        if alternates:  # the next round shares the other half
            next_parameters = train_parts(model, *parts_of_round(args, number + 1))
            server.start = utils.flatten_parameters(next_parameters, comm.device)
        asked = [other for other, each in enumerate(reports) if each.asked_to_stop and number < args.num_rounds]
        if saving or asked:
            files = checkpoints.write_checkpoint(args.output_dir, server, lora, clients, comm)
        seconds["save"] = log.lap()
        rate = learning_rate_at(number, args.local_steps - 1)
        log.round(number, rate, reports, rejected, update_norm, error, seconds, averaged, ledger and ledger.spent())
        if saving or asked:
            log.wait()  # a checkpoint has every round before it in the logs
            checkpoints.commit_checkpoint(args.output_dir, server.rounds_done, files, comm)
        if asked:
            log.close()
            raise launch.EndRun(launch.STOPPED, f"rank {asked[0]} was ended by SIGTERM")

    # the end: answer the questions again, and write down what the run has come to
    stop_request.ignore()  # all rounds are saved; a signal now ends the process at once
    log.close()
    last_clients = rows.plan[number - 1].shares[rank]
    results = evaluate.score_clients(args, comm, trainer, rows, last_clients, clients)
    audited = audit.audit(args, run, comm, trainer, clients)
    publish.publish(args, run, comm, trainer, rows, server, clients, results, audited, ledger)
    comm.meet()  # nobody leaves before it is there
    dist.destroy_process_group()
    if ended:
        raise launch.EndRun(3, f"{ended}. What round {number - 1} has come to is in {publish.folder_name(args)}")


# -----------------------------------------------------------------------------
# before the first round


def join_ranks(rank, args, run):
    """Join the other ranks; returns the Communicator. torchrun's ranks have met before."""
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # a line is to be seen when its round ends
    forgive_readers()
    silence_libraries()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # whatever the number of ranks: with more threads, sums are rounded otherwise
    torch.manual_seed(args.seed + rank)
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(run.rendezvous, args.world_size),  # no socket listens for it
            rank=rank,
            world_size=args.world_size,
            timeout=datetime.timedelta(minutes=args.timeout),
        )
    return Communicator(rank, args.world_size, args.backend, run.machine_of_rank, args.average_dtype, args.timeout)


def start_or_resume(args, run, comm, trainer, rows, lora, private):
    """Start from the same LoRA on all ranks, or go on from a checkpoint; returns (Server, LocalClients)."""
    if run.checkpoint:
        server, vector = checkpoints.load_server(run.checkpoint, comm.device)
    else:
        vector = utils.flatten_parameters(lora, comm.device)
        comm.meet()  # names ranks that never came; a broadcast would not
        comm.broadcast(vector)  # from a different A on each rank, the first average would be noise
    utils.unflatten_parameters(lora, vector)
    if not run.checkpoint:
        start = utils.flatten_parameters(train_parts(trainer.model, *parts_of_round(args, 1)), comm.device)
        server = checkpoints.Server(
            start=start,
            first_private=utils.flatten_parameters(private),
            control=torch.zeros_like(start) if args.scaffold else None,
            strategy_states=[{} for _ in variant_of(args)],
        )
    optimizer, scaler = trainer.optimizer.optimizer, trainer.accelerator.scaler
    clients = LocalClients(args, optimizer, scaler, private, server.first_private)
    if run.checkpoint:
        own = rows.last_played_here(server.rounds_done)
        clients.states = checkpoints.load_clients(run.checkpoint, own)
        comm.residuals = checkpoints.load_machine_residuals(run.checkpoint, comm)
    return server, clients


# -----------------------------------------------------------------------------
# what is trained, what is shared


def variant_of(args):
    """Return (what a client trains, what of that it shares), by a part of the tensors' names; one per kind of round."""
    variant = utils.LORA_VARIANTS[args.lora_variant]
    if args.aggregator == "none":
        return [(trained, NO_TENSOR) for trained, _ in variant]
    return variant


def parts_of_round(args, number):
    """Return what is trained and what is shared in round `number`, by a part of their names."""
    variant = variant_of(args)
    return variant[(number - 1) % len(variant)]


def train_parts(model, trained, shared):
    """Let the parameters with `trained` in their name have gradients; returns those that are shared."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = trained in name
    return utils.shared_parameters(model, shared)


def count_trained(args, model):
    """Return how many numbers a client trains in a round."""
    trained, _ = parts_of_round(args, 1)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if trained in name)


def private_parameters(args, model):
    """Return the parameters that stay with their client: FedSA's B, or all; then every client has its own model."""
    trained, shared = variant_of(args)[0]
    return [parameter for name, parameter in model.named_parameters() if trained in name and shared not in name]


# -----------------------------------------------------------------------------
# 1. local training


def read_turn(args, run, trainer, rows, turn, number):
    """Return (sequences of a turn, the batches that its local steps take); notes the rows in `turn`."""
    if not options.private_by_row(args):
        turn.rows_read = rows.rows_of_turn(turn.client, number)
        sequences = rows.sequences_of_turn(turn.client, number)
        return sequences, data.read_batches(sequences, trainer)
    turn.rows_read = []  # who was drawn stays secret
    steps = privacy.draw_steps(args, run.guarantee, turn.client, rows.own[turn.client])
    batches = privacy.private_steps(args, run.guarantee, turn.client, steps, rows.sequences, trainer)
    return rows.sequences.select(sum(steps, [])), batches


def local_steps(args, trainer, batches, parameters, server, client_state, turn, number, learning_rate_at):
    """Take the optimizer steps of a client in round `number`; returns its mean loss, a tensor on the model's device."""
    # its dropout masks are its own, whatever its rank did before
    torch.manual_seed(int(np.random.SeedSequence([args.seed, turn.client, number]).generate_state(1)[0]))
    accelerator, optimizer, scaler = trainer.accelerator, trainer.optimizer, trainer.accelerator.scaler
    loss = torch.zeros((), device=trainer.args.device)
    if args.prox_mu:
        anchors = split_like(server.start, parameters)
    if args.scaffold:
        own_control = torch.zeros_like(server.control) if client_state.control is None else client_state.control
        corrections = split_like(server.control - own_control.to(server.control.device), parameters)
        gradient_sums = [torch.zeros_like(parameter) for parameter in parameters]

    for step in range(args.local_steps):
        # forward and backward, summed over the micro-batches; the loss's gradient is clipped before the terms below
        if options.private_by_row(args):  # the gradient of each row for itself, and noise: all that follows is private
            loss += privacy.noisy_gradient(trainer, batches)
        else:
            samples, num_tokens = trainer.get_batch_samples(batches, args.gradient_accumulation_steps, loss.device)
            for sample in samples:
                loss += trainer.training_step(trainer.model_wrapped, sample, num_tokens)
            accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        # FedProx, Li et al. 2020 (arXiv:1812.06127): the gradient of mu/2 ||w - start||^2
        if args.prox_mu:
            for parameter, anchor in zip(parameters, anchors):
                parameter.grad.add_(parameter.detach() - anchor, alpha=args.prox_mu)
        # SCAFFOLD, Karimireddy et al. 2020 (arXiv:1910.06378): plus c, minus the client's c_i
        if args.scaffold:
            for parameter, total, correction in zip(parameters, gradient_sums, corrections):
                total += parameter.grad.nan_to_num(0, 0, 0)  # fp16 may overflow, and the step is then skipped
                parameter.grad += correction
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(number, step)
        scale = scaler.get_scale() if scaler else None
        optimizer.step()
        optimizer.zero_grad()
        if scaler and scaler.get_scale() < scale:
            turn.step_skipped = True

    if args.scaffold:
        turn.gradient = utils.flatten_parameters(gradient_sums) / args.local_steps
    return loss.double() / args.local_steps


def hand_in(turn, loss, parameters, private, start):
    """Note in `turn` its loss, and how far the shared parameters moved from `start` (P,)."""
    turn.update = utils.flatten_parameters(parameters, start.device).sub_(start)
    norm = torch.linalg.vector_norm(turn.update, dtype=torch.float64)
    finite = utils.flatten_parameters(private, loss.device).isfinite().all()
    numbers = torch.stack([loss, norm.to(loss.device), finite.double()])
    turn.train_loss, turn.norm, all_finite = numbers.tolist()  # the one wait for the GPU before the averaging
    if not all_finite:
        turn.norm = math.inf


def put_aside(turn, path):
    """Write an update into a file until the round ends: a rank holds one in memory, however many clients it plays."""
    torch.save(turn.update, path)
    turn.update = path


def split_like(vector, parameters):
    """Return the parts of a vector (P,) that belong to the parameters, on their device."""
    vector = vector.to(parameters[0].device)
    parts = vector.split([parameter.numel() for parameter in parameters])
    return [part.view_as(parameter) for part, parameter in zip(parts, parameters)]


# -----------------------------------------------------------------------------
# 2. averaging: what comes before and after it


def reject_bad_updates(args, log, number, norms):
    """Return {client: what is wrong} of the updates that are left out; the same on all ranks.

    `norms` has {client: norm} of every rank. With --on_bad_update fail, a bad update ends the run.
    """
    norm_of_client = {}
    for part in norms:
        norm_of_client |= part
    rejected = find_bad_updates(norm_of_client, by_median=args.aggregator != "dp_fedavg")  # it looks at all clients
    for client, problem in rejected.items():
        if args.on_bad_update == "fail":
            log.close()
            text = f"round {number}: the update of client {client} is {problem}; lower --learning_rate"
            raise launch.EndRun(3, text)
        log.warn(f"  client {client} is left out of round {number}: its update is {problem}")
    return rejected


def find_bad_updates(norms, by_median=True):
    """Return {client: what is wrong} of the updates that would spoil an average, by their norms, {client: norm}.

    Those that are NaN or infinite, or, `by_median`, longer than BAD_RATIO times the median (the lower one of an even
    number).
    """
    finite = [norm for norm in norms.values() if math.isfinite(norm)]
    median = statistics.median_low(finite or [0])
    bad = {}
    for client, norm in sorted(norms.items()):
        if not math.isfinite(norm):
            bad[client] = "not finite"
        elif by_median and norm > BAD_RATIO * median > 0:
            bad[client] = f"{norm / median:,.0f} times as long as the median"
    return bad


def undo_rejected(clients, turns, rejected):
    for turn in turns:
        if turn.client in rejected:
            clients.undo(turn)


def measure(turns, average, averaged):
    """Return (norm of the averaged update, drift of this rank's clients, checksum of the averaged parameters).

    `average` (P,) is the update, `averaged` (P,) what the parameters have come to. Drift is {client: distance of its
    update from the averaged one, relative to the norm of the latter}; empty if that is 0.
    """
    numbers = [torch.linalg.vector_norm(average, dtype=torch.float64), runlog.checksum(averaged)]
    for turn in turns:
        difference = load_vector(turn.update, average.device) - average
        numbers.append(torch.linalg.vector_norm(difference).double())
    update_norm, checksum, *distances = torch.stack(numbers).tolist()  # the one wait for the GPU after the averaging
    drift = {}
    for turn, distance in zip(turns, distances):
        if update_norm:
            drift[turn.client] = round(distance / update_norm, 6)
    return update_norm, drift, checksum


def check_average(log, number, update_norm):
    """End the run if the averaged update is not finite. The same on all ranks."""
    if not math.isfinite(update_norm):
        log.close()
        text = f"round {number}: the averaged update is not finite; lower --learning_rate or --server_lr"
        raise launch.EndRun(3, text)


def move_control(args, comm, server, clients, turns):
    """Move SCAFFOLD's c by what changed in the c_i of this round's clients; all ranks participate.

    c_i becomes the mean gradient of the client's turn: no SGD algebra, so it holds for AdamW too.
    """
    change = torch.zeros_like(server.control, dtype=torch.float64)
    for turn in turns:
        state = clients.state_of(turn.client)
        before = torch.zeros_like(turn.gradient) if state.control is None else state.control
        change += (turn.gradient - before).to(change.device)
        state.control = turn.gradient
        comm.bytes_sent += 4 * turn.gradient.numel()
    server.control += (comm.sum_vector(change) / args.num_clients).float()


# -----------------------------------------------------------------------------
# 3. now and then


def is_due(args, number, rounds):
    """Whether something that is done every so many rounds, and after the last one, is due in round `number`."""
    return number % rounds == 0 or number == args.num_rounds


def announcement(rank, args, run):
    """Return a function that says what a request to stop does, for rank 0 of torchrun; else main.py says it."""
    if rank > 0 or not run.by_torchrun:
        return None
    return lambda: f"{launch.describe_stop(args)}; torchrun waits 30 s for it"


def peak_memory():
    """Return this process's peak memory so far, in GB: on the GPU if it has one, otherwise in the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # in KB on Linux
