CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    version INTEGER NOT NULL,
    state TEXT NOT NULL,
    request TEXT NOT NULL,
    error TEXT,
    progress TEXT NOT NULL,
    latest_metrics TEXT NOT NULL,
    skipped_rows TEXT NOT NULL,
    create_time INTEGER NOT NULL,
    start_time INTEGER,
    end_time INTEGER,
    request_id TEXT UNIQUE,
    request_hash TEXT
);
CREATE INDEX jobs_by_state ON jobs (state, seq);

CREATE TABLE events (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    sequence INTEGER NOT NULL,
    time INTEGER NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (job, sequence)
) WITHOUT ROWID;

CREATE TABLE checkpoints (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    step INTEGER NOT NULL,
    best INTEGER NOT NULL,
    adapter INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    metrics TEXT NOT NULL,
    create_time INTEGER NOT NULL,
    PRIMARY KEY (job, step)
) WITHOUT ROWID;

CREATE TABLE datasets (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    display_name TEXT NOT NULL,
    format TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    content_hash TEXT NOT NULL,
    report TEXT NOT NULL,
    create_time INTEGER NOT NULL
);
