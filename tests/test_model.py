"""The 4-bit model on this machine's device: what is frozen, and that evaluation does not disturb training."""

import bitsandbytes as bnb
import pytest
import torch

import federated
import main
import utils


@pytest.fixture
def model(tmp_path):
    args = main.parse_args(["--output_dir", str(tmp_path)])
    args.model_path = args.model_name
    torch.manual_seed(0)
    return federated.load_model(args, torch.device("cpu"))


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
