from pathlib import Path

import pytest
import torch

from loratune.errors import StorageError
from loratune.finetune.checkpoint import Checkpoint, capture, newest_checkpoint, remove_leftovers, restore, save_checkpoint


def trained(steps: int, seed: int = 0) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    torch.manual_seed(seed)
    parameters = {"b": torch.nn.Parameter(torch.randn(3)), "a": torch.nn.Parameter(torch.randn(2, 2))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    train(parameters, optimizer, steps)
    return parameters, optimizer


def train(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p**3).sum() for p in parameters.values()).backward()
        optimizer.step()


def written(folder: Path, step: int, *, run: str = "x", moments: bool = True) -> Path:
    parameters, optimizer = trained(step)
    return save_checkpoint(
        folder, Checkpoint(step=step, run=run, tensors=capture(parameters, optimizer if moments else None), facts={"loss": 0.1 + 0.2})
    )


def test_goes_on_bit_for_bit(tmp_path: Path) -> None:
    written(tmp_path, 3)
    parameters, optimizer = trained(0, seed=9)
    found = newest_checkpoint(tmp_path, run="x", at_most=5, moments_below=5)
    assert found is not None
    assert found.facts == {"loss": 0.1 + 0.2}
    restore(found, parameters, optimizer)
    train(parameters, optimizer, 4)
    assert all(torch.equal(p, q) for p, q in zip(parameters.values(), trained(7)[0].values(), strict=True))


def test_before_the_first_step(tmp_path: Path) -> None:
    written(tmp_path, 0)
    parameters, optimizer = trained(0, seed=9)
    restore(newest_checkpoint(tmp_path, run="x", at_most=5, moments_below=5), parameters, optimizer)  # type: ignore[arg-type]
    train(parameters, optimizer, 2)
    assert all(torch.equal(p, q) for p, q in zip(parameters.values(), trained(2)[0].values(), strict=True))


def test_only_the_newest_stays(tmp_path: Path) -> None:
    written(tmp_path, 1)
    (tmp_path / ".checkpoint-0000002.safetensors.99").write_bytes(b"torn")
    (tmp_path / "log.txt").touch()
    elsewhere = tmp_path / ".checkpoint-0000003.safetensors.node7@99.1"
    elsewhere.write_bytes(b"an older attempt writes it, on another machine")
    path = written(tmp_path, 4)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "log.txt", elsewhere.name}


def test_which_one_is_used(tmp_path: Path) -> None:
    path = written(tmp_path, 4)
    keep = path.read_bytes()
    done = written(tmp_path, 6, moments=False)
    path.write_bytes(keep)
    (tmp_path / "checkpoint-0000005.safetensors").write_bytes(keep[:100])  # damaged

    def step(**options: object) -> int | None:
        found = newest_checkpoint(tmp_path, **{"run": "x", "at_most": 9, "moments_below": 6, **options})  # type: ignore[arg-type]
        return found.step if found else None

    assert step() == 6
    assert step(moments_below=9) == 4  # the complete one cannot be trained on
    assert step(at_most=5) == 4
    assert step(at_most=3) is None
    assert step(run="other hyperparameters") is None
    remove_leftovers(tmp_path, keep=done)
    assert not path.exists()
    assert newest_checkpoint(tmp_path / "nowhere", run="x", at_most=1, moments_below=1) is None


def test_a_full_disk_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, 1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        written(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
