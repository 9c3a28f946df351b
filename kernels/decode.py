"""Kernels of one decoding step beside the matrix products: LayerNorm, and attention over a cache of keys and values.

One row at a time: what costs is the number of launches, so that each kernel does all between two products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lowbit.kernels.launch import require_device

_KEYS_AT_ONCE = 64


@triton.jit
def norm_kernel(x, weight, bias, y, d, pitch, eps, WRITE_BACK: tl.constexpr, BLOCK: tl.constexpr):
    """y 16-bit [M, pitch] = LayerNorm(x fp32 [M, d]), zeros from d on; WRITE_BACK: x becomes it too. Program = row."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * d + at, mask=at < d, other=0.0)
    mean = tl.sum(value, axis=0) / d
    centred = tl.where(at < d, value - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / d + eps)
    gain = tl.load(weight + at, mask=at < d, other=0.0)
    shift = tl.load(bias + at, mask=at < d, other=0.0)
    value = centred * scale * gain + shift  # 0 from d on
    if WRITE_BACK:
        tl.store(x + row * d + at, value, mask=at < d)
    tl.store(y + row * pitch + at, value.to(y.dtype.element_ty), mask=at < pitch)


def layer_norm(x: torch.Tensor, norm: torch.nn.LayerNorm, y: torch.Tensor, write_back: bool) -> None:
    """y 16-bit [M, >= D] = norm(x fp32 [M, D]), zero from D on; with ``write_back`` x becomes the result too."""
    require_device(x.device)
    d, pitch = x.shape[1], y.shape[1]
    norm_kernel[(len(x),)](
        x, norm.weight, norm.bias, y, d, pitch, norm.eps, WRITE_BACK=write_back,
        BLOCK=triton.next_power_of_2(pitch), num_warps=4,
    )  # fmt: skip


@triton.jit
def attention_kernel(
    q, k, v, angles, cache, position, y, heads, head_dim, max_len, table_len, scale,
    ROTARY: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Attention of one new token, whose key and value enter the cache. Program = head.

    q, k, v: 16-bit [heads * head_dim] each; angles: fp32 [2, table_len, head_dim / 2], cosines and sines, or unused;
    cache: 16-bit [2, heads, max_len, head_dim], keys and values of this layer; position: int64 [1], tokens before this
    one; y: 16-bit [heads * head_dim].
    """
    head = tl.program_id(0)
    at = tl.arange(0, BLOCK_D)
    real = at < head_dim
    now = tl.load(position)
    query, key = _row(q, head, at, head_dim), _row(k, head, at, head_dim)
    if ROTARY:
        half = head_dim // 2
        other = tl.where(at < half, at + half, at - half)
        sign = tl.where(at < half, -1.0, 1.0)
        angle = now * half + at % half
        cos = tl.load(angles + angle, mask=real, other=0.0)
        sin = tl.load(angles + table_len * half + angle, mask=real, other=0.0) * sign
        query = query * cos + _row(q, head, other, head_dim) * sin
        key = key * cos + _row(k, head, other, head_dim) * sin
    keys = cache + head * max_len * head_dim
    values = keys + heads * max_len * head_dim
    kind = cache.dtype.element_ty
    key16 = key.to(kind)
    value = tl.load(v + head * head_dim + at, mask=real, other=0.0)
    tl.store(keys + now * head_dim + at, key16, mask=real)
    tl.store(values + now * head_dim + at, value, mask=real)

    # Softmax kept running, from the new token backwards in time: it always sees itself.
    query = query.to(kind).to(tl.float32) * scale
    most = tl.sum(query * key16.to(tl.float32), axis=0)
    total = tl.full((), 1.0, tl.float32)
    out = value.to(tl.float32)
    for first in range(0, now, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        mask = (s < now)[:, None] & real[None, :]
        where = s[:, None] * head_dim + at[None, :]
        score = tl.sum(tl.load(keys + where, mask=mask, other=0.0).to(tl.float32) * query[None, :], axis=1)
        score = tl.where(s < now, score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=0))
        shrink = tl.exp(most - higher)
        weight = tl.exp(score - higher)
        loaded = tl.load(values + where, mask=mask, other=0.0).to(tl.float32)
        out = out * shrink + tl.sum(loaded * weight[:, None], axis=0)
        total = total * shrink + tl.sum(weight, axis=0)
        most = higher
    tl.store(y + head * head_dim + at, (out / total).to(y.dtype.element_ty), mask=real)


@triton.jit
def _row(x, head, at, head_dim):
    """Elements ``at`` of a head, fp32; 0 outside of it."""
    inside = (at >= 0) & (at < head_dim)
    return tl.load(x + head * head_dim + at, mask=inside, other=0.0).to(tl.float32)


def attend_one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    angles: torch.Tensor | None,
    cache: torch.Tensor,
    position: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """One token's attention over ``cache``, into which its key and value are written; see :func:`attention_kernel`.

    Args:
        q, k, v, y: 16-bit, heads * head_dim adjacent elements.
        angles: fp32 [2, max positions, head_dim / 2] or None.
        cache: [2, heads, max_len, head_dim], contiguous.
        position: int64 [1] on the device: a graph's replays read it anew.
    """
    require_device(q.device)
    _, heads, max_len, head_dim = cache.shape
    attention_kernel[(heads,)](
        q, k, v, cache if angles is None else angles, cache, position, y, heads, head_dim, max_len,
        0 if angles is None else angles.shape[1], head_dim**-0.5, ROTARY=angles is not None,
        BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_S=_KEYS_AT_ONCE, num_warps=4,
    )  # fmt: skip
