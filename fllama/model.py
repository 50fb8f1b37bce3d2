"""The 4-bit base model with its LoRA, and TRL's trainer around it."""

import functools
import logging
import warnings

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports optional kernels as missing, once per process

import bitsandbytes as bnb
import datasets
import torch
import transformers
import trl.trainer.utils
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import utils
from fllama import basemodel, data
from fllama.clients import create_optimizer_state

# without Triton, TRL (1.16) computes the logits of all tokens; of the answer alone, a step on the CPU takes 0.6 to 0.7
trl.trainer.utils._use_triton = lambda device: True


def silence_libraries():
    """Keep the libraries' bars, warnings and hints off the terminal."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


def load_base(args, model_path, device):
    """Load the base model, in 4 bits (NF4, double quantization) unless told otherwise.

    QLoRA, Dettmers et al. 2023 (arXiv:2305.14314).
    """
    dtype = compute_dtype(args, device)
    how = {}
    if args.load_in_4bit and not is_quantized(model_path):  # weights that are in 4 bits are loaded as they are
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(
        model_path,
        dtype=dtype,
        attn_implementation=args.attn_implementation,
        device_map={"": device},
        trust_remote_code=False,
        **how,
    )
    if args.load_in_4bit:
        keep_4bit_layout(model)
        if dtype == torch.float16:  # sums over many layers may overflow: all that is not in 4 bits in float32
            prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def is_quantized(model_path):
    return getattr(AutoConfig.from_pretrained(model_path), "quantization_config", None) is not None


def keep_4bit_layout(model):
    """Keep bitsandbytes (0.50) from repacking the weights at the first evaluation on CPUs with AVX512-BF16.

    The repacked layout is computed in bf16 by a kernel without a gradient, and stays: training after the first
    evaluation would silently lose every gradient that has to pass through a base weight.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def compute_dtype(args, device):
    """Return the dtype of the arithmetic: as asked, else bf16 if the GPU has it, or fp16; float32 on the CPU."""
    if args.torch_dtype != "auto":
        return getattr(torch, args.torch_dtype)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_model(args, model_path, device):
    """Load the base model with a fresh LoRA on all its linear layers.

    LoRA, Hu et al. 2021 (arXiv:2106.09685).
    """
    return add_lora(args, load_base(args, model_path, device))


def add_lora(args, model):
    lora = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=basemodel.LORA_TARGETS,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    trained = {part for part, _ in utils.LORA_VARIANTS[args.lora_variant]}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(part in name for part in trained)
    return model


def load_finished(args, model_path, adapter, num_gpus):
    """Return the base model with the adapter in a folder, on the first GPU if there is one."""
    silence_libraries()
    model = load_base(args, model_path, torch.device("cuda", 0) if num_gpus else torch.device("cpu"))
    if args.merge and args.load_in_4bit:
        model = model.dequantize()
    return PeftModel.from_pretrained(model, adapter)


def load_tokenizer(model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def lora_parameters(model):
    """Return all LoRA parameters, trained or not, in the model's order: A before B in every projection."""
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def build_trainer(args, run, device, model, tokenizer):
    """Build TRL's trainer, which must not know of other ranks. It is used for batches, forward and backward passes."""
    dtype = compute_dtype(args, device)
    flat = args.packing and args.attn_implementation == "flash_attention_2"  # it wants a batch as one sequence
    config = SFTConfig(
        output_dir=run.data_path,  # it saves nothing itself
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        gradient_checkpointing=args.gradient_checkpointing,
        torch_compile=args.torch_compile,
        use_liger_kernel=args.use_liger_kernel,
        packing=flat,  # the rows are packed already: this is for the batches
        max_steps=1,  # of train(), which is never called
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=4 * args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps,
        optim=args.optim,
        dataset_kwargs={"skip_prepare_dataset": True},  # tokenized already, once for all ranks
        report_to="none",
        disable_tqdm=True,
    )
    sample = datasets.load_from_disk(run.data_path)["train"].select([0])
    trainer = SFTTrainer(model=model, args=config, train_dataset=sample, processing_class=tokenizer)
    if args.packing and not flat:
        trainer.data_collator.return_position_ids = True
        trainer.data_collator = functools.partial(data.collate_packs, trainer.data_collator)
    for parameter in lora_parameters(model):
        parameter.data = parameter.data.float()  # TRL makes the adapters of a 4-bit model bf16, too coarse to average
    return trainer


def build_optimizer(args, trainer):
    """Create the trainer's optimizer; returns learning_rate(round, local step counted from 0).

    The rate is a function of the federated step: one curve over the whole run, warmed up once. It is entered one step
    in, as a warm-up begins at zero, where one local step would be a round without training.
    """
    optimizer = trainer.create_optimizer()
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, optimizer)
    create_optimizer_state(optimizer)  # after prepare(), which would load it, and unpage what bitsandbytes pages
    scheduler = trainer.create_scheduler(num_training_steps=args.num_rounds * args.local_steps + 1)
    curve = scheduler.lr_lambdas[0]

    def learning_rate(number, step):
        return args.learning_rate * curve((number - 1) * args.local_steps + step + 1)

    return learning_rate
