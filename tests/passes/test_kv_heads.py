"""Key and value heads that a graph repeats: unrepeated where each one is proven to stand next to itself."""

import pytest
import torch
import torch.nn.functional as F

sdpa = F.scaled_dot_product_attention
aten = torch.ops.aten


def expand_reshape(x, n):
    b, h, length, d = x.shape
    return x[:, :, None, :, :].expand(b, h, n, length, d).reshape(b, h * n, length, d)


REPEATS = {
    "getitem, expand, reshape": expand_reshape,
    "ellipsis": lambda x, n: x[..., None, :, :].expand(-1, -1, n, -1, -1).reshape(2, 2 * n, 24, 16),
    "short getitem": lambda x, n: x[:, :, None].expand(-1, -1, n, -1, -1).flatten(1, 2),
    "unsqueeze": lambda x, n: x.unsqueeze(2).expand(-1, -1, n, -1, -1).reshape(2, -1, 24, 16),
    "unsqueeze from the end": lambda x, n: x.unsqueeze(-3).expand(-1, -1, n, -1, -1).contiguous().view(2, -1, 24, 16),
    "view": lambda x, n: x.view(2, 2, 1, 24, 16).broadcast_to(2, 2, n, 24, 16).reshape(2, 2 * n, 24, 16),
    "then contiguous": lambda x, n: expand_reshape(x, n).contiguous(),
    "then to the same dtype": lambda x, n: expand_reshape(x, n).to(x.dtype),
    "clone between": lambda x, n: x[:, :, None].expand(-1, -1, n, -1, -1).clone().view(2, 2 * n, 24, 16),
    "repeat_interleave": lambda x, n: x.repeat_interleave(n, dim=1),
    "torch.repeat_interleave": lambda x, n: torch.repeat_interleave(x, repeats=n, dim=-3),
    "aten": lambda x, n: aten.reshape.default(
        aten.expand.default(aten.unsqueeze.default(x, 2), [2, 2, n, 24, 16]), [2, 2 * n, 24, 16]
    ),
    "aten.repeat_interleave": lambda x, n: aten.repeat_interleave.self_int(x, n, 1),
}


def kv():
    return torch.randn(2, 4, 24, 16), torch.randn(2, 2, 24, 16), torch.randn(2, 2, 24, 16)


@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS.keys())
def test_repeated_heads_are_unrepeated(look, repeat):
    site = look(lambda q, k, v: sdpa(q, repeat(k, 2), repeat(v, 2)), *kv()).site
    assert (site.heads, site.kv_heads) == (4, 2)
    assert [site.k.target, site.v.target] == ["L_k_", "L_v_"]


@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS.keys())
def test_the_unrepeated_heads_give_the_same_attention(compile_with, repeat):
    def fn(q, k, v):
        return sdpa(q, repeat(k, 2), repeat(v, 2), is_causal=True)

    inputs = kv()
    found = compile_with(fn, change=True)
    torch.testing.assert_close(found.call(*inputs), fn(*inputs))
    assert found.site.kv_heads == 2


def test_dynamic_shapes(look):
    site = look(lambda q, k, v: sdpa(q, expand_reshape(k, 2), expand_reshape(v, 2)), *kv(), dynamic=None).site
    assert site.kv_heads == 2


def test_one_head_expanded_over_all(look):
    q, k, v = kv()
    site = look(lambda q, k, v: sdpa(q, k.expand(2, 4, 24, 16), v.expand(-1, 4, -1, -1)), q, k[:, :1], v[:, :1]).site
    assert (site.kv_heads, site.k.target) == (1, "L_k_")


def test_repeats_on_top_of_shared_heads(look, compile_with):
    def fn(q, k, v):
        return sdpa(q, expand_reshape(k, 2), expand_reshape(v, 2), enable_gqa=True)

    inputs = torch.randn(2, 8, 24, 16), *kv()[1:]
    found = compile_with(fn, change=True)
    torch.testing.assert_close(found.call(*inputs), fn(*inputs))
    assert (found.site.heads, found.site.kv_heads) == (8, 2)


def tiled(x, n):
    return x[:, None].expand(-1, n, -1, -1, -1).reshape(2, 2 * n, 24, 16)


def through_a_transpose(x, n):
    return x.transpose(2, 3)[:, :, None].expand(-1, -1, n, -1, -1).reshape(2, 2 * n, 24, 16)


def expand_into_the_length(x, n):
    return x[:, :, :, None].expand(-1, -1, -1, n, -1).reshape(2, 2 * n, 24, 16)


KEPT = {
    "torch.repeat": lambda x, n: x.repeat(1, n, 1, 1),
    "tiled by expand": tiled,
    "cat": lambda x, n: torch.cat([x] * n, dim=1),
    "right shape, length repeated": expand_into_the_length,
    "right shape, transposed first": through_a_transpose,
    "interleaved lengths": lambda x, n: x.repeat_interleave(n, dim=2).view(2, 2 * n, 24, 16),
    "repeated numbers differ": lambda x, n: x.repeat_interleave(torch.tensor([1, 3]), dim=1, output_size=4),
    "other values": lambda x, n: (x[:, :, None].expand(-1, -1, n, -1, -1) * torch.ones(n, 1, 1)).reshape(
        2, 2 * n, 24, 16
    ),
    "batch and heads mixed": lambda x, n: x.reshape(1, 4, 1, 24, 16).expand(-1, -1, n, -1, -1).reshape(2, 4, 24, 16),
    "through bfloat16": lambda x, n: expand_reshape(x.to(torch.bfloat16), n).to(torch.float32),
}


@pytest.mark.parametrize("repeat", KEPT.values(), ids=KEPT.keys())
def test_another_order_is_kept(compile_with, repeat):
    def fn(q, k, v):
        return sdpa(q, repeat(k, 2), repeat(v, 2))

    inputs = kv()
    found = compile_with(fn, change=True)
    torch.testing.assert_close(found.call(*inputs), fn(*inputs))
    assert found.site.k.target not in ("L_k_", "L_v_")


def test_key_and_value_must_be_repeated_alike(compile_with):
    def fn(q, k, v):
        return sdpa(q, expand_reshape(k, 2), v)

    q, k, _ = kv()
    found = compile_with(fn, change=True)
    torch.testing.assert_close(found.call(q, k, q), fn(q, k, q))
    assert found.site.kv_heads == 4


def test_key_and_value_must_come_from_the_same_number_of_heads(compile_with):
    def fn(q, k, v):
        return sdpa(q, expand_reshape(k, 2), expand_reshape(v[:, :1], 4))

    inputs = kv()
    found = compile_with(fn, change=True)
    torch.testing.assert_close(found.call(*inputs), fn(*inputs))
    assert found.site.kv_heads == 4


@pytest.mark.parametrize(("dim", "shape"), [(2, (2, 2, 48, 16)), (0, (4, 2, 24, 16))])
def test_repeats_of_another_dimension_are_kept(look, dim, shape):
    def fn(q, k):
        wide = k.repeat_interleave(2, dim)
        return sdpa(q, wide, wide)

    site = look(fn, torch.randn(shape), torch.randn(2, 2, 24, 16)).site
    assert (site.kv_heads, site.k.op) == (2, "call_method")


def test_a_source_that_is_overwritten_afterwards_is_not_used(compile_with):
    def fn(q, k, v):
        k, v = k * 1, v * 1
        wide_k, wide_v = expand_reshape(k, 2), expand_reshape(v, 2)
        k[:, 0].mul_(2)
        return sdpa(q, wide_k, wide_v)

    inputs = kv()
    found = compile_with(fn, change=True)
    torch.testing.assert_close(found.call(*inputs), fn(*inputs))
    assert found.site.kv_heads == 4


def test_repeated_heads_that_are_overwritten_are_kept(compile_with):
    def fn(q, k, v):
        wide_k, wide_v = expand_reshape(k, 2), expand_reshape(v, 2)
        wide_k[:, 0].mul_(2)
        return sdpa(q, wide_k, wide_v)

    inputs = kv()
    found = compile_with(fn, change=True)
    torch.testing.assert_close(found.call(*inputs), fn(*inputs))
    assert found.site.kv_heads == 4


def test_a_source_that_is_written_before_is_used(look):
    def fn(q, k, v):
        k[:, :, 3:5] = 1
        return sdpa(q, expand_reshape(k, 2), expand_reshape(v, 2))

    assert look(fn, *kv()).site.kv_heads == 2
