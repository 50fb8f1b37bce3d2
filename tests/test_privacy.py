"""Private local steps, utils.dp_fedavg, and the account: gradients of rows, clips, noise, draws, what is spent."""

import functools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import dp_accounting
import numpy as np
import pytest
import torch
from conftest import make_trainer
from workers import drawn_rank, troubled_rank

import federated
import main
import utils
from fllama import accountant, audit, noise, options, prepare, privacy, runlog
from fllama.collectives import Clients, Communicator, Update
from fllama.options import EMBEDDED_DATA

DP = ["--dp_epsilon", "8"]

# -----------------------------------------------------------------------------
# gradients of single rows

LENGTHS = [(9, 3), (30, 1), (17, 12), (24, 7)]  # tokens of a row, and of its answer


def make_rows(lengths=LENGTHS):
    rng = np.random.default_rng(1)
    rows = []
    for length, answer in lengths:
        ids = rng.integers(5, 500, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length - answer) + ids[length - answer :]})
    return rows


@pytest.fixture
def watched(tmp_path, small_inputs):
    """A function that returns the trainer of a model in 4 bits whose B is not 0, and which notes gradients by row."""

    def make(*flags):
        args, trainer = make_trainer(tmp_path, *small_inputs, *flags)
        torch.manual_seed(2)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
        trainer.optimizer = trainer.create_optimizer()
        trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
        if trainer.args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        privacy.watch_rows(trainer.model)
        return trainer

    return make


def trained(trainer):
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def one_at_a_time(trainer, rows):
    """Return the gradients of each row by itself, from the model's own logits."""
    gradients = []
    for row in rows:
        trainer.model.zero_grad()
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = trainer.model(input_ids=ids).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1].float(), labels[1:]).backward()
        gradients.append([parameter.grad.clone() for parameter in trained(trainer)])
    trainer.model.zero_grad()
    return gradients


def distance(a, b):
    a, b = (torch.cat([part.reshape(-1) for part in parts]) for parts in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("flags", ["", "--gradient_checkpointing", "--lora_variant ffa", "--no-load_in_4bit"])
def test_gradients_of_rows_are_those_of_one_row_at_a_time(watched, flags):
    trainer, rows = watched(*flags.split()), make_rows()
    expected = one_at_a_time(trainer, rows)
    losses = privacy.backward_by_row(trainer, trainer.data_collator(rows))
    for i in range(len(rows)):
        found = [parameter.row_gradients[i] for parameter in trained(trainer)]
        assert distance(found, expected[i]) < 1e-5, i
    assert len(losses) == 4 and len(trained(trainer)) == (7 if "ffa" in flags else 14)


@pytest.mark.parametrize("flags", ["--lora_dropout 0.3", "--lora_dropout 0.3 --gradient_checkpointing"])
def test_with_dropout_each_row_has_its_own_mask(watched, flags):
    """The gradients by row add up to the gradient that autograd has for the sum of the losses, and rows differ."""
    trainer, row = watched(*flags.split()), make_rows([(20, 5)])[0]
    privacy.backward_by_row(trainer, trainer.data_collator([row, row, row]))
    sums = [parameter.row_gradients.sum(0) for parameter in trained(trainer)]
    assert distance(sums, [parameter.grad for parameter in trained(trainer)]) < 1e-5
    first, second = ([parameter.row_gradients[i] for parameter in trained(trainer)] for i in range(2))
    assert distance(first, second) > 0.1


def test_in_bfloat16_too(watched):
    trainer, rows = watched("--torch_dtype", "bfloat16"), make_rows()
    privacy.backward_by_row(trainer, trainer.data_collator(rows))
    sums = [parameter.row_gradients.sum(0) for parameter in trained(trainer)]
    assert distance(sums, [parameter.grad for parameter in trained(trainer)]) < 0.02


# -----------------------------------------------------------------------------
# clip and noise


def private(trainer, steps, clip_norm=math.inf, noise_multiplier=0.0, expected_rows=4.0):
    """The PrivateSteps of steps that are lists of micro-batches of rows."""
    batches = [[trainer.data_collator(rows) for rows in step] for step in steps]
    return privacy.PrivateSteps(iter(batches), clip_norm, noise_multiplier, expected_rows, noise.secret_generator())


def gradients_of(trainer):
    return [parameter.grad for parameter in trained(trainer)]


def test_clip_factors_by_hand():
    first, second = torch.tensor([[[3.0]], [[0.3]], [[math.nan]]]), torch.tensor([[[4.0]], [[0.4]], [[0.0]]])
    assert privacy.clip_factors([first, second], 2.5).tolist() == [0.5, 1, 0]  # 5 long, 0.5 long, not finite
    assert privacy.clip_factors([first, second], math.inf).tolist() == [1, 1, 0]


def test_the_step_is_the_mean_of_clipped_rows(watched):
    """Over micro-batches of unequal lengths, by what the rows' own gradients come to."""
    trainer, rows = watched(), make_rows()
    alone = one_at_a_time(trainer, rows)
    norms = [torch.cat([part.reshape(-1) for part in row]).norm().item() for row in alone]
    clip = sorted(norms)[1] * 1.01  # two of them are longer
    expected = [torch.zeros_like(part) for part in alone[0]]
    for row, norm in zip(alone, norms):
        for total, part in zip(expected, row):
            total += part * min(1, clip / norm) / 10
    mean = privacy.noisy_gradient(trainer, private(trainer, [[rows[:3], rows[3:]]], clip, expected_rows=10.0))
    assert distance(gradients_of(trainer), expected) < 1e-5
    assert mean == pytest.approx(
        np.mean([privacy.backward_by_row(trainer, trainer.data_collator([r])).item() for r in rows])
    )


def test_without_clip_and_noise_it_is_plain_training(watched):
    """Of rows with equally long answers, whose mean over rows is that over tokens."""
    trainer, rows = watched(), make_rows([(12, 4), (30, 4), (20, 4), (9, 4)])
    trainer.training_step(trainer.model_wrapped, trainer.data_collator(rows), torch.tensor(16))
    plain = [gradient.clone() for gradient in gradients_of(trainer)]
    trainer.model.zero_grad()
    privacy.noisy_gradient(trainer, private(trainer, [[rows[:2], rows[2:]]]))
    assert distance(gradients_of(trainer), plain) < 1e-6


def test_the_noise_is_what_was_promised_and_comes_from_no_seed(watched):
    """An empty step is noise alone: mean 0, standard deviation z C / B; and equal seeds do not make it equal."""
    trainer = watched("--seed", "1")
    draws = []
    for _ in range(40):
        torch.manual_seed(1)
        np.random.seed(1)
        assert privacy.noisy_gradient(trainer, private(trainer, [[]], 0.5, 3.0, 20.0)) == 0
        draws.append(torch.cat([gradient.reshape(-1) for gradient in gradients_of(trainer)]))
    values = torch.stack(draws).double()
    assert abs(values.mean()) < 5 * 0.075 / values.numel() ** 0.5
    assert values.std().item() == pytest.approx(0.075, rel=0.01)
    deviations = values.std(dim=0)
    assert 0.6 * 0.075 < deviations.mean() < 1.1 * 0.075 and deviations.min() > 0.02  # in every coordinate
    correlation = (values[0] @ values[1]) / (values[0].norm() * values[1].norm())
    assert abs(correlation) < 5 / values.shape[1] ** 0.5


# -----------------------------------------------------------------------------
# draws


def test_poisson_draws_of_rows():
    args, own = SimpleNamespace(local_steps=4000), np.arange(1000, 1100)
    promised = SimpleNamespace(sampling_rate=[0.0, 0.03])
    np.random.seed(1)
    steps = privacy.draw_steps(args, promised, 1, own)
    sizes = np.array([len(step) for step in steps])
    assert abs(sizes.mean() - 3) < 0.15 and abs(sizes.var() - 100 * 0.03 * 0.97) < 0.3
    assert abs((sizes == 0).mean() - 0.97**100) < 0.02  # empty steps
    counts = np.bincount(np.concatenate(steps).astype(int))
    assert len(counts) == 1100 and 70 < counts[1000:].min() and counts[1000:].max() < 180  # 120 each
    assert all(len(set(step)) == len(step) for step in steps)
    np.random.seed(1)
    assert privacy.draw_steps(args, promised, 1, own) != steps


def test_poisson_draws_of_clients(tmp_path):
    flags = "--world_size 1 --num_clients 10 --clients_per_round 2 --num_rounds 3000 --aggregator dp_fedavg".split()
    args = main.parse_args([*flags, *DP, "--output_dir", str(tmp_path)])
    run = prepare.Run("", "", guarantee=SimpleNamespace(sampling_rate=[0.2]))
    drawn = privacy.draw_clients(args, run, Communicator(0, 1))
    sizes = np.array([len(clients) for clients in drawn])
    assert len(drawn) == 3000 and abs(sizes.mean() - 2) < 0.1 and abs((sizes == 0).mean() - 0.8**10) < 0.03
    assert privacy.draw_clients(args, run, Communicator(0, 1)) != drawn
    # after a checkpoint, the rounds before it are as they were, and the others are drawn anew
    (tmp_path / "rounds.jsonl").write_text('{"round": 1, "clients": [3]}\n{"round": 2, "clients": []}\n')
    run = prepare.Run("", "", tmp_path / "round_00002", guarantee=run.guarantee)
    again = privacy.draw_clients(args, run, Communicator(0, 1))
    assert again[:2] == [[3], []] and len(again) == 3000 and again[2:] != drawn[2:]
    plan = utils.plan_rounds(10, 2, 3000, 2, seed=1, drawn_before=again)
    assert [played.clients() for played in plan] == again
    args.clients_per_round = 10
    assert privacy.draw_clients(args, run, Communicator(0, 1)) is None  # all take part: nothing to draw


# -----------------------------------------------------------------------------
# clients


def test_dp_fedavg_adds_the_noise_that_was_promised():
    updates = [torch.ones(20_000) / 100, torch.zeros(20_000)]  # 1.41 and 0 long
    turns = [Update(i, 1.0 + 9 * i, update, residuals={}) for i, update in enumerate(updates)]
    clients = Clients(Communicator(0, 1), turns, torch.zeros(20_000))
    strategy = functools.partial(utils.dp_fedavg, dp_clip_norm=0.5, noise_multiplier=2.0, clients_per_round=4)
    torch.manual_seed(1)
    first = strategy(clients, {})
    torch.manual_seed(1)
    second = strategy(clients, {})
    mean = 0.5 / 20_000**0.5 / 4
    noise_of = [first - mean, second - mean]
    assert noise_of[0].std().item() == pytest.approx(2 * 0.5 / 4, rel=0.03)
    assert abs(torch.stack(noise_of).mean()) < 5 * 0.25 / 40_000**0.5
    assert (first - second).std() > 0.3  # no seed makes it equal
    empty = strategy(Clients(Communicator(0, 1), [], torch.zeros(20_000)), {})
    assert empty.std().item() == pytest.approx(0.25, rel=0.03)


def test_dp_fedavg_leaves_out_nobody_by_the_median():
    norms = {0: 1.0, 1: 1.0, 2: 1e9, 3: math.inf}
    assert list(federated.find_bad_updates(norms, by_median=False)) == [3]
    assert list(federated.find_bad_updates(norms)) == [2, 3]


# -----------------------------------------------------------------------------
# the accountant


def test_epsilon_is_that_of_the_library_called_by_hand():
    library = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    step = dp_accounting.PoissonSampledDpEvent(0.02, dp_accounting.GaussianDpEvent(0.8))
    expected = library.compose(dp_accounting.SelfComposedDpEvent(step, 200)).get_epsilon(1e-5)
    found = accountant.epsilon_of(0.8, 0.02, 200, 1e-5)
    assert expected <= found <= expected * 1.002  # rounded up
    assert accountant.epsilon_of(0.8, 0.02, 0, 1e-5) == 0
    # with nobody drawn, the exact curve of the Gaussian mechanism: 16 steps of 8 are one of 2
    assert accountant.epsilon_of(8.0, 1.0, 16, 1e-5) == pytest.approx(
        dp_accounting.get_epsilon_gaussian(2.0, 1e-5), rel=2e-3
    )


def test_epsilon_and_noise_move_as_they_should():
    base = {"noise_multiplier": 1.0, "sampling_rate": 0.05, "steps": 100, "delta": 1e-5}
    epsilon = accountant.epsilon_of(**base)
    assert accountant.epsilon_of(**base | {"noise_multiplier": 1.2}) < epsilon
    assert accountant.epsilon_of(**base | {"delta": 1e-4}) < epsilon
    assert accountant.epsilon_of(**base | {"sampling_rate": 0.06}) > epsilon
    assert accountant.epsilon_of(**base | {"steps": 120}) > epsilon
    noise_of = functools.partial(accountant.noise_for, delta=1e-5, sampling_rate=0.05, steps=100)
    multipliers = [noise_of(epsilon) for epsilon in (0.5, 2, 8)]
    assert multipliers == sorted(multipliers, reverse=True)
    for asked, multiplier in zip((0.5, 2, 8), multipliers):
        assert 0.99 * asked < accountant.epsilon_of(multiplier, 0.05, 100, 1e-5) <= asked


def test_some_noise_is_always_added():
    """A row of a million that is drawn once, if at all, hides behind delta."""
    assert accountant.noise_for(8, 1e-5, 4e-6, 1) == accountant.LEAST_NOISE


def promised(tmp_path, *flags, rows=(500, 500)):
    """The flags and the Guarantee of clients with so many rows."""
    args = main.parse_args(["--world_size", "2", *DP, *flags, "--output_dir", str(tmp_path)])
    parts = {"train": [list(range(count)) for count in rows]}
    (tmp_path / "parts.json").write_text(json.dumps(parts))
    return args, accountant.promise(args, tmp_path)


def test_each_client_gets_the_noise_of_its_own_rows(tmp_path):
    more = ["--gradient_accumulation_steps", "25", "--num_rounds", "5", "--clients_per_round", "1", "--seed", "3"]
    args, found = promised(tmp_path, *more, rows=(500, 800))
    assert found.batch == 100 and found.sampling_rate == [100 / 500, 100 / 800]
    assert sum(found.steps) == 5 * 8 and found.steps[0] != found.steps[1]  # as often as each one plays
    for z, rate, steps in zip(found.noise_multiplier, found.sampling_rate, found.steps):
        assert 7.9 < accountant.epsilon_of(z, rate, steps, 1e-5) <= 8
    assert found.noise_multiplier[0] != found.noise_multiplier[1]
    _, found = promised(tmp_path, "--aggregator", "dp_fedavg", "--num_clients", "8", "--clients_per_round", "2")
    assert found.unit == "one whole client" and found.sampling_rate == [0.25] * 8 and found.steps == [20] * 8
    args, found = promised(tmp_path, "--aggregator", "dp_fedavg")
    assert found.noise_multiplier[0] == pytest.approx(accountant.noise_for(8, 1e-5, 1.0, 20))
    assert accountant.describe_sampling(found) == "none, all take part"
    assert options.strategy_of(args, found).keywords["noise_multiplier"] == found.noise_multiplier[0]


# -----------------------------------------------------------------------------
# the ledger


def plan_of(*clients):
    return utils.Round([list(clients)], [])


def test_rounds_that_are_played_again_count_again(tmp_path):
    args, found = promised(tmp_path, "--num_rounds", "3")
    comm, ledger = Communicator(0, 1), accountant.Ledger(args, found)
    assert ledger.epsilon() == 0
    for number in (1, 2, 3):
        ledger.commit(comm, number, plan_of(0, 1))
    assert ledger.epsilon() == pytest.approx(8, rel=1e-2)
    (tmp_path / accountant.LEDGER).open("a").write('{"round": 4, "sp')  # killed while it wrote: nothing had begun
    again = accountant.Ledger(args, found)
    assert again.steps == ledger.steps and again.summarize()["steps"] == 24
    again.commit(comm, 3, plan_of(0))
    third = accountant.Ledger(args, found)
    assert third.summarize()["steps"] == [32, 24] and third.epsilon() > 8.3
    assert third.epsilon() == accountant.epsilon_of(found.noise_multiplier[0], found.sampling_rate[0], 32, 1e-5)
    before = third.spent()
    third.commit(comm, 4, plan_of(0, 1))
    assert before() < third.epsilon()


def test_a_ledger_keeps_the_noise_that_was_added(tmp_path):
    """Another version of dp-accounting may find another noise: what was spent before does not change with it."""
    args, found = promised(tmp_path, "--num_rounds", "3")
    accountant.Ledger(args, found).commit(Communicator(0, 1), 1, plan_of(0, 1))
    spent = accountant.Ledger(args, found).epsilon()
    quieter = replace(found, noise_multiplier=[10.0, 10.0])
    ledger = accountant.Ledger(args, quieter)
    assert ledger.epsilon() == spent  # as if nothing had changed
    ledger.commit(Communicator(0, 1), 2, plan_of(0))
    library = accountant.make_accountant()  # called by hand: 8 steps with one noise, then 8 with the other
    for multiplier in (found.noise_multiplier[0], 10.0):
        step = dp_accounting.GaussianDpEvent(multiplier)
        step = dp_accounting.PoissonSampledDpEvent(found.sampling_rate[0], step)
        library.compose(dp_accounting.SelfComposedDpEvent(step, 8))
    assert accountant.Ledger(args, quieter).epsilon() == library.get_epsilon(1e-5) > spent
    assert ledger.summarize()["steps"] == [16, 8]


def test_a_ledger_that_is_gone_is_missed(tmp_path, refused):
    """Also if no checkpoint is left: what is in the logs was played, and so it was spent."""
    args, found = promised(tmp_path)
    args.resume = True
    (tmp_path / "rounds.jsonl").write_text('{"round": 1}\n{"round": 2}\n')
    for checkpoint in (tmp_path / "round_00002", None):
        with pytest.raises(SystemExit):
            accountant.promise(args, tmp_path, checkpoint)
    for number in (1, 2):
        accountant.Ledger(args, found).commit(Communicator(0, 1), number, plan_of(0, 1))
    assert accountant.promise(args, tmp_path, tmp_path / "round_00002") == found
    ledger = tmp_path / accountant.LEDGER
    whole = ledger.read_text()
    ledger.write_text(whole + '{"round": 3, "sp')  # torn off: nothing of round 3 has begun
    assert accountant.promise(args, tmp_path, None) == found
    ledger.write_text(whole.replace(": 1,", ": 1 1,"))  # damaged
    with pytest.raises(SystemExit):
        accountant.promise(args, tmp_path, None)


def test_noise_cannot_be_tried_out():
    """torch's generator on the CPU knows 32 bits of a seed only, which a laptop tries in a day."""
    streams = [torch.randn(8, generator=torch.Generator().manual_seed(7 + more)) for more in (0, 2**32)]
    assert torch.equal(*streams)  # which is why NumPy's is used
    entropies = {noise.secret_generator("cpu").bit_generator.seed_seq.entropy for _ in range(3)}
    assert len(entropies) == 3 and min(entropies) > 2**64


# -----------------------------------------------------------------------------
# runs

SMALL = f"--dataset_path {EMBEDDED_DATA} --dp_epsilon 8 --lora_variant ffa --max_new_tokens 1 --eval_rounds 4"
SMALL += " --lora_dropout 0"


def test_a_private_run_with_canaries(run_here, tmp_path):
    assert run_here(f"{SMALL} --canaries 4 --num_rounds 2") == (0, "")
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = summary["privacy"]
    assert found["unit"] == "one row of one client" and found["steps"] == 4 and 7.9 < found["epsilon"] <= 8
    assert found["delta"] == 1e-5 and found["clip_norm"] == 1 and len(found["noise_multiplier"]) == 2
    epsilons = [entry["epsilon"] for entry in runlog.read_rounds(tmp_path)]
    assert epsilons == sorted(epsilons) and epsilons[-1] == found["epsilon"]
    assert summary["audit"]["canaries"] == len(json.loads((tmp_path / audit.FILE).read_text())) == 8
    assert summary["audit"]["epsilon_lower_bound"] <= found["epsilon"]
    card = (tmp_path / "federated_global_model" / "README.md").read_text()
    assert "one row of one client" in card and "add or remove one" in card
    assert "| tokens trained on | not told |" in card and "left out here" in card  # what the guarantee does not cover
    assert "50% is guessing" not in card and "held-out questions" not in card


@pytest.mark.slow
@pytest.mark.parametrize("again", ["--resume", "--restarts 1"])
def test_a_kill_between_the_update_and_the_commit_costs_epsilon(run_here, tmp_path, again):
    """Round 2 is played twice, with other rows and other noise, and both are counted; also by --restarts itself."""
    killed = functools.partial(troubled_rank, "killed in a collective", 1)
    if again == "--resume":
        assert run_here(SMALL, target=killed)[0] == 1
        ledger = [entry["round"] for entry in accountant.read_ledger(tmp_path)]
        assert ledger == [1, 2] and [entry["round"] for entry in runlog.read_rounds(tmp_path)] == [1]
        killed = None
    assert run_here(f"{SMALL} {again}", target=killed)[0] == 0
    summary = json.loads((tmp_path / "summary.json").read_text())["privacy"]
    assert summary["steps"] == 5 * 2 and summary["epsilon_asked"] == 8 < summary["epsilon"]
    rates, multipliers = summary["sampling_rate"], summary["noise_multiplier"]
    assert summary["epsilon"] == pytest.approx(accountant.epsilon_of(multipliers, rates, 10, 1e-5))
    assert [entry["round"] for entry in accountant.read_ledger(tmp_path)] == [1, 2, 2, 3, 4]
    epsilons = [entry["epsilon"] for entry in runlog.read_rounds(tmp_path)]
    assert epsilons[1] == pytest.approx(accountant.epsilon_of(multipliers, rates, 6, 1e-5))  # not that of 2 rounds


@pytest.mark.slow
def test_clients_by_poisson_sampling_with_empty_rounds_killed_and_resumed(run_here, tmp_path):
    flags = "--aggregator dp_fedavg --dp_epsilon 8 --num_clients 6 --clients_per_round 2 --num_rounds 12"
    flags += " --max_new_tokens 1 --local_steps 1 --eval_rounds 3"
    killed = functools.partial(troubled_rank, "killed while saving", 0)
    drawn = [[], [1, 2], *[[0]] * 10]  # until the kill in round 2; after that, it is drawn
    assert run_here(flags, target=functools.partial(drawn_rank, drawn, killed))[0] == 1
    assert run_here(f"{flags} --resume")[0] == 0
    rounds, summary = runlog.read_rounds(tmp_path), json.loads((tmp_path / "summary.json").read_text())["privacy"]
    assert [entry["round"] for entry in rounds] == list(range(1, 13))
    assert rounds[0]["clients"] == [] and len({len(entry["clients"]) for entry in rounds[1:]}) > 1
    assert summary["steps"] == len(accountant.read_ledger(tmp_path)) == 12 + 1
    assert summary["unit"] == "one whole client" and summary["sampling_rate"] == pytest.approx(1 / 3)


# -----------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--packing", "--packing"),
        ("--scaffold", "--scaffold keeps"),
        ("--average_dtype int8", "--average_dtype int8 keeps residuals"),
        ("--torch_compile", "--torch_compile"),
        ("--lora_dropout 0.1", "leave out --lora_dropout"),
        ("--dp_delta 0", "leave it out for 1e-5"),
        ("--dp_epsilon 1e6", "promises nothing"),
        ("--num_clients 40", "and needs 100"),
        ("--aggregator dp_fedavg --on_bad_update fail", "--on_bad_update fail"),
        ("--aggregator dp_fedavg --lora_variant fedsa", "fedsa"),
    ],
)
def test_what_would_break_the_guarantee_is_refused(refused, flags, text):
    assert text in refused("--dp_epsilon", "8", "--world_size", "2", *flags.split())


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--dp_delta 0.1", "must be below 1 /"),
        ("--aggregator dp_fedavg --num_clients 500 --dp_delta 0.3", "must be below 1 / 500 clients"),
        ("--per_device_train_batch_size 400", "lower the batch size"),
        ("--dp_epsilon 0.01", "300 rows of client 0 cannot buy it in 160 steps of 4"),
    ],
)
def test_what_the_rows_cannot_give_is_refused(tmp_path, capsys, flags, text):
    with pytest.raises(SystemExit):
        promised(tmp_path, *flags.split(), rows=(300, 300))
    line = capsys.readouterr().err
    assert text in line
    if "buy" in line:  # and says what would
        assert "rows could" in line and "can buy epsilon" in line


def test_flags_of_privacy_alone(refused):
    assert "give --dp_epsilon" in refused("--dp_delta", "1e-6")
    assert "give --dp_epsilon" in refused("--dp_clip_norm", "1")
    assert "needs --dp_epsilon" in refused("--aggregator", "dp_fedavg")


def test_what_is_said_at_the_start(tmp_path):
    args, found = promised(tmp_path, "--lora_variant", "lora")
    lines = "\n".join(accountant.describe_promise(args, found, 10_000))
    ratio = max(found.noise_multiplier) * 100 / 4
    assert f"{ratio:.3g} times as long" in lines and "--lora_variant ffa" in lines
    assert "one row of one client" in lines and "add or remove" in lines and "not covered: losses" in lines
    args, found = promised(tmp_path, "--aggregator", "dp_fedavg", "--num_clients", "8")
    warned = []
    log = SimpleNamespace(is_writer=True, say=lambda text: None, warn=warned.append)
    ledger = accountant.Ledger(args, found)
    accountant.announce(args, log, ledger, [plan_of(0)] * 20, 163_840)
    assert len(warned) == 1 and "times as long as the largest possible mean update" in warned[0]
    accountant.announce(args, log, ledger, [plan_of(0)] * 25, 163_840)  # as after a kill
    assert "rounds are played again, and count again: epsilon will be" in warned[2]
