"""Run main.py on flags and rows drawn by hypothesis; prints how many examples there were, trained, and were refused."""

import contextlib
import gc
import io
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import federated
import main
import utils
from fllama import data, launch, prepare, report

model, work = sys.argv[1:]
counts = {"examples": 0, "trained": 0, "refused": 0}

ODD = ["Where?", "<|eot_id|>", "{{ messages }}", "\u202e\U0001f9ea\u0301", "\0", "\ud800", " "]
TEXTS = st.one_of(st.text(max_size=30), st.sampled_from(ODD))
VALUES = st.one_of(TEXTS, st.none(), st.integers(), st.floats(), st.lists(TEXTS, max_size=2), st.booleans())
ANSWERS = st.one_of(
    st.fixed_dictionaries({"text": st.lists(TEXTS, max_size=2)}),
    st.lists(st.fixed_dictionaries({"text": TEXTS}), max_size=2),
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", ""])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS}), max_size=4)
SQUAD = st.fixed_dictionaries({"context": TEXTS, "question": TEXTS, "answers": ANSWERS})
FORMS = [
    SQUAD,
    st.fixed_dictionaries({"messages": MESSAGES}),
    st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}),
    st.fixed_dictionaries({"prompt": MESSAGES, "completion": MESSAGES}),
    st.fixed_dictionaries({"conversations": MESSAGES}),
    st.fixed_dictionaries({"instruction": TEXTS, "input": VALUES, "output": TEXTS}),
    st.fixed_dictionaries({"question": TEXTS, "answer": VALUES}),
    st.fixed_dictionaries({"text": TEXTS}),
    st.dictionaries(st.sampled_from("context question answers messages prompt completion label".split()), VALUES),
]
GOOD = [
    {"context": "Rx: aspirin 30 mg.", "question": "How much?", "answers": {"text": ["30 mg"]}, "label": "a"},
    {"messages": [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": "30 mg"}], "label": "b"},
    {"prompt": "How much?", "completion": " 30 mg", "label": "c"},
    {"instruction": "How much?", "input": "Rx: aspirin 30 mg.", "output": "30 mg", "label": "a"},
    {"text": "Rx: aspirin 30 mg.", "label": "b"},
]
GOOD_FLAGS = {
    "world_size": ["1"],
    "num_clients": ["1", "2", "3"],
    "clients_per_round": ["1"],
    "num_rounds": ["1", "2"],
    "local_steps": ["1", "2"],
    "aggregator": [name for name in utils.AGGREGATORS if name not in ("krum", "dp_fedavg")],
    "lora_variant": list(utils.LORA_VARIANTS),
    "client_state": ["keep", "reset"],
    "prox_mu": ["0", "0.1", "1e30"],
    "trim_fraction": ["0.1", "0.49"],
    "weiszfeld_iterations": ["1", "5"],
    "weiszfeld_smoothing": ["1e-6", "1e30"],
    "on_bad_update": ["skip", "fail"],
    "learning_rate": ["1e-3", "1e30"],
    "lora_r": ["1", "4"],
    "lora_alpha": ["1", "1e-30", "1e30"],
    "lora_dropout": ["0", "0.99"],
    "max_length": ["32", "999999999"],
    "partition": ["iid", "dirichlet", "column", "quantity"],
    "partition_column": ["label"],
    "dirichlet_alpha": ["1", "1e6"],
    "per_device_train_batch_size": ["1", "3", "64"],
    "gradient_accumulation_steps": ["1", "2"],
    "lr_scheduler_type": ["cosine", "linear", "constant"],
    "warmup_steps": ["0", "0.5", "1", "99"],
    "optim": ["adamw_torch", "sgd"],
    "eval_rounds": ["1", "3"],
    "save_rounds": ["1", "3"],
    "seed": ["0", "2147483647"],
    "hf_token": ["hf_x", ""],
    "restarts": ["0", "1"],
    "timeout": ["1"],
}
BAD_FLAGS = {
    "world_size": ["2", "0", "x"],
    "num_clients": ["50", "-1", "1e3"],
    "clients_per_round": ["9", "0"],
    "num_rounds": ["0", "inf"],
    "local_steps": ["-5"],
    "aggregator": ["mean", "krum", "dp_fedavg"],
    "canaries": ["3", "-1"],
    "dp_epsilon": ["8", "0", "1e9"],
    "dp_delta": ["0.5"],
    "lora_variant": ["dora"],
    "client_state": [""],
    "prox_mu": ["nan"],
    "server_lr": ["1", "1e-9", "1e30", "-1"],
    "trim_fraction": ["0.5", "1"],
    "num_malicious": ["0", "1", "7"],
    "weiszfeld_iterations": ["0", "x"],
    "weiszfeld_smoothing": ["0"],
    "learning_rate": ["0", "nan"],
    "lora_r": ["0"],
    "lora_dropout": ["1"],
    "max_length": ["0", "1", "8"],
    "partition": ["random"],
    "partition_column": ["context", "nothing", ""],
    "dirichlet_alpha": ["1e-3"],
    "lr_scheduler_type": ["cubic"],
    "warmup_steps": ["-1"],
    "optim": ["lion", "adamw_8bit"],
    "seed": ["-1", "1.5"],
    "model_name": ["/nowhere", "a/b/c"],
    "hf_token": ["hf\u00e9"],
    "restarts": ["-1"],
    "timeout": ["0"],
}


def some_of(flags, most):
    names = st.lists(st.sampled_from(sorted(flags)), max_size=most, unique=True)
    return names.flatmap(lambda names: st.fixed_dictionaries({name: st.sampled_from(flags[name]) for name in names}))


@st.composite
def examples(draw):
    """Mostly what can be run; in every second example one bad flag or some odd rows."""
    chosen = {"model_name": model, "world_size": "1", "num_rounds": "2", "local_steps": "1", "max_length": "64"}
    chosen |= draw(some_of(GOOD_FLAGS, 5))
    chosen |= draw(some_of(BAD_FLAGS, 1)) if draw(st.integers(0, 3)) == 0 else {}
    flags = [part for name, value in chosen.items() for part in (f"--{name}", value)]
    flags += draw(st.sampled_from([[]] * 6 + [["--scaffold"], ["--no-load_in_4bit"], ["--resume"], ["nonsense"]]))
    rows = [draw(st.sampled_from(GOOD))] * draw(st.sampled_from([100, 100, 100, 20, 7, 1, 0]))
    odd = draw(st.lists(st.sampled_from(FORMS).flatmap(lambda form: form), max_size=2)) * draw(st.booleans())
    place = draw(st.integers(0, len(rows)))
    suffix = draw(st.sampled_from([".jsonl"] * 9 + [".json", ".csv", ".parquet"]))
    return flags, rows[:place] + odd + rows[place:], suffix


def run_one_rank(target, args, run):
    """Instead of launch.launch: the one rank in this process; more ranks are not what this is about."""
    if args.world_size > 1:
        return 0, ""
    try:
        federated.local_train(0, args, run)
        counts["trained"] += 1
        return 0, ""
    except launch.EndRun as ended:
        assert ended.code == 3 and "lower --learning_rate" in ended.text, ended.text
        return ended.code, ended.text
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(examples())
def fuzz(example):
    flags, rows, suffix = example
    counts["examples"] += 1
    with tempfile.TemporaryDirectory(dir=work) as folder, contextlib.ExitStack() as stack:
        path = Path(folder, f"rows{suffix}")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        output, errors = (stack.enter_context(redirect(io.TextIOWrapper(io.BytesIO()))) for redirect in REDIRECTIONS)
        code = 0
        try:
            main.main([*flags, "--eval_questions", "1", "--dataset_path", str(path), "--output_dir", f"{folder}/out"])
        except SystemExit as stop:
            code = stop.code
        errors.flush()
        said = errors.buffer.getvalue().decode().splitlines()
    assert code in (0, 2, 3), code
    if code == 2:
        counts["refused"] += 1
        assert len([line for line in said if not line.startswith("usage:")]) == 1, said
    assert "Traceback" not in "".join(said), said


REDIRECTIONS = (contextlib.redirect_stdout, contextlib.redirect_stderr)
launch.launch = run_one_rank
launch.start_imports = lambda: None
report.plot_losses = lambda folder, rounds: None
data.GLOBAL_EVAL_ROWS, prepare.CLIENT_EVAL_ROWS = 2, 1  # what takes the time
gc.freeze()  # the imported modules, which each trainer would collect anew
fuzz()
print(*counts.values())
