-- What the database knows of the whole installation, e.g. which artifact store belongs to it.
CREATE TABLE properties (
    name TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
);
