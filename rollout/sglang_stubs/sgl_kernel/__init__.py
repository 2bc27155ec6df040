"""Stands in for sgl_kernel in CPU engine processes: PyPI carries CUDA wheels of it only.

On a CPU, SGLang imports names from it at module scope (kernels/ops/kvcache/cache_move.py, srt/mem_cache/allocation.py,
kernels/ops/speculative/*.py). `torch.ops.sgl_kernel` stays empty, so SGLang sees no AMX kernels and every layer takes
its torch-native path. Only the one function that path calls is real.
"""


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, _stride):
    """Write each request's new KV slots into its row of the request-to-token table.

    Row ``req_pool_indices[i]`` receives, at ``[start_offset[i], end_offset[i])``, the next slots of `out_cache_loc`.
    """
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        slots = out_cache_loc[taken : taken + end - start]
        req_to_token[row, start:end] = slots.to(req_to_token.dtype)
        taken += end - start


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def unavailable(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU implementation")

    return unavailable
