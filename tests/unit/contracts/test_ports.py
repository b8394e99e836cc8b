"""Where services listen that have to come back."""

import socket
from pathlib import Path

import pytest

from services.contracts import ports


def test_it_is_below_the_ports_of_outgoing_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "range"
    path.write_text("10003\t60999\n")
    monkeypatch.setattr(ports, "EPHEMERAL", path)
    assert {ports.free_port() for _ in range(50)} <= {10000, 10001, 10002}


def test_a_port_that_is_taken_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "FIRST", port)
        path = tmp_path / "range"
        path.write_text(f"{port + 1} 60999")
        monkeypatch.setattr(ports, "EPHEMERAL", path)
        assert ports.free_port() != port


def test_without_a_range_the_kernel_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "EPHEMERAL", tmp_path / "absent")
    assert 1024 <= ports.free_port() <= 65535
