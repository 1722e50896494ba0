"""What `auto` picked while a run went on, kept in `RUN/choices.json` and made again when the run goes on elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from farspan.parallel.context import Runtime
from farspan.platform.checkpoint import replace

FILE = "choices.json"


class Choices:
    """Rank 0 reads and writes them; every rank makes them."""

    def __init__(self, folder: Path, context: Runtime, control: dist.ProcessGroup, say: Callable[[str], None]) -> None:
        """All ranks of `control` call it together. What cannot be read is picked anew."""
        self.folder, self.context, self.say = folder, context, say
        self.leads = dist.get_rank(control) == 0
        self.said = 0
        kept = [_contexts(folder) if self.leads else {}]
        dist.broadcast_object_list(kept, group=control, group_src=0)
        self.kept: dict[str, str] = kept[0]
        context.replay(self.kept)

    def tell(self) -> None:
        """Says and writes what was picked since the last time."""
        lines = self.context.explain().splitlines()
        if len(lines) == self.said:
            return
        for line in lines[self.said :]:
            self.say(line)
        self.said, chosen = len(lines), self.context.chosen()
        if self.leads and not chosen.items() <= self.kept.items():
            self.kept |= chosen
            keep(self.folder, "context", self.kept, self.say)


def kept(folder: Path) -> dict[str, Any]:
    """All that a run picked, by what for; what cannot be read was not picked."""
    try:
        found = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep(folder: Path, what: str, picked: Any, say: Callable[[str], None]) -> None:
    """Writes it beside all else that was picked."""
    try:
        replace(folder / FILE, json.dumps({**kept(folder), what: picked}, indent=1) + "\n")
    except OSError as error:
        say(f"warning: {folder / FILE} could not be written ({error}); a resumed run will pick anew")


def _contexts(folder: Path) -> dict[str, str]:
    found = kept(folder).get("context")
    return {str(what): str(picked) for what, picked in found.items()} if isinstance(found, dict) else {}
