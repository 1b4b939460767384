"""Fixtures of the tests that exchange folders with transformers."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def transformers():
    """Quiet: it logs much and draws progress bars. Without it installed the parity tests are skipped."""
    module = pytest.importorskip("transformers")
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "export")
    return tmp_path / "export"
