"""Backends by entry point: found, suggested, checked against the contract."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest

from treelora_cli.backend import registry
from treelora_cli.backend.contract import Backend
from treelora_cli.config import BaseConfig, Config
from treelora_cli.errors import ModelError, UsageError


class Toy:
    """A third party's backend."""

    name = "toy"

    def defaults(self) -> Config:
        return Config()

    def resolve_base(self, base: BaseConfig, *, offline: bool) -> BaseConfig:
        return base

    def load(self, config: Config, runtime: Any) -> Any:
        raise NotImplementedError


class NotABackend:
    name = "half"


instance = Toy()


def points(*pairs: tuple[str, str]) -> Any:
    found = [metadata.EntryPoint(name, value, registry.GROUP) for name, value in pairs]
    return lambda group: found if group == registry.GROUP else []


def test_the_built_in_backends_register_by_entry_point() -> None:
    assert "vit" in registry.backend_names()
    backend = registry.load_backend("vit")
    assert isinstance(backend, Backend)
    assert backend.name == "vit"


@pytest.mark.parametrize("target", ["Toy", "instance"])
def test_a_third_partys_backend_is_loaded(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr(metadata, "entry_points", points(("toy", f"{__name__}:{target}")))
    assert registry.backend_names() == ["toy"]
    assert registry.load_backend("toy").name == "toy"


def test_an_unknown_name_lists_and_suggests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", points(("toy", f"{__name__}:Toy"), ("vit", "a:b")))
    with pytest.raises(UsageError, match=r"^Unknown backend 'tyo' \(did you mean 'toy'\?\)\. Known: toy, vit\.$"):
        registry.load_backend("tyo")
    monkeypatch.setattr(metadata, "entry_points", points())
    with pytest.raises(UsageError, match=r"^Unknown backend 'vit'\. Known: none installed\.$"):
        registry.load_backend("vit")


def test_one_name_for_two_backends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", points(("toy", "a:A"), ("toy", "b:B")))
    with pytest.raises(UsageError, match=r"'toy' is registered twice \(a:A and b:B\)\. Uninstall one of them\."):
        registry.load_backend("toy")
    monkeypatch.setattr(metadata, "entry_points", points(("toy", f"{__name__}:Toy"), ("toy", f"{__name__}:Toy")))
    assert registry.load_backend("toy").name == "toy", "the same registration seen twice is one"


def test_an_object_that_does_not_meet_the_contract_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", points(("half", f"{__name__}:NotABackend")))
    with pytest.raises(UsageError, match=r"Backend 'half' \(.*:NotABackend\) does not meet treelora_cli\.backend\."):
        registry.load_backend("half")


def test_a_backend_that_calls_itself_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A project remembers the backend's own name: under another one it could never be opened again."""
    monkeypatch.setattr(metadata, "entry_points", points(("mine", f"{__name__}:Toy")))
    line = r"^Backend 'mine' \(.*:Toy\) calls itself 'toy': .* Set its 'name' to 'mine'\.$"
    with pytest.raises(UsageError, match=line):
        registry.load_backend("mine")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", points(("gone", "no_such_package:X")))
    with pytest.raises(ModelError, match=r"Backend 'gone' cannot be imported: No module named 'no_such_package'\."):
        registry.load_backend("gone")


def test_a_missing_attribute_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", points(("gone", f"{__name__}:Nothing")))
    with pytest.raises(ModelError, match=r"Backend 'gone' cannot be imported: .*Nothing"):
        registry.load_backend("gone")
