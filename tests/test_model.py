"""lowbit/model.py: masks, caches, positions, dropout, and agreement with torch's own Transformer layer."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from lowbit.config import ModelConfig
from lowbit.model import Dropout, TransformerLM, rotary_angles, rotate, sinusoidal_positions, variational_dropout

EPS = 2.0**-23
# Two layers of sums of at most 64 products of O(1) numbers, renormalised by LayerNorm: about a hundred roundings of
# values up to 4 deep. A wrong mask, position or cache changes values by 0.01 and more.
TOLERANCE = 4 * 100 * EPS

VARIANTS = list(
    itertools.product(("pre", "post"), ("relu", "gelu"), ("sinusoidal", "learned", "rotary"), (True, False))
)


def build(norm="pre", activation="gelu", position="rotary", tied=True, **more) -> TransformerLM:
    fields = {"vocab_size": 23, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ffn": 64, "max_len": 24} | more
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(norm=norm, activation=activation, position=position, tied=tied, **fields))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.2)  # biases and norms that take part
    return model.eval()


def tokens(batch=2, length=9) -> torch.Tensor:
    return torch.randint(23, (batch, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_mask_path_is_the_causal_path(variant):
    model, x = build(*variant), tokens()
    causal, kv = model.hidden(x)
    mask = torch.ones(2, 9, 9, dtype=torch.bool).tril()
    masked, kv2 = model.hidden(x, torch.arange(9).expand(2, 9), mask)
    assert (causal - masked).abs().max() <= TOLERANCE
    assert all((a - b).abs().max() <= TOLERANCE for one, two in zip(kv, kv2) for a, b in zip(one, two))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [(4,), (1, 2, 8)])
@torch.no_grad()
def test_cache_path_is_the_full_path(variant, cuts):
    model, x = build(*variant), tokens()
    full, kv_full = model.hidden(x)
    cache, parts = None, []
    for start, stop in itertools.pairwise((0, *cuts, 9)):
        mask = torch.ones(stop - start, stop, dtype=torch.bool).tril(start).expand(2, -1, -1)
        part, new = model.hidden(x[:, start:stop], torch.arange(start, stop).expand(2, -1), mask, cache)
        assert new[0][0].shape[2] == stop - start, "only the new tokens' keys come back"
        cache = new if cache is None else [tuple(torch.cat(p, 2) for p in zip(c, n)) for c, n in zip(cache, new)]
        parts.append(part)
    assert (torch.cat(parts, 1) - full).abs().max() <= TOLERANCE
    assert all((a - b).abs().max() <= TOLERANCE for one, two in zip(cache, kv_full) for a, b in zip(one, two))


@torch.no_grad()
def test_a_trie_is_its_paths():
    """Two branches after a shared prefix, in one row of tokens, are two sequences."""
    model = build()
    shared, left, right = [3, 4, 5], [6, 7], [8, 9, 10]
    row = torch.tensor([shared + left + right])
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5]])
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    for path in ([0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7]):
        for depth, node in enumerate(path):
            mask[0, node, path[: depth + 1]] = True
    hidden, _ = model.hidden(row, positions, mask)
    first, _ = model.hidden(torch.tensor([shared + left]))
    second, _ = model.hidden(torch.tensor([shared + right]))
    assert (hidden[0, [0, 1, 2, 3, 4]] - first[0]).abs().max() <= TOLERANCE
    assert (hidden[0, [0, 1, 2, 5, 6, 7]] - second[0]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_future_tokens_do_not_matter():
    model, x = build(), tokens()
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 23
    before, after = model.hidden(x)[0], model.hidden(changed)[0]
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 0.01


@torch.no_grad()
def test_rotary_positions_are_relative():
    x = tokens()
    mask = torch.ones(2, 9, 9, dtype=torch.bool).tril()
    for position, same in (("rotary", True), ("sinusoidal", False), ("learned", False)):
        model = build(position=position)
        near = model.hidden(x, torch.arange(9).expand(2, -1), mask)[0]
        far = model.hidden(x, torch.arange(15, 24).expand(2, -1), mask)[0]
        wide = model.hidden(x, torch.arange(0, 18, 2).expand(2, -1), mask)[0]
        # The angle of position p is p * rate in fp32: an error of p eps radians, 24 times a rounding.
        assert ((near - far).abs().max().item() <= 24 * TOLERANCE) is same
        assert (near - wide).abs().max() > 24 * TOLERANCE


def test_rotation_keeps_lengths_and_depends_on_the_distance():
    gen = torch.Generator().manual_seed(3)
    q, k = torch.randn(1, 1, 1, 16, generator=gen), torch.randn(1, 1, 1, 16, generator=gen)
    cos, sin = rotary_angles(64, 16)

    def at(x, p):
        return rotate(x, cos[p][None, None, None], sin[p][None, None, None])

    assert at(q, 40).norm().item() == pytest.approx(q.norm().item(), rel=8 * EPS)
    products = [float((at(q, p + 7) * at(k, p)).sum()) for p in (0, 3, 31, 56)]
    assert products == pytest.approx([products[0]] * 4, abs=64 * 16 * EPS)
    assert abs(float((at(q, 8) * at(k, 0)).sum()) - products[0]) > 1e-3


def test_sinusoidal_positions_are_the_papers():
    table = sinusoidal_positions(50, 10)
    for p, i in itertools.product((0, 1, 49), range(5)):
        angle = p / 10_000 ** (2 * i / 10)
        assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=EPS)
        assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=EPS)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@torch.no_grad()
def test_layers_are_torchs_transformer_layers(norm, activation):
    model, x = build(norm, activation, "sinusoidal"), tokens()
    config = model.config
    expected = model.embed(x) * math.sqrt(config.d_model) + sinusoidal_positions(9, config.d_model)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    for block in model.layers:
        layer = nn.TransformerEncoderLayer(
            config.d_model, config.n_heads, config.d_ffn, 0.0, activation, config.norm_eps, True, norm == "pre"
        ).eval()
        a = block.attn
        layer.self_attn.in_proj_weight.copy_(torch.cat([m.weight for m in (a.q, a.k, a.v)]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([m.bias for m in (a.q, a.k, a.v)]))
        pairs = [
            (layer.self_attn.out_proj, a.o), (layer.linear1, block.mlp.fc1), (layer.linear2, block.mlp.fc2),
            (layer.norm1, block.norm1), (layer.norm2, block.norm2),
        ]  # fmt: skip
        for theirs, ours in pairs:
            theirs.load_state_dict(ours.state_dict())
        expected = layer(expected, src_mask=mask)
    if norm == "pre":
        expected = model.norm(expected)
    assert (model.hidden(x)[0] - expected).abs().max() <= 2 * TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_configuration(variant):
    model = build(*variant)
    config = model.config
    expected = {f"{m}.weight": shape for m, shape in config.matrix_shapes().items()} | config.vector_shapes()
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert sum(p.numel() for p in model.parameters()) == config.n_parameters()


@torch.no_grad()
def test_tied_output_is_the_embedding():
    tied, untied = build(tied=True), build(tied=False)
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(tied.logits(hidden), hidden @ tied.embed.weight.T)
    assert untied.output_weight is untied.head.weight
    assert torch.equal(untied.logits(hidden), hidden @ untied.head.weight.T)


def test_variational_dropout_shares_a_mask_over_positions_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(400, 5, 30)
    out = variational_dropout(x, 0.3, True)
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1.0) / (1 - 0.3))}
    # 12,000 draws of variance 0.3 / 0.7: five standard deviations of their mean.
    assert abs(out.mean().item() - 1) < 5 * (0.3 / 0.7 / 12_000) ** 0.5
    assert variational_dropout(x, 0.3, False) is x and variational_dropout(x, 0.0, True) is x


def test_word_dropout_drops_every_occurrence():
    model = build(position="rotary").train()
    model.dropout = Dropout(word=0.5)
    torch.manual_seed(1)
    x = torch.tensor([[3, 4, 3, 5], [4, 3, 6, 3]])
    embedded = model._embed(x, None)
    for word in x.unique():
        rows = embedded[x == word]
        assert torch.equal(rows, rows[:1].expand_as(rows))
    zero = [bool((embedded[x == word] == 0).all()) for word in x.unique()]
    assert any(zero) and not all(zero)


def test_evaluation_has_no_dropout():
    model = build()
    model.dropout = Dropout(0.5, 0.5, 0.5, 0.5, 0.5)
    assert torch.equal(model(tokens()), model(tokens()))


def test_scaled_dropout():
    assert Dropout(0.1, 0.2, 0.3, 0.4, 0.5).scaled(0.0) == Dropout()
    assert Dropout(word=0.2, output=0.4).scaled(0.5) == Dropout(word=0.1, output=0.2)
