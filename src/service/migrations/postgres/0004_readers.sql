-- The oldest version that may still use the database after a migration, for each from here on.
CREATE TABLE migration_readers (
    migration BIGINT NOT NULL PRIMARY KEY,
    -- The newest migration that this version knows, and the release that it is in.
    reader BIGINT NOT NULL,
    reader_release TEXT NOT NULL
);
INSERT INTO migration_readers (migration, reader, reader_release) VALUES (4, 3, '0.2.0');
