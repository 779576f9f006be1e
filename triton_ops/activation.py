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


@triton.jit
def differentiate(x, value, ACTIVATION: tl.constexpr):
    """act'(x) * value; relu'(0) is 0 as in PyTorch. Past 30 what vanishes is cut off, not multiplied with infinity."""
    bounded = tl.minimum(tl.maximum(x, -30.0), 30.0)
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * bounded * bounded)
        return value * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + bounded * density)
    elif ACTIVATION == "gelu_tanh":
        # act = x s, s = 1 / (1 + exp(-z)): act' = s + x s (1 - s) z'
        square = bounded * bounded
        s = 1.0 / (1.0 + tl.exp(bounded * (-1.5957691216057308 - 0.07135481282553484 * square)))
        slope = 1.5957691216057308 + 0.21406443847660452 * square
        return value * (s + bounded * s * (1.0 - s) * slope)
    elif ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, value)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-bounded))
        return value * (s + bounded * s * (1.0 - s))
    else:
        return value
