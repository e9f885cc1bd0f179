"""Glyphs: their number, their parts, their classes, and the file that keeps them."""

import pytest


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Images of every tenth character, so that the tests are quick."""
