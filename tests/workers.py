"""What runs inside the ranks of the tests: at top level, so that a child process can import it."""

import argparse
import gc
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

import utils

COLLECTIVES = """all_reduce broadcast barrier all_gather all_gather_object all_to_all_single reduce gather scatter send
recv send_object_list recv_object_list""".split()


def note_collectives(calls):
    """Replace the collectives of torch.distributed by ones that first append (name, numel or None) to `calls`."""
    for name in COLLECTIVES:

        def noted(*args, name=name, original=getattr(dist, name), **kwargs):
            calls.append((name, args[0].numel() if args and torch.is_tensor(args[0]) else None))
            return original(*args, **kwargs)

        setattr(dist, name, noted)


def traced_rank(rank, args):
    """main.run_rank in the environment of a launcher such as torchrun; writes down what the faults would change."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "ACCELERATE_USE_CPU": "true"}
    import federated
    import main

    trace = {"collectives": [], "batches": [], "learning_rates": [], "updates": [], "weights": []}
    note_collectives(trace["collectives"])

    class TracedTrainer(federated.LocalTrainer):
        def training_step(self, model, inputs, *rest):
            pad = self.processing_class.pad_token_id
            trace["batches"].append([tuple(ids[ids != pad].tolist()) for ids in inputs["input_ids"]])
            return super().training_step(model, inputs, *rest)

    class TracedRounds(federated.FederatedRounds):
        def on_train_begin(self, args, state, control, model, **kwargs):
            trace["own_start"] = utils.flatten_parameters(self.lora)
            super().on_train_begin(args, state, control, model=model, **kwargs)
            trace["start"] = utils.flatten_parameters(self.lora)
            trace["processes"] = self.trainer.accelerator.num_processes
            trace["wrapped"] = type(self.trainer.model_wrapped).__name__
            trace["names"] = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            trace["dtypes"] = {parameter.dtype for parameter in self.lora}

        def on_optimizer_step(self, args, state, control, **kwargs):
            super().on_optimizer_step(args, state, control, **kwargs)
            trace["learning_rates"].append(self.learning_rate)

        def on_train_end(self, args, state, control, model, **kwargs):
            trace["end"] = utils.flatten_parameters(self.lora)
            torch.save(trace, f"{self.args.output_dir}/trace_{rank}.pt")

    def traced_fedavg(update, weight, state, fedavg=utils.fedavg):
        trace["updates"].append(update.clone())
        trace["weights"].append(weight)
        return fedavg(update, weight, state)

    federated.LocalTrainer, federated.FederatedRounds = TracedTrainer, TracedRounds
    utils.AGGREGATORS["fedavg"] = traced_fedavg
    main.run_rank(rank, args)


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


def layouts_rank(flags, cases, rank, args):
    """Run every one of `cases`, flags by name, on the data that main.py has prepared once."""
    for name, more in cases.items():
        run_case(f"{args.output_dir}/{name}", [*flags, *more.split()], rank, args)


def run_case(folder, flags, rank, args, resume_from=None):
    import federated
    import main
    import report

    utils.ANSWERED_ROWS, utils.GLOBAL_EVAL_ROWS, utils.CLIENT_EVAL_ROWS = 1, 2, 1
    report.plot_losses = lambda folder: None
    gc.freeze()  # the imported modules, which each trainer would collect anew
    for name in main.LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    case = main.parse_args([*flags, "--output_dir", folder])
    case.model_path, case.data_path, case.resume_from = args.model_path, args.data_path, resume_from
    case.store_path = f"{args.store_path}_{Path(folder).name}"
    os.makedirs(folder, exist_ok=True)
    federated.local_train(rank, case)


def resume_rank(flags, cases, rank, args):
    """Run every case to its end, and again from the checkpoint before its last round (half) and after it (end)."""
    for name, more in cases.items():
        flags_of_case, whole = [*flags, *more.split()], f"{args.output_dir}/{name}"
        run_case(whole, flags_of_case, rank, args)
        last = max(entry["round"] for entry in utils.read_rounds(whole))
        for copy, resumed in ((f"{whole}_half", last - 1), (f"{whole}_end", last)):
            if rank == 0:
                later = f"round_{last:05d}" if resumed < last else "none"
                gone = shutil.ignore_patterns(later, "client_models", "federated_global_model")
                shutil.copytree(whole, f"{copy}.tmp", ignore=gone)
                utils.cut_back_logs(f"{copy}.tmp", resumed)
                os.rename(f"{copy}.tmp", copy)
            while not os.path.exists(copy):
                time.sleep(0.01)
            run_case(copy, flags_of_case, rank, args, resume_from=max(Path(copy, "checkpoints").glob("round_*")))


def gradients_rank(rank, args):
    """One rank plays all clients; writes down what is added to each step's gradient, and what it depends on."""
    import federated
    import main

    trace = []

    class TracedRounds(federated.FederatedRounds):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            def gradient():
                return utils.flatten_parameters([p.grad for p in self.parameters])

            before = gradient()
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            number, client, _ = self.data.turns[state.global_step // self.args.local_steps]
            moved = utils.flatten_parameters(self.parameters) - self.start
            trace.append(
                {"round": number, "client": client, "before": before, "added": gradient() - before, "moved": moved}
            )

    federated.FederatedRounds = TracedRounds
    main.run_rank(rank, args)
    torch.save(trace, f"{args.output_dir}/gradients.pt")


def faulty_rank(fault, rank, args):
    """main.run_rank with one of the faults that the self-check is there for."""
    import trl

    import federated
    import main

    if fault == "curve from zero":
        federated.LocalTrainer.create_scheduler = trl.SFTTrainer.create_scheduler
    elif fault == "own start":
        dist.broadcast = lambda *args, **kwargs: None
    elif fault == "ddp":
        original = federated.FederatedRounds.on_train_begin

        def wrapped(self, *args, **kwargs):
            self.trainer.model_wrapped = torch.nn.parallel.DistributedDataParallel(self.model)
            original(self, *args, **kwargs)

        federated.FederatedRounds.on_train_begin = wrapped
    elif fault == "shared gradients":

        def average_gradients(self, *args, **kwargs):
            for parameter in self.parameters:
                dist.all_reduce(parameter.grad)

        federated.FederatedRounds.on_pre_optimizer_step = average_gradients
    elif fault == "same rows":
        federated.LocalTrainer._get_train_sampler = lambda self, *rows: [0] * len(self.train_dataset)
    main.run_rank(rank, args)


def two_sums(update, weight, state):
    """FedAvg as one would write it down, with a state that is changed before anything is sent."""
    state["rounds"] = state.get("rounds", torch.zeros(1)).add_(1)
    average = utils.sum_over_clients(weight * update) / utils.sum_over_clients(weight)
    return average * state["rounds"]


def strategies_rank(rank, folder, cases, world_size, layout):
    """Average the clients of every case, round by round; writes down the averages, and the aggregation error.

    Client k is played by rank k % world_size, or by another (`shuffled`), or by rank 0 whatever k is (`idle`). With
    `machines`, ranks 0 and 1 are on one, 2 and 3 on another, and 4 on a third.
    """
    import federated

    utils.AGGREGATORS["two_sums"] = two_sums
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", world_size), rank=rank, world_size=world_size
    )
    result = {"averages": {}}
    if layout == "machines":
        utils.set_machines([0, 0, 1, 1, 2])
        utils.CODE_BLOCK = 2  # that short vectors take this way, too
        result["streams"] = average_by_streams(rank)
    note_collectives(calls := [])
    offset = world_size - 1 if layout == "shuffled" else 0
    for name, case in cases.items():
        calls.clear()
        args = argparse.Namespace(aggregator=case["aggregate"], **case["settings"])
        model = torch.nn.ParameterList([torch.zeros(*shape) for shape in case["shapes"]])
        start, state, averages = case["start"], {}, []
        mine = [k for k in range(len(case["weights"])) if k % world_size == (rank + offset) % world_size]
        if layout == "idle":
            mine = [] if rank else list(range(len(case["weights"])))
        for updates in case["updates"]:
            clients = [(k, case["weights"][k], updates[k]) for k in (reversed(mine) if layout == "shuffled" else mine)]
            for i, (client, weight, update) in enumerate(clients[:-1]):  # a rank has all but its last in files
                torch.save(update.clone(), f"{folder}/update_{rank}_{i}.pt")
                clients[i] = (client, weight, f"{folder}/update_{rank}_{i}.pt")
            strategy = federated.make_strategy(args)
            average = utils.federated_average(model, world_size, start, clients, strategy, state)
            if name != "none":
                assert torch.equal(utils.flatten_parameters(list(model)), start + average)
            start = start + average
            averages.append(average)
        result["averages"][name] = averages
        if name == "fedavg":
            result["calls"] = list(calls)
        if name == "svd":
            clients = [(k, case["weights"][k], case["start"] + case["updates"][0][k]) for k in mine]
            result["error"] = utils.product_error(clients, [torch.Size(shape) for shape in case["shapes"]])
    torch.save(result, f"{folder}/strategies_{rank}.pt")
    dist.destroy_process_group()


def average_by_streams(rank):
    """Average the same 6 clients in 20 rounds; returns the averages and the bytes between machines, by dtype."""
    results = {}
    for dtype in ("float32", "bfloat16", "int8"):
        kept_back, averages, model = {"machine": {}}, [], torch.nn.ParameterList([torch.zeros(3000)])
        updates = torch.randn(6, 3000, generator=torch.Generator().manual_seed(4))
        clients = [(k, 1.0 + k, updates[k]) for k in ([0, 5] if rank == 0 else [rank])]
        utils.outbox["between"] = 0
        for _ in range(20):
            start = torch.zeros(3000)
            averages.append(utils.federated_average(model, 5, start, clients, dtype=dtype, kept_back=kept_back))
        results[dtype] = averages, utils.outbox["between"]
    return results


def troubled_rank(trouble, victim, rank, args):
    """main.run_rank, but in the first launch something happens to rank `victim` in round 2 (of 2 steps a turn)."""
    import federated
    import main

    def at(step, function, who=victim):
        """Call `function` in the forward pass of rank `who` that follows so many optimizer steps."""
        original = federated.LocalTrainer.training_step

        def training_step(self, *args):
            if self.state.global_step == step and rank == who:
                function()
            return original(self, *args)

        federated.LocalTrainer.training_step = training_step

    def before(owner, name, function, which=2):
        """Call `function` before the victim's second call of `name`, which is in round 2, or another one."""
        original, calls = getattr(owner, name), []

        def wrapped(*args, **kwargs):
            calls.append(name)
            if rank == victim and len(calls) == which:
                function()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def be_stopped():
        os.kill(os.getpid(), signal.SIGTERM)

    def fill_the_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    turns = -(-args.clients_per_round // args.world_size)
    middle = 2 * turns + 1  # of the first turn of round 2
    if args.store_path.endswith("_0") and not args.resume_from:
        if trouble == "killed in a step":
            at(middle, die)
        elif trouble == "killed in a collective":  # the other rank is in it already
            before(dist, "all_reduce", lambda: (time.sleep(0.5), die()))
        elif trouble == "killed while saving":
            before(utils, "seal", die)
        elif trouble == "stopped in a step":  # the other rank waits for it
            at(middle, lambda: (time.sleep(1), be_stopped()))
        elif trouble == "stopped ahead of the others":
            at(middle, be_stopped)
            at(middle, lambda: time.sleep(1), 1 - victim)
        elif trouble == "stopped in a later turn":
            at(middle + 2, be_stopped)
        elif trouble == "stopped while evaluating":
            before(federated, "evaluate", be_stopped, 1)
        elif trouble == "stopped while saving":
            before(utils, "seal", be_stopped)
        elif trouble == "no answer in a collective":
            before(dist, "all_reduce", lambda: os.kill(os.getpid(), signal.SIGSTOP))
        elif trouble == "slow":
            at(middle, lambda: time.sleep(60))
        elif trouble == "disk full":
            before(federated.FederatedRounds, "save", fill_the_disk)
        elif trouble == "exception":
            at(middle, lambda: (_ for _ in ()).throw(RuntimeError("something with a line\nand another")))
        elif trouble == "out of memory":
            at(middle, lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
        else:
            raise ValueError(trouble)
    main.run_rank(rank, args)


def poisoned_rank(poison, clients, rank, args, bad_round=2):
    """main.run_rank, but after the last step of a round the tensors of `clients` are `poison` times as large."""
    import federated
    import main

    original = federated.FederatedRounds.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        number, client, _ = self.data.turns[(state.global_step - 1) // self.args.local_steps]
        if state.global_step % self.args.local_steps == 0 and number == bad_round and client in clients:
            for parameter in [*self.parameters, *self.private]:
                parameter.data.mul_(poison)
        return original(self, args, state, control, **kwargs)

    federated.FederatedRounds.on_step_end = on_step_end
    main.run_rank(rank, args)
