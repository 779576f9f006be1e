"""The activations on tiles, in float32."""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x), x float32. Not a number, and the limits at infinity, are those of plain PyTorch."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # x (1 + tanh u) / 2 = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3)
        return x / (1.0 + tl.exp(x * (-1.5957691216057308 - 0.07135481282553484 * x * x)))
    elif ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x)  # a NaN is not <= 0
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    else:
        return x
