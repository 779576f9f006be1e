"""Names of the providers and which of them run where (no torch in here; the builders are in providers.py)."""

from __future__ import annotations

from spinbench.compositions import MadeWeights

INFERENCE, TRAINING = ("spin frozen", "spin"), ("spin", "spin checkpoint")
CAPTURED = "spin graphs"  # frozen, or a training step, as one CUDA graph
OURS = (*INFERENCE, *TRAINING[1:], CAPTURED)
PEERS = {  # the name --peers takes -> its variants
    "eager": ("eager", "eager channels_last"),
    "compile": ("compile", "compile channels_last"),
    "autotune": ("autotune", "autotune channels_last"),
    "graphs": ("graphs", "graphs channels_last"),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime",),
}
COMPOSING_PEERS = {"product": ("product",), "broadcast": ("broadcast sum",), "eager": ("eager",)}
# Ceilings, not peers: Tensor.copy_ of a case's least bytes, half of them read and half written; and, because memory may
# write or read slower than it does both, of what a pass mostly does: Tensor.fill_ of the weights that a forward pass
# writes, Tensor.sum of as many bytes as a backward pass reads.
COPY, WRITE, READ = "copy", "write", "read"
TRAINING_PEERS = ("eager", "compile", "autotune", "graphs")
DEVICE_PEERS = {
    "cpu": ("eager", "compile", "openvino", "onnxruntime"),
    "cuda": ("eager", "compile", "autotune", "graphs"),
}


def peers_of(suite: str, device: str) -> tuple[str, ...]:
    """The names that --peers takes."""
    if suite == "compose":
        return tuple(COMPOSING_PEERS)
    return tuple(peer for peer in DEVICE_PEERS[device] if suite != "train" or peer in TRAINING_PEERS)


def select(suite: str, device: str, peers: list[str] | None) -> list[str]:
    """The providers of a run: ours, then all variants of the peers (None: all; eager for blocks)."""
    if suite == "compose":
        names = COMPOSING_PEERS if peers is None else peers
        return ["spin", *(variant for peer in names for variant in COMPOSING_PEERS[peer]), COPY, WRITE, READ]
    ours = TRAINING if suite == "train" else INFERENCE
    if device == "cuda":
        ours += (CAPTURED,)
    if peers is None:
        peers = list(peers_of(suite, device)) if suite in ("networks", "train") else ["eager"]
    return [*ours, *(variant for peer in peers for variant in PEERS[peer])]


def takes_part(provider: str, network: object) -> bool:
    """Weights have peers of their own; no ceiling stands beside a step, which is bound by its convolutions."""
    if not isinstance(network, MadeWeights):
        return True
    ceilings = {"forward": (COPY, WRITE), "backward": (COPY, READ), "step": ()}
    return provider in ("spin", *network.peers, *ceilings[network.what])


def is_peer(provider: str) -> bool:
    return provider not in (*OURS, COPY, WRITE, READ)


def unsupported(provider: str, dtype: str) -> str | None:
    """Why a provider has no row at this dtype, or None."""
    if provider == "onnxruntime" and dtype == "bfloat16":
        return "its CPU provider has no bfloat16 convolutions"
    return None
