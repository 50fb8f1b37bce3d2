"""On one GPU: an 8 B LLaMA in 4 bits, federated, as plain TRL and as the naive loop. python tests/benchmarks/gpu.py

The model has the shape of Llama-3.1-8B and random weights that are made on the GPU, so nothing is downloaded; sequences
of 1024 tokens, 4 a step, bf16. Medians over 3 turns of 5 steps, behind one to warm up. `speed` prints tokens per
second, model FLOP utilization (6 FLOPs less the 2 for gradients of weights that are frozen, against the matrix products
of this GPU) and peak memory; `packing` the same for shorter rows;
`profile` where the time of a step goes; `sharing` 8 clients as one rank and as 8 ranks.
`tiny` in front runs the same with a model of two layers, on a CPU too, to see that it still works.
"""

import functools
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import training

import main
from fllama import basemodel, options

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
}
TINY = LLAMA_8B | {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 4}
STEPS, TURNS = 5, 3


def make_inputs(folder, shape, words=1100, num_rows=200):
    """Write the config, a tokenizer, a file that only names the layers, and rows of more than 1024 tokens."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(options.EMBEDDED_MODEL)
    tokenizer.save_pretrained(folder / "model")
    LlamaConfig(**shape, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id).save_pretrained(
        folder / "model"
    )
    names = {f"model.layers.0.{part}.weight": torch.zeros(1) for part in basemodel.LORA_TARGETS}
    save_file(names, folder / "model" / "model.safetensors")
    text = Path(options.EMBEDDED_DATA, "train.jsonl").read_text().split()
    rows = ({"prompt": "the", "completion": " ".join(text[10 * i : 10 * i + words])} for i in range(num_rows))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--model_name {folder}/model --dataset_path {folder}/rows.jsonl --max_length 1024 --warmup_steps 0"


def random_weights(path, dtype, quantization_config, device_map, attn_implementation="sdpa", **_):
    """As AutoModelForCausalLM.from_pretrained, but the weights are drawn on the GPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    device = device_map[""]
    weights = {name: torch.randn(shape, device=device, dtype=dtype).mul_(0.02) for name, shape in shapes.items()}
    return LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        quantization_config=quantization_config,
        device_map=device_map,
        attn_implementation=attn_implementation,
    )


def begin(rank, args, run):
    """What every rank of this benchmark begins with."""
    training.begin(rank, args, run)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained = random_weights


def measure_products():
    """Return the FLOP/s of this machine's matrix products."""
    import torch

    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    kind = {"device": "cuda", "dtype": torch.bfloat16} if on_gpu else {}
    a, b = torch.randn(1024, 8192, **kind), torch.randn(8192, 8192, **kind)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * 1024 * 8192 * 8192 / statistics.median(seconds[1:])


def forget_last_run():
    """Free the model of the run before, which is in cycles, and begin to measure the peak of memory anew."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory():
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return training.memory("VmHWM")


def speed_rank(own_flags, kinds, turns, rank, args, run):
    """Each kind in turn, `turns` times; writes {kind: [(tokens per second, GB)]}."""
    begin(rank, args, run)
    rows, measured = training.own_rows(rank, args, run), {kind: [] for kind in kinds}
    per_step = args.per_device_train_batch_size
    for turn in range(turns):
        for kind in kinds:
            forget_last_run()
            folder, lengths = f"{args.output_dir}/{turn}_{kind.replace(' ', '_')}", lengths_of(rows)
            if kind == "naive loop":  # its defaults: fp16, and evaluating and saving at every step
                settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
                settings |= {"fp16": True, "bf16": False} if run.num_gpus else {}
                some = rows.select(range(8))
                rounds = training.naive_loop(rank, args, run, rows, folder, STEPS + 1, eval_dataset=some, **settings)
                speed = sum(lengths[:per_step]) * STEPS / sum(rounds[1:])
            else:
                if kind == "plain TRL":
                    times = training.plain_run(args, run, rows, folder, STEPS + 2)
                else:
                    case = main.parse_args([*own_flags, *kind.split()])
                    lengths = lengths_of(training.own_rows(rank, case, run))
                    times = training.federated_run(rank, case, run, folder)
                speed = sum(lengths[per_step : (len(times) - 1) * per_step]) / (times[-1] - times[1])
            measured[kind].append((speed, peak_memory()))
    Path(args.output_dir, "speed.json").write_text(json.dumps(measured))


def lengths_of(rows):
    """Return the tokens of each sequence, which is a row or, with --packing, a pack of rows."""
    return [len(ids) for ids in rows["input_ids"]]


def speed(folder, shape, words, kinds):
    from transformers import LlamaConfig

    from fllama.estimate import count_parameters

    flags = make_inputs(folder, shape, words)
    flags += f" --world_size 1 --local_steps 1 --num_rounds {STEPS + 2} --eval_rounds 100 --save_rounds 100"
    flags = [*flags.split(), "--output_dir", str(folder / "out")]
    training.launch_ranks(flags, functools.partial(speed_rank, flags, kinds, TURNS))
    measured = json.loads((folder / "out" / "speed.json").read_text())
    rate = measure_products()
    linear, _, _ = count_parameters(LlamaConfig(**shape))
    base = statistics.median(speed for speed, _ in measured["plain TRL"])
    lines = [f"rows of {words} words; matrix products {rate / 1e12:.1f} TFLOP/s"]
    lines += ["| | tokens/s | of plain TRL | model FLOP utilization | peak memory, GB |", "|---|---|---|---|---|"]
    for kind, turns in measured.items():
        tokens, memory = (statistics.median(values) for values in zip(*turns))
        lines.append(
            f"| {kind} | {tokens:,.0f} | {tokens / base:.2f} | {4 * linear * tokens / rate:.0%} | {memory:.1f} |"
        )
    return lines


def profile_rank(rank, args, run):
    """Three steps of this project; writes the seconds of each kind of kernel."""
    begin(rank, args, run)
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        training.federated_run(rank, args, run, f"{args.output_dir}/profiled")
    kinds = {
        "dequantization": ("dequant", "4bit", "blockwise"),
        "attention": ("attention", "flash", "fmha", "sdpa"),
        "optimizer": ("adam", "optimizer", "multi_tensor"),
        "averaging": ("nccl", "gloo", "c10d"),
        "matrix products": ("gemm", "mm", "cutlass", "nvjet", "linear"),
    }
    seconds = dict.fromkeys([*kinds, "rest"], 0.0)
    for event in profiled.key_averages():
        own = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        name = event.key.lower()
        seconds[next((kind for kind, signs in kinds.items() if any(s in name for s in signs)), "rest")] += own / 1e6
    Path(args.output_dir, "profile.json").write_text(json.dumps(seconds))


def where_the_time_goes(folder, shape):
    flags = make_inputs(folder, shape) + " --world_size 1 --local_steps 3 --num_rounds 1 --save_rounds 100"
    training.launch_ranks([*flags.split(), "--output_dir", str(folder / "out")], profile_rank)
    seconds = json.loads((folder / "out" / "profile.json").read_text())
    total = sum(seconds.values())
    return ["| of three steps and an evaluation | share |", "|---|---|"] + [
        f"| {kind} | {value / total:.0%} |" for kind, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]


def shared_rank(rank, args, run):
    run = replace(run, num_gpus=min(run.num_gpus, 1))  # of several, the first one
    begin(rank, args, run)
    times = training.federated_run(rank, args, run, f"{args.output_dir}/shared")
    Path(args.output_dir, f"shared_{rank}.json").write_text(json.dumps([times[-1] - times[0], peak_memory()]))


def sharing(folder, shape):
    lines = ["| 8 clients, 3 rounds of 2 steps | seconds | peak memory of a rank, GB |", "|---|---|---|"]
    for world_size in (1, 8):
        inputs = folder / str(world_size)
        inputs.mkdir()
        flags = make_inputs(inputs, shape)
        flags += f" --world_size {world_size} --num_clients 8 --local_steps 2 --num_rounds 3 --eval_rounds 100"
        flags += " --backend gloo"
        start = time.perf_counter()
        training.launch_ranks([*flags.split(), "--output_dir", str(inputs / "out")], shared_rank)
        whole = time.perf_counter() - start
        seconds, memory = json.loads((inputs / "out" / "shared_0.json").read_text())
        lines.append(f"| {world_size} rank(s), {whole:.0f} s with the start | {seconds:.1f} | {memory:.1f} |")
    return lines


if __name__ == "__main__":
    shape, parts = LLAMA_8B, sys.argv[1:]
    if parts[:1] == ["tiny"]:
        shape, parts, TURNS = TINY, parts[1:], 1
    kinds = ["plain TRL", "naive loop", "--local_steps 1", "--local_steps 10", "--lora_r 128"]
    kinds += ["--no-gradient_checkpointing", "--torch_compile", "--average_dtype int8"]
    kinds += ["--attn_implementation flash_attention_2"] * bool(importlib.util.find_spec("flash_attn"))
    kinds += ["--use_liger_kernel"] * bool(importlib.util.find_spec("liger_kernel"))
    lines = []
    for part in parts or ["speed", "packing", "profile", "sharing"]:
        with tempfile.TemporaryDirectory() as name:
            if part == "speed":
                lines += speed(Path(name), shape, 1100, kinds)
            elif part == "packing":
                lines += speed(Path(name), shape, 200, ["plain TRL", "--local_steps 1", "--packing"])
            else:
                lines += {"profile": where_the_time_goes, "sharing": sharing}[part](Path(name), shape)
    print("\n".join(lines))  # behind what the runs have said
