"""What a mask is made of: a formula, a row of valid keys, and whatever else it hides."""

import pytest
import torch
import torch.nn.functional as F

from afbs_compile.kernels.masks.causal import Causal, CausalEnd
from afbs_compile.kernels.masks.full import Full
from afbs_compile.kernels.masks.window import Window
from afbs_compile.passes.effects import value_of

N = 24
sdpa = F.scaled_dot_product_attention


def lower(n=N):
    return torch.ones(n, n, dtype=torch.bool).tril()


def window(n=N, width=7):
    rows = torch.arange(n)
    return rows[:, None] - rows < width


def padded_left():
    return torch.arange(N) >= torch.tensor([[5], [0]])


MASKS = {
    "keys": (lambda keys: keys[:, None, None], Full(), True, False),
    "keys of numbers": (lambda keys: keys.long()[:, None, None].bool(), Full(), True, False),
    "keys, expanded": (lambda keys: keys[:, None, None].expand(2, 1, N, N), Full(), True, False),
    "causal and keys": (lambda keys: lower() & keys[:, None, None], Causal(), True, False),
    "keys and causal": (lambda keys: keys[:, None, None].logical_and(lower()), Causal(), True, False),
    "three parts": (lambda keys: (lower() & window())[None, None] & keys[:, None, None], Window(7), True, False),
    "the same keys twice": (
        lambda keys: (lower() & (row := keys[:, None, None])) & row.expand(2, 1, N, N), Causal(), True, False,
    ),
    "copied": (lambda keys: (lower() & keys[:, None, None]).contiguous().clone(), Causal(), True, False),
    "two rows of keys": (
        lambda keys: keys[:, None, None] & (keys.flip(1)[:, None, None]) & lower(), Causal(), None, True,
    ),
    "rows": (lambda keys: lower() & keys[:, None, :, None], Causal(), False, True),
    "keys of each head": (lambda keys: lower() & keys.repeat(1, 4).view(2, 4, 1, N), Causal(), False, True),
    "or": (lambda keys: lower() | keys[:, None, None], Full(), False, True),
    "not": (lambda keys: ~(lower() & keys[:, None, None]), Full(), False, True),
    "a row that nothing knows": (lambda keys: lower() & (keys[:, None, None] | lower().T), Causal(), False, True),
    "added": (
        lambda keys: torch.where(lower() & keys[:, None, None], 0.0, -torch.inf).to(torch.float32), Full(), False, True,
    ),
    "written in after": (lambda keys: (lower() & keys[:, None, None]).logical_not_(), Full(), False, True),
}  # fmt: skip


@pytest.mark.parametrize(("make", "mask", "valid", "dense"), MASKS.values(), ids=MASKS.keys())
def test_parts(same, qkv, make, mask, valid, dense):
    """Where two rows of keys are ANDed, either may be taken, for the dense mask says it all."""
    site = same(lambda q, k, v, keys: sdpa(q, k, v, attn_mask=make(keys)), *qkv, padded_left()).site
    assert (site.mask, site.attn_mask is not None) == (mask, dense)
    assert valid is None or (site.valid is not None) == valid


def test_nobody_reads_a_mask_that_was_taken_apart(same, qkv):
    found = same(lambda q, k, v, keys: sdpa(q, k, v, attn_mask=lower() & keys[:, None, None]), *qkv, padded_left())
    after = found.rewrites[0].after
    assert "tril" not in after
    assert "and_: " not in after
    assert "valid = " in after


def test_keys_written_after_the_mask_was_made_are_not_read(same, qkv):
    """The mask holds what they were."""

    def fn(q, k, v, keys):
        row = keys[:, None, None].clone()
        mask = lower() & row
        row.fill_(True)
        return sdpa(q, k, v, attn_mask=mask)

    site = same(fn, *qkv, padded_left()).site
    assert (site.mask, site.valid, site.attn_mask is not None) == (Full(), None, True)


def test_keys_written_after_the_call_were_read_before(same, qkv):
    def fn(q, k, v, keys):
        row = keys[:, None, None].clone()
        out = sdpa(q, k, v, attn_mask=lower() & row)
        row.fill_(False)
        return out

    assert same(fn, *qkv, padded_left()).site.valid is not None


def test_keys_from_another_device_are_read_on_the_device_of_the_call(look):
    site = look(
        lambda q, keys: sdpa(q, q, q, attn_mask=keys.to("meta")),
        torch.randn(2, 4, N, 16, device="meta"),
        padded_left()[:, None, None],
    ).site
    assert value_of(site.valid).device.type == "meta"


def test_layers_that_share_a_mask_share_its_parts(same, qkv):
    def fn(q, k, v, keys):
        mask = lower() & keys[:, None, None]
        return sdpa(sdpa(q, k, v, attn_mask=mask), k, v, attn_mask=mask)

    first, second = same(fn, *qkv, padded_left()).sites[0]
    assert first.valid is second.valid is not None


def test_zeros_that_are_added_hide_nothing(same, qkv):
    site = same(lambda q, k, v: sdpa(q, k, v, attn_mask=torch.zeros(2, 1, N, N)), *qkv).site
    assert (site.mask, site.valid, site.attn_mask) == (Full(), None, None)


def test_one_graph_serves_all_lengths(compile_with):
    def fn(q, keys):
        rows = torch.arange(q.shape[2])
        return sdpa(q, q, q, attn_mask=(rows[:, None] >= rows) & keys[:, None, None])

    found = compile_with(fn, dynamic=True, change=True)
    with torch.no_grad():
        for length in (24, 40, 33):
            q, keys = torch.randn(2, 4, length, 16), torch.arange(length) >= torch.tensor([[5], [0]])
            torch.testing.assert_close(found.call(q, keys), fn(q, keys))
    assert len(found.graphs) == 1
    assert (found.site.mask, found.site.valid is not None) == (Causal(), True)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class TestTransformers:
    """Masks as models of transformers build them."""

    IDS = torch.randint(1, 64, (2, N), generator=torch.Generator().manual_seed(0))

    @pytest.fixture(params=["llama", "mistral"])
    def model(self, request):
        transformers = pytest.importorskip("transformers")
        if request.param == "llama":
            return transformers.LlamaModel(transformers.LlamaConfig(**SMALL)).eval()
        return transformers.MistralModel(transformers.MistralConfig(sliding_window=8, **SMALL)).eval()

    def parts(self, same, model, ids=None, **kwargs):
        """What every layer of a model makes of its mask."""
        ids = self.IDS if ids is None else ids
        found = same(lambda ids, **named: model(ids, use_cache=False, **named)[0], ids, kwargs=kwargs)
        assert found.refusals == [[]]
        (parts,) = {(site.mask, site.valid is not None, site.attn_mask is not None) for site in found.sites[0]}
        assert len(found.sites[0]) == 2
        return parts

    def formula(self, model):
        return Window(8) if model.config.model_type == "mistral" else Causal()

    def test_no_mask(self, same, model):
        assert self.parts(same, model) == (self.formula(model), False, False)

    def test_all_ones(self, same, model):
        mask = torch.ones_like(self.IDS)
        assert self.parts(same, model, attention_mask=mask) == (self.formula(model), True, False)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded(self, same, model, side):
        mask = padded_left().long() if side == "left" else padded_left().flip(1).long()
        assert self.parts(same, model, attention_mask=mask) == (self.formula(model), True, False)

    def test_packed(self, same, model):
        """The positions of the user decide what attends what: no formula knows that."""
        positions = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)
        _, valid, dense = self.parts(same, model, position_ids=positions)
        assert (valid, dense) == (False, True)

    @pytest.mark.parametrize("masked", [False, True])
    def test_a_chunk_behind_a_dynamic_cache(self, same, model, masked):
        transformers = pytest.importorskip("transformers")

        def behind(ids, **named):
            cache = transformers.DynamicCache(config=model.config)
            model(first, past_key_values=cache, **{name: value[:, :N] for name, value in named.items()})
            return chunk(ids, cache, named)

        def chunk(ids, cache, named):
            return model(ids, past_key_values=cache, **named)[0]

        first, second = self.IDS, self.IDS.flip(1)[:, :18]
        named = {"attention_mask": torch.cat([padded_left(), torch.ones(2, 18)], 1).long()} if masked else {}
        found = same(behind, second, kwargs=named)
        sites = [site for sites in found.sites for site in sites if site.q_len == 18]
        expected = Window(8) if model.config.model_type == "mistral" else CausalEnd()
        assert {(site.mask, site.valid is not None, site.attn_mask) for site in sites} == {(expected, masked, None)}
        assert len(sites) == 2
