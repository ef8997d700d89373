"""The Triton kernels on a CPU, under Triton's interpreter, where Triton is installed."""

import importlib.util
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from fluxcli.engine.layers.norm import HALF_MAX, NORM_EPS
from tests.engine.layers import test_groupnorm as groupnorm
from tests.engine.layers import test_norm as norm
from tests.engine.layers import test_rope as rope
from tests.engine.layers import test_scaling as scaling


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_under_tritons_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when Triton is imported: hence a new process
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.layers.test_triton"], env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


def interpret() -> None:
    from fluxcli.engine.layers import groupnorm_triton, norm_triton, rope_triton, scaling_triton

    def interpreted(qkv, lengths, norms, pe):
        queries, keys = [each.query for each in norms], [each.key for each in norms]
        return rope_triton.qk_norm_rope_(qkv, lengths[0], queries, keys, *pe, NORM_EPS)

    torch.manual_seed(0)
    with torch.inference_mode():
        for dtype in (torch.float32, torch.float16):
            for pending in (True, False):
                fused = partial(norm_triton.add_and_modulate, eps=NORM_EPS, half_max=HALF_MAX)
                norm.check(norm.given(2, 5, 96, pending, "cpu", dtype), dtype, fused)
                if dtype == torch.float32:  # the interpreter's e4m3 is not what `near` could allow for in others
                    scaling.check_norm(norm.given(2, 5, 96, pending, "cpu", dtype), fused)
            for parts in scaling.PARTS if dtype == torch.float32 else []:
                scaling.check(scaling.given(parts, "cpu", dtype), scaling_triton.row_scaled)
            scaling.check_odd_numbers("cpu", dtype, scaling_triton.row_scaled)
            for tokens, heads, apart in (((3, 6), 3, False), ((4,), 8, True)):
                given = rope.given(tokens, heads, (8, 12, 12), apart, "cpu", dtype)
                rope.check(given, dtype, interpreted)
            given = groupnorm.images((2, 24, 7, 9), "cpu", dtype)
            groupnorm.check(given, 8, dtype, groupnorm_triton.group_norm_silu)
            groupnorm.check_sum(given, dtype, groupnorm_triton.add_biased)


if __name__ == "__main__":
    interpret()
