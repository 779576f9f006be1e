"""All distinct matrices of a mixer from their templates, in one launch: W_s = sum_t coefficients[s, t] T_t.

Tiling: BLOCK entries of one matrix per program; templates are read by all matrices and stay in L2.
Cost: (T + 1) * itemsize bytes per entry. Numerics: float32 sums in order of the templates, rounded once.
"""

import triton
import triton.language as tl


@triton.jit
def compose_kernel(templates, coefficients, matrices, size, TEMPLATES: tl.constexpr, BLOCK: tl.constexpr):
    matrix = tl.program_id(1)
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for t in range(TEMPLATES):
        weight = tl.load(coefficients + matrix * TEMPLATES + t)
        template = templates + tl.full((), t, tl.int64) * size
        total += weight * tl.load(template + entries, mask=mask, other=0.0).to(tl.float32)
    tl.store(matrices + matrix.to(tl.int64) * size + entries, total.to(matrices.dtype.element_ty), mask=mask)
