"""What every test can rely on."""

import os

import pytest


@pytest.fixture(autouse=True)
def environment():
    """Some commands set or drop variables of their process (`bench` what makes bits repeatable and products slow):
    the next test, and the processes that it starts, must not feel it."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    for name in after.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if after.get(name) != value})
