import pytest

from hydra_jax.benchmarks import training
from tests.helpers import training as toy_training


def test_arithmetic_of_a_step():
    # Of a layer of width 4: 4 x 16 of attention's weights, 3 x 4 x 6 of the MLP's, 2 x 4 x 8 products with 8 tokens.
    shape = dict(layers=3, width=4, heads=2, kv_heads=2, mlp_width=6, context=8)
    decoder = toy_training.config(model=shape).decoder(10)
    assert training.step_flops(decoder, 16) == 6 * 16 * (3 * (4 * 16 + 3 * 24 + 2 * 4 * 8) + 40)


@pytest.mark.slow
def test_a_measurement():
    config = toy_training.config(dropout=dict(attn=0.1), accumulate=2)
    measured = training.measure(config, turns=1)
    assert measured.step_to_gemm > 0  # of products so small, the calls' own time
    assert measured.tokens > 0
    expected = training.step_flops(config.decoder(config.data.vocab_size), 48) / 48
    assert abs(measured.step_flops / measured.tokens / expected - 1) < 1e-9
    assert "%" in training.table([measured])
