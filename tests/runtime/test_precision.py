"""PyTorch's switches for precision and determinism."""

import pytest
import torch

from ddetr.runtime.precision import numerics


def test_the_switches_are_set_and_put_back() -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    for tf32 in True, False:
        with numerics(deterministic=True, tf32=tf32):
            assert (products.allow_tf32, convolutions.allow_tf32) == (tf32, tf32)
            with pytest.raises(RuntimeError, match="deterministic"):
                torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
        assert (products.allow_tf32, convolutions.allow_tf32) == before
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
