"""How a weight is cut over tp, or over ep and etp: models declare it, `parallel.tensor` does it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """Cut along the outputs, dimension 0: each rank computes some of them."""

    units: int | None = None
    """Pieces that stay whole, such as heads; where they are fewer than ranks, several hold the same one. None: rows."""


@dataclass(frozen=True)
class Row:
    """Cut along the inputs, dimension 1: each rank computes a part of every output, to be summed."""


@dataclass(frozen=True)
class Expert:
    """Cut along experts, dimension 0, over ep, and along their hidden channels over etp; tp leaves it alone."""

    channels: int
    """The dimension of the hidden channels."""


Placement = Column | Row | Expert
"""A weight that declares none is held whole by every rank, and the ranks' gradients of it are summed."""


@dataclass(frozen=True)
class Pieces:
    """A weight on tp ranks: `parts` different pieces along `dim`, each held by `copies` ranks; tp = parts · copies."""

    dim: int
    parts: int
    copies: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one piece."""
        return tuple(size // self.parts if i == self.dim else size for i, size in enumerate(whole))

    def part(self, rank: int) -> int:
        """Which piece this rank of tp holds."""
        return rank // self.copies


@dataclass(frozen=True)
class Folded:
    """A weight of experts: `ep` pieces along dimension 0, each of `etp` pieces along `channels`; no two are alike."""

    ep: int
    etp: int
    channels: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one piece."""
        cut = {0: self.ep, self.channels: self.etp}
        return tuple(size // cut.get(i, 1) for i, size in enumerate(whole))


def folded(placement: Expert, shape: tuple[int, ...], ep: int, etp: int) -> Folded:
    """Where `placement` puts a weight of `shape`; ValueError when it cannot be cut so."""
    for axis, ranks, what, dim in (("ep", ep, "experts", 0), ("etp", etp, "channels", placement.channels)):
        if shape[dim] % ranks:
            raise ValueError(f"{shape[dim]} {what} cannot be dealt out to parallel.{axis}={ranks} ranks; divide them")
    return Folded(ep, etp, placement.channels)


def along(shape: tuple[int, ...], ranks: int) -> int:
    """The dimension along which FSDP deals a rank's stack of experts, E … out in, out to `ranks`: that of experts, or
    where these do not go round that of their matrices' rows, so that no rank is left without."""
    rows = len(shape) - 2
    return rows if shape[0] % ranks and shape[rows] % ranks == 0 else 0


def pieces(placement: Column | Row | None, shape: tuple[int, ...], tp: int) -> Pieces:
    """Where `placement` puts a weight of `shape` on `tp` ranks; ValueError when it cannot be cut so."""
    if placement is None:
        return Pieces(dim=0, parts=1, copies=tp)
    dim = 0 if isinstance(placement, Column) else 1
    units = placement.units if isinstance(placement, Column) and placement.units is not None else shape[dim]
    parts = min(units, tp)
    if units % parts or tp % parts or shape[dim] % parts:
        raise ValueError(
            f"{units} pieces of dimension {dim} of {tuple(shape)} cannot be dealt out to tp={tp} ranks; "
            "parallel.tp must divide them, or be a multiple of them"
        )
    return Pieces(dim=dim, parts=parts, copies=tp // parts)
