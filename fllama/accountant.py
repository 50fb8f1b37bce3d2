"""The account of differential privacy: what a run promises, what it has spent, and what the number means.

Of rows (fllama/privacy.py) and of clients (utils.dp_fedavg); docs/privacy.md says what is covered and what is not.
"""

import collections
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import utils
from fllama import checkpoints, options, runlog
from fllama.options import fail

MIN_ROWS = 100  # of a client; with fewer, no noise leaves a gradient
LEDGER = "privacy.jsonl"
LEAST_NOISE = 0.1  # standard deviation, in clips
INTERVAL = 1e-3  # of privacy losses, which are rounded up: epsilon comes out too high, by 0.4% in 5,000 steps
RELATION = "add or remove one, counts are public"


@dataclass(frozen=True)
class Guarantee:
    """What is promised of one row of one client, or of one whole client; lists have one value per client."""

    unit: str
    epsilon: float  # that was asked for, over all rounds
    delta: float
    clip_norm: float  # of the gradient of a row, or of the update of a client
    batch: float  # expected rows of a step, or expected clients of a round
    sampling_rate: list
    steps: list  # in which a client takes part: local steps, or rounds
    noise_multiplier: list  # standard deviation of the noise on the sum, relative to the clip


# -----------------------------------------------------------------------------
# the accountant


def epsilon_of(noise_multiplier, sampling_rate, steps, delta):
    """Return the epsilon of so many steps of the Gaussian mechanism, each on a Poisson sample.

    By privacy loss distributions (dp-accounting), for adding or removing one. With a sampling rate of 1 all take part,
    and nothing is gained from sampling.
    """
    return composed_epsilon(((noise_multiplier, sampling_rate, steps),), delta)


@functools.cache
def composed_epsilon(mechanisms, delta):
    """Return the epsilon of several of these, one after the other: a tuple of (noise multiplier, sampling rate, steps)
    each.
    """
    accountant = make_accountant()
    for mechanism in mechanisms:
        accountant.compose(make_event(*mechanism))
    return accountant.get_epsilon(delta)


def make_accountant():
    from dp_accounting import NeighboringRelation, pld  # half a second that other runs need not spend

    return pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, INTERVAL)


def make_event(noise_multiplier, sampling_rate, steps):
    import dp_accounting

    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sampling_rate < 1:
        event = dp_accounting.PoissonSampledDpEvent(sampling_rate, event)
    return dp_accounting.SelfComposedDpEvent(event, steps) if steps else dp_accounting.NoOpDpEvent()


@functools.cache
def noise_for(epsilon, delta, sampling_rate, steps):
    """Return the least noise multiplier, from LEAST_NOISE, with which so many steps cost at most (epsilon, delta)."""
    import dp_accounting

    low = high = 1.0
    while epsilon_of(high, sampling_rate, steps, delta) > epsilon:
        low, high = high, 1.25 * high
    while epsilon_of(low, sampling_rate, steps, delta) <= epsilon:
        if low == LEAST_NOISE:  # few rows are drawn, and delta covers them
            return LEAST_NOISE
        low, high = max(LEAST_NOISE, low / 1.25), low
    bracket = dp_accounting.ExplicitBracketInterval(low, high)
    make = functools.partial(make_event, sampling_rate=sampling_rate, steps=steps)
    return dp_accounting.calibrate_dp_mechanism(make_accountant, make, epsilon, delta, bracket, tol=1e-3)


# -----------------------------------------------------------------------------
# what is promised; refusals that need the rows


def promise(args, data_path, checkpoint=None):
    """Return the Guarantee of a run, None without --dp_epsilon; refuses what the rows cannot give.

    `data_path` is of the rows that have been dealt out, `checkpoint` what the run goes on from.
    """
    if not args.dp_epsilon:
        return None
    check_logs(args, checkpoint)
    clients, per_round = options.training_clients(args)
    if not options.private_by_row(args):
        rate = per_round / clients
        z = noise_for(args.dp_epsilon, args.dp_delta, rate, args.num_rounds)
        if args.dp_delta >= 1 / clients:
            fail(f"--dp_delta {args.dp_delta:g} gives whole clients away; it must be below 1 / {clients} clients")
        lists = [rate] * clients, [args.num_rounds] * clients, [z] * clients
        return Guarantee("one whole client", args.dp_epsilon, args.dp_delta, args.dp_clip_norm, per_round, *lists)

    split = json.loads(Path(data_path, "parts.json").read_text(encoding="utf-8"))
    num_rows = [len(part) for part in split["train"]]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    turns = collections.Counter()
    for played in utils.plan_rounds(clients, per_round, args.num_rounds, 1, args.seed):
        turns.update(played.clients())
    rates, steps, multipliers = [], [], []
    for client, rows in enumerate(num_rows):
        check_rows(args, client, rows, batch)
        rates.append(batch / rows)
        steps.append(turns[client] * args.local_steps)
        multipliers.append(noise_for(args.dp_epsilon, args.dp_delta, rates[-1], max(1, steps[-1])))
        check_price(args, client, rows, batch, steps[-1], multipliers[-1])
    lists = rates, steps, multipliers
    return Guarantee("one row of one client", args.dp_epsilon, args.dp_delta, args.dp_clip_norm, batch, *lists)


def check_rows(args, client, rows, batch):
    """Refuse clients with too few rows for any guarantee."""
    if rows < MIN_ROWS:
        fail(f"--dp_epsilon: client {client} trains on {rows} rows, and needs {MIN_ROWS}; lower --num_clients")
    if args.dp_delta >= 1 / rows:
        fail(f"--dp_delta {args.dp_delta:g} gives whole rows of client {client} away; it must be below 1 / {rows} rows")
    if batch > rows:
        fail(f"--dp_epsilon: a step is to draw {batch} of the {rows} rows of client {client}; lower the batch size")


def check_price(args, client, rows, batch, steps, noise_multiplier):
    """Refuse an epsilon that the rows of a client cannot buy: the noise in each single coordinate of a step's sum would
    be larger than all its rows together can be.
    """
    if noise_multiplier <= batch:
        return
    least, enough = epsilon_of(float(batch), batch / rows, steps, args.dp_delta), rows
    while noise_for(args.dp_epsilon, args.dp_delta, batch / enough, steps) > batch and enough < 1000 * rows:
        enough *= 2
    fail(
        f"--dp_epsilon {args.dp_epsilon:g}: {rows} rows of client {client} cannot buy it in {steps} steps of {batch}: "
        f"noise of {noise_multiplier:.1f} clips is more than a batch; about {enough:,} rows could, these rows "
        f"can buy epsilon {least:.2g}; or take fewer steps"
    )


def check_logs(args, checkpoint):
    """Refuse to go on without the record of what was spent, or of who took part."""
    last_round = checkpoints.round_of(checkpoint)
    spent = {entry["round"] for entry in read_ledger(args.output_dir)}
    logged = {entry["round"] for entry in runlog.read_rounds(args.output_dir)}
    if not args.resume:  # --overwrite begins a new account
        return
    last_logged = max(logged, default=0)
    for name, found, last in ((LEDGER, spent, max(last_round, last_logged)), ("rounds.jsonl", logged, last_round)):
        if not set(range(1, last + 1)) <= found:
            fail(f"--resume: {args.output_dir}/{name} lacks rounds up to {last}, so what was spent is unknown")


# -----------------------------------------------------------------------------
# the ledger


def read_ledger(output_dir):
    """Return the entries of privacy.jsonl: {"round", "spent": {client: its noise_multiplier, sampling_rate and steps}}.

    A line that is torn off was never committed, so its round had not begun. Any other that cannot be read ends the
    program: what it held was spent.
    """
    path, entries = Path(output_dir, LEDGER), []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            if line.endswith("}") or not line.startswith("{"):
                fail(f"--resume: a line of {path} cannot be read, so what was spent is unknown")
    return entries


class Ledger:
    """What was spent so far, by this start of the run and all before it: rounds that are played again count again.

    A round is entered, and on the disk, before the first gradient of it is taken: whenever a run is killed, nothing has
    left a client that is not in the ledger. Lines are only ever appended, by rank 0. Each says with which noise and
    which sampling its steps are taken: another version of dp-accounting may find another noise when a run goes on, and
    that does not change what the steps before it have cost.
    """

    def __init__(self, args, guarantee):
        self.args, self.guarantee = args, guarantee
        self.steps = collections.Counter()  # of each (client, noise multiplier, sampling rate)
        for entry in read_ledger(args.output_dir):
            self.steps += counted(entry["spent"])

    def commit(self, comm, number, plan):
        """Enter a round that is about to begin; all ranks participate."""
        entry = {"round": number, "spent": self.spent_in(plan)}
        self.steps += counted(entry["spent"])
        if comm.rank == 0:
            append_line(Path(self.args.output_dir, LEDGER), json.dumps(entry))
        comm.meet()  # nobody begins before it is on the disk

    def spent_in(self, plan):
        """Return {client: noise, sampling and steps} of a round: those in which each client may have been seen."""
        if options.private_by_row(self.args):
            clients, steps = plan.clients(), self.args.local_steps
        else:
            clients, steps = range(self.args.num_clients), 1  # it does not say who was drawn
        spent = {}
        for client in clients:
            spent[client] = {
                "noise_multiplier": self.guarantee.noise_multiplier[client],
                "sampling_rate": self.guarantee.sampling_rate[client],
                "steps": steps,
            }
        return spent

    def epsilon(self, steps=None):
        """Return the epsilon that was spent, the largest over the clients; or that of other steps than the ledger's."""
        mechanisms = collections.defaultdict(list)
        for (client, noise_multiplier, rate), count in sorted((self.steps if steps is None else steps).items()):
            mechanisms[client].append((noise_multiplier, rate, count))
        delta = self.guarantee.delta
        return max((composed_epsilon(tuple(spent), delta) for spent in mechanisms.values()), default=0.0)

    def spent(self):
        """Return a function that returns the epsilon that has been spent until now."""
        return functools.partial(self.epsilon, collections.Counter(self.steps))

    def summarize(self):
        """Return what summary.json holds under "privacy": what was spent, and what gives the number its meaning."""
        promised, steps = self.guarantee, collections.Counter()
        for (client, _, _), count in self.steps.items():
            steps[client] += count
        return {
            "unit": promised.unit,
            "relation": RELATION,
            "sampling": describe_sampling(promised),
            "epsilon": self.epsilon(),
            "epsilon_asked": promised.epsilon,
            "delta": promised.delta,
            "clip_norm": promised.clip_norm,
            "noise_multiplier": one_or_all(promised.noise_multiplier),
            "sampling_rate": one_or_all(promised.sampling_rate),
            "steps": one_or_all([steps[client] for client in range(len(promised.steps))]),
        }


def counted(spent):
    """Return the steps of each (client, noise multiplier, sampling rate) in the "spent" of an entry, a Counter."""
    steps = collections.Counter()
    for client, mechanism in spent.items():
        steps[int(client), mechanism["noise_multiplier"], mechanism["sampling_rate"]] += mechanism["steps"]
    return steps


def one_or_all(values):
    return values[0] if len(set(values)) == 1 else values


def append_line(path, line):
    """Append a line to a file and wait until it is on the disk; a torn line before it stays a line of its own."""
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * torn + line + "\n")
    checkpoints.flush(path)
    checkpoints.flush(path.parent)


# -----------------------------------------------------------------------------
# what it means, in words


def announce(args, log, ledger, rounds, num_parameters):
    """Say what the run promises, before its first step: `rounds` are those to come, `num_parameters` are trained."""
    if not log.is_writer:
        return
    promised = ledger.guarantee
    ratio = noise_ratio(promised, num_parameters)
    whole = promised.unit == "one whole client"
    for line in describe_promise(args, promised, num_parameters):
        log.say(line)
    if whole and ratio > 1:
        log.warn(
            f"  the noise is {ratio:,.0f} times as long as the largest possible mean update: {promised.batch:g} "
            "clients a round are too few; have hundreds, or protect rows: --dp_epsilon without dp_fedavg"
        )
    steps = collections.Counter(ledger.steps)
    for played in rounds:
        steps += counted(ledger.spent_in(played))
    will_be = ledger.epsilon(steps)
    if will_be > promised.epsilon * 1.001:
        log.warn(f"  rounds are played again, and count again: epsilon will be {will_be:.2f}, not {promised.epsilon:g}")


def noise_ratio(guarantee, num_parameters):
    """Return how long the noise on a mean is expected to be, relative to the longest that the mean can be: the clip."""
    return max(guarantee.noise_multiplier) * num_parameters**0.5 / guarantee.batch


def describe_promise(args, guarantee, num_parameters):
    """Return the lines that say what is promised, and what of."""
    ratio, mean = noise_ratio(guarantee, num_parameters), "gradient"
    if guarantee.unit == "one whole client":
        mean = "update"
    lines = [
        f"  privacy    epsilon {guarantee.epsilon:g} at delta {guarantee.delta:g}, for {guarantee.unit} ({RELATION})",
        f"             sampling: {describe_sampling(guarantee)}; clip {guarantee.clip_norm:g}",
        f"             noise on the sum: {show_range(guarantee.noise_multiplier, '.2f')} clips in each of "
        f"{num_parameters:,} coordinates",
        f"             so the noise of a step is {ratio:.3g} times as long as its mean {mean} can be",
        "             covered: the adapter; not covered: losses, scores, logs, and choices made by looking at them",
    ]
    if args.lora_variant == "lora":
        less = ratio / 2**0.5
        lines += [
            f"             --lora_variant ffa: about {less:.3g} times, and no noise in A multiplies that in B; but it",
            "             also learns less: compare both (docs/privacy.md)",
        ]
    return lines


def describe_sampling(guarantee):
    if min(guarantee.sampling_rate) == 1:
        return "none, all take part"
    what = "clients for each round" if guarantee.unit == "one whole client" else "rows for each step"
    return f"Poisson, {show_range(guarantee.sampling_rate, '.2%')} of the {what}"


def show_range(values, form):
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
