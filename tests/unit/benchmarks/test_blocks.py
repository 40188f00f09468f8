"""The benchmark of block-causal decoding, at its smallest."""

from benchmarks.blocks import BLOCK, measure


def test_figures_of_a_tiny_model() -> None:
    found = measure(gen_length=16, rows=2, d_model=32, layers=1, repeat=1)
    # its first call runs 19 prompt tokens in whole blocks and the rest of the last one
    blocks = 16 // BLOCK + 1
    first = 20
    one = found["one_row"]
    # the token that completes the last block is drawn only while an asked one is open
    calls = one["whole"]["calls"]
    assert calls == one["cached"]["calls"] and 16 <= calls <= 17
    assert one["cached"]["tokens"] == first + BLOCK * (calls - 1) + BLOCK * (blocks - 1)
    assert one["whole"]["tokens"] == calls * (19 + 16 + BLOCK - 1)
    assert found["exact_likelihood"]["passes_per_row"] <= BLOCK
    assert 16 <= found["exact_likelihood"]["calls_per_row"] <= 16 + BLOCK
    tokens = {name: found["exact_likelihood"][name]["tokens"] for name in ("shared", "alone")}
    assert tokens["shared"] < 0.8 * tokens["alone"]
    assert found["mixed_prompts"]["ratio"] > 0
