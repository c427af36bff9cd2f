"""A checkpoint that goes bad on disk after it was verified, and before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ram_core.errors import AlignerUnavailable
from server.aligners.checking import Checker, Sound
from tests.http.house import House, Models, house, make_models
from tests.told import TABLE


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def running(models: Models, tmp_path: Path) -> Iterator[House]:
    (tmp_path / "polite").mkdir()
    models.put("one", tmp_path / "polite" / "v1")
    with house(models, tmp_path) as opened:
        models.put("two", tmp_path / "polite" / "v2")
        yield opened


def flip(weights: Path) -> None:
    """One bit, with the file's size and times as they were but for the kernel's own."""
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_checkpoint_that_goes_bad_after_it_was_verified_is_never_served(
    running: House, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    before = running.ask().json()["choices"]
    weights = running.root / "polite" / "v2" / "model.safetensors"
    check = Checker.check

    def check_and_damage(checker: Checker, known, *args) -> Sound:
        sound = check(checker, known, *args)
        if known.key.version == "v2" and weights.exists():
            if damage == "flip":
                flip(weights)
            elif damage == "cut":
                weights.write_bytes(weights.read_bytes()[:1000])
            else:
                weights.unlink()
        return sound

    monkeypatch.setattr(Checker, "check", check_and_damage)
    running.wait(lambda service: service.add("polite", "polite/v2"))
    with pytest.raises(AlignerUnavailable, match="could not be loaded"):
        running.promote("polite", "v2")
    assert running.versions_of(running.ask()) == "polite@v1"
    assert running.ask().json()["choices"] == before
    assert running.client.get("/health/ready").status_code == 200
    TABLE.add(
        f"a checkpoint goes bad after its verification ({damage})",
        "requests: nothing, the version before answers on; the admin: why it could not be loaded",
        None,
        "nothing",
    )
