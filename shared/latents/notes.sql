-- notes.sqlite of a latents folder, version 1: all that people and language models say of latents.
CREATE TABLE explanation (
  id INTEGER PRIMARY KEY, latent INTEGER NOT NULL, text TEXT NOT NULL, method TEXT NOT NULL, author TEXT NOT NULL,
  created TEXT NOT NULL, details TEXT NOT NULL DEFAULT '{}'  -- details: JSON
);
CREATE INDEX explanation_of ON explanation(latent);
CREATE TABLE score (  -- value NULL: it could not be computed, and details say why
  id INTEGER PRIMARY KEY, explanation INTEGER NOT NULL REFERENCES explanation(id) ON DELETE CASCADE,
  scorer TEXT NOT NULL, value REAL, low REAL, high REAL, created TEXT NOT NULL, details TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX score_of ON score(explanation);
CREATE TABLE note (latent INTEGER PRIMARY KEY, text TEXT NOT NULL, changed TEXT NOT NULL);
CREATE TABLE label (latent INTEGER NOT NULL, label TEXT NOT NULL, PRIMARY KEY (latent, label)) WITHOUT ROWID;
CREATE TABLE list (name TEXT PRIMARY KEY, created TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE list_member (
  list TEXT NOT NULL REFERENCES list(name) ON DELETE CASCADE ON UPDATE CASCADE, latent INTEGER NOT NULL,
  place INTEGER NOT NULL, PRIMARY KEY (list, latent)
) WITHOUT ROWID;
CREATE TABLE concept (  -- results of a search for a concept's latents
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, definition TEXT NOT NULL, created TEXT NOT NULL, result TEXT NOT NULL
);
CREATE TABLE answer (  -- of language models, by the SHA-256 of the request
  request TEXT PRIMARY KEY, answer TEXT NOT NULL, created TEXT NOT NULL
) WITHOUT ROWID;
-- rowid: twice an explanation's id, or twice a note's latent and one. No triggers: a stranger's file may run no code.
CREATE VIRTUAL TABLE search USING fts5(text, kind UNINDEXED, latent UNINDEXED, tokenize = 'trigram');
PRAGMA user_version = 1;
