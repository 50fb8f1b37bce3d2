"""What runs inside the ranks of the tests: at top level, so that a child process can import it.

A target is a function (rank, args, run). It replaces functions of the sources in its own process, and then does what
main.run_rank does.
"""

import gc
import inspect
import os
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

import utils

TRACED_SECONDS = 240  # of a run that takes 10
COLLECTIVES = """all_reduce broadcast barrier monitored_barrier all_gather all_gather_object all_to_all_single reduce
gather scatter send recv send_object_list recv_object_list""".split()


def note_collectives(calls):
    """Replace the collectives of torch.distributed by ones that first append (name, numel or None) to `calls`."""
    for name in COLLECTIVES:

        def noted(*args, name=name, original=getattr(dist, name), **kwargs):
            calls.append((name, args[0].numel() if args and torch.is_tensor(args[0]) else None))
            return original(*args, **kwargs)

        setattr(dist, name, noted)


def by_name(function, arguments):
    """Return positional arguments of a function as {name: value}."""
    return inspect.signature(function).bind(*arguments).arguments


def average_rank(rank, folder, values):
    """Average `values[rank]`, the tensors of a client, plainly; writes down the result."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", len(values)), rank=rank, world_size=len(values)
    )
    note_collectives(calls := [])
    model = torch.nn.ParameterList([torch.tensor(part) for part in values[rank]])
    model.append(torch.nn.Parameter(torch.full((2,), float(rank)), requires_grad=False))
    utils.federated_average(model, len(values))
    torch.save({"values": [p.tolist() for p in model], "calls": calls}, f"{folder}/average_{rank}.pt")
    try:
        utils.federated_average(model, len(values) + 1)
    except ValueError:
        dist.destroy_process_group()
    else:
        raise AssertionError("a wrong world_size was taken")


# -----------------------------------------------------------------------------
# runs that write down what they do


def traced_rank(rank, args, run):
    """main.run_rank in the environment of a launcher such as torchrun; writes down what the five faults would change.

    The self-check is silent here, so that a fault comes as far as the trace.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "ACCELERATE_USE_CPU": "true"}
    signal.alarm(TRACED_SECONDS)  # with DDP, a rank may hang when it leaves, where no --timeout ends it
    import trl

    import federated
    import main
    from fllama import publish, selfcheck

    trace = {"collectives": [], "batches": [], "learning_rates": [], "updates": [], "weights": []}
    note_collectives(trace["collectives"])
    selfcheck.check = lambda comm, log, passed, text: None
    original_start, original_steps = federated.start_or_resume, federated.local_steps
    original_step, original_publish = trl.SFTTrainer.training_step, publish.publish
    in_local_steps = []

    def start_or_resume(*arguments):
        given = by_name(original_start, arguments)
        trainer, lora = given["trainer"], given["lora"]
        trace["own_start"] = utils.flatten_parameters(lora)
        found = original_start(*arguments)
        trace["start"] = utils.flatten_parameters(lora)
        trace["processes"] = trainer.accelerator.num_processes
        trace["wrapped"] = type(trainer.model_wrapped).__name__
        trace["names"] = [name for name, each in trainer.model.named_parameters() if each.requires_grad]
        trace["dtypes"] = {parameter.dtype for parameter in lora}
        return found

    def local_steps(*args):
        in_local_steps.append(True)
        loss = original_steps(*args)
        in_local_steps.clear()
        return loss

    def training_step(self, model, inputs, *rest):
        pad = self.processing_class.pad_token_id
        trace["batches"].append([tuple(ids[ids != pad].tolist()) for ids in inputs["input_ids"]])
        return original_step(self, model, inputs, *rest)

    def before_optimizer_step(optimizer, *args):
        if in_local_steps:
            trace["learning_rates"].append(optimizer.param_groups[0]["lr"])

    def traced_fedavg(clients, state, fedavg=utils.fedavg):
        (turn,) = clients.turns
        trace["updates"].append(turn.update.clone())
        trace["weights"].append(turn.weight)
        return fedavg(clients, state)

    def publish_and_save(*arguments):
        model = by_name(original_publish, arguments)["trainer"].model
        trace["end"] = utils.flatten_parameters(utils.shared_parameters(model, "lora_"))
        torch.save(trace, f"{args.output_dir}/trace_{rank}.pt")
        original_publish(*arguments)

    federated.start_or_resume, federated.local_steps = start_or_resume, local_steps
    trl.SFTTrainer.training_step, publish.publish = training_step, publish_and_save
    register_optimizer_step_pre_hook(before_optimizer_step)
    utils.AGGREGATORS["fedavg"] = traced_fedavg
    main.run_rank(rank, args, run)


def gradients_rank(rank, args, run):
    """One rank plays all clients; writes down what is added to each step's gradient, and what it depends on."""
    from accelerate import Accelerator

    import federated
    import main

    trace, now = [], {}
    original_steps, original_clip = federated.local_steps, Accelerator.clip_grad_norm_

    def gradient():
        return utils.flatten_parameters([parameter.grad for parameter in now["parameters"]])

    def local_steps(*arguments):
        now.update(by_name(original_steps, arguments))
        return original_steps(*arguments)
        now.clear()

    def clip_grad_norm_(self, *args):
        original_clip(self, *args)
        now["before"] = gradient()

    def before_optimizer_step(optimizer, *args):
        if not now:  # the step that creates the optimizer's state
            return
        number, start = now["server"].rounds_done + 1, now["server"].start
        moved = utils.flatten_parameters(now["parameters"]) - start
        step = {"round": number, "client": now["turn"].client, "before": now["before"], "moved": moved}
        trace.append(step | {"added": gradient() - now["before"]})

    federated.local_steps, Accelerator.clip_grad_norm_ = local_steps, clip_grad_norm_
    register_optimizer_step_pre_hook(before_optimizer_step)
    main.run_rank(rank, args, run)
    torch.save(trace, f"{args.output_dir}/gradients.pt")


def ask_to_stop(program, rank, args, run):
    """Ask the program to stop, and then finish as if it had come too late."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what the program passes on
    os.kill(program, signal.SIGUSR1)
    time.sleep(1)


# -----------------------------------------------------------------------------
# many runs in one launch, on rows that are prepared once


def run_case(folder, flags, rank, args, run, checkpoint=None):
    """Run one federation of its own in the ranks of this launch, from the beginning or a checkpoint."""
    import federated
    import main
    from fllama import data, launch, report

    if run.num_gpus:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # of the case before
    case = main.parse_args([*flags, "--eval_questions", "1", "--output_dir", str(folder)])
    launch.isolate_rank(rank, args, run)
    data.GLOBAL_EVAL_ROWS = 2  # what takes the time
    report.plot_losses = lambda folder, rounds: None
    gc.freeze()  # the imported modules, which each trainer would collect anew
    os.makedirs(folder, exist_ok=True)
    rendezvous = f"{run.rendezvous}_{Path(folder).name}"
    federated.local_train(rank, case, replace(run, checkpoint=checkpoint, rendezvous=rendezvous))


def layouts_rank(flags, cases, rank, args, run):
    """Run every one of `cases`, flags by name, each in a folder of its name in output_dir."""
    for name, more in cases.items():
        run_case(f"{args.output_dir}/{name}", [*flags, *more.split()], rank, args, run)


def resume_rank(flags, cases, rank, args, run):
    """Run every case to its end, and again from the checkpoint before its last round (half) and after it (end)."""
    from fllama import runlog

    for name, more in cases.items():
        flags_of_case, whole = [*flags, *more.split()], f"{args.output_dir}/{name}"
        run_case(whole, flags_of_case, rank, args, run)
        last = max(entry["round"] for entry in runlog.read_rounds(whole))
        for copy, rounds_done in ((f"{whole}_half", last - 1), (f"{whole}_end", last)):
            resume_case(whole, copy, rounds_done, flags_of_case, rank, args, run)


def resume_elsewhere_rank(flags, cases, source, rank, args, run):
    """Resume every case that `source` has, from the checkpoint before its last round."""
    from fllama import runlog

    for name, more in cases.items():
        last = max(entry["round"] for entry in runlog.read_rounds(f"{source}/{name}"))
        copy, flags_of_case = f"{args.output_dir}/{name}", [*flags, *more.split()]
        resume_case(f"{source}/{name}", copy, last - 1, flags_of_case, rank, args, run)


def resume_case(whole, copy, rounds_done, flags, rank, args, run):
    """Copy a finished run as it was after `rounds_done` rounds, and resume it."""
    from fllama import runlog

    if rank == 0:
        later = f"round_{rounds_done + 1:05d}"
        gone = shutil.ignore_patterns(later, "client_models", "federated_global_model")
        shutil.copytree(whole, f"{copy}.tmp", ignore=gone)
        runlog.cut_back_logs(f"{copy}.tmp", rounds_done)
        os.rename(f"{copy}.tmp", copy)
    while not os.path.exists(copy):
        time.sleep(0.01)
    checkpoint = max(Path(copy, "checkpoints").glob("round_*"))
    assert checkpoint.name == f"round_{rounds_done:05d}"
    run_case(copy, flags, rank, args, run, checkpoint)


# -----------------------------------------------------------------------------
# what goes wrong


def faulty_rank(fault, rank, args, run):
    """main.run_rank with one of the faults that the self-check is there for."""
    from accelerate import Accelerator

    import federated
    import main
    from fllama import data

    if fault == "curve from zero":
        original = federated.build_optimizer

        def build_optimizer(args, trainer):
            learning_rate = original(args, trainer)
            return lambda number, step: learning_rate(number, step - 1)

        federated.build_optimizer = build_optimizer
    elif fault == "own start":
        dist.broadcast = lambda *args, **kwargs: None
    elif fault == "ddp":
        original = federated.start_or_resume

        def start_or_resume(*arguments):
            found, trainer = original(*arguments), by_name(original, arguments)["trainer"]
            trainer.model_wrapped = torch.nn.parallel.DistributedDataParallel(trainer.model)
            return found

        federated.start_or_resume = start_or_resume
    elif fault == "shared gradients":

        def average_gradients(self, parameters, *args):
            for parameter in parameters:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)

        Accelerator.clip_grad_norm_ = average_gradients
    elif fault == "same rows":

        def first_rows(self, client, number):
            return self.own[client][self.schedules[client][: self.rows_per_turn]].tolist()

        data.ClientData.rows_of_turn = first_rows
    elif fault == "rows of others":

        def anybodys_rows(self, client, number):
            first = self.turns_before[number, client] * self.rows_per_turn
            return list(range(first, first + self.rows_per_turn))

        data.ClientData.rows_of_turn = anybodys_rows
    elif fault == "ranks apart":

        def almost_fedavg(clients, state, fedavg=utils.fedavg):
            state["round"] = state.get("round", 0) + 1
            return fedavg(clients, state) + 1e-3 * rank * (state["round"] == 2)

        utils.AGGREGATORS["fedavg"] = almost_fedavg
    else:
        raise ValueError(fault)
    main.run_rank(rank, args, run)


def drawn_rank(drawn, target, rank, args, run):
    """What `target` does, with these clients in each round instead of some that are drawn for dp_fedavg."""
    from fllama import privacy

    privacy.draw_clients = lambda *_: drawn
    target(rank, args, run)


def troubled_rank(trouble, victim, rank, args, run):
    """main.run_rank, but in the first launch something happens to rank `victim` in round 2."""
    import trl

    import federated
    import main
    from fllama import checkpoints, evaluate

    now = {"round": 0, "turn": 0, "batch": 0}
    original_steps, original_step = federated.local_steps, trl.SFTTrainer.training_step
    in_a_step = []  # (turn of round 2, function): called in the last forward pass of that turn

    def local_steps(*arguments):
        number = by_name(original_steps, arguments)["server"].rounds_done + 1
        now.update(round=number, turn=now["turn"] + 1 if number == now["round"] else 1, batch=0)
        return original_steps(*arguments)

    def training_step(self, *rest):
        now["batch"] += 1
        if now["round"] == 2 and now["batch"] == args.local_steps * args.gradient_accumulation_steps:
            for turn, function in in_a_step:
                if turn == now["turn"]:
                    function()
        return original_step(self, *rest)

    federated.local_steps, trl.SFTTrainer.training_step = local_steps, training_step

    def at(turn, function, who=victim):
        if rank == who:
            in_a_step.append((turn, function))

    def before(owner, name, function):
        """Call `function` before the victim's first call of owner.name in round 2."""
        original, called = getattr(owner, name), []

        def wrapped(*args, **kwargs):
            if rank == victim and now["round"] == 2 and not called:
                called.append(True)
                function()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def be_stopped():
        os.kill(os.getpid(), signal.SIGTERM)

    def fill_the_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    def fail_in_two_lines():
        raise RuntimeError("something with a line\nand another")

    def run_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    if run.rendezvous.endswith("_0") and not run.checkpoint:
        if trouble == "killed in a step":
            at(1, die)
        elif trouble == "killed in a collective":  # the other rank is in it already
            before(dist, "all_reduce", lambda: (time.sleep(0.5), die()))
        elif trouble == "killed while saving":
            before(checkpoints, "seal", die)
        elif trouble == "stopped in a step":  # the other rank waits for it
            at(1, lambda: (time.sleep(1), be_stopped()))
        elif trouble == "stopped ahead of the others":
            at(1, be_stopped)
            at(1, lambda: time.sleep(1), 1 - victim)
        elif trouble == "stopped in a later turn":
            at(2, be_stopped)
        elif trouble == "stopped while evaluating":
            before(evaluate, "evaluate", be_stopped)
        elif trouble == "stopped while saving":
            before(checkpoints, "seal", be_stopped)
        elif trouble == "no answer in a collective":
            before(dist, "all_reduce", lambda: os.kill(os.getpid(), signal.SIGSTOP))
        elif trouble == "slow":
            at(1, lambda: time.sleep(60))
        elif trouble == "slow round":
            at(1, lambda: time.sleep(4))
        elif trouble == "disk full":
            before(checkpoints, "write_checkpoint", fill_the_disk)
        elif trouble == "exception":
            at(1, fail_in_two_lines)
        elif trouble == "out of memory":
            at(1, run_out_of_memory)
        else:
            raise ValueError(trouble)
    main.run_rank(rank, args, run)


def poisoned_rank(poison, clients, rank, args, run, bad_round=2):
    """main.run_rank, but after the last step of a round the tensors of `clients` are `poison` times as large."""
    import federated
    import main

    original = federated.local_steps

    def local_steps(*arguments):
        loss = original(*arguments)
        given = by_name(original, arguments)
        if given["server"].rounds_done + 1 == bad_round and given["turn"].client in clients:
            for parameter in given["trainer"].model.parameters():
                if parameter.requires_grad:
                    parameter.data.mul_(poison)
        return loss

    federated.local_steps = local_steps
    main.run_rank(rank, args, run)
