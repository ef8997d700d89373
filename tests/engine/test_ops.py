"""Each fused kernel equals its plain torch reference, on random data, at the dtype's tolerance."""

import pytest
import torch

from fluxcli.engine import ops

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


def inputs(
    streams: list[tuple[int, int]], batch: int, heads: int, axes: tuple[int, ...], device: str, dtype: torch.dtype
):
    """Projections of `streams`, each (tokens, columns beyond q, k and v)."""
    torch.manual_seed(0)
    head_dim = sum(axes)
    ids = torch.randint(0, 64, (sum(tokens for tokens, _ in streams), 3), device=device)
    projections = [
        torch.randn(batch, tokens, 3 * heads * head_dim + more, device=device, dtype=dtype) for tokens, more in streams
    ]
    norms = [[torch.rand(head_dim, device=device, dtype=dtype) + 0.5 for _ in streams] for _ in range(2)]
    return projections, *norms, *ops.rope(ids, axes, 10_000), heads


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("streams", "heads", "axes"),
    [
        ([(512, 0), (4096, 0)], 24, (16, 56, 56)),
        ([(608, 9216)], 24, (16, 56, 56)),
        ([(16, 0), (24, 0)], 3, (8, 12, 12)),
    ],
    ids=["dual", "single", "small"],
)
def test_the_qk_norm_rope_kernel_equals_its_reference(streams, heads, axes, dtype) -> None:
    given = inputs(streams, 2, heads, axes, "cuda", dtype)
    fused = ops.qk_norm_rope(*given)
    on_host = [[each.cpu() for each in group] if isinstance(group, list) else group for group in given]
    exact = ops.qk_norm_rope(*[x.cpu() if isinstance(x, torch.Tensor) else x for x in on_host])
    error = (fused.cpu().float() - exact.float()).norm() / exact.float().norm()
    assert error < {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert fused.is_contiguous() and fused.shape == exact.shape


def test_rotation_keeps_lengths_and_depends_on_relative_positions_only() -> None:
    ids = torch.arange(32)[:, None].expand(-1, 3)
    cos, sin = ops.rope(ids, (8, 12, 12), 10_000)
    x = torch.randn(1, 1, 1, 32).expand(1, 32, 1, 32)
    turned = ops._rotate(x, cos, sin)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    products = (turned[0, :, 0] @ turned[0, :, 0].T).diagonal(5)
    assert torch.allclose(products, products[:1].expand_as(products), rtol=1e-4)
