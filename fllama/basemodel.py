"""Find the base model, and refuse what is not built as LLaMA is, before a rank loads it."""

import hashlib
import os
from pathlib import Path

import torch

from fllama import sources
from fllama.options import fail, first_line

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]
TOKENIZER_PACKAGES = ("sentencepiece", "tiktoken", "protobuf")


def find_model(args, weights=True):
    """Return (folder of the model, its config, its tokenizer); downloads it once for all ranks.

    Without `weights`, neither downloads nor looks at those.
    """
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    name = args.model_name
    if not os.path.isdir(name) and (os.path.exists(name) or name.startswith((".", "/", "~"))):
        fail(f"--model_name {name}: no such folder")
    path = name if os.path.isdir(name) else download_model(name, args.hf_token, weights)
    check_model_files(name, path, weights)
    transformers.logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        packages = [package for package in TOKENIZER_PACKAGES if package in str(error).lower()]
        advice = f"; pip install {' '.join(packages)}" if packages else ""
        fail(f"--model_name {name}: its config or tokenizer cannot be loaded: {first_line(error)}{advice}")
    check_architecture(args, config)
    return path, config, tokenizer


def download_model(name, token, weights):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    ignored = ["original/*", "consolidated*"]  # the same weights in another form
    if not weights:
        ignored.append("*.safetensors")
    try:
        return snapshot_download(name, token=token, allow_patterns=MODEL_FILES, ignore_patterns=ignored)
    except GatedRepoError:
        fail(f"--model_name {name} is gated: accept its licence on the hub, then set HF_TOKEN to your token")
    except (RepositoryNotFoundError, HFValidationError):
        fail(f"--model_name {name}: no such folder, nor model on the hub (or a private one: set HF_TOKEN)")
    except Exception as error:  # the hub's client has a dozen kinds of these, and every one of them ends the run
        fail(sources.hub_problem("--model_name", name, error))


def check_model_files(name, path, weights):
    """Refuse a folder without config and weights, and models without the projections of LLaMA."""
    from safetensors import safe_open

    files = list(Path(path).glob("*.safetensors"))
    if not Path(path, "config.json").is_file() or weights and not files:
        found = ", ".join(sorted(os.listdir(path))[:8]) or "nothing"
        fail(f"--model_name {name}: needs config.json, *.safetensors and a tokenizer; found {found}")
    tensors = [tensor for file in files for tensor in safe_open(file, "pt").keys()]
    missing = [part for part in LORA_TARGETS if not any(f".{part}." in tensor for tensor in tensors)]
    if files and missing:
        fail(f"--model_name {name} is not built as LLaMA is: it has no {', '.join(missing)}")


def check_architecture(args, config):
    """Refuse what is not built as LLaMA is, by a model without memory; use eager attention if it has no other."""
    from transformers import AutoModelForCausalLM

    name = args.model_name
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        fail(f"--model_name {name} is not built as LLaMA is: it has a part for images or sound; name a text model")
    if any(getattr(config, count, None) for count in ("num_experts", "num_local_experts", "n_routed_experts")):
        fail(f"--model_name {name} is not built as LLaMA is: it is a mixture of experts")
    check_quantization(args, config)
    model = None
    for attention in dict.fromkeys((args.attn_implementation, "eager")):
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            break
        except (ValueError, ImportError) as error:
            problem = first_line(error)
    if model is None:
        fail(f"--model_name {name} cannot be built: {problem}")
    if attention != args.attn_implementation:
        print(f"  attention  eager: this model has no {args.attn_implementation}", flush=True)
        args.attn_implementation = attention
    linear = {module_name.rsplit(".", 1)[-1] for module_name, module in model.named_modules() if is_linear(module)}
    missing = [part for part in LORA_TARGETS if part not in linear]
    if missing:
        fail(f"--model_name {name} is not built as LLaMA is: it has no {', '.join(missing)}")


def is_linear(module):
    return isinstance(module, torch.nn.Linear)


def check_quantization(args, config):
    """Refuse weights that are quantized by another library than bitsandbytes."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    method = quantization.get("quant_method")
    if method != "bitsandbytes":
        fail(f"--model_name {args.model_name} is quantized by {method}; name the model that it was made from")
    if not args.load_in_4bit:
        fail(f"--model_name {args.model_name} is quantized already; leave out --no-load_in_4bit")


def digest_of_model(path):
    """Return a sha256 that tells models apart: of the names, sizes and last MB of the files with weights."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")):
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - 2**20))
            digest.update(f"{file.name} {size} ".encode() + opened.read())
    return digest.hexdigest()


def count_lora_parameters(config, r):
    """Return how many parameters a LoRA of rank `r` on all of LORA_TARGETS has, from the config of the model."""
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads  # Qwen2's config has none
    queries, keys = heads * head, config.num_key_value_heads * head
    return config.num_hidden_layers * r * (2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner))
