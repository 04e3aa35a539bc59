"""Facts about gradient signatures: the sketch keeps geometry, the average is that of gradients."""

from __future__ import annotations

import pytest
import torch

from treelora_cli.algorithm.signature import SignatureAccumulator, SketchSpec, sketch_layer


def test_a_short_gradient_is_kept_and_padded() -> None:
    sketch = sketch_layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), SketchSpec(6), 0)
    assert sketch.tolist() == [1.0, 2.0, 3.0, 4.0, 0.0, 0.0]


def test_a_long_gradient_is_dealt_into_buckets_with_signs() -> None:
    # every one of 12 entries lands in one of 4 buckets of 3, with a sign
    sketches = torch.stack([sketch_layer(row, SketchSpec(4, seed=3), 1) for row in torch.eye(12)])  # (12, 4)
    assert sketches.abs().sum(dim=1).tolist() == [1.0] * 12
    assert sketches.abs().sum(dim=0).tolist() == [3.0] * 4
    assert set(sketches.flatten().tolist()) == {-1.0, 0.0, 1.0}


def test_the_sketch_is_linear() -> None:
    first, second = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    spec = SketchSpec(64)
    mixed = sketch_layer(2 * first - second, spec, 0)
    apart = 2 * sketch_layer(first, spec, 0) - sketch_layer(second, spec, 0)
    torch.testing.assert_close(mixed, apart, atol=1e-4, rtol=0)


def test_the_sketch_keeps_inner_products() -> None:
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(20_000, generator=generator)
    rows = [shared + torch.randn(20_000, generator=generator) for _ in range(2)]
    exact = torch.cosine_similarity(rows[0], rows[1], dim=0)
    spec = SketchSpec(1024, seed=5)
    first, second = (sketch_layer(row, spec, 0) for row in rows)
    # standard error about 1 / sqrt(1024) = 0.03
    assert torch.cosine_similarity(first, second, dim=0) == pytest.approx(float(exact), abs=0.1)


def test_sketches_depend_on_seed_and_layer_only() -> None:
    grad = torch.randn(500, generator=torch.Generator().manual_seed(0))
    first = sketch_layer(grad, SketchSpec(16, seed=1), 0)
    torch.manual_seed(123)
    assert torch.equal(first, sketch_layer(grad.clone(), SketchSpec(16, seed=1), 0))
    assert not torch.equal(first, sketch_layer(grad, SketchSpec(16, seed=2), 0))
    assert not torch.equal(first, sketch_layer(grad, SketchSpec(16, seed=1), 1))


def test_known_sketch_does_not_change_between_versions() -> None:
    # stored signatures would stop comparing if these numbers moved
    sketch = sketch_layer(torch.arange(10.0), SketchSpec(4, seed=0), 0)
    assert sketch.tolist() == [1.0, -10.0, -7.0, -13.0]


def test_layers_have_unit_norm_and_zero_stays_zero() -> None:
    grads = [torch.full((3, 3), 2.0), torch.zeros(50), torch.full((50,), 1e-30)]
    signature = SignatureAccumulator(SketchSpec(16)).add(grads)
    assert signature.shape == (3, 16)
    assert signature.dtype == torch.float32
    assert signature.norm(dim=1).tolist() == pytest.approx([1.0, 0.0, 1.0])


def test_half_precision_gradients_are_accepted() -> None:
    signature = SignatureAccumulator(SketchSpec(8)).add([torch.ones(100, dtype=torch.bfloat16)])
    assert signature.dtype == torch.float32
    assert float(signature.norm()) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_names_its_layer(bad: float) -> None:
    grads = [torch.ones(40), torch.ones(40)]
    grads[1][7] = bad
    with pytest.raises(ValueError, match="gradient of layer 1 is not finite"):
        SignatureAccumulator(SketchSpec(8)).add(grads)


def test_the_average_is_taken_before_normalising() -> None:
    accumulator = SignatureAccumulator(SketchSpec(2))
    own = accumulator.add([torch.tensor([9.0, 0.0])])
    accumulator.add([torch.tensor([0.0, 3.0])])
    assert own.tolist() == [[1.0, 0.0]]
    assert accumulator.batches.tolist() == [[[1.0, 0.0]], [[0.0, 1.0]]]
    # mean (4.5, 1.5), norm sqrt(22.5): a large gradient weighs more
    assert accumulator.signature()[0].tolist() == pytest.approx([0.9486833, 0.3162278])


def test_a_mean_of_batches_is_the_signature_of_their_mean_gradient() -> None:
    grads = torch.randn(5, 3, 700, generator=torch.Generator().manual_seed(2))
    spec = SketchSpec(32)
    accumulator = SignatureAccumulator(spec)
    for batch in grads:
        accumulator.add(list(batch))
    assert accumulator.batches.shape == (5, 3, 32)
    whole = SignatureAccumulator(spec).add(list(grads.mean(dim=0)))
    torch.testing.assert_close(accumulator.signature(), whole, atol=1e-5, rtol=0)


def test_misuse_is_refused() -> None:
    accumulator = SignatureAccumulator(SketchSpec(4))
    with pytest.raises(ValueError, match=r"^signature: no mini-batch was added$"):
        accumulator.signature()
    with pytest.raises(ValueError, match=r"^signature: no mini-batch was added$"):
        _ = accumulator.batches
    accumulator.add([torch.ones(3)])
    with pytest.raises(ValueError, match="2 layers, earlier batches had 1"):
        accumulator.add([torch.ones(3), torch.ones(3)])
    with pytest.raises(ValueError, match=r"^signature: no layer gradients$"):
        SignatureAccumulator(SketchSpec(4)).add([])
    with pytest.raises(ValueError, match="sketch width: expected 1 or more, got 0"):
        SketchSpec(0)
    with pytest.raises(ValueError, match="sketch seed: expected 0 or more, got -1"):
        SketchSpec(4, seed=-1)
