"""Native sparse attention of flash-linear-attention, timed beside ours on the same lists of blocks.

Needs torch and `pip install fla-core einops`; without them the row says what is missing.
"""

import os
import tempfile
from typing import Any
from unittest import mock

import numpy as np

_WARM_UP_MS, _BUDGET_MS = 20, 60


def time_fla(sizes: dict[str, int], length: int, selected: Any) -> dict[str, float]:
    """Milliseconds of `parallel_nsa`: attention to `selected` alone, then with its own choice.

    `fla_attention_*` is the selected branch with our lists `[1, T, K, n]`; -1 is skipped there
    too. `fla_*` is compression (means of whole blocks, four times fewer than ours), its choice of
    blocks and the selected branch; its window needs another package and is left out.
    Backward = both passes minus forward.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        # Importing jax-triton takes the compiler's cache folder from torch.
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
    ):
        return _time(sizes, length, selected)


def _time(sizes, length, selected):
    import torch
    from fla.ops.nsa import parallel_nsa

    torch.manual_seed(0)
    heads, kv_heads, dim = (sizes[name] for name in ("heads", "kv_heads", "dim"))
    q, k, v = (
        torch.randn((1, length, n, dim), device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    dout = torch.randn_like(q)
    gate = torch.ones((1, length, heads), device="cuda", dtype=torch.bfloat16)
    lists = torch.from_numpy(np.array(selected, np.int32)).cuda()
    options = {"block_size": sizes["block"], "block_counts": sizes["top_k"]}
    found: dict[str, float] = {}
    for name, more in (
        ("fla_attention", {"block_indices": lists}),
        ("fla", {"g_cmp": gate, "g_slc": gate}),
    ):

        def forward(more=more):
            return parallel_nsa(q, k, v, **options, **more)

        def both(forward=forward):
            return torch.autograd.grad(forward(), (q, k, v), dout)

        fwd = _median_ms(forward)
        found |= {f"{name}_fwd_ms": fwd, f"{name}_bwd_ms": _median_ms(both) - fwd}
    return found


def _median_ms(f) -> float:
    from triton import testing

    return testing.do_bench(f, warmup=_WARM_UP_MS, rep=_BUDGET_MS, return_mode="median")
