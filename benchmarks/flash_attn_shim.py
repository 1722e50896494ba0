"""Stands in for the flash_attn package, so that peers' schedules run over the very kernels that ours do.

ring-flash-attn and yunchang import two pairs of private functions from flash_attn, which here are farspan's kernel
pairs, and yunchang the differentiable one, which is farspan's `attend`.
"""

import sys
from types import ModuleType

from torch import Tensor

from farspan.kernels.softmax_attention import attend, block_backward, block_forward, choose
from farspan.kernels.softmax_attention_mask import Mask


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    mask = Mask(causal=causal, offset=k.shape[1] - q.shape[1] if causal else 0, scale=softmax_scale)
    return (*block_forward(q, k, v, mask, choose(q, k, v, mask)), None, None)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> None:
    mask = Mask(causal=causal, offset=k.shape[1] - q.shape[1] if causal else 0, scale=softmax_scale)
    found = block_backward(dout, q, k, v, out, softmax_lse, mask, choose(q, k, v, mask))
    for into, grad in zip((dq, dk, dv), found, strict=True):
        into.copy_(grad)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **unused: object,
) -> Tensor:
    return attend(q, k, v, causal=causal, scale=softmax_scale)[0]


def _unavailable(*_: object, **__: object) -> None:
    raise NotImplementedError("the stand-in for flash_attn has dense kernels only; install flash-attn for varlen ones")


def install() -> None:
    """Puts the stand-in in place; call it before the peer is imported."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    interface.__dict__.update(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)
    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        setattr(interface, name, _unavailable)
    for name in ("flash_attn_varlen_func", "flash_attn_qkvpacked_func"):
        setattr(interface, name, _unavailable)
        setattr(package, name, _unavailable)
    interface.__dict__["flash_attn_func"] = package.__dict__["flash_attn_func"] = flash_attn_func
    package.__dict__["flash_attn_interface"] = interface
    package.__dict__["__version__"] = "2.7.4"
    adapters = ModuleType("ring_flash_attn.adapters")  # of no use here, and bound to one version of transformers
    adapters.__dict__.update(hf_adapter=None, substitute_hf_flash_attn=None, update_ring_flash_attn_params=None)
    sys.modules["ring_flash_attn.adapters"] = adapters
    sys.modules["flash_attn"], sys.modules["flash_attn.flash_attn_interface"] = package, interface
