"""RGBA layer stacks as pixels: over, backdrops, alpha-aware resizing.

A stack is `(..., L, H, W, 4)` uint8, straight (non-premultiplied) alpha, bottom first: layer 0 is the background. RGB
under alpha 0 is undefined and never reaches a result here. Only numpy is imported; Pillow when something is resized.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from layerloop.components.schema.errors import LayerloopError

Pixels = npt.NDArray[np.uint8]
Backdrop = Literal["white", "black", "magenta", "grey", "checker"] | tuple[int, int, int]

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "magenta": (255, 0, 255),
    "grey": (128, 128, 128),
}
CHECKER = ((255, 255, 255), (204, 204, 204))  # the two squares of the checkerboard; the top left one is the first

RESAMPLING = ("lanczos", "bicubic", "bilinear", "box", "nearest")
Resampling = Literal["lanczos", "bicubic", "bilinear", "box", "nearest"]


def check_stack(stack: Pixels, *, what: str = "stack") -> None:
    """Raise unless `stack` is a stack `(..., L, H, W, 4)` uint8 with at least one layer and one pixel.

    Raises:
        LayerloopError: another shape or dtype, in one line that names `what`.
    """
    if not isinstance(stack, np.ndarray) or stack.dtype != np.uint8 or stack.ndim < 4 or stack.shape[-1] != 4:
        found = f"{stack.dtype}{list(stack.shape)}" if isinstance(stack, np.ndarray) else type(stack).__name__
        raise LayerloopError(f"{what} is {found}: give uint8[..., L, H, W, 4], straight RGBA, bottom layer first")
    if 0 in stack.shape:
        raise LayerloopError(f"{what} is uint8{list(stack.shape)}: a stack has at least one layer and one pixel")


def composite(stack: Pixels) -> Pixels:
    """Porter-Duff "over" of all layers, bottom first: straight RGBA `(..., H, W, 4)` uint8 of a stack `(..., L, H, W,
    4)`.

    Premultiplied colour and alpha are accumulated in float32 and rounded once at the end to the nearest level (halves
    to even), so the result is within half a level of exact arithmetic, where 8-bit compositing loses half a level a
    layer. Where nothing covers, the result is (0, 0, 0, 0).
    """
    check_stack(stack)
    colour = np.zeros((*stack.shape[:-4], *stack.shape[-3:-1], 3), np.float32)
    alpha = np.zeros((*colour.shape[:-1], 1), np.float32)
    for index in range(stack.shape[-4]):
        layer = stack[..., index, :, :, :].astype(np.float32)
        cover = layer[..., 3:] * np.float32(1 / 255)
        colour += (layer[..., :3] - colour) * cover
        alpha += (1 - alpha) * cover
    # `colour` is premultiplied by `alpha`: over a transparent start the recurrence above yields exactly that.
    straight = np.divide(colour, alpha, out=np.zeros_like(colour), where=alpha > 0)
    out = np.concatenate([straight, alpha * 255], axis=-1)
    out[out[..., 3] < 0.5] = 0  # rounds to alpha 0, where colour means nothing
    return np.rint(out).clip(0, 255).astype(np.uint8)


def on_backdrop(pixels: Pixels, backdrop: Backdrop = "checker", *, cell: int = 8) -> Pixels:
    """RGB `(..., H, W, 3)` uint8 of an image or a stack of images `(..., H, W, 3|4)` uint8, each laid on a backdrop.

    Layers are laid one by one, not composited together. `backdrop` is a name, "checker" (squares of `cell` pixels), or
    an RGB triple. Rounded to the nearest level (halves to even). RGB without alpha is returned as it is.
    """
    if pixels.dtype != np.uint8 or pixels.ndim < 3 or pixels.shape[-1] not in (3, 4):
        raise LayerloopError(f"image is {pixels.dtype}{list(pixels.shape)}: give uint8[..., H, W, 3 or 4]")
    if pixels.shape[-1] == 3:
        return pixels
    behind = backdrop_pixels(pixels.shape[-3], pixels.shape[-2], backdrop, cell=cell).astype(np.float32)
    cover = pixels[..., 3:].astype(np.float32) * np.float32(1 / 255)
    return np.rint(behind + (pixels[..., :3] - behind) * cover).astype(np.uint8)


def flatten(stack: Pixels, backdrop: Backdrop) -> Pixels:
    """The layers `(..., L, H, W, 4)` merged and laid on a backdrop: RGB `(..., H, W, 3)` uint8."""
    return on_backdrop(composite(stack), backdrop)


def backdrop_pixels(height: int, width: int, backdrop: Backdrop, *, cell: int = 8) -> Pixels:
    """The backdrop alone: `(H, W, 3)` uint8."""
    if backdrop == "checker":
        odd = (np.arange(height)[:, None] // cell + np.arange(width)[None, :] // cell) % 2
        return np.asarray(CHECKER, np.uint8)[odd]
    if isinstance(backdrop, str) and backdrop not in COLOURS:
        raise LayerloopError(f"backdrop is {backdrop!r}: choose checker, {', '.join(COLOURS)} or an RGB triple")
    colour = COLOURS[backdrop] if isinstance(backdrop, str) else backdrop
    return np.broadcast_to(np.asarray(colour, np.uint8), (height, width, 3)).copy()


def resize(pixels: Pixels, size: tuple[int, int], resampling: Resampling = "lanczos") -> Pixels:
    """Images or stacks `(..., H, W, 3|4)` uint8 resampled to `size` = (width, height), without halos.

    RGBA is premultiplied, resampled in float32 and divided by the resampled alpha again, so that the undefined colour
    under alpha 0 does not bleed into the edges (QwenLM/Qwen-Image-Layered issue 18). Filters with negative lobes
    overshoot colour and alpha alike, so colour is divided by alpha before either is clipped to [0, 1]: one flat colour
    stays that colour. "nearest" copies pixels exactly.
    """
    from PIL import Image

    width, height = size
    if width < 1 or height < 1:
        raise LayerloopError(f"size is {width}x{height}: both sides must be at least 1 pixel")
    if resampling not in RESAMPLING:
        raise LayerloopError(f"resampling is {resampling!r}: choose {', '.join(RESAMPLING)}")
    if pixels.shape[-3:-1] == (height, width):
        return pixels.copy()
    if resampling == "nearest":
        rows = (np.arange(height) * 2 + 1) * pixels.shape[-3] // (2 * height)
        columns = (np.arange(width) * 2 + 1) * pixels.shape[-2] // (2 * width)
        return np.ascontiguousarray(pixels[..., rows[:, None], columns[None, :], :])
    planes = pixels.astype(np.float32) / 255
    if pixels.shape[-1] == 4:
        planes[..., :3] *= planes[..., 3:]
    flat = np.moveaxis(planes, -1, -3).reshape(-1, *pixels.shape[-3:-1])  # (N*C, H, W): Pillow resamples one plane
    method = Image.Resampling[resampling.upper()]
    resized = np.stack([np.asarray(Image.fromarray(plane).resize((width, height), method)) for plane in flat])
    out = np.moveaxis(resized.reshape(*pixels.shape[:-3], pixels.shape[-1], height, width), -3, -1)
    return straight(out) if pixels.shape[-1] == 4 else np.rint(out.clip(0, 1) * 255).astype(np.uint8)


def straight(premultiplied: npt.NDArray[np.float32]) -> Pixels:
    """Straight RGBA `(..., 4)` uint8 of premultiplied RGBA in 0..1: colour is divided by alpha before either is
    clipped, and 0 where alpha rounds to 0."""
    colour, alpha = premultiplied[..., :3], premultiplied[..., 3:]
    seen = alpha >= 0.5 / 255
    out = np.concatenate([np.divide(colour, alpha, out=np.zeros_like(colour), where=seen), alpha], axis=-1)
    return np.rint(out.clip(0, 1) * 255).astype(np.uint8)
