"""Flags: their types, the defaults that depend on other flags, and what is refused before anything is loaded."""

import argparse
import functools
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

import utils

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EMBEDDED_MODEL, EMBEDDED_DATA = str(ASSETS / "tiny-llama"), str(ASSETS / "sample_squad")
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # ranks have no use for them
SERVER_FLAGS = """server_lr server_momentum server_beta2 server_tau clip_norm trim_fraction num_malicious
weiszfeld_iterations weiszfeld_smoothing""".split()
NOT_UNDER_TORCHRUN = "compare dry_run ask merge overwrite restarts".split()
COLUMN_NAMES = (
    "question answer answers context messages text instruction input output response prompt completion".split()
)
IN_THE_DATA = ("column", "folder", "file")  # partitions whose clients the data set names
MAX_CLIENTS = 1000
MAX_EPSILON = 100  # of differential privacy; above, e^epsilon promises nothing
OPTIMIZER_BYTES = {"sgd": 0, "adamw_8bit": 2, "paged_adamw_8bit": 2}  # of its state, per parameter; else 8


def fail(message):
    """End the program over bad input: one line that says what to do, without a token in it, exit code 2."""
    message = re.sub(r"(?<![-\w])hf_\w+", "hf_...", " ".join(message.split()))
    print(f"main.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def first_line(error):
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]


class HelpWithDefaults(argparse.HelpFormatter):
    """Shows the default of each flag that has one and does not explain it itself."""

    def _get_help_string(self, action):
        if not action.default or action.default == argparse.SUPPRESS or "(default" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


# -----------------------------------------------------------------------------
# types of flags


def number(text, kind):
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text} is not {what}") from None


def positive(kind):
    def parse(text):
        value = number(text, kind)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return parse


def not_negative(text):
    return 0.0 if number(text, float) == 0 else positive(float)(text)


def not_negative_int(text):
    if number(text, int) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return int(text)


def fraction(text):
    if not 0 <= number(text, float) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 up to 1")
    return float(text)


def seed(text):
    if not 0 <= number(text, int) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 up to 2**31")
    return int(text)


def sweep(text):
    """Return (name, flag, its values as texts) of ffa:learning_rate=1e-3,3e-3; the name is "" without one."""
    start, _, listed = text.partition("=")
    name, _, flag = start.rpartition(":")
    values = [value.strip() for value in listed.split(",")]
    for value in values:
        number(value, float)
    if len({float(value) for value in values}) < len(values):
        raise argparse.ArgumentTypeError(f"{text!r} lists a value twice")
    return name.strip(), flag.strip().removeprefix("--"), values


def columns(text):
    """Return {name: column} of question=Frage,answer=Antwort."""
    found = {}
    for part in text.split(","):
        name, equals, column = part.partition("=")
        if not equals or not column.strip() or name.strip() not in COLUMN_NAMES:
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=COLUMN with one of {', '.join(COLUMN_NAMES)}")
        found[name.strip()] = column.strip()
    return found


# -----------------------------------------------------------------------------
# defaults and refusals


def ranks_of_torchrun():
    """Return how many ranks torchrun has started on all machines; 0 if it has not started this process."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 0


def ranks_here(args):
    """Return how many ranks are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if ranks_of_torchrun() else args.world_size


def complete(args, num_gpus):
    """Fill in the defaults that depend on other flags or on the GPUs of this machine; refuse what does not go together.

    With --partition column, the number of clients is in the data: `complete_clients` follows later.
    """
    take_token(args)
    started = ranks_of_torchrun()
    args.model_name, args.dataset_path = absolute(args.model_name), absolute(args.dataset_path)
    args.output_dir = os.path.expanduser(args.output_dir)
    args.learning_rate = args.learning_rate or (1e-2 if args.model_name == EMBEDDED_MODEL else 2e-4)
    args.optim = args.optim or ("adamw_torch_fused" if num_gpus else "adamw_torch")
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = num_gpus > 0
    args.eval_rounds = args.eval_rounds or max(1, args.num_rounds // 5)
    args.save_rounds = args.save_rounds or (1 if started else max(1, args.num_rounds // 10))

    if started:
        for name in NOT_UNDER_TORCHRUN:
            if getattr(args, name) not in (None, False, 0):
                fail(f"--{name} is not for torchrun, which may start a run many times; leave it out, or use main.py")
        if args.world_size != started:
            fail(f"--world_size {args.world_size}: torchrun has started {started} ranks; leave it out")
    check_strategy(args)
    check_kernels(args, num_gpus)
    check_privacy(args)
    if args.partition == "column" and not args.partition_column:
        fail("--partition column makes a client of each value in a column: name it with --partition_column")
    if args.partition not in IN_THE_DATA:
        complete_clients(args, args.num_clients or args.world_size, num_gpus)
    if args.compare and (args.centralized or args.dry_run):
        fail("--compare does not go with --centralized (list it instead) nor with --dry_run (of one run at a time)")
    if args.repeats > 1 and (args.repeats == 2 or not args.compare):
        fail("--repeats is of --compare, and an interval needs 3 at least; raise it, or leave it out")
    if args.compare is None and (args.seeds > 1 or args.sweep):
        fail("--seeds and --sweep are of --compare; leave them out, or list what to compare")
    if args.compare and args.split_seed is not None:
        fail("--split_seed does not go with --compare, which gives every repeat a split of its own; leave it out")
    if args.push_to_hub and (args.compare or keeps_own_models(args)):
        fail("--push_to_hub uploads a global model, and this leaves none; leave it out")
    if args.report_to != "none" and not importlib.util.find_spec(args.report_to):
        fail(f"--report_to {args.report_to} is not installed: pip install {args.report_to}")


def complete_clients(args, num_clients, num_gpus):
    """Fill in how many clients there are, how many in a round, and what follows from that; no idle ranks."""
    if (args.num_clients or num_clients) != num_clients:
        source = f"{args.partition_column} has {num_clients} values"
        if args.partition != "column":
            source = f"the data set has rows of {num_clients} clients (--partition {args.partition})"
        fail(f"--num_clients {args.num_clients}: {source}; leave it out")
    if num_clients > MAX_CLIENTS:
        fail(f"{num_clients} clients: at most {MAX_CLIENTS} are possible")
    if (args.clients_per_round or 1) > num_clients:
        fail(f"--clients_per_round {args.clients_per_round}: there are only {num_clients} clients")
    args.num_clients, args.clients_per_round = num_clients, args.clients_per_round or num_clients

    drawn = args.clients_per_round
    cut = int((args.trim_fraction or 0) * drawn)
    if drawn <= 2 * cut:
        fail(f"--trim_fraction {args.trim_fraction} of {drawn} clients at either end leaves none; lower it")
    if args.aggregator == "krum" and drawn < 2 * args.num_malicious + 3:
        needed = 2 * args.num_malicious + 3
        fail(f"--aggregator krum needs {needed} clients a round for --num_malicious {args.num_malicious}, not {drawn}")

    if args.centralized:  # as many rows in a step as all clients of a round have together
        args.gradient_accumulation_steps *= drawn
    _, playing = training_clients(args)
    if playing < args.world_size and ranks_of_torchrun():
        fail(f"torchrun has started {args.world_size} ranks for {playing} clients; lower --nproc_per_node or --nnodes")
    args.world_size = min(args.world_size, playing)
    args.backend = args.backend or ("nccl" if num_gpus >= ranks_here(args) else "gloo")
    if args.backend == "nccl" and num_gpus < ranks_here(args):
        fail(f"--backend nccl: {num_gpus} GPUs for {ranks_here(args)} ranks; leave it out: over gloo they share")


def training_clients(args):
    """Return (clients, clients per round) that train: one on the rows of all with --centralized."""
    return (1, 1) if args.centralized else (args.num_clients, args.clients_per_round)


def keeps_own_models(args):
    """Whether every client ends with a model of its own, because not all of it is shared."""
    return args.aggregator == "none" or args.lora_variant == "fedsa"


def client_bytes(args):
    """Return about how many bytes a client keeps between its turns, per LoRA parameter."""
    vectors = keeps_own_models(args) + args.scaffold + (args.average_dtype != "float32")
    return moment_bytes(args) + 4 * vectors


def moment_bytes(args):
    """Return how many bytes of a client's optimizer state wait for its next turn, per parameter that it trains."""
    return OPTIMIZER_BYTES.get(args.optim, 8) * (args.client_state == "keep")


def check_strategy(args):
    """Refuse what does not go together, and fill in the strategy's own settings."""
    if args.centralized and args.aggregator == "fedavg":  # the mean of one
        args.aggregator = "none"
    name, variant = args.aggregator, args.lora_variant
    if args.centralized and name != "none":
        fail("--centralized trains one client, which has nobody to average with; leave out --aggregator")
    own = settings_of(name)
    for flag in SERVER_FLAGS:
        if getattr(args, flag) is None:
            setattr(args, flag, own.get(flag))
        elif flag not in own:
            fail(f"--{flag} is not a setting of --aggregator {name}; leave it out")
    if name == "svd" and variant != "lora":
        fail(f"--aggregator svd averages whole products B A, and --lora_variant {variant} shares only a half of them")
    if name == "krum" and variant == "fedsa":
        fail("--aggregator krum picks the model of one client, and --lora_variant fedsa shares only a half of it")
    if name == "none" and (variant in ("rolora", "fedsa") or args.scaffold or args.prox_mu):
        fail("--aggregator none shares nothing; leave out --lora_variant, --scaffold and --prox_mu")
    if args.scaffold and variant == "rolora":
        fail("--scaffold needs the same parameters in every round; leave out --lora_variant rolora")


def split_seed(args):
    """Return the seed of the split: --split_seed, or --seed."""
    return args.seed if args.split_seed is None else args.split_seed


def settings_of(aggregator):
    """Return {flag: default} of a strategy's own settings."""
    parameters = list(inspect.signature(utils.AGGREGATORS[aggregator]).parameters.values())
    return {parameter.name: parameter.default for parameter in parameters[2:]}


def strategy_of(args, guarantee=None):
    """Return the strategy of --aggregator with those of its settings that are flags: a function (clients, state).

    `guarantee` (accountant.Guarantee) has the noise that dp_fedavg needs.
    """
    strategy = utils.AGGREGATORS[args.aggregator]
    settings, names = {}, list(inspect.signature(strategy).parameters)[2:]
    for name in names:
        if getattr(args, name, None) is not None:
            settings[name] = getattr(args, name)
    if guarantee and "noise_multiplier" in names:
        settings["noise_multiplier"] = guarantee.noise_multiplier[0]
    return functools.partial(strategy, **settings)


def private_by_row(args):
    """Whether the local steps are differentially private for each row; dp_fedavg is so for each client."""
    return bool(args.dp_epsilon) and args.aggregator != "dp_fedavg"


def check_privacy(args):
    """Fill in the defaults of differential privacy, and refuse what would break the guarantee."""
    if not args.dp_epsilon:
        for name in ("dp_delta", "dp_clip_norm"):
            if getattr(args, name) is not None:
                fail(f"--{name} is of differential privacy; give --dp_epsilon, too, or leave it out")
        if args.aggregator == "dp_fedavg":
            fail("--aggregator dp_fedavg needs --dp_epsilon: how private each client is to be")
        return
    args.dp_delta = 1e-5 if args.dp_delta is None else args.dp_delta
    args.dp_clip_norm = args.dp_clip_norm or 1.0
    if not args.dp_delta:
        fail("--dp_delta 0: Gaussian noise has no guarantee without a delta; leave it out for 1e-5")
    if args.dp_epsilon > MAX_EPSILON:
        fail(f"--dp_epsilon {args.dp_epsilon:g} promises nothing; give one up to {MAX_EPSILON}, or leave it out")
    clipped = "--dp_epsilon"
    if args.average_dtype != "float32":
        fail(f"{clipped}: --average_dtype {args.average_dtype} keeps residuals that are not clipped; leave it out")
    if args.scaffold:
        fail(f"{clipped}: --scaffold keeps mean gradients that are not clipped; leave it out")
    if args.aggregator == "dp_fedavg":
        if args.lora_variant == "fedsa":
            fail("--aggregator dp_fedavg covers what is shared, and fedsa keeps a half; choose another --lora_variant")
        if args.on_bad_update == "fail":
            fail("--aggregator dp_fedavg: --on_bad_update fail would tell of single clients; leave it out")
        return
    if args.packing:
        fail(f"{clipped}: --packing puts several rows into one sequence, where none can be clipped alone; leave it out")
    for name in ("torch_compile", "use_liger_kernel"):
        if getattr(args, name):
            fail(f"{clipped}: --{name} hides the gradients of single rows; leave it out")
    if args.lora_dropout:
        fail(
            f"{clipped}: masks come from --seed, and a row more would change those of others; leave out --lora_dropout"
        )
    if args.torch_dtype == "float16":  # a GPU without bfloat16 says so later, in the rank: CUDA is not asked here
        fail(f"{clipped}: float16 scales gradients by what it finds in them; give --torch_dtype bfloat16 or float32")


def check_kernels(args, num_gpus):
    """Refuse what this machine cannot run."""
    if args.torch_dtype == "float16" and not num_gpus:
        fail("--torch_dtype float16 needs a GPU; leave it out")
    if args.torch_compile and not shutil.which("cc" if num_gpus else os.environ.get("CXX", "g++")):
        fail("--torch_compile needs a compiler: apt install build-essential")
    flash = args.attn_implementation == "flash_attention_2"
    if flash and args.torch_dtype == "float32":
        fail("--attn_implementation flash_attention_2 has no float32; leave out --torch_dtype")
    for wanted, flag, module in (
        (flash, "--attn_implementation flash_attention_2", "flash_attn"),
        (args.use_liger_kernel, "--use_liger_kernel", "liger_kernel"),
    ):
        if wanted and not num_gpus:
            fail(f"{flag} needs a GPU; leave it out")
        if wanted and not importlib.util.find_spec(module):
            fail(f"{flag} is not installed: pip install {module.replace('_', '-')}")


# -----------------------------------------------------------------------------
# paths, the token, the command


def absolute(name):
    """Return the absolute path of what is on this disk, and the id of what is on the hub as it is."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.exists(path) else name


def take_token(args):
    """Take the token from the flag or the environment, which the ranks inherit, and check it."""
    args.hf_token = (args.hf_token or os.environ.get("HF_TOKEN", "")).strip() or None
    for name in TOKEN_VARIABLES:
        os.environ.pop(name, None)
    if args.hf_token and not re.fullmatch(r"[!-~]+", args.hf_token):
        fail("the token in --hf_token or HF_TOKEN has characters that no token has; copy it again")


def describe_command(argv, token):
    """Return the command for the model card: without the token, and of what is on this disk only the names."""
    words = ["python", "main.py"]
    for word in argv:
        if word in ("--resume", "--overwrite"):
            continue
        if token:
            word = word.replace(token, "hf_...")
        *flag, value = word.split("=", 1)
        if os.path.isabs(value) or "/" in value and os.path.exists(value):
            value = Path(value).name
        words.append("=".join([*flag, value]))
    return shlex.join(words)
