"""TIFFs as their specification has them, where Pillow alone reads another page or other pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerloop.components.schema.errors import LayerloopError

if TYPE_CHECKING:
    from PIL import Image

# Tags of TIFF 6.0.
_NEW_SUBFILE_TYPE, _SUB_IFDS = 254, 330
_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANES, _COLOURS, _EXTRA = 258, 259, 262, 284, 320, 338
_SUBSAMPLING = 530
_YCBCR, _SEPARATE, _PREMULTIPLIED = 6, 2, 1  # values of _PHOTOMETRIC, _PLANES and _EXTRA

_MOST_THUMBNAILS = 8  # pages looked at
# What libtiff gives is in the machine's order; Pillow (13.0) reads these in the file's.
_NATIVE = {"F;32BF": "F;32NF", "I;32BS": "I;32NS", "I;16BS": "I;16NS"}


def choose_page(image: Image.Image) -> None:
    """Go to the first page of a TIFF that is a picture and not a smaller version of one (TIFF 6.0, section 8,
    NewSubfileType). One that is alone with its mark is taken for a picture.

    Raises:
        LayerloopError: the picture is where it is not read from, as in the raw files of cameras.
    """
    elsewhere = _SUB_IFDS in _tags(image)
    for page in range(1, _MOST_THUMBNAILS):
        if not int(_tags(image).get(_NEW_SUBFILE_TYPE, 0)) & 1:
            return
        try:
            image.seek(page)
        except EOFError:
            break
    if elsewhere:
        raise LayerloopError("image is a raw or layered TIFF, of which only a thumbnail can be read: export it as PNG")
    image.seek(0)


def set_layout(image: Any) -> None:
    """Have the pixels of an opened page decoded as they lie: planes of more than 8 bits or of premultiplied colours,
    subsampled YCbCr without compression, what libtiff has unpacked of numbers in the other order of bytes, and
    palettes of 8 bits, which old programs wrote.

    Raises:
        LayerloopError: grey and alpha in planes, of which Pillow reads no alpha.
    """
    tags = _tags(image)
    planes = tags.get(_PLANES) == _SEPARATE and len(image.getbands()) > 1
    if planes and image.mode in ("LA", "La", "PA"):
        raise LayerloopError(
            "image is a TIFF with its alpha in a plane of its own, which is not read of grey: save it as PNG"
        )
    if tags.get(_COMPRESSION, 1) == 1:
        deep = max(tags.get(_BITS, (1,))) > 8
        if planes and (deep or _PREMULTIPLIED in tags.get(_EXTRA, ())):
            _by_libtiff(image, f"{image.mode};16N" if deep else image.mode)
        elif tags.get(_PHOTOMETRIC) == _YCBCR and tuple(tags.get(_SUBSAMPLING, (2, 2))) != (1, 1):
            image._mode = "RGB"
            _by_libtiff(image, "RGBX")
    elif image.tile and (native := _NATIVE.get(image.tile[0].args[0])):
        image.tile = [tile._replace(args=(native, *tile.args[1:])) for tile in image.tile]
    if image.mode == "P" and 0 < max(tags.get(_COLOURS, (0,))) < 256:
        from PIL import ImagePalette

        image.palette = ImagePalette.raw("RGB;L", bytes(tags[_COLOURS]))


def _by_libtiff(image: Any, layout: str) -> None:
    """Decode an uncompressed page by libtiff, as Pillow decodes compressed ones (TiffImageFile._setup)."""
    from PIL import ImageFile

    image.use_load_libtiff = True
    image.tile = [ImageFile._Tile("libtiff", (0, 0, *image._tile_size), 0, (layout, False, image.tag_v2.offset))]


def _tags(image: Any) -> Any:
    return image.tag_v2
