"""--compare: a run for each arm, each value of a sweep, each split and each training seed; and what they come to."""

import copy
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import utils
from fllama import checkpoints, gpus, options, prepare, sidebyside
from fllama.options import fail

ARMS = {  # name -> flags
    "local": ["--aggregator", "none"],
    "centralized": ["--aggregator", "none", "--centralized"],
    **{name: ["--aggregator", name] for name in utils.AGGREGATORS if name != "none"},
    **{name: ["--lora_variant", name] for name in utils.LORA_VARIANTS if name != "lora"},
    "scaffold": ["--scaffold"],
}
COMMON_FLAGS = """--seed --split_seed --output_dir --overwrite --resume --num_clients --partition --partition_column
--dirichlet_alpha --own_eval_rows --eval_questions --max_length --dataset_path --dataset_config --dataset_train_split
--dataset_test_split --columns --learn""".split()  # all arms have the same split, seeds and rows
ONE_RUN = ["--compare", "", "--repeats", "1", "--seeds", "1"]
NOT_SWEPT = """seed split_seed num_clients clients_per_round world_size own_eval_rows eval_questions repeats seeds
restarts timeout generate_samples show_rows dirichlet_alpha max_length max_new_tokens canaries dp_epsilon
dp_delta""".split()  # numbers of no arm, or that change the question: rows, answers, privacy


class Planned(NamedTuple):
    """A run of a comparison."""

    arm: str
    values: dict  # flag of the sweep -> value, as text
    title: str
    folder: Path
    args: object
    words: list  # its command line


# -----------------------------------------------------------------------------
# what is asked for


def find_arms(listed):
    """Return {text: flags} of what --compare lists: names of ARMS, each perhaps with flags of its own behind it."""
    arms = {}
    for text in listed.split(","):
        name, *flags = text.split() or [""]
        arm = " ".join([name, *flags])
        if name not in ARMS:
            fail(f"--compare: no run is named {name or 'nothing'}; choose from {', '.join(ARMS)}")
        for flag in flags:
            common = find_common(flag.split("=")[0])
            if common:
                fail(f"--compare {text.strip()}: {common} is the same for all runs; write it outside of the list")
        if arm in arms:
            fail(f"--compare: {text.strip()} is listed twice")
        arms[arm] = [*ARMS[name], *flags]
    return arms


def find_common(word):
    """Return the flag of COMMON_FLAGS that a word is or abbreviates; None if it is no such flag."""
    if word in COMMON_FLAGS:
        return word
    if word.startswith("--"):
        return next((flag for flag in COMMON_FLAGS if flag.startswith(word)), None)
    return None


def find_grid(args, name, flags, sweep):
    """Return what an arm with this name and flags tries: a list of {flag: value}, every combination of its values.

    `sweep` is as find_sweep returns it; values of the name's own come before those of all arms. A flag that
    the arm has as its own stays as it is, and a setting of another strategy is not tried; nor is FedProx where nothing
    is averaged.
    """
    tried = {}
    for flag, values in (sweep[""] | sweep.get(name, {})).items():
        has_own = any(word.split("=")[0] == f"--{flag}" for word in flags)
        foreign = flag in options.SERVER_FLAGS and flag not in options.settings_of(args.aggregator)
        foreign = foreign or flag == "prox_mu" and args.aggregator == "none"
        if foreign and flag in sweep.get(name, {}):
            fail(f"--sweep {name}:{flag}: {name} has no such setting; leave it out")
        if not has_own and not foreign:
            tried[flag] = values
    return [dict(zip(tried, values)) for values in itertools.product(*tried.values())]


def find_sweep(args):
    """Return {name: {flag: values}} of all --sweep; under "" those of all arms."""
    sweep = {"": {}}
    names = [arm.split()[0] for arm in find_arms(args.compare)]
    for name, flag, values in args.sweep or []:
        title = f"--sweep {name}:{flag}" if name else f"--sweep {flag}"
        if name and name not in names:
            fail(f"{title}: --compare lists no {name}; choose from {', '.join(dict.fromkeys(names))}")
        if flag not in vars(args) or flag in NOT_SWEPT:
            fail(f"{title}: this is no number that arms can have as their own; sweep learning_rate, for example")
        if flag in sweep.setdefault(name, {}):
            fail(f"{title} is listed twice")
        sweep[name][flag] = values
    return sweep


def plan_runs(args, flags, arms, parse_args):
    """Return every run that is Planned; refuses what can be refused before the first begins."""
    runs, sweep = [], find_sweep(args)
    for repeat, number in itertools.product(range(args.repeats), range(args.seeds)):
        seeds = {"seed": args.seed + (repeat if args.seeds == 1 else number)}
        if args.seeds > 1:
            seeds = {"split_seed": args.seed + repeat} | seeds
        for arm, more in arms.items():
            for values in find_grid(parse_args([*flags, *more, *ONE_RUN]), arm.split()[0], more, sweep):
                runs.append(plan_run(args, flags, arm, more, values, seeds, parse_args))
    if args.resume and not any(run.args.resume for run in runs):
        fail(f"--resume: {args.output_dir} holds no comparison; leave --resume out to start one")
    return runs


def plan_run(args, flags, arm, more, values, seeds, parse_args):
    """Return the run of an arm with these values of a sweep and these seeds, in a folder of its own."""
    title = " ".join([arm, *(f"--{flag} {value}" for flag, value in values.items())])
    name = [title, *(f"{flag.removesuffix('_seed')} {seed}" for flag, seed in seeds.items())]
    place = Path(args.output_dir, "comparison", re.sub("[^A-Za-z0-9.+-]+", "_", " ".join(name)))
    words = [*flags, *more, *ONE_RUN, "--output_dir", str(place)]
    if args.own_eval_rows is None:
        words += ["--own_eval_rows", "0"]  # enough to say something about each client
    for flag, value in (values | seeds).items():
        words += [f"--{flag}", str(value)]
    each = parse_args(words)
    each.hf_token = args.hf_token
    started = (place / "config.json").exists()
    if started and not args.resume and not args.overwrite:
        fail(f"{args.output_dir} already holds a comparison: --resume goes on with it, --overwrite removes it")
    each.resume = args.resume and started
    described = ", ".join(f"{flag.replace('_seed', '')} {seed}" for flag, seed in seeds.items())
    return Planned(arm, values, f"{title}, {described}", place, each, words)


# -----------------------------------------------------------------------------
# the order of a comparison


def compare(args, flags, parse_args, run_once):
    """Run every arm of --compare, with each value of --sweep, on each of --repeats, with each of --seeds.

    All arms of a repeat have the same split, seeds and rows. parse_args(flags) and run_once(args, flags) are main's. A
    run is in a folder of its own, as any other. One that ends by itself (exit code 3), or whose seed makes a split that
    is refused (2), has no figures, and the others go on. Writes comparison.json, .md and .png.
    """
    folder, arms = Path(args.output_dir), find_arms(args.compare)
    runs = plan_runs(args, flags, arms, parse_args)
    num_gpus = gpus.count_gpus()
    ranks = check_runs(runs, args.repeats * args.seeds, num_gpus)
    if args.overwrite:  # else an earlier one that was longer would be mixed with this one
        shutil.rmtree(folder / "comparison", ignore_errors=True)
    ended = run_all(runs, ranks, num_gpus, run_once)

    from fllama import figures, results  # scipy: half a second that only a comparison has to pay

    comparison = results.compare_runs(args, list(arms), runs, ended)
    tables = figures.comparison_tables(comparison)
    utils.write_aside(folder / "comparison.json", json.dumps(comparison, indent=2) + "\n")
    utils.write_aside(folder / "comparison.md", tables)
    figures.plot_comparison(comparison, folder / "comparison.png")
    print(f"\n{tables}\n{folder}/comparison.json, .md and .png", flush=True)
    if not all(ended):
        raise SystemExit(3)


def check_runs(runs, repeats, num_gpus):
    """Refuse what can be refused before the first run; returns {arm: processes that it needs}.

    `runs` are `repeats` times as many as those of one split and seed, whose rows are looked at. A run that was started
    must go on with its flags: else it would be refused in the middle, and look like a split that cannot be made.
    """
    ranks, of_one_repeat = {}, len(runs) // repeats
    complete = []  # flags, with what the data set says of its clients
    for run in runs[:of_one_repeat]:
        checked = copy.copy(run.args)
        prepare.find_rows(checked, num_gpus)
        ranks[run.arm] = checked.world_size
        complete.append(checked)
    numbers = sorted({checked.num_clients for checked in complete})
    if len(numbers) > 1:  # as an arm has --world_size of its own, and no --num_clients was given
        fail(f"--compare: its runs would have {' and '.join(map(str, numbers))} clients; give --num_clients for all")
    for number, run in enumerate(runs):
        if run.args.resume:
            checked = copy.copy(complete[number % of_one_repeat])
            checked.seed, checked.split_seed = run.args.seed, run.args.split_seed
            checkpoints.check_config(run.folder, checkpoints.make_config(checked))
    return ranks


def run_all(runs, ranks, num_gpus, run_once):
    """Run them all; returns for each whether it has ended well. `ranks` has the processes that each arm needs.

    On several GPUs, those that need one process run side by side, one per GPU; the others follow in turn.
    """
    alone = [number for number, run in enumerate(runs) if num_gpus > 1 and ranks[run.arm] == 1]
    titles = [f"comparison {number}/{len(runs)}: {run.title}" for number, run in enumerate(runs, start=1)]
    codes = [None] * len(runs)
    tasks = [(titles[number], runs[number].folder, runs[number].args, runs[number].words) for number in alone]
    for number, code in zip(alone, sidebyside.run_side_by_side(tasks, num_gpus)):
        codes[number] = code
    for code in codes:
        check_code(code, codes)
    for number, run in enumerate(runs):
        if number in alone:
            continue
        print(f"\n{titles[number]}", flush=True)
        codes[number] = 0
        try:
            with checkpoints.locked_output_dir(run.folder):
                run_once(run.args, run.words)
        except SystemExit as error:
            codes[number] = error.code
            check_code(error.code, codes)
    return [code == 0 for code in codes]


def check_code(code, codes):
    """End the comparison unless a run with this exit code has figures, or can be left out."""
    if code not in (None, 0, 3) and not (code == 2 and 0 in codes):
        raise SystemExit(max(code, 1))
