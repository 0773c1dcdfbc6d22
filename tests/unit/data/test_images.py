"""Images from every kind of source, their limits, and their tokens in conversations and rows."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data import packing
from rlhf_jax.data.chat import encode_conversation, encode_prompt
from rlhf_jax.data.examples import preference_examples, prompt_examples, supervised_examples
from rlhf_jax.data.images import ImageProcessor, load_image, resize
from rlhf_jax.data.sources import as_rows
from rlhf_jax.data.tokenizers import byte_tokenizer, turn_end

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def png(pixels, width=None, height=None):
    """A PNG by hand, whose head may lie about its size."""
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width or pixels.shape[1], height or pixels.shape[0], 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = (b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.fixture
def pillow():
    return pytest.importorskip("PIL.Image")


def in_base64(content):
    return base64.b64encode(content).decode()


FROM_BYTES = {
    "bytes": lambda content: content,
    "data_url": lambda content: "data:image/png;base64," + in_base64(content),
    "base64": in_base64,
    "object": lambda content: {"bytes": content, "path": None},
    "part": lambda content: {"type": "image_url", "image_url": {"url": "data:;base64," + in_base64(content)}},
}


@pytest.mark.parametrize("kind", FROM_BYTES)
def test_an_image_in_text_or_bytes_is_its_pixels(kind, pillow):
    assert np.array_equal(load_image(FROM_BYTES[kind](png(PIXELS))), PIXELS)


def test_an_image_in_a_file_or_of_pil_is_its_pixels(tmp_path, pillow):
    path = tmp_path / "image.png"
    path.write_bytes(png(PIXELS))
    for source in (path, str(path), {"path": str(path)}, pillow.fromarray(PIXELS)):
        assert np.array_equal(load_image(source), PIXELS)


def test_an_image_in_an_array_is_its_pixels():
    for source in (PIXELS, PIXELS.tolist(), PIXELS.astype(np.int64)):
        assert np.array_equal(load_image(source), PIXELS)
    assert np.array_equal(load_image(PIXELS[..., 0]), np.repeat(PIXELS[..., :1], 3, axis=2))
    clear = np.zeros((1, 2, 4), np.uint8)
    clear[0, 1, 3] = 255
    assert load_image(clear).tolist() == [[[255, 255, 255], [0, 0, 0]]]


def test_transparent_files_stand_on_white_and_photographs_upright(pillow):
    file = io.BytesIO()
    pillow.fromarray(np.zeros((2, 2, 4), np.uint8)).save(file, "PNG")
    assert (load_image(file.getvalue()) == 255).all()
    file, turned = io.BytesIO(), pillow.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    pillow.fromarray(PIXELS).save(file, "PNG", exif=turned)
    assert np.array_equal(load_image(file.getvalue()), np.rot90(PIXELS, -1))


@pytest.mark.parametrize(("width", "height"), [(40_000, 25_000), (10_000, 8_000)])
def test_a_bomb_is_refused_before_it_is_decoded(width, height, pillow):
    with pytest.raises(UserError, match="more than 50,000,000") as refusal:
        load_image(png(PIXELS, width, height))  # the first is 10^9 pixels; it holds 35
    assert str(refusal.value).count("\n") == 0


BAD = {
    "no such file": ("nowhere.png", "no such image"),
    "network": ("https://example.org/cat.png", "nothing is fetched"),
    "no base64": ("data:image/png,abc", "without base64"),
    "neither": ("?" * 100, "neither a path to an image nor base64"),
    "no image": (b"GIF? no", "no image that can be read"),
    "cut": (png(PIXELS)[:60], "no image that can be read|damaged"),
    "fractions": (np.zeros((2, 2, 3)), "whole numbers"),
    "large numbers": (np.full((2, 2, 3), 256), "whole numbers"),
    "flat": (np.zeros(3, np.uint8), "shape"),
    "ragged": ([[1, 2], [3]], "different lengths"),
    "number": (3, "is a int"),
    "object": ({"alt": "a cat"}, "object of alt"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_image_is_refused_in_one_sentence(case):
    source, message = BAD[case]
    if isinstance(source, bytes):
        pytest.importorskip("PIL")
    with pytest.raises(UserError, match=message):
        load_image(source)


def test_limits_hold_for_every_kind_of_source(tmp_path, pillow):
    path = tmp_path / "image.png"
    path.write_bytes(png(PIXELS))
    for source in (path, png(PIXELS), PIXELS, pillow.fromarray(PIXELS)):
        with pytest.raises(UserError, match="35 pixels, more than 34"):
            load_image(source, max_pixels=34)
    for source in (path, png(PIXELS), in_base64(png(PIXELS))):
        with pytest.raises(UserError, match=r"bytes, more than 20|more than 20 bytes"):
            load_image(source, max_bytes=20)


def test_resizing_leaves_an_image_of_the_size_alone(pillow):
    square = PIXELS[:5, :5]
    assert resize(square, 5) is square
    flat = resize(np.full((9, 30, 3), 77, np.uint8), 4)
    assert flat.shape == (4, 4, 3)
    assert (flat == 77).all()


# Tokens ---------------------------------------------------------------------------------------------

SIZE = 4
PARTS = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + ':' }}{% for part in \
message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}\
{% endif %}"""


def vision_tokenizer(template=None):
    tokenizer = byte_tokenizer().with_special(["<image>", "<around>"])
    if template is not None:
        tokenizer.chat_template = template
    image, around = (tokenizer.special_tokens[name] for name in ("<image>", "<around>"))
    return tokenizer.with_images(ImageProcessor(SIZE, image, (around, image, image, image, around)))


IMAGES = np.random.default_rng(1).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)


@pytest.mark.parametrize("template", [None, PARTS])
def test_an_image_part_becomes_its_tokens_and_quoted_ones_stay_text(template):
    tokenizer = vision_tokenizer(template)
    image = tokenizer.image_processor.token_id
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "see <image>"}, {"type": "image"}]},
        {"role": "assistant", "content": "a <image>!"},
    ]
    encoded = encode_conversation(tokenizer, messages)
    assert encoded.ids.count(image) == 3
    first = encoded.ids.index(image)
    assert encoded.ids[first - 1] == encoded.ids[first + 3] == tokenizer.special_tokens["<around>"]
    learnt = [index for index, own in zip(encoded.ids, encoded.mask, strict=True) if own]
    assert tokenizer.decode(learnt, skip_special=False) == "a <image>!<|im_end|>"
    prompt = encode_prompt(tokenizer, messages[:1])
    assert encoded.ids[: len(prompt)] == prompt


def test_the_end_of_a_turn_is_found_in_a_template_that_goes_through_parts():
    tokenizer = vision_tokenizer(PARTS)
    assert tokenizer.token(turn_end(tokenizer)) == "<|im_end|>"


def test_images_of_a_row_stand_where_its_parts_are_or_before_its_first_question():
    tokenizer = vision_tokenizer()
    parts = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image", "image": IMAGES[1]}]
    rows = as_rows(
        [
            {"prompt": "what?", "completion": "this", "images": [IMAGES[0], IMAGES[2]]},
            {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "that"}]}
            | {"image": IMAGES[0]},
            {"prompt": "none?", "completion": "none"},
        ]
    )
    made = supervised_examples(rows, tokenizer, max_length=999)
    assert np.array_equal(made[0].images, IMAGES[[0, 2]])
    assert np.array_equal(made[1].images, IMAGES[[0, 1]])
    assert made[2].images is None
    image = tokenizer.image_processor.token_id
    assert [list(example.ids).count(image) for example in made] == [6, 6, 0]
    text = tokenizer.decode(made[0].ids, skip_special=False)
    assert text.startswith("<|im_start|>user\n" + "<around><image><image><image><around>" * 2 + "what?")
    (asked,) = prompt_examples(rows[1:2], tokenizer, max_length=999)
    assert asked.text == "or"
    assert np.array_equal(asked.images, IMAGES[[0, 1]])


def test_both_sides_of_a_pair_have_the_images_of_the_prompt():
    row = {"prompt": "what?", "chosen": "this", "rejected": "that", "images": [IMAGES[0]]}
    (pair,) = preference_examples(as_rows([row]), vision_tokenizer(), max_length=999)
    for side in (pair.chosen, pair.rejected):
        assert np.array_equal(side.images, IMAGES[:1])


BAD_ROWS = {
    "too few": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "more image parts than"),
    "too many": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": list(IMAGES)},
        "3 images and its messages only 1",
    ),
    "no list": ({"prompt": "a", "images": "image.png"}, "no list of images"),
    "both": ({"prompt": "a", "images": [IMAGES[0]], "image": IMAGES[0]}, "both images and image"),
    "of the assistant": (
        {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
        "models write text alone",
    ),
    "other part": ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "neither text nor"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_images_that_do_not_fit_their_messages_are_refused(case):
    row, message = BAD_ROWS[case]
    with pytest.raises(UserError, match=message):
        prompt_examples(as_rows([row]), vision_tokenizer(), max_length=999)


def test_a_model_of_text_alone_refuses_rows_with_images():
    row = {"prompt": "a", "images": [IMAGES[0]]}
    with pytest.raises(UserError, match="reads none"):
        prompt_examples(as_rows([row]), byte_tokenizer(), max_length=999)


def test_rows_hold_the_images_of_their_samples_in_order():
    rows = [{"prompt": str(n), "completion": "x", "images": list(IMAGES[:n])} for n in (2, 0, 1)]
    examples = supervised_examples(as_rows(rows), vision_tokenizer(), max_length=999)
    packed = packing.pack_rows(examples, sum(len(example.ids) for example in examples))
    assert packed.images.pixels.shape == (1, 3, SIZE, SIZE, 3)
    assert np.array_equal(packed.images.pixels[0], IMAGES[[0, 1, 0]])
    padded = packing.pad_rows(examples, 99)
    assert padded.images.present.tolist() == [[True, True], [False, False], [True, False]]
    filled = packing.pad_batch(padded, 4)
    assert filled.images.present.sum() == 3
    assert packing.pad_rows(examples[1:2], 99).images is None
    both = packing.concatenate_rows([packing.pad_rows([example], 99) for example in examples])
    assert np.array_equal(both.images.pixels, padded.images.pixels)
    assert np.array_equal(both.images.present, padded.images.present)
