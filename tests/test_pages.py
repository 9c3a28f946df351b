"""Memory for weights: aligned, apart from one another, released, copied and pickled without its neighbours."""

from __future__ import annotations

import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lowbit import pages, quantize
from lowbit.ops import packed


@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 5), (7, 100, 16), (pages.HUGE,), (pages.HUGE + 1,), (3, 1 << 20)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_shape_dtype_and_alignment(shape, dtype):
    t = pages.empty(*shape, dtype=dtype)
    assert t.shape == shape and t.dtype == dtype and t.is_contiguous()
    assert t.data_ptr() % pages.ALIGN == 0
    if hasattr(pages.mmap, "MADV_HUGEPAGE") and t.nbytes >= pages.HUGE:
        assert t.data_ptr() % pages.HUGE == 0


def test_tensors_do_not_overlap():
    def fill(i: int) -> torch.Tensor:
        return pages.empty(1000 + 977 * i, dtype=torch.uint8).fill_(i)

    with ThreadPoolExecutor(4) as pool:
        tensors = list(pool.map(fill, range(200)))  # 20 MB: several chunks
    assert all(bool((t == i).all()) for i, t in enumerate(tensors))


def test_memory_goes_with_its_last_view():
    t = pages.empty(pages.HUGE, dtype=torch.uint8)
    memory = weakref.ref(t.untyped_storage())
    view = t[5:]
    del t
    view.zero_()
    del view
    gc.collect()
    assert memory() is None


def test_a_pickled_weight_brings_no_neighbours():
    weight = packed(quantize(torch.randn(40, 100), 4))
    data = pickle.dumps(weight)
    assert len(data) < 4 * weight.nbytes + 4096
    twin = pickle.loads(data)
    assert torch.equal(twin.tiles, weight.tiles) and torch.equal(twin.scales, weight.scales)
