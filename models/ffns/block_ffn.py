"""BlockFFN: every expert decides by itself whether a token meets it, so that easy tokens meet fewer (Song et al., 2025,
arXiv 2507.08771)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farspan.kernels.random import Normal
from farspan.kernels.route import route
from farspan.kernels.router_logits import router_logits
from farspan.models.ffns.experts import Dealt, Experts
from farspan.models.ffns.router import Routed, RowSums, Tally, numbered, uncharged, without_padding
from farspan.models.linear import Linear, Plain
from farspan.models.roles import RoleKind
from farspan.parallel.context.shard import Documents
from farspan.parallel.expert import Visits


@dataclass(frozen=True, kw_only=True)
class BlockFfn(Dealt):
    """Experts of which a token meets those whose logit is above zero, weighed by an RMSNorm of these."""

    experts: int
    """How many there are."""
    hidden: int
    """Channels between the two products of one expert."""
    most: int | None = None
    """A token meets at most so many, those of the largest logits: memory is for so many, whoever meets fewer; null: all
    that are above zero."""
    gated: bool = False
    """Experts are SwiGLU; false: silu of one product, then down."""
    locality: float = 0.0
    """Weight of a loss on neighbouring tokens that meet different experts."""
    sharpness: float = 100.0
    """What logits are multiplied by there, so that only their sign counts."""
    sparsity: float = 0.0
    """Weight of the share of experts that the tokens of a chunk meet between them."""
    chunk: int = 8
    """Tokens in a row of such a chunk."""
    eps: float = 1e-6
    """Added to the mean square under the root."""

    def __post_init__(self) -> None:
        if self.experts < 2 or self.hidden < 1:
            raise ValueError(f"experts={self.experts}, hidden={self.hidden}: must be at least 2 and 1")
        if self.most is not None and not 1 <= self.most <= self.experts:
            raise ValueError(f"most={self.most}: must be from 1 to experts={self.experts}, or null")
        if min(self.locality, self.sparsity) < 0 or min(self.sharpness, self.eps) <= 0 or self.chunk < 2:
            raise ValueError(
                f"locality={self.locality}, sparsity={self.sparsity}: must not be negative; "
                f"sharpness={self.sharpness}, eps={self.eps}: must be above 0; chunk={self.chunk}: must be at least 2"
            )
        for name, loss in (("sharpness", "locality"), ("chunk", "sparsity")):
            value, usual = getattr(self, name), getattr(BlockFfn, name)
            if value != usual and not getattr(self, loss):
                raise ValueError(f"{name}={value}: {loss}=0 has no use for it; set {loss}, or leave {name} at {usual}")

    @property
    def met(self) -> int:
        return self.most or self.experts

    def build(self, width: int, depth: int, linear: Linear = Plain()) -> "BlockFfnLayer":  # noqa: B008 - frozen
        return BlockFfnLayer(self, width, depth)


class BlockFfnLayer(Routed):
    def __init__(self, config: BlockFfn, width: int, depth: int) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(width, config.experts, bias=False)
        self.gain = nn.Parameter(torch.empty(config.experts))
        self.experts = Experts(config.experts, config.hidden, width, depth, gated=config.gated)

    def initial(self) -> dict[str, Normal]:
        """Half of the experts take part, with a mean square weight of one over all of them: their sum is divided by
        √E, as one product over all their channels would have it."""
        count = self.config.experts
        return {"router.weight": Normal(0.0, self.router.in_features**-0.5), "gain": Normal(count**-0.5, 0.0)}

    def roles(self) -> dict[str, RoleKind]:
        return {"router.weight": "router"}

    def flops(self, lengths: tuple[int, ...]) -> int:
        """Forward operations for documents of these lengths, if every token met `most` experts: no more than those."""
        return 2 * sum(lengths) * (self.router.weight.numel() + self.config.met * self.experts.size)

    def forward(self, x: Tensor, documents: Documents) -> tuple[Tensor, Tally]:
        """x: B T D. Logits and weights are in at least fp32."""
        config, tokens = self.config, x.flatten(0, 1)
        logits = router_logits(tokens, self.router.weight)
        # What recomputation keeps is the choice of `route` with its sigmoids: who was above zero then stays so.
        sign, chosen = route(logits.detach(), config.met, score="sigmoid")
        chosen = without_padding(torch.where(sign > 0.5, chosen, -1), documents)
        active = logits.relu()
        weight = active * (active.square().mean(-1, keepdim=True) + config.eps).rsqrt() * self.gain.to(logits.dtype)
        share = torch.where(chosen >= 0, weight.gather(1, chosen.long().clamp(min=0)), 0.0)
        out = self.experts(Visits(tokens, chosen, share)).view_as(x)
        tally = uncharged(chosen, logits, documents, len(x))
        learns = config.locality + config.sparsity > 0
        return out, tally._replace(scores=self._losses(logits, documents, x)) if learns else tally

    def _losses(self, logits: Tensor, documents: Documents, x: Tensor) -> Tensor:
        """Locality and sparsity, summed over the tokens of each row: R 2, this rank's part.

        Neighbours may be on other ranks: all logits are brought together, and every rank answers for one part of what
        all of them find.
        """
        numbers, (rows, length) = numbered(documents, x)
        every = self.experts.dispatcher.every
        said, at = every(logits), every(numbers).long()
        place = torch.where(at >= 0, at, rows * length)  # padding comes last, and is cut off
        line = (
            said.new_zeros(rows * length + 1, said.shape[1])
            .index_copy(0, place, said)[:-1]
            .unflatten(0, (rows, length))
        )
        there = said.new_zeros(rows * length + 1).index_fill(0, place, 1.0)[:-1].view(rows, length)
        both = torch.stack((self._locality(line, there), self._sparsity(line, there)), dim=1)
        return both * (len(numbers) / len(at))

    def _locality(self, line: Tensor, there: Tensor) -> Tensor:
        """line: R L E, logits of rows; there: R L, 0 for padding -> R. The token before is what is to be met: it has no
        gradient."""
        sharp = self.config.sharpness * line
        each = F.binary_cross_entropy_with_logits(sharp[:, 1:], sharp[:, :-1].detach().sigmoid(), reduction="none")
        return (each.mean(-1) * there[:, 1:] * there[:, :-1]).sum(1)

    def _sparsity(self, line: Tensor, there: Tensor) -> Tensor:
        """R: of each chunk, 1 less the mean chance that an expert is met by none of its tokens, times these."""
        active = line.relu()
        share = active / (active.sum(-1, keepdim=True) + 1e-5) * there.unsqueeze(-1)
        short = -line.shape[1] % self.config.chunk
        share, there = F.pad(share, (0, 0, 0, short)), F.pad(there, (0, short))
        missed = (1 - share + 1e-5).log().unflatten(1, (-1, self.config.chunk)).sum(2).exp()  # R chunks E
        tokens = there.unflatten(1, (-1, self.config.chunk)).sum(2)
        return ((1 - missed.mean(-1)) * tokens).sum(1)

    def charge(self, tally: Tally, given: Tensor, over: RowSums, rows: RowSums) -> Tensor:
        config = self.config
        if not config.locality + config.sparsity:
            return given.new_zeros(())
        locality, sparsity = (rows.weight.unsqueeze(1) * tally.scores).sum(0)
        return config.locality * locality + config.sparsity * sparsity
