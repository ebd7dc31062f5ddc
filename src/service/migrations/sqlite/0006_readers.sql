-- The oldest version that may still use the database after a migration, for each from here on.
CREATE TABLE migration_readers (
    migration INTEGER NOT NULL PRIMARY KEY,
    -- The newest migration that this version knows, and the release that it is in.
    reader INTEGER NOT NULL,
    reader_release TEXT NOT NULL
);
INSERT INTO migration_readers (migration, reader, reader_release) VALUES (6, 5, '0.2.0');
