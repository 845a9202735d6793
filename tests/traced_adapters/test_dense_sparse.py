"""Sparse matrices, said densely for a while."""

from __future__ import annotations

import pytest
import torch

from lora_fx.traced_adapters.dense_sparse import sparse_said_densely

# torch says that it does not check indices.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


def test_what_is_made_and_done_is_the_same_in_dense_numbers() -> None:
    indices, values = torch.tensor([[0, 1, 1], [2, 0, 0]]), torch.tensor([1.0, 2.0, 3.0])
    sparse = torch.sparse_coo_tensor(indices, values, (2, 3)).coalesce()
    x = torch.randn(3, 4)
    with sparse_said_densely():
        dense = torch.sparse_coo_tensor(indices, values, (2, 3)).coalesce()
        assert dense.layout is torch.strided
        assert dense._nnz() > 0
        assert sparse._nnz() == 2
        assert torch.allclose(torch.sparse.mm(dense, x), sparse.to_dense() @ x)
    assert torch.equal(dense, sparse.to_dense())
    assert torch.sparse_coo_tensor(indices, values, (2, 3)).layout is torch.sparse_coo
