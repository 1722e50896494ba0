"""Feed-forward layers: what a token does by itself."""

from farspan.models.ffns.block_ffn import BlockFfn
from farspan.models.ffns.expert_choice import ExpertChoice
from farspan.models.ffns.gated import Geglu, Swiglu
from farspan.models.ffns.moe import Moe
from farspan.models.ffns.plain import PolyNorm, SquaredRelu
from farspan.models.ffns.router import Routed
from farspan.models.ffns.smoe_dropout import SmoeDropout

Sparse = Moe | BlockFfn | SmoeDropout | ExpertChoice
"""Those with experts."""
Ffn = Swiglu | Geglu | SquaredRelu | PolyNorm | Sparse

__all__ = [
    "BlockFfn",
    "ExpertChoice",
    "Ffn",
    "Geglu",
    "Moe",
    "PolyNorm",
    "Routed",
    "SmoeDropout",
    "Sparse",
    "SquaredRelu",
    "Swiglu",
]
