"""Bytes to text: characters of several tokens, broken ones at the edges, special tokens, hostile ones."""

from shared.latents.vocabulary import Piece, Vocabulary

SINGLE = [bytes([byte]) for byte in range(256)]
TOKENS = [*SINGLE, b"<s>", b" caf\xc3", b"\xa9 au", b"</script>", "日本".encode()]
BOS, CAF, E_AU, SCRIPT, JAPAN = range(256, 261)


def vocabulary() -> Vocabulary:
    return Vocabulary.of(TOKENS, special=[BOS])


def test_tokens_of_one_character_are_one_piece() -> None:
    smile = list("😀".encode())
    assert vocabulary().pieces([97, *smile, 98]) == [Piece("a", 0, 1), Piece("😀", 1, 5), Piece("b", 5, 6)]
    assert vocabulary().pieces([CAF, E_AU]) == [Piece(" café au", 0, 2)]
    assert vocabulary().pieces([JAPAN]) == [Piece("日本", 0, 1)]


def test_halves_at_the_edges_are_told_as_bytes() -> None:
    smile = list("😀".encode())
    assert vocabulary().text([*smile[2:], 97, *smile[:2]]) == "<0x98><0x80>a<0xF0><0x9F>"
    pieces = vocabulary().pieces([*smile[2:], 97, *smile[:2]])
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 1), (1, 2), (2, 3), (3, 5)]


def test_special_tokens_and_unknown_ids() -> None:
    found = vocabulary().pieces([240, BOS, 97, 9999, -1])
    assert [piece.text for piece in found] == ["<0xF0>", "<s>", "a", "<token 9999>", "<token -1>"]
    assert [piece.is_special for piece in found] == [False, True, False, True, True]
    literal = [ord(letter) for letter in "<s>"]
    assert not any(piece.is_special for piece in vocabulary().pieces(literal))


def test_every_token_is_in_one_piece() -> None:
    import random

    chance = random.Random(0)
    for _ in range(200):
        run = [chance.randrange(len(TOKENS)) for _ in range(chance.randrange(1, 40))]
        pieces = vocabulary().pieces(run)
        assert [number for piece in pieces for number in range(piece.start, piece.stop)] == list(range(len(run)))
        text = b"".join(b"\xff<s>\xff" if token == BOS else TOKENS[token] for token in run if token != 255)
        shown = vocabulary().text([token for token in run if token != 255])
        assert shown == text.decode(errors="granary-bytes").replace("<0xFF><s><0xFF>", "<s>")


def test_find() -> None:
    assert vocabulary().find("</script>") == [SCRIPT]
    assert vocabulary().find("a") == [97]
