"""Tiny models with their architectures, for the tests of the capture."""

from __future__ import annotations

import pytest

import tiny_models
from bitwright import archs


@pytest.fixture(scope="module", params=tiny_models.CONFIGS)
def case(request):
    model = tiny_models.make(request.param)
    arch = archs.find(model.config.to_dict())
    return model, arch


@pytest.fixture
def llama():
    model = tiny_models.make("llama")
    return model, archs.find(model.config.to_dict())
