"""What a run will need of memory, by arithmetic beside sizes of models without numbers."""

from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig
from pretrain.flags import parse_with_config
from pretrain.models.modern import Modern, ModernConfig
from pretrain.train.memory import needed
from pretrain.train.optim import make_optimizer
from pretrain.train.settings import build_parser

ROOT = Path(__file__).parents[2]
XL = GPTConfig(n_layer=48, n_head=25, n_embd=1600)
PARAMETERS = 1_557_611_200 + 47 * 1600  # OpenAI's, and the rows that pad the vocabulary


def memory_of(config, optimizer="adamw", checkpointing=False, **changes):
    with torch.device("meta"):
        model = Modern(config) if isinstance(config, ModernConfig) else GPT(config)
    model.gradient_checkpointing = checkpointing
    made = make_optimizer(
        model, name=optimizer, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95)
    )
    run = {"batch_size": 4, "block_size": 1024, "dtype": torch.bfloat16}
    return needed(model, made, **run | changes)


def test_weights_gradients_and_moments_are_four_numbers_a_parameter_and_a_part_of_them_sharded():
    alone, sharded = memory_of(XL), memory_of(XL, shards=8)
    assert alone.weights == alone.gradients == alone.moments // 2 == 4 * PARAMETERS
    assert alone.gathered == 0
    assert sharded.weights == pytest.approx(4 * PARAMETERS / 8, rel=1e-3)
    assert sharded.moments == 2 * sharded.weights >= 8 * PARAMETERS / 8
    # Two blocks in bfloat16 and the gradients of one; the embeddings and theirs, in float32.
    block, outside = 12 * 1600**2 + 13 * 1600, (50304 + 1024 + 2) * 1600
    assert sharded.gathered == 2 * 2 * block + (2 + 4) * block + 2 * 4 * outside


def test_muon_keeps_one_number_for_each_of_a_matrix_in_a_block():
    config = ModernConfig(n_layer=2, n_embd=256, n_head=2, bias=False)
    memory = memory_of(config, "muon", batch_size=1)
    matrices = 2 * 12 * 256**2
    assert memory.moments == 4 * (2 * memory.weights // 4 - matrices)


def test_activations_are_those_that_the_formulas_of_a_block_keep():
    """A block under autocast in bfloat16, with GELU computed again."""
    width, rows, layers = 1600, 4 * 1024, 48
    norms = 2 * (4 * width + 8 + 2 * width)  # input, mean and deviation; the output in bfloat16
    attention = 3 * 2 * width + 2 * width + 4 * 25  # q, k, v, the result, the softmax's sums
    block = rows * (norms + attention + 2 * 4 * width)  # and what GELU begins from
    # Autocast's copies, but for that of the product behind GELU, which is made again.
    matrices = 2 * (8 * width**2 + 8 * width)
    kept = memory_of(XL).activations
    assert kept == pytest.approx((layers + 1) * (block + matrices), rel=0.02)
    # Sharded they are gathered in bfloat16.
    assert memory_of(XL, shards=8).activations == pytest.approx((layers + 1) * block, rel=0.02)
    # Checkpointed a block keeps what it begins from.
    spared = memory_of(XL, checkpointing=True).activations
    assert spared == pytest.approx(layers * rows * 4 * width + block + matrices, rel=0.05)


@pytest.mark.parametrize(
    ("batch_size", "shards", "gigabytes"), [(None, 8, 24), (16, 8, 80), (16, 1, 80)]
)
def test_gpt2_xl_fits_the_gpus_that_its_configuration_names(batch_size, shards, gigabytes):
    path = ROOT / "configs" / "gpt2-xl.yaml"
    args, _, problems = parse_with_config(build_parser(), ["--config", str(path)], {})
    assert not problems and (args.n_layer, args.n_head, args.n_embd) == (48, 25, 1600)
    assert args.parallel == "fsdp" and args.total_batch_tokens % (16 * 1024 * 8) == 0
    memory = memory_of(XL, batch_size=batch_size or args.batch_size, shards=shards)
    assert memory.total < 0.9 * gigabytes * 1e9, "a tenth is the allocator's"
