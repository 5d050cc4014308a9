"""Photoshop documents of other programs as straight RGBA layers: what shows of each layer, on the whole canvas.

A document can say more than a stack of layers laid over each other can. What such a stack holds exactly is read:
groups, opacities, pixel masks, and the pixels that text and placed images are stored with. Hidden layers are left out
and named. All else is refused by the layer's name, since other layers than the document's would be measured. Layers are
read one at a time, so that memory does not grow with their number.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from layerloop.components.layers.normalise import upright_srgb
from layerloop.components.layers.stack import Pixels
from layerloop.components.schema.errors import LayerloopError

Shares = npt.NDArray[np.float32]  # of each pixel, 0..1

MOST_PIXELS = 100_000_000  # of the canvas, as of pictures
_MOST_BYTES = 2**31  # that psd-tools may take for one layer, which may be larger than the canvas
_RASTER = ("pixel", "type", "smartobject", "shape")  # kinds that may be stored with their pixels
_MODES = ("RGB", "GRAYSCALE")
_DEPTHS = (8, 16)  # bits a channel; with 32 values are linear light
_WHOLE = [(0, 65535), (0, 65535)]  # of "blend if": black and white of the layer and of what is below
_LONGEST_NAME = 60  # characters of a layer's name in a message


def read_layers(path: Path, hidden: list[str]) -> Iterator[Pixels]:
    """The layers of a `.psd` or `.psb`, groups opened: `(H, W, 4)` uint8, straight RGBA, bottom first. `hidden` takes
    the names of layers that do not show.

    Raises:
        LayerloopError: it is no document, or a layer of it is more than straight RGBA; the line names the layer.
    """
    from psd_tools import PSDImage

    try:
        with _strictly(path):
            document = PSDImage.open(path, max_alloc_bytes=_MOST_BYTES)
        _check_document(document, path)
        yield from _visible(document, document, path, hidden)
    except LayerloopError:
        raise
    except Exception as error:  # psd-tools raises nearly anything on files that are none
        raise LayerloopError(f"{path} cannot be read as a PSD ({type(error).__name__}): save it again") from None


class _Lost(logging.Handler):
    """Hears of what psd-tools could not read and passed over, after which a layer may lack a mask or an effect."""

    _WORDS = ("Invalid signature", "Truncated MaskParameters", "unbalanced", "negative length", "is invalid")

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message about what is lost."""
        message = " ".join(record.getMessage().split())
        if any(words in message for words in self._WORDS):
            self.found.append(message[:_LONGEST_NAME])


@contextmanager
def _strictly(path: Path) -> Iterator[None]:
    """Raises LayerloopError where psd-tools passes over something within this context; what it says is not printed."""
    from psd_tools.compression import PSDDecompressionWarning

    logger, lost = logging.getLogger("psd_tools"), _Lost()
    logger.addHandler(lost)
    passed_on, logger.propagate = logger.propagate, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", PSDDecompressionWarning)  # else a damaged channel is read as black
            yield
    finally:
        logger.removeHandler(lost)
        logger.propagate = passed_on
    if lost.found:
        raise LayerloopError(f"{path} is damaged ({lost.found[0]}): save it again")


def _check_document(document: Any, path: Path) -> None:
    """Raises LayerloopError where its pixels are no 8-bit RGB, or too many."""
    width, height = document.size
    if document.color_mode.name not in _MODES:
        raise _refused(path, f"is {document.color_mode.name}", "convert it to RGB")
    if document.depth not in _DEPTHS:
        raise _refused(path, f"has {document.depth} bits a channel", "convert it to 8 bits")
    if not 1 <= width * height <= MOST_PIXELS:
        what = f"is {width} x {height}, of {MOST_PIXELS / 1e6:g} megapixels at most"
        raise LayerloopError(f"{path} {what}: make it smaller")


def _visible(parent: Any, document: Any, path: Path, hidden: list[str]) -> Iterator[Pixels]:
    """The layers of a document or group, one by one."""
    for layer in parent:
        if not layer.visible:
            hidden.append(_named(layer))
            continue
        _check_layer(layer, path)
        shares = _shares(layer, document, path)
        if not layer.is_group():
            yield _faded(_pixels(layer, document, path), shares)
            continue
        covered = np.zeros(document.size[::-1], bool)
        for pixels in _visible(layer, document, path, hidden):
            shown = pixels[..., 3] > 0
            if shares is not None and (covered & shown & (shares > 0) & (shares < 1)).any():
                what = f"has the group {_named(layer)!r} of layers that overlap, with an opacity or a mask"
                raise _refused(path, what, "merge the group")
            covered |= shown
            yield _faded(pixels, shares)


def _named(layer: Any) -> str:
    """A layer's name, cut where it is long."""
    name = str(layer.name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _refused(path: Path, what: str, remedy: str) -> LayerloopError:
    return LayerloopError(f"{path} {what}, which is no stack of RGBA layers: {remedy}, or give PNGs")


def _check_layer(layer: Any, path: Path) -> None:
    """Raises LayerloopError where a layer's look depends on more than its pixels, its masks and its opacity."""
    blend = layer.blend_mode.name.lower()
    name = f"the {'group' if layer.is_group() else 'layer'} {_named(layer)!r}"
    if layer.kind == "artboard":
        raise _refused(path, f"has the artboard {_named(layer)!r}", "save each artboard as a document")
    if blend not in ("normal", *(("pass_through",) if layer.is_group() else ())):
        raise _refused(path, f"has {name} in blend mode {blend.replace('_', ' ')}", "merge it with what lies below")
    if layer.clipping:
        raise _refused(path, f"has {name} clipped to the one below", "merge both")
    if _has_effects(layer):
        raise _refused(path, f"has {name} with layer effects", "rasterise its style")
    if _is_blended_by_more(layer):
        raise _refused(path, f"has {name} with advanced blending (blend if, knockout or channels)", "merge it")
    if not layer.is_group() and (layer.kind not in _RASTER or not layer.has_pixels()) and not _is_empty(layer):
        raise _refused(path, f"has {name}, a {layer.kind} without pixels of its own", "rasterise it")


def _has_effects(layer: Any) -> bool:
    """Whether it has an effect that is on. psd-tools lists none of a block that it cannot read, nor those of programs
    that do not say `present`; these count as effects here."""
    from psd_tools.constants import Tag
    from psd_tools.psd.descriptor import Descriptor

    blocks, info = layer.tagged_blocks, "OBJECT_BASED_EFFECTS_LAYER_INFO"
    tags = [tag for tag in (Tag[info], Tag[f"{info}_V0"], Tag[f"{info}_V1"]) if tag in blocks]
    for tag in tags:
        data = blocks.get_data(tag)
        if not isinstance(data, Descriptor):
            return True
        listed = [item for value in data.values() for item in _items(value)]
        if _is_on(data, b"masterFXSwitch") and any(_is_on(item, b"enab", b"present") for item in listed):
            return True
    old = blocks.get_data(Tag.EFFECTS_LAYER) if not tags else None  # of Photoshop 5; newer ones stand beside it
    return old is not None and any(bool(getattr(effect, "enabled", False)) for effect in old.values())


def _items(value: Any) -> list[Any]:
    """The descriptors of a descriptor's value: itself, those of a list, or none."""
    from psd_tools.psd.descriptor import Descriptor, List

    return [item for item in (value if isinstance(value, List) else [value]) if isinstance(item, Descriptor)]


def _is_on(descriptor: Any, *flags: bytes) -> bool:
    """Whether none of its flags is off; one that is not there is on."""
    return all(bool(getattr(descriptor.get(flag), "value", True)) for flag in flags)


def _is_blended_by_more(layer: Any) -> bool:
    """Whether it shows by brightness ("blend if"), cuts through layers below, or changes some channels alone."""
    from psd_tools.constants import Tag

    ranges = layer._record.blending_ranges
    given = [ranges.composite_ranges, *(ranges.channel_ranges or ())] if ranges is not None else []
    by_brightness = any(some is not None and list(map(tuple, some)) != _WHOLE for some in given)
    knockout = layer.tagged_blocks.get_data(Tag.KNOCKOUT_SETTING)
    channels = layer.tagged_blocks.get_data(Tag.CHANNEL_BLENDING_RESTRICTIONS_SETTING)
    return by_brightness or bool(knockout) or bool(channels)


def _is_empty(layer: Any) -> bool:
    """Whether nothing shows of it: a layer of pixels that has none, or a text without words."""
    without = layer.width == 0 or layer.height == 0
    return without and (layer.kind == "pixel" or (layer.kind == "type" and not layer.text.strip()))


def _pixels(layer: Any, document: Any, path: Path) -> Pixels:
    """A layer's own pixels `(H, W, 4)` on the canvas; beyond its edges they are cut off."""
    from PIL import Image
    from psd_tools.constants import Resource

    canvas = Image.new("RGBA", document.size)
    with _strictly(path):
        image = None if _is_empty(layer) else layer.topil(apply_icc=False)
    if image is not None:
        image.info["icc_profile"] = document.image_resources.get_data(Resource.ICC_PROFILE)
        canvas.paste(upright_srgb(image).convert("RGBA"), layer.offset)
    elif not _is_empty(layer):
        raise _refused(path, f"has the layer {_named(layer)!r} whose pixels cannot be read", "rasterise it")
    return np.asarray(canvas)


def _shares(layer: Any, document: Any, path: Path) -> Shares | None:
    """How much of a layer or group its opacities and mask let through, `(H, W)`, 0..1; None where all of it."""
    from PIL import Image

    width, height = document.size
    opacity = layer.opacity / 255 * (1 if layer.is_group() else layer.fill_opacity / 255)
    mask: Any = layer.mask if layer.has_mask() else None
    masked = mask is not None and not mask.disabled
    vector = layer.has_vector_mask() and not layer.vector_mask.disabled
    if vector and not (masked and mask.has_real()):
        raise _refused(path, f"has {_named(layer)!r} with a vector mask", "rasterise the mask")
    if mask is None or not masked:
        return None if opacity == 1 else np.full((height, width), opacity, np.float32)
    with _strictly(path):
        image, how = mask.topil(), mask.parameters
    changes = () if how is None else (how.user_mask_feather, how.vector_mask_feather)
    densities = () if how is None else (how.user_mask_density, how.vector_mask_density)
    changed = any(changes) or any(density not in (None, 255) for density in densities)
    if changed or (image is None and mask.width and mask.height):
        raise _refused(
            path, f"has {_named(layer)!r} with a mask of a density, a feather or no pixels", "apply the mask"
        )
    plane = Image.new("L", document.size, mask.background_color)
    if image is not None:
        plane.paste(image.convert("L"), (mask.left, mask.top))
    return np.asarray(plane, np.float32) * np.float32(opacity / 255)


def _faded(pixels: Pixels, shares: Shares | None) -> Pixels:
    out = pixels.copy()
    if shares is not None:
        out[..., 3] = np.rint(pixels[..., 3] * shares)
    out[out[..., 3] == 0] = 0
    return out
