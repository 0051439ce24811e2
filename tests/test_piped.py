"""Processes on one end of a pipe."""

from __future__ import annotations

import sys
import types

import pytest

from ghoststore.piped import Ended, PipedProcess


def test_an_order_that_cannot_be_read_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It does not wait for another for ever."""
    here = types.ModuleType("only_here")
    here.Order = type("Order", (), {"__module__": "only_here"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "only_here", here)
    process = PipedProcess("indexer.tokenize.workers")
    try:
        process.send(here.Order())
        assert process.pipe.poll(60)
        with pytest.raises(Ended, match="ended with exit status 1") as ended:
            process.receive()
    finally:
        process.end()
    assert not ended.value.killed
    assert "No module named 'only_here'" in capfd.readouterr().err
