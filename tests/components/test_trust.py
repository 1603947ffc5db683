"""The allow-list of the operator's own networks."""

from __future__ import annotations

import pytest

from components._runtime.trust import trusted_modules
from defense_core.errors import ConfigError


def test_options_and_the_image_are_joined() -> None:
    environment = {"QUARANTINE_TRUSTED_MODULES": " mynets , othernets.vision:make,,"}
    assert trusted_modules(["mynets", "labnets.small"], environment) == (
        "labnets.small",
        "mynets",
        "othernets.vision:make",
    )
    assert trusted_modules((), {}) == ()


def test_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARANTINE_TRUSTED_MODULES", "mynets")
    assert trusted_modules() == ("mynets",)


@pytest.mark.parametrize("entry", ["os", "torch", "*", "builtins:eval"])
def test_a_whole_library_is_never_trusted(entry: str) -> None:
    with pytest.raises(ConfigError, match="trusted_modules"):
        trusted_modules((), {"QUARANTINE_TRUSTED_MODULES": entry})
