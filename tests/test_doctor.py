"""The doctor's list: what works here, what is refused and why, and whose weights are still to be fetched."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from recon.doctor import option_rows


def test_states_and_weights_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--depth-anything--Depth-Anything-V2-Small-hf").mkdir()
    states = {(row["group"], row["option"]): row["state"] for row in option_rows()}
    assert states["model", "vggt-1b"] == "ok; weights facebook/VGGT-1B are not here, the first run fetches them"
    assert states["depth", "da2-large"].startswith("ok; weights depth-anything/")
    named = (("depth", "da2-small"), ("model", "vggt-mini"), ("depth", "da2-twin"), ("depth", "recorded"))
    assert [states[key] for key in named] == ["ok"] * 4
    assert states["source", "images"] == "source=images needs source.path"
