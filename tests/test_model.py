"""The 4-bit model on this machine's device: what is frozen, what evaluation leaves alone, and the learning rate."""

import math

import bitsandbytes as bnb
import pytest
import torch
from conftest import make_trainer

import main
import utils
from fllama.model import build_optimizer, load_model, lora_parameters


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    args = main.parse_args(["--output_dir", str(tmp_path_factory.mktemp("model"))])
    torch.manual_seed(0)
    return load_model(args, args.model_name, torch.device("cpu"))


def test_base_is_nf4_and_frozen(model):
    linear = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(linear) == 7 * 4 and {module.weight.quant_state.quant_type for module in linear} == {"nf4"}
    assert all(module.weight.quant_state.nested for module in linear)  # double quantization
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 7 * 4 and all("lora_" in name for name in trainable)


def test_evaluation_leaves_the_gradients_alone(model):
    """Without keep_4bit_layout this fails on CPUs with AVX512-BF16: every gradient through a base weight is lost."""
    ids = torch.arange(5, 50)[None]

    def gradient():
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([parameter.grad.reshape(-1) for parameter in utils.shared_parameters(model)])

    before = gradient()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    assert torch.equal(gradient(), before) and before.norm() > 0


# -----------------------------------------------------------------------------
# the trainer and its learning rate


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """The arguments and the trainer of a run that has 6 rounds of 3 local steps."""
    return make_trainer(tmp_path_factory.mktemp("trainer"), "--num_rounds", "6", "--local_steps", "3")


def test_the_trainer_knows_of_no_other_rank(trainer):
    _, trainer = trainer
    assert trainer.accelerator.num_processes == 1 and trainer.args.report_to == []
    assert {parameter.dtype for parameter in lora_parameters(trainer.model)} == {torch.float32}


def curve_of(trainer, schedule, warmup_steps):
    """The function that build_optimizer returns, with another schedule."""
    args, trainer = trainer
    args.learning_rate = 0.5
    trainer.args.lr_scheduler_type, trainer.args.warmup_steps = schedule, warmup_steps
    trainer.lr_scheduler = trainer.optimizer = None
    return build_optimizer(args, trainer)


ORDER = [(number, step) for number in range(1, 7) for step in range(3)]  # of the 18 federated steps


@pytest.mark.parametrize("schedule", main.SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 5, 0.25])
def test_one_curve_over_the_whole_run(trainer, schedule, warmup_steps):
    """Above 0 from the first step to the last, warmed up once, and the same for any order of calls."""
    learning_rate = curve_of(trainer, schedule, warmup_steps)
    rates = [learning_rate(number, step) for number, step in ORDER]
    assert 0 < min(rates) and max(rates) <= 0.5 and rates[0] > 0
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    backwards = [learning_rate(number, step) for number, step in reversed(ORDER)]
    assert backwards[::-1] == rates


def test_curves_by_hand(trainer):
    """18 steps of 19: the first is one step in, and a share of 0.25 warms up over 5 of them."""
    for warmup_steps, warm in ((5, 5), (0.25, 5), (0, 0)):
        linear = curve_of(trainer, "linear", warmup_steps)
        cosine = curve_of(trainer, "cosine", warmup_steps)
        for i, (number, step) in enumerate(ORDER, start=1):
            if i < warm:
                expected = [i / warm] * 2
            else:
                done = (i - warm) / (19 - warm)
                expected = [1 - done, (1 + math.cos(math.pi * done)) / 2]
            assert [linear(number, step), cosine(number, step)] == pytest.approx([0.5 * each for each in expected])


def test_one_round_of_one_step_learns(tmp_path):
    args, trainer = make_trainer(tmp_path, "--local_steps", "1", "--warmup_steps", "0.1", "--learning_rate", "0.5")
    assert build_optimizer(args, trainer)(1, 0) == pytest.approx(0.5)
