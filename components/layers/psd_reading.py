"""Photoshop documents of other programs as straight RGBA layers: what shows of each layer, on the whole canvas.

A document can say more than a stack of layers laid over each other can. What such a stack holds exactly is read:
groups, opacities, pixel masks, and the pixels that text and placed images are stored with. Hidden layers are left out
and named. All else is refused by the layer's name, since other layers than the document's would be measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from layerloop.components.layers.stack import Pixels
from layerloop.components.schema.errors import LayerloopError

Shares = npt.NDArray[np.float32]  # of each pixel, 0..1
_RASTER = ("pixel", "type", "smartobject", "shape")  # kinds that may be stored with their pixels
_MODES = ("RGB", "GRAYSCALE")


@dataclass(frozen=True)
class Document:
    """Layers `(H, W, 4)` uint8, straight RGBA, bottom first, and the names of layers that are hidden."""

    layers: Sequence[Pixels]
    hidden: Sequence[str]


def read_document(path: Path) -> Document:
    """The layers of a `.psd` or `.psb`, groups opened.

    Raises:
        LayerloopError: it is no document, or a layer of it is more than straight RGBA; the line names the layer.
    """
    from psd_tools import PSDImage
    from psd_tools.compression import PSDDecompressionWarning

    hidden: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PSDDecompressionWarning)  # else a damaged channel is read as black
            document = PSDImage.open(path)
            if document.color_mode.name not in _MODES:
                raise _refused(path, f"is {document.color_mode.name}", "convert it to RGB")
            return Document(_visible(document, document, path, hidden), hidden)
    except LayerloopError:
        raise
    except Exception as error:  # psd-tools raises nearly anything on files that are none
        raise LayerloopError(f"{path} cannot be read as a PSD ({type(error).__name__}): save it again") from None


def _visible(parent: Any, document: Any, path: Path, hidden: list[str]) -> list[Pixels]:
    """The layers of a document or group; `hidden` takes the names of those that do not show."""
    found = []
    for layer in parent:
        if not layer.visible:
            hidden.append(layer.name)
            continue
        _check_layer(layer, path)
        if layer.is_group():
            inner, shares = _visible(layer, document, path, hidden), _shares(layer, document, path)
            if float(shares.min()) < 1 and len(inner) > 1 and _overlap(inner):
                what = f"has the group {layer.name!r} of {len(inner)} layers that overlap, with an opacity or a mask"
                raise _refused(path, what, "merge the group")
            found += [_faded(pixels, shares) for pixels in inner]
        else:
            found.append(_faded(_pixels(layer, document, path), _shares(layer, document, path)))
    return found


def _refused(path: Path, what: str, remedy: str) -> LayerloopError:
    return LayerloopError(f"{path} {what}, which is no stack of RGBA layers: {remedy}, or give PNGs")


def _check_layer(layer: Any, path: Path) -> None:
    """Raises LayerloopError where a layer's look depends on more than its pixels, its masks and its opacity."""
    blend = layer.blend_mode.name.lower()
    name = f"the {'group' if layer.is_group() else 'layer'} {layer.name!r}"
    if blend not in ("normal", *(("pass_through",) if layer.is_group() else ())):
        raise _refused(path, f"has {name} in blend mode {blend.replace('_', ' ')}", "merge it with what lies below")
    if layer.clipping:
        raise _refused(path, f"has {name} clipped to the one below", "merge both")
    if layer.has_effects() and layer.effects.enabled and any(effect.enabled for effect in layer.effects):
        raise _refused(path, f"has {name} with layer effects", "rasterise its style")
    if not layer.is_group() and (layer.kind not in _RASTER or not layer.has_pixels()) and not _is_empty(layer):
        raise _refused(path, f"has {name}, a {layer.kind} without pixels of its own", "rasterise it")


def _is_empty(layer: Any) -> bool:
    """Whether it is an empty layer: one of pixels, of which it has none."""
    return layer.kind == "pixel" and (layer.width == 0 or layer.height == 0)


def _pixels(layer: Any, document: Any, path: Path) -> Pixels:
    """A layer's own pixels `(H, W, 4)` on the canvas; beyond its edges they are cut off."""
    from PIL import Image

    canvas = Image.new("RGBA", document.size)
    image = None if _is_empty(layer) else layer.topil()
    if image is not None:
        canvas.paste(image.convert("RGBA"), layer.offset)
    elif not _is_empty(layer):
        raise _refused(path, f"has the layer {layer.name!r} whose pixels cannot be read", "rasterise it")
    return np.asarray(canvas)


def _shares(layer: Any, document: Any, path: Path) -> Shares:
    """How much of a layer or group its opacities and mask let through, `(H, W)`, 0..1."""
    from PIL import Image

    width, height = document.size
    opacity = layer.opacity / 255 * (1 if layer.is_group() else layer.fill_opacity / 255)
    shares: Shares = np.full((height, width), opacity, np.float32)
    mask = layer.mask if layer.has_mask() else None
    combined = mask is not None and mask.has_real()
    if layer.has_vector_mask() and not combined and not layer.vector_mask.disabled:
        raise _refused(path, f"has {layer.name!r} with a vector mask", "rasterise the mask")
    if mask is None or mask.disabled:
        return shares
    image, how = mask.topil(), mask.parameters
    dense = how is None or (how.user_mask_density in (None, 255) and not how.user_mask_feather)
    if not dense or (image is None and mask.width and mask.height):
        raise _refused(path, f"has {layer.name!r} with a mask of a density, a feather or no pixels", "apply the mask")
    plane = Image.new("L", document.size, mask.background_color)
    if image is not None:
        plane.paste(image.convert("L"), (mask.left, mask.top))
    shares *= np.asarray(plane, np.float32) / 255
    return shares


def _faded(pixels: Pixels, shares: Shares) -> Pixels:
    out = pixels.copy()
    out[..., 3] = np.rint(pixels[..., 3] * shares)
    out[out[..., 3] == 0] = 0
    return out


def _overlap(layers: Sequence[Pixels]) -> bool:
    """Whether two of the layers cover one pixel."""
    return bool((np.sum([layer[..., 3] > 0 for layer in layers], axis=0) > 1).any())
