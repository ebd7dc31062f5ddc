-- The same columns as SQLite's, in the types that both have: BIGINT and TEXT.
CREATE TABLE jobs (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    version BIGINT NOT NULL,
    state TEXT NOT NULL,
    request TEXT NOT NULL,
    error TEXT,
    progress TEXT NOT NULL,
    latest_metrics TEXT NOT NULL,
    skipped_rows TEXT NOT NULL,
    create_time BIGINT NOT NULL,
    start_time BIGINT,
    end_time BIGINT,
    request_id TEXT UNIQUE,
    request_hash TEXT,
    priority BIGINT NOT NULL DEFAULT 0,
    lease_owner TEXT,
    lease_token BIGINT NOT NULL DEFAULT 0,
    lease_until BIGINT NOT NULL DEFAULT 0,
    lease_writes BIGINT NOT NULL DEFAULT 0,
    reclaims BIGINT NOT NULL DEFAULT 0,
    reclaim_step BIGINT NOT NULL DEFAULT 0,
    turn BIGINT NOT NULL DEFAULT 0,
    owner TEXT NOT NULL DEFAULT '',
    expire_time BIGINT
);
CREATE INDEX jobs_by_turn ON jobs (state, priority DESC, turn, seq);

CREATE TABLE events (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    sequence BIGINT NOT NULL,
    time BIGINT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (job, sequence)
);

CREATE TABLE checkpoints (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    step BIGINT NOT NULL,
    best BIGINT NOT NULL,
    adapter BIGINT NOT NULL,
    size_bytes BIGINT NOT NULL,
    metrics TEXT NOT NULL,
    create_time BIGINT NOT NULL,
    digest TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (job, step)
);

CREATE TABLE datasets (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    display_name TEXT NOT NULL,
    format TEXT NOT NULL,
    size_bytes BIGINT NOT NULL,
    content_hash TEXT NOT NULL,
    report TEXT NOT NULL,
    create_time BIGINT NOT NULL,
    owner TEXT NOT NULL DEFAULT ''
);

CREATE TABLE tokens (
    id TEXT NOT NULL PRIMARY KEY,
    owner TEXT NOT NULL,
    roles TEXT NOT NULL,
    hash TEXT NOT NULL,
    create_time BIGINT NOT NULL,
    expire_time BIGINT
);
