"""Photoshop documents and zips, opened again by other programs' readers."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from PIL import Image
from psd_tools import PSDImage

from layerloop.components.layers.export import layer_names, read_psd, write_png_zip, write_psd
from layerloop.components.layers.stack import Pixels, composite, on_backdrop
from layerloop.components.schema.errors import LayerloopError


def soft_stack() -> Pixels:
    """An opaque gradient, a half-transparent card, a blank layer, noise with every alpha: (4, 24, 40, 4)."""
    stack = np.zeros((4, 24, 40, 4), np.uint8)
    stack[0] = 255
    stack[0, ..., 0] = np.arange(40) * 6
    stack[1, 4:20, 6:30] = (200, 40, 90, 128)
    stack[3] = np.random.default_rng(0).integers(0, 256, (24, 40, 4))
    return stack


def test_a_document_reopens_with_the_same_layers() -> None:
    stack = soft_stack()
    seen = read_psd(write_psd(stack))
    assert np.array_equal(seen[..., 3], stack[..., 3])
    shown = stack[..., 3] > 0
    assert np.array_equal(seen[shown], stack[shown])


def test_a_document_keeps_real_alpha_and_not_masks() -> None:
    document = PSDImage.open(io.BytesIO(write_psd(soft_stack())))
    assert [layer.name for layer in document] == ["Background", "Layer 1", "Layer 2", "Layer 3"]
    assert not any(layer.has_mask() for layer in document)
    assert document[1].bbox == (6, 4, 30, 20)
    assert document.size == (40, 24)


def test_a_viewer_without_layers_sees_the_composite() -> None:
    stack = soft_stack()
    preview = Image.open(io.BytesIO(write_psd(stack))).convert("RGB")
    expected = on_backdrop(composite(stack), "white").astype(int)
    assert np.abs(np.asarray(preview).astype(int) - expected).max() <= 2


def test_a_zip_holds_each_layer_and_the_composite_exactly() -> None:
    stack = soft_stack()
    archive = zipfile.ZipFile(io.BytesIO(write_png_zip(stack)))
    assert archive.namelist() == [
        "0-background.png", "1-layer-1.png", "2-layer-2.png", "3-layer-3.png", "composite.png",
    ]  # fmt: skip
    images = [np.asarray(Image.open(archive.open(name))) for name in archive.namelist()]
    assert np.array_equal(np.stack(images[:4]), stack)
    assert np.array_equal(images[4], composite(stack))


def test_equal_layers_give_equal_bytes() -> None:
    assert write_png_zip(soft_stack()) == write_png_zip(soft_stack())


def test_names_must_be_as_many_as_layers() -> None:
    assert layer_names(1) == ["Background"]
    with pytest.raises(LayerloopError, match="1 names were given for 4 layers"):
        write_psd(soft_stack(), ["only one"])
