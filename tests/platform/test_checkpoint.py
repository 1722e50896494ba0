"""A checkpoint is whole or it is not there; it loads onto any number of ranks; no flipped byte goes unseen."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from farspan.platform import checkpoint
from farspan.platform.checkpoint import MANIFEST, Saver, folder_of, latest, load, manifest_of, newest, steps_in, verify

SHAPES = {"model.matrix": (7, 4), "model.tiny": (1,), "model.wide": (3, 50), "optim.step": (1,)}


def state(seed: int) -> dict[str, Tensor]:
    """Odd shapes: some ranks hold nothing of `tiny`, and `step` is a plain tensor on every rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = torch.Generator().manual_seed(seed)
    whole = {name: torch.randn(shape, generator=made) for name, shape in SHAPES.items()}
    cut = {name: distribute_tensor(whole[name], mesh, [Shard(0)]) for name in ("model.matrix", "model.tiny")}
    copies = {"model.wide": distribute_tensor(whole["model.wide"], mesh, [Replicate()])}
    return {**cut, **copies, "optim.step": whole["optim.step"]}


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def save(root: str, seeds: list[int], keep: int = 2, asynchronous: bool = False) -> dict[str, Any]:
    said: list[str] = []
    control = dist.new_group(backend="gloo")
    saver = Saver(Path(root), keep, control, said.append)
    stood = True
    for seed in seeds:
        tensors = state(seed)
        if asynchronous:
            saver.start(seed, tensors, {"format": 1, "note": seed})
            saver.staged()
            for tensor in tensors.values():  # after staging the training may change what was saved
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(torch.nan)
            saver.finish()
            stood &= not saver.failures
        else:
            stood &= saver.save(seed, tensors, {"format": 1, "note": seed})
    saver.close()
    return {"said": said, "stood": stood}


def restore(root: str) -> dict[str, Any]:
    said: list[str] = []
    control = dist.new_group(backend="gloo")
    step = newest(Path(root), control, said.append)
    tensors = state(999)
    if step is not None:
        load(Path(root), step, tensors, control)
    return {"said": said, "step": step, "state": whole(tensors)}


def wanted(seed: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=made) for name, shape in SHAPES.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture(scope="module")
def saved(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three asynchronous saves by two ranks, of which the last two are kept."""
    root = tmp_path_factory.mktemp("saved") / "checkpoints"
    for told in ranks(2, save, root=str(root), seeds=[1, 2, 3], asynchronous=True):
        assert told["stood"] and len(told["said"]) == 3
    return root


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_saves_commit_and_old_ones_go(saved: Path) -> None:
    assert steps_in(saved) == [3, 2] and latest(saved) == 3
    assert sorted(p.name for p in saved.iterdir()) == ["LATEST", "step-00000002", "step-00000003"]
    manifest = manifest_of(folder_of(saved, 3))
    assert manifest["note"] == 3 and len(manifest["files"]) == 2
    assert {n: tuple(t["shape"]) for n, t in manifest["tensors"].items()} == SHAPES
    assert verify(folder_of(saved, 3)) == []


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loads_onto_any_number_of_ranks(ranks: Any, saved: Path, world: int) -> None:
    for told in ranks(world, restore, root=str(saved)):
        assert told["step"] == 3 and told["said"] == []
        same(told["state"], wanted(3))


def test_every_flipped_byte_is_seen(copy: Path) -> None:
    folder = folder_of(copy, 3)
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        for place in range(0, len(content), 1 if len(content) < 2000 else 37):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert any("SHA-256 differs" in problem for problem in verify(folder)), f"byte {place} of {file.name}"
        file.write_bytes(content)
    assert verify(folder) == []


def damage_truncate(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def damage_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-3])


def damage_missing(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def damage_stranger(folder: Path) -> None:
    (folder / "shard-00009-model-00001-of-00001.safetensors").write_bytes(b"x")


def damage_no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def damage_format(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"format": 1', '"format": 99'))


DAMAGES = [damage_truncate, damage_manifest, damage_missing, damage_stranger, damage_no_manifest, damage_format]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(copy: Path, damage: Any) -> None:
    damage(folder_of(copy, 3))
    problems = verify(folder_of(copy, 3))
    assert len(problems) == 1 and str(copy) in problems[0]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(ranks: Any, copy: Path) -> None:
    damage_truncate(folder_of(copy, 3))
    (copy / "step-00000004.tmp").mkdir()  # what a kill in mid-save leaves
    for told in ranks(2, restore, root=str(copy)):
        assert told["step"] == 2
        same(told["state"], wanted(2))
        assert "step-00000003 does not verify and is passed over" in told["said"][0]
    assert (copy / "step-00000003.damaged").is_dir() and steps_in(copy) == [2], "set aside, and nothing of it lost"


def all_damaged(root: str) -> str:
    try:
        newest(Path(root), dist.new_group(backend="gloo"), lambda text: None)
    except ValueError as error:
        return str(error)
    return "no error"


def test_when_none_verifies_training_does_not_begin_again_by_itself(ranks: Any, copy: Path) -> None:
    for step in (2, 3):
        damage_truncate(folder_of(copy, step))
    text = ranks(1, all_damaged, root=str(copy))[0]
    assert "none of its 2 checkpoints verifies; restore one from a copy, or remove this folder" in text
    assert steps_in(copy) == [3, 2]


def test_a_file_systems_dot_files_do_no_harm(copy: Path) -> None:
    (folder_of(copy, 3) / ".nfs0001").touch()
    assert verify(folder_of(copy, 3)) == []


def fail_then_save(root: str) -> dict[str, Any]:
    """The folder cannot be written at first: rank 1 finds a file where the save's folder must be."""
    said: list[str] = []
    control = dist.new_group(backend="gloo")
    saver = Saver(Path(root), 2, control, said.append)
    real, left = checkpoint._Writer.write_data, [2]

    def broken(self: Any, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == 1 and left[0]:
            left[0] -= 1
            raise OSError("no space left on device")
        return real(self, plan, planner)

    checkpoint._Writer.write_data = broken  # type: ignore[method-assign]
    stood = saver.save(1, state(1), {"format": 1})
    left[0] = 99
    fell = saver.save(2, state(2), {"format": 1})
    return {"stood": stood, "fell": fell, "said": said, "latest": latest(Path(root))}


def test_a_failed_save_is_said_and_tried_again_and_kills_nothing(ranks: Any, tmp_path: Path) -> None:
    for told in ranks(2, fail_then_save, root=str(tmp_path / "c")):
        assert told["stood"] and not told["fell"] and told["latest"] == 1
        assert sum(line.startswith("warning") for line in told["said"]) == 2 + 3


def fail_to_stage(root: str) -> dict[str, Any]:
    said: list[str] = []
    saver = Saver(Path(root), 2, dist.new_group(backend="gloo"), said.append)
    saver.start(1, state(1), {"format": 1})
    saver.finish()
    assert saver._stager is not None

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory to pin")

    saver._stager._state_dict_stager.stage = broken  # type: ignore[method-assign]
    saver.start(2, state(2), {"format": 1})
    saver.staged()
    saver.finish()
    saver.close()
    return {"said": said, "failed": saver.failed}


def test_a_copy_that_fails_is_a_save_that_fails(ranks: Any, tmp_path: Path) -> None:
    told = ranks(1, fail_to_stage, root=str(tmp_path / "c"))[0]
    assert told["failed"] and "no memory to pin" in told["said"][-1]


def misfit(root: str) -> str:
    control = dist.new_group(backend="gloo")
    tensors = state(1)
    tensors["model.other"] = tensors.pop("model.wide")
    tensors["optim.step"] = torch.zeros(2)
    try:
        load(Path(root), 3, tensors, control)
    except ValueError as error:
        return str(error)
    return "no error"


def test_another_model_is_refused_by_name(ranks: Any, saved: Path) -> None:
    text = ranks(1, misfit, root=str(saved))[0]
    assert "model.other is missing there" in text and "model.wide is unknown here" in text and "optim.step is" in text
    assert text.endswith(f"optimizer of {saved.parent / 'config.yaml'}, or start a run under a new name")


def test_nothing_is_unpickled(saved: Path) -> None:
    for file in folder_of(saved, 3).iterdir():
        content = file.read_bytes()
        assert file.suffix in (".safetensors", ".json")
        assert content[:2] != b"PK" and not content.startswith(b"\x80")
