-- Who may write for a job that is on a device, until when, and how much of it is stored already.
ALTER TABLE jobs ADD COLUMN lease_owner TEXT;
ALTER TABLE jobs ADD COLUMN lease_token INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN lease_until INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN lease_writes INTEGER NOT NULL DEFAULT 0;
-- How often its worker was lost without getting beyond a step.
ALTER TABLE jobs ADD COLUMN reclaims INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN reclaim_step INTEGER NOT NULL DEFAULT 0;
-- Since when it waits: its place among jobs of one priority.
ALTER TABLE jobs ADD COLUMN turn INTEGER NOT NULL DEFAULT 0;
UPDATE jobs SET turn = create_time;
-- Whose it is, and when it goes.
ALTER TABLE jobs ADD COLUMN owner TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN expire_time INTEGER;
ALTER TABLE datasets ADD COLUMN owner TEXT NOT NULL DEFAULT '';
-- The hash of the checkpoint's state file, which lists the hashes of its other files; empty for older ones.
ALTER TABLE checkpoints ADD COLUMN digest TEXT NOT NULL DEFAULT '';
DROP INDEX jobs_by_turn;
CREATE INDEX jobs_by_turn ON jobs (state, priority DESC, turn, seq);

CREATE TABLE tokens (
    id TEXT NOT NULL PRIMARY KEY,
    owner TEXT NOT NULL,
    roles TEXT NOT NULL,
    hash TEXT NOT NULL,
    create_time INTEGER NOT NULL,
    expire_time INTEGER
);
