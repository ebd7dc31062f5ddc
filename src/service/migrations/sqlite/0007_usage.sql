-- The work that was done for each owner, by day since 1970 (UTC).
CREATE TABLE owner_usage (
    owner TEXT NOT NULL,
    day INTEGER NOT NULL,
    scored_pairs INTEGER NOT NULL,
    scored_completions INTEGER NOT NULL,
    scored_tokens INTEGER NOT NULL,
    training_device_us INTEGER NOT NULL,
    PRIMARY KEY (owner, day)
);
INSERT INTO migration_readers (migration, reader, reader_release) VALUES (7, 5, '0.2.0');
