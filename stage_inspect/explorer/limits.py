"""What one request may ask for at most."""

BODY_BYTES = 1 << 20
TEXT_CHARACTERS = 20_000
TEXT_TOKENS = 1024  # that the model reads; a longer text is cut
GENERATED_TOKENS = 400
NOTE_CHARACTERS = 2000
NAME_CHARACTERS = 80  # of a list
LIST_LATENTS = 100_000
QUERY_CHARACTERS = 200
CONCEPTS = 20  # looked for at once
CONCEPT_CHARACTERS = 400  # of an expression, or of a token's text
TOKEN_HITS = 20_000  # latents that fire on a token that is searched for
