"""Images from wherever people have them, as 8-bit RGB of one size, within limits.

An image comes as a path or address, a data URL or base64, bytes of a file, a PIL image, an array or nested
list [H, W, 3], [H, W, 4] or [H, W] of 0 ... 255, or as `datasets` and chat parts write one: an object of
`bytes`, `path`, `url`, `image` or `base64`. Nothing is fetched from the network, and nothing is decoded
before its size is known.
"""

import base64
import binascii
import dataclasses
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError, shown
from rlhf_jax.core.importing import optional

MAX_PIXELS = 50_000_000
"""Pixels of the largest image that is decoded: a photograph of 48 megapixels fits, a bomb does not."""
MAX_BYTES = 50_000_000
"""Bytes of the largest file that is read."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are decoded: none that runs a program, as EPS does."""
FIELDS = ("images", "image")
"""Fields of a row that hold its images, a list or a single one."""
PART_SOURCES = ("image", "bytes", "path", "url", "base64", "image_url")
"""Fields of a part of a message's content, or of an object, in which an image may be."""


def load_image(
    source: Any, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> UInt8[np.ndarray, "H W 3"]:
    """An image as an array; what is transparent becomes white, and a photograph stands upright.

    Args:
      source: see the module.
      max_pixels: of the largest that is decoded.
      max_bytes: of the largest file that is read.

    Raises:
      UserError: there is no image in it, or one beyond a limit.
    """
    if isinstance(source, Mapping):
        source = _in_object(source)
    if _is_pil(source):
        return _decoded(source, max_pixels)
    if isinstance(source, list | tuple) or hasattr(source, "__array__"):
        return _of_array(source, max_pixels)
    if isinstance(source, str | os.PathLike):
        content, name = _content_of_text(source, max_bytes)
    elif isinstance(source, bytes | bytearray):
        content, name = bytes(source), "bytes"
    else:
        raise UserError(f"an image is a {type(source).__name__}: give a path, an array, bytes or a PIL image")
    if len(content) > max_bytes:
        raise UserError(f"{name}: the image has {len(content):,} bytes, more than {max_bytes:,}: shrink it")
    return _decoded(_opened(content, name, max_pixels), max_pixels, name)


def resize(image: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The image as a square of `size` pixels a side, whatever its shape was (Lanczos); itself where it is."""
    if image.shape[:2] == (size, size):
        return image
    pillow: Any = optional("PIL.Image", extra="vision")
    return np.asarray(pillow.fromarray(image).resize((size, size), pillow.Resampling.LANCZOS))


# Sources --------------------------------------------------------------------------------------------


def _is_pil(source: Any) -> bool:
    return type(source).__module__.partition(".")[0] == "PIL"


def _in_object(fields: Mapping[str, Any]) -> Any:
    for name in PART_SOURCES:
        value = fields.get(name)
        if value is not None:
            return _in_object(value) if isinstance(value, Mapping) else value
    raise UserError(f"an image is an object of {', '.join(map(str, fields)) or 'nothing'}: give it a path")


def _content_of_text(source: str | os.PathLike[str], max_bytes: int) -> tuple[bytes, str]:
    """(bytes of the file, what it is called in messages)."""
    text = os.fspath(source)
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise UserError(f"an image is a data URL without base64 ({shown(head)}): write it in base64")
        return _from_base64(text, max_bytes), "data URL"
    if text.startswith(("http://", "https://")):
        raise UserError(f"{shown(text)}: nothing is fetched from the network: download the image")
    if _is_there(text):
        path = files.as_path(text)
        if files.is_folder(path):
            raise UserError(f"{path}: a folder, no image: name a file in it")
        stat: Any = path.stat()
        size = stat.st_size if hasattr(stat, "st_size") else stat.length  # of a local file, or a remote one
        if size > max_bytes:
            raise UserError(f"{path}: the image has {size:,} bytes, more than {max_bytes:,}: shrink it")
        return files.read_bytes(path), text
    if len(text) < 64:  # shorter than any image
        raise UserError(f"{text}: no such image: check the path")
    return _from_base64(text, max_bytes), "base64"


def _is_there(text: str) -> bool:
    try:
        return len(text) < 4096 and files.exists(files.as_path(text))
    except OSError:  # a name of more than 255 characters
        return False


def _from_base64(text: str, max_bytes: int) -> bytes:
    if len(text) * 3 // 4 > max_bytes + 4:
        raise UserError(
            f"base64 of {len(text):,} characters is more than {max_bytes:,} bytes: shrink the image"
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{shown(text[:80])}: neither a path to an image nor base64: check it") from None


def _of_array(source: Any, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    try:
        array = np.asarray(source)
    except ValueError:  # rows of different lengths
        raise UserError("an image is nested lists of different lengths: give [H, W, 3]") from None
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] not in (3, 4) or not array.size:
        raise UserError(f"an image is an array of shape {list(array.shape)}: give [H, W, 3] or [H, W]")
    _check_pixels("an array", array.shape[1], array.shape[0], max_pixels)
    whole = array.dtype.kind in "iu"
    if not whole or (array.dtype != np.uint8 and not 0 <= array.min() <= array.max() <= 255):
        raise UserError(f"an image is an array of {array.dtype}: give whole numbers from 0 to 255")
    array = array.astype(np.uint8)
    return _on_white(array) if array.shape[2] == 4 else array


def _on_white(array: UInt8[np.ndarray, "H W 4"]) -> UInt8[np.ndarray, "H W 3"]:
    """Colours over white, by the share that the fourth channel says."""
    alpha = array[..., 3:].astype(np.float32) / 255
    return np.round(array[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


# Files ----------------------------------------------------------------------------------------------


def _check_pixels(name: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UserError(
            f"{name}: the image has {width} x {height} = {width * height:,} pixels, more than "
            f"{max_pixels:,}: shrink it"
        )


def _opened(content: bytes, name: str, max_pixels: int) -> Any:
    """A PIL image of which only the head is read."""
    pillow: Any = optional("PIL.Image", extra="vision")
    with warnings.catch_warnings():
        # PIL's own limit is looked at when a file is opened; ours says the same in one sentence.
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        try:
            return pillow.open(io.BytesIO(content), formats=FORMATS)
        except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):
            raise UserError(
                f"{name}: the image has more than {max_pixels:,} pixels, a decompression bomb: shrink it"
            ) from None
        except Exception as error:  # parsers of six formats, which raise whatever they run into
            known = ", ".join(FORMATS)
            raise UserError(f"{name}: no image that can be read ({error}): give one of {known}") from None


def _decoded(image: Any, max_pixels: int, name: str = "a PIL image") -> UInt8[np.ndarray, "H W 3"]:
    _check_pixels(name, image.width, image.height, max_pixels)
    if image.mode[0] in "IF":
        raise UserError(f"{name}: the image has more than 8 bits a channel ({image.mode}): convert it to RGB")
    try:
        image.load()
        upright = optional("PIL.ImageOps", extra="vision").exif_transpose(image)
        clear = upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info
        array = np.asarray(upright.convert("RGBA" if clear else "RGB"))
    except Exception as error:  # as in `_opened`
        raise UserError(f"{name}: the image is damaged ({error}): write it again") from None
    return _on_white(array) if clear else array


# Images as tokens -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Images as a model takes them, and the tokens that stand for one.

    Attributes:
      size: height and width of an image.
      token_id: of the image token.
      ids: what each image token of a conversation becomes: itself so often as an image has features, with
        what a model's family puts around them.
    """

    size: int
    token_id: int
    ids: tuple[int, ...]

    def pixels(self, sources: Sequence[Any]) -> UInt8[np.ndarray, "N size size 3"]:
        """Images of one row."""
        return np.stack([resize(load_image(source), self.size) for source in sources])

    def expand(self, ids: Sequence[int], mask: Sequence[bool]) -> tuple[list[int], list[bool]]:
        """Ids and mask of a conversation, in which each image token makes room for an image."""
        wide: list[int] = []
        counts: list[bool] = []
        for index, learnt in zip(ids, mask, strict=True):
            own = self.ids if index == self.token_id else (index,)
            wide += own
            counts += [learnt] * len(own)
        return wide, counts
