"""LSRO beyond the parity numbers: reduced precision, untouched logits, all-generated batches."""

import math

import pytest
import torch

from reid import losses


def test_lsro_of_real_images_is_cross_entropy():
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    real = torch.zeros(6, dtype=torch.long)
    expected = losses.cross_entropy(logits, labels, real)
    assert torch.allclose(losses.lsro(logits, labels, real), expected)


def test_lsro_of_generated_images_is_least_at_the_uniform_distribution():
    generated, marker = torch.ones(4, dtype=torch.long), torch.full((4,), -1)
    even = losses.lsro(torch.zeros(4, 10), marker, generated)
    assert even.item() == pytest.approx(math.log(10), abs=1e-6)
    assert losses.lsro(torch.randn(4, 10), marker, generated) > even


def test_lsro_leaves_logits_alone_and_computes_bf16_logits_in_fp32():
    logits = torch.randn(4, 10).bfloat16()
    before = logits.clone()
    labels, flags = torch.tensor([1, -1, 2, -1]), torch.tensor([0, 1, 0, 1])
    loss = losses.lsro(logits, labels, flags)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, losses.lsro(logits.float(), labels, flags))
    assert torch.equal(logits, before)
