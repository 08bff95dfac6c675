"""The table of attention backends: every GPU has an order, and each order ends in what takes any call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from qruntime.ops import attention_backend

CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_has_an_order_that_ends_in_what_takes_any_call(capability: tuple[int, int]) -> None:
    order = attention_backend.order(capability)
    assert order[-1] == SDPBackend.MATH
    assert (order[0] == SDPBackend.CUDNN_ATTENTION) == (capability >= (9, 0))
    query = torch.randn(1, 2, 5, 24, dtype=torch.float64)
    with sdpa_kernel(order, set_priority=True):
        found = F.scaled_dot_product_attention(query, query, query)
    wanted = (query @ query.mT / 24**0.5).softmax(-1) @ query
    assert torch.allclose(found, wanted)
