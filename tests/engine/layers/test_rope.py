"""RMSNorm and rotation of queries and keys: equal to their plain reference, and right."""

import pytest
import torch
import torch.nn.functional as F

from fluxcli.engine.layers.norm import NORM_EPS
from fluxcli.engine.layers.rope import QKNorm, Rope, qk_norm_rope_, rope
from fluxcli.engine.layers.rope import _rotate as rotate
from tests.engine.exact import DTYPES, TOLERANCE, error, exact, on_gpu

DOUBLE, SINGLE, SMALL = ((512, 4096), 24, (16, 56, 56)), ((608,), 24, (16, 56, 56)), ((16, 24), 3, (8, 12, 12))


def given(tokens: tuple[int, ...], heads: int, axes: tuple[int, ...], apart: bool, device: str, dtype: torch.dtype):
    """q, k and v of every token, where `apart` between what belongs to others, with all that turns them."""
    head_dim = sum(axes)
    ids = torch.randint(0, 64, (sum(tokens), 3), device=device)
    width = 3 * heads * head_dim
    qkv = torch.randn(2, sum(tokens), width + 64 * apart, device=device).to(dtype)[..., :width]
    norms = [QKNorm(head_dim).to(device, dtype) for _ in tokens]
    for norm in norms:
        for weight in norm.parameters():
            weight.data.uniform_(0.5, 1.5)
    return qkv, list(tokens), norms, rope(ids, axes, 10_000)


def check(given, dtype: torch.dtype, fused) -> None:
    theirs = qk_norm_rope_(*map(exact, given))
    v = given[0].unflatten(-1, theirs.shape[2:])[:, :, 2].clone()
    ours = fused(*given)
    assert ours.shape == theirs.shape and ours.data_ptr() == given[0].data_ptr(), "in place"
    assert error(ours, theirs) < TOLERANCE[dtype]
    assert torch.equal(ours[:, :, 2], v)


@on_gpu
@pytest.mark.parametrize("apart", [False, True], ids=["adjacent", "apart"])
@pytest.mark.parametrize("shape", [DOUBLE, SINGLE, SMALL], ids=["double", "single", "small"])
@DTYPES
def test_equals_its_reference(dtype: torch.dtype, shape, apart: bool) -> None:
    torch.manual_seed(0)
    check(given(*shape, apart, "cuda", dtype), dtype, qk_norm_rope_)


def test_each_stream_has_norms_of_its_own_and_positions_of_the_whole() -> None:
    torch.manual_seed(0)
    qkv, lengths, norms, pe = given((3, 5), 2, (8, 12, 12), True, "cpu", torch.float32)
    heads = qkv.clone().unflatten(-1, (3, 2, 32))
    made = qk_norm_rope_(qkv, lengths, norms, pe)
    for start, length, norm in ((0, 3, norms[0]), (3, 5, norms[1])):
        part = slice(start, start + length)
        table = Rope(pe.cos[part], pe.sin[part])
        for index, weight in ((0, norm.query), (1, norm.key)):
            expected = rotate(F.rms_norm(heads[:, part, index], (32,), weight, NORM_EPS), table)
            assert torch.equal(made[:, part, index], expected)


def test_rotation_keeps_lengths_and_depends_on_relative_positions_only() -> None:
    ids = torch.arange(32)[:, None].expand(-1, 3)
    x = torch.randn(1, 1, 1, 32).expand(1, 32, 1, 32)
    turned = rotate(x, rope(ids, (8, 12, 12), 10_000))
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    similarity = (turned[0, :, 0] @ turned[0, :, 0].T).diagonal(5)
    assert torch.allclose(similarity, similarity[:1].expand_as(similarity), rtol=1e-4)
