"""The ranks of a run in two views over the same list: dense (pp dp cp tp) and expert (pp edp ep etp)."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Annotated, ClassVar, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from farspan.parallel.comm import Group
from farspan.parallel.context import Auto, Context
from farspan.parallel.expert import Auto as AutoDispatch
from farspan.parallel.expert import Axes, Dispatch, WeightGather

Axis = Literal["pp", "dp", "cp", "tp", "edp", "ep", "etp", "replicate", "shard", "parts", "copies", "expert_shard"]
Gather = Literal["layer", "step"]
Size = int | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Fsdp:
    """torch's FSDP2 cuts the weights, layer by layer: everything works with it."""


@dataclass(frozen=True, kw_only=True)
class Zero:
    """DeepSpeed's ZeRO does (Rajbhandari et al., 2020): under AdamW, over dp and cp; needs the extra `deepspeed`."""

    stage: Literal[1, 2, 3] = 3
    """What is cut over the ranks: 1: optimizer state; 2: gradients as well; 3: weights too."""
    offload: Literal["none", "optimizer", "optimizer_and_weights"] = "none"
    """What waits in the host's memory, where the optimizer then steps."""

    BUCKET: ClassVar[int] = 500_000_000
    """Gradients that are summed over the ranks at once, at most."""
    LIVE: ClassVar[int] = 1_000_000_000
    """Weights that stage 3 keeps gathered, at most."""

    def __post_init__(self) -> None:
        if self.offload == "optimizer_and_weights" and self.stage < 3:
            raise ValueError(
                f"offload={self.offload}: stage={self.stage} keeps whole weights on every rank; set stage: 3, or "
                "offload: optimizer"
            )


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the ranks are used: world = pp·dp·cp·tp = pp·edp·ep·etp."""

    dp: Size = "auto"
    """Data parallel: `auto` takes what the other axes leave."""
    shard: Size = "auto"
    """Ranks of dp·cp that hold one copy of the weights between them; fewer than all is hybrid sharding."""
    cp: int = 1
    """Context parallel: ranks that cut each sequence between them."""
    tp: int = 1
    """Tensor parallel: ranks that cut each weight between them."""
    pp: int = 1
    """Pipeline parallel: ranks that cut the layers between them."""
    ep: int = 1
    """Expert parallel: ranks that deal out the experts between them."""
    etp: int = 1
    """Ranks that cut each expert between them."""
    context: Context = Auto()
    """How attention spans the ranks of cp, and which rank holds which tokens; with cp = 1 it has no say."""
    dispatch: Dispatch = AutoDispatch()
    """How tokens and experts of the ranks of ep come together; with ep = 1 it has no say."""
    gather: Gather | Literal["auto"] = "auto"
    """How long a gathered weight stays: `layer` frees it after each forward and backward; `step` keeps it, in the type
    of products, through all micro-batches: fewer gathers for more memory. auto: step where shard is 1 and no optimizer
    state is offloaded."""
    engine: Annotated[Fsdp | Zero, "choice"] = Fsdp()
    """Who cuts weights, gradients and optimizer state over dp·cp, and brings them together."""

    @property
    def dealt(self) -> int:
        """Ranks that have other experts: where experts are gathered none has, and those of ep count as edp."""
        return 1 if isinstance(self.dispatch, WeightGather) else self.ep

    def gathering(self, sizes: "Sizes") -> Gather:
        """`gather` with `auto` resolved: one rank that holds all weights would copy them over and over for nothing."""
        return ("step" if sizes.shard == 1 else "layer") if self.gather == "auto" else self.gather

    def problems(self, world: int) -> list[str]:
        """What keeps these sizes from covering `world` ranks."""
        found = [
            f"parallel.{axis}={size}: must be at least 1"
            for axis in ("dp", "shard", "cp", "tp", "pp", "ep", "etp")
            if isinstance(size := getattr(self, axis), int) and size < 1
        ]
        found += [
            f"parallel.{axis}={size}: this version trains with {axis}=1 only; give the ranks to dp, cp or tp"
            for axis in ("pp",)
            if (size := getattr(self, axis)) > 1
        ]
        if found:
            return found
        inner = self.cp * self.tp * self.pp
        if world % inner or (self.dp != "auto" and self.dp * inner != world):
            return [
                f"parallel: pp={self.pp} · dp={self.dp} · cp={self.cp} · tp={self.tp} must be the {world} ranks of "
                f"launch; {self._way_out(world, inner)}"
            ]
        whole = world // self.pp // self.tp
        if self.shard != "auto" and whole % self.shard:
            return [f"parallel.shard={self.shard}: must divide dp·cp={whole}; try {_divisor(whole, self.shard)}"]
        return self._expert_problems(whole) + (self._zero_problems(whole) if isinstance(self.engine, Zero) else [])

    def _expert_problems(self, whole: int) -> list[str]:
        """What keeps the experts from being dealt out to the ranks that hold one copy of all weights."""
        one = (whole if self.shard == "auto" else self.shard) * self.tp
        if one % (self.ep * self.etp) == 0:
            return []
        return [
            f"parallel: ep={self.ep} · etp={self.etp} must divide the {one} ranks that hold one copy of the weights, "
            f"shard · tp; try ep={_divisor(one, self.ep)}, etp=1"
        ]

    def _zero_problems(self, whole: int) -> list[str]:
        """What DeepSpeed's engine cannot do with these sizes, `whole` ranks holding the weights between them."""
        refused = {
            f"tp={self.tp}: engine.kind=zero cuts whole weights only; set tp: 1": self.tp > 1,
            f"shard={self.shard}: engine.kind=zero cuts over all {whole} ranks; set shard: auto": (
                self.shard not in ("auto", whole)
            ),
            f"ep={self.ep}, etp={self.etp}: engine.kind=zero cuts whole weights only; set both to 1": (
                self.ep * self.etp > 1
            ),
            f"gather={self.gather}: engine.kind=zero gathers by itself; set gather: auto": self.gather != "auto",
        }
        return [f"parallel.{problem}, or engine: {{kind: fsdp}}" for problem, found in refused.items() if found]

    def _way_out(self, world: int, inner: int) -> str:
        """What makes `inner` ranks of the other axes times dp the world."""
        ranks = f"launch.ranks={inner if self.dp == 'auto' else self.dp * inner} in all"
        return ranks if world % inner else f"try dp={world // inner}, or {ranks}"

    def sizes(self, world: int) -> "Sizes":
        """The sizes with every `auto` resolved; ValueError when they do not cover `world`."""
        if problems := self.problems(world):
            raise ValueError("\n".join(problems))
        dp = world // (self.cp * self.tp * self.pp)
        shard = dp * self.cp if self.shard == "auto" else self.shard
        return Sizes(pp=self.pp, dp=dp, cp=self.cp, tp=self.tp, ep=self.dealt, etp=self.etp, shard=shard)


def _divisor(whole: int, near: int) -> int:
    """The divisor of `whole` nearest to `near`."""
    return min((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: abs(d - near))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Every axis of both views as a number."""

    pp: int
    dp: int
    cp: int
    tp: int
    ep: int
    etp: int
    shard: int

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def edp(self) -> int:
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    @property
    def replicate(self) -> int:
        return self.dp * self.cp // self.shard

    @property
    def expert_shard(self) -> int:
        """Ranks of edp that hold one copy of an expert between them."""
        return self.shard * self.tp // (self.ep * self.etp)

    @property
    def folded(self) -> bool:
        """Whether experts lie otherwise than all other weights."""
        return self.ep * self.etp * self.tp > 1

    def experts(self) -> torch.Tensor:
        """All ranks by EXPERTS."""
        ranks = torch.arange(self.world).view(self.pp, self.replicate, self.expert_shard, self.ep, self.etp)
        return ranks.permute(0, 1, 3, 4, 2)

    def pieces(self, copies: int) -> torch.Tensor:
        """All ranks by PIECES, for weights of which `copies` ranks of tp hold the same part."""
        ranks = torch.arange(self.world).view(self.pp, self.replicate, self.shard, self.tp // copies, copies)
        return ranks.permute(0, 1, 3, 4, 2)

    def view(self, axes: tuple[Axis, ...]) -> tuple[int, ...]:
        """The sizes of `axes`, which must cover the world."""
        sizes = tuple(int(getattr(self, axis)) for axis in axes)
        assert prod(sizes) == self.world, f"{axes} = {sizes} do not cover {self.world} ranks"
        return sizes


DENSE: tuple[Axis, ...] = ("pp", "dp", "cp", "tp")
EXPERT: tuple[Axis, ...] = ("pp", "edp", "ep", "etp")
PIECES: tuple[Axis, ...] = ("pp", "replicate", "parts", "copies", "shard")
EXPERTS: tuple[Axis, ...] = ("pp", "replicate", "ep", "etp", "expert_shard")


class Mesh:
    """The ranks of this run, and the only maker of process groups.

    Ranks are numbered with tp fastest, then cp, then dp, then pp; the expert view cuts the same numbers anew, and
    the weights' view splits dp·cp into copies (`replicate`) and the ranks that share one (`shard`), and tp into the
    `parts` that a weight is cut into and the `copies` of each.
    """

    def __init__(self, sizes: Sizes, device: torch.device, control: dist.ProcessGroup) -> None:
        """`control` is a gloo group of all ranks, for messages between hosts: counts, wishes to stop, results."""
        self.sizes = sizes
        self.device = device
        self.control = control
        self.rank = dist.get_rank()
        self._pieces: dict[int, DeviceMesh] = {}

    @cached_property
    def dense(self) -> DeviceMesh:
        return self._view(DENSE)

    @cached_property
    def expert(self) -> DeviceMesh:
        return self._view(EXPERT)

    @cached_property
    def weights(self) -> DeviceMesh:
        """What a rank's part of a weight is sharded over: `shard`, or (`replicate`, `shard`) under hybrid sharding."""
        view = self.pieces(1)
        return view["replicate", "shard"] if self.sizes.replicate > 1 else view["shard"]

    @cached_property
    def experts(self) -> DeviceMesh:
        """The ranks by EXPERTS: a weight of experts is cut over ep and etp first, and each part over `expert_shard`."""
        return DeviceMesh(self.device.type, self.sizes.experts(), mesh_dim_names=EXPERTS)

    @cached_property
    def expert_weights(self) -> DeviceMesh:
        """What a rank's part of a weight of experts is sharded over, as `weights` has it."""
        view = self.experts
        return view["replicate", "expert_shard"] if self.sizes.replicate > 1 else view["expert_shard"]

    @cached_property
    def expert_axes(self) -> Axes:
        """The groups that layers of experts exchange in; all ranks ask for them together."""
        sizes = self.sizes
        folded = torch.arange(sizes.world).view(sizes.view(EXPERT))
        ep, etp = (self._own(folded.movedim(EXPERT.index(axis), -1)) for axis in ("ep", "etp"))
        mates = self._own(torch.arange(sizes.world).view(-1, sizes.cp * sizes.tp))
        everyone = self._own(torch.arange(sizes.world).view(sizes.pp, -1))
        return Axes(ep=ep, etp=etp, mates=mates, everyone=everyone, hosts=Group(self.control))

    @cached_property
    def tensor(self) -> Group:
        """The ranks that tensor parallelism spreads a layer over."""
        return Group(self.dense.get_group("tp"))

    @cached_property
    def context(self) -> Group:
        """The ranks that context parallelism spreads a sequence over; all ranks ask for it together.

        A group of its own even where it is all ranks: its messages must not queue behind the weights'.
        """
        ranks = torch.arange(self.sizes.world).view(self.sizes.view(DENSE)).movedim(DENSE.index("cp"), -1)
        group = self._own(ranks)
        assert group is not None
        return group

    def _own(self, ranks: torch.Tensor) -> Group | None:
        """A new group for each line of the last axis, this rank's; None where a line is one rank."""
        if ranks.shape[-1] == 1:
            return None
        mine, _ = dist.new_subgroups_by_enumeration(ranks.reshape(-1, ranks.shape[-1]).tolist())
        assert mine is not None
        return Group(mine)

    def pieces(self, copies: int) -> DeviceMesh:
        """The ranks by PIECES: a weight is cut into its parts first, and each part over `shard`."""
        if copies not in self._pieces:
            ranks = self.sizes.pieces(copies)
            self._pieces[copies] = DeviceMesh(self.device.type, ranks, mesh_dim_names=PIECES)
        return self._pieces[copies]

    def index(self, axis: Axis) -> int:
        """This rank's place along an axis of the dense view."""
        return int(self.dense.get_local_rank(axis))

    def _view(self, axes: tuple[Axis, ...]) -> DeviceMesh:
        ranks = torch.arange(self.sizes.world).view(self.sizes.view(axes))
        return DeviceMesh(self.device.type, ranks, mesh_dim_names=axes)
