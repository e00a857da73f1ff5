"""Tiny models: with their architectures for the tests of the capture, as folders for those that run
them."""

from __future__ import annotations

import pytest

import folders
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


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a float model."""
    return folders.float_folder("llama", tmp_path_factory.mktemp("float") / "llama")


@pytest.fixture(scope="module")
def quantized(source):
    """The same, quantized."""
    return folders.ours(source, source.with_name("ours"), "int4-g16-asym")
