-- The work that was done for each owner, by day since 1970 (UTC).
CREATE TABLE owner_usage (
    owner TEXT NOT NULL,
    day BIGINT NOT NULL,
    scored_pairs BIGINT NOT NULL,
    scored_completions BIGINT NOT NULL,
    scored_tokens BIGINT NOT NULL,
    training_device_us BIGINT NOT NULL,
    PRIMARY KEY (owner, day)
);
INSERT INTO migration_readers (migration, reader, reader_release) VALUES (5, 3, '0.2.0');
